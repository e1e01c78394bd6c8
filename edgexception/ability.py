"""What this machine can do with a runtime of a target, and why not: build engines, run them."""

from __future__ import annotations

from typing import NamedTuple

from edgexception.device import ProbeRecord
from edgexception.targets import find_runtime, find_target


class Reader(NamedTuple):
    """What a graph is compared on."""

    runtime: str | None
    """None where nothing reads it."""
    not_run: str | None
    """Why it is not run here; None where it is."""


def is_out_of_reach(target: str, machine: ProbeRecord) -> bool:
    """Whether a target is another kind of machine, so that its engines need a kit or a device."""
    row, tensorrt = find_target(target), machine.runtimes.get("tensorrt")
    is_jetson = "Jetson" in (machine.board or "") or (tensorrt and tensorrt.version is not None)
    is_foreign = row.arch != machine.arch and not any(r.cross_built for r in row.runtimes.values())
    return is_foreign or (row.module is not None and not is_jetson)


def why_not_built(target: str, runtime: str, machine: ProbeRecord) -> str | None:
    """Return why a runtime cannot build for a target here; None where it can."""
    if find_target(target).arch != machine.arch and not find_runtime(target, runtime).cross_built:
        return _other_machine(target, machine)
    facts = machine.runtimes.get(runtime)
    return "this version has no adapter for it" if facts is None else facts.missing


def why_not_run(target: str, runtime: str, machine: ProbeRecord) -> str | None:
    """Return why engines of a target cannot run here; None where they can."""
    reason, sm = why_not_built(target, runtime, machine), find_target(target).sm
    if reason is None and find_target(target).arch != machine.arch:
        reason = _other_machine(target, machine)
    if reason or sm is None:
        return reason
    gpus = machine.runtimes[runtime].gpus
    if not gpus:
        return "no NVIDIA GPU here"
    if gpus[0].sm != sm:
        return f"the GPU here is {gpus[0].name} (SM{gpus[0].sm}), the target SM{sm}"
    return None


def why_not_measured(target: str, runtime: str, machine: ProbeRecord) -> str | None:
    """Return what a report says of an engine that is built here and not run; None where it is."""
    reason = why_not_run(target, runtime, machine)
    return reason and f"{reason}: built, not run on hardware"


def _other_machine(target: str, machine: ProbeRecord) -> str:
    return f"the target is {find_target(target).arch}, this machine {machine.arch}"
