"""Each gate passes and fails at its bound; what was not measured never passes."""

from __future__ import annotations

from typing import Any

import pytest

from edgexception.bench.statistics import Interval, Proportion, wilson
from edgexception.recipe import Gates
from edgexception.report.gates import judge
from edgexception.report.measures import Executed, Fidelity, TimedUnder
from edgexception.report.record import PruningEffect, Row
from edgexception.report.render import gate_lines


def share(successes: int, trials: int = 100) -> Proportion:
    return wilson(successes, trials)


def row(precision: str = "int8", **changes: Any) -> Row:
    facts: dict[str, Any] = {
        "target": "cpu-x86",
        "runtime": "openvino",
        "runtime_version": "1",
        "precision": precision,
        "batch": 1,
        "threads": 2,
        "status": "measured",
        "top1": share(95 if precision == "fp32" else 90),
        "fidelity": Fidelity(agreement=share(80), sqnr_db=25.0, max_abs_difference=1.0),
        "executed": Executed(
            shares={"fp32": 0.1, "int8": 0.9}, conversions={}, misplaced=(), unknown=()
        ),
        "speedup": None if precision == "fp32" else Interval(value=1.5, low=1.4, high=1.6),
    }
    return Row(**facts | changes)


BOUNDS = {
    "top1_min": (0.90, 0.91),
    "top1_drop_max": (0.05, 0.04),
    "agreement_min": (0.80, 0.81),
    "sqnr_db_min": (25.0, 25.1),
    "executed_int8_share_min": (0.9, 0.91),
    "speedup_min": (1.5, 1.51),
}


PRUNED = {"pruned_top1_drop_max": (0.03, 0.02), "pruned_agreement_min": (0.97, 0.98)}


def judged(gates: dict[str, float], *rows: Row) -> list[bool]:
    return [result.passed for result in judge(Gates(**gates), rows)]


@pytest.mark.parametrize("gate", BOUNDS)
def test_a_gate_passes_at_its_bound_and_is_missed_beyond(gate: str) -> None:
    reached, missed = BOUNDS[gate]
    rows = (row("fp32"), row())
    assert judged({gate: reached}, *rows) == [True]
    assert judged({gate: missed}, *rows) == [False]


def test_every_gate_is_a_field_and_only_set_gates_are_judged() -> None:
    assert {*BOUNDS, *PRUNED} == set(Gates.model_fields)
    assert judged({}, row("fp32"), row()) == []
    assert len(judged(dict.fromkeys(BOUNDS, 0.5), row("fp32"), row())) == 6
    assert [r.gate for r in judge(Gates(**dict.fromkeys(PRUNED, 0.5)), (row(), row()))] == [*PRUNED]


@pytest.mark.parametrize("gate", PRUNED)
def test_a_gate_of_pruning_is_judged_once_against_the_unpruned_network(gate: str) -> None:
    near = Fidelity(agreement=share(97), sqnr_db=20.0, max_abs_difference=1.0)
    effect = PruningEffect(fidelity=near, top1=(share(98), share(95)))
    skipped = row(status="skipped", reason="no GPU")
    for bound, passed in zip(PRUNED[gate], (True, False), strict=True):
        (result,) = judge(Gates(**{gate: bound}), (row("fp32"), skipped, row()), effect)
        assert (result.row, result.passed) == ("pruned network", passed)
        assert result.value == PRUNED[gate][0]
    (result,) = judge(Gates(**{gate: bound}), (row(),), None)
    assert (result.passed, result.reason) == (False, "not measured")
    unlabelled = effect.model_copy(update={"top1": None})
    (result,) = judge(Gates(pruned_top1_drop_max=1.0), (row(),), unlabelled)
    assert not result.passed


@pytest.mark.parametrize("status", ["skipped", "failed", "built"])
@pytest.mark.parametrize("gate", BOUNDS)
def test_a_row_that_was_not_measured_misses_every_gate(gate: str, status: str) -> None:
    """Also with bounds that everything passes, and with figures left in the row."""
    loose = {"top1_drop_max": 1.0, "sqnr_db_min": -200.0, "speedup_min": 1e-9}.get(gate, 0.0)
    (result,) = judge(Gates(**{gate: loose}), (row("fp32"), row(status=status, reason="it broke")))
    assert not result.passed
    assert result.value is None
    assert result.reason == f"{status}: it broke"


@pytest.mark.parametrize(
    ("gate", "lacking"),
    [
        ("top1_min", {"top1": None}),
        ("top1_drop_max", {"top1": None}),
        ("agreement_min", {"fidelity": None}),
        ("sqnr_db_min", {"fidelity": None}),
        ("executed_int8_share_min", {"executed": None}),
        ("speedup_min", {"speedup": None}),
    ],
)
def test_a_value_that_is_missing_misses_its_gate(gate: str, lacking: dict[str, None]) -> None:
    (result,) = judge(Gates(**{gate: 0.001}), (row("fp32"), row(**lacking)))
    assert (result.passed, result.reason) == (False, "not measured")


@pytest.mark.parametrize("change", [{"runtime": "onnxruntime"}, {"batch": 8}, {"target": "jetson"}])
def test_the_drop_is_against_fp32_of_the_same_place(change: dict[str, Any]) -> None:
    assert judged({"top1_drop_max": 1.0}, row("fp32", **change), row()) == [False]
    assert judged({"top1_drop_max": 1.0}, row("fp32", top1=None), row()) == [False]
    assert judged({"top1_drop_max": 1.0}, row("fp32", status="failed", top1=None), row()) == [False]


def test_logits_equal_to_the_last_bit_pass_every_sqnr() -> None:
    equal = Fidelity(agreement=share(100), sqnr_db=None, max_abs_difference=0.0)
    (result,) = judge(Gates(sqnr_db_min=200.0), (row(fidelity=equal),))
    assert (result.passed, result.value) == (True, None)
    assert result.reason == "equal to the last bit"


def test_the_drop_is_counted_in_images() -> None:
    """0.995 - 0.975 is 0.02000000000000002 in floating point; 12 of 600 images are 0.02."""
    rows = (row("fp32", top1=share(597, 600)), row(top1=share(585, 600)))
    assert judged({"top1_drop_max": 0.02}, *rows) == [True]
    rows = (row("fp32", top1=share(597, 600)), row(top1=share(584, 600)))
    assert judged({"top1_drop_max": 0.02}, *rows) == [False]


def test_the_speedup_is_judged_at_the_first_batch_size_and_the_rest_everywhere() -> None:
    rows = (row(batch=8), row(batch=1, speedup=Interval(value=9, low=9, high=9)))
    results = judge(Gates(speedup_min=2.0, sqnr_db_min=1.0), rows)
    assert [(r.gate, r.row[-2:], r.passed) for r in results] == [
        ("sqnr_db_min", "b8", True),
        ("speedup_min", "b8", False),
        ("sqnr_db_min", "b1", True),
    ]


def test_lines_say_what_was_bounded_where_and_found() -> None:
    results = judge(Gates(sqnr_db_min=30.0), (row(), row(status="failed", reason="a crash")))
    assert gate_lines(results) == [
        "gate sqnr_db_min 30.0 missed by cpu-x86 openvino int8 b1: 25",
        "gate sqnr_db_min 30.0 missed by cpu-x86 openvino int8 b1: failed: a crash",
    ]


def test_a_speed_that_was_timed_while_throttled_says_so() -> None:
    hot = TimedUnder(
        samples=4, marked=1, reasons=("oc1 rose",), throttled=True, power_mode=None,
        clock_mhz=None, hottest=None, energy=None,
    )  # fmt: skip
    (result,) = judge(Gates(speedup_min=1.5), (row(conditions=hot),))
    assert result.passed
    assert "throttled" in gate_lines((result,))[0]
