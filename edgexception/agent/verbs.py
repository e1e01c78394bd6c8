"""The three verbs: what each takes from its request and puts into its answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgexception.agent import jetson, machine, manifest, npy, power, room, runtimes, timing
from edgexception.agent.protocol import AgentError, Request, Ticker, answer, progress, write_json
from edgexception.agent.remote import sha256_of
from edgexception.agent.telemetry import Telemetry, memory_bytes
from edgexception.agent.tensorrt_options import read_options

try:
    import numpy as np
except ImportError:  # trtexec alone builds and runs without it; whatever needs it says so
    np = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_THREADS = 1024
MAX_PROFILE = 1_000_000
PROBE_TIMEOUT_S = 120
"""For the first import of a runtime, whose libraries a device may read from an SD card."""

_TIMING_BOUNDS = {
    "warmup_ms": (1, 3_600_000),
    "duration_ms": (1, 3_600_000),
    "min_iterations": (1, 1_000_000),
}

_DESCRIBE = """
import json, sys
root, sys.path[:] = sys.argv[3], json.loads(sys.argv[1])
sys.path.insert(0, root)
import edgexception
del sys.path[0]
from edgexception.agent import runtimes
from edgexception.agent.protocol import AgentError
try:
    facts = runtimes.load(sys.argv[2]).version()
except AgentError as fault:
    facts = {"missing": str(fault)}
print(json.dumps(facts))
"""


def probe(request: Request, out: Path) -> None:
    """Answer with the facts of the machine and, per runtime, version and devices or why not.

    Each runtime is imported in its own process: one that crashes the interpreter at import, as a
    wheel for another processor does, is reported as missing, not as the end of the probe.
    A `power` that could not be set is refused here, before anything is done.
    """
    if (wanted := power.read_wanted(request)) is not None:
        power.check(wanted)
    start = [sys.executable, "-I", "-c", _DESCRIBE, json.dumps(sys.path)]
    # The folder of the package, or the zipapp, that this very agent comes from.
    root = str(Path(__file__).parents[2])
    children = {
        name: subprocess.Popen(  # noqa: S603 - our own interpreter and program
            [*start, name, root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for name in runtimes.MODULES
    }
    found = {name: _described(name, child) for name, child in children.items()}
    facts = {**machine.facts(), "power_mode": jetson.power_mode(), "numpy": _numpy()}
    answer(out, {**facts, "runtimes": found}, ())


def _numpy() -> str | None:
    return None if np is None else str(np.__version__)


def _described(name: str, child: subprocess.Popen[bytes]) -> dict[str, Any]:
    try:
        text, _ = child.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"missing": f"importing {name} did not end within {PROBE_TIMEOUT_S} s"}
    try:
        # A runtime may print while it is imported; the facts are the last line.
        facts = json.loads(text.splitlines()[-1])
    except (IndexError, ValueError):
        return {"missing": f"importing {name} ended the process with code {child.returncode}"}
    return dict(facts)


def build(request: Request, out: Path) -> None:
    """Compile `model` for `runtime`; answer with the engine, its manifest and the build record."""
    name, options = _runtime(request)
    model = request.file("model")
    room.check_disk(out, [model])
    room.check_memory(name, model)
    runtime = runtimes.load(name)
    engine, cache = out / runtimes.ENGINE_FILES[name], out / runtimes.TIMING_CACHE
    read = _take_cache(request, name, cache)
    progress(f"build {name}", 0, 1, None)
    start = time.monotonic()
    facts = runtime.build(model, options, engine)
    record = {
        **_common(name, runtime, options),
        **facts,
        "engine": engine.name,
        "engine_bytes": engine.stat().st_size,
        "seconds": time.monotonic() - start,
    }
    files = [engine.name, manifest.FILE]
    if name in runtimes.TIMED:
        digests = {"read_sha256": read, "written_sha256": sha256_of(cache)}
        record["settings"] = {**facts["settings"], "timing_cache": digests}
        files.append(cache.name)
    manifest.write(out, model, options, record, runtime.version())
    progress(f"build {name}", 1, 1, 0.0)
    answer(out, record, tuple(files))


def _take_cache(request: Request, runtime: str, cache: Path) -> str | None:
    """Put the timing cache of an earlier build where this one's will be; return its sha256."""
    if request.fields.get("timing_cache") is None:
        return None
    if runtime not in runtimes.TIMED:
        raise AgentError("usage", f"request: {runtime} has no timing cache")
    shutil.copyfile(request.file("timing_cache"), cache)
    return sha256_of(cache)


def run(request: Request, out: Path) -> None:
    """Run `engine`, if its `manifest` fits, for its times, the logits of `images`, or both."""
    name, options = _runtime(request)
    engine, described = request.file("engine"), request.file("manifest")
    times = request.integers("timing", _TIMING_BOUNDS)
    path = request.file("images") if request.fields.get("images") is not None else None
    if times is None and path is None:
        raise AgentError("usage", "request: run needs images, timing or both")
    wanted = power.read_wanted(request)

    start = time.monotonic()
    runtime = runtimes.load(name)
    imported = time.monotonic()
    found = manifest.check(described, engine, name, runtime.version())
    batches, settings = found["options"]["batches"], found["settings"]
    options = replace(options, batches=None if batches is None else tuple(batches))
    if batches is not None and not batches[0] <= options.batch <= batches[2]:
        raise AgentError(
            "usage",
            f"{engine.name} takes batches of {batches[0]} to {batches[2]}, the request says "
            f"{options.batch}: build an engine for it",
        )
    checked = time.monotonic()
    job = runtimes.Job(engine, options, settings, path, times, _profiled(request), out)
    # A program opens the engine by itself, each time it is started.
    session = None if isinstance(runtime, runtimes.Program) else runtime.open(engine, options)
    opened = time.monotonic()
    images = None if path is None or session is None else open_images(path, session.shape)

    record = {
        **_common(name, runtime, options),
        "import_s": imported - start,
        "open_s": None if session is None else opened - checked,
        "warmup_iterations": 0,
    }
    with power.held(wanted), runtimes.blaming(f"{name} failed while it ran {engine.name}"):
        record["power_mode"] = jetson.power_mode()
        telemetry = Telemetry(gpu=bool(runtime.version().get("gpus")))
        telemetry.sample()
        if isinstance(runtime, runtimes.Program):
            record |= runtime.run(job, telemetry)
        elif session is not None:
            record["settings"] = session.settings
            if times is not None:
                record["warmup_iterations"] = _time(session, images, times, telemetry, out)
            if images is not None:
                logits = classify(session, images, telemetry.pause)
                np.save(out / "logits.npy", logits, allow_pickle=False)
        telemetry.sample()
        telemetry.close()
    write_json(out / "telemetry.json", telemetry.samples)
    record.setdefault("peak_rss_bytes", memory_bytes("VmHWM"))
    record["profile"] = _profile(runtime, job, session)
    files = [file for file, made in (("times_ns.npy", times), ("logits.npy", path)) if made]
    answer(out, record, ("telemetry.json", *files))


def _profiled(request: Request) -> int | None:
    asked = request.fields.get("profile") is not None
    return request.integer("profile", 1, MAX_PROFILE) if asked else None


def open_images(path: Path, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Map an .npy file of uint8 images (N, height, width, 3), N >= 1; nothing is loaded yet."""
    count, offset = npy.read_images(path, shape[1:])
    return np.memmap(path, np.uint8, "r", offset, (count, *shape[1:]))


def classify(
    session: runtimes.Session, images: NDArray[np.uint8], pause: Callable[[int], None]
) -> NDArray[np.float32]:
    """Return float32 logits (N, classes); the last batch is filled up with zeros, which are cut."""
    batch, count = session.shape[0], len(images)
    logits = np.empty((count, session.classes), np.float32)
    buffer = np.zeros(session.shape, np.uint8)
    ticker = Ticker("images", count)
    for first in range(0, count, batch):
        size = min(batch, count - first)
        buffer[:size] = images[first : first + size]
        buffer[size:] = 0
        logits[first : first + size] = session.call(buffer)[:size]
        now = time.monotonic_ns()
        pause(now)
        ticker.tick(now, first + size)
    return logits


def _time(
    session: runtimes.Session,
    images: NDArray[np.uint8] | None,
    times: dict[str, int],
    telemetry: Telemetry,
    out: Path,
) -> int:
    """Write the raw times of one batch, first images or noise; return the warm-up calls."""
    if images is None:
        batch = _noise(session.shape)
    else:
        batch = np.resize(images[: session.shape[0]], session.shape)

    def call() -> object:
        return session.call(batch)

    warmup_ns, duration_ns = times["warmup_ms"] * 1_000_000, times["duration_ms"] * 1_000_000
    ticker = Ticker("timing", times["warmup_ms"] + times["duration_ms"])

    def pause(now: int) -> None:
        telemetry.pause(now)
        ticker.tick(now)

    telemetry.rest()
    telemetry.phase = "warm-up"
    warm = timing.warm_up(call, warmup_ns, pause)
    telemetry.phase = "timing"
    telemetry.sample()
    raw = timing.measure(call, duration_ns, times["min_iterations"], pause)
    telemetry.sample()
    telemetry.phase = "images"
    npy.write(out / "times_ns.npy", "int64", (len(raw),), raw.tobytes())
    return warm


def _noise(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _profile(
    runtime: runtimes.Runtime | runtimes.Program,
    job: runtimes.Job,
    session: runtimes.Session | None,
) -> dict[str, Any] | None:
    """Return the times of the kernels over some calls; None unasked, or where not told."""
    if job.profile is None:
        return None
    if isinstance(runtime, runtimes.Program):
        kernels = runtime.profile(job)
    elif session is not None and hasattr(runtime, "profile"):
        noise = _noise(session.shape)
        profiler = cast(runtimes.Profiler, runtime)
        kernels = profiler.profile(job.engine, job.options, noise, job.profile)
    else:
        return None
    return {"calls": job.profile, "kernels": [asdict(kernel) for kernel in kernels]}


def _runtime(request: Request) -> tuple[str, runtimes.Options]:
    name = request.choice("runtime", tuple(runtimes.MODULES))
    batch = request.integer("batch", 1, runtimes.MAX_BATCH)
    options = runtimes.Options(
        batch=batch,
        batches=_batches(request, batch),
        threads=request.integer("threads", 1, MAX_THREADS),
        sm=None if request.fields.get("sm") is None else request.integer("sm", 10, 999),
        tensorrt=read_options(request.fields.get("tensorrt")),
    )
    return name, options


def _batches(request: Request, best: int) -> runtimes.Batches | None:
    """Return the bounds of a dynamic engine's batch, which is built best for `batch`."""
    value = request.fields.get("batches")
    if not runtimes.is_batches(value) or (value is not None and value[1] != best):
        raise AgentError(
            "usage",
            f"request: batches is {value!r}; it must be null or [least, {best}, greatest], in "
            f"order, at most {runtimes.MAX_BATCH}",
        )
    return None if value is None else (value[0], value[1], value[2])


def _common(
    name: str, runtime: runtimes.Runtime | runtimes.Program, options: runtimes.Options
) -> dict[str, Any]:
    versions = {name: runtime.version()["version"], "numpy": _numpy()}
    return {
        "runtime": name,
        "versions": {key: version for key, version in versions.items() if version is not None},
        "batch": options.batch,
        "batches": options.batches,
        "threads": options.threads,
    }
