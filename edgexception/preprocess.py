"""The one image transform: calibration, training and accuracy on every device use it.

How it matches the loaders that networks are trained with (the tests compare pixel by pixel):

- `resize: stretch` is `keras.utils.load_img(target_size=input_size, interpolation=...)`, and so
  what ImageDataGenerator feeds: Pillow's `convert("RGB")`, then Pillow's resize to the input size.
  Keras's default there is `nearest`.
- `image_dataset_from_directory` resizes with TensorFlow, in float and without antialiasing.
  Pillow's `bilinear` widens its filter when it shrinks, so it is the nearest in kind,
  not the same pixels. A network trained through that loader sees slightly smoother inputs here.
- `resize: shortest-side` is timm's evaluation transform (crop_mode "center"), and with a
  `crop_fraction` of 224/256 torchvision's Resize(256), CenterCrop(224): the shorter side to
  floor(size / crop_fraction), the longer one in proportion, then the center.

None of these loaders applies the EXIF orientation, so it is ignored here, too: a photo is taken as
its pixels are stored. Colour profiles are ignored and an alpha channel is dropped, as there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgexception.errors import BadArtifact, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

MAX_RESIZED_PIXELS = 2**26
"""Bound on the photo between resize and crop: a sliver of 1x9999 pixels would become gigabytes."""

Side = Annotated[int, Field(ge=32, le=4096)]
Channel = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0.0, le=1e4, allow_inf_nan=False)]
Resize = Literal["stretch", "shortest-side"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropFraction = Annotated[float, Field(gt=0.1, le=1.0)]


class Preprocess(BaseModel):
    """How a photo becomes the network's input.

    The host decodes, resizes and crops to uint8 RGB; the exported graph normalizes,
    `(pixel - mean) / std` with pixels in 0...255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input_size: tuple[Side, Side]
    """Height and width of the network's input in pixels."""
    resize: Resize = "stretch"
    """stretch: to the input size whatever the aspect (Keras's loaders).
    shortest-side: the shorter side to floor(size / crop_fraction), then a center crop (timm)."""
    interpolation: Interpolation = "bilinear"
    """Pillow's filter of that name."""
    crop_fraction: CropFraction = 1.0
    """Share of the resized shorter side that the center crop keeps; only with shortest-side."""
    mean: tuple[Channel, Channel, Channel] = (127.5, 127.5, 127.5)
    """Subtracted per RGB channel, in pixel units."""
    std: tuple[Deviation, Deviation, Deviation] = (127.5, 127.5, 127.5)
    """Divided by per RGB channel, in pixel units."""


class PreprocessChanges(BaseModel):
    """What is to be different from a checkpoint's own preprocessing; None leaves it as it is there.

    Its own is what the file says, else the convention of its format. The fields are those of
    `Preprocess`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    input_size: tuple[Side, Side] | None = None
    """Height and width of the network's input in pixels."""
    resize: Resize | None = None
    """stretch: to the input size whatever the aspect (Keras's loaders).
    shortest-side: the shorter side to floor(size / crop_fraction), then a center crop (timm)."""
    interpolation: Interpolation | None = None
    """Pillow's filter of that name."""
    crop_fraction: CropFraction | None = None
    """Share of the resized shorter side that the center crop keeps; only with shortest-side."""
    mean: tuple[Channel, Channel, Channel] | None = None
    """Subtracted per RGB channel, in pixel units."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Divided by per RGB channel, in pixel units."""

    def applied_to(self, own: Preprocess) -> Preprocess:
        """Return `own` with these changes. Raises UsageError for a crop that would do nothing."""
        changed = own.model_copy(update=self.model_dump(exclude_none=True))
        if changed.resize == "stretch" and self.crop_fraction not in (None, 1.0):
            raise UsageError(
                f"crop_fraction {self.crop_fraction} has no effect with resize stretch, which is "
                "the network's: set resize to shortest-side, or leave crop_fraction out"
            )
        return changed


def to_input(photo: Image.Image, spec: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize and crop a photo: uint8 (H, W, 3), RGB, not normalized (the graph does that).

    Raises BadArtifact for a photo so elongated that resizing its shorter side is out of bounds.
    """
    # Recipes and commands import this module, and `edgex --help` does not wait for these two.
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    resampling = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }[spec.interpolation]
    height, width = spec.input_size
    # Pillow resizes channel by channel: a gray photo is made RGB last, in a third of the time.
    photo = photo if photo.mode in ("RGB", "L") else photo.convert("RGB")
    if spec.resize == "stretch":
        return np.asarray(photo.resize((width, height), resampling).convert("RGB"))
    resized = _shortest_side_size(photo.size, spec)
    if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
        raise BadArtifact(
            f"a photo of {photo.width}x{photo.height} pixels is too elongated: with resize "
            f"'shortest-side' it would become {resized[0]}x{resized[1]}: crop it or leave it out"
        )
    # Python rounds halves to even here, and torchvision's center_crop does just that.
    left, top = round((resized[0] - width) / 2.0), round((resized[1] - height) / 2.0)
    box = (left, top, left + width, top + height)
    return np.asarray(photo.resize(resized, resampling).crop(box).convert("RGB"))


def _shortest_side_size(size: tuple[int, int], spec: Preprocess) -> tuple[int, int]:
    """Return the (width, height) after timm's resize of a photo of that (width, height).

    A square input goes through torchvision's Resize(int), which truncates the longer side; any
    other through timm's ResizeKeepRatio, which rounds both.
    """
    scaled_height, scaled_width = (math.floor(x / spec.crop_fraction) for x in spec.input_size)
    width, height = size
    if scaled_height == scaled_width:
        longer = int(scaled_width * max(size) / min(size))
        return (scaled_width, longer) if width <= height else (longer, scaled_width)
    ratio = min(height / scaled_height, width / scaled_width)
    return round(width / ratio), round(height / ratio)
