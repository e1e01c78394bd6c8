"""The record of a run: what was measured, skipped or failed, with its reasons; `report.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edgexception.bench.paired import Paired
from edgexception.bench.statistics import Interval, LatencySummary, Proportion
from edgexception.device import Timing
from edgexception.prune.plan import LayerChange, PlannedLatency
from edgexception.report.measures import (
    DlaPlanned,
    Executed,
    Fidelity,
    Gain,
    Listing,
    Machine,
    Record,
    Spent,
    TimedUnder,
)
from edgexception.report.network import Network


class Row(Record):
    """One engine: a target's runtime, a precision and a batch size."""

    target: str
    runtime: str
    runtime_version: str | None
    program: str | None = None
    """What builds and runs where the runtime's Python package cannot be used: trtexec."""
    precision: str
    batch: int
    batches: tuple[int, int, int] | None = None
    """Least, best and greatest batch of a dynamic engine, which is one for all of them; None is an
    engine for `batch` alone."""
    threads: int
    machine: Machine | None = None
    """Where a kit built and measured it; None is the report's machine."""
    status: Literal["measured", "built", "skipped", "failed"]
    reason: str | None = None
    """Why a row is skipped or failed."""
    engine_bytes: int | None = None
    onnx_bytes: int | None = None
    layers: dict[str, int] = Field(default_factory=dict)
    """Layers as the runtime executes them, with their counts."""
    executed: Executed | None = None
    listing: Listing | None = None
    dla: DlaPlanned | None = None
    """Of an engine that is asked to run on a DLA."""
    latency: LatencySummary | None = None
    timing: Timing | None = None
    """How a program took the times; None is the agent's clock. Rows that differ in it are not
    compared."""
    conditions: TimedUnder | None = None
    images_per_second: float | None = None
    """None where a program took the times, which leave out what is between two inferences."""
    spent: Spent | None = None
    """None where the runtime does not tell the times of its kernels."""
    fastest: bool = False
    """Its median latency is the lowest of the target's runtimes, of which several were measured, at
    this precision and batch size."""
    speedup: Interval | None = None
    """FP32 latency / latency, same runtime and batch size: the geometric mean over the rounds of
    the ratio of the medians in that round."""
    gain: Gain | None = None
    """Of an INT8 engine that was measured beside a float one."""
    top1: Proportion | None = None
    top5: Proportion | None = None
    paired: Paired | None = None
    """Of a quantized network with labelled photos."""
    fidelity: Fidelity | None = None
    """Against the float network in torch, on the evaluation photos and their crops."""

    @property
    def batch_text(self) -> str:
        """The batch size, of a dynamic engine with its range: "8 of 1-8"."""
        if self.batches is None:
            return str(self.batch)
        return f"{self.batch} of {self.batches[0]}-{self.batches[2]}"


class Parity(Record):
    """One exported graph, compared by number."""

    form: str
    """"fp32", or a precision and the dialect: "int8-openvino"."""
    runtime: str | None = None
    images: int | None = None
    images_from: str | None = None
    simulated_vs_float: Fidelity | None = None
    executed_vs_float: Fidelity | None = None
    executed_vs_torch: Fidelity | None = None
    """Against torch running the same plan (the float network for FP32)."""
    skipped: str | None = None
    """Why it was not compared."""
    failed: str | None = None
    """Why comparing it failed."""

    @property
    def differs(self) -> bool:
        """Whether the runtime computes something else than torch: an SQNR below 40 dB."""
        found = self.executed_vs_torch
        return found is not None and found.sqnr_db is not None and found.sqnr_db < 40.0


class Types(Record):
    """The float types of one exported graph in float16."""

    form: str
    fp16: int
    """How many nodes are float16."""
    fp32: dict[str, str]
    """Nodes that stay float32, and why."""


class GateResult(Record):
    """One gate on one row, or on the pruned network."""

    gate: str
    row: str
    bound: float
    value: float | None
    passed: bool
    reason: str | None = None


class StageLine(Record):
    """One stage of the run, its key, and whether its result was there already."""

    stage: str
    what: str
    key: str
    reused: bool
    seconds: float


class BadImageLine(Record):
    """A photo that was left out."""

    set: str
    name: str
    reason: str


class Exceptions(Record):
    """The layers that are not INT8, and how they were chosen."""

    layers: dict[str, str]
    chosen: dict[str, Any] | None
    """The plan's `provenance.precision`; None where the recipe names the layers."""


class Calibration(Record):
    """What quantization looked at, and what came of it."""

    images: int
    photos: int
    warning: str | None = None
    """What fewer photos than the method needs have cost elsewhere."""
    digest: str
    method: str
    activations: str
    ranges: str
    bias_correction: bool
    rounding: str
    weight_bits: int
    exceptions: Exceptions | None = None


class PruningEffect(Record):
    """The pruned network against the unpruned one, both in torch, on the evaluation images."""

    fidelity: Fidelity
    top1: tuple[Proportion, Proportion] | None = None
    """Before and after, on labelled photos."""
    paired: Paired | None = None


class LatencyCheck(Record):
    """A pruned network measured against the unpruned one in the same run, in turns."""

    share: Interval
    """Its latency over the unpruned one's: the geometric mean of the rounds' ratios of medians."""
    median_ms: tuple[float, float]
    """Unpruned and pruned."""
    noisy: bool


class PruningLatency(PlannedLatency):
    """A latency budget against what was measured."""

    check: LatencyCheck
    plans: int
    """That were measured; the one that is nearest to the budget was taken."""
    met: bool
    """Whether its latency is within 5% of the budget."""


class Pruning(Record):
    """Which widths were cut, and what is left: pairs are before and after."""

    importance: str
    ranking: str
    align: int
    budgets: dict[str, float]
    rounds: int = 1
    images: int | None
    """That the importance was measured on."""
    macs: tuple[int, int]
    parameters: tuple[int, int]
    layers: tuple[LayerChange, ...]
    sparse: tuple[str, ...] = ()
    """Layers with 2:4 sparse weights."""
    latency: PruningLatency | None = None
    """Where the budget is one of latency."""
    effect: PruningEffect | None = None
    """None where it was not measured."""


class Effect(Record):
    """What quantizing something does to the logits: power of the noise over that of the logits."""

    sqnr_db: float | None
    """None where nothing changes."""
    agreement: float | None
    noise: float


class UnitSensitivity(Record):
    """What a separable convolution, or another layer, costs in INT8: each part of it alone."""

    unit: str
    layers: tuple[str, ...]
    macs: int
    input: Effect
    inner: Effect | None
    """The edge between depthwise and pointwise convolution."""
    weights: Effect
    output: Effect | None
    """What adds and pools read, on runtimes whose layers write integers."""
    exception: Effect
    """All that an exception would take away, alone."""
    without: Effect
    """The network with everything quantized but this unit."""


class Sensitivity(Record):
    """Which edges and weights cost how much; `sensitivity.json` of its stage."""

    dialect: str
    images: int
    seconds: float
    threads: int
    everything: Effect
    fitted: Effect
    """The network with the weights and biases that were fitted to the plan, all else in float."""
    units: tuple[UnitSensitivity, ...]


class Report(Record):
    """Everything a run found."""

    schema_version: Literal[1] = 1
    edgexception: str
    recipe: dict[str, Any]
    network: Network
    machine: Machine
    versions: dict[str, str]
    pruning: Pruning | None = None
    calibration: Calibration | None
    evaluation_photos: int | None
    evaluation_images: int | None
    bad_images: tuple[BadImageLine, ...]
    parity: tuple[Parity, ...]
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...]
    stages: tuple[StageLine, ...]
    sensitivity: Sensitivity | None = None
    types: tuple[Types, ...] = ()
    """Of the graphs whose float parts are float16."""

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """The gates that were missed."""
        return tuple(gate for gate in self.gates if not gate.passed)


def row_name(row: Row) -> str:
    """Return how messages name a row: "cpu-x86 openvino int8 b1"."""
    return f"{row.target} {row.runtime} {row.precision} b{row.batch_text}"
