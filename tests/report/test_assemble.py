"""The fastest runtime is named where there was a choice, and only by what was measured."""

from __future__ import annotations

from test_gates import row

from edgexception.report.assemble import mark_fastest
from edgexception.report.record import Latency, Row


def timed(milliseconds: float, **changes: object) -> Row:
    latency = Latency(
        min_ms=0.1,
        median_ms=milliseconds,
        p90_ms=9.0,
        p99_ms=9.0,
        cov=0.1,
        iterations=30,
        round_medians_ms=(milliseconds,),
        noisy=False,
    )
    return row(latency=latency, **changes)


def winners(*rows: Row) -> list[int]:
    return [number for number, found in enumerate(mark_fastest(rows)) if found.fastest]


def test_the_lowest_median_of_a_precision_and_batch_wins() -> None:
    assert winners(
        timed(4.0, runtime="onnxruntime"),
        timed(3.0, runtime="openvino"),
        timed(9.0, runtime="onnxruntime", precision="fp32"),
        timed(9.5, runtime="openvino", precision="fp32"),
        timed(20.0, runtime="onnxruntime", batch=8),
        timed(19.0, runtime="openvino", batch=8),
    ) == [1, 2, 5]


def test_without_a_choice_nothing_wins() -> None:
    assert winners(timed(4.0)) == []
    assert winners(timed(4.0, target="cpu-x86"), timed(3.0, target="another")) == []
    assert winners(timed(4.0), row(runtime="other", status="failed", latency=None)) == []
