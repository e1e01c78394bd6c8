"""NVML's calls, to a library that is compiled from its header's prototypes: no GPU is here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from edgexception.agent import nvml, telemetry
from edgexception.agent.nvml import Nvml
from edgexception.agent.telemetry import Telemetry
from edgexception.bench.conditions import Sample

HERE = "0000:01:00.0"


@pytest.fixture(scope="module", params=["now", "OLD"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here to make the library of nvml_stub.c")
    path = tmp_path_factory.mktemp("nvml") / f"libnvidia-ml-{request.param}.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    old = ["-DOLD"] if request.param == "OLD" else []
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", *old, "-o", path, source]
    subprocess.run(command, check=True)
    return path


class Stub:
    """The variables of the compiled library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def get(self, name: str, kind: Any = ctypes.c_int) -> int:
        return int(kind.in_dll(self.library, f"stub_{name}").value)

    def put(self, value: int, name: str, kind: Any = ctypes.c_int) -> None:
        kind.in_dll(self.library, f"stub_{name}").value = value


@pytest.fixture
def stub(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(nvml, "LIBRARY", str(library))
    found = Stub(library)
    yield found
    assert found.get("users") == 0, "what was started was ended"
    for name in ("driver", "tells_power"):
        found.put(1, name)
    found.put(0, "reasons", ctypes.c_ulonglong)


def test_a_gpu_tells_of_itself(stub: Stub) -> None:
    gpu = Nvml(HERE)
    assert gpu.running
    stub.put(0x1_0000_0000 | 0x4 | 0x20 | 0x2, "reasons", ctypes.c_ulonglong)
    assert gpu.read() == {
        "gpu_mhz": 2505,
        "memory_mhz": 10501,
        "celsius": 61,
        "milliwatts": 72000,
        "reasons": ["application clocks", "power cap", "software thermal slowdown"],
    }
    stub.put(0, "tells_power")
    stub.put(0, "reasons", ctypes.c_ulonglong)
    found = gpu.read()
    assert found is not None
    assert (found["milliwatts"], found["reasons"], found["celsius"]) == (None, [], 61)
    gpu.close()
    assert (gpu.running, gpu.read()) == (False, None)


@pytest.mark.parametrize(("address", "driver"), [(None, 1), ("0000:02:00.0", 1), (HERE, 0)])
def test_what_is_not_there_is_not_asked(stub: Stub, address: str | None, driver: int) -> None:
    stub.put(driver, "driver")
    gpu = Nvml(address)
    assert (gpu.running, gpu.read()) == (False, None)
    gpu.close()


def test_without_the_library_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libno-such-nvml.so.1")
    assert Nvml(HERE).read() is None


def test_samples_have_it_where_a_gpu_runs_the_engine(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry.cuda, "pci_bus_id", lambda: HERE)
    monkeypatch.setattr(telemetry, "IDLE_S", 0.3)
    taken = Telemetry(gpu=True)
    taken.rest()
    taken.close()
    assert {sample["phase"] for sample in taken.samples} == {"idle"}
    sample = Sample.model_validate(taken.samples[0])
    assert sample.gpu_clock == 2505
    assert sample.powers == [{"GPU board": 72000}]
    plain = Telemetry()
    start = time.monotonic()
    plain.rest()
    assert time.monotonic() - start < 0.3, "without power there is no baseline to take"
    plain.sample()
    assert plain.samples[-1]["nvml"] is None
