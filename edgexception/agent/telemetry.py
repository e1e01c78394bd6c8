"""What the machine does while the agent measures: sampled between iterations, never within one.

No thread: on a small device a sampling thread would take time from the cores it observes. A sample
takes about 0.2 ms and is due at most every 250 ms.
"""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

from edgexception.agent.jetson import Tegrastats
from edgexception.agent.machine import read_text
from edgexception.agent.nvml import Nvml
from edgexception.agent.runtimes import cuda

INTERVAL_NS = 250_000_000

IDLE_S = 2.0
"""Of the baseline of the power: 8 samples, and 8 lines of tegrastats."""

_CPU = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
_DEVFREQ = Path("/sys/class/devfreq")
_GPUS = (".gpu", ".ga10b", "-gpc-0")
"""How the GPU is called there: by JetPack 6 and 7 on Orin, and on Thor."""
_HWMON = Path("/sys/class/hwmon")
_MHZ = re.compile(r"^cpu MHz\s*:\s*([0-9.]+)$", re.MULTILINE)


class Telemetry:
    """Samples of this machine, as plain data in `samples`, times in ns of the monotonic clock.

    `gpu` tells that an NVIDIA GPU runs the engine, so that the driver is asked for it, too.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        self.samples: list[dict[str, object]] = []
        self.phase = "open"
        """What the machine does now; every sample says it."""
        self._tegrastats = Tegrastats()
        self._nvml = Nvml(cuda.pci_bus_id() if gpu and not self._tegrastats.running else None)
        cpus = sorted(os.sched_getaffinity(0))[:64]
        frequencies = [_CPU / f"cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in cpus]
        self._frequencies = [path for path in frequencies if path.is_file()]
        self._zones = {
            f"{zone.name}:{read_text(zone / 'type').strip()}": zone / "temp"
            for zone in sorted(_THERMAL.glob("thermal_zone*"))[:32]
        }
        self._counters = _counters()
        self._gpus = [path for path in sorted(_DEVFREQ.glob("*")) if path.name.endswith(_GPUS)]

    def pause(self, now_ns: int) -> None:
        """Take a sample if one is due; called between two iterations."""
        last = self.samples[-1]["t_ns"] if self.samples else None
        if not isinstance(last, int) or now_ns - last >= INTERVAL_NS:
            self.sample()

    def sample(self) -> None:
        """Take a sample now."""
        self.samples.append(
            {
                "t_ns": time.monotonic_ns(),
                "phase": self.phase,
                "cpu_mhz": self._mhz(),
                "load_1min": os.getloadavg()[0],
                # Threads that wait in a spin use it whole: less than wall time x threads means
                # that others had the cores.
                "process_cpu_ns": time.process_time_ns(),
                "gpu_mhz": [hz / 1e6 for hz in self._devfreq("cur_freq") if hz is not None],
                "gpu_held": self._held(),
                "celsius": self._celsius(),
                "throttle": {
                    name: count
                    for name, path in self._counters.items()
                    if (count := _number(path)) is not None
                },
                "rss_bytes": memory_bytes("VmRSS"),
                "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
                "stolen_ticks": _stolen_ticks(),
                "tegrastats": self._tegrastats.read(),
                "nvml": self._nvml.read(),
            }
        )

    def rest(self) -> None:
        """Observe the machine while it does nothing, where its power is told; else return."""
        if not self._tegrastats.running and not self._nvml.running:
            return
        self.phase, end = "idle", time.monotonic() + IDLE_S
        while time.monotonic() < end:
            time.sleep(INTERVAL_NS / 1e9)
            self.sample()

    def close(self) -> None:
        """End what was started to observe."""
        self._tegrastats.close()
        self._nvml.close()

    def _devfreq(self, name: str) -> list[int | None]:
        return [_number(gpu / name) for gpu in self._gpus]

    def _held(self) -> bool | None:
        """Tell whether the GPU may have one clock alone, as jetson_clocks leaves it."""
        lowest, highest = self._devfreq("min_freq"), self._devfreq("max_freq")
        return lowest == highest if lowest and None not in lowest else None

    def _mhz(self) -> list[float]:
        """MHz per core this process may use; [] where the kernel does not say."""
        if self._frequencies:
            texts = [read_text(path) for path in self._frequencies]
            return [int(text) / 1000 for text in texts if text.strip().isdigit()]
        return [float(mhz) for mhz in _MHZ.findall(read_text(Path("/proc/cpuinfo")))]

    def _celsius(self) -> dict[str, float]:
        texts = {name: read_text(path).strip() for name, path in self._zones.items()}
        return {
            name: int(text) / 1000 for name, text in texts.items() if text.lstrip("-").isdigit()
        }


def memory_bytes(field: str) -> int | None:
    """Return VmRSS or VmHWM (the peak) of this process in bytes.

    Not getrusage's ru_maxrss: on Linux that starts at the size of the process which started this
    one, so a large host would be reported as the engine's memory.
    """
    found = re.search(rf"^{field}:\s*(\d+) kB$", read_text(Path("/proc/self/status")), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _counters() -> dict[str, Path]:
    """Return what counts or tells throttling, by name.

    x86: thermal_throttle of the kernel. Jetson: events of over-current (oc*_event_cnt; Jetson Linux
    Developer Guide, "Overcurrent and Undervoltage Throttling"). Everywhere: how active a cooling
    device is that is no fan.
    """
    found = {
        f"{path.parents[1].name} {path.name}": path
        for path in sorted(_CPU.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    }
    found |= {f"{path.parent.name} {path.name}": path for path in _HWMON.glob("*/oc*_event_cnt")}
    for device in sorted(_THERMAL.glob("cooling_device*")):
        kind = read_text(device / "type").strip()
        if "fan" not in kind.lower():
            found[f"{device.name} ({kind})"] = device / "cur_state"
    return dict(list(found.items())[:64])


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def _stolen_ticks() -> int | None:
    """Time other virtual machines took from this one, in ticks of all cores (field 8, proc(5))."""
    fields = read_text(Path("/proc/stat")).partition("\n")[0].split()
    return int(fields[8]) if len(fields) > 8 else None
