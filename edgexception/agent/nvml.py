"""What an NVIDIA GPU says of itself while it works: clocks, power, temperature, what holds it back.

NVML is the library under nvidia-smi and comes with the driver; ctypes calls it, so there is no
package to install. Names, numbers and units are those of nvml.h, API version 13. A GPU of a Jetson
is not asked: tegrastats tells more of it. Not run on hardware: the tests call a library that is
compiled from the header's prototypes.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
"""nvmlClocksEventReasons: why a clock is not the highest."""

THROTTLES = frozenset(REASONS.values()) - {"idle", "application clocks", "display clocks"}
"""Those that are neither rest nor a user's setting."""

_TEMPERATURE_GPU = 0
_CLOCK_SM, _CLOCK_MEM = 1, 2
_EVENT_REASONS = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    # Its name until NVML 12; drivers of that time have this one alone.
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)


class Nvml:
    """The GPU at a PCI address, such as "0000:01:00.0"; nothing where NVML does not know it."""

    def __init__(self, pci_bus_id: str | None) -> None:
        self._library: Any = None
        self._device = ctypes.c_void_p()
        if pci_bus_id is None:
            return
        try:
            library = ctypes.CDLL(LIBRARY)
            if library.nvmlInit_v2() == 0:
                self._library = library
        except (OSError, AttributeError):
            return
        place = ctypes.c_char_p(pci_bus_id.encode())
        if not self._does("nvmlDeviceGetHandleByPciBusId_v2", place, ctypes.byref(self._device)):
            self.close()

    @property
    def running(self) -> bool:
        """Whether there is a GPU to ask."""
        return self._library is not None

    def read(self) -> dict[str, Any] | None:
        """Return what the GPU says now; a value that it does not tell is None."""
        if not self.running:
            return None
        told = (self._ask(name, ctypes.c_ulonglong()) for name in _EVENT_REASONS)
        reasons = next((bits for bits in told if bits is not None), 0)
        return {
            "gpu_mhz": self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), _CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), _CLOCK_MEM),
            "celsius": self._ask("nvmlDeviceGetTemperature", ctypes.c_uint(), _TEMPERATURE_GPU),
            "milliwatts": self._ask("nvmlDeviceGetPowerUsage", ctypes.c_uint()),
            "reasons": [name for bit, name in REASONS.items() if reasons & bit],
        }

    def close(self) -> None:
        """Let the library go."""
        if self.running:
            self._does("nvmlShutdown")
            self._library = None

    def _ask(self, name: str, value: Any, *arguments: int) -> int | None:
        """Return the number that a function puts into `value`; None where it tells none."""
        done = self._does(name, self._device, *arguments, ctypes.byref(value))
        return int(value.value) if done else None

    def _does(self, name: str, *arguments: Any) -> bool:
        try:
            return bool(getattr(self._library, name)(*arguments) == 0)
        except AttributeError:  # an older driver's library has not all functions
            return False
