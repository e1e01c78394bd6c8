"""How engines are measured: in rounds, in turns, each run in a fresh agent process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.agent.manifest import FILE as MANIFEST
from edgexception.agent.runtimes import TIMING_CACHE
from edgexception.bench.statistics import Times
from edgexception.device import Device, Progress, Timing
from edgexception.errors import BadArtifact, EdgexError, MeasurementInvalid, UsageError
from edgexception.recipe import BenchSpec

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Engine:
    """A built engine: how a report names it, and what a run of it needs."""

    key: str
    runtime: str
    path: Path
    """Its manifest lies beside it."""
    batch: int
    """What it is run with."""
    threads: int
    tensorrt: dict[str, Any] | None = None
    """What TensorRT was told when it was built."""


def build_engine(
    runtime: str,
    model: Path,
    batch: int,
    threads: int,
    device: Device,
    out: Path,
    progress: Report | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let the device build an engine of an ONNX file in the folder `out`; return its record.

    `more` has the `batches` of a dynamic engine, least, best (`batch`) and greatest; for NVIDIA
    GPUs `sm`, compute capability times 10, and `tensorrt`, its options; and `timing_cache`, the
    path of what an earlier build left, valid for this device and version.
    """
    files, asked = {"model.onnx": model}, dict(more or {})
    if (cache := asked.pop("timing_cache", None)) is not None:
        files[TIMING_CACHE], asked["timing_cache"] = cache, TIMING_CACHE
    request = {
        "runtime": runtime,
        "model": "model.onnx",
        "batch": batch,
        "threads": threads,
        **asked,
    }
    return device.call("build", request, files, out, progress)


def measure_latency(
    engines: Sequence[Engine],
    spec: BenchSpec,
    device: Device,
    work: Path,
    progress: Report | None = None,
    power: Mapping[str, Any] | None = None,
) -> dict[str, list[Times]]:
    """Return per engine key the raw times of every round, in ns: one iteration is one batch.

    Round 1 of every engine comes first, then round 2, so that a machine that gets slower meanwhile
    does so for all; each round starts with another engine. The raw files, the telemetry and
    the record of each run stay in `work`/round-N-engine-M; after the last round's times each
    engine is run once more, for those of its kernels (`profile` of the record).
    `spec.batch_sizes` is not looked at: an engine says its own. `power` is what the agent changes
    and puts back in each run: `mode`, a Jetson's power mode or None, and `lock_clocks`.

    Raises MeasurementInvalid for times that cannot be and for rounds that were timed in different
    ways, and what the agent refuses; the error's `engine` names the one it was.
    """
    keys = [engine.key for engine in engines]
    if len(set(keys)) != len(keys) or not keys:
        raise UsageError(f"engines to measure need keys that differ; these are {keys}")
    timing = spec.model_dump(include={"warmup_ms", "duration_ms", "min_iterations"})
    raw: dict[str, list[Times]] = {key: [] for key in keys}
    ways: dict[str, str] = {}
    total = spec.rounds * len(engines)
    start, done = time.monotonic(), 0
    for turn in range(spec.rounds):
        for place in range(len(engines)):
            number = (place + turn) % len(engines)
            engine = engines[number]
            if progress is not None:
                passed = time.monotonic() - start
                planned = (spec.warmup_ms + spec.duration_ms) / 1000
                left = (passed / done if done else planned) * (total - done)
                what = f"round {turn + 1}/{spec.rounds} {engine.key}"
                progress(Progress(what, done, total, left))
            out = work / f"round-{turn + 1}-engine-{number + 1}"
            try:
                last = turn == spec.rounds - 1
                calls = spec.min_iterations if last else None
                record = _run(engine, device, out, timing=timing, power=power, profile=calls)
                _check_way(engine, record.get("timing"), ways)
                raw[engine.key].append(_times(out, engine.key, spec))
            except EdgexError as error:
                error.engine = engine.key
                raise
            done += 1
    return raw


def run_images(
    engine: Engine,
    images_npy: Path,
    device: Device,
    work: Path,
    progress: Report | None = None,
) -> NDArray[np.float32]:
    """Return the float32 logits (N, classes) of an .npy file of uint8 images (N, H, W, 3).

    Raises MeasurementInvalid naming the first image whose logits are not finite.
    """
    _run(engine, device, work, images=images_npy, progress=progress)
    count = len(_array(images_npy))
    logits = _array(work / "logits.npy")
    if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != count:
        raise MeasurementInvalid(
            f"{engine.key}: the device answered logits {logits.dtype} {logits.shape} for "
            f"{count} images"
        )
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise MeasurementInvalid(
            f"{engine.key}: the logits of image {bad[0]} (and {len(bad) - 1} more) are not finite; "
            "the engine computes NaN or infinity, so nothing it says counts: check the "
            "quantization ranges, then build it again"
        )
    return np.array(logits, dtype=np.float32)


def _run(
    engine: Engine,
    device: Device,
    out: Path,
    timing: dict[str, int] | None = None,
    images: Path | None = None,
    progress: Report | None = None,
    power: Mapping[str, Any] | None = None,
    profile: int | None = None,
) -> dict[str, Any]:
    name = f"engine{engine.path.suffix}"
    files = {name: engine.path, MANIFEST: engine.path.with_name(MANIFEST)}
    if images is not None:
        files["images.npy"] = images
    request = {
        "runtime": engine.runtime,
        "engine": name,
        "manifest": MANIFEST,
        "batch": engine.batch,
        "threads": engine.threads,
        "images": None if images is None else "images.npy",
        "timing": timing,
        "power": power,
        "profile": profile,
        "tensorrt": engine.tensorrt,
    }
    record = device.call("run", request, files, out, progress)
    (out / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return record


def _check_way(engine: Engine, told: object, ways: dict[str, str]) -> None:
    """Raise MeasurementInvalid where engines of one runtime are timed in different ways."""
    way = "timed by the agent's clock" if told is None else str(Timing.model_validate(told))
    known = ways.setdefault(engine.runtime, way)
    if way != known:
        raise MeasurementInvalid(
            f"{engine.key}: {way}; {engine.runtime} was before {known}. Such times are not to be "
            "compared: change nothing on the device while it measures, and start again"
        )


def _times(out: Path, key: str, spec: BenchSpec) -> Times:
    times = _array(out / "times_ns.npy")
    fits = times.dtype == np.int64 and times.ndim == 1 and len(times) >= spec.min_iterations
    if not fits or int(times.min()) <= 0:
        raise MeasurementInvalid(
            f"{key}: the device answered times {times.dtype} {times.shape}, not at least "
            f"{spec.min_iterations} positive int64 of ns"
        )
    return np.array(times, dtype=np.int64)


def _array(path: Path) -> NDArray[Any]:
    """Map an .npy file; BadArtifact when it is missing, broken or holds Python objects."""
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError) as error:
        raise BadArtifact(f"{path} is missing or not an .npy file of numbers: {error}") from error
    return array
