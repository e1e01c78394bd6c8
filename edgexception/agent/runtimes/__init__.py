"""The runtimes an agent can meet, one module each, imported when it is asked for.

An adapter is a module with three functions, `Runtime` below, and a fourth where the runtime tells
the times of its kernels, `Profiler`; one for a program that runs engines by itself has `Program`
in their place. Every model and engine has the same contract: input `images`, uint8 (batch, height,
width, 3); output `logits`, float32 (batch, classes). The batch is fixed, or open within the bounds
that its build was told (`Options.batches`).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from edgexception.agent.protocol import AgentError, is_full
from edgexception.agent.tensorrt_options import BuildOptions

if TYPE_CHECKING:  # a device where trtexec alone builds and runs may have no numpy
    import numpy as np
    from numpy.typing import NDArray

    from edgexception.agent.telemetry import Telemetry

MODULES = {
    "onnxruntime": "edgexception.agent.runtimes.ort",
    "onnxruntime-cuda": "edgexception.agent.runtimes.ort_cuda",
    "onnxruntime-tensorrt": "edgexception.agent.runtimes.ort_tensorrt",
    "openvino": "edgexception.agent.runtimes.openvino",
    "tensorrt": "edgexception.agent.runtimes.tensorrt",
    "tensorrt-rtx": "edgexception.agent.runtimes.tensorrt_rtx",
}

PROGRAMS = {"tensorrt": "edgexception.agent.runtimes.trtexec"}
"""What builds and runs the engines of a runtime where its Python package cannot be used."""

ENGINE_FILES = {
    "onnxruntime": "engine.onnx",
    "onnxruntime-cuda": "engine.onnx",
    "onnxruntime-tensorrt": "engine.onnx",
    "openvino": "engine.blob",
    "tensorrt": "engine.plan",
    "tensorrt-rtx": "engine.rtx",
}

TIMING_CACHE = "timing.cache"
"""What a build measured of kernels, beside the engine; one that is there before is read."""
TIMED = ("tensorrt",)
"""The runtimes that have one."""

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime-gpu",
    "onnxruntime-tensorrt": "onnxruntime-gpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}

_STARVED = re.compile("out ?of ?memory|bad_alloc|failed to allocate", re.I)
_SOURCE_PLACE = re.compile(r"(Exception from|failed at) \S+?:\d+:\s*")


MAX_BATCH = 4096
Batches = tuple[int, int, int]
"""Least, best and greatest batch of a dynamic engine."""


@dataclass(frozen=True)
class Options:
    """What a build and an open must agree on."""

    batch: int
    threads: int
    sm: int | None = None
    """Compute capability times 10 of the NVIDIA GPU to build for; None for other runtimes."""
    tensorrt: BuildOptions | None = None
    """What TensorRT is told; None is what it does by itself."""
    batches: Batches | None = None
    """Of a dynamic engine; None is `batch` alone."""


def is_batches(value: object) -> bool:
    """Whether a value from a file is None, or what `Batches` is as a list."""
    if not isinstance(value, list) or [type(number) for number in value] != [int] * 3:
        return value is None
    return bool(1 <= value[0] <= value[1] <= value[2] <= MAX_BATCH)


@dataclass(frozen=True)
class Session:
    """An open engine. `call` maps uint8 `shape` to float32 (batch, classes), in host memory.

    What `call` returns may be overwritten by the next call.
    """

    shape: tuple[int, int, int, int]
    classes: int
    call: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    settings: dict[str, Any]
    """What the runtime says it runs with, read back from it."""


class Runtime(Protocol):
    """What a runtime's module offers."""

    def version(self) -> dict[str, Any]:
        """Return version and devices (ONNX Runtime: providers), and `gpus` of runtimes for them."""
        ...

    def build(self, model: Path, options: Options, out: Path) -> dict[str, Any]:
        """Compile an ONNX file into the engine file `out`; return what the runtime says of it.

        A runtime of `TIMED` leaves its `TIMING_CACHE` beside it.
        """
        ...

    def open(self, engine: Path, options: Options) -> Session:
        """Open an engine file for calls."""
        ...


@dataclass(frozen=True)
class KernelTime:
    """One kernel of an engine, as its runtime names it, and its time in a call in ns.

    The median of the calls, or their mean where the runtime tells nothing else.
    """

    name: str
    kind: str
    does: str
    """"int8", "fp16", "bf16" or "fp32" computes a layer; "quantize", "dequantize", "cast" and
    "reorder" change type or layout; "other" is the rest: additions, pools, activations."""
    ns: int


class Profiler(Protocol):
    """What the module of a runtime offers that tells the times of its kernels."""

    def profile(
        self, engine: Path, options: Options, images: NDArray[np.uint8], calls: int
    ) -> list[KernelTime]:
        """Open an engine once more and return its kernels' times; telling them takes time, too."""
        ...


@runtime_checkable
class Program(Protocol):
    """What the module of a program offers that builds engines and measures them by itself."""

    def present(self) -> bool:
        """Whether the program is there."""
        ...

    def version(self) -> dict[str, Any]:
        """As `Runtime.version`; `program` says which one it is."""
        ...

    def build(self, model: Path, options: Options, out: Path) -> dict[str, Any]:
        """As `Runtime.build`."""
        ...

    def run(self, job: Job, telemetry: Telemetry) -> dict[str, Any]:
        """Run an engine; leave the files of the answer in `job.out`, return its record.

        The record has `settings`, `timing`, `warmup_iterations` and `peak_rss_bytes`.
        """
        ...

    def profile(self, job: Job) -> list[KernelTime]:
        """As `Profiler.profile`."""
        ...


@dataclass(frozen=True)
class Job:
    """What a `Program` is to run."""

    engine: Path
    options: Options
    settings: dict[str, Any]
    """Of the build record, as the engine's manifest kept them."""
    images: Path | None
    """uint8 (N, height, width, 3) as `.npy`; where None, no logits are asked for."""
    times: dict[str, int] | None
    """`warmup_ms`, `duration_ms`, `min_iterations`; where None, it is not timed."""
    profile: int | None
    """How many calls its kernels are timed over."""
    out: Path


PROFILE_WARM_UP = 5
"""Calls before those that count."""


def load(name: str) -> Runtime | Program:
    """Import a runtime's adapter; a not-possible-here AgentError says why it cannot be.

    Where the runtime cannot be imported and a program is there that stands in for it, that one's.
    """
    try:
        return cast(Runtime, importlib.import_module(MODULES[name]))
    except Exception as error:  # whatever stops a foreign import is the reason
        missing, remedy = brief(error), f"install it with `pip install {PACKAGES[name]}`"
        if name in PROGRAMS:
            program = cast(Program, importlib.import_module(PROGRAMS[name]))
            if program.present():
                instead = PROGRAMS[name].rpartition(".")[2]
                sys.stderr.write(f"{name}: {missing}; {instead} takes its place\n")
                return program
            missing += f", and there is no {PROGRAMS[name].rpartition('.')[2]}"
        raise AgentError(
            "not-possible-here", f"{name} cannot be used on this machine: {missing}; {remedy}"
        ) from error


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn what a runtime raises about a file into a bad-artifact error starting with `what`.

    Where memory or disk ran out, the file is not to blame.
    """
    try:
        yield
    except (AgentError, MemoryError):
        raise
    except Exception as error:
        if is_full(error):
            raise
        text = brief(error)
        raise AgentError(kind_of(text), f"{what}: {text}") from error


def kind_of(said: str) -> str:
    """Return the kind of an error by what a runtime said: memory ran out, or the file is bad."""
    return "out-of-resources" if _STARVED.search(said) else "bad-artifact"


def brief(error: BaseException) -> str:
    """Return the message of an error as one bounded line."""
    # OpenVINO starts every message with the places in its own source it came through.
    text = _SOURCE_PLACE.sub("", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:600]}..."


def check_contract(
    inputs: Sequence[tuple[str, str, Sequence[object]]],
    outputs: Sequence[tuple[str, str, Sequence[object]]],
    options: Options,
) -> tuple[tuple[int, int, int, int], int]:
    """Return image shape and classes of an engine given as (name, type, shape) of its ends.

    The batch of a dynamic engine is that of `options`. Raises a bad-artifact AgentError when it
    breaks the contract of this module's docstring.
    """
    found = f"it has inputs {list(inputs)} and outputs {list(outputs)}"
    if len(inputs) != 1 or len(outputs) != 1:
        raise AgentError("bad-artifact", f"the engine must have one input and one output; {found}")
    (image_name, image_type, shape), (logit_name, logit_type, out) = inputs[0], outputs[0]
    if options.batches is not None:
        if not all(side and _is_open(side[0]) for side in (shape, out)):
            raise AgentError(
                "bad-artifact", f"the engine was to be of an open batch and is not; {found}"
            )
        shape, out = (options.batch, *shape[1:]), (options.batch, *out[1:])
    sizes = [size for size in (*shape, *out) if isinstance(size, int) and size > 0]
    fits = (
        (image_name, image_type, logit_name, logit_type) == ("images", "uint8", "logits", "float32")
        and len(shape) == 4
        and len(out) == 2
        and len(sizes) == 6
        and shape[3] == 3
        and shape[0] == out[0]
    )
    if not fits:
        raise AgentError(
            "bad-artifact",
            "the engine must map uint8 `images` (batch, height, width, 3) to float32 `logits` "
            f"(batch, classes), all sizes fixed; {found}",
        )
    if sizes[0] != options.batch:
        raise AgentError(
            "usage",
            f"the engine was built for batch {sizes[0]}, the request says {options.batch}: "
            "build one engine per batch size, or a dynamic one",
        )
    return (sizes[0], sizes[1], sizes[2], 3), sizes[5]


def _is_open(size: object) -> bool:
    """Whether a size is one that a call decides: runtimes write -1, or a name."""
    return not isinstance(size, int) or size < 0
