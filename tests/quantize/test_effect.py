"""The effect of a tensor's change, estimated from slopes, against running the changed network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from narrow import random_images, small_graph
from torch import fx

from edgexception.model.graph import to_graph_input
from edgexception.quantize.effect import Change, Values, effects, linearised

IMAGES = to_graph_input(torch.from_numpy(random_images(128, (40, 40), seed=5)))
BATCHES = IMAGES.split(32)
TENSORS = ["block1_conv1_act", "block2_sepconv1_depthwise", "block4_add", "avg_pool", "predictions"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def noise(name: str, size: float) -> Change:
    """The same noise in every call of one pass: `size` of the tensor's standard deviation."""

    def change(values: Values) -> torch.Tensor:
        x = values[name]
        generator = torch.Generator().manual_seed(int(x.double().sum().abs() * 1000))
        return size * x.std() * torch.randn(x.shape, generator=generator)

    return change


def run(
    graph: fx.GraphModule, batch: torch.Tensor, name: str = "", change: Change | None = None
) -> torch.Tensor:
    """Run the network, with `change` added to one tensor on the way."""

    class Changed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if change is not None and n.name == name:
                assert isinstance(value, torch.Tensor)
                return value + change({name: value})
            return value

    with torch.inference_mode():
        result: torch.Tensor = Changed(graph).run(batch)
    return result


def executed(graph: fx.GraphModule, name: str, change: Change) -> float:
    error = power = 0.0
    for batch in BATCHES:
        logits = run(graph, batch).double()
        error += float((run(graph, batch, name, change) - logits).square().sum())
        power += float(logits.square().sum())
    return error / power


def test_an_estimate_is_what_running_the_changed_network_gives() -> None:
    graph = small_graph()
    changes = {name: [noise(name, 1e-3)] for name in TENSORS}
    for name, (found,) in effects(graph, BATCHES, changes).items():
        assert found == pytest.approx(executed(graph, name, changes[name][0]), rel=0.25), name


def test_effects_scale_with_the_square_and_no_change_has_none() -> None:
    name = "block4_add"
    changes = {name: [noise(name, 0.0), noise(name, 1e-3), noise(name, 3e-3)]}
    zero, small, big = effects(small_graph(), BATCHES[:1], changes)[name]
    assert zero == 0
    assert small > 0
    assert big == pytest.approx(9 * small, rel=1e-3)


def test_what_the_logits_do_not_see_has_no_effect() -> None:
    """Of two changes of one size, the one behind a closed ReLU vanishes."""
    graph = small_graph()

    def closed(values: Values) -> torch.Tensor:
        x = values["block2_sepconv1_pointwise"]
        return (x < 0).float()

    def opened(values: Values) -> torch.Tensor:
        x = values["block2_sepconv1_pointwise"]
        return (x > 0).float()

    found = effects(graph, BATCHES[:1], {"block2_sepconv1_pointwise": [closed, opened]})
    behind, before = found["block2_sepconv1_pointwise"]
    assert behind == 0
    assert before > 0


def test_changes_of_the_logits_are_exact_up_to_the_probes() -> None:
    """The Jacobian there is the identity: a known change of one logit of every image."""
    graph = small_graph()
    batch = BATCHES[0]

    def first(values: Values) -> torch.Tensor:
        change = torch.zeros_like(values["predictions"])
        change[:, 0] = 0.5  # of one logit, so that probes of random signs do not vary
        return change

    (found,) = effects(graph, [batch], {"predictions": [first]})["predictions"]
    power = float(run(graph, batch).square().sum())
    assert found == pytest.approx(len(batch) * 0.25 / power, rel=1e-5)


def test_slopes_are_the_gradients_of_the_probed_logits() -> None:
    graph = small_graph()
    values, slopes, power = linearised(
        graph, IMAGES[:2], ["block4_add"], torch.Generator().manual_seed(0), probes=3
    )
    logits = run(graph, IMAGES[:2])
    assert slopes["block4_add"].shape == (2, 3, values["block4_add"][0].numel())
    torch.testing.assert_close(values["predictions"], logits)
    assert power == pytest.approx(float(logits.double().square().sum()), rel=1e-6)
    assert not any(value.requires_grad for value in values.values())


def test_the_same_seed_gives_the_same_effects() -> None:
    graph, name = small_graph(), "avg_pool"
    changes: dict[str, list[Change]] = {name: [lambda values: 1e-3 * values[name]]}
    one, same, other = (effects(graph, BATCHES, changes, seed)[name] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert one[0] != other[0]
    assert one == pytest.approx(other, rel=0.3)
