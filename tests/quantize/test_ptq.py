"""Post-training quantization from photos to a plan, and what NNCF contributes."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import pytest
import torch
from narrow import SMALL, random_images, run_torch, small_graph, sqnr_db

from edgexception.errors import BadArtifact
from edgexception.imageset import ImageSet, Photo, Sample
from edgexception.model.graph import layers, to_graph_input
from edgexception.preprocess import Preprocess
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.nncf_adapter import calibrate
from edgexception.quantize.ptq import Quantized, quantize_ptq
from edgexception.quantize.ranges import observe
from edgexception.quantize.simulate import quantize_bias, quantize_weight, simulate
from edgexception.recipe import PtqSpec

SIZE = (40, 40)
PIXELS = random_images(10, SIZE)
INPUTS = [to_graph_input(torch.from_numpy(PIXELS))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def image_set(pixels: np.ndarray = PIXELS) -> ImageSet:
    """The photos as the pipeline would hand them over."""
    samples = []
    for number, image in enumerate(pixels):
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        photo = Photo(str(number), image, None, digest, digest, SIZE, 255)
        samples.append(Sample(str(number), photo))
    return ImageSet(tuple(samples), None, Preprocess(input_size=SIZE))


def ptq(bits: int = 8, graph: Any = None, **spec: Any) -> Quantized:
    spec = PtqSpec.model_validate({"method": "ptq", **spec})
    return quantize_ptq(graph or small_graph(), spec, image_set(), bits)


@pytest.fixture(scope="module")
def minmax() -> dict[bool, dict[str, tuple[float, float]]]:
    return {
        symmetric: calibrate(
            small_graph(),
            INPUTS,
            symmetric=symmetric,
            ranges="minmax",
            percentile=99.9,
        )
        for symmetric in (False, True)
    }


# --- NNCF read back


@pytest.mark.parametrize("symmetric", [False, True])
def test_nncf_ranges_are_the_extremes(
    minmax: dict[bool, dict[str, tuple[float, float]]], symmetric: bool
) -> None:
    graph, found = small_graph(), minmax[symmetric]
    assert set(found) == set(input_edges(graph))
    for edge, seen in observe(graph, found, INPUTS).items():
        low, high = seen.range("minmax", 100.0, symmetric)
        width = high - low
        if symmetric:
            assert found[edge][1] == pytest.approx(max(-low, high), rel=0.01), edge
        else:
            assert found[edge] == (
                pytest.approx(low, abs=0.01 * width),
                pytest.approx(high, abs=0.01 * width),
            ), edge


def test_weight_scales_reach_the_largest_weight() -> None:
    result = ptq(bias_correction=False, rounding="nearest")
    for name, layer in layers(result.graph).items():
        largest = layer.weight.flatten(1).abs().amax(1).numpy()
        assert np.allclose(np.array(result.plan.weights[name].scales) * 127, largest, rtol=1e-5)


def test_calibration_leaves_the_graph_and_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    graph = small_graph()
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    ptq(graph=graph)
    assert all(torch.equal(before[n], v) for n, v in graph.state_dict().items())
    assert capsys.readouterr().out == ""


# --- the plan


@pytest.mark.parametrize("ranges", ["auto", "minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
def test_a_quantized_network_is_near_the_float_one(ranges: str, activations: str) -> None:
    result = ptq(ranges=ranges, activations=activations)
    plan, graph = result.plan, small_graph()
    assert set(plan.activations) == {*input_edges(graph), *output_edges(graph)}
    assert set(plan.weights) == set(layers(graph))
    assert plan.symmetric == (activations == "symmetric")
    assert (plan.provenance.images, plan.provenance.calibration_digest) == (10, image_set().digest)
    simulated = simulate(result.graph, plan, DIALECTS["onnxruntime"])
    assert sqnr_db(run_torch(graph, PIXELS), run_torch(simulated, PIXELS)) > 12


def test_the_same_images_give_the_same_plan() -> None:
    assert ptq().plan.to_json() == ptq().plan.to_json()


def test_the_photo_is_not_rounded() -> None:
    for activations, grid in (("asymmetric", (1.0, 128, False)), ("symmetric", (1.0, 0, True))):
        pixels = ptq(activations=activations, ranges="minmax").plan.activations["pixels"]
        assert (pixels.scale, pixels.zero_point, pixels.signed) == grid


def test_seven_bits_fit_sixteen_bit_products() -> None:
    result = ptq(bits=7)
    for name, layer in layers(result.graph).items():
        grid = result.plan.weights[name]
        assert grid.bits == 7
        integers = quantize_weight(layer.weight, grid).int().abs()
        assert 60 <= integers.max() <= 64
        assert (
            not (
                integers.float()
                * torch.tensor(grid.scales).view(-1, *[1] * (layer.weight.ndim - 1))
                - layer.weight.abs()
            )
            .abs()
            .flatten(1)
            .amax(1)
            .gt(torch.tensor(grid.scales) * 0.51)
            .any()
        )


def mean_error(corrected: bool, bits: Literal[7, 8] = 7) -> float:
    """Return the largest mean error of a class on the calibration images, over its spread."""
    expected = run_torch(small_graph(), PIXELS)
    result = ptq(bits, ranges="minmax", activations="symmetric", bias_correction=corrected)
    simulated = run_torch(simulate(result.graph, result.plan, DIALECTS["openvino"]), PIXELS)
    return float(abs((simulated - expected).mean(0)).sum())


def test_bias_correction_lowers_the_mean_error() -> None:
    assert mean_error(corrected=True) < mean_error(corrected=False)


# --- damaged and degenerate networks


@pytest.mark.parametrize("layer", ["block2_sepconv2_depthwise", "predictions"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(layer: str, value: float) -> None:
    graph = small_graph()
    with torch.no_grad():
        layers(graph)[layer].weight.view(-1)[3] = value
    with pytest.raises(BadArtifact, match=f"layer {layer}: its weights are not finite"):
        ptq(graph=graph)


def test_dead_channels_and_dead_tensors_are_quantized() -> None:
    graph = small_graph()
    with torch.no_grad():
        layers(graph)["block2_sepconv1_pointwise"].weight[2] = 0.0
        tail = layers(graph)["block6_sepconv1_pointwise"]
        assert tail.out_channels == SMALL.tail[-1]
        tail.weight.zero_()
        tail.bias.fill_(-1.0)  # the last ReLU writes nothing but zeros
    result = ptq(graph=graph)
    assert result.plan.activations["avg_pool"].scale > 0
    simulated = run_torch(simulate(result.graph, result.plan, DIALECTS["onnxruntime"]), PIXELS)
    assert np.allclose(simulated, run_torch(graph, PIXELS), atol=1e-2)


def test_a_large_bias_on_a_dead_channel_fits_32_bits() -> None:
    graph = small_graph()
    with torch.no_grad():
        layer = layers(graph)["block2_sepconv1_pointwise"]
        layer.weight[2] *= 1e-12
        layer.bias[2] = 5e4
    result = ptq(graph=graph, bias_correction=False)
    reads = {reader: edge for edge, names in input_edges(graph).items() for reader in names}
    source = result.plan.activations[reads["block2_sepconv1_pointwise"]]
    steps = np.float32(source.scale) * np.float32(
        result.plan.weights["block2_sepconv1_pointwise"].scales
    )
    bias = quantize_bias("x", layers(result.graph)["block2_sepconv1_pointwise"].bias, steps)
    assert bias[2] * steps[2] == pytest.approx(5e4, rel=1e-6)
    assert abs(bias).max() <= 2**30


def test_photos_of_one_colour_calibrate() -> None:
    photos = np.stack([np.full((*SIZE, 3), value, np.uint8) for value in (90, 140)])
    result = quantize_ptq(small_graph(), PtqSpec(method="ptq"), image_set(photos), 8)
    assert all(np.isfinite(grid.scale) for grid in result.plan.activations.values())
