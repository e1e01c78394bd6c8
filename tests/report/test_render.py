"""The page: nothing that came from a file or a device can break it, or pass for a measurement."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from test_gates import row

from edgexception.bench.paired import paired, tango
from edgexception.preprocess import Preprocess
from edgexception.recipe import Gates
from edgexception.report.gates import judge
from edgexception.report.measures import Energy, Machine, TimedUnder
from edgexception.report.network import Network
from edgexception.report.record import BadImageLine, Parity, Report, Row, StageLine
from edgexception.report.render import to_markdown, to_text

HOSTILE = (
    "a|b\n| x | **measured** |\r\n# h <script>alert(1)</script> `c` [l](u)\x1b[31m\u2028&lt; ~~s~~"
)


LABELS = np.array([0, 1, 2, 0, 1])
BEFORE = np.eye(3)[[0, 1, 2, 0, 0]]
AFTER = np.eye(3)[[0, 2, 1, 0, 2]]


def report(rows: tuple[Row, ...] = (), bounds: Gates | None = None, **changes: Any) -> Report:
    facts: dict[str, Any] = {
        "edgexception": "0.1",
        "recipe": {"name": "shoes", "gates": (bounds or Gates()).model_dump(exclude_none=True)},
        "network": Network(
            source={"file": "net.keras"},
            classes=None,
            preprocess=Preprocess(input_size=(64, 96)),
            outputs=5,
            parameters=1234,
            macs=10**7,
        ),
        "machine": Machine(
            device="local",
            arch="x86_64",
            system="Linux",
            python="3.11",
            board=None,
            cpu="a processor",
            cores=2,
            vnni=True,
            memory_bytes=None,
        ),
        "versions": {"numpy": "2"},
        "calibration": None,
        "evaluation_photos": 9,
        "evaluation_images": 9,
        "bad_images": (),
        "parity": (),
        "rows": rows,
        "gates": judge(bounds or Gates(), rows),
        "stages": (StageLine(stage="import", what="net", key="0" * 64, reused=False, seconds=1.0),),
    }
    return Report(**facts | changes)


def tables(page: str) -> list[list[str]]:
    """Return the cells of every table row, split as Markdown does."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_report_survives_json() -> None:
    whole = report((row("fp32"), row()), Gates(top1_min=0.5))
    assert Report.model_validate_json(whole.model_dump_json()) == whole


@pytest.mark.parametrize("status", ["skipped", "failed"])
def test_what_was_not_measured_never_looks_measured_or_passed(status: str) -> None:
    rows = (row("fp32"), Row(**row().model_dump() | {
        "status": status, "reason": "the engine crashed", "top1": None, "fidelity": None,
        "speedup": None,
    }))  # fmt: skip
    page = to_markdown(report(rows, Gates(top1_min=0.0, speedup_min=0.001)))
    cells = [line for line in tables(page) if line[2:3] == ["int8"]]
    assert cells[0][4:] == [status] + [""] * 7
    assert cells[1][4:] == ["not measured"] * 3
    assert f"- **{status}**: cpu-x86 openvino int8 b1: the engine crashed" in page
    assert page.count("**MISSED**") == 2
    assert "passed" not in page
    text = to_text(report(rows, Gates(top1_min=0.0)))
    assert "passed" not in text
    assert re.search(rf"int8 b1 +{status}  the engine crashed", text)


def test_what_int8_lost_and_gained_is_shown_with_its_interval() -> None:
    change = paired(BEFORE, AFTER, LABELS)
    whole = report((row("fp32"), row(paired=change)))
    (line,) = [line for line in tables(to_markdown(whole)) if len(line) == 8 and line[2] == "int8"]
    low, high = tango(0, 2, 5)
    assert line[4:7] == ["3 of 5", "2", "0"]
    assert line[7] == f"-40.00 points ({100 * low:+.2f} to {100 * high:+.2f}), p 0.5"
    assert "  3 changed  " in to_text(whole)
    assert "decides otherwise" not in to_markdown(report((row("fp32"), row())))


def test_nothing_that_came_from_outside_breaks_the_page() -> None:
    whole = report(
        (row("fp32"), row(status="failed", reason=HOSTILE)),
        Gates(top1_min=0.1),
        bad_images=(BadImageLine(set="calibration", name=HOSTILE, reason=HOSTILE),),
        parity=(
            Parity(form="fp32", runtime="openvino", failed=HOSTILE),
            Parity(form="int8-openvino", skipped=HOSTILE),
        ),
        stages=(StageLine(stage="import", what=HOSTILE, key="0" * 64, reused=True, seconds=1.0),),
        network=report().network.model_copy(update={"source": {"file": HOSTILE, HOSTILE: "x"}}),
        machine=report().machine.model_copy(update={"cpu": HOSTILE, "system": HOSTILE}),
        versions={"numpy": HOSTILE},
    )
    page = to_markdown(whole)
    assert "<script" not in page.replace("\\<script", "")
    assert "\x1b" not in page
    assert "\u2028" not in page
    assert not re.search(r"^# h", page, re.MULTILINE)
    widths = {len(line) for line in tables(page)}
    assert widths == {12, 7, 6, 4}
    assert not [line for line in tables(page) if "**measured**" in line]


def test_sections_that_were_not_run_are_named() -> None:
    page = to_markdown(report(evaluation_photos=None, evaluation_images=None))
    assert "Engines: none, the recipe has no `targets` section" in page
    assert "Quantization: not run" in page
    assert "None: the recipe sets none." in page
    page = to_markdown(report((row("fp32"),), evaluation_photos=None, evaluation_images=None))
    assert "Accuracy: not measured, the recipe has no `evaluation` section." in page


def test_a_run_that_ended_early_says_that_its_gates_were_not_judged() -> None:
    whole = report((row(status="built"),), Gates(top1_min=0.5), gates=())
    assert "None: the run ended before anything was measured." in to_markdown(whole)


def test_another_machine_is_named_with_its_power_mode() -> None:
    here = report()
    assert "Machine: a processor, 2 cores, VNNI, Linux" in to_markdown(here)
    machine = here.machine.model_copy(update={"device": "ssh://orin", "power_mode": "15W"})
    text = to_markdown(here.model_copy(update={"machine": machine}))
    assert "Machine: ssh://orin, a processor, 2 cores, power mode 15W, VNNI" in text


def test_throttling_and_energy_stand_beside_the_times() -> None:
    energy = Energy(millijoules=12.345, busy_watts=9.0, idle_watts=4.5, rails=("VDD_IN",))
    hot = TimedUnder(
        samples=4, marked=1, reasons=("oc1|count rose",), throttled=True, power_mode="15W",
        clocks_held=True, clock_mhz=(600.0, 1020.0), hottest=("tj", 95.0), energy=energy,
    )  # fmt: skip
    found = report((row(conditions=hot),))
    text, page = to_text(found), to_markdown(found)
    assert "throttled in 1 of 4 samples (oc1|count rose)" in text
    assert (
        "12.35 mJ an image: 9.00 W less 4.50 W idle, of VDD_IN, power mode 15W, clocks held" in text
    )
    assert tables(page)[2][4] == "measured (throttled)"
    assert "oc1\\|count rose" in page
    assert "throttled" not in to_markdown(report((row(),)))
