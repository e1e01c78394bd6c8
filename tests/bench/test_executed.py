"""Shares of what ran, and when an engine is not what its name says."""

from __future__ import annotations

from typing import Any

import pytest

from edgexception.bench.executed import check_placement, executed
from edgexception.device import BuildRecord, LayerPlacement
from edgexception.errors import BadArtifact


def layer(name: str, macs: int, planned: str, ran: str | None, **more: Any) -> LayerPlacement:
    facts = {"kind": "convolution", "kernel": "k", **more}
    return LayerPlacement(name=name, macs=macs, planned=planned, executed=ran, **facts)


def record(*layers: LayerPlacement) -> BuildRecord:
    return BuildRecord(
        runtime="openvino",
        versions={},
        batch=1,
        threads=1,
        settings={},
        layers={},
        placement=list(layers),
        conversions={"reorder": 2},
        engine="engine.blob",
        engine_bytes=1,
        seconds=1.0,
    )


def test_shares_are_of_the_convolutions() -> None:
    found = executed(
        record(
            layer("a", 70, "int8", "int8"),
            layer("b", 20, "fp32", "fp32"),
            layer("c", 10, "int8", None),
            layer("d", 900, "int8", "fp32", kind="dense"),
        )
    )
    assert found is not None
    assert found.shares == {"fp32": 0.2, "int8": 0.7, "unknown": 0.1}
    assert [wrong.name for wrong in found.misplaced] == ["d"]
    assert found.unknown == ("c",)
    assert found.conversions == {"reorder": 2}


def test_nothing_is_said_of_a_network_that_says_nothing() -> None:
    assert executed(record()) is None
    check_placement(record(), "engine")


def test_what_runs_as_planned_or_is_not_told_passes() -> None:
    check_placement(
        record(
            layer("a", 1, "int8", "int8"),
            layer("b", 1, "fp32", "fp32"),
            layer("c", 9, "int8", None),
        ),
        "engine",
    )


@pytest.mark.parametrize(
    ("planned", "ran"),
    [("int8", "fp32"), ("int8", "fp16"), ("fp32", "bf16"), ("fp32", "int8"), ("fp16", "fp32")],
)
def test_any_other_precision_than_planned_is_refused(planned: str, ran: str) -> None:
    with pytest.raises(BadArtifact) as caught:
        check_placement(record(layer("a", 75, "int8", "int8"), layer("b", 25, planned, ran)), "e8")
    assert str(caught.value).startswith(
        "e8 is not what its name says: 1 of 2 layers, 25.0% of the multiply-accumulates, do not "
        f"run as planned: b (planned {planned}, runs in {ran}, k). "
    )


def test_the_largest_layers_are_named_first_and_the_rest_counted() -> None:
    layers = [layer(f"layer{n}", n + 1, "int8", "fp32") for n in range(6)]
    with pytest.raises(BadArtifact, match=r"layer5 .*, layer4 .*, layer3 .*, layer2 .* and 2 more"):
        check_placement(record(*layers), "engine")
