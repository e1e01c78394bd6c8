"""The table of noises: a planted outlier is found where it is, and nothing is computed twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from narrow import minmax_plan, random_images, run_torch, small_graph, sqnr_db
from test_ptq import image_set
from torch import fx

from edgexception.errors import BadArtifact
from edgexception.model.graph import layers, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.precision import units_of, with_precision
from edgexception.quantize.sensitivity import (
    Rounded,
    Runner,
    Sensitivity,
    gains,
    rounded_by,
    sensitivity,
)
from edgexception.quantize.simulate import simulate

SIZE = (40, 40)
PIXELS = random_images(10, SIZE)
IMAGES = image_set(PIXELS)
INPUTS = to_graph_input(torch.from_numpy(PIXELS))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def planted(unit: str = "block3_sepconv2", factor: float = 100.0) -> fx.GraphModule:
    """The small network, but one channel between a unit's two steps is `factor` larger."""
    graph = small_graph()
    with torch.no_grad():
        layers(graph)[f"{unit}_depthwise"].weight[1] *= factor
        layers(graph)[f"{unit}_pointwise"].weight[:, 1] /= factor
    return graph


def table(graph: fx.GraphModule, dialect: str = "openvino") -> Sensitivity:
    return sensitivity(graph, minmax_plan(graph, PIXELS), DIALECTS[dialect], IMAGES)


@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
def test_a_planted_outlier_comes_out_on_top_and_in_its_column(dialect: str) -> None:
    found = table(planted(), dialect)
    assert [row.unit for row in found.units] == list(units_of(small_graph()))
    worst = max(found.units, key=lambda row: row.exception.noise)
    assert worst.unit == "block3_sepconv2"
    assert worst.inner is not None
    assert worst.inner.noise > 5 * max(worst.input.noise, worst.weights.noise)
    others = [row.exception.noise for row in found.units if row is not worst]
    assert worst.exception.noise > 3 * max(others)
    assert worst.without.noise == min(row.without.noise for row in found.units)


def test_the_parts_are_what_a_unit_has() -> None:
    rows = {row.unit: row for row in table(small_graph(), "onnxruntime").units}
    assert rows["block2_sepconv1"].inner is not None
    assert rows["block2_shortcut"].inner is None
    assert rows["block2_shortcut"].output is not None  # the add reads its integers
    assert rows["predictions"].output is None
    assert rows["block1_conv1"].input.sqnr_db is None  # the photo is exact
    assert all(r.output is None for r in table(small_graph()).units)
    assert rows["block2_sepconv1"].macs == 17 * 17 * 8 * (9 + 8)


def test_a_noise_is_that_of_the_network_run_from_its_start() -> None:
    """Against a plain run without any reuse: the same numbers."""
    graph = planted()
    plan, dialect = minmax_plan(graph, PIXELS), DIALECTS["openvino"]
    found = table(graph)
    exact = run_torch(graph, PIXELS)
    everything = rounded_by(graph, plan, dialect)
    for row in found.units[3:6]:
        without = rounded_by(
            graph, with_precision(graph, plan, dict.fromkeys(row.layers, "fp32")), dialect
        )
        for effect, rounded in (
            (row.weights, Rounded(weights=frozenset(row.layers))),
            (row.exception, everything.less(without)),
            (row.without, without),
        ):
            with torch.inference_mode():
                logits = Runner(graph, plan, dialect).run(INPUTS, rounded)["output"].numpy()
            assert effect.sqnr_db == pytest.approx(sqnr_db(exact, logits), abs=1e-3)
            agreed = (exact.argmax(1) == logits.argmax(1)).mean()
            assert effect.agreement == pytest.approx(agreed)
            assert effect.noise == pytest.approx(10 ** (-effect.sqnr_db / 10))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_everything_rounded_is_the_simulation_but_for_single_levels(dialect: str) -> None:
    graph = small_graph()
    plan = minmax_plan(graph, PIXELS, symmetric=True)
    exact = run_torch(graph, PIXELS)
    simulated = run_torch(simulate(graph, plan, DIALECTS[dialect]), PIXELS)
    found = sensitivity(graph, plan, DIALECTS[dialect], IMAGES)
    assert found.fitted.noise == 0.0
    assert found.everything.sqnr_db == pytest.approx(sqnr_db(exact, simulated), abs=0.7)


def test_nothing_before_the_change_is_computed_again() -> None:
    graph = small_graph()
    plan, dialect = minmax_plan(graph, PIXELS), DIALECTS["openvino"]
    runner = Runner(graph, plan, dialect)
    computed: list[str] = []
    for name, layer in layers(graph).items():
        layer.register_forward_hook(lambda *_, name=name: computed.append(name))
    with torch.inference_mode():
        known = runner.run(INPUTS, Rounded())
        computed.clear()
        again = runner.run(INPUTS, Rounded(), known, Rounded())
        assert computed == []
        assert again["output"] is known["output"]
        changed = Rounded(weights=frozenset(["block4_sepconv1_pointwise"]))
        runner.run(INPUTS, changed, known, Rounded())
    order = list(layers(graph))
    assert computed == order[order.index("block4_sepconv1_pointwise") :]


def test_the_network_is_judged_against_the_trained_one() -> None:
    graph = small_graph()
    plan: QuantPlan = minmax_plan(graph, PIXELS)
    with torch.no_grad():
        layers(graph)["predictions"].bias.add_(100.0)
    found = sensitivity(graph, plan, DIALECTS["openvino"], IMAGES, trained=small_graph())
    assert found.everything.noise > 0.5
    assert found.fitted.noise == pytest.approx(found.everything.noise, rel=0.1)
    assert max(row.exception.noise for row in found.units) < 1e-3


def test_gains_are_the_exceptions_of_the_table() -> None:
    graph = planted()
    plan, dialect = minmax_plan(graph, PIXELS), DIALECTS["onnxruntime"]
    noise, macs = gains(graph, plan, dialect, IMAGES)
    rows = sensitivity(graph, plan, dialect, IMAGES).units
    assert noise == {row.unit: row.exception.noise for row in rows}
    assert macs == {row.unit: row.macs for row in rows}


def test_an_image_that_overflows_is_named_with_its_tensor() -> None:
    graph = small_graph()
    plan = minmax_plan(graph, PIXELS)
    pixels = np.full((6, *SIZE, 3), 128, np.uint8)
    pixels[4] = 255
    with torch.no_grad():
        layers(graph)["block1_conv1"].weight.mul_(1e20).mul_(1e19)
        layers(graph)["block1_conv1"].bias.zero_()
    with pytest.raises(BadArtifact, match=r"image 4: tensor block1_conv\w+ is not finite"):
        sensitivity(graph, plan, DIALECTS["openvino"], image_set(pixels))
