"""The noise of a sensitivity table by kind of edge."""

from __future__ import annotations

import math

import pytest

from edgexception.report.record import Effect, Sensitivity, UnitSensitivity
from edgexception.report.sensitivity import budget, sensitivity_lines


def effect(noise: float) -> Effect:
    sqnr = None if noise == 0.0 else -10 * math.log10(noise)
    return Effect(sqnr_db=sqnr, agreement=1.0, noise=noise)


def unit(name: str, of_input: float, inner: float | None, weights: float) -> UnitSensitivity:
    return UnitSensitivity(
        unit=name,
        layers=(name,),
        macs=1,
        input=effect(of_input),
        inner=None if inner is None else effect(inner),
        weights=effect(weights),
        output=None,
        exception=effect(of_input + (inner or 0.0) + weights),
        without=effect(0.0),
    )


def table(*units: UnitSensitivity, fitted: float = 0.0) -> Sensitivity:
    return Sensitivity(
        dialect="openvino",
        images=8,
        seconds=1.0,
        threads=1,
        everything=effect(0.1),
        fitted=effect(fitted),
        units=units,
    )


def test_noises_of_a_kind_are_added_up() -> None:
    found = budget(table(unit("a", 0.01, 0.03, 0.0), unit("b", 0.05, None, 0.01)))
    assert [(kind, db) for kind, db, _ in found] == [
        ("inputs of layers", "12.2 dB"),
        ("depthwise to pointwise", "15.2 dB"),
        ("weights", "20.0 dB"),
    ]
    assert [share for _, _, share in found] == pytest.approx([0.6, 0.3, 0.1])
    *_, fitted = budget(table(unit("a", 0.03, None, 0.0), fitted=0.01))
    assert fitted == ("fitted weights and biases", "20.0 dB", pytest.approx(0.25))


def test_what_makes_no_noise_is_not_named() -> None:
    assert budget(table(unit("a", 0.0, None, 0.0))) == []


def test_the_worst_unit_comes_first() -> None:
    lines = sensitivity_lines(table(unit("a", 0.01, None, 0.0), unit("b", 0.02, None, 0.0)))
    assert lines[1] == "noise by kind: inputs of layers 15.2 dB (100%)"
    assert [line.split()[0] for line in lines[3:]] == ["b", "a"]
