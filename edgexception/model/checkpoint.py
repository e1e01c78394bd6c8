"""Trained networks from and to files: Keras, timm, Cadene and our own safetensors.

Nothing of a file is trusted: see `tensors` (names and shapes before values), `hdf5_file`,
`archive`, and `torch_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as safetensors_bytes

from edgexception import __version__
from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, OutOfResources, UsageError
from edgexception.model.keras_file import read_keras, read_keras_hdf5
from edgexception.model.tensors import assemble, first_fault, printable, refuse
from edgexception.model.torch_file import TIMM_PREPROCESS, open_safetensors, read_pth, timm_network
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess, PreprocessChanges
from edgexception.recipe_data import ClassName

MOST_BYTES = 4 * 2**30
MOST_METADATA = 16 * 2**20
METADATA_KEY = "edgexception"
_KIND_OF_SUFFIX = {
    ".keras": "a Keras archive",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
    ".pth": "a torch file",
    ".pt": "a torch file",
    ".safetensors": "a safetensors file",
}
_MAGIC = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x80": "a torch file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
}


@dataclass(frozen=True)
class TrainedModel:
    """A trained network with what it needs to be used: class names and preprocessing."""

    network: Xception
    """float32, on the CPU, in eval mode."""
    classes: tuple[str, ...] | None
    """Class names in the order of the logits, or None where nobody named them."""
    preprocess: Preprocess
    source: dict[str, str]
    """Where it came from: format, file, sha256, producer, final_activation."""


class _Metadata(BaseModel):
    """What our own safetensors files say beside the tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    architecture: Architecture
    classes: tuple[ClassName, ...] | None
    preprocess: Preprocess
    source: dict[str, str]


def load_checkpoint(
    path: Path,
    *,
    classes: tuple[str, ...] | None = None,
    preprocess: PreprocessChanges | None = None,
) -> TrainedModel:
    """Read a trained Xception.

    `classes` overrides the file's own, and so does each field of `preprocess` that is given. What
    neither says is the format's convention (Keras: input size of the config or 299, x / 127.5 - 1;
    timm: 299, shorter side, bicubic, crop 0.8975). A softmax at the end is dropped: the output is
    logits.

    Raises `BadArtifact` naming the tensor or layer and the reason, `UsageError` for a path, class
    names or changes of the preprocessing that cannot be used.
    """
    kind = _checked_kind(path)
    try:
        if kind == "a Keras archive":
            keras = read_keras(path)
            network, own, named, source = keras.network, keras.preprocess, None, keras.source
        elif kind == "an HDF5 file":
            keras = read_keras_hdf5(path)
            network, own, named, source = keras.network, keras.preprocess, None, keras.source
        elif kind == "a torch file":
            network = timm_network(path, read_pth(path))
            own, named, source = TIMM_PREPROCESS, None, {"format": "timm", "producer": "torch"}
        else:
            network, named, own, source = _read_safetensors(path)
    except RecursionError:
        raise refuse(path, "it is nested too deep; no checkpoint is") from None
    # `file` and `sha256` are ours to say, whatever the file claims of itself.
    source = {**source, "file": path.name, "sha256": _sha256(path)}
    # A wrong list is the caller's fault or the file's.
    _check_classes(path, network.architecture, named, BadArtifact)
    _check_classes(path, network.architecture, classes, UsageError)
    if preprocess is not None:
        own = preprocess.applied_to(own)
    return TrainedModel(network, named if classes is None else classes, own, source)


def save_checkpoint(model: TrainedModel, path: Path) -> None:
    """Write our own safetensors: the same model gives the same bytes; atomic.

    Raises `OutOfResources` when the disk is full.
    """
    metadata = _Metadata(
        version=1,
        architecture=model.network.architecture,
        classes=model.classes,
        preprocess=model.preprocess,
        source=model.source,
    )
    tensors = {
        key: value.detach().to("cpu", torch.float32).contiguous()
        for key, value in sorted(model.network.state_dict().items())
        if not key.endswith("num_batches_tracked")
    }
    # One key only: the safetensors library writes several in an order that changes per process.
    text = json.dumps(metadata.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    data = safetensors_bytes(tensors, metadata={METADATA_KEY: text})
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutOfResources(
            f"{path}: cannot be written ({error.strerror or error}); free space on the disk or "
            "choose another place"
        ) from error


def _read_safetensors(
    path: Path,
) -> tuple[Xception, tuple[str, ...] | None, Preprocess, dict[str, str]]:
    with open_safetensors(path) as (metadata, tensors):
        text = metadata.get(METADATA_KEY)
        if text is None:
            network = timm_network(path, tensors)
            return network, None, TIMM_PREPROCESS, {"format": "timm", "producer": "safetensors"}
        own = _own_metadata(path, text)
        network = assemble(path, own.architecture, tensors)
    source = {f"origin_{key}": value for key, value in own.source.items() if key in _ORIGIN}
    source |= {"format": "edgexception", "producer": f"edgexception {__version__}"}
    if "final_activation" in own.source:
        source["final_activation"] = own.source["final_activation"]
    return network, own.classes, own.preprocess, source


_ORIGIN = ("format", "file", "sha256", "producer")


def _own_metadata(path: Path, text: str) -> _Metadata:
    if len(text) > MOST_METADATA:
        raise refuse(path, f"its metadata has {len(text)} characters; no Xception needs that")
    try:
        return _Metadata.model_validate_json(text)
    except ValidationError as error:
        raise refuse(path, f"its metadata is invalid: {first_fault(error)}") from None


def _checked_kind(path: Path) -> str:
    """Return what the file is, by its suffix and its first bytes, which must agree."""
    wanted = _KIND_OF_SUFFIX.get(path.suffix.lower())
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; name a checkpoint ({_suffixes()})")
    found = _sniffed(path)
    if wanted is None:
        raise UsageError(
            f"{path.name}: '{printable(path.suffix, 20)}' is no known suffix of a checkpoint "
            f"({_suffixes()}); its content is {found}"
        )
    if found != wanted:
        raise BadArtifact(
            f"{path.name}: it should be {wanted} by its suffix and is {found} by its content; "
            "rename it or download it again"
        )
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise refuse(
            path, f"it has {size} bytes; no Xception checkpoint has more than {MOST_BYTES}"
        )
    return found


def _suffixes() -> str:
    return ", ".join(sorted(_KIND_OF_SUFFIX))


def _sniffed(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head.startswith(b"PK\x03\x04"):
                # torch.save's first member is "<name>/data.pkl"; Keras's are config and weights.
                file.seek(0)
                return "a torch file" if b"/data.pkl" in file.read(1024) else "a Keras archive"
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(head) > 8 and head[8:9] == b"{":
        return "a safetensors file"
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what
    return f"unknown (it starts with {head[:8].hex(' ')})" if head else "an empty file"


def _check_classes(
    path: Path,
    architecture: Architecture,
    classes: tuple[str, ...] | None,
    fault: type[UsageError] | type[BadArtifact],
) -> None:
    if classes is None:
        return
    outputs = architecture.classes
    if outputs is None:
        raise fault(f"{path.name}: it comes with class names, and this network has no head")
    if len(classes) != outputs:
        raise fault(f"{path.name}: {len(classes)} class names for a network with {outputs} outputs")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
