"""The one image transform: calibration, training and accuracy on every device use it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Side = Annotated[int, Field(ge=32, le=4096)]
Channel = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0.0, le=1e4, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """How a photo becomes the network's input.

    The host decodes, resizes and crops to uint8 RGB; the exported graph normalizes,
    `(pixel - mean) / std` with pixels in 0...255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[Side, Side]
    """Height and width of the network's input in pixels."""
    resize: Literal["stretch", "shortest-side"] = "stretch"
    """stretch: to the input size whatever the aspect (Keras's loaders).
    shortest-side: the shorter side to floor(size / crop_fraction), then a center crop (timm)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    """Pillow's filter of that name."""
    crop_fraction: Annotated[float, Field(gt=0.1, le=1.0)] = 1.0
    """Share of the resized shorter side that the center crop keeps; only with shortest-side."""
    mean: tuple[Channel, Channel, Channel] = (127.5, 127.5, 127.5)
    """Subtracted per RGB channel, in pixel units."""
    std: tuple[Deviation, Deviation, Deviation] = (127.5, 127.5, 127.5)
    """Divided by per RGB channel, in pixel units."""
