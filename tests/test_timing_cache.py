"""What TensorRT timed is kept beside the store's results, for builds that it is valid for."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import TimingDevice
from test_engine_key import PLACE, changed, machine  # noqa: F401 - a fixture

from edgexception import engine_stages
from edgexception.artifacts import Artifact, FileRecord, Store
from edgexception.device import ProbeRecord, RecordedDevice
from edgexception.errors import BadArtifact
from edgexception.workshop import Workshop


@pytest.fixture(autouse=True)
def _no_lint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_stages, "check_graph", lambda *_: None)


@pytest.fixture
def exported(tmp_path: Path) -> Artifact:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    digest = hashlib.sha256(b"a model").hexdigest()
    return Artifact("export", "k", tmp_path, {path.name: FileRecord(digest, 7)}, digest)


def test_each_build_goes_on_from_the_one_before(
    machine: ProbeRecord,  # noqa: F811
    exported: Artifact,
    tmp_path: Path,
) -> None:
    device = TimingDevice()
    with Store(tmp_path / "store") as store:
        shop = Workshop(store, cast(Any, device), machine)
        for precision in ("fp16", "int8", "fp32"):
            engine_stages.build(shop, exported, replace(PLACE, precision=precision))  # type: ignore[arg-type]
        assert device.given == [None, b"x", b"xx"]
        (kept,) = (tmp_path / "store/.timing").iterdir()
        assert kept.name.startswith("jetson-agx-orin-64gb-tensorrt-10.3.0-")
        assert kept.read_bytes() == b"xxx"
        again = engine_stages.build(shop, exported, PLACE)
        assert len(device.given) == 3, "it is no part of an engine's key"
        assert again.file("timing.cache").read_bytes() == b"x", "each engine has its own beside it"


def test_it_is_for_one_version_gpu_device_and_target(
    machine: ProbeRecord,  # noqa: F811
    tmp_path: Path,
) -> None:
    gpu = "runtimes.tensorrt.gpus.0."
    machines = [
        machine,
        *(
            changed(machine, path, value)
            for path, value in (
                ("runtimes.tensorrt.version", "10.3.1"),
                (gpu + "name", "Orin NX"),
                (gpu + "sm", 89),
                (gpu + "driver", "12.9"),
                ("power_mode", "15W"),
            )
        ),
    ]
    other = TimingDevice()
    other.name = "another"
    with Store(tmp_path / "store") as store:
        shops = [Workshop(store, cast(Any, TimingDevice()), each) for each in machines]
        shops.append(Workshop(store, cast(Any, other), machine))
        places = [PLACE, replace(PLACE, target="jetson-agx-orin-32gb")]
        names = [engine_stages.timing_cache_of(shop, place) for shop in shops for place in places]
        assert None not in names
        assert len(set(names)) == len(names)
        # What does not change the times changes nothing.
        same = replace(PLACE, precision="int8", batch=4, threads=1)
        assert engine_stages.timing_cache_of(shops[0], same) == names[0]
        assert engine_stages.timing_cache_of(shops[0], replace(PLACE, runtime="openvino")) is None


def test_a_kit_has_none(machine: ProbeRecord, tmp_path: Path) -> None:  # noqa: F811
    """Its requests are those of its folder, whatever is kept here."""
    device = object.__new__(RecordedDevice)
    with Store(tmp_path / "store") as store:
        assert engine_stages.timing_cache_of(Workshop(store, device, machine), PLACE) is None


def test_one_that_is_refused_stays_and_nothing_is_built(
    machine: ProbeRecord,  # noqa: F811
    exported: Artifact,
    tmp_path: Path,
) -> None:
    device = TimingDevice()
    with Store(tmp_path / "store") as store:
        shop = Workshop(store, cast(Any, device), machine)
        engine_stages.build(shop, exported, PLACE)
        path = engine_stages.timing_cache_of(shop, PLACE)
        assert path is not None
        device.fault = BadArtifact("the timing cache of an earlier build is broken")
        with pytest.raises(BadArtifact, match="timing cache"):
            engine_stages.build(shop, exported, replace(PLACE, precision="int8"))
        assert path.read_bytes() == b"x"


def test_an_answer_without_one_is_broken(
    machine: ProbeRecord,  # noqa: F811
    exported: Artifact,
    tmp_path: Path,
) -> None:
    device = TimingDevice()
    device.leaves_it = False
    with Store(tmp_path / "store") as store:
        shop = Workshop(store, cast(Any, device), machine)
        with pytest.raises(BadArtifact, match=f"{PLACE.engine_key}: local left no timing.cache"):
            engine_stages.build(shop, exported, PLACE)
        assert not (tmp_path / "store/.timing").exists()
