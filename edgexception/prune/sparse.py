"""Which weights of 1x1 convolutions go, so that two of every four in a row are zero.

Column by column, from the first to the last: of each four, the two whose loss the columns after
them can make up for best go, and these do so (Frantar and Alistarh, "SparseGPT", 2023, section 3;
Hassibi and Stork, "Optimal brain surgeon", 1993). Every output channel has its own two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from edgexception.errors import UsageError
from edgexception.model.sparsity import GROUP, KEPT
from edgexception.model.xception import Xception
from edgexception.prune.plan import Structure


def pointwise_layers(network: Xception) -> tuple[str, ...]:
    """Return the 1x1 convolutions, by the names of the graph, in its order."""
    return tuple(
        name.replace(".", "_")
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    )


def layers_to_thin(
    network: Xception, structure: Structure, kept: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Return the 1x1 convolutions of a network when its groups keep those channels.

    Raises UsageError naming the first whose input channels are no multiple of 4.
    """
    widths = structure.widths | {name: len(channels) for name, channels in kept.items()}
    inputs = {layer.name: widths[layer.inputs] for layer in structure.layers}
    found = pointwise_layers(network)
    for name in found:
        if inputs[name] % GROUP:
            raise UsageError(
                f"prune.sparsity: 2:4 takes 4 input channels at a time, and {name} has "
                f"{inputs[name]}; the nearest possible is {max(GROUP, inputs[name] // 4 * 4)}. Set "
                "prune.align to a multiple of 4, or leave sparsity out"
            )
    return found


def thinned(weight: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Return weights (K, C, 1, 1) of which two of every four are zero, the others moved.

    `power` (C, C) is the positive definite sum of the products of the inputs: what the squared
    error of the outputs follows from.
    """
    left = weight.flatten(1).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(power))
    hand_on = torch.linalg.cholesky(inverse, upper=True)
    diagonal = hand_on.diagonal()
    for first in range(0, left.shape[1], GROUP):
        # The four as they are by now, which the ones before have been handed to.
        four = slice(first, first + GROUP)
        losses = (left[:, four] / diagonal[four]) ** 2
        goes = losses.topk(GROUP - KEPT, dim=1, largest=False).indices
        gone = torch.zeros_like(losses, dtype=torch.bool).scatter_(1, goes, True)
        for column in range(first, first + GROUP):
            away = gone[:, column - first]
            error = torch.where(away, left[:, column], 0.0) / diagonal[column]
            left[:, column:] -= torch.outer(error, hand_on[column, column:])
            left[away, column] = 0.0
    return left.view_as(weight).float()
