"""What a device is to the host, and what the verbs of its agent answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Progress:
    """One step of something that takes long; `left_s` is None while it cannot be told."""

    what: str
    done: int
    total: int
    left_s: float | None


class Device(Protocol):
    """A machine with an agent."""

    @property
    def name(self) -> str:
        """The device's name in messages and reports."""
        ...

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        """Let the agent answer one request; return its record, its files lie in the folder `out`.

        `files` are the request's files by the plain names that `request` uses. The record has one
        field more than the agent sent: `log`, the last lines the runtime printed. Raises the
        EdgexError of the agent's fault; `out` is not touched then.
        """
        ...


class Facts(BaseModel):
    """Base of the agent's records: a field that is missing or not known is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CpuFacts(Facts):
    """The processor, as far as the agent's process may use it."""

    model: str | None
    logical_cpus: int
    physical_cores: int
    quota_cpus: float | None
    usable_cores: Annotated[int, Field(ge=1)]
    flags: list[str]
    vnni: bool


class MemoryFacts(Facts):
    """Memory in bytes."""

    total_bytes: int | None
    available_bytes: int | None


class GpuFacts(Facts):
    """An NVIDIA GPU as its driver describes it."""

    name: str
    sm: int
    """Compute capability times 10."""
    memory_bytes: int
    driver: str
    """The highest CUDA version that the driver serves."""
    driver_release: str | None = None
    """The driver's own version; None where it is not told."""


class RuntimeFacts(Facts):
    """A runtime that can be used (version, devices), or the reason it cannot (missing)."""

    version: str | None = None
    devices: list[str] = Field(default_factory=list)
    gpus: list[GpuFacts] = Field(default_factory=list)
    """Of runtimes that run on NVIDIA GPUs: those here, the first is used."""
    program: str | None = None
    """What builds and runs in place of the Python package, which cannot be used here."""
    missing: str | None = None


class ProbeRecord(Facts):
    """What `probe` answers."""

    arch: str
    system: str
    python: str
    board: str | None
    cpu: CpuFacts
    memory: MemoryFacts
    power_mode: str | None = None
    """A Jetson's, as nvpmodel calls it; None elsewhere."""
    numpy: str | None
    runtimes: dict[str, RuntimeFacts]
    log: list[str] = Field(default_factory=list)


class EngineRecord(Facts):
    """What `build` and `run` both answer."""

    runtime: str
    versions: dict[str, str]
    batch: int
    """Of a dynamic engine that is built: the one that it is best for."""
    batches: list[int] | None = None
    """Least, best and greatest batch of a dynamic engine; None is `batch` alone."""
    threads: int
    settings: dict[str, Any]
    """What the runtime was told or says of itself."""
    log: list[str] = Field(default_factory=list)
    """The last lines the runtime printed; the transport adds them."""


class LayerPlacement(Facts):
    """One layer of the network: the precision planned for it, and the one that the engine runs."""

    name: str
    kind: str
    """"convolution" or "dense"."""
    macs: Annotated[int, Field(ge=0)]
    """Multiply-accumulates for one image."""
    planned: str
    executed: str | None
    """"int8", "fp16", "bf16" or "fp32"; None where the runtime does not tell."""
    kernel: str
    """What runs it, in the runtime's words."""


class KernelTensor(Facts):
    """What a kernel reads or writes; `type` is the runtime's word."""

    type: str
    bytes: int


class Kernel(Facts):
    """One kernel of an engine."""

    kind: str
    layers: list[str]
    """The ONNX nodes that it computes, wholly or in part."""
    read: list[KernelTensor]
    constant: list[KernelTensor]
    written: list[KernelTensor]


class Inspection(Facts):
    """The kernels of an engine in their order, and sums over them in bytes for one batch."""

    kernels: list[Kernel]
    read_bytes: int
    """Constants, such as weights, are part of it."""
    constant_bytes: int
    written_bytes: int


class BuildRecord(EngineRecord):
    """What `build` answers."""

    layers: dict[str, int]
    """Layers as executed. ONNX Runtime: operators of the optimized graph, "domain:Type" where the
    domain is not ONNX's. OpenVINO: "Type precision". TensorRT-RTX: "kind Read to Written"."""
    placement: list[LayerPlacement] = Field(default_factory=list)
    """Empty where the runtime tells of no layer."""
    conversions: dict[str, int] = Field(default_factory=dict)
    """How many nodes only change type or layout: quantize, dequantize, reorder, cast."""
    weights_bytes: int | None = None
    """Of the engine, as the runtime says; zeros that pad are part of it."""
    zeros_bytes: int | None = None
    """Of the engine, in runs of zeros: they pad, and are no weights."""
    inspection: Inspection | None = None
    """What the runtime lists of its kernels; None where it lists nothing that is understood."""
    engine: str
    engine_bytes: int
    seconds: float


class KernelTime(Facts):
    """One kernel and its time in a call: the median, or the mean where no other is told."""

    name: str
    kind: str
    does: str
    """"int8", "fp16", "bf16" or "fp32" computes a layer; "quantize", "dequantize", "cast" and
    "reorder" change type or layout; "other" is the rest."""
    ns: Annotated[int, Field(ge=0)]


class Profile(Facts):
    """The kernels of an engine while it told their times, which takes time itself."""

    calls: Annotated[int, Field(ge=1)]
    kernels: list[KernelTime]


class Timing(Facts):
    """How a program took the times; times that were taken otherwise are not to be compared."""

    clock: Literal["trtexec"]
    """Copying there, computing and copying back, by CUDA events: no time of the host is in it."""
    cuda_graph: bool
    spin_wait: bool
    transfers: bool
    overlap: bool

    def __str__(self) -> str:
        """Return it in words, for a report."""
        ways = self.model_dump(exclude={"clock"}).items()
        return f"timed by {self.clock}: " + ", ".join(
            f"{name.replace('_', ' ')} {'on' if state else 'off'}" for name, state in ways
        )


class RunRecord(EngineRecord):
    """What `run` answers, beside its files."""

    import_s: float
    open_s: float | None
    """None where a program opens the engine by itself."""
    timing: Timing | None = None
    """None: by the agent's clock, around a call from images to logits in host memory."""
    warmup_iterations: int
    peak_rss_bytes: int | None
    power_mode: str | None = None
    """While it ran: a Jetson's, as nvpmodel calls it; None elsewhere."""
    profile: Profile | None = None
    """None where it was not asked for, or the runtime does not tell."""


RECORDS: dict[str, type[Facts]] = {"probe": ProbeRecord, "build": BuildRecord, "run": RunRecord}
