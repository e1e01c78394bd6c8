"""How important channels are, against what taking them out does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from narrow import SMALL, random_images, random_network
from training import image_set

from edgexception.architecture import Architecture
from edgexception.imageset import ImageSet
from edgexception.model.graph import inference_graph, to_graph_input
from edgexception.model.xception import Xception
from edgexception.prune.importance import importance
from edgexception.prune.plan import Importance
from edgexception.prune.structure import structure_of

SIZE = (36, 36)
IMAGES = image_set(random_images(3, SIZE))
STREAM = "block3_sepconv2_pointwise"  # of 16 channels, with block 4's output
ONE_LOGIT = Architecture.model_validate({**dict(SMALL), "head": (1,)})


def scored(
    network: Xception, kind: Importance, images: ImageSet | None = IMAGES
) -> dict[str, np.ndarray]:
    structure = structure_of(network.architecture, SIZE)
    return importance(network, IMAGES.preprocess, structure, kind, images)


def scaled(network: Xception, group: str, channel: int, factor: float) -> Xception:
    """Multiply a channel of a group by a factor, in the BatchNorm of every layer that writes it."""
    found = random_network(network.architecture)
    found.load_state_dict(network.state_dict())
    writers = next(
        g.writers for g in structure_of(network.architecture, SIZE).groups if g.name == group
    )
    for writer in writers:
        norm = found.get_submodule(f"{writer.removesuffix('_pointwise')}_bn")
        norm.weight.data[channel] *= factor
        norm.bias.data[channel] *= factor
    return found


@pytest.mark.parametrize("kind", ["magnitude", "batchnorm", "activation", "taylor"])
def test_every_group_has_a_score_a_channel_and_a_dead_one_has_none(kind: Importance) -> None:
    network = scaled(random_network(SMALL), STREAM, 5, 0.0)
    found = scored(network, kind, None if kind in ("magnitude", "batchnorm") else IMAGES)
    structure = structure_of(SMALL, SIZE)
    assert {n: len(scores) for n, scores in found.items()} == {
        group.name: group.width for group in structure.groups if not group.fixed
    }
    assert all((scores >= 0).all() for scores in found.values())
    assert found[STREAM][5] == 0
    assert (np.delete(found[STREAM], 5) > 0).all()


def test_a_group_has_the_sum_of_its_writers_relative_norms() -> None:
    network = random_network(SMALL)
    graph = inference_graph(network, IMAGES.preprocess)
    expected = 0.0
    writers = ("block3_sepconv2_pointwise", "block3_shortcut", "block4_sepconv2_pointwise")
    for name in writers:
        norms = graph.get_submodule(name).weight.flatten(1).double().norm(dim=1).numpy()
        expected = expected + norms / norms.sum()
    assert scored(network, "magnitude")[STREAM] == pytest.approx(expected)
    factors = sum(
        f / f.sum()
        for name in writers
        for f in [network.get_submodule(f"{name.removesuffix('_pointwise')}_bn").weight.numpy()]
    )
    assert scored(network, "batchnorm")[STREAM] == pytest.approx(factors)


@pytest.mark.parametrize("group", [STREAM, "block1_conv1", "block5_sepconv1_pointwise"])
def test_taylor_is_the_squared_slope_of_the_logits(group: str) -> None:
    network = random_network(ONE_LOGIT)  # one logit: no part of the answer is by chance
    scores = scored(network, "taylor")[group]
    pixels = to_graph_input(torch.from_numpy(np.stack([IMAGES.image(i) for i in range(3)])))
    for channel in (0, 3):
        logits = []
        for factor in (1.0 + 1e-4, 1.0 - 1e-4):
            changed = scaled(network, group, channel, factor).double()
            graph = inference_graph(changed, IMAGES.preprocess).double()
            logits.append(graph(pixels.double()))
        slope = (logits[0] - logits[1]) / 2e-4
        assert scores[channel] == pytest.approx((slope**2).mean().item(), rel=2e-2)


def test_scores_repeat() -> None:
    network = random_network(SMALL)
    first, second = (scored(network, "taylor") for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
