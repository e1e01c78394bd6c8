"""Bias correction: planted shifts of the mean are taken back."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch
from narrow import minmax_plan, random_images, small_graph
from torch import fx, nn

from edgexception.imageset import ImageSet, Photo, Sample
from edgexception.model.graph import layers, to_graph_input
from edgexception.preprocess import Preprocess
from edgexception.quantize.plan import QuantPlan, WeightQuant
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.reconstruct import reconstruct
from edgexception.recipe import PtqSpec

PIXELS = random_images(16, (40, 40), seed=7)
INPUTS = list(to_graph_input(torch.from_numpy(PIXELS)).split(8))
COARSE = 12.0
"""How much coarser than 8 bits the weights are: about 4.4 bits, which shift every mean."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def image_set(pixels: np.ndarray) -> ImageSet:
    samples = []
    for number, image in enumerate(pixels):
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        photo = Photo(str(number), image, None, digest, digest, (40, 40), 255)
        samples.append(Sample(str(number), photo))
    return ImageSet(tuple(samples), None, Preprocess(input_size=(40, 40)))


def coarse_plan(graph: fx.GraphModule, names: tuple[str, ...] = ()) -> QuantPlan:
    """A plan with coarse weights in some layers, or in all but the first."""
    plan = minmax_plan(graph, PIXELS)
    chosen = names or tuple(layers(graph))[1:]
    coarse = {
        name: WeightQuant(scales=tuple(COARSE * s for s in plan.weights[name].scales), bits=8)
        for name in chosen
    }
    return plan.model_copy(update={"weights": plan.weights | coarse})


def corrected(graph: fx.GraphModule, plan: QuantPlan) -> fx.GraphModule:
    return reconstruct(graph, plan.activations, plan.weights, INPUTS, rounding=False, biases=True)


def tensors(graph: fx.GraphModule, plan: QuantPlan | None = None) -> dict[str, torch.Tensor]:
    """Run the float network, or one whose layers round what they read and their weights."""
    found: dict[str, torch.Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            if plan is None or n.name not in plan.weights:
                value = super().run_node(n)
            else:
                value = rounded(n)
            if isinstance(value, torch.Tensor):
                found[n.name] = value
            return value

    def rounded(n: fx.Node) -> torch.Tensor:
        assert plan is not None
        (source,) = n.all_input_nodes
        grid, weight = plan.activations[source.name], plan.weights[n.name]
        low, high = ((level - grid.zero_point) * grid.scale for level in grid.levels)
        read = (found[source.name] / grid.scale).round() * grid.scale
        layer = copy.deepcopy(layers(graph)[n.name])
        steps = torch.tensor(weight.scales).view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight = nn.Parameter((layer.weight / steps).round() * steps)
        value: torch.Tensor = layer(read.clamp(low, high))
        return value

    with torch.no_grad():
        Keep(graph).run(torch.cat(INPUTS))
    return found


def mean_error(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square over channels of the error of the channel's mean."""
    axes = [axis for axis in range(exact.ndim) if axis != 1]
    return float((exact - other).mean(dim=axes).square().mean().sqrt())


def test_every_mean_is_brought_back() -> None:
    graph = small_graph()
    plan = coarse_plan(graph)
    exact, before = tensors(graph), tensors(graph, plan)
    after = tensors(corrected(graph, plan), plan)
    for name, layer in list(layers(graph).items())[1:]:
        if layer.bias is None:
            continue
        (user, *others) = next(n for n in graph.graph.nodes if n.name == name).users
        rectified = not others and isinstance(getattr(graph, user.name, None), nn.ReLU)
        seen = user.name if rectified else name
        errors = [mean_error(exact[seen], other[seen]) for other in (before, after)]
        # Newton's steps after a ReLU end near the mean, others hit it.
        assert errors[1] < (0.1 if rectified else 1e-3) * errors[0], (name, errors)


def test_where_a_relu_follows_its_mean_counts() -> None:
    """Bringing the mean before the ReLU back would leave more of the error after it."""
    graph, name = small_graph(), "block2_sepconv1_pointwise"
    plan = coarse_plan(graph, (name,))
    exact, after = tensors(graph), tensors(corrected(graph, plan), plan)
    before_relu = mean_error(exact[name], after[name])
    after_relu = mean_error(exact["block2_sepconv2_act"], after["block2_sepconv2_act"])
    assert after_relu < 0.2 * before_relu


def test_the_logits_come_nearer() -> None:
    graph = small_graph()
    plan = coarse_plan(graph)
    exact = tensors(graph)["predictions"]
    result = corrected(graph, plan)
    errors = [mean_error(exact, tensors(g, plan)["predictions"]) for g in (graph, result)]
    assert errors[1] < 1e-3 * errors[0]


def test_the_first_layer_and_layers_without_a_bias_stay() -> None:
    graph = small_graph()
    weights = {name: layer.weight.clone() for name, layer in layers(graph).items()}
    biases = {name: layer.bias for name, layer in layers(graph).items()}
    result = corrected(graph, coarse_plan(graph, tuple(layers(graph))))
    first, *others = layers(result)
    assert torch.equal(layers(result)[first].bias, biases[first])
    for name in others:
        layer = layers(result)[name]
        assert torch.equal(layer.weight, weights[name])
        assert (layer.bias is None) == (biases[name] is None)
        assert layer.bias is None or not torch.equal(layer.bias, biases[name])
    assert all(layer.bias is biases[name] for name, layer in layers(graph).items())


def test_a_channel_that_is_always_off_stays_bounded() -> None:
    """A ReLU that is never on has no slope; its channel's bias must not run away."""
    graph, name = small_graph(), "block2_sepconv1_pointwise"
    with torch.no_grad():
        layers(graph)[name].bias[0] = -1e3
    moved = layers(corrected(graph, coarse_plan(graph)))[name].bias
    assert torch.isfinite(moved).all()
    assert abs(float(moved[0]) + 1e3) < 1


@pytest.mark.parametrize("enabled", [True, False])
def test_correction_is_made_only_where_it_is_asked_for(enabled: bool) -> None:
    graph = small_graph()
    spec = PtqSpec.model_validate(
        {"method": "ptq", "ranges": "minmax", "equalization": False, "bias_correction": enabled}
    )
    result = quantize_ptq(graph, spec, image_set(PIXELS), 8).graph
    for name, layer in list(layers(graph).items())[1:]:
        bias = layers(result)[name].bias
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(bias, layer.bias) != enabled
