"""What a row of a record is made of: measures with their intervals, and what an engine is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from edgexception.bench.statistics import Interval, Proportion
from edgexception.device import LayerPlacement


class Record(BaseModel):
    """Base of the record's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True)


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
    ratio: Interval
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

    agreement: Proportion | None
    """Of decisions; None for networks with one output, which decide nothing."""
    sqnr_db: float | None
    max_abs_difference: float


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
