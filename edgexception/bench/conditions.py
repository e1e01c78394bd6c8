"""Under which conditions an engine was timed: clocks, temperatures, throttling, energy.

From the samples that the agent takes between iterations and what tegrastats or NVML tells in them,
by their `phase`: "idle" (the engine is open and nothing runs), "warm-up", "timing".

- A sample is *marked* where a counter of throttling has risen since the first sample (over-current
  events of a Jetson, thermal events of an x86 core), where a cooling device is more active than
  while idle, where the driver of a desktop GPU says that power or heat holds its clock down, or
  where the clock of what runs the engine is below CLOCK_DROP of its highest while it was timed. A
  row with a marked sample in its timed part is throttled.
- Energy of an image = (power while timed - power while idle) x mean latency / batch. The power is
  that of the module's input where there is such a rail (VDD_IN of Orin Nano and NX), else the sum
  of the rails; the line of tegrastats that comes first in a phase began before it and is left out.
  Of a desktop GPU it is that of the board. NVML's power is the mean of the last second on most GPUs
  (nvml.h, nvmlDeviceGetPowerUsage), so the samples of the first second of a phase are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from edgexception.agent.nvml import THROTTLES
from edgexception.bench.statistics import Times
from edgexception.errors import BadArtifact

CLOCK_DROP = 0.9
WHOLE = ("VDD_IN", "POM_5V_IN")
"""Rails that feed all others: NVIDIA's Jetson Linux Developer Guide, power monitors."""
BOARD = "GPU board"
"""What NVML's power is of: the GPU and its memory, not the machine around them."""
SETTLED_NS = 1_000_000_000


class Line(BaseModel):
    """A line of tegrastats, as far as it is judged."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    gpu_mhz: list[int]
    celsius: dict[str, float]
    milliwatts: dict[str, int]


class GpuState(BaseModel):
    """What NVML tells of a desktop GPU, as far as it is judged; None is not told."""

    model_config = ConfigDict(frozen=True, strict=True)

    gpu_mhz: int | None
    celsius: int | None
    milliwatts: int | None
    reasons: list[str]
    """Why the clock is not the highest: `agent.nvml.REASONS`."""


class Sample(BaseModel):
    """One sample of the agent's telemetry, as far as it is judged."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    t_ns: int
    phase: str
    cpu_mhz: list[float]
    gpu_mhz: list[float]
    gpu_held: bool | None = None
    """Whether the GPU may have one clock alone, as jetson_clocks leaves it; None is not told."""
    celsius: dict[str, float]
    throttle: dict[str, int]
    """Counters by name; one that has risen since the first sample has throttled."""
    tegrastats: list[Line]
    nvml: GpuState | None = None

    @property
    def gpu_clock(self) -> float | None:
        """The highest of the GPU's; None where none is told, as between two lines."""
        if self.nvml is not None:
            return self.nvml.gpu_mhz
        told = [clock for line in self.tegrastats for clock in line.gpu_mhz] or self.gpu_mhz
        return max(told, default=None)

    @property
    def temperatures(self) -> dict[str, float]:
        """Sensors and their degrees Celsius."""
        found = [self.celsius, *(line.celsius for line in self.tegrastats)]
        if self.nvml is not None and self.nvml.celsius is not None:
            found.append({"GPU": self.nvml.celsius})
        return {name: max(c[name] for c in found if name in c) for c in found for name in c}

    @property
    def powers(self) -> list[dict[str, int]]:
        """Rails in mW, of every line of tegrastats, or of the GPU's board."""
        if self.nvml is not None:
            told = self.nvml.milliwatts
            return [] if told is None else [{BOARD: told}]
        return [line.milliwatts for line in self.tegrastats]

    @property
    def core_clock(self) -> float | None:
        """That of the fastest core."""
        return max(self.cpu_mhz, default=None)


_SAMPLES = TypeAdapter(list[Sample])


def read_samples(path: Path) -> list[Sample]:
    """Read a run's telemetry; BadArtifact where it is not what an agent writes."""
    try:
        return _SAMPLES.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BadArtifact(f"{path.name}: field {place}: {first['msg']}") from error


@dataclass(frozen=True)
class Energy:
    """Of one image, in mJ, and the mean powers in W that it comes from."""

    millijoules: float
    busy_watts: float
    idle_watts: float
    rails: tuple[str, ...]


@dataclass(frozen=True)
class Conditions:
    """What a report says of how an engine was timed, over all its rounds."""

    samples: int
    """While it was timed."""
    marked: int
    """Of them, those taken while something throttled."""
    reasons: tuple[str, ...]
    power_mode: str | None
    clocks_held: bool | None
    """Whether the GPU's clock was held all the time, as jetson_clocks does; None is not told."""
    clock_mhz: tuple[float, float] | None
    """Lowest and highest, of the GPU where there is one, else of the fastest core."""
    hottest: tuple[str, float] | None
    """A sensor and its degrees Celsius."""
    energy: Energy | None

    @property
    def throttled(self) -> bool:
        """Whether any sample is marked."""
        return self.marked > 0


def conditions(
    rounds: Sequence[Sequence[Sample]], times: Sequence[Times], batch: int, power_mode: str | None
) -> Conditions:
    """Return the conditions of an engine from the samples of each round, and its times in ns."""
    timed = [[s for s in samples if s.phase == "timing"] for samples in rounds]
    everything = [sample for samples in rounds for sample in samples]
    gpu = any(sample.gpu_clock is not None for sample in everything)

    def clock(sample: Sample) -> float | None:
        return sample.gpu_clock if gpu else sample.core_clock

    clocks = [c for samples in timed for s in samples if (c := clock(s)) is not None]
    highest = max(clocks, default=0.0)
    marks = [
        tuple(_marks(samples[0], sample, clock(sample), highest))
        for samples, wanted in zip(rounds, timed, strict=True)
        for sample in wanted
    ]
    heat = [item for samples in timed for s in samples for item in s.temperatures.items()]
    held = {sample.gpu_held for samples in timed for sample in samples} or {None}
    return Conditions(
        samples=len(marks),
        marked=sum(bool(found) for found in marks),
        reasons=tuple(dict.fromkeys(reason for found in marks for reason in found)),
        power_mode=power_mode,
        clocks_held=None if None in held else all(held),
        clock_mhz=(min(clocks), highest) if clocks else None,
        hottest=max(heat, key=lambda item: item[1], default=None),
        energy=_energy(rounds, times, batch),
    )


def _marks(first: Sample, sample: Sample, clock: float | None, highest: float) -> Iterator[str]:
    for name, count in sample.throttle.items():
        if count > first.throttle.get(name, count):
            yield f"{name} rose"
    for reason in sample.nvml.reasons if sample.nvml else ():
        if reason in THROTTLES:
            yield f"the GPU is held by {reason}"
    if clock is not None and clock < CLOCK_DROP * highest:
        yield f"its clock fell below {CLOCK_DROP:.0%} of {highest:.0f} MHz"


def _energy(
    rounds: Sequence[Sequence[Sample]], times: Sequence[Times], batch: int
) -> Energy | None:
    busy, idle = (_powers(rounds, phase) for phase in ("timing", "idle"))
    names = {name for rails in (*busy, *idle) for name in rails}
    rails = tuple(name for name in WHOLE if name in names)[:1] or tuple(sorted(names))
    if not busy or not idle or any(set(rails) - set(found) for found in (*busy, *idle)):
        return None
    watts = [fmean(sum(line[r] for r in rails) for line in found) / 1000 for found in (busy, idle)]
    image_ms = fmean(float(raw.mean()) for raw in times) / 1e6 / batch
    return Energy((watts[0] - watts[1]) * image_ms, watts[0], watts[1], rails)


def _powers(rounds: Sequence[Sequence[Sample]], phase: str) -> list[dict[str, int]]:
    """Return the rails in mW of a phase in all rounds, without what tells of the time before it."""
    found = []
    for samples in rounds:
        own = [sample for sample in samples if sample.phase == phase]
        if any(sample.nvml for sample in own):
            settled = [s for s in own if s.t_ns >= own[0].t_ns + SETTLED_NS]
            found += [power for sample in settled for power in sample.powers]
        else:
            found += [power for sample in own for power in sample.powers][1:]
    return [power for power in found if power]
