"""How many calibration photos are enough: a warning where fewer have measured worse."""

from __future__ import annotations

from typing import get_args

import pytest

from edgexception.calibration_size import ENOUGH_DB, SQNR_DB, too_few
from edgexception.recipe import PtqSpec

METHODS = get_args(PtqSpec.model_fields["ranges"].annotation)


def test_the_default_was_measured_and_nothing_is_said_of_what_was_not() -> None:
    assert PtqSpec(method="ptq").ranges in SQNR_DB
    assert set(SQNR_DB) <= set(METHODS)
    assert all(too_few(method, 1) is None for method in set(METHODS) - set(SQNR_DB))


@pytest.mark.parametrize("method", SQNR_DB)
def test_too_few_photos_are_told_what_fewer_have_cost(method: str) -> None:
    measured = SQNR_DB[method]
    for count, decibels in measured.items():
        text = too_few(method, count)
        if text is None:
            assert decibels >= max(measured.values()) - ENOUGH_DB
        else:
            assert f"{count} different calibration photos" in text
            assert f"With {count} a full-size network kept {decibels:.1f} dB" in text


@pytest.mark.parametrize("method", SQNR_DB)
def test_more_photos_are_never_warned_about_where_fewer_are_not(method: str) -> None:
    warned = [too_few(method, count) is not None for count in range(1, 2 * max(SQNR_DB[method]))]
    assert warned == sorted(warned, reverse=True)
    assert not warned[-1]
