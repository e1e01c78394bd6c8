from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats

from edgexception.bench.accuracy import accuracy, fidelity
from edgexception.bench.statistics import (
    NOISY_FACTOR,
    LatencySummary,
    agreement,
    ratio_of_medians,
    sqnr_db,
    topk_correct,
    wilson,
)
from edgexception.errors import MeasurementInvalid

QUICK = settings(max_examples=150, deadline=None)
FINITE = st.floats(-1e4, 1e4, width=32)
LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 12)), elements=FINITE)
TIMES = hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(1, 10**9))


@QUICK
@given(st.integers(1, 5000), st.data(), st.floats(0.5, 0.999))
def test_wilson_is_scipys(trials: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, trials))
    found = wilson(successes, trials, confidence)
    wanted = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert found.value == successes / trials
    assert found.low == pytest.approx(wanted.low, abs=1e-9)
    assert found.high == pytest.approx(wanted.high, abs=1e-9)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_nine_of_nine_is_far_from_certain() -> None:
    assert wilson(9, 9).low == pytest.approx(0.7008, abs=1e-4)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_proportion(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, trials)


@QUICK
@given(st.lists(TIMES, min_size=1, max_size=4))
def test_the_summary_is_numpys_over_all_rounds(rounds: list[NDArray[np.int64]]) -> None:
    found = LatencySummary.of(rounds)
    raw = np.concatenate(rounds) / 1e6
    assert found.iterations == len(raw)
    assert found.min_ms == raw.min()
    assert found.median_ms == pytest.approx(np.median(raw))
    assert found.p90_ms == pytest.approx(stats.scoreatpercentile(raw, 90))
    assert found.p99_ms == pytest.approx(stats.scoreatpercentile(raw, 99))
    assert found.cov == pytest.approx(stats.variation(raw), abs=1e-12)
    assert found.min_ms <= found.median_ms <= found.p90_ms <= found.p99_ms


def test_rounds_far_apart_are_noisy_and_stay() -> None:
    quiet = np.full(50, 10_000_000)
    assert not LatencySummary.of([quiet, quiet + 900_000]).noisy
    found = LatencySummary.of([quiet, (quiet * NOISY_FACTOR).astype(np.int64) + 100_000])
    assert found.noisy
    assert found.round_medians_ms == (10.0, 11.1)


@pytest.mark.parametrize("rounds", [[], [np.array([], np.int64)], [np.array([5, 0])]])
def test_times_that_cannot_be_are_refused(rounds: list[NDArray[np.int64]]) -> None:
    with pytest.raises(MeasurementInvalid):
        LatencySummary.of(rounds)


@QUICK
@given(LOGITS, st.floats(-40, 80))
def test_sqnr_of_noise_scaled_to_a_level_is_that_level(
    reference: NDArray[np.float32], level: float
) -> None:
    noise = np.random.default_rng(0).normal(size=reference.shape)
    signal = float(np.square(reference, dtype=np.float64).sum())
    if signal < 1e-3:
        return
    noise *= math.sqrt(signal / np.square(noise).sum() * 10 ** (-level / 10))
    assert sqnr_db(reference, reference + noise) == pytest.approx(level, abs=1e-3)


@QUICK
@given(LOGITS)
def test_equal_logits_agree_without_noise(logits: NDArray[np.float32]) -> None:
    found = fidelity(logits, logits.copy())
    assert found.sqnr_db == math.inf
    assert found.max_abs_difference == 0.0
    if logits.shape[1] > 1:
        assert found.agreement is not None
        assert found.agreement.value == 1.0


def test_one_logit_cannot_disagree() -> None:
    found = fidelity(np.ones((9, 1)), -np.ones((9, 1)))
    assert found.agreement is None
    assert found.max_abs_difference == 2.0


def test_sqnr_does_not_overflow_float16() -> None:
    large = np.full((4, 1000), 200.0, np.float16)
    assert sqnr_db(large, large * np.float16(0.5)) == pytest.approx(10 * math.log10(4))


def test_sqnr_of_a_silent_reference_is_the_worst() -> None:
    assert sqnr_db(np.zeros((1, 2)), np.ones((1, 2))) == -math.inf


@QUICK
@given(LOGITS, st.data())
def test_top_k_counts_like_a_stable_sort(logits: NDArray[np.float32], data: st.DataObject) -> None:
    images, classes = logits.shape
    labels = data.draw(hnp.arrays(np.int64, images, elements=st.integers(0, classes - 1)))
    k = data.draw(st.integers(1, classes))
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k]
    assert topk_correct(logits, labels, k) == int((order == labels[:, None]).any(axis=1).sum())


@QUICK
@given(LOGITS, st.data())
def test_top_1_is_argmax_also_with_ties(logits: NDArray[np.float32], data: st.DataObject) -> None:
    logits = np.round(logits / 5000)
    labels = logits.argmax(axis=1)
    assert topk_correct(logits, labels, 1) == len(logits)
    assert agreement(logits, logits) == len(logits)


def test_labels_outside_the_classes_are_refused() -> None:
    for label in (-1, 3):
        with pytest.raises(ValueError, match="outside the 3 classes"):
            topk_correct(np.zeros((1, 3)), np.array([label]), 1)


def test_accuracy_has_no_top_5_of_five_classes() -> None:
    logits = np.eye(6, dtype=np.float32)
    found = accuracy(logits, np.array([0, 1, 2, 3, 4, 0]))
    assert (found.top1.successes, found.top1.trials) == (5, 6)
    # Image 5: class 5 leads, classes 0 to 4 tie behind it, the first of equals first.
    assert found.top5 is not None
    assert found.top5.successes == 6
    assert accuracy(logits[:5, :5], np.arange(5)).top5 is None


# --- the ratio of medians -----------------------------------------------------------------------


def lognormal(
    random: np.random.Generator, median: float, count: int, spread: float = 0.05
) -> NDArray[np.int64]:
    return (median * random.lognormal(0.0, spread, count) * 1e6).astype(np.int64)


def test_the_interval_matches_a_bootstrap_by_hand() -> None:
    random = np.random.default_rng(1)
    slow, fast = lognormal(random, 20, 41), lognormal(random, 10, 41)
    found = ratio_of_medians([slow], [fast], resamples=20_000)
    by_hand = [
        np.median(random.choice(slow, 41)) / np.median(random.choice(fast, 41))
        for _ in range(20_000)
    ]
    low, high = np.quantile(by_hand, (0.025, 0.975))
    assert found.value == np.median(slow) / np.median(fast)
    assert found.low == pytest.approx(low, rel=2e-3)
    assert found.high == pytest.approx(high, rel=2e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        slow = [lognormal(random, 20, 60) for _ in range(1)]
        fast = [lognormal(random, 8, 60) for _ in range(1)]
        found = ratio_of_medians(slow, fast, resamples=500, seed=trial)
        covered += found.low <= 2.5 <= found.high
    assert 180 <= covered <= 199


def test_a_slow_spell_that_hits_a_round_of_both_cancels() -> None:
    random = np.random.default_rng(3)
    spells = (1.0, 1.4, 1.1)
    slow = [lognormal(random, 20 * spell, 200) for spell in spells]
    fast = [lognormal(random, 10 * spell, 200) for spell in spells]
    found = ratio_of_medians(slow, fast)
    assert found.low <= 2.0 <= found.high
    assert found.high - found.low < 0.08
    crossed = ratio_of_medians(slow, [fast[1], fast[2], fast[0]])
    # The rounds' ratios are now 1.43, 2.55 and 2.2: rounds that disagree widen the interval.
    assert crossed.low < 1.75
    assert crossed.high > 2.3


@QUICK
@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=3))
def test_the_ratio_lies_in_its_interval_and_turns_around(
    pairs: list[tuple[NDArray[Any], NDArray[Any]]],
) -> None:
    slow, fast = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = ratio_of_medians(slow, fast, resamples=200)
    assert 0 < found.low <= found.value <= found.high < math.inf
    assert ratio_of_medians(fast, slow, resamples=200).value == pytest.approx(1 / found.value)


def test_it_is_the_same_each_time_and_needs_pairs() -> None:
    random = np.random.default_rng(4)
    slow, fast = [lognormal(random, 2, 30)], [lognormal(random, 1, 30)]
    assert ratio_of_medians(slow, fast) == ratio_of_medians(slow, fast)
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio_of_medians(slow, fast * 2)
