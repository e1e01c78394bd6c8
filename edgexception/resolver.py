"""What a Jetson can do, answered before any work: from the table, or from what the device says.

What a probed device says wins over the table; `differences` names where the two disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgexception.agent.protocol import AgentError
from edgexception.agent.tensorrt_options import (
    BuildOptions,
    Gpu,
    build_command,
    check,
    parse_version,
)
from edgexception.device import ProbeRecord
from edgexception.device.answers import ERRORS
from edgexception.errors import UsageError
from edgexception.recipe import Recipe, TargetSpec
from edgexception.targets import (
    Fact,
    JetPack,
    Precision,
    find_runtime,
    find_target,
    load_aliases,
    load_dialects,
    load_jetpacks,
    load_targets,
)

# What an impossible combination is changed in to find the nearest possible one, least first.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"gpu_fallback": True},
    {"precision": "fp16"},
    {"precision": "fp16", "gpu_fallback": True},
    {"dla_core": 0},
    {"precision": "fp16", "gpu_fallback": True, "dla_core": 0},
    {"hardware_compatibility": "none"},
    {"dla_core": None, "gpu_fallback": False},
    {"dla_core": None, "gpu_fallback": False, "hardware_compatibility": "none"},
)


@dataclass(frozen=True)
class Resolution:
    """What is built on a target, and how."""

    target: str
    tensorrt: str
    """The version."""
    jetpack: str | None
    """The release of the table that brings it or takes it; None where none does."""
    dialect: str
    opset: int | None
    """The highest ONNX opset that is known to be parsed; None is not known."""
    dla: tuple[str, ...]
    """What the Deep Learning Accelerator could compute in; empty where it is not to be had."""
    trtexec: tuple[str, ...]
    """How trtexec builds `model.onnx`."""


def settle(recipe: Recipe, machine: ProbeRecord) -> tuple[Recipe, list[str]]:
    """Return the recipe with every alias replaced by its target, and what is to be said of that.

    Raises NotPossibleHere or UsageError for what TensorRT cannot build on a Jetson: with the
    version of the device, or where none was probed with any that the table has for the module.
    """
    specs, said = [], []
    for spec in recipe.targets:
        name, why = name_jetson(spec.target, machine)
        said += [why] if why else []
        specs.append(spec.model_copy(update={"target": name}))
        if find_target(name).module is None:
            continue
        facts, version = machine.runtimes.get("tensorrt"), _version_there(name, machine)
        said += differences(name, machine)
        if facts and facts.program and version:
            said.append(
                f"target {name}: TensorRT {version} through {facts.program}, since its Python "
                "package cannot be used there: the times are trtexec's own"
            )
        for precision in spec.precisions:
            options = _options(spec, precision)
            if version is None:
                resolve_somewhere(name, options)
            else:
                resolve(name, options, version)
    return recipe.model_copy(update={"targets": tuple(specs)}), said


def _options(spec: TargetSpec, precision: Precision) -> BuildOptions:
    told = {} if spec.tensorrt is None else spec.tensorrt.model_dump(exclude={"workspace_mib"})
    return BuildOptions(precision=precision, **told)


def resolve(target: str, options: BuildOptions, version: str) -> Resolution:
    """Return what a version of TensorRT builds on a target.

    Raises NotPossibleHere or UsageError for what cannot be, naming the nearest that can.
    """
    try:
        _check(target, options, version)
    except AgentError as error:
        nearest = _nearest(target, options, version)
        remedy = f"; nearest possible: {nearest}" if nearest else ""
        raise ERRORS[error.kind](f"target {target}: {error}{remedy}") from error
    number = parse_version(version)
    dialect = find_runtime(target, "tensorrt").dialect
    release = next((r.jetpack for r in releases_of(target) if _brings(r, version)), None)
    return Resolution(
        target=target,
        tensorrt=version,
        jetpack=release,
        dialect=dialect,
        opset=_opset(load_dialects()[dialect].opset_max, number),
        dla=_dla_precisions(target, version),
        trtexec=tuple(build_command(options, number, Path("model.onnx"), Path("engine.plan"))),
    )


def resolve_somewhere(target: str, options: BuildOptions) -> list[Resolution]:
    """Return what each version that a target's software may bring builds, newest first.

    Raises what the newest does where none can.
    """
    versions = list(dict.fromkeys(r.tensorrt for r in reversed(releases_of(target))))
    able = [v for v in versions if _fits(target, options, v)]
    return [resolve(target, options, version) for version in able or versions[:1]]


def version_for(target: str, options: BuildOptions, machine: ProbeRecord) -> str:
    """Return the version that builds for a target: the device's, else the newest that can."""
    return _version_there(target, machine) or resolve_somewhere(target, options)[0].tensorrt


def _version_there(target: str, machine: ProbeRecord) -> str | None:
    facts = machine.runtimes.get("tensorrt")
    return facts.version if facts and machine.arch == find_target(target).arch else None


def releases_of(target: str) -> tuple[JetPack, ...]:
    """Return the releases of JetPack for a target's module, oldest first."""
    module = find_target(target).module
    return tuple(r for r in load_jetpacks() if module is not None and module.family in r.families)


def find_module(machine: ProbeRecord) -> str | None:
    """Return the target that a probed device is; None where it is no Jetson known here.

    The system keeps some memory to itself: 8 GB are told as 7.4 GiB.
    """
    board, memory = machine.board or "", machine.memory.total_bytes
    found = [
        (target.integer("memory") or 0, name)
        for name, target in load_targets().items()
        if (module := target.module) is not None
        and module.board in board
        and module.super == ("Super" in board)
        and (memory is None or memory <= (target.integer("memory") or 0) << 30)
    ]
    return min(found)[1] if found else None


def name_jetson(target: str, machine: ProbeRecord) -> tuple[str, str | None]:
    """Return the target that an alias stands for with this device, and what is to be said of it."""
    if target not in load_aliases():
        return target, None
    found = find_module(machine)
    if found is not None:
        return found, f"target {target} is {found}: the device is {machine.board}"
    if "Jetson" in (machine.board or ""):
        raise UsageError(
            f"target {target}: the device is {machine.board}, and its module is not known here; "
            "name the target (`edgex targets` lists them)"
        )
    assumed = load_aliases()[target]
    return assumed, f"target {target} is taken to be {assumed}: no Jetson is here, none is named"


def differences(target: str, machine: ProbeRecord) -> list[str]:
    """Return where a probed device is not what the table says of the target."""
    row, found = find_target(target), find_module(machine)
    tensorrt = machine.runtimes.get("tensorrt")
    if row.module is None or tensorrt is None or tensorrt.version is None:
        return []
    said = []
    if found != target:
        known = f" ({found})" if found else ", which is not known here"
        said.append(f"the device is {machine.board or 'no Jetson by its model'}{known}")
    mode = machine.power_mode
    if mode is not None and mode not in row.power_modes:
        said.append(f"power mode {mode} is not one of {', '.join(row.power_modes)}")
    said += [
        f"its GPU is SM{gpu.sm}, not SM{row.sm}" for gpu in tensorrt.gpus[:1] if gpu.sm != row.sm
    ]
    if not any(_brings(release, tensorrt.version) for release in releases_of(target)):
        known = ", ".join(f"{r.tensorrt} ({r.jetpack})" for r in releases_of(target))
        said.append(f"it has TensorRT {tensorrt.version}; JetPack brings {known}")
    return [f"target {target}: {text}; what the device says counts" for text in said]


def fact_lines(target: str) -> Iterator[str]:
    """Say what is known of a target, fact by fact; what is not known is said, too."""
    row = find_target(target)
    for name, fact in row.facts.items():
        yield f"{name} {_told(fact)}"
    for name, mode in row.power_modes.items():
        peaks = ((kind, row.dense_tops(mode, kind)) for kind in ("int8", "fp16"))
        told = ", ".join(
            f"{kind.upper()} {'unknown' if peak is None else f'{peak:.1f}'}" for kind, peak in peaks
        )
        yield f"power mode {name}: dense TOPS {told} ({mode.source})"
    for release in releases_of(target):
        how = "" if release.shipped else " can take"
        yield (
            f"JetPack {release.jetpack}{how}: TensorRT {release.tensorrt}, L4T "
            f"{release.l4t or 'unknown'}, CUDA {release.cuda or 'unknown'}, Python "
            f"{release.python}{_reads(target, release.tensorrt)} ({release.source})"
        )


def _told(fact: Fact) -> str:
    if fact.value is None:
        return "unknown"
    return f"{fact.value}{f' {fact.unit}' if fact.unit else ''} ({fact.source})"


def _check(target: str, options: BuildOptions, version: str) -> None:
    """Raise the AgentError of the first thing that cannot be."""
    row = find_target(target)
    cores = row.integer("dla_cores")
    if options.dla_core is not None and cores is not None and options.dla_core >= cores:
        raise AgentError(
            "not-possible-here",
            f"there is no DLA core {options.dla_core}: the module has {cores or 'none'} "
            f"({row.facts['dla_cores'].source})",
        )
    check(options, parse_version(version), Gpu(row.sm, row.description))


def _fits(target: str, options: BuildOptions, version: str) -> bool:
    try:
        _check(target, options, version)
    except AgentError:
        return False
    return True


def _dla_precisions(target: str, version: str) -> tuple[str, ...]:
    kinds: tuple[Precision, ...] = ("fp16", "int8")
    on_dla = {kind: BuildOptions(kind, dla_core=0, gpu_fallback=True) for kind in kinds}
    return tuple(kind for kind, options in on_dla.items() if _fits(target, options, version))


def _reads(target: str, version: str) -> str:
    """Say which graphs a version reads, and what a DLA computes in; nothing of one not known."""
    if not _fits(target, BuildOptions("fp16"), version):
        return ""
    found = resolve(target, BuildOptions("fp16"), version)
    line = f", {found.dialect} graphs to ONNX opset {found.opset or 'unknown'}"
    has_dla = find_target(target).integer("dla_cores")
    return f"{line}, DLA {' and '.join(found.dla) or 'none'}" if has_dla else line


def _nearest(target: str, options: BuildOptions, version: str) -> str | None:
    """Return in words the possible combination with the fewest changes."""
    others = dict.fromkeys(r.tensorrt for r in releases_of(target))
    for change in _CHANGES:
        for other in dict.fromkeys((version, *others)):
            if _fits(target, replace(options, **change), other):
                parts = [f"{name} {_word(value)}" for name, value in change.items()]
                parts += [f"TensorRT {other}"] if other != version else []
                return ", ".join(parts)
    return None


def _word(value: object) -> str:
    return "left out" if value is None else str(value).lower()


def _brings(release: JetPack, version: str) -> bool:
    """Whether a release has this version, compared in its first two numbers."""
    return release.tensorrt.split(".")[:2] == version.split(".")[:2]


def _opset(known: dict[str, Fact], version: tuple[int, ...]) -> int | None:
    """Return the opset of the newest known version that is not newer than this one."""
    numbers = {
        tuple(map(int, name.split("."))): fact
        for name, fact in known.items()
        if name.replace(".", "").isdigit()
    }
    older = [number for number in numbers if number <= version]
    value = numbers[max(older)].value if older else None
    return None if value is None else int(value)
