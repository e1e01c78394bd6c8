"""The record of a run: what was measured, skipped or failed, with its reasons; `report.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from edgexception.device import LayerPlacement, Timing
from edgexception.prune.plan import LayerChange, PlannedLatency
from edgexception.report.network import Network


class Record(BaseModel):
    """Base of the record's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True)


class Share(Record):
    """A share of images with its 95% Wilson interval."""

    successes: int
    trials: int
    value: float
    low: float
    high: float


class Estimate(Record):
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Latency(Record):
    """Latency of one batch in ms over every measured iteration; `cov` is deviation / mean."""

    min_ms: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    cov: float
    iterations: int
    round_medians_ms: tuple[float, ...]
    noisy: bool


class Energy(Record):
    """Energy of an image in mJ, and the mean powers in W, timed and idle, that it comes from."""

    millijoules: float
    busy_watts: float
    idle_watts: float
    rails: tuple[str, ...]


class TimedUnder(Record):
    """Under which conditions an engine was timed."""

    samples: int
    marked: int
    """Samples taken while something throttled or a clock had dropped."""
    reasons: tuple[str, ...]
    throttled: bool
    power_mode: str | None
    clocks_held: bool | None = None
    """Whether a Jetson's GPU was held at one clock, as jetson_clocks does; None is not told."""
    clock_mhz: tuple[float, float] | None
    """Lowest and highest, of the GPU where one is told, else of the fastest core."""
    hottest: tuple[str, float] | None
    energy: Energy | None


class Spent(Record):
    """Where an engine's time goes: its kernels in one call, while the runtime told their times."""

    calls: int
    total_ms: float
    shares: dict[str, float]
    """By what kernels do: compute a layer in "int8", "fp32", ..., change type or layout
    ("quantize", "dequantize", "cast", "reorder"), or "other"."""
    blocks: dict[str, float]
    """In ms."""


class Slower(Record):
    """A block of the network that takes longer in INT8, by its kernels' times."""

    block: str
    int8_ms: float
    float_ms: float


class Gain(Record):
    """What an INT8 engine gains in latency over the fastest float engine of its place."""

    over: str
    """The precision of that engine: same target, runtime and batch size."""
    ratio: Estimate
    """Its latency / INT8's."""
    slower: tuple[Slower, ...] | None = None
    """Worst first; None where the runtime does not tell."""

    @property
    def sure(self) -> bool:
        """Whether INT8 is faster: all of the interval is above 1."""
        return self.ratio.low > 1.0


class Fidelity(Record):
    """Logits against other logits of the same images.

    `sqnr_db` is null where they are equal to the last bit, and no less than -200.
    """

    agreement: Share | None
    """Of decisions; None for networks with one output, which decide nothing."""
    sqnr_db: float | None
    max_abs_difference: float


class Paired(Record):
    """Decisions against the float network's in torch, on the labelled photos.

    `changed` are other decisions; `lost` of them were right in float, `gained` are right now.
    `difference` of top-1 with Tango's 95% interval; `p_value` is McNemar's exact one.
    """

    images: int
    changed: int
    lost: int
    gained: int
    difference: float
    low: float
    high: float
    p_value: float


class Executed(Record):
    """What an engine really runs, as its runtime tells of the optimized network."""

    shares: dict[str, float]
    """Of the convolutions' multiply-accumulates by precision: "int8", "fp16", "bf16", "fp32", and
    "unknown" where the runtime does not tell."""
    conversions: dict[str, int]
    """Nodes that only change type or layout: quantize, dequantize, reorder, cast."""
    misplaced: tuple[LayerPlacement, ...]
    """Layers that run in another precision than planned; a row that has any is failed."""
    unknown: tuple[str, ...]
    """Layers of which the runtime does not tell."""


class Listing(Record):
    """An engine's kernels, for one batch, by the builder's word: nothing of it is measured."""

    kernels: int
    read_bytes: int
    """Weights and other constants are part of it."""
    written_bytes: int
    weights_bytes: int | None
    """Kept in the engine; the rest of its file is code."""
    zeros_bytes: int | None
    """Of them, what only pads."""
    int8_kernels: int
    """Kernels that read INT8."""
    int8_widened: int
    """Those of them that write a wider type, which another kernel makes INT8 again."""

    @property
    def moved_bytes(self) -> int:
        """What the kernels read and write."""
        return self.read_bytes + self.written_bytes


class DlaPlanned(Record):
    """Where an engine's layers go on a device with a DLA, by the vendor's rules: `export.dla`."""

    layers: int
    macs_share: float
    """Of all multiply-accumulates, those of the layers that are planned for the DLA."""
    precisions: dict[str, int]
    """How many layers are planned for the DLA in "fp16" and "int8"."""
    parts: int
    """Into how many parts the GPU's layers cut what the DLA runs, at least."""
    gpu: dict[str, str]
    """Layers that are planned for the GPU, and why."""
    fell_back: tuple[str, ...] | None = None
    """Planned for the DLA, and the builder put them on the GPU; None: it does not tell, or nothing
    is built yet."""
    taken: tuple[str, ...] | None = None
    """Planned for the GPU, and the builder took them for the DLA."""

    @property
    def on_dla(self) -> int:
        """How many layers are planned for the DLA."""
        return sum(self.precisions.values())


class Machine(Record):
    """Where the run happened, as the device said of itself."""

    device: str
    arch: str
    system: str
    python: str
    board: str | None
    power_mode: str | None = None
    cpu: str | None
    cores: int
    vnni: bool
    memory_bytes: int | None


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
    layers: dict[str, int] = {}
    """Layers as the runtime executes them, with their counts."""
    executed: Executed | None = None
    listing: Listing | None = None
    dla: DlaPlanned | None = None
    """Of an engine that is asked to run on a DLA."""
    latency: Latency | None = None
    timing: Timing | None = None
    """How a program took the times; None is the agent's clock. Rows that differ in it are not
    compared."""
    conditions: TimedUnder | None = None
    images_per_second: float | None = None
    spent: Spent | None = None
    """None where the runtime does not tell the times of its kernels."""
    fastest: bool = False
    """Its median latency is the lowest of the target's runtimes, of which several were measured, at
    this precision and batch size."""
    speedup: Estimate | None = None
    """FP32 latency / latency, same runtime and batch size: the geometric mean over the rounds of
    the ratio of the medians in that round."""
    gain: Gain | None = None
    """Of an INT8 engine that was measured beside a float one."""
    top1: Share | None = None
    top5: Share | None = None
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
    top1: tuple[Share, Share] | None = None
    """Before and after, on labelled photos."""
    paired: Paired | None = None


class LatencyCheck(Record):
    """A pruned network measured against the unpruned one in the same run, in turns."""

    share: Estimate
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
