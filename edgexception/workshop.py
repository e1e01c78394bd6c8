"""Where stages run: each is done once per content of its inputs, and its result is an artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgexception.artifacts import Artifact, Store, stage_key
from edgexception.device import Device, ProbeRecord, Progress
from edgexception.errors import NotPossibleHere
from edgexception.report.record import StageLine
from edgexception.stage_code import stage_code


@dataclass
class Workshop:
    """Where stages run: the store, the device with what it said of itself, and who listens."""

    store: Store
    device: Device
    machine: ProbeRecord
    tell: Callable[[StageLine], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
    power: Mapping[str, Any] | None = None
    """What a Jetson is changed to while it is timed: `mode` and `lock_clocks`; None is nothing."""
    done: list[StageLine] = field(default_factory=list)
    unfinished: Path = field(default_factory=Path)
    """Where the stage that is made just now keeps what a later run of it can go on from."""

    def once(
        self,
        stage: str,
        what: str,
        inputs: Mapping[str, Any],
        write: Callable[[Path], None],
    ) -> Artifact:
        """Return the stage's artifact for these inputs, and make it first if it is not there."""
        code = stage_code(write)
        key = stage_key(stage, inputs, code)
        start = time.monotonic()
        artifact = self.store.get(stage, key)
        reused = artifact is not None
        if artifact is None:
            self.progress(Progress(f"{stage} {what}", 0, 1, None))
            self.unfinished = self.store.unfinished(stage, key)
            artifact = self.store.publish(stage, key, inputs, code, write)
        seconds = round(time.monotonic() - start, 3)
        line = StageLine(stage=stage, what=what, key=key, reused=reused, seconds=seconds)
        self.done.append(line)
        self.tell(line)
        return artifact

    def identity(self, runtime: str) -> dict[str, Any]:
        """Return what a measurement or an engine of `runtime` on this device depends on."""
        return {
            "device": self.device.name,
            "arch": self.machine.arch,
            "system": self.machine.system,
            "python": self.machine.python,
            "numpy": self.machine.numpy,
            "board": self.machine.board,
            "power_mode": self.machine.power_mode,
            "cores": self.machine.cpu.usable_cores,
            "cpu": self.machine.cpu.model,
            "flags": list(self.machine.cpu.flags),
            "runtime": runtime,
            "version": self.machine.runtimes[runtime].version,
            "program": self.machine.runtimes[runtime].program,
            "gpus": [gpu.model_dump() for gpu in self.machine.runtimes[runtime].gpus],
        }


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, for a stage's key; NotPossibleHere without one."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:  # noqa: PERF203 - two or three packages
            raise NotPossibleHere(
                f"{name} is not installed, and this stage needs it: "
                "pip install 'edgexception[workstation]'"
            ) from error
    return found


def write_json(path: Path, value: object) -> None:
    """Write plain data as readable JSON."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
