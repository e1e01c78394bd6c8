"""A run on a Jetson that has `trtexec` and no Python package of TensorRT: see fake_trtexec.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import edgex, write_recipe
from fake_trtexec import install, install_driver
from fakes import TroubledDevice
from test_kit_run import QUICK, report_in, sections

pytest.importorskip("torch")

ORIN = {
    "arch": "aarch64",
    "board": "NVIDIA Jetson Orin Nano Developer Kit",
    "memory": {"total_bytes": 7 << 30, "available_bytes": 6 << 30},
}


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine takes itself for such a Jetson; the place of its trtexec."""
    program = install(tmp_path / "bin", "10.3.0")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(install_driver(tmp_path / "driver")))
    for place in ("pipeline", "doctor"):
        monkeypatch.setattr(f"edgexception.{place}.local_device", lambda: TroubledDevice(ORIN))
    return program


def test_engines_are_built_measured_and_named_as_trtexecs(
    world: Path, tmp_path: Path, orin: Path
) -> None:
    target: dict[str, Any] = {
        "target": "jetson", "runtimes": ["tensorrt"], "precisions": ["fp32", "int8"], "threads": 1,
    }  # fmt: skip
    recipe = sections(
        world, target, quantize={"method": "ptq", "activations": "symmetric", **QUICK}
    )
    # Each batch is a start of the stand-in, which imports ONNX Runtime.
    recipe["bench"] |= {"batch_sizes": [64]}
    done = edgex("bench", write_recipe(tmp_path / "orin.yaml", recipe), "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "jetson is jetson-orin-nano-8gb" in done.err
    assert f"TensorRT 10.3.0 through {orin}, since its Python package cannot be used" in done.err
    rows = report_in(tmp_path / "out").rows
    assert [row.status for row in rows] == ["measured", "measured"], [row.reason for row in rows]
    for row in rows:
        assert (row.runtime, row.runtime_version, row.program) == ("tensorrt", "10.3.0", str(orin))
        assert row.timing is not None
        assert (row.timing.transfers, row.timing.cuda_graph) == (True, False)
        assert row.fidelity is not None
    slow, fast = rows
    assert fast.speedup is not None, "both were timed alike"
    assert fast.executed is not None
    assert fast.executed.shares == {"int8": 1.0}
    assert slow.fidelity is not None
    assert slow.fidelity.sqnr_db is None or slow.fidelity.sqnr_db > 60
    line = f"{orin} in place of a Python package; timed by trtexec: cuda graph off, spin wait off"
    assert done.out.count(line) == 2
    page = (tmp_path / "out/report.md").read_text()
    assert "in place of a Python package; timed by trtexec" in page


def test_targets_and_doctor_say_that_it_is_trtexec(orin: Path) -> None:
    said = f"10.3.0 through {orin}, without its Python package"
    listed = edgex("targets", "jetson-orin-nano-8gb")
    assert listed.code == 0, listed.err
    assert f"tensorrt (fp32, fp16, int8, int8-fp16): {said}, here" in listed.out
    examined = edgex("doctor")
    assert f"  ok       tensorrt {said}" in examined.out
