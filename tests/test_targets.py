"""Targets as data: the shipped rows, names that do not exist, and rows that later issues add."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from edgexception import strict_yaml, targets, typed_yaml
from edgexception.errors import EdgexError, UsageError
from edgexception.targets import (
    Fact,
    Target,
    find_dialect,
    find_runtime,
    find_target,
    load_dialects,
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
    assert len(str(error.value)) < 400


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
    table = targets._Table.model_validate({"dialects": {}, "targets": {"t": row}})
    monkeypatch.setattr(targets, "validate", lambda *_: (table, []))
    with pytest.raises(EdgexError, match="no dialect 'klingon'") as error:
        targets._table.__wrapped__()
    assert error.value.exit_code == 70
