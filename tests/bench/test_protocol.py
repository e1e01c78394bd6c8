from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import ScriptedDevice
from numpy.typing import NDArray
from tiny_engine import CLASSES, tiny_images, tiny_logits

from edgexception.bench.protocol import Engine, measure_latency, run_images
from edgexception.bench.statistics import LatencySummary, ratio_of_medians
from edgexception.device import Progress, RunRecord, local_device
from edgexception.errors import BadArtifact, MeasurementInvalid, UsageError
from edgexception.recipe import BenchSpec

SPEC = BenchSpec(warmup_ms=1, duration_ms=10, min_iterations=5, rounds=3)
TIMES = np.arange(1, 31, dtype=np.int64) * 1000


def engines(count: int, folder: Path) -> list[Engine]:
    return [Engine(f"e{n}", "onnxruntime", folder / f"e{n}.onnx", 1, 1) for n in range(count)]


def test_engines_take_turns_and_each_round_starts_with_another(tmp_path: Path) -> None:
    device = ScriptedDevice({"times_ns.npy": TIMES})
    steps: list[Progress] = []
    raw = measure_latency(engines(3, tmp_path), SPEC, device, tmp_path / "w", steps.append)
    asked = [request["source"].stem for request in device.requests]
    assert asked == ["e0", "e1", "e2", "e1", "e2", "e0", "e2", "e0", "e1"]
    assert {key: len(rounds) for key, rounds in raw.items()} == {"e0": 3, "e1": 3, "e2": 3}
    assert device.requests[0]["timing"] == {
        "warmup_ms": 1,
        "duration_ms": 10,
        "min_iterations": 5,
    }
    assert device.requests[0]["images"] is None
    assert [step.done for step in steps] == list(range(9))
    assert steps[0].what == "round 1/3 e0"
    assert (tmp_path / "w/round-2-engine-1/times_ns.npy").exists()


def test_keys_must_differ(tmp_path: Path) -> None:
    device = ScriptedDevice({"times_ns.npy": TIMES})
    with pytest.raises(UsageError, match="differ"):
        measure_latency(engines(1, tmp_path) * 2, SPEC, device, tmp_path / "w")
    with pytest.raises(UsageError):
        measure_latency([], SPEC, device, tmp_path / "w")


@pytest.mark.parametrize(
    "times",
    [
        TIMES[:4],
        TIMES.astype(np.float64),
        TIMES[None],
        TIMES - 1000,
        -TIMES,
        TIMES.astype(np.int32),
    ],
)
def test_times_that_cannot_be_are_invalid(tmp_path: Path, times: NDArray[Any]) -> None:
    device = ScriptedDevice({"times_ns.npy": times})
    with pytest.raises(MeasurementInvalid, match="e0: the device answered times"):
        measure_latency(engines(1, tmp_path), SPEC, device, tmp_path / "w")


TRTEXEC = {
    "clock": "trtexec",
    "cuda_graph": False, "spin_wait": False, "transfers": True, "overlap": False,
}  # fmt: skip


@pytest.mark.parametrize("others", [None, {**TRTEXEC, "transfers": False}])
def test_rounds_that_were_timed_in_different_ways_are_invalid(
    tmp_path: Path, others: dict[str, Any] | None
) -> None:
    device = ScriptedDevice({"times_ns.npy": TIMES}, [{"timing": TRTEXEC}] * 2)
    measure_latency(engines(2, tmp_path), SPEC.model_copy(update={"rounds": 1}), device,
                    tmp_path / "a")  # fmt: skip
    device = ScriptedDevice(
        {"times_ns.npy": TIMES}, [{"timing": TRTEXEC}] * 3 + [{"timing": others}]
    )
    way = "the agent's clock" if others is None else "trtexec: cuda graph off.*transfers off"
    with pytest.raises(MeasurementInvalid, match=rf"e0: timed by {way}.*transfers on") as caught:
        measure_latency(engines(1, tmp_path), SPEC.model_copy(update={"rounds": 4}), device,
                        tmp_path / "b")  # fmt: skip
    assert caught.value.engine == "e0"


def test_times_that_are_missing_or_objects_are_broken(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"times_ns\.npy"):
        measure_latency(engines(1, tmp_path), SPEC, ScriptedDevice({}), tmp_path / "a")
    device = ScriptedDevice({"times_ns.npy": np.array([1, None], dtype=object)})
    with pytest.raises(BadArtifact, match=r"times_ns\.npy"):
        measure_latency(engines(1, tmp_path), SPEC, device, tmp_path / "b")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_name_the_image(tmp_path: Path, value: float) -> None:
    np.save(tmp_path / "images.npy", tiny_images(6))
    logits = np.zeros((6, CLASSES), np.float32)
    logits[4, 2] = logits[5, 0] = value
    device = ScriptedDevice({"logits.npy": logits})
    with pytest.raises(MeasurementInvalid, match=r"image 4 \(and 1 more\) are not finite"):
        run_images(engines(1, tmp_path)[0], tmp_path / "images.npy", device, tmp_path / "w")


@pytest.mark.parametrize(
    "logits", [np.zeros((5, 3), np.float32), np.zeros((6, 3)), np.zeros(6, np.float32)]
)
def test_logits_of_another_form_are_invalid(tmp_path: Path, logits: NDArray[Any]) -> None:
    np.save(tmp_path / "images.npy", tiny_images(6))
    device = ScriptedDevice({"logits.npy": logits})
    with pytest.raises(MeasurementInvalid, match="for 6 images"):
        run_images(engines(1, tmp_path)[0], tmp_path / "images.npy", device, tmp_path / "w")


def test_both_runtimes_measured_for_real(tiny_onnx: Path, tmp_path: Path) -> None:
    device, built = local_device(), []
    for runtime in ("onnxruntime", "openvino"):
        asked = {"runtime": runtime, "model": "model.onnx", "batch": 2, "threads": 1}
        out = tmp_path / runtime
        record = device.call("build", asked, {"model.onnx": tiny_onnx}, out)
        built.append(Engine(runtime, runtime, out / record["engine"], 2, 1))
    spec = BenchSpec(warmup_ms=5, duration_ms=30, min_iterations=10, rounds=2)
    raw = measure_latency(built, spec, device, tmp_path / "bench")
    kept = json.loads((tmp_path / "bench/round-1-engine-2/record.json").read_text())
    assert RunRecord.model_validate(kept).runtime == "openvino"
    summaries = {key: LatencySummary.of(rounds) for key, rounds in raw.items()}
    assert all(0.0 < found.min_ms < 50.0 for found in summaries.values())
    assert all(found.iterations >= 20 for found in summaries.values())
    ratio = ratio_of_medians(raw["onnxruntime"], raw["openvino"])
    assert ratio.low <= ratio.value <= ratio.high

    images = tiny_images(7)
    np.save(tmp_path / "images.npy", images)
    for engine in built:
        logits = run_images(engine, tmp_path / "images.npy", device, tmp_path / f"l-{engine.key}")
        np.testing.assert_allclose(logits, tiny_logits(images), atol=2e-4)
