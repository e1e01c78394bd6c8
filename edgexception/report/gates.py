"""Gates: bounds of the recipe on measured values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgexception.recipe import Gates
from edgexception.report.record import GateResult, PruningEffect, Row, row_name
from edgexception.targets import is_int8

PRUNED = "pruned network"
"""What the gates of pruning are judged on, where others name a row."""


def judge(
    gates: Gates, rows: Sequence[Row], pruning: PruningEffect | None = None
) -> tuple[GateResult, ...]:
    """Judge every INT8 row by every gate that is set; a value that is missing fails its gate.

    The gates of pruning are judged once, on what it did.
    """
    found = [result for row in rows if is_int8(row.precision) for result in _row(gates, row, rows)]
    return (*found, *_pruned(gates, pruning))


def _pruned(gates: Gates, effect: PruningEffect | None) -> Iterator[GateResult]:
    drop = agreement = None
    if effect is not None and effect.top1 is not None:
        before, after = effect.top1
        drop = (before.successes - after.successes) / after.trials
    if effect is not None and effect.fidelity.agreement is not None:
        agreement = effect.fidelity.agreement.value
    yield from _at_most("pruned_top1_drop_max", gates.pruned_top1_drop_max, drop, PRUNED)
    yield from _at_least("pruned_agreement_min", gates.pruned_agreement_min, agreement, PRUNED)


def _row(gates: Gates, row: Row, rows: Sequence[Row]) -> Iterator[GateResult]:
    name = row_name(row)
    if row.status != "measured":
        for gate, bound in gates.model_dump(exclude_none=True).items():
            if not gate.startswith("pruned_"):
                yield _result(gate, bound, None, False, name, f"{row.status}: {row.reason}")
        return
    yield from _at_least("top1_min", gates.top1_min, row.top1.value if row.top1 else None, name)
    yield from _at_most("top1_drop_max", gates.top1_drop_max, _top1_drop(row, rows), name)
    agreed = row.fidelity.agreement if row.fidelity else None
    agreement = agreed.value if agreed else None
    yield from _at_least("agreement_min", gates.agreement_min, agreement, name)
    sqnr = row.fidelity.sqnr_db if row.fidelity else None
    if row.fidelity and sqnr is None and gates.sqnr_db_min is not None:
        yield _result("sqnr_db_min", gates.sqnr_db_min, None, True, name, "equal to the last bit")
    else:
        yield from _at_least("sqnr_db_min", gates.sqnr_db_min, sqnr, name)
    share = row.executed.shares.get("int8", 0.0) if row.executed else None
    yield from _at_least("executed_int8_share_min", gates.executed_int8_share_min, share, name)
    if row.batch == rows[0].batch:
        speedup = row.speedup.value if row.speedup else None
        throttled = row.conditions is not None and row.conditions.throttled
        remark = "it throttled while it was timed" if throttled and speedup is not None else None
        yield from _at_least("speedup_min", gates.speedup_min, speedup, name, remark)


def _top1_drop(row: Row, rows: Sequence[Row]) -> float | None:
    """Return what a row loses against FP32 of its place, counted in images: exact at the bound."""
    place = (row.target, row.runtime, row.batch)
    for other in rows:
        same = (other.target, other.runtime, other.batch) == place
        if same and other.precision == "fp32" and other.top1 and row.top1:
            return (other.top1.successes - row.top1.successes) / row.top1.trials
    return None


def _at_least(
    gate: str, bound: float | None, value: float | None, on: str, remark: str | None = None
) -> Iterator[GateResult]:
    if bound is not None:
        yield _result(gate, bound, value, value is not None and value >= bound, on, remark)


def _at_most(gate: str, bound: float | None, value: float | None, on: str) -> Iterator[GateResult]:
    if bound is not None:
        yield _result(gate, bound, value, value is not None and value <= bound, on)


def _result(
    gate: str,
    bound: float,
    value: float | None,
    passed: bool,
    on: str,
    reason: str | None = None,
) -> GateResult:
    if value is None and reason is None:
        reason = "not measured"
    return GateResult(gate=gate, row=on, bound=bound, value=value, passed=passed, reason=reason)
