"""Tensors of a checkpoint before they are read, and the network they are assembled into.

Every reader describes a file's tensors by name and shape first. Only when all names and shapes
are those of one `Architecture` are values read, so a file cannot make us allocate more than the
network it claims to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, OutOfResources
from edgexception.model.xception import Xception

FLOAT_TYPES = "float16, bfloat16, float32 or float64"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its header, and how to read its values."""

    name: str
    """As the file calls it."""
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    """Read the values as float32."""
    fault: str | None = None
    """Why this tensor cannot be a weight (an integer type, say), or None."""

    def permuted(self, *axes: int) -> StoredTensor:
        """Return this tensor with its axes in another order."""
        if len(self.shape) != len(axes):
            return self  # The comparison of shapes will refuse it by name.
        shape = tuple(self.shape[axis] for axis in axes)
        return StoredTensor(self.name, shape, lambda: self.load().permute(axes), self.fault)

    def reshaped(self, *shape: int) -> StoredTensor:
        """Return this tensor under another shape of as many elements."""
        return StoredTensor(self.name, shape, lambda: self.load().reshape(shape), self.fault)


class Structure(NamedTuple):
    """Number of separable convolutions of every block: an architecture without its widths."""

    entry: tuple[int, ...]
    middle: tuple[int, ...]
    exit: int
    tail: int

    def blocks(self) -> Iterator[tuple[str, int, bool]]:
        """Yield (name, separable convolutions, strided) of every block, the tail last."""
        counts = [(count, True) for count in self.entry]
        counts += [(count, False) for count in self.middle]
        counts += [(self.exit, True), (self.tail, False)]
        for number, (count, strided) in enumerate(counts, start=2):
            yield f"block{number}", count, strided


PAPER = Structure((2, 2, 2), (3,) * 8, 2, 2)


def refuse(path: Path, reason: str) -> BadArtifact:
    """Return the error that names the file and the reason."""
    return BadArtifact(f"{path.name}: {reason}")


def listing(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in words: "'a', 'b', 'c' and 4 more"."""
    ordered = sorted(names)
    shown = ", ".join(f"'{printable(name)}'" for name in ordered[:most])
    more = len(ordered) - most
    return f"{shown} and {more} more" if more > 0 else shown


def printable(text: object, most: int = 120) -> str:
    """Return text from a file on one short line without control characters."""
    line = "".join(char if char.isprintable() else "?" for char in str(text))
    return line if len(line) <= most else line[: most - 3] + "..."


def module_of_dense(index: int, count: int) -> str:
    """Name in `Xception` of the dense layer `index` of `count`."""
    return "predictions" if index == count - 1 else f"dense{index + 1}"


def architecture_of(
    path: Path,
    structure: Structure,
    tensors: Mapping[str, StoredTensor],
    dense_layers: int,
    settings: Mapping[str, Any],
) -> Architecture:
    """Build the architecture whose widths are the shapes of `tensors` (keys of `Xception`).

    Raises `BadArtifact` for a missing tensor or a combination that is not of the family.
    """

    def width(key: str) -> int:
        tensor = tensors.get(key)
        if tensor is None:
            raise refuse(path, f"the tensor for '{key}' is missing; the file is incomplete")
        if not tensor.shape:
            raise refuse(path, f"tensor '{printable(tensor.name)}' is a scalar, not a weight")
        return tensor.shape[0]

    widths = [
        tuple(width(f"{block}_sepconv{i}.pointwise.weight") for i in range(1, count + 1))
        for block, count, _ in structure.blocks()
    ]
    entries = len(structure.entry)
    dense = [module_of_dense(index, dense_layers) for index in range(dense_layers)]
    try:
        return Architecture(
            stem=(width("block1_conv1.weight"), width("block1_conv2.weight")),
            entry=tuple(widths[:entries]),
            middle=tuple(widths[entries:-2]),
            exit=widths[-2],
            tail=widths[-1],
            head=tuple(width(f"{name}.weight") for name in dense),
            **settings,
        )
    except ValidationError as error:
        raise refuse(path, f"its shapes make no Xception: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Return the first fault of a pydantic error on one line: field and reason."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return printable(f"{where}: {fault['msg']}" if where else fault["msg"], 300)


def assemble(
    path: Path, architecture: Architecture, tensors: Mapping[str, StoredTensor]
) -> Xception:
    """Read `tensors` (keys and shapes of `Xception(architecture)`) into a network.

    Returns a float32 network on the CPU in eval mode. Names, shapes and types of all tensors are
    compared first; nothing is read before. Raises `BadArtifact` naming the tensor.
    """
    with torch.device("meta"):
        network = Xception(architecture)
    expected = {
        key: tuple(value.shape)
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    _compare(path, expected, tensors)
    state: dict[str, torch.Tensor] = {}
    try:
        for key in expected:
            state[key] = _values(path, key, tensors[key])
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfResources(f"{path.name}: out of memory while reading its weights") from error
    for key in network.state_dict():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def _compare(
    path: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]
) -> None:
    missing = expected.keys() - tensors.keys()
    if missing:
        raise refuse(
            path, f"the tensors for {listing(missing)} are missing; the file is incomplete"
        )
    extra = tensors.keys() - expected.keys()
    if extra:
        names = listing(tensors[key].name for key in extra)
        raise refuse(path, f"the tensors {names} belong to no layer of this Xception")
    for key, shape in expected.items():
        tensor = tensors[key]
        name = printable(tensor.name)
        if tensor.fault:
            raise refuse(path, f"tensor '{name}' {tensor.fault}")
        if tensor.shape != shape:
            raise refuse(
                path,
                f"tensor '{name}' has shape {printable(tensor.shape)} where the layer "
                f"'{key.rpartition('.')[0]}' of this Xception needs {shape} (axes as in torch)",
            )


def _values(path: Path, key: str, tensor: StoredTensor) -> torch.Tensor:
    values = tensor.load().to(torch.float32).contiguous()
    name = printable(tensor.name)
    if not torch.isfinite(values).all():
        raise refuse(
            path,
            f"tensor '{name}' holds NaN or infinite values: the training diverged or the file "
            "is damaged; export the checkpoint again from a healthy state",
        )
    if key.endswith("running_var") and (values < 0).any():
        raise refuse(path, f"tensor '{name}' is a variance and holds negative values")
    return values
