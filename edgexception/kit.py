"""Build kits: for a device that is not reachable from here, all that it needs in one folder.

    kit.json        what is built and measured, and the sha256 of every file below
    models/*.onnx   the typed networks
    images.npy      the evaluation images as uint8, where the recipe has some
    agent.pyz       the agent that SSH devices get, too
    run.sh          the one command
    commands/       trtexec, version by version, for who builds by hand
    README.md  SHA256SUMS

On the device `agent/kit.py` writes `results/`; `device/recorded.py` reads it here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgexception import __version__
from edgexception.agent.kit import FORMAT, KIT
from edgexception.agent.onnx_file import OPEN, ends
from edgexception.agent.runtimes import ENGINE_FILES
from edgexception.agent.tensorrt_options import (
    ONE_INFERENCE,
    BuildOptions,
    build_command,
    measure_command,
    parse_version,
    read_options,
)
from edgexception.artifacts import Artifact, FileRecord
from edgexception.bench.protocol import measure_latency, run_images
from edgexception.device.archive import agent_archive
from edgexception.engine_stages import ask_build, engine_at
from edgexception.errors import EdgexError, UsageError
from edgexception.recipe import BenchSpec
from edgexception.report.assemble import Place
from edgexception.resolver import resolve
from edgexception.targets import Form, find_target

COMMAND_VERSIONS = ("10.3.0", "10.7.0", "10.16.2", "11.4.1")
"""The versions of TensorRT that command lines are written for: those a Jetson may have."""

RUN = """\
#!/bin/sh
# Builds and measures the networks of this folder on this device: see README.md.
# Nothing is installed, and nothing is written outside this folder.
set -eu
cd "$(dirname "$0")"
sha256sum --check --quiet SHA256SUMS
exec python3 agent.pyz run-kit .
"""


@dataclass(frozen=True)
class Kit:
    """A kit before it is written."""

    target: str
    content: bytes
    """`kit.json`."""
    files: Mapping[str, Path]
    """What it names, but for the agent."""
    commands: Mapping[str, str]
    notes: Sequence[str] = ()
    """What its page says of its engines."""

    @property
    def digest(self) -> str:
        """What its results name it by."""
        return hashlib.sha256(self.content).hexdigest()


def plan_kit(
    name: str,
    places: Sequence[Place],
    exports: Mapping[Form, Artifact],
    images: Artifact | None,
    bench: BenchSpec | None,
    size: tuple[int, int],
    notes: Sequence[str] = (),
) -> Kit:
    """Return the kit that builds and measures engines on a device; `size` is the network's input.

    Raises UsageError where they are for several targets.
    """
    targets = {place.target for place in places}
    if len(targets) != 1:
        raise UsageError(
            f"a kit is for one device, and these targets are out of reach: "
            f"{', '.join(sorted(targets))}; choose one with --target"
        )
    target = places[0].target
    models = {place.form.name: exports[place.form] for place in places}
    files = {f"models/{form}.onnx": found.file("model.onnx") for form, found in models.items()}
    known = {f"models/{form}.onnx": found.files["model.onnx"] for form, found in models.items()}
    if images is not None:
        files["images.npy"] = images.file("images.npy")
        known["images.npy"] = images.files["images.npy"]
    fixed = {form for form, found in models.items() if _has_fixed_batch(found)}
    content = {
        "format": FORMAT,
        "edgexception": __version__,
        "name": name,
        "target": target,
        "files": {**_digests(known), "agent.pyz": hashlib.sha256(agent_archive()).hexdigest()},
        "calls": _calls(places, files, bench),
    }
    return Kit(
        target,
        (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(),
        files,
        {
            f"commands/tensorrt-{version}.sh": commands(places, version, size, bench, fixed)
            for version in COMMAND_VERSIONS
            if any(place.runtime == "tensorrt" for place in places)
        },
        notes,
    )


class _Planner:
    """A device that notes what it is asked: so a kit holds the requests that a host makes."""

    name = "kit"

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.known = {path: name for name, path in files.items()}
        """The files of the kit, by where they are now."""
        self.calls: list[dict[str, Any]] = []
        self.label = "probe"

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        files: Mapping[str, Path],
        out: Path,
        progress: object = None,
    ) -> dict[str, Any]:
        """Note the call; answer what has the form of an answer."""
        there = {name: self.known[path] for name, path in files.items() if path in self.known}
        made = {name: str(path) for name, path in files.items() if path not in self.known}
        call = {"label": self.label, "verb": verb, "request": dict(request)}
        self.calls.append({**call, "files": there, "made": made})
        out.mkdir(parents=True, exist_ok=True)
        timing = request.get("timing")
        if timing is not None:
            np.save(out / "times_ns.npy", np.ones(timing["min_iterations"], np.int64))
        if "images.npy" in files:
            count = len(np.load(files["images.npy"], mmap_mode="r", allow_pickle=False))
            np.save(out / "logits.npy", np.zeros((count, 1), np.float32))
        return {}


def _calls(
    places: Sequence[Place], files: Mapping[str, Path], bench: BenchSpec | None
) -> list[dict[str, Any]]:
    """Return every call, in the order in which a host makes them: see `agent/kit.py`."""
    planner = _Planner(files)
    engines = []
    with tempfile.TemporaryDirectory(prefix="edgex-kit-") as work:
        folder = Path(work)
        planner.call("probe", {}, {}, folder)
        made: dict[str, Path] = {}
        for place in places:
            if (key := place.engine_key) not in made:
                planner.label = f"build {key}"
                made[key] = Path(f"{len(planner.calls):03d}-build", ENGINE_FILES[place.runtime])
                ask_build(place, files[f"models/{place.form.name}.onnx"], planner, folder)
            engines.append(engine_at(place, made[key]))
        if "images.npy" in files:
            for engine in engines:
                planner.label = f"images {engine.key}"
                run_images(engine, files["images.npy"], planner, folder)
        if bench is not None:
            keys = {(str(engine.path), engine.batch): engine.key for engine in engines}
            first = len(planner.calls)
            measure_latency(engines, bench, planner, folder)
            for call in planner.calls[first:]:
                batch = call["request"]["batch"]
                (key,) = (keys[p, batch] for p in call["made"].values() if (p, batch) in keys)
                call["label"] = f"timing {key}"
    return planner.calls


def _digests(known: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: record.sha256 for name, record in known.items()}


# --- trtexec --------------------------------------------------------------------------------------


def _has_fixed_batch(exported: Artifact) -> bool:
    inputs, _ = ends(exported.file("model.onnx"))
    return all(shape[:1] != (OPEN,) for _, _, shape in inputs)


def commands(
    places: Sequence[Place],
    version: str,
    size: tuple[int, int],
    bench: BenchSpec | None,
    fixed: Collection[str] = (),
) -> str:
    """Return the lines that build and measure with trtexec of a version; what it cannot is said.

    `fixed` names the forms whose graphs have a batch of their own: trtexec takes none for them.
    """
    lines = [
        f"# trtexec of TensorRT {version}, in the kit's folder. CUDA graph and spin-wait are off,",
        "# copies between host and device are in the times, one inference follows the other.",
        "# `edgex` does not read these results.",
    ]
    built: set[str] = set()
    for place in places:
        if place.runtime != "tensorrt":
            continue
        try:
            both = _lines(place, version, size, bench or BenchSpec(), place.form.name in fixed)
            lines += ["", f"# {place.key}", *both[place.engine_key in built :]]
            built.add(place.engine_key)
        except EdgexError as error:
            lines.append(f"# not possible: {error}")
    return "\n".join(lines) + "\n"


def _lines(
    place: Place, version: str, size: tuple[int, int], bench: BenchSpec, fixed: bool
) -> list[str]:
    options = read_options(place.tensorrt_options) or BuildOptions(place.precision)
    resolve(place.target, options, version)
    if not fixed:
        least, best, greatest = ((n, *size, 3) for n in place.batches or (place.batch,) * 3)
        options = replace(options, shapes=(least, best, greatest))
    number, plan = parse_version(version), Path(f"{place.engine_key}.plan")
    shape = None if fixed else (place.batch, *size, 3)
    measure = replace(
        ONE_INFERENCE,
        warmup_ms=bench.warmup_ms,
        duration_ms=bench.duration_ms,
        min_iterations=bench.min_iterations,
    )
    model, layers = Path(f"models/{place.form.name}.onnx"), Path(f"{place.engine_key}.layers.json")
    times = Path(f"{place.key}.times.json")
    # What a build timed is for one version and one device: a kit's folder lies on one.
    cache = Path(f"tensorrt-{version}.cache")
    both = (
        build_command(options, number, model, plan, cache, layers),
        measure_command(measure, number, plan, times, options.dla_core, shape=shape),
    )
    return [" ".join(("trtexec", *arguments)) for arguments in both]


# --- the folder -----------------------------------------------------------------------------------


def kit_folder(out: Path, name: str, target: str) -> Path:
    """Return where a kit is written."""
    return out / f"{name}-{target}-kit"


def write_kit(kit: Kit, folder: Path, work: Path) -> None:
    """Write a kit in one step, over an older one; one with the same content is left as it is.

    `work` is a folder to write in, on the same disk. Raises UsageError where something else is in
    the way, or an older kit with results in it.
    """
    if folder.is_dir() and not folder.is_symlink() and (folder / KIT).is_file():
        if (folder / KIT).read_bytes() == kit.content:
            return
        if (folder / "results").exists():
            raise UsageError(
                f"{folder}: has results of another kit in it; import them or move them away"
            )
        folder.rename(work / "old")
    elif folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: is there already and is no kit; move it away")
    new = work / "new"
    texts = {
        KIT: kit.content,
        "agent.pyz": agent_archive(),
        "run.sh": RUN.encode(),
        "README.md": readme(kit).encode(),
        **{name: text.encode() for name, text in kit.commands.items()},
    }
    for name, source in kit.files.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, new / name)
    for name, data in texts.items():
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_bytes(data)
    (new / "run.sh").chmod(0o755)
    sums = {**json.loads(kit.content)["files"]}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
    (new / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    new.rename(folder)


def readme(kit: Kit) -> str:
    """Return the kit's page: what it is, what it needs, what it does, and the way back."""
    content = json.loads(kit.content)
    target, calls = find_target(kit.target), content["calls"]
    builds = [call for call in calls if call["verb"] == "build"]
    timed = [call["request"]["timing"] for call in calls if call["request"].get("timing")]
    engines = {call["label"] for call in calls if call["request"].get("timing")}
    measured = ["the logits of `images.npy`"] if "images.npy" in content["files"] else []
    if timed:
        measured.append(
            f"{len(timed) // len(engines)} rounds of latency ({timed[0]['warmup_ms']} ms warm-up, "
            f"{timed[0]['duration_ms']} ms each)"
        )
    page = resources.files("edgexception").joinpath("kit_readme.md").read_text(encoding="utf-8")
    return page.format(
        description=target.description,
        version=__version__,
        name=content["name"],
        arch=target.arch,
        runtimes=" and ".join(sorted({call["request"]["runtime"] for call in builds})),
        engines="\n".join(
            f"- `{call['label'].removeprefix('build ')}` from `{call['files']['model.onnx']}`"
            for call in builds
        ),
        notes="".join(f"\n- {note}" for note in kit.notes),
        measured=" and ".join(measured),
        by_hand=_BY_HAND.format(", ".join(COMMAND_VERSIONS)) if kit.commands else "",
    )


_BY_HAND = """
## By hand

`commands/` has the `trtexec` lines for TensorRT {}, as they differ by
version: run those of yours in this folder. `edgex` does not read what they write.
"""
