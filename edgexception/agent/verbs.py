"""The three verbs: what each takes from its request and puts into its answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgexception.agent import jetson, machine, manifest, power, runtimes, timing
from edgexception.agent.protocol import AgentError, Request, answer, progress, write_json
from edgexception.agent.telemetry import Telemetry, memory_bytes
from edgexception.agent.tensorrt_options import read_options

MAX_BATCH = 4096
MAX_THREADS = 1024
MAX_PROFILE = 1_000_000
PROBE_TIMEOUT_S = 120
"""For the first import of a runtime, whose libraries a device may read from an SD card."""
PROGRESS_NS = 1_000_000_000

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
    facts = {**machine.facts(), "power_mode": jetson.power_mode(), "numpy": np.__version__}
    answer(out, {**facts, "runtimes": found}, ())


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
    runtime = runtimes.load(name)
    engine = out / runtimes.ENGINE_FILES[name]
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
    manifest.write(out, model, options, record, runtime.version())
    progress(f"build {name}", 1, 1, 0.0)
    answer(out, record, (engine.name, manifest.FILE))


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
    manifest.check(described, engine, name, runtime.version())
    checked = time.monotonic()
    session = runtime.open(engine, options)
    opened = time.monotonic()
    images = None if path is None else open_images(path, session.shape)

    record = {
        **_common(name, runtime, options),
        "settings": session.settings,
        "import_s": imported - start,
        "open_s": opened - checked,
        "warmup_iterations": 0,
    }
    files = ["telemetry.json"]
    with power.held(wanted), runtimes.blaming(f"{name} failed while it ran {engine.name}"):
        record["power_mode"] = jetson.power_mode()
        telemetry = Telemetry(gpu=bool(runtime.version().get("gpus")))
        telemetry.sample()
        if times is not None:
            record["warmup_iterations"] = _time(session, images, times, telemetry, out)
            files.append("times_ns.npy")
        if images is not None:
            logits = classify(session, images, telemetry.pause)
            np.save(out / "logits.npy", logits, allow_pickle=False)
            files.append("logits.npy")
        telemetry.sample()
        telemetry.close()
    write_json(out / "telemetry.json", telemetry.samples)
    record["peak_rss_bytes"] = memory_bytes("VmHWM")
    record["profile"] = _profile(request, runtime, engine, options, session.shape)
    answer(out, record, tuple(files))


def open_images(path: Path, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Map an .npy file of uint8 images (N, height, width, 3), N >= 1; nothing is loaded yet."""
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError) as error:
        reason = runtimes.brief(error)
        raise AgentError(
            "bad-artifact", f"{path.name} is not a readable .npy file: {reason}"
        ) from error
    if not images.size:
        raise AgentError("bad-artifact", f"{path.name} holds no images: it is {images.shape}")
    wanted = shape[1:]
    if images.dtype != np.uint8 or images.shape[1:] != wanted or not images.flags.c_contiguous:
        raise AgentError(
            "bad-artifact",
            f"{path.name} holds {images.dtype} {images.shape}; the engine takes uint8 (N, "
            f"{', '.join(map(str, wanted))}) in C order",
        )
    return images


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
    np.save(out / "times_ns.npy", raw, allow_pickle=False)
    return warm


def _noise(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _profile(
    request: Request,
    runtime: runtimes.Runtime,
    engine: Path,
    options: runtimes.Options,
    shape: tuple[int, ...],
) -> dict[str, Any] | None:
    """Return the times of the kernels over `profile` calls; None unasked, or where not told."""
    if request.fields.get("profile") is None or not hasattr(runtime, "profile"):
        return None
    calls = request.integer("profile", 1, MAX_PROFILE)
    kernels = cast(runtimes.Profiler, runtime).profile(engine, options, _noise(shape), calls)
    return {"calls": calls, "kernels": [asdict(kernel) for kernel in kernels]}


class Ticker:
    """Progress at most once a second, with the time left by the pace so far.

    Where no count is given the total is in ms and the time that passed is what is done.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.start = self.last = time.monotonic_ns()

    def tick(self, now: int, done: int | None = None) -> None:
        """Report if it is time to."""
        if now - self.last < PROGRESS_NS:
            return
        self.last = now
        passed_s = (now - self.start) / 1e9
        if done is None:
            done = min(self.total, int(passed_s * 1000))
        left = passed_s / done * (self.total - done) if done else None
        progress(self.what, done, self.total, left)


def _runtime(request: Request) -> tuple[str, runtimes.Options]:
    name = request.choice("runtime", tuple(runtimes.MODULES))
    options = runtimes.Options(
        batch=request.integer("batch", 1, MAX_BATCH),
        threads=request.integer("threads", 1, MAX_THREADS),
        sm=None if request.fields.get("sm") is None else request.integer("sm", 10, 999),
        tensorrt=read_options(request.fields.get("tensorrt")),
    )
    return name, options


def _common(name: str, runtime: runtimes.Runtime, options: runtimes.Options) -> dict[str, Any]:
    return {
        "runtime": name,
        "versions": {name: runtime.version()["version"], "numpy": np.__version__},
        "batch": options.batch,
        "threads": options.threads,
    }
