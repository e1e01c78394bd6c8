"""Targets as data: the shipped rows, names that do not exist, and rows that later issues add."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgexception import strict_yaml, targets, typed_yaml
from edgexception.errors import EdgexError, UsageError
from edgexception.quantize.dialects import DIALECTS
from edgexception.targets import (
    Fact,
    Target,
    align_of,
    find_dialect,
    find_runtime,
    find_target,
    load_dialects,
    load_jetpacks,
    load_targets,
)

JETSON = b"""\
description: Jetson Orin Nano 8 GB
arch: aarch64
runtimes:
  tensorrt: {dialect: tensorrt, precisions: [fp32, int8]}
facts:
  sm: {value: 87, source: "TensorRT support matrix, 2026-06"}
  memory: {value: 8.0, unit: GiB, source: "Jetson data sheet, 2026-01"}
  dla: {value: false, source: "Jetson data sheet, 2026-01"}
  power_mode: {value: null, source: probe}
verified_on: null
"""


def test_the_shipped_rows() -> None:
    cpu = find_target("cpu-x86")
    assert cpu.arch == "x86_64"
    assert set(cpu.runtimes) == {"onnxruntime", "openvino"}
    assert cpu.facts["vnni"] == Fact(value=None, source="probe")
    for name, target in load_targets().items():
        for runtime in target.runtimes:
            assert find_dialect(name, runtime).activations


def test_rows_of_gpus() -> None:
    gpus = {name: target for name, target in load_targets().items() if target.sm is not None}
    assert {target.sm for target in gpus.values()} == {75, 80, 86, 87, 89, 110, 120, 121}
    for name, target in gpus.items():
        assert target.verified_on is None, "none has been run on"
        (row,) = target.runtimes.values()
        assert row.dialect == "tensorrt"
        assert (row.precisions == ("fp16",)) == (target.sm == 75), name
    assert find_target("cpu-x86").sm is None


def test_rows_of_jetsons() -> None:
    modules = {name: row for name, row in load_targets().items() if row.module is not None}
    assert len(modules) == 11
    families = {row.module.family for row in modules.values() if row.module}
    for release in load_jetpacks():
        assert families >= set(release.families)
    for row in modules.values():
        assert {"sm", "memory", "memory_bandwidth", "dla_cores"} <= row.facts.keys()
        assert row.power_modes


@pytest.mark.parametrize(
    ("name", "mode", "tops"),
    [  # dense, of the data sheets: half of the sparse ones, less what the DLA brings
        ("jetson-orin-nano-4gb", "10W", 10),
        ("jetson-orin-nano-8gb", "15W", 20),
        ("jetson-orin-nano-8gb-super", "MAXN_SUPER", 33),
        ("jetson-orin-nx-16gb", "MAXN", 100 / 2 - 20),
        ("jetson-orin-nx-8gb", "MAXN", 70 / 2 - 10),
        ("jetson-agx-orin-32gb", "MAXN", 108 / 2),
        ("jetson-agx-orin-64gb", "MAXN", 170 / 2),
    ],
)
def test_dense_tops_are_those_of_the_data_sheets(name: str, mode: str, tops: float) -> None:
    row = find_target(name)
    found = row.dense_tops(row.power_modes[mode], "int8")
    assert found == pytest.approx(tops, rel=0.03)
    assert row.dense_tops(row.power_modes[mode], "fp16") == found / 2


def test_what_is_not_known_of_a_power_mode_is_none() -> None:
    thor = find_target("jetson-agx-thor")
    assert thor.dense_tops(thor.power_modes["MAXN"], "int8") is None
    assert thor.dense_tops(thor.power_modes["70W"], "fp16") is None
    assert thor.dense_tops(thor.power_modes["MAXN"], "fp16") == pytest.approx(517 / 2, rel=0.01)


def test_an_alias_is_no_row() -> None:
    assert find_target("jetson") is find_target("jetson-orin-nano-8gb")
    assert "jetson" not in load_targets()


def test_dialects() -> None:
    dialects = load_dialects()
    assert dialects["tensorrt"].activations == ("symmetric",)
    assert "asymmetric" in dialects["onnxruntime"].activations
    assert "asymmetric" in dialects["openvino"].activations


def test_tables_are_copies_of_frozen_rows() -> None:
    load_targets().clear()
    load_dialects().clear()
    cpu = find_target("cpu-x86")
    with pytest.raises(ValidationError):
        cpu.arch = "aarch64"  # type: ignore[misc]


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match=r"no target 'cpu-x68'; did you mean cpu-x86\?"):
        find_target("cpu-x68")
    with pytest.raises(UsageError, match=r"no runtime 'onnx-runtime'; did you mean onnxruntime\?"):
        find_runtime("cpu-x86", "onnx-runtime")
    with pytest.raises(UsageError, match="no target"):
        find_dialect("toaster", "onnxruntime")
    with pytest.raises(UsageError) as error:
        find_target("\x1b[31m" + "x" * 10_000)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_row_with_many_facts_is_an_addition() -> None:
    document = strict_yaml.parse_yaml(JETSON, "row")
    row, faults = typed_yaml.validate(document.data, Target)
    assert not faults
    assert row is not None
    assert row.facts["dla"].value is False
    assert row.facts["sm"].value == 87
    assert row.verified_on is None


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("null, source: probe", "null, source: a guess", "power_mode: a fact without value"),
        ('87, source: "TensorRT support matrix, 2026-06"', "87, source: probe", "facts.sm: a fact"),
        ("aarch64", "arm", "arch: is 'arm'; write 'x86_64' or 'aarch64'"),
        ("[fp32, int8]", "[]", "runtimes.tensorrt.precisions: has 0 entries"),
        ("verified_on: null\n", "", "verified_on: is missing"),
        ("facts:", "facts: {}\nfact:", "fact: is not a known field; did you mean facts?"),
    ],
)
def test_rows_that_are_refused(old: str, new: str, word: str) -> None:
    document = strict_yaml.parse_yaml(JETSON.replace(old.encode(), new.encode()), "row")
    row, faults = typed_yaml.validate(document.data, Target)
    assert row is None
    assert word in str(typed_yaml.report(document, faults))


def test_a_row_with_an_unknown_dialect_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"description": "d", "arch": "x86_64", "verified_on": None}
    row["runtimes"] = {"r": {"dialect": "klingon", "precisions": ("int8",)}}  # type: ignore[assignment]
    table = targets._Table.model_validate({"targets": {"t": row}})
    monkeypatch.setattr(targets, "_read", lambda _: table)
    with pytest.raises(EdgexError, match="no dialect 'klingon'") as error:
        targets._table.__wrapped__()
    assert error.value.exit_code == 70


def test_widths_that_fill_the_kernels_are_known_of_every_runtime() -> None:
    for name, row in DIALECTS.items():
        align = load_dialects()[name].align
        assert isinstance(align.value, int)
        assert align.value % row.widths == 0, "else the export would fill up what pruning left"
    assert align_of("cpu-x86", ["onnxruntime"]) == 16
    assert align_of("cpu-x86", ["onnxruntime", "openvino"]) == 32
    assert align_of("rtx-4090", ["tensorrt-rtx"]) == 32
