"""Whether there is disk and memory for a build, before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from edgexception.agent import machine
from edgexception.agent.protocol import AgentError

SPARE_BYTES = 64 << 20
"""Disk space that is left to others."""
COPIES = 2
"""Of the weights, in memory while TensorRT builds: the network's and the engine's at least
(TensorRT documentation, "How TensorRT Works", Memory, The Build Phase). No engine is taken to be
larger, either."""
BUILDER_BYTES = 752 << 20
"""What TensorRT's own kernels take when a builder is made: "Init builder kernel library: ... GPU
+752" (MiB), as others recorded it with 10.3.0 on an Orin NX, where the GPU's memory is the
system's."""


def check_disk(folder: Path, models: Iterable[Path]) -> None:
    """Refuse to start where the engines of these models do not fit on the disk of a folder."""
    needed = COPIES * sum(model.stat().st_size for model in models) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AgentError(
            "out-of-resources",
            f"{folder}: {needed >> 20} MiB of disk space are needed and {free >> 20} are free",
        )


def check_memory(runtime: str, model: Path) -> None:
    """Refuse to start where TensorRT cannot get the least that it needs; other runtimes try."""
    free = machine.facts()["memory"]["available_bytes"]
    if runtime != "tensorrt" or free is None:
        return
    needed = COPIES * model.stat().st_size + BUILDER_BYTES
    if free < needed:
        raise AgentError(
            "out-of-resources",
            f"TensorRT needs {needed >> 20} MiB of memory at least to build {model.name}, and "
            f"{free >> 20} are available: close other programs, the desktop too",
        )
