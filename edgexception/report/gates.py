"""Gates: bounds of the recipe on measured values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgexception.recipe import Gates
from edgexception.report.record import GateResult, Row, row_name
from edgexception.targets import is_int8


def judge(gates: Gates, rows: Sequence[Row]) -> tuple[GateResult, ...]:
    """Judge every INT8 row by every gate that is set; a value that is missing fails its gate."""
    return tuple(
        result for row in rows if is_int8(row.precision) for result in _row(gates, row, rows)
    )


def _row(gates: Gates, row: Row, rows: Sequence[Row]) -> Iterator[GateResult]:
    if row.status != "measured":
        for gate, bound in gates.model_dump(exclude_none=True).items():
            yield GateResult(
                gate=gate,
                row=row_name(row),
                bound=bound,
                value=None,
                passed=False,
                reason=f"{row.status}: {row.reason}",
            )
        return
    yield from _at_least("top1_min", gates.top1_min, row.top1.value if row.top1 else None, row)
    yield from _at_most("top1_drop_max", gates.top1_drop_max, _top1_drop(row, rows), row)
    agreed = row.fidelity.agreement if row.fidelity else None
    agreement = agreed.value if agreed else None
    yield from _at_least("agreement_min", gates.agreement_min, agreement, row)
    sqnr = row.fidelity.sqnr_db if row.fidelity else None
    if row.fidelity and sqnr is None and gates.sqnr_db_min is not None:
        yield _result("sqnr_db_min", gates.sqnr_db_min, None, True, row, "equal to the last bit")
    else:
        yield from _at_least("sqnr_db_min", gates.sqnr_db_min, sqnr, row)
    share = row.executed.shares.get("int8", 0.0) if row.executed else None
    yield from _at_least("executed_int8_share_min", gates.executed_int8_share_min, share, row)
    if row.batch == rows[0].batch:
        speedup = row.speedup.value if row.speedup else None
        throttled = row.conditions is not None and row.conditions.throttled
        remark = "it throttled while it was timed" if throttled and speedup is not None else None
        yield from _at_least("speedup_min", gates.speedup_min, speedup, row, remark)


def _top1_drop(row: Row, rows: Sequence[Row]) -> float | None:
    """Return what a row loses against FP32 of its place, counted in images: exact at the bound."""
    place = (row.target, row.runtime, row.batch)
    for other in rows:
        same = (other.target, other.runtime, other.batch) == place
        if same and other.precision == "fp32" and other.top1 and row.top1:
            return (other.top1.successes - row.top1.successes) / row.top1.trials
    return None


def _at_least(
    gate: str, bound: float | None, value: float | None, row: Row, remark: str | None = None
) -> Iterator[GateResult]:
    if bound is not None:
        yield _result(gate, bound, value, value is not None and value >= bound, row, remark)


def _at_most(gate: str, bound: float | None, value: float | None, row: Row) -> Iterator[GateResult]:
    if bound is not None:
        yield _result(gate, bound, value, value is not None and value <= bound, row)


def _result(
    gate: str,
    bound: float,
    value: float | None,
    passed: bool,
    row: Row,
    reason: str | None = None,
) -> GateResult:
    if value is None and reason is None:
        reason = "not measured"
    return GateResult(
        gate=gate, row=row_name(row), bound=bound, value=value, passed=passed, reason=reason
    )
