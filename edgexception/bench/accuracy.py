"""Accuracy of logits against labels, and their fidelity to the float network's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.bench.statistics import (
    Floats,
    Proportion,
    agreement,
    sqnr_db,
    topk_correct,
    wilson,
)


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose label is the first, or among the first five, of the logits."""

    top1: Proportion
    top5: Proportion | None
    """None with five classes or fewer, where it would always be 1."""


@dataclass(frozen=True)
class Fidelity:
    """How near logits are to the reference of the float network, on the same images."""

    agreement: Proportion | None
    """Share of images with the same greatest logit; None where there is one logit only."""
    sqnr_db: float
    """Signal to noise of all logits in dB; inf where they are equal."""
    max_abs_difference: float


def accuracy(logits: Floats, labels: NDArray[np.integer[Any]]) -> Accuracy:
    """Judge float logits (N, classes) by integer labels (N,)."""
    images, classes = logits.shape
    top5 = wilson(topk_correct(logits, labels, 5), images) if classes > 5 else None
    return Accuracy(wilson(topk_correct(logits, labels, 1), images), top5)


def fidelity(reference: Floats, measured: Floats) -> Fidelity:
    """Compare logits (N, classes) with the float network's."""
    images, classes = reference.shape
    return Fidelity(
        wilson(agreement(reference, measured), images) if classes > 1 else None,
        sqnr_db(reference, measured),
        float(np.abs(np.subtract(measured, reference, dtype=np.float64)).max()),
    )
