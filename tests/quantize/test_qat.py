"""Quantization-aware training: it starts where it was left, learns, and ends as a plan."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from narrow import minmax_plan, random_images, run_torch, small_graph, sqnr_db
from torch import fx, nn
from training import image_set

from edgexception.errors import UsageError
from edgexception.model.graph import layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.edges import layer_outputs
from edgexception.quantize.plan import ActivationQuant, QuantPlan, WeightQuant
from edgexception.quantize.ptq import BIAS_LIMIT, Quantized
from edgexception.quantize.qat import _round, _RoundedLayer, fake_quantized, quantize_qat
from edgexception.quantize.simulate import quantize_weight, simulate
from edgexception.recipe import QatSpec
from edgexception.train.loop import fit
from edgexception.train.state import Keeper

PIXELS = random_images(24, (40, 40))
UNSEEN = random_images(24, (40, 40), seed=1)
IMAGES = image_set(PIXELS)
TENSORRT, ONNXRUNTIME = DIALECTS["tensorrt"], DIALECTS["onnxruntime"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def spec_of(**given: Any) -> QatSpec:
    return QatSpec.model_validate({"method": "qat", "batch_size": 8, "steps": 3, **given})


def coarse(bits: Literal[7, 8] = 8, factor: float = 4.0, **given: Any) -> Quantized:
    """A plan whose activations have a quarter of the levels that they could have."""
    graph = small_graph()
    plan = minmax_plan(graph, PIXELS, bits=bits, **given)
    activations = {
        name: grid if name == "pixels" else grid.model_copy(update={"scale": factor * grid.scale})
        for name, grid in plan.activations.items()
    }
    return Quantized(graph, plan.model_copy(update={"activations": activations}))


def answers(quantized: Quantized, images: np.ndarray = UNSEEN) -> np.ndarray:
    """Of the integer simulation: in the words of a runtime that rounds where TensorRT does."""
    dialect = TENSORRT if quantized.plan.symmetric else DIALECTS["openvino"]
    return run_torch(simulate(quantized.graph, quantized.plan, dialect), images)


class Rounded(fx.Interpreter):
    """The meaning of a plan, in the plainest words."""

    def __init__(self, quantized: Quantized, outputs: bool) -> None:
        super().__init__(copy.deepcopy(quantized.graph))
        self.plan = quantized.plan
        self.weighted = set(self.plan.weights)
        self.written = set(layer_outputs(quantized.graph)) if outputs else set()
        for name, layer in layers(cast(fx.GraphModule, self.module)).items():
            if name in self.weighted:
                grid = self.plan.weights[name]
                scales = torch.tensor(grid.scales).view(-1, *[1] * (layer.weight.ndim - 1))
                layer.weight.copy_(quantize_weight(layer.weight, grid).float() * scales)

    def run_node(self, n: fx.Node) -> Any:
        self.reader = n
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        pairs = zip(n.args, args, strict=True)
        return tuple(self._read(node, value) for node, value in pairs), kwargs

    def _read(self, node: Any, value: Any) -> Any:
        name = getattr(node, "name", "")
        if name not in self.plan.activations or not (
            self.reader.name in self.weighted or name in self.written
        ):
            return value
        grid = self.plan.activations[name]
        q = torch.round(value / grid.scale) + grid.zero_point
        return (q.clamp(*grid.levels) - grid.zero_point) * grid.scale


# --- where it begins


@pytest.mark.parametrize("dialect", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize(("symmetric", "bits"), [(True, 8), (False, 7)])
def test_the_first_step_sees_the_network_that_it_was_given(
    dialect: str, symmetric: bool, bits: Literal[7, 8]
) -> None:
    start = coarse(bits, symmetric=symmetric)
    pixels = to_graph_input(torch.from_numpy(UNSEEN))
    with torch.no_grad():
        expected = Rounded(start, dialect == "onnxruntime").run(pixels).numpy()
        found = fake_quantized(start, DIALECTS[dialect])(pixels).numpy()
    assert sqnr_db(expected, found) > 100.0
    assert sqnr_db(run_torch(start.graph, UNSEEN), found) < 40.0, "it is quantized"


def test_layers_that_are_kept_in_float_are_read_and_computed_in_float() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, PIXELS)
    kept = dict.fromkeys(("block2_sepconv1_pointwise", "predictions"), "fp32")
    weights = {name: grid for name, grid in plan.weights.items() if name not in kept}
    edges = {"block2_sepconv1_depthwise", "avg_pool"}
    activations = {name: grid for name, grid in plan.activations.items() if name not in edges}
    mixed = QuantPlan.model_validate(
        {**plan.model_dump(), "weights": {n: g.model_dump() for n, g in weights.items()},
         "activations": {n: g.model_dump() for n, g in activations.items()}, "precision": kept}
    )  # fmt: skip
    start = Quantized(graph, mixed)
    pixels = to_graph_input(torch.from_numpy(UNSEEN))
    with torch.no_grad():
        expected = Rounded(start, outputs=False).run(pixels).numpy()
        assert sqnr_db(expected, fake_quantized(start, TENSORRT)(pixels).numpy()) > 100.0
    learned = quantize_qat(graph, start, spec_of(), IMAGES, TENSORRT)
    assert learned.plan.precision == kept
    for name, layer in layers(learned.graph).items():
        assert torch.equal(layer.weight, layers(graph)[name].weight) == (name in kept), name


def test_standing_still_gives_back_the_plan() -> None:
    start = coarse()
    learned = quantize_qat(start.graph, start, spec_of(learning_rate=1e-30), IMAGES, TENSORRT)
    assert learned.plan.provenance.method == "qat"
    assert learned.plan.weights == start.plan.weights
    assert learned.plan.activations == start.plan.activations
    assert np.array_equal(answers(learned), answers(start))


# --- how it learns


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_those_of_the_paper(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (40 * torch.randn(3, 50, generator=generator)).requires_grad_()
    scale = torch.rand(channels, 1, generator=generator).add(0.2).requires_grad_()
    low, high = -100, 27
    given = torch.randn(3, 50, generator=generator)
    y = _round(x, scale, low, high)
    y.backward(given)
    steps = (x / scale).detach()
    torch.testing.assert_close(y, torch.round(steps).clamp(low, high) * scale)
    below, above = steps < low, steps > high
    assert below.any()
    assert above.any()
    inside = ~(below | above)
    assert torch.equal(x.grad, given * inside)
    slope = torch.where(below, low, torch.where(above, high, torch.round(steps) - steps)) * given
    expected = slope.sum(dim=1, keepdim=True) if channels == 3 else slope.sum().view(1, 1)
    torch.testing.assert_close(scale.grad, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_repairs_a_coarse_plan_without_labels(symmetric: bool) -> None:
    start = coarse(symmetric=symmetric)
    float_answers = run_torch(start.graph, UNSEEN)
    before = sqnr_db(float_answers, answers(start))
    images = image_set(random_images(48, (40, 40), seed=5))
    spec = spec_of(steps=200, learning_rate=0.05)
    learned = quantize_qat(start.graph, start, spec, images, TENSORRT)
    after = sqnr_db(float_answers, answers(learned))
    assert images.labels is None
    assert after > before + 1.5
    for name, grid in learned.plan.activations.items():
        was = start.plan.activations[name]
        assert (grid.zero_point, grid.signed, grid.role) == (was.zero_point, was.signed, was.role)
        moved = name != "pixels" and grid.role == "input"
        assert (grid.scale != was.scale) == moved, name


def test_outputs_learn_where_the_dialect_rounds_them() -> None:
    start = coarse()
    learned = quantize_qat(start.graph, start, spec_of(), IMAGES, ONNXRUNTIME)
    for name, grid in learned.plan.activations.items():
        assert (grid.scale != start.plan.activations[name].scale) == (name != "pixels"), name


def test_labels_alone_teach_it_another_answer() -> None:
    start = coarse(factor=1.0)
    images = image_set(PIXELS, labels=np.zeros(24, dtype=int))
    spec = spec_of(steps=40, learning_rate=1.0, distillation=0.0)
    learned = quantize_qat(start.graph, start, spec, images, TENSORRT)
    assert (answers(start, PIXELS).argmax(1) == 0).mean() < 0.5
    assert (answers(learned, PIXELS).argmax(1) == 0).mean() > 0.9


# --- what it ends with


def test_weights_lie_on_the_grid_of_the_plan() -> None:
    start = coarse()
    learned = quantize_qat(start.graph, start, spec_of(learning_rate=0.5), IMAGES, TENSORRT)
    for name, layer in layers(learned.graph).items():
        grid = learned.plan.weights[name]
        assert grid.scales != start.plan.weights[name].scales
        q = quantize_weight(layer.weight, grid)
        scales = torch.tensor(grid.scales).view(-1, *[1] * (layer.weight.ndim - 1))
        assert torch.equal(q.float() * scales, layer.weight), name
        assert int(q.abs().max()) <= grid.limit


def test_the_plan_computes_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[nn.Module] = []

    def spy(network: nn.Module, *rest: Any) -> None:
        trained.append(network)
        fit(network, *rest)

    monkeypatch.setattr("edgexception.quantize.qat.fit", spy)
    start = coarse()
    learned = quantize_qat(start.graph, start, spec_of(learning_rate=0.5), IMAGES, ONNXRUNTIME)
    pixels = to_graph_input(torch.from_numpy(UNSEEN))
    with torch.no_grad():
        expected = trained[0](pixels).numpy()
        found = Rounded(learned, outputs=True).run(pixels).numpy()
    assert sqnr_db(expected, found) > 80.0


def test_a_bias_still_fits_32_bits() -> None:
    """A channel with nearly no weights has the scale that its bias needs; it learned a smaller."""
    layer = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.1, -5.0]))
    grid = WeightQuant(scales=(0.01, 5.0 / BIAS_LIMIT))
    source = ActivationQuant(scale=1.0, zero_point=0, signed=True, role="input")
    rounded = _RoundedLayer(layer, grid, source)
    with torch.no_grad():
        rounded.exponent.fill_(-3.0)
        weight, scales, bias = rounded.snapped(source.scale)
    assert float(scales[0]) == pytest.approx(0.01 * np.exp(-3.0))
    assert bias is not None
    assert float((bias.abs() / scales).max()) == pytest.approx(BIAS_LIMIT, rel=1e-5)
    assert torch.equal(
        weight, torch.round(weight / scales.view(2, 1, 1, 1)) * scales.view(2, 1, 1, 1)
    )


def test_what_it_was_given_is_not_changed() -> None:
    start = coarse()
    before = {name: value.clone() for name, value in start.graph.state_dict().items()}
    code = start.graph.code
    quantize_qat(start.graph, start, spec_of(), IMAGES, TENSORRT)
    assert start.graph.code == code
    assert all(torch.equal(value, before[n]) for n, value in start.graph.state_dict().items())


# --- interrupted, diverged


class Killed(Exception):
    pass


def test_resumed_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    start, spec = coarse(), spec_of(steps=6, ema=0.8, learning_rate=0.1)
    learn = partial(quantize_qat, start.graph, start, spec, IMAGES, TENSORRT)
    whole = learn()
    keeper = Keeper(tmp_path, every_s=0.0)

    def killed(done: int, *_: object) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        learn(keeper, killed)
    done: list[int] = []
    resumed = learn(keeper, lambda *now: done.append(now[0]))
    assert done == [5, 6]
    assert resumed.plan == whole.plan
    for name, value in whole.graph.state_dict().items():
        assert torch.equal(value, resumed.graph.state_dict()[name])


def test_numbers_that_overflow() -> None:
    start = coarse()
    graph = small_graph()
    with torch.no_grad():
        layers(graph)["predictions"].bias.fill_(float("inf"))
    with pytest.raises(UsageError, match=r"quantize\.learning_rate below 0\.004"):
        quantize_qat(graph, start, spec_of(), IMAGES, TENSORRT)
