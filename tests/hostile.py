"""Generated checkpoints that are broken, mislabelled or out to do harm.

Every one must end as `BadArtifact` or `UsageError`, in the library and at the command line.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import torch
from checkpoints import (
    NARROW,
    Layout,
    layout,
    random_network,
    timm_state,
    write_by_name,
    write_keras,
)
from hostile_hdf5 import hdf5_cases
from hostile_keras import archive_cases, graph_cases
from hostile_tensors import pickle_cases, safetensors_cases
from safetensors.torch import save as safetensors_bytes


def hostile_checkpoints(folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Write broken checkpoints into `folder` one by one; yield (what is wrong, path).

    The seed chooses which tensor, layer or byte is hit.
    """
    chance = random.Random(seed)
    network = random_network(NARROW, seed)
    model = layout(network, nested=bool(seed % 2))
    state = timm_state(network)
    groups = (
        _foreign(),
        _cut(model, state, chance),
        hdf5_cases(model, chance),
        archive_cases(model, chance),
        graph_cases(layout(network), chance),
        pickle_cases(state, chance),
        safetensors_cases(state, network, chance),
    )
    for group in groups:
        for name, suffix, write in group:
            path = folder / f"{name.replace(' ', '-')}{suffix}"
            write(path)
            yield name, path


Case = tuple[str, str, Callable[[Path], Any]]


def _foreign() -> Iterator[Case]:
    """Files that are something else than their name says."""
    for suffix in (".keras", ".h5", ".pth", ".safetensors"):
        yield f"empty {suffix[1:]}", suffix, lambda path: path.write_bytes(b"")
        yield f"text {suffix[1:]}", suffix, lambda path: path.write_text("<html>404</html>\n" * 9)
        yield f"folder {suffix[1:]}", suffix, lambda path: path.mkdir()
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "git lfs pointer", ".h5", lambda path: path.write_text(lfs)
    yield "unknown suffix", ".onnx", lambda path: path.write_bytes(b"\x08\x07")
    yield "hdf5 named safetensors", ".safetensors", _hdf5_with(lambda file: None)
    yield "hdf5 of something else", ".h5", _hdf5_with(lambda file: file.create_dataset("x", data=1))
    yield "hdf5 with nothing", ".hdf5", _hdf5_with(lambda file: None)
    yield "dangling symlink", ".h5", lambda path: path.symlink_to("nowhere.h5")
    yield "fifo", ".pth", os.mkfifo


def _hdf5_with(fill: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            fill(file)

    return write


def _cut(model: Layout, state: Any, chance: random.Random) -> Iterator[Case]:
    """Truncated files, and files whose first bytes are damaged."""
    writers: dict[str, Callable[[Path], Any]] = {
        ".keras": lambda path: write_keras(path, model),
        ".h5": lambda path: write_by_name(path, model),
        ".pth": lambda path: torch.save(state, path),
        ".pt": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        ".safetensors": lambda path: path.write_bytes(safetensors_bytes(state)),
    }
    for suffix, write in writers.items():
        for share in (0.0, 0.3, 0.9, 1.0):

            def cut(path: Path, write: Any = write, share: float = share) -> None:
                write(path)
                size = path.stat().st_size
                end = {0.0: chance.randint(1, 64), 1.0: size - 1}.get(share, int(size * share))
                os.truncate(path, end)

            yield f"{suffix[1:]} cut at {share}", suffix, cut

        def flip(path: Path, write: Any = write) -> None:
            write(path)
            data = bytearray(path.read_bytes())
            data[chance.randrange(4)] ^= 1 << chance.randrange(8)
            path.write_bytes(data)

        if suffix not in (".pt", ".safetensors"):  # Their first bytes can be read either way.
            yield f"{suffix[1:]} with a damaged signature", suffix, flip
