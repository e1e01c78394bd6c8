"""Learned rounding: against nearest rounding, exhaustive search and what it cannot change."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgexception.quantize.plan import WeightQuant
from edgexception.quantize.rounding import learned_weight

LAYERS = {
    "pointwise": lambda: nn.Conv2d(12, 16, 1, bias=False),
    "shortcut": lambda: nn.Conv2d(12, 16, 1, stride=2, bias=False),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
    "stem": lambda: nn.Conv2d(12, 16, 3, stride=2, bias=False),
    "dense": lambda: nn.Linear(12, 16),
}


def coarse_grid(layer: nn.Conv2d | nn.Linear, levels: int = 7) -> WeightQuant:
    """A grid of few levels, whose rounding is seen well above float noise."""
    largest = layer.weight.detach().abs().flatten(1).amax(dim=1)
    return WeightQuant(scales=tuple((largest / levels).tolist()), bits=8)


def nearest(weight: torch.Tensor, grid: WeightQuant) -> torch.Tensor:
    steps = torch.tensor(grid.scales).view(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / steps) * steps


def smooth_inputs(count: int, seed: int = 0, shape: tuple[int, ...] = (12, 9, 9)) -> torch.Tensor:
    """Inputs with few degrees of freedom, as a trained network's: channels and neighbours agree."""
    generator = torch.Generator().manual_seed(seed)
    channels, *size = shape
    coarse = torch.randn(count, 3, *[3] * len(size), generator=generator)
    grown = nn.functional.interpolate(coarse, size, mode="bilinear") if size else coarse
    mix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(1))
    found = torch.einsum("ck,nk...->nc...", mix, grown)
    return found + 0.05 * torch.randn(found.shape, generator=generator)


def inputs_of(layer: nn.Module, count: int, seed: int = 0) -> torch.Tensor:
    return smooth_inputs(count, seed, (12,) if isinstance(layer, nn.Linear) else (12, 9, 9))


def output_error(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the power of the error of a layer's outputs, around its mean if it has a bias."""
    exact = layer(x)
    kept, layer.weight = layer.weight, nn.Parameter(weight)
    lost = exact - layer(x)
    layer.weight = kept
    if layer.bias is not None:
        lost = lost - lost.mean(dim=0)
    return float(lost.detach().square().mean())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_outputs_are_nearer_than_with_the_nearest_levels(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    grid, x = coarse_grid(layer), inputs_of(layer, 32)
    learned = learned_weight(layer, grid, x.split(8))
    unseen = inputs_of(layer, 32, seed=5)
    errors = [
        output_error(layer, weight, unseen)
        for weight in (nearest(layer.weight.detach(), grid), learned)
    ]
    assert errors[1] < 0.5 * errors[0], errors


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 1000), st.sampled_from((7, 8)))
def test_every_weight_is_a_level(kind: str, seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    grid = coarse_grid(layer, levels=100).model_copy(update={"bits": bits})
    x = inputs_of(layer, 4, seed)
    y = x + 0.1 * torch.randn(x.shape)
    learned = learned_weight(layer, grid, [y])
    steps = torch.tensor(grid.scales).view(-1, *[1] * (learned.ndim - 1))
    levels = learned / steps
    assert learned.shape == layer.weight.shape
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.abs().max()) <= grid.limit + 1e-4


def test_inputs_without_correlation_leave_the_nearest_levels() -> None:
    layer = nn.Linear(12, 16, bias=False)
    grid, x = coarse_grid(layer), torch.eye(12)
    learned = learned_weight(layer, grid, [x])
    assert torch.allclose(learned, nearest(layer.weight.detach(), grid), atol=1e-6)


def test_inputs_that_are_always_zero_leave_the_nearest_levels() -> None:
    layer = nn.Conv2d(12, 16, 1)
    grid, x = coarse_grid(layer), torch.zeros(4, 12, 5, 5)
    learned = learned_weight(layer, grid, [x])
    assert torch.allclose(learned, nearest(layer.weight.detach(), grid), atol=1e-6)


def test_it_is_near_the_best_of_all_roundings() -> None:
    """Of each weight's two neighbours, 2^8 combinations a row, the best is searched."""
    torch.manual_seed(3)
    layer = nn.Linear(8, 64, bias=False)
    grid = coarse_grid(layer)
    x = smooth_inputs(200, shape=(8,))
    steps = torch.tensor(grid.scales).view(-1, 1)
    weight = layer.weight.detach()
    floors = torch.floor(weight / steps)
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    tried = (floors.unsqueeze(1) + ways) * steps.unsqueeze(1)  # (rows, ways, 8)
    lost = torch.einsum("rwk,nk->rwn", tried - weight.unsqueeze(1), x)
    best = lost.square().mean(dim=2).amin(dim=1)
    errors = [
        ((found - weight) @ x.T).square().mean(dim=1)
        for found in (nearest(weight, grid), learned_weight(layer, grid, [x]))
    ]
    excess = [float((error - best).mean()) for error in errors]
    assert excess[0] > 4.0 * float(best.mean())  # there is something to find
    assert excess[1] < 0.2 * excess[0]


def test_a_bias_keeps_the_mean_out_of_the_fit() -> None:
    """The mean of the outputs is the bias's to correct; weights must not bend for it."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, 1)
    grid = coarse_grid(layer, levels=127)
    x = smooth_inputs(32)
    plain, shifted = (learned_weight(layer, grid, [x + shift]) for shift in (0.0, 8.0))
    assert float((plain != shifted).float().mean()) < 0.05
    layer.bias = None
    plain, shifted = (learned_weight(layer, grid, [x + shift]) for shift in (0.0, 8.0))
    assert float((plain != shifted).float().mean()) > 0.2
