"""BatchNorm in training: statistics of the whole batch on several processes, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import cast

import torch
from torch import nn

from edgexception.train.processes import add_up, size

MOST_SETTLING = 4096
"""Images that settle the statistics: a channel's mean over them is off by 1/64 of its deviation, or
less, since each image has many pixels."""


@contextmanager
def whole_batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorms see the batch of all processes, as one process would see it.

    torch's own SyncBatchNorm does so on GPUs only.
    """
    found = norms(network) if size() > 1 else []
    for norm in found:
        norm.forward = MethodType(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in found:
            del norm.forward


def _forward(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Compute what BatchNorm2d in training does, from sums over all processes, in two passes."""
    count = add_up(torch.tensor([x.numel() / x.shape[1]], device=x.device))
    mean = add_up(x.sum(dim=(0, 2, 3))) / count
    centered = x - mean.view(1, -1, 1, 1)
    variance = add_up((centered**2).sum(dim=(0, 2, 3))) / count
    with torch.no_grad():
        seen = cast(torch.Tensor, norm.num_batches_tracked).add_(1)
        share = norm.momentum if norm.momentum is not None else 1.0 / float(seen)
        cast(torch.Tensor, norm.running_mean).lerp_(mean, share)
        cast(torch.Tensor, norm.running_var).lerp_(variance * count / (count - 1), share)
    factor = norm.weight * torch.rsqrt(variance + norm.eps)
    return centered * factor.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return every BatchNorm of a network."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def settle(
    network: nn.Module,
    batches: Callable[[], Iterator[torch.Tensor]],
) -> None:
    """Set the statistics of every BatchNorm to their mean over some batches, weights unchanged.

    The running averages of training lag behind the weights, and after a few dozen steps they still
    hold a share of their initial values; with little data that alone costs most of the accuracy.
    """
    found = norms(network)
    momenta = [norm.momentum for norm in found]
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    network.train()
    with torch.no_grad():
        for batch in batches():
            network(batch)
    for norm, momentum in zip(found, momenta, strict=True):
        norm.momentum = momentum
