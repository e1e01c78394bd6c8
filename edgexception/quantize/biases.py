"""Bias correction: a layer's mean output is brought back to that of the float network.

Rounding weights and clipping activations shifts the mean of a layer's outputs, and a shift is worse
than noise of the same size: it is the same at every position and adds up over layers (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, the
empirical form).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]
"""A tensor of the float network and the same of the quantized one, (N, C, H, W) or (N, C)."""

RECTIFIED_STEPS = 4
"""Newton steps where a ReLU follows, whose slope is the share of positive values."""
LEAST_ACTIVE = 0.05
"""Least slope of such a step: a channel that is nearly always off is not moved far."""


def correct_bias(
    layer: nn.Conv2d | nn.Linear,
    outputs: list[Pair],
    rectified: bool,
) -> list[Pair]:
    """Move a layer's bias until its mean output per channel is the float one's, in place.

    `outputs` are the layer's before; those after are returned.

    Where only a ReLU reads the layer, it is the mean after the ReLU: noise around zero comes out of
    a ReLU with a positive mean, and a correction before it would leave that in.
    """
    shift = torch.zeros(outputs[0][0].shape[1])
    column = [1, -1, *[1] * (outputs[0][0].ndim - 2)]
    for _ in range(RECTIFIED_STEPS if rectified else 1):
        error, active = torch.zeros(2, len(shift), dtype=torch.float64)
        for exact, quantized in outputs:
            moved = quantized + shift.view(column)
            if rectified:
                active += _sums(moved > 0)
                error += _sums(exact.relu() - moved.relu())
            else:
                error += _sums(exact - moved)
        count = sum(exact.numel() for exact, _ in outputs) / len(shift)
        slope = (active / count).clamp_min(LEAST_ACTIVE) if rectified else 1.0
        shift = shift + (error / count / slope).float()
    layer.bias = nn.Parameter(cast(torch.Tensor, layer.bias) + shift, requires_grad=False)
    return [(exact, quantized + shift.view(column)) for exact, quantized in outputs]


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum per channel in float64."""
    return values.double().sum(dim=[axis for axis in range(values.ndim) if axis != 1])
