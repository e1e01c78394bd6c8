"""The fastest runtime is named where there was a choice, and only by what was measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from test_gates import row

from edgexception.agent.tensorrt_options import BuildOptions, read_options
from edgexception.bench.statistics import Interval, LatencySummary, Times
from edgexception.device import Timing
from edgexception.recipe import TensorRtSpec
from edgexception.report.assemble import Measured, Place, _gain, _speed, mark_fastest
from edgexception.report.measures import Gain, Slower, Spent
from edgexception.report.record import Row
from edgexception.report.render import condition_lines, regret_lines
from edgexception.targets import Precision


def timed(milliseconds: float, **changes: object) -> Row:
    latency = LatencySummary(
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


WAY = Timing(clock="trtexec", cuda_graph=False, spin_wait=False, transfers=True, overlap=False)


def test_times_that_were_taken_in_different_ways_are_not_compared() -> None:
    ours, theirs = timed(3.0, runtime="a"), timed(2.0, runtime="b", timing=WAY)
    assert winners(ours, theirs) == []
    assert winners(ours, theirs, timed(1.0, runtime="c", timing=WAY)) == [2]
    other = WAY.model_copy(update={"cuda_graph": True})
    assert winners(theirs, timed(1.0, runtime="c", timing=other)) == []

    int8, slow = place("int8"), place("fp32")
    for way, compared in ((None, False), (other, False), (WAY, True)):
        measured = {
            slow: Measured(rounds=rounds_of(4.0), timing=way),
            int8: Measured(rounds=rounds_of(2.0), timing=WAY),
        }
        found: Any = SimpleNamespace(measured=measured)
        facts = _speed(found, int8, measured[int8])
        assert ("speedup" in facts) == compared
        assert (facts["gain"] is not None) == compared
        assert facts["timing"] == WAY


def test_the_page_names_the_program_and_how_it_timed() -> None:
    (line,) = condition_lines([row(program="/usr/bin/trtexec", timing=WAY), row()])
    assert line == (
        "cpu-x86 openvino int8 b1: /usr/bin/trtexec in place of a Python package; timed by "
        "trtexec: cuda graph off, spin wait off, transfers on, overlap off"
    )


# --- is INT8 worth it -----------------------------------------------------------------------------


def rounds_of(milliseconds: float, spread: float = 0.01, rounds: int = 4) -> list[Times]:
    random = np.random.default_rng(int(milliseconds * 1000))
    levels = 1 + spread * np.linspace(-1, 1, rounds)
    return [
        (1e6 * milliseconds * level * random.uniform(0.999, 1.001, 50)).astype(np.int64)
        for level in levels
    ]


def place(precision: Precision, **changes: Any) -> Place:
    fields = {"target": "t", "runtime": "r", "dialect": "d", "batch": 1, "threads": 2}
    return Place(precision=precision, **fields | changes)


def gain(int8: list[Times], **floats: list[Times]) -> Gain | None:
    """Return the gain of an INT8 engine beside float engines of these precisions."""
    measured = {place(name): Measured(rounds=times) for name, times in floats.items()}  # type: ignore[arg-type]
    # Neither another batch nor another runtime counts.
    measured[place("fp32", batch=8)] = Measured(rounds=rounds_of(0.1))
    measured[place("fp32", runtime="other")] = Measured(rounds=rounds_of(0.1))
    measured[place("int8-fp16")] = Measured(rounds=rounds_of(0.1))
    found = SimpleNamespace(measured=measured)
    return _gain(found, place("int8"), Measured(rounds=int8))  # type: ignore[arg-type]


def test_int8_is_compared_with_the_fastest_float_engine_of_its_place() -> None:
    found = gain(rounds_of(2.0), fp32=rounds_of(6.0), fp16=rounds_of(3.0))
    assert found is not None
    assert (found.over, found.sure) == ("fp16", True)
    assert abs(found.ratio.value - 1.5) < 0.01
    assert gain(rounds_of(2.0)) is None


def test_without_times_of_kernels_no_block_is_blamed() -> None:
    found = gain(rounds_of(4.0), fp16=rounds_of(3.0))
    assert found is not None
    assert found.slower is None


def test_a_gain_is_sure_only_where_its_whole_interval_is_above_one() -> None:
    slower = gain(rounds_of(4.0), fp16=rounds_of(3.0))
    assert slower is not None
    assert not slower.sure
    # Faster by 5% in the mean, but not in every round: the rounds of one lie 40% apart.
    doubtful = gain(rounds_of(2.0, spread=0.2), fp32=rounds_of(2.1))
    assert doubtful is not None
    assert doubtful.ratio.value > 1 > doubtful.ratio.low
    assert not doubtful.sure


def test_the_page_says_plainly_that_int8_is_not_worth_it_and_what_is_to_blame() -> None:
    ratio = Interval(value=1.01, low=0.97, high=1.05)
    (line,) = regret_lines([row("fp32"), row(gain=Gain(over="fp16", ratio=ratio))])
    plainly = (
        "INT8 is not worth it on cpu-x86 openvino int8 b1: 1.01x (0.97 to 1.05) as fast as fp16, "
        "which is nearer to the network; "
    )
    assert line.startswith(f"{plainly}which blocks are to blame is not known")
    shares = {"int8": 0.7, "quantize": 0.05, "reorder": 0.1, "other": 0.15}
    spent = Spent(calls=30, total_ms=4.0, shares=shares, blocks={})
    slower = tuple(Slower(block=f"block{n}", int8_ms=0.25, float_ms=0.125) for n in range(6))
    (line,) = regret_lines([row(spent=spent, gain=Gain(over="fp16", ratio=ratio, slower=slower))])
    assert line.startswith(f"{plainly}slower in INT8 by their kernels' times: ")
    assert "times: block0 0.25 ms (fp16 0.125 ms), block1" in line
    assert line.endswith(
        "block3 0.25 ms (fp16 0.125 ms) and 2 more; 15.0% of INT8's time only "
        "changes types and layouts"
    )
    (line,) = regret_lines([row(spent=spent, gain=Gain(over="fp16", ratio=ratio, slower=()))])
    assert "kernels' times: no block;" in line
    sure = Gain(over="fp16", ratio=Interval(value=1.1, low=1.01, high=1.2))
    assert regret_lines([row(gain=sure), row()]) == []


def test_options_of_tensorrt_are_asked_for_as_the_agent_reads_them() -> None:
    spec = TensorRtSpec(workspace_mib=2, dla_core=1, gpu_fallback=True)
    asked = place("fp16", tensorrt=spec).tensorrt_options
    assert read_options(asked) == BuildOptions(
        "fp16", workspace_bytes=2 << 20, dla_core=1, gpu_fallback=True
    )
    assert read_options(place("fp16", tensorrt=TensorRtSpec()).tensorrt_options) == BuildOptions(
        "fp16"
    )
    assert place("fp16").tensorrt_options is None
