"""Two networks on the same labelled images: who decides otherwise, and does it matter?

The images on which both are right or both are wrong say nothing about the difference of their
accuracies; the others, here lost and gained, say all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.bench.statistics import Floats


@dataclass(frozen=True)
class Paired:
    """A network's decisions against a reference's, on the same labelled images."""

    images: int
    changed: int
    """Images on which they decide for different classes."""
    lost: int
    """Of these, where the reference is right."""
    gained: int
    """Of these, where the network is right."""
    difference: float
    """Top-1 accuracy less the reference's: (gained - lost) / images."""
    low: float
    high: float
    """Tango's 95% interval of the difference."""
    p_value: float
    """Of McNemar's exact test that both are equally accurate."""


def paired(reference: Floats, measured: Floats, labels: NDArray[np.integer[Any]]) -> Paired:
    """Compare the decisions of logits (N, classes) with those of reference logits; labels (N,)."""
    if reference.shape != measured.shape or labels.shape != reference.shape[:1] or not len(labels):
        raise ValueError(f"logits {reference.shape}, {measured.shape}, labels {labels.shape}")
    before, after = reference.argmax(axis=1), measured.argmax(axis=1)
    lost = int(((before == labels) & (after != labels)).sum())
    gained = int(((before != labels) & (after == labels)).sum())
    low, high = tango(gained, lost, len(labels))
    return Paired(
        images=len(labels),
        changed=int((before != after).sum()),
        lost=lost,
        gained=gained,
        difference=(gained - lost) / len(labels),
        low=low,
        high=high,
        p_value=mcnemar_exact(lost, gained),
    )


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return the two-sided p of lost against gained, if each image were as likely either.

    McNemar's test in its exact form: lost ~ Binomial(lost + gained, 1/2), twice the smaller tail
    (Q. McNemar, Psychometrika 12, 1947). 1.0 where nothing was lost or gained.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"{lost} lost and {gained} gained images")
    total, least = lost + gained, min(lost, gained)
    ways = term = 1
    for chosen in range(1, least + 1):
        term = term * (total - chosen + 1) // chosen
        ways += term
    return min(1.0, 2 * ways / (1 << total))  # whole numbers of any size: exact until this division


def tango(gained: int, lost: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of (gained - lost) / images, two shares of the same images.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998. Where nothing was lost or gained it
    still has a width, which the usual normal interval has not.
    """
    if min(gained, lost) < 0 or images < max(1, gained + lost) or not 0 < confidence < 1:
        raise ValueError(f"{gained} gained and {lost} lost of {images} at {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    value = (gained - lost) / images

    def score(difference: float) -> float:
        a = 2 * images
        b = (2 * images - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = images * (2 * share_lost + difference * (1 - difference))
        return (gained - lost - images * difference) / math.sqrt(variance)

    # The score falls with the difference, from +z at the lower limit to -z at the upper one.
    low = -1.0 if lost == images else _where_zero(lambda x: score(x) - z, -1.0, value)
    high = 1.0 if gained == images else _where_zero(lambda x: score(x) + z, value, 1.0)
    return low, high


def _where_zero(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function is zero between two ends, which are not asked."""
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
