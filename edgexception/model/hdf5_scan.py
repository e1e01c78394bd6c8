"""Describe a Keras HDF5 file as JSON: a program for a child process, with h5py alone.

    python hdf5_scan.py FILE

The HDF5 library is C code that a hostile file can crash or send into an endless loop, so it runs
here, where both end as a refusal. No value is read: the JSON gives for each array where its
bytes lie in the file, and the parent reads those itself.

The format can point outside the file (soft and external links, virtual datasets, external storage),
can loop (hard links) and can declare arrays of any size. Keras uses none of this: it writes groups,
contiguous arrays of floats and attributes of strings. All else is refused or marked as a fault.

stdout: {"refused": reason} or {"groups": {path: {attribute: [text, ...]}},
"tensors": {path: {"shape", "type", "offset", "fault"}}}.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import h5py
import numpy as np

MOST_OBJECTS = 20_000
MOST_DEPTH = 24
MOST_TEXT_BYTES = 64 * 2**20
MOST_MEMORY = 4 * 2**30
LAYERS = frozenset({"layers", "_layer_checkpoint_dependencies"})
# Keras splits a list over `name0`, `name1`, ... since an HDF5 attribute holds less than 64 KiB.
ATTRIBUTE = re.compile(r"(layer_names|weight_names)\d{0,4}|model_config|keras_version|name")
_TYPES = {
    "<f2": h5py.h5t.IEEE_F16LE,
    "<f4": h5py.h5t.IEEE_F32LE,
    "<f8": h5py.h5t.IEEE_F64LE,
    ">f2": h5py.h5t.IEEE_F16BE,
    ">f4": h5py.h5t.IEEE_F32BE,
    ">f8": h5py.h5t.IEEE_F64BE,
}
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError, OverflowError)


class RefusedError(Exception):
    """The reason why the file is no plain Keras file."""


class _Scan:
    def __init__(self, file: h5py.File) -> None:
        self.groups: dict[str, dict[str, list[str]]] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.seen: set[object] = set()
        self.text_bytes = 0
        names = [raw.decode("utf-8") for raw in list(file.id)]
        layered = any(name.split("\\")[0] in LAYERS for name in names)
        # The state of the optimizer and the metrics lies beside the layers: it is not opened.
        self.skipped = {
            name
            for name in names
            if name == "optimizer_weights" or (layered and name.split("\\")[0] not in LAYERS)
        }
        self.visit("", file.id, 0)

    def visit(self, path: str, group: h5py.h5g.GroupID, depth: int) -> None:
        if path in self.groups or path in self.tensors:
            raise RefusedError(f"two objects are named '{path}'")
        if depth > MOST_DEPTH:
            raise RefusedError(f"group '{path}' lies too deep for a Keras file")
        if group.get_num_objs() > MOST_OBJECTS:
            raise RefusedError(f"group '{path}' has more than {MOST_OBJECTS} members")
        self.once(path, group)
        self.groups[path] = self.attributes(group)
        for raw in list(group):
            # Keras 2.12 to 3.x on Windows writes 'layers\\conv2d' as one name.
            name = raw.decode("utf-8")
            below = f"{path}/{name}".lstrip("/").replace("\\", "/")
            if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                raise RefusedError(
                    f"'{below}' is a soft or external link; Keras writes none, and a link can "
                    "point outside the file. Save the model again"
                )
            if not depth and name in self.skipped:
                continue
            child = h5py.h5o.open(group, raw)
            if isinstance(child, h5py.h5g.GroupID):
                self.visit(below, child, depth + 1)
            elif isinstance(child, h5py.h5d.DatasetID):
                self.once(below, child)
                self.array(below, child)
            else:
                raise RefusedError(f"'{below}' is neither a group nor an array")

    def once(self, path: str, handle: Any) -> None:
        """Refuse what is reached twice: a loop, or one object under two names."""
        info = h5py.h5o.get_info(handle)
        if (info.fileno, info.addr) in self.seen:
            raise RefusedError(f"'{path}' is the same object as another name (a loop)")
        self.seen.add((info.fileno, info.addr))
        if len(self.seen) > MOST_OBJECTS:
            raise RefusedError(f"it has more than {MOST_OBJECTS} objects; no Xception has")

    def attributes(self, group: h5py.h5g.GroupID) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        count = h5py.h5a.get_num_attrs(group)
        names = sorted(
            (h5py.h5a.open(group, index=index).name.decode("utf-8") for index in range(count)),
            key=lambda name: (len(name), name),
        )
        for name in names:
            match = ATTRIBUTE.fullmatch(name)
            if match:
                found.setdefault(match[1] or name, []).extend(self.texts(group, name))
        return found

    def texts(self, handle: Any, name: str) -> list[str]:
        """Return an attribute of one or more strings."""
        attribute = h5py.h5a.open(handle, name.encode())
        kind = attribute.get_type()
        count = int(attribute.get_space().get_simple_extent_npoints())
        if not count:
            return []  # Keras writes the empty list as an array of no numbers.
        if kind.get_class() != h5py.h5t.STRING:
            raise RefusedError(f"its attribute '{name}' holds no text")
        self.text_bytes += count * kind.get_size()
        if count > MOST_OBJECTS or self.text_bytes > MOST_TEXT_BYTES:
            raise RefusedError(f"its attribute '{name}' is too large for a Keras file")
        values = np.empty(attribute.shape, dtype=attribute.dtype)
        attribute.read(values)
        texts = values.ravel().tolist()
        return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in texts]

    def array(self, path: str, dataset: h5py.h5d.DatasetID) -> None:
        if path in self.groups or path in self.tensors:
            raise RefusedError(f"two objects are named '{path}'")
        properties = dataset.get_create_plist()
        if properties.get_layout() == h5py.h5d.VIRTUAL:
            raise RefusedError(
                f"tensor '{path}' is a virtual dataset: its values lie in other files"
            )
        if properties.get_external_count():
            raise RefusedError(
                f"tensor '{path}' has external storage: its values lie in other files"
            )
        shape = [int(size) for size in dataset.shape or ()]
        kind = self.element(dataset)
        fault: str | None = None
        if dataset.shape is None:
            fault = "is an empty (null) dataset"
        elif kind not in (*_TYPES, "bfloat16"):
            fault = f"has the type {kind}; a weight is float16, bfloat16, float32 or float64"
        else:
            fault = _storage_fault(dataset, shape, properties)
        offset = None if fault else dataset.get_offset()
        self.tensors[path] = {"shape": shape, "type": kind, "offset": offset, "fault": fault}

    def element(self, dataset: h5py.h5d.DatasetID) -> str:
        """Return the element type: one of `_TYPES`, bfloat16, or how numpy calls it."""
        kind = dataset.get_type()
        if kind.get_class() == h5py.h5t.FLOAT:
            for name, known in _TYPES.items():
                if kind.equal(known):
                    return name
        # Keras stores bfloat16 as opaque pairs of bytes and says so in an attribute.
        if kind.get_class() == h5py.h5t.OPAQUE and kind.get_size() == 2:
            named = h5py.h5a.exists(dataset, b"dtype") and self.texts(dataset, "dtype")
            if named == ["bfloat16"]:
                return "bfloat16"
        try:
            return str(kind.dtype)
        except _ERRORS:
            return "unknown"


def _storage_fault(dataset: Any, shape: list[int], properties: Any) -> str | None:
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_nfilters():
        return (
            "is chunked or compressed; Keras writes plain arrays, and a small compressed file can "
            "unpack to any size. Unpack it with `h5repack -f NONE -l CONTI`"
        )
    needed = dataset.get_type().get_size()
    for size in shape:
        needed *= size
    held = dataset.get_storage_size()
    if held != needed:
        return f"declares {needed} bytes and holds {held}: its values are missing"
    if needed and dataset.get_offset() is None:
        return "has no place in the file: its values are missing"
    return None


def main(path: str) -> None:
    """Print the description of one file."""
    try:
        with h5py.File(path, "r") as file:
            scan = _Scan(file)
        answer: dict[str, Any] = {"groups": scan.groups, "tensors": scan.tensors}
    except RefusedError as refused:
        answer = {"refused": str(refused)}
    except _ERRORS as error:
        reason = f"{error}"[:200]
        answer = {
            "refused": f"the HDF5 library cannot read it ({reason}); the file is truncated or "
            "damaged, copy or download it again"
        }
    json.dump(answer, sys.stdout)


def _limit_memory() -> None:
    try:
        import resource  # noqa: PLC0415 - Unix only
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > MOST_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, hard))


if __name__ == "__main__":
    _limit_memory()
    main(sys.argv[1])
