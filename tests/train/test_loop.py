"""The loop: resumed, averaged, with a teacher, it ends as it should."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow import SMALL, random_images, random_network
from torch import nn
from training import image_set

from edgexception.errors import BadArtifact, NotPossibleHere
from edgexception.train import loop
from edgexception.train.classifier import decaying
from edgexception.train.loop import Course, fit
from edgexception.train.objective import Objective, normalized
from edgexception.train.state import Keeper

IMAGES = image_set(random_images(24, (40, 40)), labels=np.arange(24) % 5)
COURSE = Course("model", steps=8, batch_size=8, learning_rate=0.01, ema=0.9)
GROUPS = partial(decaying, 0.01)
Weights = dict[str, torch.Tensor]


def fitted(course: Course = COURSE, **given: Any) -> Weights:
    architecture = SMALL.model_copy(update={"dropout": 0.3})
    network = given.pop("network", None) or random_network(architecture).requires_grad_(True)
    objective = given.pop("objective", Objective("normalized"))
    fit(network, objective, given.pop("images", IMAGES), course, GROUPS, **given)
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def kill_at(step: int, *now: object) -> None:
    if now[0] == step:
        raise Killed


# --- it goes on where it stopped


@pytest.mark.parametrize("kill", [2, 5])
def test_resumed_it_ends_with_the_bytes_of_an_undisturbed_run(tmp_path: Path, kill: int) -> None:
    whole = fitted()
    keeper = Keeper(tmp_path / "here", every_s=0.0)
    with pytest.raises(Killed):
        fitted(keeper=keeper, progress=partial(kill_at, kill))
    steps: list[int] = []
    assert same(fitted(keeper=keeper, progress=lambda *now: steps.append(now[0])), whole)
    assert steps == list(range(kill + 1, COURSE.steps + 1))


def test_it_saves_as_often_as_it_is_asked_to(tmp_path: Path) -> None:
    fitted(keeper=Keeper(tmp_path / "never", every_s=1e9))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("name", ["network/block1_conv1.weight", "average/predictions.bias"])
def test_every_kind_of_tensor_counts(tmp_path: Path, name: str) -> None:
    """A state with one tensor changed gives another network: none of them is idle."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    whole, keeper = fitted(), Keeper(tmp_path, every_s=0.0)
    with pytest.raises(Killed):
        fitted(keeper=keeper, progress=partial(kill_at, 3))
    for changed in (name, name.replace(name.split("/", 1)[0], "first"), "second/predictions.bias"):
        tensors = load_file(keeper.path)
        other = Keeper(tmp_path / changed.replace("/", "-"), every_s=1e9)
        other.folder.mkdir()
        tensors[changed] += 0.5
        save_file(tensors, other.path, metadata={"steps": "3"})
        assert not same(fitted(keeper=other), whole), changed


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, every_s=0.0)
    with pytest.raises(Killed):
        fitted(keeper=keeper, progress=partial(kill_at, 3))
    with pytest.raises(BadArtifact, match=r"training\.safetensors: .* remove this file"):
        fitted(replace(COURSE, ema=0.0), keeper=keeper)
    with pytest.raises(BadArtifact, match="3 steps of 3"):
        fitted(replace(COURSE, steps=3), keeper=keeper)


# --- what it ends with


def test_the_average_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from the weights after every step, decay 0.9 and its slow start."""
    seen: list[Weights] = []
    update = loop._Training.update

    def spy(self: Any, step: int) -> None:
        if not seen:
            seen.append({n: p.detach().clone() for n, p in self.network.named_parameters()})
        update(self, step)
        seen.append({n: p.detach().clone() for n, p in self.network.named_parameters()})

    monkeypatch.setattr(loop._Training, "update", spy)
    ended = fitted()
    for name, start in seen[0].items():
        mean = start.double()
        for step, weights in enumerate(seen[1:]):
            decay = min(0.9, (1 + step) / (10 + step))
            mean = decay * mean + (1 - decay) * weights[name].double()
        torch.testing.assert_close(ended[name].double(), mean, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ended[name], seen[-1][name])


def test_without_an_average_it_ends_with_the_last_step() -> None:
    last: list[Weights] = []
    network = random_network(SMALL).requires_grad_(True)

    def keep(*_: object) -> None:
        last[:] = [{n: p.detach().clone() for n, p in network.named_parameters()}]

    ended = fitted(replace(COURSE, ema=0.0), network=network, progress=keep)
    assert all(torch.equal(ended[name], value) for name, value in last[0].items())


def test_a_teacher_needs_no_labels() -> None:
    """The student was moved away from its teacher, and comes back on images without labels."""
    teacher = random_network(SMALL)
    student = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        student.predictions.weight.add_(0.1 * torch.randn_like(student.predictions.weight))
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    images = image_set(random_images(24, (40, 40)))
    assert images.labels is None
    losses: list[float] = []
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    objective = Objective("normalized", 1.0, teacher)
    fitted(
        replace(COURSE, steps=40, ema=0.0),
        network=student,
        objective=objective,
        images=images,
        progress=lambda *now: losses.append(now[3]),
    )
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert same(before, teacher.state_dict())


def test_labels_and_teacher_are_weighed() -> None:
    teacher, network = random_network(SMALL), random_network(SMALL, seed=1)
    x, labels = normalized(IMAGES, np.arange(8)), torch.arange(8) % 5
    parts = [
        Objective("normalized", w, teacher).losses(network, x, labels) for w in (0.0, 0.3, 1.0)
    ]
    torch.testing.assert_close(parts[1], 0.7 * parts[0] + 0.3 * parts[2])
    own = Objective("normalized", 1.0, network).losses(network, x, None)
    assert not own.any()


def test_threads_are_those_of_the_course() -> None:
    seen: set[int] = set()
    two = replace(COURSE, threads=2, steps=1, batch_size=4)
    fitted(two, progress=lambda *_: seen.add(torch.get_num_threads()))
    assert seen == {2}


def processor(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """Let torch say that this processor has, or has not, instructions for bfloat16."""
    found = {"architecture": "x86_64", "avx512_bf16": bfloat16, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=False)
    with pytest.raises(NotPossibleHere, match="bfloat16: this processor has no"):
        fitted(replace(COURSE, bfloat16=True))


def test_bfloat16_is_rounder_and_ends_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bfloat16=True)
    exact, rounded = fitted(), fitted(replace(COURSE, bfloat16=True))
    assert {v.dtype for n, v in rounded.items() if "tracked" not in n} == {torch.float32}
    assert not same(exact, rounded)
