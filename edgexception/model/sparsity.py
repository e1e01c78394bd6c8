"""2:4 sparsity: of every four input channels in a row, two weights of each output channel are zero.

Tensor cores of NVIDIA GPUs from Ampere (SM80) on leave such zeros out. TensorRT's builder takes a
convolution for sparse whose weights (K, C, R, S) have, for every k, r and s, two zeros in each four
of C ("Sparsity", docs.nvidia.com/deeplearning/tensorrt, 10.16); C is a multiple of 4. It then times
sparse kernels and others, and the faster is taken: from about 256 channels on, says NVIDIA
(NVIDIA/TensorRT issue 3849).

A 1x1 convolution that is 2:4 stays so through training and rounding; that it is so is seen from its
weights alone, so that no mask can be lost on the way.
"""

from __future__ import annotations

import torch

GROUP = 4
"""Input channels in a row."""
KEPT = 2
"""Of which so many weights may differ from zero."""


def is_sparse(weight: torch.Tensor) -> bool:
    """Return whether the weights (K, C, 1, 1) of a 1x1 convolution are 2:4; all zeros are not."""
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or weight.shape[1] % GROUP:
        return False
    used = (weight != 0).view(len(weight), -1, GROUP).sum(dim=2)
    return bool((used <= KEPT).all()) and bool(used.any())


def zeros_of(weight: torch.Tensor) -> torch.Tensor | None:
    """Return where weights that are 2:4 are zero, and must stay so; None for all others."""
    return weight == 0 if is_sparse(weight) else None
