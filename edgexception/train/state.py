"""An unfinished training on disk: a later run goes on from it and ends with the same bytes.

One safetensors file, replaced whole by a rename, with every tensor that the next step depends on:
`network/<name>`, `average/<name>`, `first/<name>` and `second/<name>` (AdamW's moments), and the
number of steps done. Random numbers are no part of it: they follow from seed and step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edgexception.artifacts import atomic_write
from edgexception.errors import BadArtifact

_STEPS = "steps"
EVERY_S = 60.0
"""Seconds of training that a kill may cost; writing a full-size state takes about two."""


@dataclass(frozen=True)
class State:
    """What a training has so far."""

    steps: int
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Keeper:
    """Keeps the state of one training in a folder of its own, now and then."""

    folder: Path
    every_s: float = EVERY_S
    _last: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The file of the state."""
        return self.folder / "training.safetensors"

    def due(self) -> bool:
        """Tell whether it is time to save again."""
        return time.monotonic() - self._last >= self.every_s

    def save(self, state: State) -> None:
        """Write a state; OutOfResources when the disk is full."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, save(tensors, metadata={_STEPS: str(state.steps)}))
        self._last = time.monotonic()

    def load(self, expected: Mapping[str, torch.Tensor], total: int) -> State | None:
        """Return the state that is there, or None.

        Nothing of the file is trusted: it must hold exactly the `expected` names, with their shapes
        and types, and a number of steps below `total`. Raises BadArtifact otherwise.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return None
        if self.path.is_symlink() or not self.path.is_file():
            raise self._refused("is a link or device, not a file")
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                steps = self._steps(file.metadata() or {}, total)
                if odd := sorted(set(file.keys()) ^ set(expected))[:3]:
                    raise self._refused(f"has other tensors than this training: {odd}"[:200])
                for name, like in expected.items():
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != tuple(like.shape):
                        raise self._refused(f"{name} has the shape {shape}"[:200])
                tensors = {name: file.get_tensor(name) for name in expected}
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise self._refused(f"cannot be read ({str(error)[:120]!a})") from error
        for name, like in expected.items():
            if tensors[name].dtype != like.dtype:
                raise self._refused(f"{name} has the type {tensors[name].dtype}")
        return State(steps, tensors)

    def _steps(self, metadata: Mapping[str, str], total: int) -> int:
        text = metadata.get(_STEPS, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise self._refused("does not say how many steps were done")
        if not 0 < int(text) < total:
            raise self._refused(f"says that {int(text)} steps of {total} were done")
        return int(text)

    def _refused(self, reason: str) -> BadArtifact:
        return BadArtifact(f"{self.path}: {reason}; remove this file to begin again from the start")
