"""Learned rounding: which of its two neighbouring levels each weight takes, and what it aims at.

Rounding every weight to the nearest level is best for the weights and not for the outputs: errors
of weights that read correlated inputs add up or cancel. And the float weights themselves are not
the best aim where the inputs have been rounded: noise of directions in which the signal is small
can be attenuated. With X the inputs of the float network, Y those that the quantized layers before
really produce, and Q the weights to find on their grid, a layer asks for the least

    |W X - Q Y|^2  =  |(T - Q) Y|^2 + what no Q can change,   T = W X Y' (Y Y')^-1.

T has a closed form, and |(T - Q) Y|^2 is descended column by column: each is rounded, and its error
goes to those not rounded yet, as far as they can make up for it (Frantar et al. 2023, "GPTQ",
section 3; Hassibi and Stork 1993, "Optimal brain surgeon"). No gradient descent and no label: it
takes seconds where AdaRound (Nagel et al. 2020) takes an hour, and repeats to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from edgexception.quantize.biases import Pair
from edgexception.quantize.plan import WeightQuant

DAMPING = 0.01
"""Added to the inputs' second moments, as a share of their mean: it keeps weights whose inputs
calibration hardly saw where they were."""
BLOCK = 128
"""Columns whose errors are handed on at once: larger matrix products, the same result."""


def learned_weight(
    layer: nn.Conv2d | nn.Linear, grid: WeightQuant, inputs: Iterable[Pair]
) -> torch.Tensor:
    """Return the weights of `layer` on `grid` that best repeat its float outputs on `inputs`.

    The quantized inputs lie on their own grid already. Where the layer has a bias, its mean output
    is left to that bias.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight.detach().reshape(groups, len(layer.weight) // groups, -1).double()
    second, cross = _moments(layer, groups, inputs)
    diagonal = second.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(dim=1, keepdim=True).clamp_min(1e-30)
    damped = second + torch.diag_embed(damping.expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    target = weight + weight @ cross @ inverse
    steps = torch.tensor(grid.scales, dtype=torch.float64).view(groups, -1)
    order = diagonal.argsort(dim=1, descending=True)
    return _descend(target, steps, grid.limit, inverse, order).float().view_as(layer.weight)


def _moments(
    layer: nn.Conv2d | nn.Linear, groups: int, inputs: Iterable[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of Y Y' and (X - Y) Y' over images and positions, (groups, K, K) each.

    Both are around the means of X and Y where the layer has a bias.
    """
    second = cross = sums = torch.zeros((), dtype=torch.float64)
    count = 0
    for exact, quantized in inputs:
        read, lost = (_patches(layer, v, groups) for v in (quantized, exact - quantized))
        second = second + (read @ read.mT).double().sum(dim=0)
        cross = cross + (lost @ read.mT).double().sum(dim=0)
        sums = sums + torch.stack((read.sum(dim=(0, 3)), lost.sum(dim=(0, 3)))).double()
        count += len(read) * read.shape[3]
    if layer.bias is not None:
        mean_read, mean_lost = sums / count
        second = second - mean_read.unsqueeze(2) * mean_read.unsqueeze(1) * count
        cross = cross - mean_lost.unsqueeze(2) * mean_read.unsqueeze(1) * count
    return second / count, cross / count


def _patches(layer: nn.Conv2d | nn.Linear, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return what the weights are multiplied with: (parts, groups, K, positions).

    The parts are images; but of a layer without groups, whose K x K products are large, the images'
    positions stand side by side in one part.
    """
    if isinstance(layer, nn.Linear):
        taps = x.unsqueeze(2)
    elif layer.kernel_size == (1, 1) and layer.stride == (1, 1):
        taps = x.flatten(2)
    else:
        padding = cast(tuple[int, int], layer.padding)
        taps = functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    if groups == 1:
        return taps.transpose(0, 1).flatten(1)[None, None]
    return taps.unflatten(1, (groups, -1))


def _descend(
    target: torch.Tensor,
    steps: torch.Tensor,
    limit: int,
    inverse: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    """Round (groups, rows, K) to multiples of `steps` (groups, rows), columns as in `order`.

    `inverse` is that of the inputs' second moments, (groups, K, K).
    """
    columns = order.unsqueeze(1)
    by_rows = inverse.gather(1, order.unsqueeze(2).expand_as(inverse))
    hand_on = torch.linalg.cholesky(by_rows.gather(2, columns.expand_as(inverse)), upper=True)
    weight = target.gather(2, columns.expand_as(target)).clone()
    width = weight.shape[2]
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        errors = torch.zeros_like(weight[:, :, first:last])
        for column in range(first, last):
            found = weight[:, :, column]
            rounded = torch.round(found / steps).clamp(-limit, limit) * steps
            error = (found - rounded) / hand_on[:, column, column].unsqueeze(1)
            weight[:, :, column:last] -= error.unsqueeze(2) * hand_on[:, None, column, column:last]
            weight[:, :, column] = rounded
            errors[:, :, column - first] = error
        weight[:, :, last:] -= errors @ hand_on[:, first:last, last:]
    return torch.zeros_like(weight).scatter_(2, columns.expand_as(weight), weight)
