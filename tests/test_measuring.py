"""Which engines are built, and which results of a kit are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_kit import artifact
from tiny_engine import SIDE

from edgexception import measuring
from edgexception.artifacts import Store
from edgexception.device import RecordedDevice
from edgexception.doctor import probe
from edgexception.errors import UsageError
from edgexception.export.dla import DlaLayer, DlaPlan
from edgexception.measuring import build_all
from edgexception.recipe import TensorRtSpec
from edgexception.report.assemble import Place
from edgexception.run_state import RunState
from edgexception.workshop import Workshop

GPU = Place("jetson-agx-orin-64gb", "tensorrt", "tensorrt", "fp16", 1, 2)
DLA = replace(GPU, batch=4, tensorrt=TensorRtSpec(dla_core=0, gpu_fallback=True))
FLOAT32 = DlaPlan((DlaLayer("conv", 1, "fp16"), DlaLayer("head", 1, None, "", float32=True)), 1)


def test_a_kit_that_met_an_older_version_is_still_this_kit(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is planned for TensorRT 11.4.1, and what 10.3 cannot on the DLA is one engine of it."""
    monkeypatch.setattr("edgexception.export.dla.plan_dla", lambda path: FLOAT32)
    monkeypatch.setattr(measuring, "check_graph", lambda *_: None)
    monkeypatch.setattr(measuring, "check_placement", lambda *_: None)
    monkeypatch.setattr(measuring, "build_record", lambda built: built)
    monkeypatch.setattr(measuring, "build", lambda shop, exported, place: f"of {shop.device.name}")
    facts = probe().model_dump() | {"board": None}
    facts["runtimes"].pop("tensorrt")
    here = type(probe()).model_validate(facts)
    facts |= {"arch": "aarch64", "runtimes": {"tensorrt": {"version": "10.3.0"}}}
    there = type(here).model_validate(facts)

    with Store(tmp_path / "store") as store:

        def state() -> RunState:
            card = SimpleNamespace(preprocess=SimpleNamespace(input_size=(SIDE, SIDE)))
            recipe = SimpleNamespace(name="tiny", bench=None)
            shop = Workshop(store, cast(Any, SimpleNamespace(name="local")), here)
            exports = {GPU.form: artifact(tiny_onnx, "model.onnx")}
            return RunState(
                cast(Any, recipe), shop, (GPU, DLA), cast(Any, None), cast(Any, card),
                exports=exports,
            )  # fmt: skip

        before = state()
        build_all(before)
        assert (set(before.waiting), before.faults) == ({GPU, DLA}, {})
        kit = measuring._kit(before)
        assert kit is not None

        device = object.__new__(RecordedDevice)
        vars(device).update(name="kit", results=SimpleNamespace(kit=kit.digest), folder=tmp_path)
        after = state()
        after.away = Workshop(store, device, there)
        build_all(after)
        assert after.engines == {GPU: "of kit"}
        assert list(after.faults) == [DLA]
        assert isinstance(after.faults[DLA], UsageError)
        assert "TensorRT 10.3.0 would compute them in FP16" in str(after.faults[DLA])
