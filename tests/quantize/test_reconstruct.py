"""Sequential reconstruction: what was learned before an interruption is not learned again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import minmax_plan, random_images, small_graph
from torch import fx, nn

from edgexception.errors import BadArtifact
from edgexception.model.graph import layers, to_graph_input
from edgexception.quantize import reconstruct as module
from edgexception.quantize.reconstruct import reconstruct
from edgexception.quantize.rounding import learned_weight
from edgexception.train.state import Keeper

PIXELS = random_images(8, (40, 40), seed=7)
INPUTS = list(to_graph_input(torch.from_numpy(PIXELS)).split(4))


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def learned(
    graph: fx.GraphModule,
    keeper: Keeper | None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> fx.GraphModule:
    plan = minmax_plan(graph, PIXELS)
    return reconstruct(
        graph,
        plan.activations,
        plan.weights,
        INPUTS,
        rounding=True,
        biases=True,
        keeper=keeper,
        progress=progress,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("nodes", [2, 9, 10_000])
def test_it_goes_on_where_it_was_interrupted_and_ends_with_the_same_bytes(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, keeper = small_graph(), Keeper(tmp_path, every_s=0.0)

    def interrupt(done: int, total: int) -> None:
        if done == min(nodes, total - 1):
            raise Interrupted

    with pytest.raises(Interrupted):
        learned(graph, keeper, interrupt)
    fitted: list[tuple[int, ...]] = []

    def watched(layer: nn.Conv2d | nn.Linear, *given: Any) -> torch.Tensor:
        fitted.append(tuple(layer.weight.shape))
        return learned_weight(layer, *given)

    monkeypatch.setattr(module, "learned_weight", watched)
    resumed = learned(graph, keeper).state_dict()
    after = len(fitted)
    whole = learned(graph, None).state_dict()
    assert after < len(fitted) - after == len(layers(graph))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_is_of_another_network_is_refused(tmp_path: Path) -> None:
    graph, keeper = small_graph(), Keeper(tmp_path, every_s=0.0)
    learned(graph, keeper)
    found = layers(graph)
    first = next(iter(found.values()))
    first.weight = nn.Parameter(first.weight.detach()[:, :, :, :2], requires_grad=False)
    with pytest.raises(BadArtifact, match="has the shape"):
        learned(graph, keeper)
