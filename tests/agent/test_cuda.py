"""The driver's calls, against a fake of it: no test machine has the real one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import cuda


class FakeDriver:
    """Stands for libcuda.so.1 with GPUs of these capabilities; device memory is host memory."""

    def __init__(self, *capabilities: tuple[int, int], fails: str = "", code: int = 2) -> None:
        self.capabilities = capabilities
        self.fails, self.code = fails, code
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return self.code
            answer = getattr(type(self), f"_{name}", None)
            return 0 if answer is None else int(answer(self, *arguments) or 0)

        return call

    def _cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's names
        return 0 if self.capabilities else 100  # CUDA_ERROR_NO_DEVICE

    def _cuDriverGetVersion(self, version: Any) -> None:  # noqa: N802
        version._obj.value = 13_020

    def _cuDeviceGetCount(self, count: Any) -> None:  # noqa: N802
        count._obj.value = len(self.capabilities)

    def _cuDeviceGet(self, device: Any, number: int) -> None:  # noqa: N802
        device._obj.value = number

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:  # noqa: N802
        name.value = f"NVIDIA Fake {device.value}".encode()

    def _cuDeviceTotalMem_v2(self, size: Any, device: Any) -> None:  # noqa: N802
        size._obj.value = 24 << 30

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:  # noqa: N802
        value._obj.value = self.capabilities[device.value][attribute - 75]

    def _cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> None:  # noqa: N802
        text.value = f"0000:0{device.value + 1}:00.0".encode()

    def _cuMemAlloc_v2(self, place: Any, size: Any) -> None:  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        place._obj.value = ctypes.addressof(buffer)
        self.memory[place._obj.value] = buffer

    def _cuMemcpyHtoDAsync_v2(self, place: Any, source: Any, size: Any, _: Any) -> None:  # noqa: N802
        ctypes.memmove(place.value, source.value, size.value)

    def _cuMemcpyDtoHAsync_v2(self, target: Any, place: Any, size: Any, _: Any) -> None:  # noqa: N802
        ctypes.memmove(target.value, place.value, size.value)

    def _cuGetErrorName(self, code: int, text: Any) -> None:  # noqa: N802
        names = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}
        text._obj.value = names.get(code)


def use(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "RELEASE", tmp_path / "version")
    use(monkeypatch, FakeDriver((8, 9), (12, 0)))
    first, second = cuda.gpus()
    assert first == {
        "name": "NVIDIA Fake 0", "sm": 89, "memory_bytes": 24 << 30, "driver": "13.2",
        "driver_release": None,
    }  # fmt: skip
    assert (second["name"], second["sm"]) == ("NVIDIA Fake 1", 120)
    assert cuda.first_gpu() == first


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC 13.3.0",
         "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release", "540.4.0"),
        ("GCC version:  gcc 13.3.0", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_release_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, release: str | None
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(cuda, "RELEASE", tmp_path / "version")
    use(monkeypatch, FakeDriver((8, 9)))
    assert cuda.first_gpu()["driver_release"] == release


def test_without_driver_or_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver())
    assert cuda.gpus() == []
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    assert cuda.gpus() == []
    with pytest.raises(AgentError, match="no NVIDIA GPU here") as caught:
        cuda.first_gpu()
    assert caught.value.kind == "not-possible-here"


def test_the_address_of_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDriver((8, 9), (12, 0)))
    assert cuda.pci_bus_id() == "0000:01:00.0"
    # To observe a GPU is no need: whatever fails, the engine runs unobserved.
    refusing = FakeDriver((8, 9), fails="cuDeviceGetPCIBusId", code=999)
    for driver in (FakeDriver(), refusing):
        use(monkeypatch, driver)
        assert cuda.pci_bus_id() is None


def test_bytes_go_up_and_come_down(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, FakeDriver((8, 9)))
    memory = cuda.Memory(12, 8)
    pixels = np.arange(12, dtype=np.uint8)
    memory.upload(pixels)
    assert bytes(driver.memory[memory.input]) == pixels.tobytes()
    ctypes.memmove(memory.output, np.array([1.5, -2.0], np.float32).ctypes.data, 8)
    logits = np.zeros(2, np.float32)
    memory.download(logits)
    assert logits.tolist() == [1.5, -2.0]
    assert driver.calls[-1] == "cuStreamSynchronize", "logits are there when the call returns"


@pytest.mark.parametrize(
    ("fails", "code", "kind", "says"),
    [
        ("cuMemAlloc_v2", 2, "out-of-resources", "cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuStreamCreate", 700, "measurement-invalid", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuCtxSetCurrent", 9999, "measurement-invalid", "cuCtxSetCurrent failed: error 9999"),
    ],
)
def test_what_the_driver_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, fails: str, code: int, kind: str, says: str
) -> None:
    use(monkeypatch, FakeDriver((8, 9), fails=fails, code=code))
    with pytest.raises(AgentError, match=says) as caught:
        cuda.Memory(12, 8)
    assert caught.value.kind == kind
