"""What a Jetson says of itself while it works: `tegrastats` lines and the power mode.

The fields are described in NVIDIA's Jetson Linux Developer Guide (tegrastats utility, reported
statistics); which of them a line has differs with module and release, so all are optional. Two
forms of values are met: JetPack 6 prints `cpu@52.5C` and `VDD_IN 4556mW/4556mW` (now and mean),
JetPack 7.2 `cpu@52.5C/53.1C` and `VDD_GPU 4925mW/4925mW/4925mW` (and the highest, by all that was
recorded). The first value is the one that is read. Never run on a Jetson by us: the tests have
lines that others recorded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

INTERVAL_MS = 250
MAX_PENDING_BYTES = 1 << 16
NO_SENSOR_CELSIUS = -256.0
"""What tegrastats prints for a part that is powered off."""

_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
_CORES = re.compile(r"\bCPU \[([^\]]{1,4000})\]")
_CORE = re.compile(r"(\d{1,3})%@(\d{1,6})")
_LOAD = r"(?:(\d{1,3})%)?(?:@\[?(\d{1,6}(?:,\d{1,6}){0,15})\]?)?(?= |$)"
_GPU = re.compile(rf"\bGR3D_FREQ {_LOAD}")
_MEMORY = re.compile(rf"\bEMC_FREQ {_LOAD}")
_CELSIUS = re.compile(r"(?:^| )([A-Za-z][\w-]{0,31})@(-?\d{1,4}(?:\.\d{1,6})?)C(?=[ /]|$)")
_RAIL = re.compile(r"(?:^| )([A-Z][A-Z0-9_]{1,31}) (-?\d{1,7})mW(?=[ /]|$)")
_POWER_MODE = re.compile(r"^NV Power Mode: (\S{1,64})\s*$", re.MULTILINE)


def parse_tegrastats(line: str) -> dict[str, Any] | None:
    """Return what one line of tegrastats says; None when it is none.

    Loads are percent, clocks MHz, one for each GPC of a GPU; a core that is off is None.
    """
    ram, cores = _RAM.search(line), _CORES.search(line)
    if ram is None or cores is None:
        return None
    found = (_CORE.fullmatch(core.strip()) for core in cores[1].split(","))
    gpu, memory = (_load(pattern.search(line)) for pattern in (_GPU, _MEMORY))
    celsius = {name: float(value) for name, value in _CELSIUS.findall(line)}
    return {
        "ram_mb": int(ram[1]),
        "ram_total_mb": int(ram[2]),
        "cores": [None if core is None else [int(core[1]), int(core[2])] for core in found],
        "gpu_percent": gpu[0],
        "gpu_mhz": gpu[1],
        "memory_percent": memory[0],
        "memory_mhz": memory[1],
        "celsius": {name: value for name, value in celsius.items() if value > NO_SENSOR_CELSIUS},
        "milliwatts": {name: int(value) for name, value in _RAIL.findall(line)},
    }


def _load(found: re.Match[str] | None) -> tuple[int | None, list[int]]:
    if found is None:
        return None, []
    percent = None if found[1] is None else int(found[1])
    return percent, [int(clock) for clock in found[2].split(",")] if found[2] else []


class Tegrastats:
    """A running tegrastats; nothing where there is none."""

    def __init__(self) -> None:
        path = shutil.which("tegrastats")
        self._pending = b""
        self._process = None if path is None else _start(path)

    @property
    def running(self) -> bool:
        """Whether there is one, and it has not ended."""
        return self._process is not None and self._process.poll() is None

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that came since the last call, without waiting for any."""
        if self._process is None or self._process.stdout is None:
            return []
        try:
            chunk = os.read(self._process.stdout.fileno(), MAX_PENDING_BYTES)
        except OSError:  # BlockingIOError: nothing came
            chunk = b""
        *lines, rest = (self._pending + chunk).split(b"\n")
        self._pending = rest[-MAX_PENDING_BYTES:]
        parsed = (parse_tegrastats(line.decode("utf-8", "replace")) for line in lines)
        return [sample for sample in parsed if sample is not None]

    def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.stdout is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


def _start(path: str) -> subprocess.Popen[bytes] | None:
    try:
        process = subprocess.Popen(  # noqa: S603 - the device's own tool, fixed arguments
            [path, "--interval", str(INTERVAL_MS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    assert process.stdout is not None  # noqa: S101 - told to the type checker; it was given PIPE
    os.set_blocking(process.stdout.fileno(), False)
    return process


def power_mode() -> str | None:
    """Return the power mode by its name, such as "MAXN_SUPER" or "15W"; None where none is told."""
    path = shutil.which("nvpmodel")
    if path is None:
        return None
    try:
        said = subprocess.run(  # noqa: S603 - the device's own tool, fixed arguments
            [path, "-q"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_power_mode(said.decode("utf-8", "replace"))


def parse_power_mode(text: str) -> str | None:
    """Return the power mode in what `nvpmodel -q` prints; None when it is not told."""
    found = _POWER_MODE.search(text)
    return None if found is None else found[1]
