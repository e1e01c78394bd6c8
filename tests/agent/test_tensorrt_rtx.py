"""TensorRT-RTX really builds, for every GPU that it knows and without one."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import minmax_plan, preprocess_of, random_images, random_network, small_graph
from onnx import numpy_helper
from tiny_engine import tiny_model

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, cuda, load
from edgexception.architecture import Architecture
from edgexception.device import BuildRecord, LocalDevice, ProbeRecord, local_device
from edgexception.errors import BadArtifact, EdgexError, NotPossibleHere, OutOfResources, UsageError
from edgexception.export.lint import faults
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.model.sparsity import is_sparse
from edgexception.prune.refit import refit
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import peaks_of, type_graph

pytest.importorskip("tensorrt_rtx_bindings")

WIDE = Architecture(
    stem=(16, 32),
    entry=((256, 256),),
    middle=((256, 256),),
    exit=(256, 256),
    tail=(256,),
    head=(5,),
)
"""Channels by the hundred, which sparse kernels are for."""
GPUS = (75, 80, 86, 89, 120, 121)
SIZE = (40, 40)
IMAGES = random_images(2, SIZE)
GRAPH = small_graph()
PLAN = minmax_plan(GRAPH, IMAGES, symmetric=True)
CONVOLUTIONS = [name for name, layer in layers(GRAPH).items() if layer.weight.ndim == 4]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow network in every form that TensorRT reads, of an open batch."""
    folder = tmp_path_factory.mktemp("forms")
    peaks = peaks_of(GRAPH, [to_graph_input(torch.from_numpy(IMAGES))])
    for name, plan, base in (
        ("fp32", None, "fp32"),
        ("fp16", None, "fp16"),
        ("int8", PLAN, "fp32"),
        ("int8-fp16", PLAN, "fp16"),
    ):
        model = to_onnx(
            GRAPH,
            preprocess_of(SIZE),
            None,
            plan=plan,
            dialect=DIALECTS["tensorrt"] if plan else None,
            types=type_graph(GRAPH, plan, base, peaks),  # type: ignore[arg-type]
        )
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return {path.stem: path for path in folder.iterdir()}


def build(
    model: Path, out: Path, sm: int | None = 89, batch: int = 1, device: LocalDevice | None = None
) -> BuildRecord:
    request = {
        "runtime": "tensorrt-rtx", "model": "m.onnx", "batch": batch, "threads": 1, "sm": sm,
    }  # fmt: skip
    record = (device or local_device()).call("build", request, {"m.onnx": model}, out)
    return BuildRecord.model_validate(record)


def test_the_probe_finds_it_and_says_which_gpus_there_are(tmp_path: Path) -> None:
    probed = ProbeRecord.model_validate(local_device().call("probe", {}, {}, tmp_path / "out"))
    facts = probed.runtimes["tensorrt-rtx"]
    assert facts.missing is None
    assert facts.version is not None
    assert len(facts.devices) == len(facts.gpus) == len(cuda.gpus())


@pytest.mark.parametrize("sm", GPUS)
@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int8-fp16"])
def test_every_form_is_built_for_every_gpu_or_our_linter_says_why_not(
    forms: dict[str, Path], tmp_path: Path, form: str, sm: int
) -> None:
    found = faults(onnx.load(forms[form]), sm)
    if found:
        assert sm == 75
        with pytest.raises(BadArtifact, match=r"for SM75: .*FP32 GEMM is not supported"):
            build(forms[form], tmp_path / "out", sm)
        assert not (tmp_path / "out").exists()
        return
    record = build(forms[form], tmp_path / "out", sm)
    engine = tmp_path / "out" / record.engine
    assert record.engine_bytes == engine.stat().st_size > record.weights_bytes > 0  # type: ignore[operator]
    assert record.settings["sm"] == sm
    assert record.settings["tf32"] is False, "FP32 is not rounded in silence"
    assert record.settings["strongly_typed"] is True
    kernels = record.inspection.kernels  # type: ignore[union-attr]
    assert sum(record.layers.values()) == len(kernels)
    types = {layer.name: layer.executed for layer in record.placement if layer.name in CONVOLUTIONS}
    # For Turing the builder turns INT8 weights back to float16, at each call, and computes in it.
    int8 = "fp16" if sm == 75 else "int8"
    assert types == dict.fromkeys(CONVOLUTIONS, int8 if "int8" in form else form)


@pytest.mark.parametrize("form", ["int8", "int8-fp16"])
def test_int8_weights_are_in_the_engine_once_and_in_no_other_type(
    forms: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Channels last; 4 channels a group at least, the added ones zero."""
    build(forms[form], tmp_path / "out")
    engine = (tmp_path / "out/engine.rtx").read_bytes()
    weights = [numpy_helper.to_array(each) for each in onnx.load(forms[form]).graph.initializer]
    weights = [each for each in weights if each.dtype == np.int8 and each.size >= 128]
    assert len(weights) >= 8
    assert any(each.shape[1] == 1 for each in weights), "a depthwise layer is among them"
    for weight in weights:
        missing = max(0, 4 - weight.shape[1])
        padded = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))
        assert engine.count(np.moveaxis(padded, 1, -1).tobytes()) == 1
        for wide in (np.float16, np.float32):
            assert np.moveaxis(weight, 1, -1).astype(wide).tobytes() not in engine


def test_zeros_that_pad_are_counted(forms: dict[str, Path], tmp_path: Path) -> None:
    counted = {form: build(path, tmp_path / form).zeros_bytes for form, path in forms.items()}
    # The input of block2's first depthwise layer has 8 channels of 17x17: three times that.
    assert counted["int8"] > counted["fp16"] + 3 * 8 * 17 * 17  # type: ignore[operator]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=4)), max_size=6),
)
def test_only_long_runs_of_zeros_pad(parts: list[tuple[int, bytes]]) -> None:
    """Whatever stands between the runs, less its own zeros at either end."""
    zeros_bytes = load("tensorrt-rtx").zeros_bytes  # type: ignore[attr-defined]
    between = [b"\1" + bytes(count) + b"\1" + data for count, data in parts]
    assert zeros_bytes(b"".join(between)) == sum(n for n, _ in parts if n >= 64)


def test_the_batch_is_fixed_and_traffic_grows_with_it(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    one = build(forms["fp16"], tmp_path / "one").inspection
    four = build(forms["fp16"], tmp_path / "four", batch=4).inspection
    assert one is not None
    assert four is not None
    assert four.kernels[0].read[0].bytes == 4 * one.kernels[0].read[0].bytes == 4 * 40 * 40 * 3
    assert 3.5 < four.written_bytes / one.written_bytes < 4.5


def test_a_build_is_repeatable(forms: dict[str, Path], tmp_path: Path) -> None:
    digests = set()
    for turn in ("first", "second"):
        record = build(forms["int8-fp16"], tmp_path / turn)
        digests.add(hashlib.sha256((tmp_path / turn / record.engine).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("sm", "error", "says"),
    [
        (None, UsageError, "give `sm`"),
        (87, NotPossibleHere, "does not build for SM87; it builds for SM75, SM80"),
        (5, UsageError, "sm is 5; it must be an integer"),
    ],
)
def test_a_gpu_that_it_does_not_build_for_is_refused(
    forms: dict[str, Path], tmp_path: Path, sm: int | None, error: type[EdgexError], says: str
) -> None:
    with pytest.raises(error, match=says):
        build(forms["fp16"], tmp_path / "out", sm)


@pytest.mark.skipif(bool(cuda.gpus()), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(forms: dict[str, Path], tmp_path: Path) -> None:
    record = build(forms["fp16"], tmp_path / "built")
    timing = {"warmup_ms": 1, "duration_ms": 1, "min_iterations": 1}
    request = {
        "runtime": "tensorrt-rtx", "engine": "engine.rtx", "manifest": "engine.json",
        "batch": 1, "threads": 1, "images": None, "timing": timing,
    }  # fmt: skip
    files = {name: tmp_path / "built" / name for name in (record.engine, "engine.json")}
    with pytest.raises(NotPossibleHere, match="no NVIDIA GPU here"):
        local_device().call("run", request, files, tmp_path / "out")


def test_a_dynamic_engine_compiles_for_a_batch_before_it_runs_it() -> None:
    """The real names of the library, on an engine that only notes what it is asked."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    config = SimpleNamespace()
    engine = SimpleNamespace(
        create_runtime_config=lambda: config, create_execution_context=lambda **told: told
    )
    context = load("tensorrt-rtx")._eager_context(engine)  # type: ignore[attr-defined]
    assert context == {"runtime_config": config}
    (strategy,) = vars(config).values()
    assert strategy is trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert set(vars(config)) <= set(dir(trt.IRuntimeConfig))


# --- graphs from a stranger


def saved(path: Path, model: onnx.ModelProto | bytes) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def of_size(height: int, width: int) -> onnx.ModelProto:
    model = tiny_model()
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes[1].dim_value, sizes[2].dim_value = height, width
    return model


def tiled(times: int) -> onnx.ModelProto:
    """A file of a few bytes whose second tensor has `times` squared times the first one's."""
    model = tiny_model()
    model.graph.node.insert(2, onnx.helper.make_node("Tile", ["nchw", "times"], ["large"]))
    counts = np.array([1, 1, times, times], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(counts, "times"))
    model.graph.node[3].input[0] = "large"
    return model


def lying_weights() -> onnx.ModelProto:
    model = tiny_model()
    model.graph.initializer[0].dims[0] = 1 << 31
    return model


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (of_size(60_000, 60_000), OutOfResources),
        (of_size(2**31 - 1, 2**31 - 1), BadArtifact),
        (of_size(2**40, 2**20), BadArtifact),
        (of_size(0, 12), BadArtifact),
        (tiled(6000), OutOfResources),
        (lying_weights(), BadArtifact),
    ],
    ids=["10 GB of photo", "2^63", "2^60", "nothing", "10 GB in the middle", "weights that lie"],
)
def test_tensors_of_impossible_sizes_end_in_an_error(
    tmp_path: Path, model: onnx.ModelProto, error: type[EdgexError]
) -> None:
    with pytest.raises(error, match="tensorrt-rtx cannot"):
        build(saved(tmp_path / "m.onnx", model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_graph_is_refused(forms: dict[str, Path], tmp_path: Path, kept: float) -> None:
    content = forms["int8"].read_bytes()
    path = saved(tmp_path / "m.onnx", content[: int(len(content) * kept)])
    with pytest.raises(BadArtifact, match="broken or not an ONNX file"):
        build(path, tmp_path / "out")


@pytest.mark.parametrize("fault", ["output name", "input type", "unknown operator", "external"])
def test_a_graph_that_breaks_the_contract_is_not_built(fault: str, tmp_path: Path) -> None:
    model = tiny_model()
    if fault == "output name":
        model.graph.node[-1].output[0] = model.graph.output[0].name = "probabilities"
    elif fault == "input type":
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif fault == "unknown operator":
        model.graph.node[2].op_type = "Convolve"
    else:
        weight = model.graph.initializer[0]
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="/etc/hostname")
    with pytest.raises(BadArtifact):
        build(saved(tmp_path / "m.onnx", model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_crash_of_the_library_costs_the_child_alone(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    """The real agent, whose builder is made to fail as a bug in the library does."""
    start = list(local_device().command)
    start[3] = start[3].replace(
        "runpy.run_module",
        "import os, signal, tensorrt_rtx_bindings as trt\n"
        "trt.Builder = lambda log: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "runpy.run_module",
    )
    with pytest.raises(BadArtifact, match="SIGSEGV") as caught:
        build(forms["fp16"], tmp_path / "out", device=LocalDevice(command=tuple(start)))
    assert signal.SIGSEGV.name in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert os.getpid()


def test_an_engine_of_another_gpu_is_not_guessed(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="give `sm`"):
        load("tensorrt-rtx").build(tiny_onnx, Options(1, 1), tmp_path / "engine")


@pytest.mark.parametrize("sm", [86, 89])
def test_the_option_for_sparse_weights_changes_no_byte(sm: int) -> None:
    """So `prune.sparsity` is refused for it: see recipe_checks_learning.py."""
    import tensorrt_rtx_bindings as trt  # noqa: PLC0415

    network = random_network(WIDE)
    refit(network, copy.deepcopy(network), {}, torch.randn(4, 3, *SIZE), sparse=True)
    graph = inference_graph(network, preprocess_of(SIZE))
    assert any(is_sparse(layer.weight) for layer in layers(graph).values())
    plan = minmax_plan(graph, IMAGES, symmetric=True)
    types = type_graph(
        graph, plan, "fp16", peaks_of(graph, [to_graph_input(torch.from_numpy(IMAGES))])
    )
    model = to_onnx(
        graph,
        preprocess_of(SIZE),
        None,
        plan=plan,
        dialect=DIALECTS["tensorrt"],
        types=types,
        batch=1,
    )
    engines = []
    for sparse in (False, True):
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        wanted = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert trt.OnnxParser(wanted, log).parse(model.SerializeToString())
        config = builder.create_builder_config()
        if sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        engines.append(bytes(builder.build_serialized_network(wanted, config)))
    assert engines[0] == engines[1]
