"""The simulation is the runtimes' arithmetic, integer for integer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrow import (
    SMALL,
    architectures,
    minmax_plan,
    preprocess_of,
    random_images,
    random_network,
    run_onnxruntime,
    run_openvino,
    run_torch,
    sizes,
    small_graph,
    sqnr_db,
)
from torch import fx, nn

from edgexception.agent.machine import cpu
from edgexception.architecture import Architecture
from edgexception.errors import EdgexError
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import inference_graph, layers
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.groups import is_depthwise
from edgexception.quantize.plan import ActivationQuant, WeightQuant
from edgexception.quantize.simulate import (
    accumulator_scales,
    quantize_bias,
    quantize_weight,
    simulate,
)

_CPUINFO = Path("/proc/cpuinfo")
VNNI = _CPUINFO.exists() and cpu(Path("/"), _CPUINFO.read_text(), [0])["vnni"]
BITS: tuple[Literal[7, 8], ...] = (7, 8) if VNNI else (7,)
"""Without VNNI the kernels saturate with 8-bit weights; with 7 bits they are exact, too."""
RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def give_biases(graph: fx.GraphModule) -> None:
    """Give every depthwise convolution a bias, as centred channels do."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers(graph).values():
        if is_depthwise(layer):
            bias = 0.3 * torch.randn(layer.weight.shape[0], generator=generator)
            layer.bias = nn.Parameter(bias, requires_grad=False)


def agreement_db(
    architecture: Architecture,
    size: tuple[int, int],
    runtime: str,
    *,
    symmetric: bool,
    bits: Literal[7, 8],
    biased: bool = False,
) -> float:
    """Return the SQNR of a runtime's logits against the simulation's."""
    spec, images = preprocess_of(size), random_images(3, size)
    graph = inference_graph(random_network(architecture), spec)
    if biased:
        give_biases(graph)
    plan = minmax_plan(graph, images, symmetric=symmetric, bits=bits)
    model = to_onnx(graph, spec, None, plan=plan, dialect=DIALECTS[runtime])
    simulated = run_torch(simulate(graph, plan, DIALECTS[runtime]), images)
    return sqnr_db(simulated, RUNTIMES[runtime](model, images))


@pytest.mark.parametrize("runtime", RUNTIMES)
# Derandomized: one float rounding of an average pool may one day lie on the edge of a level.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    architecture=architectures(),
    size=sizes,
    symmetric=st.booleans(),
    bits=st.sampled_from(BITS),
    biased=st.booleans(),
)
def test_a_runtime_computes_what_the_simulation_computes(
    runtime: str,
    architecture: Architecture,
    size: tuple[int, int],
    symmetric: bool,
    bits: Literal[7, 8],
    biased: bool,
) -> None:
    """Every level agrees; logits may differ by a float rounding, and OpenVINO's ELU is its own."""
    elu = architecture.intermediate_activation == "elu" and runtime == "openvino"
    agreement = agreement_db(
        architecture, size, runtime, symmetric=symmetric, bits=bits, biased=biased
    )
    assert agreement > (25 if elu else 100)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_no_level_of_millions_differs(runtime: str, biased: bool) -> None:
    """Formulas that differ by one float32 rounding disagree in one level of a million."""
    size, dialect = (200, 200), DIALECTS[runtime]
    images = np.random.default_rng(5).integers(0, 256, (32, *size, 3), dtype=np.uint8)
    graph = small_graph(size=size)
    if biased:
        give_biases(graph)
    plan = minmax_plan(graph, images, bits=BITS[-1])
    model = to_onnx(graph, preprocess_of(size), None, plan=plan, dialect=dialect)
    simulated = run_torch(simulate(graph, plan, dialect), images)
    assert sqnr_db(simulated, RUNTIMES[runtime](model, images)) > 100


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_seven_bit_weights_agree_on_every_processor(runtime: str, symmetric: bool) -> None:
    assert agreement_db(SMALL, (40, 40), runtime, symmetric=symmetric, bits=7) > 40


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_written_graph_means_what_the_simulation_computes(dialect: str) -> None:
    """Executed in float as ONNX defines Q/DQ; levels differ only where float sums round."""
    spec, images = preprocess_of((40, 40)), random_images(3, (40, 40))
    graph = small_graph()
    plan = minmax_plan(graph, images, symmetric=True)
    model = to_onnx(graph, spec, None, plan=plan, dialect=DIALECTS[dialect])
    simulated = run_torch(simulate(graph, plan, DIALECTS[dialect]), images)
    assert sqnr_db(simulated, run_onnxruntime(model, images, optimize=False)) > 40


def test_quantization_noise_is_there_and_is_small() -> None:
    """A simulation that did not quantize would agree with the float network."""
    images, graph = random_images(4, (40, 40)), small_graph()
    noises = {}
    for bits in (7, 8):
        plan = minmax_plan(graph, images, bits=bits)  # type: ignore[arg-type]
        simulated = run_torch(simulate(graph, plan, DIALECTS["onnxruntime"]), images)
        noises[bits] = sqnr_db(run_torch(graph, images), simulated)
    assert 20 < noises[7] < noises[8] < 60


def test_the_graph_itself_is_not_changed() -> None:
    images, graph = random_images(2, (40, 40)), small_graph()
    before = run_torch(graph, images)
    simulate(graph, minmax_plan(graph, images), DIALECTS["openvino"])
    assert np.array_equal(run_torch(graph, images), before)


def test_sums_beyond_24_bits_are_exact() -> None:
    """2048 products of 255 * 127 need 26 bits: float32 would lose the last ones."""
    graph = small_graph(SMALL.model_copy(update={"tail": (512,), "head": (2048, 3)}))
    images = random_images(2, (40, 40))
    plan = minmax_plan(graph, images)
    with torch.no_grad():
        layers(graph)["predictions"].weight.fill_(1.0)
    plan = plan.model_copy(
        update={"weights": {**plan.weights, "predictions": WeightQuant(scales=(1 / 127,) * 3)}}
    )
    result = simulate(graph, plan, DIALECTS["onnxruntime"])
    layer = result.get_submodule("predictions")
    assert layer.weight.dtype == torch.float64
    scale = float(np.float32(plan.activations["dense1_act"].scale))
    x = torch.full((1, 2048), 255 * scale)
    x[0, 0] = 254 * scale
    steps = accumulator_scales(plan.activations["dense1_act"], plan.weights["predictions"])
    bias = quantize_bias("predictions", layers(graph)["predictions"].bias, steps)
    exact = np.float32(np.float64(127 * (255 * 2047 + 254)) + bias) * steps
    assert np.array_equal(layer(x)[0].numpy(), exact)


# --- weights and biases, checked by hand


def test_weights_round_to_even_and_saturate() -> None:
    weight = torch.tensor([[0.5, 1.5, -2.5, 200.0, -200.0], [1.0, 2.0, 3.0, -127.0, 127.0]])
    grid = WeightQuant(scales=(1.0, 2.0))
    assert quantize_weight(weight, grid).tolist() == [[0, 2, -2, 127, -127], [0, 1, 2, -64, 64]]
    narrow = WeightQuant(scales=(1.0, 1.0), bits=7)
    assert quantize_weight(weight, narrow)[0].tolist() == [0, 2, -2, 64, -64]


def test_a_bias_is_counted_in_steps_of_the_sum() -> None:
    source = ActivationQuant(scale=0.5, zero_point=7, signed=False, role="input")
    steps = accumulator_scales(source, WeightQuant(scales=(0.25, 0.5)))
    assert steps.tolist() == [0.125, 0.25]
    assert quantize_bias("x", torch.tensor([1.0, -1.1]), steps).tolist() == [8, -4]


def test_a_bias_beyond_32_bits_is_refused() -> None:
    steps = np.array([1e-9], dtype=np.float32)
    with pytest.raises(EdgexError, match="layer dense1: its bias does not fit 32 bits"):
        quantize_bias("dense1", torch.tensor([3.0]), steps)
    assert quantize_bias("dense1", torch.tensor([2.0]), steps)[0] > 1_999_999_000
