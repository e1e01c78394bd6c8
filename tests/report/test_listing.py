"""What a builder lists of an engine is told in plain words, and not as if it were measured."""

from __future__ import annotations

from typing import Any

from test_gates import row
from test_render import report

from edgexception.report.measures import Executed, Listing
from edgexception.report.render import executed_line, listing_lines, to_markdown, to_text

SIZES: dict[str, Any] = {"status": "built", "engine_bytes": 37_200_000, "onnx_bytes": 21_300_000}
INT8 = Listing(
    kernels=157,
    read_bytes=88_200_000,
    written_bytes=55_600_000,
    weights_bytes=26_800_000,
    zeros_bytes=4_900_000,
    int8_kernels=76,
    int8_widened=75,
)
FP16 = INT8.model_copy(
    update={"read_bytes": 63_400_000, "written_bytes": 19_100_000, "int8_widened": 0}
)


def test_a_line_explains_size_traffic_and_what_int8_is_left_for() -> None:
    rows = (row(precision="fp16", listing=FP16, **SIZES), row(listing=INT8, **SIZES))
    plain, int8 = listing_lines(rows)
    assert "INT8" not in plain  # nor what to do about INT8's padding
    assert "times" not in plain
    for words in (
        "157 kernels, listed by the builder and not measured",
        "the engine's 37.2 MB are 26.8 MB of weights (4.9 MB of it zeros that pad) and 10.4 MB of "
        "code, the ONNX file has 21.3 MB",
        "they read 88.2 MB and write 55.6 MB (1.74 times what fp16 moves)",
        "75 of 76 INT8 kernels write a wider type",
        'have no INT8 kernel: quantize.precision {fp16: ["*_depthwise"]} leaves those in FP16',
    ):
        assert words in int8
    found = report(rows)
    assert int8 in to_text(found)
    assert int8 in to_markdown(found).replace("\\", "")


def test_an_engine_with_little_padding_is_left_in_peace() -> None:
    little = INT8.model_copy(update={"zeros_bytes": 100_000})
    (line,) = listing_lines((row(listing=little, **SIZES),))
    assert "0.1 MB of it zeros" in line
    assert "no INT8 kernel" not in line


def test_engines_of_other_places_are_not_compared() -> None:
    others = [
        row(precision="fp16", listing=FP16, **SIZES, **place)
        for place in ({"target": "rtx-5090"}, {"batch": 8}, {"runtime": "tensorrt"})
    ]
    (*_, line) = listing_lines((*others, row(listing=INT8, **SIZES)))
    assert "times what" not in line


def test_what_has_not_run_is_not_said_to_run() -> None:
    found = Executed(shares={"int8": 1.0}, conversions={}, misplaced=(), unknown=())
    assert executed_line(row(status="measured", executed=found)).startswith("runs 100% in INT8")
    built = row(listing=INT8, layers={"gemm": 1}, executed=found, **SIZES)
    assert executed_line(built).startswith("is built to run 100% in INT8")
    page = to_markdown(report((built,)))
    assert " executes " not in page
    assert " runs " not in page
    assert "is built of 1 gemm" in page
