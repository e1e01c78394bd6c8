"""What raw measurements say: latency summaries, intervals, signal to noise.

Everything here is a function of raw arrays that are kept, so every figure can be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.errors import MeasurementInvalid

NOISY_FACTOR = 1.10
"""Slowest round's median / fastest round's median from which a measurement is called noisy."""

Times = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LatencySummary:
    """Latency of one engine in ms, over every iteration of all rounds.

    `cov` is standard deviation / mean. `noisy` says that the rounds' medians lie further apart than
    NOISY_FACTOR: the row stands, but small differences to it mean nothing.
    """

    min_ms: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    cov: float
    iterations: int
    round_medians_ms: tuple[float, ...]
    noisy: bool

    @classmethod
    def of(cls, rounds: Sequence[Times]) -> LatencySummary:
        """Summarize raw times in ns, one array a round."""
        _check_times(rounds)
        raw = np.concatenate(rounds) / 1e6
        medians = tuple(float(np.median(times)) / 1e6 for times in rounds)
        p50, p90, p99 = (float(value) for value in np.percentile(raw, (50, 90, 99)))
        return cls(
            min_ms=float(raw.min()),
            median_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            cov=float(raw.std() / raw.mean()),
            iterations=len(raw),
            round_medians_ms=medians,
            noisy=max(medians) > NOISY_FACTOR * min(medians),
        )


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Proportion:
    """A share of trials with its Wilson interval."""

    successes: int
    trials: int
    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Proportion:
    """Return successes / trials with Wilson's score interval (E. B. Wilson, 1927).

    Unlike the usual normal interval it stays within 0...1 and is right for few trials and shares
    near 1: 9 of 9 gives 0.70...1.
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"no proportion: {successes} of {trials} at confidence {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    center = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / scale
    # At the ends the formula is exact; rounding must not leave 1 - 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == trials else min(1.0, center + half)
    return Proportion(successes, trials, share, low, high)


def sqnr_db(reference: Floats, measured: Floats) -> float:
    """Return 10 log10 of signal power / noise power in dB; inf where both are equal.

    Power is the sum of squares over all elements; the noise is measured - reference.
    """
    _check_pair(reference, measured)
    signal = np.square(reference, dtype=np.float64).sum()
    noise = np.square(np.subtract(measured, reference, dtype=np.float64)).sum()
    if noise == 0.0:
        return math.inf
    return float(10 * np.log10(signal / noise)) if signal > 0 else -math.inf


def topk_correct(logits: Floats, labels: NDArray[np.integer[Any]], k: int) -> int:
    """Count images whose label is among the k largest logits; of equals the first class leads."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not fit")
    classes = logits.shape[1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"a label lies outside the {classes} classes")
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(classes)[None, :] < labels[:, None]
    rank = ((logits > of_label) | ((logits == of_label) & earlier)).sum(axis=1)
    return int((rank < k).sum())


def agreement(reference: Floats, measured: Floats) -> int:
    """Count the images on which both decide for the same class."""
    _check_pair(reference, measured)
    return int((reference.argmax(axis=1) == measured.argmax(axis=1)).sum())


def ratio_of_medians(
    slow: Sequence[Times],
    fast: Sequence[Times],
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Return how many times `fast` is faster than `slow`, with a bootstrap interval.

    The rounds are pairs: round i of both was measured close in time, so what slows the machine for
    a while slows both. The value is the geometric mean of the rounds' ratios of medians. The
    bootstrap draws rounds, and within each the iterations, with replacement; with one
    round only the noise within it is seen.
    """
    _check_times(slow)
    _check_times(fast)
    if len(slow) != len(fast):
        raise ValueError(f"{len(slow)} rounds cannot be paired with {len(fast)}")
    random = np.random.default_rng(seed)
    logs = np.empty((len(slow), resamples))
    values = np.empty(len(slow))
    for index, (one, other) in enumerate(zip(slow, fast, strict=True)):
        values[index] = math.log(float(np.median(one)) / float(np.median(other)))
        medians = (_resampled_medians(times, resamples, random) for times in (one, other))
        logs[index] = np.log(next(medians)) - np.log(next(medians))
    drawn = random.integers(0, len(slow), (len(slow), resamples))
    means = np.take_along_axis(logs, drawn, axis=0).mean(axis=0)
    tail = (1 - confidence) / 2
    low, high = np.exp(np.quantile(means, (tail, 1 - tail)))
    value = math.exp(float(values.mean()))
    return Interval(value, min(float(low), value), max(float(high), value))


def _resampled_medians(
    times: Times, resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Return medians of bootstrap samples without drawing the samples.

    The middle of n draws from an empirical distribution is its quantile at the middle of n uniform
    numbers, which is Beta(k, n + 1 - k) distributed: the same law, in O(1) per median.
    """
    n = len(times)
    lower = (n + 1) // 2
    quantile = random.beta(lower, n + 1 - lower, resamples)
    places = np.minimum((quantile * n).astype(np.int64), n - 1)
    return np.sort(times)[places].astype(np.float64)


def _check_times(rounds: Sequence[Times]) -> None:
    if not rounds or any(times.ndim != 1 or not len(times) for times in rounds):
        raise MeasurementInvalid("a latency measurement has a round without iterations")
    if any(int(times.min()) <= 0 for times in rounds):
        raise MeasurementInvalid(
            "an iteration took no time: the clock of this device is too coarse for this network"
        )


def _check_pair(reference: Floats, measured: Floats) -> None:
    if reference.shape != measured.shape or reference.size == 0:
        raise ValueError(f"shapes {reference.shape} and {measured.shape} do not fit")
