"""The few calls of NVIDIA's driver that an adapter needs, through ctypes: no package to install.

The driver's library is where a GPU is and nowhere else, so a machine without it has no GPU.
Calls and constants: CUDA Driver API reference (docs.nvidia.com/cuda/cuda-driver-api), cuda.h.
Not run on hardware.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgexception.agent.protocol import AgentError

if TYPE_CHECKING:  # the facts of a GPU are asked for where no numpy is
    import numpy as np
    from numpy.typing import NDArray

LIBRARY = "libcuda.so.1"
RELEASE = Path("/proc/driver/nvidia/version")
"""What the kernel's module says of itself (NVIDIA driver README, "The /proc interface")."""
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class _Absent(Exception):
    """There is no driver, or no GPU that it serves."""


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability times 10, memory and driver of every GPU; [] without one.

    `driver` is the highest CUDA version that the driver serves, such as "13.0"; `driver_release` is
    its own version, such as "580.65.06", None where the kernel does not tell.
    """
    try:
        library = _start()
    except _Absent:
        return []
    version, count = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    own = {"driver": driver, "driver_release": _release()}
    return [{**_describe(library, number), **own} for number in range(count.value)]


def first_gpu() -> dict[str, Any]:
    """Return the GPU that engines run on, the driver's first; not-possible-here without one."""
    found = gpus()
    if not found:
        raise AgentError("not-possible-here", "no NVIDIA GPU here")
    return found[0]


def own_gpu(sm: int | None, builder: str) -> dict[str, Any]:
    """Return the first GPU, for builders of engines for the GPU that they run on, and no other."""
    gpu = first_gpu()
    if sm not in (None, gpu["sm"]):
        raise AgentError(
            "not-possible-here",
            f"{builder} builds for the GPU it runs on, {gpu['name']} (SM{gpu['sm']}); for "
            f"SM{sm} build on such a device",
        )
    return gpu


def pci_bus_id() -> str | None:
    """Return the PCI address of the driver's first GPU, "0000:01:00.0"; None where none is told.

    NVML has an order of its own, so a GPU is known to both by its address alone.
    """
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    try:
        library = _start()
        _call(library, "cuDeviceGet", ctypes.byref(device), 0)
        _call(library, "cuDeviceGetPCIBusId", text, len(text), device)
    except (_Absent, AgentError, AttributeError):  # to observe a GPU is no need
        return None
    return text.value.decode("ascii", "replace")


class Memory:
    """Two buffers on the first GPU and a stream to copy and compute in."""

    def __init__(self, input_bytes: int, output_bytes: int) -> None:
        self._library = _start()
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        # The primary context: the one that the runtime's own CUDA calls use.
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)
        stream = ctypes.c_void_p()
        self._do("cuStreamCreate", ctypes.byref(stream), 0)
        self._stream = stream
        self.input, self.output = self._allocate(input_bytes), self._allocate(output_bytes)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return self._stream.value or 0

    def upload(self, array: NDArray[Any]) -> None:
        """Copy an array in C order into the input buffer; it must live until `download`."""
        source = ctypes.c_void_p(array.ctypes.data)
        place = ctypes.c_uint64(self.input)
        size = ctypes.c_size_t(array.nbytes)
        self._do("cuMemcpyHtoDAsync_v2", place, source, size, self._stream)

    def download(self, array: NDArray[np.float32]) -> None:
        """Copy the output buffer into an array, and return when all that was asked is done."""
        target = ctypes.c_void_p(array.ctypes.data)
        place = ctypes.c_uint64(self.output)
        self._do("cuMemcpyDtoHAsync_v2", target, place, ctypes.c_size_t(array.nbytes), self._stream)
        self._do("cuStreamSynchronize", self._stream)

    def _allocate(self, size: int) -> int:
        place = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(size))
        return place.value

    def _do(self, name: str, *arguments: Any) -> None:
        _call(self._library, name, *arguments)


def _start() -> Any:
    """Return the started driver's library; raises _Absent without driver or GPU."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise _Absent from error
    if library.cuInit(0):
        raise _Absent
    return library


def _release() -> str | None:
    try:
        text = RELEASE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found and found.group()


def _describe(library: Any, number: int) -> dict[str, Any]:
    device, value = ctypes.c_int(), ctypes.c_int()
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(library, "cuDeviceGet", ctypes.byref(device), number)
    _call(library, "cuDeviceGetName", name, len(name), device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(size), device)
    sm = 0
    for attribute in (_MAJOR, _MINOR):
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        sm = sm * 10 + value.value
    return {
        "name": name.value.decode("utf-8", "replace"),
        "sm": sm,
        "memory_bytes": size.value,
    }


def _call(library: Any, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(text))
        said = (text.value or b"").decode("ascii", "replace") or f"error {code}"
        kind = "out-of-resources" if said == "CUDA_ERROR_OUT_OF_MEMORY" else "measurement-invalid"
        raise AgentError(kind, f"the NVIDIA driver's {name} failed: {said}")
