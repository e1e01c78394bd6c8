"""A hostile-input reader of HDF5 files: headers first, hard links and plain arrays only.

The HDF5 format can point outside the file (soft and external links, virtual datasets, external
storage), can loop (hard links) and can declare arrays of any size. Keras uses none of this: it
writes groups, contiguous arrays of floats and attributes of strings. All else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from edgexception.errors import BadArtifact
from edgexception.model.tensors import FLOAT_TYPES, StoredTensor, printable, refuse

MOST_OBJECTS = 20_000
MOST_DEPTH = 24
MOST_ATTRIBUTE_BYTES = 64 * 2**20

_FLOATS = (
    h5py.h5t.IEEE_F16LE,
    h5py.h5t.IEEE_F32LE,
    h5py.h5t.IEEE_F64LE,
    h5py.h5t.IEEE_F16BE,
    h5py.h5t.IEEE_F32BE,
    h5py.h5t.IEEE_F64BE,
)


@dataclass
class Group:
    """One group: what is below it, and its attributes of strings."""

    path: str
    id: Any = None
    """h5py's low-level handle; None for a group that only a Windows path implies."""
    groups: dict[str, Group] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def find(self, path: str) -> Group | None:
        """Return the group at a relative path, or None."""
        group: Group | None = self
        for part in path.strip("/").split("/"):
            if group is None:
                return None
            group = group.groups.get(part)
        return group

    def tensor(self, path: str) -> StoredTensor | None:
        """Return the tensor at a relative path, or None."""
        parent, _, name = path.strip("/").rpartition("/")
        group = self.find(parent) if parent else self
        return group.tensors.get(name) if group else None

    def all_tensors(self) -> Iterator[StoredTensor]:
        """Yield every tensor at and below this group."""
        yield from self.tensors.values()
        for group in self.groups.values():
            yield from group.all_tensors()


@contextmanager
def hdf5_faults(path: Path) -> Iterator[None]:
    """Turn what h5py raises on a broken file into `BadArtifact`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
        reason = printable(error, 200)
        raise refuse(
            path,
            f"the HDF5 library cannot read it ({reason}); the file is truncated or damaged, "
            "copy or download it again",
        ) from None


def read_tree(path: Path, file: h5py.File, unopened: frozenset[str]) -> Group:
    """Return the tree of groups and tensor headers of an open file; no values are read.

    Top-level members named in `unopened` (the optimizer's state, say) are left out without being
    opened. Raises `BadArtifact` for links other than hard ones, for loops and virtual, external
    or too many objects.
    """
    root = Group("", file.id)
    seen: set[object] = {_identity(file.id)}
    _walk(path, root, seen, unopened, 0)
    return root


def _identity(handle: Any) -> object:
    info = h5py.h5o.get_info(handle)
    return info.fileno, info.addr


def _walk(
    path: Path, group: Group, seen: set[object], unopened: frozenset[str], depth: int
) -> None:
    if depth > MOST_DEPTH:
        raise refuse(path, f"group '{printable(group.path)}' lies too deep for a Keras file")
    links = group.id.links
    if group.id.get_num_objs() > MOST_OBJECTS:
        raise refuse(path, f"group '{printable(group.path)}' has more than {MOST_OBJECTS} members")
    for raw in list(group.id):
        name = raw.decode("utf-8")
        full = f"{group.path}/{name}".lstrip("/")
        if links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise refuse(
                path,
                f"'{printable(full)}' is a soft or external link; Keras writes none, and a link "
                "can point outside the file. Save the model again",
            )
        if depth == 0 and name in unopened:
            continue
        child = h5py.h5o.open(group.id, raw)
        identity = _identity(child)
        if identity in seen:
            raise refuse(path, f"'{printable(full)}' is the same object as another name (a loop)")
        seen.add(identity)
        if len(seen) > MOST_OBJECTS:
            raise refuse(path, f"it has more than {MOST_OBJECTS} objects; no Xception has")
        if isinstance(child, h5py.h5g.GroupID):
            _walk(path, _place(path, group, name, child), seen, unopened, depth + 1)
        elif isinstance(child, h5py.h5d.DatasetID):
            group.tensors[name] = _header(path, full, child)
        else:
            raise refuse(path, f"'{printable(full)}' is neither a group nor an array")


def _place(path: Path, group: Group, name: str, handle: Any) -> Group:
    """Add a group; Keras 2.12-3.x on Windows writes 'layers\\conv2d' as one name."""
    parts = name.split("\\")
    for part in parts[:-1]:
        group = group.groups.setdefault(part, Group(f"{group.path}/{part}".lstrip("/")))
    full = f"{group.path}/{parts[-1]}".lstrip("/")
    known = group.groups.get(parts[-1])
    if known is not None and known.id is not None:
        raise refuse(path, f"two groups are named '{printable(full)}'")
    placed = known or Group(full)
    placed.id = handle
    group.groups[parts[-1]] = placed
    return placed


def _header(path: Path, name: str, dataset: h5py.h5d.DatasetID) -> StoredTensor:
    properties = dataset.get_create_plist()
    layout = properties.get_layout()
    shown = printable(name)
    if layout == h5py.h5d.VIRTUAL:
        raise refuse(path, f"tensor '{shown}' is a virtual dataset: its values lie in other files")
    if properties.get_external_count():
        raise refuse(path, f"tensor '{shown}' has external storage: its values lie in other files")
    shape = dataset.shape
    if shape is None:
        return StoredTensor(name, (), _unreadable, "is an empty (null) dataset")
    shape = tuple(int(size) for size in shape)
    fault = _type_fault(dataset) or _storage_fault(dataset, shape, layout, properties)
    return StoredTensor(name, shape, lambda: _read(path, name, dataset), fault)


def _unreadable() -> torch.Tensor:
    raise BadArtifact("an empty dataset has no values")


def _is_bfloat16(dataset: h5py.h5d.DatasetID) -> bool:
    """Keras stores bfloat16 as opaque pairs of bytes and says so in an attribute."""
    kind = dataset.get_type()
    if kind.get_class() != h5py.h5t.OPAQUE or kind.get_size() != 2:
        return False
    return strings(dataset, "dtype") == ["bfloat16"]


def _type_fault(dataset: h5py.h5d.DatasetID) -> str | None:
    kind = dataset.get_type()
    if kind.get_class() == h5py.h5t.FLOAT and any(kind.equal(known) for known in _FLOATS):
        return None
    if _is_bfloat16(dataset):
        return None
    try:
        shown = printable(kind.dtype, 40)
    except (TypeError, ValueError, RuntimeError):
        shown = "unknown"
    return f"has the type {shown}; a weight is {FLOAT_TYPES}"


def _storage_fault(
    dataset: h5py.h5d.DatasetID, shape: tuple[int, ...], layout: int, properties: Any
) -> str | None:
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or properties.get_nfilters():
        return (
            "is chunked or compressed; Keras writes plain arrays, and a small compressed file can "
            "unpack to any size. Unpack it with `h5repack -f NONE -l CONTI`"
        )
    needed = dataset.get_type().get_size()
    for size in shape:
        needed *= size
    if layout == h5py.h5d.CONTIGUOUS and dataset.get_storage_size() != needed:
        held = dataset.get_storage_size()
        return f"declares {needed} bytes and holds {held}: its values are missing"
    return None


def _read(path: Path, name: str, dataset: h5py.h5d.DatasetID) -> torch.Tensor:
    with hdf5_faults(path):
        bfloat16 = _is_bfloat16(dataset)
        # HDF5 converts f2, f4, f8 of either byte order to the type of the array it fills.
        values = np.empty(dataset.shape, dtype="V2" if bfloat16 else np.float32)
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    if bfloat16:
        wide = values.view(np.uint16).astype(np.uint32) << 16
        return torch.from_numpy(wide.view(np.float32))
    return torch.from_numpy(values)


def strings(handle: Any, name: str) -> list[str] | None:
    """Return an attribute of one or more strings, or None where there is none.

    Raises ValueError for an attribute that is no string or too large: call it within
    `hdf5_faults`.
    """
    if handle is None or not h5py.h5a.exists(handle, name.encode()):
        return None
    attribute = h5py.h5a.open(handle, name.encode())
    kind = attribute.get_type()
    count = int(attribute.get_space().get_simple_extent_npoints())
    if not count:
        return []  # Keras writes the empty list as an array of no numbers.
    if kind.get_class() != h5py.h5t.STRING:
        raise ValueError(f"attribute '{name}' is no string")
    if count > MOST_OBJECTS or count * kind.get_size() > MOST_ATTRIBUTE_BYTES:
        raise ValueError(f"attribute '{name}' is too large")
    values = np.empty(attribute.shape, dtype=attribute.dtype)
    attribute.read(values)
    texts = values.ravel().tolist()
    return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in texts]


def string_list(handle: Any, name: str) -> list[str]:
    """Return a list attribute that Keras splits over `name0`, `name1`, ... when it is long.

    An HDF5 attribute holds less than 64 KiB (Keras: `save_attributes_to_hdf5_group`).
    """
    whole = strings(handle, name)
    if whole is not None:
        return whole
    values: list[str] = []
    for index in range(MOST_OBJECTS):
        part = strings(handle, f"{name}{index}")
        if part is None:
            break
        values += part
    return values
