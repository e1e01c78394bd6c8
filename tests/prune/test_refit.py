"""Least squares after pruning: what the channels that stay do for those that went."""

from __future__ import annotations

import pytest
import torch
from narrow import SMALL, random_network
from test_apply import plan_of

from edgexception.architecture import Architecture
from edgexception.model.xception import Xception
from edgexception.prune import refit as module
from edgexception.prune.apply import pruned
from edgexception.prune.refit import refit
from edgexception.train.batchnorm import settle

X = torch.randn(16, 3, 36, 36, generator=torch.Generator().manual_seed(0))


def network_at_rest(architecture: Architecture) -> Xception:
    """Return a network whose BatchNorm statistics are exactly those of the images."""
    network = random_network(architecture)
    settle(network, lambda: iter([X]))
    return network.eval()


def apart(network: Xception, teacher: Xception) -> float:
    with torch.inference_mode():
        answers = teacher(X)
        return float(((network(X) - answers) ** 2).sum() / (answers**2).sum())


def test_a_channel_that_another_one_equals_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = network_at_rest(SMALL)
    inner = (teacher.block3_sepconv1.pointwise, teacher.block3_sepconv1_bn)
    with torch.no_grad():
        for layer in (*inner, teacher.block3_sepconv2.depthwise):
            for value in layer.state_dict().values():
                if value.ndim:
                    value[8:] = value[:8]
    kept = {"block3_sepconv1_pointwise": tuple(range(8))}
    network = pruned(teacher, plan_of(SMALL, kept))
    assert apart(network, teacher) > 0.01
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    refit(network, teacher, kept, X)
    assert apart(network, teacher) < 1e-6
    assert not network.training


def test_other_channels_make_up_for_a_part() -> None:
    teacher = network_at_rest(SMALL)
    kept = {"block3_sepconv2_pointwise": tuple(range(0, 16, 2)), "block1_conv2": (0, 1, 2, 4, 6)}
    network, measured = (pruned(teacher, plan_of(SMALL, kept)) for _ in range(2))
    settle(measured, lambda: iter([X]))
    refit(network, teacher, kept, X)
    assert apart(network, teacher) < 0.5 * apart(measured.eval(), teacher)


def test_nothing_changes_where_nothing_went() -> None:
    teacher = network_at_rest(SMALL)
    for how in ("teacher", "images"):
        network = pruned(teacher, plan_of(SMALL, {}))
        refit(network, teacher, {}, X, how)
        assert apart(network, teacher) < 1e-6


def test_a_few_odd_images_do_not_become_the_statistics() -> None:
    """Dark images: statistics of theirs alone would undo what the network learned of others."""
    teacher = network_at_rest(SMALL)
    dark = 0.1 * X[:4] - 0.5
    kept = {"block3_sepconv1_pointwise": tuple(range(15))}
    found = {}
    for how in ("teacher", "images"):
        network = pruned(teacher, plan_of(SMALL, kept))
        refit(network, teacher, kept, dark, how)
        found[how] = apart(network, teacher)
    network = pruned(teacher, plan_of(SMALL, {}))
    refit(network, teacher, {}, dark)
    assert apart(network, teacher) < 1e-6
    assert found["teacher"] < 0.1 * found["images"]
