"""A plan for the DLA beside what the builder made of it, and how both are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_gates import row
from test_render import report

from edgexception.artifacts import Artifact, FileRecord
from edgexception.device import ProbeRecord
from edgexception.doctor import probe
from edgexception.engine_stages import check_dla_version, plan_dla
from edgexception.errors import EdgexError, NotPossibleHere, UsageError
from edgexception.export.dla import DlaLayer, DlaPlan
from edgexception.recipe import TensorRtSpec
from edgexception.report.assemble import Place
from edgexception.report.dla import dla_line, dla_lines, dla_planned
from edgexception.report.render import to_markdown, to_text

PLAN = DlaPlan(
    (
        DlaLayer("images_float", 0, None, "a cast"),
        DlaLayer("conv1", 60, "fp16"),
        DlaLayer("conv2", 30, "int8"),
        *(DlaLayer(f"elu{n}", 2, None, "no ELU") for n in range(5)),
    ),
    1,
)
ORIN = TensorRtSpec(dla_core=1, gpu_fallback=True)
PLACE = Place("jetson-agx-orin-64gb", "tensorrt", "tensorrt", "fp16", 1, 2, ORIN)


def test_a_plan_is_told_with_its_reasons() -> None:
    assert dla_line(dla_planned(PLAN)) == (
        "planned for the DLA: 2 of 8 layers (1 in fp16 and 1 in int8), 90.0% of the "
        "multiply-accumulates, in 1 part or more; the GPU runs 6 (images_float: a cast; elu0, "
        "elu1, elu2, elu3 and 1 more: no ELU)"
    )
    many = dla_line(dla_planned(DlaPlan(PLAN.layers, 17)))
    assert "in 17 parts or more" in many
    assert many.endswith("a core holds 16 parts at once")
    found = report((row(dla=dla_planned(PLAN)), row()))
    (line,) = dla_lines(found.rows)
    assert line in to_text(found)
    assert line in to_markdown(found).replace("\\", "")


@pytest.mark.parametrize(
    ("not_on_dla", "fell_back", "taken", "says"),
    [
        (None, None, None, "no ELU)"),
        ("broken", None, None, "no ELU)"),
        (
            ["images_float", "ONNXTRT_Broadcast", *(f"elu{n}" for n in range(5))],
            (),
            (),
            "; the builder did as planned",
        ),
        (
            ["images_float", "conv2", *(f"elu{n}" for n in range(4))],
            ("conv2",),
            ("elu4",),
            "; the builder put on the GPU, too: conv2; the builder took for the DLA, too: elu4",
        ),
    ],
)
def test_what_the_builder_did_is_held_against_the_plan(
    not_on_dla: Any, fell_back: Any, taken: Any, says: str
) -> None:
    found = dla_planned(PLAN, not_on_dla)
    assert (found.fell_back, found.taken) == (fell_back, taken)
    assert dla_line(found).endswith(says)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> ProbeRecord:
    return probe()


def orin(machine: ProbeRecord, version: str) -> ProbeRecord:
    facts = machine.model_dump() | {"arch": "aarch64"}
    facts["runtimes"]["tensorrt"] = {"version": version}
    return ProbeRecord.model_validate(facts)


def use(monkeypatch: pytest.MonkeyPatch, *layers: DlaLayer) -> Artifact:
    monkeypatch.setattr("edgexception.export.dla.plan_dla", lambda path: DlaPlan(layers, 1))
    return Artifact("export", "k", Path(), {"model.onnx": FileRecord("", 0)}, "")


def test_an_engine_that_is_not_for_a_dla_has_no_plan() -> None:
    plain = Place("jetson-agx-orin-64gb", "tensorrt", "tensorrt", "fp16", 1, 2)
    assert plan_dla(Artifact("export", "k", Path(), {}, ""), plain) is None


def test_a_network_of_which_the_dla_runs_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported = use(monkeypatch, DlaLayer("elu", 0, None, "TensorRT has no ELU on the DLA"))
    with pytest.raises(UsageError, match=r"none of its 1 layers .*no ELU.*leave out dla_core"):
        plan_dla(exported, PLACE)


FLOAT32 = DlaPlan(
    (DlaLayer("conv", 0, "fp16"), DlaLayer("head", 0, None, "float32", float32=True)), 1
)


@pytest.mark.parametrize(
    ("version", "error", "says"),
    [
        ("10.3.0", UsageError, r"the first is head\), and TensorRT 10\.3\.0 would"),
        ("8.6.2", NotPossibleHere, rf"{PLACE.key}: TensorRT '8\.6\.2' is not known here"),
        ("12.0.1", NotPossibleHere, rf"{PLACE.key}: TensorRT '12\.0\.1' is not known here"),
    ],
)
def test_float32_layers_are_never_computed_in_fp16_unasked(
    machine: ProbeRecord, version: str, error: type[EdgexError], says: str
) -> None:
    """For a DLA the networks of version 10 are weakly typed."""
    there = orin(machine, version)
    with pytest.raises(error, match=says):
        check_dla_version(FLOAT32, PLACE, there)
    check_dla_version(PLAN, PLACE, there)


def test_version_11_computes_them_as_written(machine: ProbeRecord) -> None:
    check_dla_version(FLOAT32, PLACE, orin(machine, "11.4.1"))
