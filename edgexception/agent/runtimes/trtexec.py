"""TensorRT 10 and 11 through `trtexec`, where only that is there: no Python package, no numpy.

trtexec is started anew for each build, each timing and each batch of logits, in a folder of its own
and with plain file names, so that no path means anything to its options. How it answers:
samples/trtexec/trtexec.cpp and samples/common/sampleInference.cpp of NVIDIA/TensorRT, v10.3.0 to
v11.1. Not run on hardware.

Its times are not the agent's: the sum of copying to the device, computing and copying back, each
between two CUDA events ("Latency" in sampleReporting.cpp), without what the host does around them.
So `timing` of a run's record says how they were taken, and there is no energy: the power of the
time between two events would be multiplied by less than all of it, and trtexec rests nowhere with
its engine open.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgexception.agent import machine, npy
from edgexception.agent import trtexec_program as program
from edgexception.agent.onnx_file import OPEN, ends, operators, profile_shapes
from edgexception.agent.placement import check_sparse
from edgexception.agent.protocol import AgentError, Ticker, progress
from edgexception.agent.runtimes import TIMING_CACHE, Job, KernelTime, Options, check_contract
from edgexception.agent.runtimes.cuda import first_gpu, gpus, own_gpu
from edgexception.agent.telemetry import Telemetry
from edgexception.agent.tensorrt_options import (
    ONE_INFERENCE,
    BuildOptions,
    Gpu,
    MeasureOptions,
    build_command,
    check,
    measure_command,
    parse_version,
)
from edgexception.agent.trtexec import (
    Layer,
    Log,
    conversions,
    counts,
    does,
    layer_placement,
    parse_layers,
    parse_profile,
    parse_times,
)

PROGRESS_S = 5.0

_BINDING = re.compile(r"(images|logits)\.(input|output)\.(\d+(?:\.\d+)*)\.(\w+)\.raw")
_TYPES = {"fp32": "float32"}


def present() -> bool:
    """Whether there is a trtexec."""
    return program.find() is not None


def version() -> dict[str, Any]:
    """Return the version of trtexec, the GPUs, and where the program is."""
    found = gpus()
    return {
        "version": program.version(),
        "devices": [gpu["name"] for gpu in found],
        "gpus": found,
        "program": str(program.find()),
    }


def build(model: Path, options: Options, out: Path) -> dict[str, Any]:
    """Build for the first GPU; return what the engine says of its layers.

    Of a timing cache that it cannot read trtexec only prints so, times all kernels and writes a new
    one (getTimingCacheFromFile in samples/utils/timingCache.cpp).
    """
    gpu, number = own_gpu(options.sm, "trtexec"), parse_version(program.version())
    operators(model)
    shape, is_open = _shape(model, options)
    wanted = options.tensorrt or BuildOptions(precision="fp32")
    if is_open:
        shapes = profile_shapes(model, options.batches) or (shape, shape, shape)
        wanted = replace(wanted, shapes=shapes)
    check(wanted, number, Gpu(gpu["sm"], machine.facts()["board"]))
    if wanted.sparse_weights:
        check_sparse(model)
    start = time.monotonic()
    last = start

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            progress(f"build tensorrt with trtexec, {last - start:.0f} s so far", 0, 1, None)

    cache = out.with_name(TIMING_CACHE)
    with program.folder(out.parent, model=model) as folder:
        if cache.exists():
            shutil.copyfile(cache, folder / "cache")
        files = ("model", "engine", "cache", "layers.json")
        arguments = build_command(wanted, number, *map(Path, files))
        log = program.run(arguments, folder, f"cannot build {model.name}", tick)
        os.replace(program.made(folder / "cache"), cache)
        layers = parse_layers(program.read(folder / "layers.json"))
        os.replace(program.made(folder / "engine"), out)
    return {
        "settings": {
            "program": str(program.find()),
            "arguments": arguments,
            "gpu": gpu["name"],
            "sm": gpu["sm"],
            "driver": gpu["driver"],
            "images": list(shape),
            # What a network reads, uint8, always is on the GPU: no word of it is no word at all.
            "not_on_dla": list(log.dla_fallbacks) or (None if wanted.dla_core is not None else []),
        },
        "layers": counts(layers),
        "placement": layer_placement(model, layers),
        "conversions": conversions(layers),
    }


def run(job: Job, telemetry: Telemetry) -> dict[str, Any]:
    """Time an engine, or let it answer images batch by batch; see `runtimes.Program`."""
    gpu = first_gpu()
    settings = {"program": str(program.find()), "gpu": gpu["name"], "driver": gpu["driver"]}
    record: dict[str, Any] = {"settings": settings, "timing": None, "warmup_iterations": 0}
    with program.folder(job.out, engine=job.engine) as folder:
        if job.times is not None:
            measure = _measure(job.times)
            log = _time(job, measure, folder, telemetry)
            record |= {"timing": _told(measure), "warmup_iterations": log.warm_up or 0}
        if job.images is not None:
            telemetry.phase = "images"
            _classify(job, job.images, folder, telemetry)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {**record, "peak_rss_bytes": usage.ru_maxrss * 1024}


def profile(job: Job) -> list[KernelTime]:
    """Return the medians of what TensorRT tells of every layer, in a run of its own."""
    measure = replace(ONE_INFERENCE, min_iterations=job.profile or 1)
    with program.folder(job.out, engine=job.engine) as folder:
        arguments = _arguments(job, measure, profile=Path("profile.json"))
        arguments.append("--exportLayerInfo=layers.json")
        program.run(arguments, folder, f"cannot profile {job.engine.name}")
        times = parse_profile(program.read(folder / "profile.json"))
        layers = {layer.name: layer for layer in parse_layers(program.read(folder / "layers.json"))}
    return [
        KernelTime(time.name, layer.kind, does(layer), int(1e6 * time.median_ms))
        for time in times
        for layer in [layers.get(time.name, Layer(time.name))]
    ]


# --- times and logits -----------------------------------------------------------------------------


def _measure(times: dict[str, int]) -> MeasureOptions:
    return replace(
        ONE_INFERENCE,
        warmup_ms=times["warmup_ms"],
        duration_ms=times["duration_ms"],
        min_iterations=times["min_iterations"],
    )


def _told(measure: MeasureOptions) -> dict[str, Any]:
    """Return how times were taken, as far as that makes them other times."""
    options = asdict(measure)
    ways = ("cuda_graph", "spin_wait", "transfers", "overlap")
    return {"clock": "trtexec", **{name: options[name] for name in ways}}


def _time(job: Job, measure: MeasureOptions, folder: Path, telemetry: Telemetry) -> Log:
    """Write every time of one batch, the first images or what trtexec makes up, in ns."""
    arguments = [*_arguments(job, measure), "--dumpRawBindingsToFile"]
    if job.images is not None:
        shape = _built_shape(job)
        count, offset = npy.read_images(job.images, shape[1:])
        pixels = _batch(job.images, offset, 0, count, shape)
        # As the agent does with fewer images than a batch has.
        (folder / "images").write_bytes((pixels * shape[0])[: _size(shape)])
        arguments.append("--loadInputs=images:images")
    ticker = Ticker("timing", measure.warmup_ms + measure.duration_ms)
    begun = 0

    def listen(line: str) -> None:
        nonlocal begun
        if line.endswith("Starting inference"):
            begun = time.monotonic_ns()
            telemetry.phase = "warm-up"
        elif "Warmup completed" in line:  # printed once all inferences are timed
            telemetry.phase = "timing"
            telemetry.sample()
            telemetry.phase = "images"

    def tick() -> None:
        now = time.monotonic_ns()
        warm = now - begun >= measure.warmup_ms * 1_000_000
        if begun and telemetry.phase == "warm-up" and warm:
            telemetry.phase = "timing"
            telemetry.sample()
        telemetry.pause(now)
        ticker.tick(now)

    log = program.run(arguments, folder, f"cannot time {job.engine.name}", tick, listen)
    _answer(folder, job.options)
    entries = parse_times(program.read(folder / "times.json"))
    if len(entries) < measure.min_iterations:
        raise AgentError(
            "measurement-invalid",
            f"trtexec timed {len(entries)} inferences; {measure.min_iterations} were asked for",
        )
    nanoseconds = [round(entry["latencyMs"] * 1e6) for entry in entries]
    data = b"".join(ns.to_bytes(8, "little", signed=True) for ns in nanoseconds)
    npy.write(job.out / "times_ns.npy", "int64", (len(nanoseconds),), data)
    return log


def _classify(job: Job, images: Path, folder: Path, telemetry: Telemetry) -> None:
    """Write the logits of all images; the last batch is filled up with zeros, which are cut."""
    shape = _built_shape(job)
    count, offset = npy.read_images(images, shape[1:])
    arguments = [
        *_arguments(job, ONE_INFERENCE),
        "--loadInputs=images:images",
        "--dumpRawBindingsToFile",
    ]
    ticker, logits, classes = Ticker("images", count), bytearray(), 0

    def tick() -> None:
        telemetry.pause(time.monotonic_ns())

    for first in range(0, count, shape[0]):
        size = min(shape[0], count - first)
        pixels = _batch(images, offset, first, count, shape)
        (folder / "images").write_bytes(pixels.ljust(_size(shape), b"\0"))
        program.run(arguments, folder, f"cannot run {job.engine.name}", tick)
        answer, found = _answer(folder, job.options)
        classes = classes or found
        if found != classes:
            raise AgentError(
                "bad-artifact", f"{job.engine.name} answers now {classes}, now {found}"
            )
        logits += answer[: size * classes * 4]
        ticker.tick(time.monotonic_ns(), first + size)
    npy.write(job.out / "logits.npy", "float32", (count, classes), bytes(logits))


def _answer(folder: Path, options: Options) -> tuple[bytes, int]:
    """Return the logits that trtexec left, float32, and the classes; the engine's ends checked.

    The name of each file of `--dumpRawBindingsToFile` is name, side, shape and type of a tensor.
    """
    found: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {"input": [], "output": []}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.raw")):
        name = _BINDING.fullmatch(path.name)
        side = name[2] if name else "output" if ".output." in path.name else "input"
        shape = tuple(int(size) for size in name[3].split(".")) if name else ()
        kind = _TYPES.get(name[4], name[4]) if name else "?"
        found[side].append((name[1] if name else path.name, kind, shape))
        files[side] = path
    # Every answer has the batch of its own, whatever the engine would take.
    shape, classes = check_contract(found["input"], found["output"], replace(options, batches=None))
    answer = files["output"].read_bytes()
    for path in files.values():
        path.unlink()
    if len(answer) != shape[0] * classes * 4:
        raise AgentError("bad-artifact", f"trtexec left {len(answer)} bytes of logits")
    return answer, classes


def _batch(images: Path, offset: int, first: int, count: int, shape: tuple[int, ...]) -> bytes:
    """Return the pixels of a batch, or of what is left."""
    image = _size(shape) // shape[0]
    with images.open("rb") as file:
        file.seek(offset + first * image)
        return file.read(min(shape[0], count - first) * image)


def _size(shape: tuple[int, ...]) -> int:
    batch, height, width, colours = shape
    return batch * height * width * colours


def _arguments(job: Job, measure: MeasureOptions, profile: Path | None = None) -> list[str]:
    told, number = job.options.tensorrt, parse_version(program.version())
    core = None if told is None else told.dla_core
    shape = _built_shape(job)
    arguments = measure_command(
        measure, number, Path("engine"), Path("times.json"), core, profile, shape
    )
    if told is not None and told.version_compatible:
        # Such an engine brings code of its own, which trtexec runs only where it is told to.
        arguments.append("--versionCompatible")
    return arguments


def _built_shape(job: Job) -> tuple[int, ...]:
    """Return the shape of `images`: the one that the engine was built with, at the job's batch."""
    shape: Any = job.settings.get("images")
    whole = isinstance(shape, list) and len(shape) == 4
    if not whole or not all(type(size) is int and 0 < size < 1 << 16 for size in shape):
        raise AgentError(
            "bad-artifact",
            f"the manifest of {job.engine.name} does not tell the size of its images: build it "
            "again with trtexec",
        )
    return (job.options.batch, *shape[1:])


def _shape(model: Path, options: Options) -> tuple[tuple[int, int, int, int], bool]:
    """Return the shape of `images` at the batch of the options, and whether the graph leaves it."""
    inputs, outputs = ends(model)
    is_open = all(shape[:1] == (OPEN,) for _, _, shape in inputs)
    if options.batches is None:
        inputs, outputs = (
            [(name, kind, _at_batch(shape, options.batch)) for name, kind, shape in side]
            for side in (inputs, outputs)
        )
    shape, _ = check_contract(inputs, outputs, options)
    return shape, is_open


def _at_batch(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return (batch, *shape[1:]) if shape[:1] == (OPEN,) else shape
