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

INTERVAL_NS = 250_000_000

_CPU = Path("/sys/devices/system/cpu")
_MHZ = re.compile(r"^cpu MHz\s*:\s*([0-9.]+)$", re.MULTILINE)


class Telemetry:
    """Samples of this machine, as plain data in `samples`, times in ns of the monotonic clock."""

    def __init__(self) -> None:
        self.samples: list[dict[str, object]] = []
        self._tegrastats = Tegrastats()
        cpus = sorted(os.sched_getaffinity(0))[:64]
        frequencies = [_CPU / f"cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in cpus]
        self._frequencies = [path for path in frequencies if path.is_file()]
        self._zones = {
            f"{zone.name}:{read_text(zone / 'type').strip()}": zone / "temp"
            for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*"))[:32]
        }

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
                "cpu_mhz": self._mhz(),
                "load_1min": os.getloadavg()[0],
                # Threads that wait in a spin use it whole: less than wall time x threads means
                # that others had the cores.
                "process_cpu_ns": time.process_time_ns(),
                "celsius": self._celsius(),
                "rss_bytes": memory_bytes("VmRSS"),
                "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
                "stolen_ticks": _stolen_ticks(),
                "tegrastats": self._tegrastats.read(),
            }
        )

    def close(self) -> None:
        """End what was started to observe."""
        self._tegrastats.close()

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


def _stolen_ticks() -> int | None:
    """Time other virtual machines took from this one, in ticks of all cores (field 8, proc(5))."""
    fields = read_text(Path("/proc/stat")).partition("\n")[0].split()
    return int(fields[8]) if len(fields) > 8 else None
