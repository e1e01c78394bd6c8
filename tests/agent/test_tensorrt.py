"""TensorRT's adapter on the stand-in of fakes.py: real builder, no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fakes import stand_in_for_tensorrt
from narrow import minmax_plan, preprocess_of, random_images, small_graph
from test_cuda import FakeDriver, use
from tiny_engine import tiny_model

from edgexception.agent.placement import METADATA
from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import MODULES, TIMING_CACHE, Options, cuda, load
from edgexception.agent.tensorrt_options import BuildOptions
from edgexception.device import BuildRecord
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import layers
from edgexception.quantize.dialects import DIALECTS

pytest.importorskip("tensorrt_rtx_bindings")

SIZE = (40, 40)
GRAPH = small_graph()
CONVOLUTIONS = [name for name, layer in layers(GRAPH).items() if layer.weight.ndim == 4]
FLOAT = "block3_shortcut"
ORIN = {"name": "Orin", "sm": 87, "memory_bytes": 1 << 35, "driver": "12.6"}
VERSIONS = ("10.3.0", "10.7.0", "10.13.3.9", "10.16.1.11", "11.4.1.0")

torch.set_num_threads(1)


def layer_information(version: str) -> str:
    """Every convolution in INT8 but one, in the words of the engine inspector."""
    key = "Format/Datatype" if version < "11" else "DataType"
    entries: list[dict[str, Any]] = [
        {
            "Name": f"{name}_weight_q + {name}",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", key: "Half" if name == FLOAT else "Int8"}],
            "Outputs": [{"Name": "y", key: "Half"}],
            "Weights": {"Type": "Half" if name == FLOAT else "Int8", "Count": 1},
        }
        for name in CONVOLUTIONS
    ]
    copy = {"Name": "copy", "LayerType": "Reformat", "Inputs": [{key: "Float"}]}
    return json.dumps({"Layers": [*entries, {**copy, "Outputs": [{key: "Int8"}]}]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    plan = minmax_plan(GRAPH, random_images(2, SIZE), symmetric=True)
    written = to_onnx(GRAPH, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS["tensorrt"])
    onnx.save(written, path)
    return path


def adapter(
    monkeypatch: pytest.MonkeyPatch, version: str, batches: tuple[int, int, int] | None = None
) -> tuple[Any, ModuleType]:
    """Import the adapter with the stand-in of a version, on an Orin, for this test alone."""
    package = stand_in_for_tensorrt(version, layer_information(version), batches)
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setattr(cuda, "gpus", lambda: [ORIN])
    spec = importlib.util.find_spec(MODULES["tensorrt"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.machine, "facts", lambda: {"board": "Jetson AGX Orin"})
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)
    return module, package


def options(**told: Any) -> Options:
    build = BuildOptions(**{"precision": "int8", **told}) if told else None
    return Options(batch=3, threads=1, tensorrt=build)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_network_is_built_and_its_layers_are_told(
    version: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tensorrt, package = adapter(monkeypatch, version)
    record = tensorrt.build(model, options(), tmp_path / "engine.plan")
    assert (tmp_path / "engine.plan").stat().st_size > 10_000
    wrong = [x for x in record["placement"] if x["executed"] not in (None, x["planned"])]
    assert [(x["name"], x["executed"]) for x in wrong] == [(FLOAT, "fp16")]
    assert record["conversions"] == {"quantize": 1}
    assert record["layers"]["CaskConvolution int8"] == len(CONVOLUTIONS) - 1
    assert record["settings"]["strongly_typed"] is True
    assert not package.config.get_flag(package.BuilderFlag.TF32)
    assert package.config.profiling_verbosity == package.ProfilingVerbosity.DETAILED
    common = {
        "runtime": "tensorrt", "versions": {}, "batch": 3, "threads": 1, "engine": "e",
        "engine_bytes": 1, "seconds": 1.0,
    }  # fmt: skip
    BuildRecord.model_validate({**common, **record})
    steps = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[0] == "{"]
    assert steps
    assert all(0 < step["done"] <= step["total"] for step in steps)
    assert all(step["what"].startswith("build tensorrt: ") for step in steps)


def test_the_times_of_layers_are_told_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.13.3.9")
    use(monkeypatch, FakeDriver((8, 7)))
    (tmp_path / "engine.plan").write_bytes(b"x" * 2000)
    images = np.zeros((3, 40, 40, 3), np.uint8)
    found = tensorrt.profile(tmp_path / "engine.plan", options(), images, 4)
    assert [each.ns for each in found] == [1000 * n for n in range(1, len(CONVOLUTIONS) + 2)]
    assert {each.name: each.does for each in found} == {
        **{f"{name}_weight_q + {name}": "int8" for name in CONVOLUTIONS},
        f"{FLOAT}_weight_q + {FLOAT}": "fp16",
        "copy": "quantize",
    }


def test_every_option_reaches_the_builder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, package = adapter(monkeypatch, "10.13.3")
    told = options(workspace_bytes=64 << 20, sparse_weights=True)
    with pytest.raises(AgentError, match=r"sparse_weights: no layer of model\.onnx has 2 zeros"):
        tensorrt.build(model, told, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    record = tensorrt.build(marked_sparse(model, tmp_path / "sparse.onnx"), told, tmp_path / "e")
    config = package.config
    assert config.get_memory_pool_limit(package.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.get_flag(package.BuilderFlag.SPARSE_WEIGHTS)
    assert record["settings"]["flags"] == ["SPARSE_WEIGHTS", "no TF32"]
    assert record["settings"]["memory_pools"] == {"WORKSPACE": 64 << 20}


def marked_sparse(model: Path, path: Path) -> Path:
    """Write a file again with the mark of 2:4 weights on one layer."""
    proto = onnx.load(model)
    mark = next(prop for prop in proto.metadata_props if prop.key == METADATA)
    facts = json.loads(mark.value)
    facts[CONVOLUTIONS[0]]["sparse"] = "2:4"
    mark.value = json.dumps(facts)
    onnx.save(proto, path)
    return path


def test_options_that_a_version_has_not_are_refused_before_the_builder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, package = adapter(monkeypatch, "10.13.3")
    package.Builder = None  # whoever starts it fails
    told = options(precision="fp16", dla_core=0, gpu_fallback=True)
    with pytest.raises(AgentError, match=r"10\.7 is the last of version 10"):
        tensorrt.build(model, told, tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_timed_is_kept_and_read_by_the_next_build(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, version)
    cache = tmp_path / TIMING_CACHE
    for count in (1, 2):
        tensorrt.build(model, options(), tmp_path / "e")
        first, *times = cache.read_text().splitlines()
        assert first == f"times on TensorRT {version}"
        assert len(times) == count
        assert set(times) == {times[0]}


@pytest.mark.parametrize(
    "content", [b"times on TensorRT 10.3.0\nx: 1 kernels", b"times on", b"\0\xff" * 40]
)
def test_times_of_another_device_and_broken_ones_are_refused(
    content: bytes, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.13.3")
    cache = tmp_path / TIMING_CACHE
    cache.write_bytes(content)
    with pytest.raises(AgentError, match=r"not one of TensorRT 10\.13\.3 on this GPU") as caught:
        tensorrt.build(model, options(), tmp_path / "e")
    assert caught.value.kind == "bad-artifact"
    assert not (tmp_path / "e").exists()
    assert cache.read_bytes() == content


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dynamic_engine_has_a_profile(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, package = adapter(monkeypatch, version)
    shapes = []
    add = package.Builder.create_optimization_profile

    def noted(builder: Any) -> Any:
        profile = add(builder)
        shapes.append(profile)
        return profile

    monkeypatch.setattr(package.Builder, "create_optimization_profile", noted)
    asked = Options(batch=2, threads=1, batches=(1, 2, 8))
    tensorrt.build(model, asked, tmp_path / "e")
    assert package.config.num_optimization_profiles == 1
    (profile,) = shapes
    assert [tuple(shape) for shape in profile.get_shape("images")] == [
        (batch, *SIZE, 3) for batch in (1, 2, 8)
    ]


def test_a_dynamic_engine_is_run_within_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.13.3", batches=(1, 2, 8))
    use(monkeypatch, FakeDriver((8, 7)))
    engine = tmp_path / "engine.plan"
    engine.write_bytes(b"x" * 2000)
    for batch in (1, 8):
        session = tensorrt.open(engine, Options(batch, 1, batches=(1, 2, 8)))
        assert session.shape == (batch, *SIZE, 3)
        assert session.call(np.zeros(session.shape, np.uint8)).shape == (batch, 5)
    for asked, says in (
        (Options(9, 1, batches=(1, 2, 8)), "takes no images"),
        (Options(1, 1, batches=(1, 1, 8)), r"takes batches of \(1, 2, 8\)"),
        (Options(1, 1), "all sizes fixed"),
    ):
        with pytest.raises(AgentError, match=says):
            tensorrt.open(engine, asked)


def test_a_dynamic_engine_is_not_for_a_dla(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, package = adapter(monkeypatch, "10.3.0")
    package.Builder = None  # whoever starts it fails
    told = BuildOptions("fp16", dla_core=0, gpu_fallback=True)
    with pytest.raises(AgentError, match="build one engine per batch size"):
        tensorrt.build(model, Options(1, 1, None, told, (1, 1, 8)), tmp_path / "e")


def test_a_dla_core_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.3.0")
    told = options(precision="fp16", dla_core=2, gpu_fallback=True)
    with pytest.raises(AgentError, match="no DLA core 2: this device has 2"):
        tensorrt.build(model, told, tmp_path / "e")


def test_layers_that_the_dla_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.3.0")
    layers = [SimpleNamespace(name=name) for name in ("conv", "avg_pool_mean")]
    network = SimpleNamespace(num_layers=2, get_layer=layers.__getitem__)
    config = SimpleNamespace(can_run_on_DLA=lambda layer: layer.name == "conv")
    wanted = BuildOptions(precision="fp16", dla_core=0, gpu_fallback=True)
    assert tensorrt._not_on_dla(wanted, network, config) == ["avg_pool_mean"]
    assert tensorrt._not_on_dla(BuildOptions(precision="fp16"), network, config) == []


def test_an_engine_for_a_dla_core_is_opened_on_that_core(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, package = adapter(monkeypatch, "10.3.0")
    wanted = BuildOptions(precision="fp16", dla_core=1, gpu_fallback=True)
    tensorrt._layers(b"x" * 2000, wanted, tensorrt._Log())
    assert package.runtime.DLA_core == 1


def test_only_a_version_compatible_engine_may_bring_code(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt, _ = adapter(monkeypatch, "10.13.3")
    for compatible in (False, True):
        wanted = BuildOptions(precision="fp16", version_compatible=compatible)
        runtime = tensorrt._runtime(wanted, tensorrt._Log())
        assert vars(runtime) == ({"engine_host_code_allowed": True} if compatible else {})


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"sm": 89}, "not-possible-here", r"Orin \(SM87\); for SM89 build on such a device"),
        ({"batch": 3}, "bad-artifact", "cannot read m.onnx"),
    ],
)
def test_what_cannot_be_built_is_refused(
    change: dict[str, int], kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt, _ = adapter(monkeypatch, "11.4.1")
    broken = tiny_model()
    broken.graph.node[2].op_type = "Convolve"
    onnx.save(broken, tmp_path / "m.onnx")
    asked = Options(**{"batch": 1, "threads": 1, **change})
    with pytest.raises(AgentError, match=says) as caught:
        tensorrt.build(tmp_path / "m.onnx", asked, tmp_path / "e")
    assert caught.value.kind == kind
    assert not (tmp_path / "e").exists()


def test_without_the_package_it_says_so() -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    with pytest.raises(AgentError, match="tensorrt cannot be used on this machine: No module"):
        load("tensorrt")
