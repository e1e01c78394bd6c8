"""ONNX Runtime on a GPU: refused wherever a node would run on the CPU in silence.

There is no GPU here. Providers of this onnxruntime stand in: the CPU's for one that takes every
node, Azure's for one that starts and takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_inference_collection import Session
from tiny_engine import tiny_images, tiny_logits

from edgexception.agent import manifest
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, cuda, load, ort_gpu
from edgexception.agent.runtimes.ort_gpu import Adapter
from edgexception.device import BuildRecord, local_device
from edgexception.errors import NotPossibleHere
from edgexception.targets import find_target

GPU = {"name": "NVIDIA Fake", "sm": 89, "memory_bytes": 1, "driver": "13.0"}
OPTIONS = Options(batch=2, threads=1)
RUNTIMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: [GPU])
    monkeypatch.setattr(ort_gpu, "gpus", lambda: [GPU])


def refused(do: Callable[[], object], says: str) -> None:
    with pytest.raises(AgentError, match=says) as caught:
        do()
    assert caught.value.kind == "not-possible-here"


@pytest.mark.skipif(bool(cuda.gpus()), reason="there is a GPU")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_a_gpu_it_is_refused(runtime: str, tiny_onnx: Path, tmp_path: Path) -> None:
    asked = {"runtime": runtime, "model": "m.onnx", "batch": 1, "threads": 1}
    refused(load(runtime).version, "no NVIDIA GPU here")
    with pytest.raises(NotPossibleHere):
        local_device().call("build", asked, {"m.onnx": tiny_onnx}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("gpu")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_onnxruntime_without_the_provider_is_refused(
    runtime: str, tiny_onnx: Path, tmp_path: Path
) -> None:
    adapter = load(runtime)
    refused(adapter.version, "has no (CUDA|Tensorrt)ExecutionProvider, only .*onnxruntime-gpu")
    # ONNX Runtime itself warns, and takes the CPU.
    refused(
        lambda: adapter.build(tiny_onnx, OPTIONS, tmp_path / "e.onnx"),
        "ExecutionProvider did not start, and onnxruntime took CPUExecutionProvider",
    )
    refused(lambda: adapter.open(tiny_onnx, OPTIONS), "did not start")
    assert not (tmp_path / "e.onnx").exists()


@pytest.mark.usefixtures("gpu")
def test_a_provider_that_takes_no_node_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    adapter = Adapter("x", "AzureExecutionProvider")
    assert adapter.version()["gpus"] == [GPU]
    says = r"does not take all of .* \(Cast, CPUExecutionProvider\), .* another runtime"
    refused(lambda: adapter.build(tiny_onnx, OPTIONS, tmp_path / "e.onnx"), says)
    refused(lambda: adapter.open(tiny_onnx, OPTIONS), says)
    assert not (tmp_path / "e.onnx").exists()


@pytest.mark.usefixtures("gpu")
def test_single_nodes_elsewhere_are_named(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    nodes = [SimpleNamespace(op_type="QLinearConv", name=f"conv{n}") for n in range(7)]
    parts = [
        SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes),
        SimpleNamespace(ep_name="AzureExecutionProvider", get_nodes=lambda: nodes[:1]),
    ]
    monkeypatch.setattr(Session, "get_provider_graph_assignment_info", lambda _: parts)
    refused(
        lambda: Adapter("x", "AzureExecutionProvider").open(tiny_onnx, OPTIONS),
        r"elsewhere.*: conv0 \(QLinearConv, CPUExecutionProvider\), .* and 2 more\. Use",
    )


def test_tensorrt_is_told_the_bounds_of_an_open_batch(tiny_onnx: Path) -> None:
    """Else its provider builds an engine again for each new size."""
    dynamic = Options(batch=2, threads=1, batches=(1, 2, 8))
    tensorrt = Adapter("onnxruntime-tensorrt", ort_gpu.TENSORRT)
    assert tensorrt._profile(tiny_onnx, dynamic) == {
        "trt_profile_min_shapes": "images:1x12x12x3",
        "trt_profile_opt_shapes": "images:2x12x12x3",
        "trt_profile_max_shapes": "images:8x12x12x3",
    }
    assert tensorrt._profile(tiny_onnx, OPTIONS) == {}
    assert Adapter("x", "CPUExecutionProvider")._profile(tiny_onnx, dynamic) == {}


@pytest.mark.usefixtures("gpu")
def test_an_onnxruntime_that_does_not_tell_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path
) -> None:
    monkeypatch.delattr(Session, "get_provider_graph_assignment_info")
    adapter = Adapter("x", "CPUExecutionProvider")
    refused(lambda: adapter.open(tiny_onnx, OPTIONS), r"does not tell .*install 1\.24")


@pytest.mark.usefixtures("gpu")
def test_a_provider_that_takes_every_node_runs(tiny_onnx: Path, tmp_path: Path) -> None:
    adapter = Adapter("x", "CPUExecutionProvider")
    record: dict[str, Any] = adapter.build(tiny_onnx, OPTIONS, tmp_path / "engine.onnx")
    assert record["layers"] == {"Cast": 1, "Conv": 1, "ReduceMean": 1, "Transpose": 1}
    record |= {
        "runtime": "x", "versions": {}, "batch": 2, "threads": 1, "engine": "engine.onnx",
        "engine_bytes": 1, "seconds": 1.0,
    }  # fmt: skip
    BuildRecord.model_validate(record)
    manifest.write(tmp_path, tiny_onnx, OPTIONS, record, adapter.version())
    engine = tmp_path / "engine.onnx"
    manifest.check(tmp_path / "engine.json", engine, "x", adapter.version())
    session = adapter.open(engine, OPTIONS)
    images = tiny_images(2)
    assert np.allclose(session.call(images), tiny_logits(images), atol=1e-3)
    assert session.settings["provider"] == "CPUExecutionProvider"
    dynamic = Options(batch=1, threads=1, batches=(1, 2, 8))
    assert np.allclose(adapter.open(engine, dynamic).call(images[:1]), session.call(images)[:1])


def test_a_call_that_fails_is_not_tried_again_on_the_cpu(tiny_onnx: Path) -> None:
    session = Adapter("x", "CPUExecutionProvider")._session(tiny_onnx, OPTIONS)
    assert session._enable_fallback is False


def test_the_row_offers_no_int8_where_there_is_none() -> None:
    runtimes = find_target("nvidia-gpu").runtimes
    assert set(runtimes) == set(RUNTIMES)
    assert runtimes["onnxruntime-cuda"].precisions == ("fp32", "fp16")
    assert find_target("nvidia-gpu").verified_on is None
