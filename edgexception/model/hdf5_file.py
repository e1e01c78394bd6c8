"""Keras's HDF5 files: described by a child process, their values read as plain bytes.

This process never lets the HDF5 library open a file from a stranger; see `hdf5_scan`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgexception.errors import NotPossibleHere
from edgexception.model.tensors import StoredTensor, printable, refuse

SCAN_SECONDS = 30.0
_SCAN = Path(__file__).with_name("hdf5_scan.py")


@dataclass
class Group:
    """One group: what is below it, and its attributes of texts."""

    path: str
    groups: dict[str, Group] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    attributes: dict[str, list[str]] = field(default_factory=dict)

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

    def text(self, attribute: str) -> str | None:
        """Return an attribute of one text, or None."""
        texts = self.attributes.get(attribute)
        return texts[0] if texts else None

    def all_tensors(self) -> Iterator[StoredTensor]:
        """Yield every tensor at and below this group."""
        yield from self.tensors.values()
        for group in self.groups.values():
            yield from group.all_tensors()


def read_tree(path: Path, stored: Path) -> Group:
    """Return the groups and tensor headers of the HDF5 file `stored`; no values are read.

    `path` is the file to name in messages (of a `.keras` archive, `stored` is what was in it).
    Raises `BadArtifact` for a file that is no plain Keras file or breaks the HDF5 library.
    """
    description = _scanned(path, stored)
    root = Group("")
    for name, attributes in description["groups"].items():
        _made(root, name).attributes = attributes
    for name, header in description["tensors"].items():
        parent, _, leaf = name.rpartition("/")
        load = partial(_read, path, stored, name, header)
        shape, fault = tuple(header["shape"]), header["fault"]
        _made(root, parent).tensors[leaf] = StoredTensor(name, shape, load, fault)
    return root


def _scanned(path: Path, stored: Path) -> dict[str, Any]:
    """Run `hdf5_scan` on a file in a child process and return what it says."""
    command = [sys.executable, "-I", str(_SCAN), str(stored.absolute())]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603 - our own script
            command, capture_output=True, timeout=SCAN_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise refuse(
            path,
            f"the HDF5 library is still busy with its structure after {SCAN_SECONDS:g} s; the file "
            "is damaged, copy or download it again",
        ) from None
    if done.returncode > 0 and b"ModuleNotFoundError" in done.stderr:
        raise NotPossibleHere(
            "reading Keras's files needs h5py; install it: pip install 'edgexception[workstation]'"
        )
    if done.returncode:
        raise refuse(
            path,
            f"the HDF5 library breaks on it (exit {done.returncode}); the file is damaged, copy "
            "or download it again",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "refused" in answer:
        raise refuse(path, printable(answer["refused"], 500))
    return answer


def _made(root: Group, path: str) -> Group:
    group = root
    for part in path.split("/") if path else ():
        group = group.groups.setdefault(part, Group(f"{group.path}/{part}".lstrip("/")))
    return group


def _read(path: Path, stored: Path, name: str, header: dict[str, Any]) -> torch.Tensor:
    """Read one tensor's bytes as float32."""
    count = int(np.prod(header["shape"], dtype=np.int64))
    bfloat16 = header["type"] == "bfloat16"
    kind = np.dtype("<u2" if bfloat16 else header["type"])
    values = np.fromfile(stored, kind, count, offset=header["offset"] or 0)
    if values.size != count:
        raise refuse(path, f"tensor '{printable(name)}' ends beyond the file; it is truncated")
    if bfloat16:
        values = (values.astype("<u4") << 16).view("<f4")
    # A value beyond float32 becomes infinite here and is refused with the others.
    with np.errstate(over="ignore"):
        plain = values.astype(np.float32, copy=False)
    return torch.from_numpy(plain.reshape(header["shape"]))
