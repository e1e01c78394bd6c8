"""Read a trained Xception of timm (`legacy_xception`) or Cadene from .pth and .safetensors.

Sources: timm/models/xception.py (its default config: 299x299, bicubic, crop 0.8975, mean and
std 0.5; BatchNorm epsilon 1e-5; max-pools padded by 1) and Cadene's pretrainedmodels, whose network
timm took over. Cadene calls the classifier `last_linear`, and the 2018 file stores pointwise
weights with two axes.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgexception.model.archive import open_archive
from edgexception.model.tensors import (
    FLOAT_TYPES,
    StoredTensor,
    Structure,
    architecture_of,
    assemble,
    listing,
    printable,
    refuse,
)
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess

TIMM_PREPROCESS = Preprocess(
    input_size=(299, 299),
    resize="shortest-side",
    interpolation="bicubic",
    crop_fraction=0.8975,
    mean=(127.5, 127.5, 127.5),
    std=(127.5, 127.5, 127.5),
)
MOST_TENSORS = 20_000
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def timm_network(path: Path, stored: Mapping[str, StoredTensor]) -> Xception:
    """Assemble the network of timm's or Cadene's state dict.

    Raises `BadArtifact` naming the first tensor that is missing, extra or of another shape.
    """
    stored = _unprefixed(stored)
    if "conv1.weight" not in stored:
        raise refuse(
            path,
            f"its tensors ({listing(stored) or 'none'}) are not those of timm's legacy_xception; "
            "this reads that network and edgexception's own files",
        )
    blocks = _blocks(path, stored)
    strided = [name for name in blocks if f"block{name}.skip.weight" in stored]
    entry = 0
    while entry < len(strided) and strided[entry] == entry + 1:
        entry += 1
    if entry == len(blocks):
        entry -= 1  # Without middle blocks the last strided one is the exit.
    if strided != [*range(1, entry + 1), len(blocks)]:
        raise refuse(
            path,
            f"its blocks with a shortcut convolution are {strided} of {len(blocks)}; Xception has "
            "them first and last",
        )
    counts = list(blocks.values())
    structure = Structure(tuple(counts[:entry]), tuple(counts[entry:-1]), counts[-1], 2)
    names = _names(structure)
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        module, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        target = f"{names.get(module, key)}.{kind}"
        if target in tensors:
            raise refuse(path, f"tensor '{printable(tensor.name)}' is there twice")
        if target.endswith(".pointwise.weight") and len(tensor.shape) == 2:
            tensor = tensor.reshaped(*tensor.shape, 1, 1)  # noqa: PLW2901
        tensors[target] = tensor
    dense = 1 if "predictions.weight" in tensors else 0
    settings = {"padding": "timm", "bn_epsilon": 1e-5}
    return assemble(path, architecture_of(path, structure, tensors, dense, settings), tensors)


def _unprefixed(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Drop what DataParallel, torch.compile and trainers put before every name."""
    for _ in range(3):
        for prefix in _PREFIXES:
            if stored and all(key.startswith(prefix) for key in stored):
                stored = {key[len(prefix) :]: tensor for key, tensor in stored.items()}
    return stored


def _blocks(path: Path, stored: Mapping[str, StoredTensor]) -> dict[int, int]:
    """Return the number of separable convolutions per block, in order."""
    blocks: dict[int, int] = {}
    for key in stored:
        match = re.fullmatch(r"block(\d{1,3})\.rep\.\d{1,3}\.conv1\.weight", key)
        if match:
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + 1
    if not blocks or sorted(blocks) != list(range(1, len(blocks) + 1)):
        raise refuse(
            path, f"its blocks are numbered {sorted(blocks)}; some of Xception are missing"
        )
    return dict(sorted(blocks.items()))


def _names(structure: Structure) -> dict[str, str]:
    """Return timm's module names -> those of `Xception`."""
    names = {"fc": "predictions", "last_linear": "predictions"}
    for index in (1, 2):
        names[f"conv{index}"] = f"block1_conv{index}"
        names[f"bn{index}"] = f"block1_conv{index}_bn"
    *blocks, (tail, _, _) = structure.blocks()
    for number, (name, count, _) in enumerate(blocks, start=1):
        names[f"block{number}.skip"] = f"{name}_shortcut"
        names[f"block{number}.skipbn"] = f"{name}_shortcut_bn"
        # `rep` is ReLU, separable, BatchNorm, ...; the first block has no ReLU in front.
        offset = 0 if number == 1 else 1
        for index in range(count):
            at, ours = 3 * index + offset, f"{name}_sepconv{index + 1}"
            names[f"block{number}.rep.{at}.conv1"] = f"{ours}.depthwise"
            names[f"block{number}.rep.{at}.pointwise"] = f"{ours}.pointwise"
            names[f"block{number}.rep.{at + 1}"] = f"{ours}_bn"
    for index in (3, 4):
        ours = f"{tail}_sepconv{index - 2}"
        names[f"conv{index}.conv1"] = f"{ours}.depthwise"
        names[f"conv{index}.pointwise"] = f"{ours}.pointwise"
        names[f"bn{index}"] = f"{ours}_bn"
    return names


# .pth


def read_pth(path: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a `.pth` state dict, headers only.

    The file is unpickled twice with `weights_only=True`: first on torch's meta device, which has
    shapes and no memory, then, when the first tensor is loaded, for its values.
    """
    held = _records(path) if _starts_as_zip(path) else None
    content = _unpickled(path, "meta")
    if held is not None:
        needed = sum(
            {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(content)
            }.values()
        )
        if needed > held:
            raise refuse(
                path, f"its tensors declare {needed} bytes and it holds {held}: values are missing"
            )
    values: dict[str, torch.Tensor] = {}

    def loader(key: str) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            if not values:
                values.update(_state(path, _unpickled(path, "cpu")))
            return values[key].detach()

        return load

    return {
        key: StoredTensor(key, tuple(value.shape), loader(key), _fault(value))
        for key, value in _state(path, content).items()
    }


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _records(path: Path) -> int:
    """Check the archive that torch.save writes; return the bytes of its tensor storages."""
    with open_archive(path) as (_, members):
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise refuse(
                    path,
                    f"its member '{printable(name)}' is compressed; torch.save writes it plain",
                )
        return sum(
            info.file_size for name, info in members.items() if name.split("/")[-2:-1] == ["data"]
        )


def _unpickled(path: Path, device: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What torch thinks of an odd file is ours to say.
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001  A hostile pickle can raise anything at all.
        text = str(error)
        match = re.search(r"GLOBAL ([\w.]+)", text)
        if match or "weights_only" in text or "Weights only" in text:
            what = f"'{printable(match[1])}'" if match else "more than tensors"
            raise refuse(
                path,
                f"it is a pickle that holds {what}, and loading that would run code of the file; "
                "it was not run. Save the weights alone: torch.save(model.state_dict(), path)",
            ) from None
        raise refuse(
            path,
            f"torch cannot read it ({printable(text, 160) or type(error).__name__}); the file is "
            "truncated or damaged",
        ) from None


def _state(path: Path, content: object) -> dict[str, torch.Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise refuse(path, f"it holds a {type(content).__name__} and no tensors by name")
    for key, value in content.items():
        if not isinstance(key, str):
            raise refuse(path, f"its entry '{printable(key)}' has no name")
        if not isinstance(value, torch.Tensor):
            raise refuse(
                path,
                f"its entry '{printable(key)}' ({type(value).__name__}) is no tensor; save "
                "the weights alone: torch.save(model.state_dict(), path)",
            )
    return content


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Yield every dense tensor in nested containers, each container once."""
    pending, seen = [content], {id(content)}
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield value
            continue
        parts = list(value.values()) if isinstance(value, dict) else value
        if isinstance(parts, (list, tuple)):
            fresh = [part for part in parts if id(part) not in seen]
            seen.update(id(part) for part in fresh)
            pending += fresh


def _fault(tensor: torch.Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantized; a weight is a plain array"
    if tensor.dtype not in _FLOATS:
        return f"has the type {str(tensor.dtype).removeprefix('torch.')}; a weight is {FLOAT_TYPES}"
    return None


# .safetensors


@contextmanager
def open_safetensors(path: Path) -> Iterator[tuple[dict[str, str], dict[str, StoredTensor]]]:
    """Yield the metadata and the tensor headers of a `.safetensors` file."""
    try:
        # The library checks that header, offsets and file size agree before anything else.
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if len(names) > MOST_TENSORS:
                raise refuse(path, f"it has {len(names)} tensors; no Xception has")
            tensors = {name: _safetensor(file, name) for name in names}
            yield dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise refuse(
            path,
            f"its safetensors header is invalid ({printable(error, 160)}); the file is truncated "
            "or damaged, copy or download it again",
        ) from None


def _safetensor(file: Any, name: str) -> StoredTensor:
    part = file.get_slice(name)
    kind = part.get_dtype()
    known = kind in ("F16", "BF16", "F32", "F64")
    fault = None if known else f"has the type {printable(kind, 20)}; a weight is {FLOAT_TYPES}"
    return StoredTensor(name, tuple(part.get_shape()), lambda: file.get_tensor(name), fault)
