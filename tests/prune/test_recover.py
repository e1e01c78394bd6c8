"""What a pruned network learns back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from narrow import SMALL, random_images, random_network
from test_apply import plan_of
from training import image_set

from edgexception.errors import UsageError
from edgexception.model.xception import Xception
from edgexception.prune.apply import pruned
from edgexception.prune.recover import recover
from edgexception.recipe_prune import RecoverySpec
from edgexception.train.objective import distance, normalized

IMAGES = image_set(random_images(12, (36, 36)))
KEPT = {"block3_sepconv2_pointwise": tuple(range(0, 16, 2)), "block1_conv2": (0, 1, 2, 4, 6)}


def apart(network: Xception, teacher: Xception) -> float:
    """The mean distance of the logits from the teacher's."""
    x = normalized(IMAGES, np.arange(len(IMAGES)))
    with torch.inference_mode():
        return float(distance(network(x), teacher(x)).mean())


def test_it_comes_nearer_to_the_unpruned_network() -> None:
    teacher = random_network(SMALL)
    answers = {name: value.clone() for name, value in teacher.state_dict().items()}
    network = pruned(teacher, plan_of(SMALL, KEPT))
    before = apart(network, teacher)
    spec = RecoverySpec(steps=30, batch_size=6, learning_rate=3e-3)
    found = recover(network, teacher, spec, IMAGES, KEPT)
    assert not found.training
    assert found.architecture.stem == (4, 5)
    assert apart(found, teacher) < 0.5 * before
    assert all(torch.equal(value, answers[name]) for name, value in teacher.state_dict().items())


def test_without_steps_the_fit_is_all_and_statistics_stay_while_it_learns() -> None:
    teacher = random_network(SMALL)

    def recovered(**changes: Any) -> dict[str, torch.Tensor]:
        network = pruned(teacher, plan_of(SMALL, KEPT))
        return recover(network, teacher, RecoverySpec(**changes), IMAGES, KEPT).state_dict()

    fitted, learned = (recovered(steps=steps, batch_size=6) for steps in (0, 3))
    measured = recovered(steps=3, batch_size=6, batchnorm="images")
    for name, value in fitted.items():
        if "running" in name:
            assert torch.equal(learned[name], value)
            assert not torch.equal(measured[name], value)
        elif "tracked" not in name:
            assert not torch.equal(learned[name], value), name


def test_one_image_a_step_is_refused() -> None:
    teacher = random_network(SMALL)
    with pytest.raises(UsageError, match=r"prune.recovery.batch_size 1 with 12 images"):
        recover(teacher, teacher, RecoverySpec(batch_size=1), IMAGES, None)
