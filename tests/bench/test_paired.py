"""Paired comparison: McNemar against SciPy, Tango's interval against the likelihood itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgexception.bench.paired import mcnemar_exact, paired, tango

counts = st.integers(0, 60)


@given(lost=st.integers(0, 400), gained=st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_mcnemar_is_scipys_binomial_test(lost: int, gained: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    if lost + gained == 0:
        assert mcnemar_exact(lost, gained) == 1.0
        return
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_images_is_quick_and_finite() -> None:
    assert mcnemar_exact(20_000, 20_000) == 1.0
    assert 0.0 <= mcnemar_exact(10_000, 12_000) < 1e-30
    with pytest.raises(ValueError, match="-1 lost"):
        mcnemar_exact(-1, 2)


@pytest.mark.parametrize(
    ("gained", "lost", "images", "low", "high"),
    [
        # Fagerland, Lydersen and Laake, "Recommended tests and confidence intervals for paired
        # binomial proportions", Statistics in Medicine 33, 2014, table IV: airway hyper-
        # responsiveness before and after a transplantation.
        (1, 7, 21, -0.517, -0.026),
        # Where nothing changed: z^2 / (n + z^2) to both sides.
        (0, 0, 100, -0.0370, 0.0370),
    ],
)
def test_tango_is_as_published(
    gained: int, lost: int, images: int, low: float, high: float
) -> None:
    assert tango(gained, lost, images) == pytest.approx((low, high), abs=5e-4)


def likelihood_score(gained: int, lost: int, images: int, difference: float) -> float:
    """The score with the most likely shares under the difference, found by looking at them all."""
    least, most = max(0.0, -difference), (1 - difference) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(12):
            lost_shares = np.linspace(least, most, 401)
            log = np.zeros_like(lost_shares)
            for number, share in (
                (lost, lost_shares),
                (gained, lost_shares + difference),
                (images - gained - lost, 1 - 2 * lost_shares - difference),
            ):
                log += number * np.log(np.maximum(share, 1e-300)) if number else 0.0
            best = int(log.argmax())
            least, most = lost_shares[max(0, best - 1)], lost_shares[min(400, best + 1)]
    share = (least + most) / 2
    variance = images * (2 * share + difference * (1 - difference))
    return float((gained - lost - images * difference) / math.sqrt(variance))


@given(gained=counts, lost=counts, same=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_at_tangos_limits_the_score_is_its_quantile(gained: int, lost: int, same: int) -> None:
    images = gained + lost + same
    low, high = tango(gained, lost, images)
    assert -1 < low <= (gained - lost) / images <= high < 1
    assert likelihood_score(gained, lost, images, low) == pytest.approx(1.95996, rel=2e-3)
    assert likelihood_score(gained, lost, images, high) == pytest.approx(-1.95996, rel=2e-3)
    assert tango(lost, gained, images) == pytest.approx((-high, -low), abs=1e-9)


def test_tango_at_its_ends() -> None:
    assert tango(5, 0, 5)[1] == 1.0
    assert tango(0, 5, 5)[0] == -1.0
    with pytest.raises(ValueError, match="of 4"):
        tango(3, 2, 4)


def test_decisions_are_counted() -> None:
    before = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    after = np.eye(4)[[0, 1, 0, 0, 1, 2]]
    labels = np.array([0, 1, 2, 1, 1, 1])
    found = paired(before, after, labels)
    assert (found.images, found.changed, found.lost, found.gained) == (6, 4, 2, 1)
    assert found.difference == pytest.approx(-1 / 6)
    assert found.low < found.difference < found.high
    assert found.p_value == 1.0
    with pytest.raises(ValueError, match="labels"):
        paired(before, after, labels[:3])
