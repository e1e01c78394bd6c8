"""What each runtime is told about one and the same plan."""

from __future__ import annotations

import pytest
from narrow import minmax_plan, random_images, small_graph

from edgexception.errors import UsageError
from edgexception.export.onnx_graph import FLOAT_OPSET
from edgexception.quantize.dialects import DIALECTS, check_plan, rounded_reads, written_grids
from edgexception.quantize.precision import with_precision
from edgexception.targets import load_dialects

GRAPH = small_graph()
IMAGES = random_images(2, (40, 40))
SYMMETRIC = minmax_plan(GRAPH, IMAGES, symmetric=True)
ASYMMETRIC = minmax_plan(GRAPH, IMAGES)


def test_the_dialects_are_those_of_the_target_table() -> None:
    assert set(DIALECTS) == set(load_dialects())


def test_every_version_of_tensorrt_parses_the_opset_that_is_written() -> None:
    """ONNX has float16 scales from opset 19 on."""
    versions = load_dialects()["tensorrt"].opset_max
    assert {"10.3", "10.13", "10.16", "11", "rtx-1.7"} <= set(versions)
    for name, fact in versions.items():
        assert isinstance(fact.value, int), name
        assert 19 == DIALECTS["tensorrt"].opset <= fact.value, name
        assert fact.value >= FLOAT_OPSET, name


def test_an_asymmetric_plan_is_refused_where_it_cannot_be_said() -> None:
    with pytest.raises(UsageError, match=r"tensorrt .* at pixels; .*activations: symmetric"):
        check_plan(ASYMMETRIC, DIALECTS["tensorrt"])
    for name in DIALECTS:
        check_plan(SYMMETRIC, DIALECTS[name])


def test_outputs_are_quantized_only_where_the_runtime_needs_it() -> None:
    full = written_grids(GRAPH, SYMMETRIC, DIALECTS["onnxruntime"])
    assert set(full) == set(SYMMETRIC.activations)
    for name in ("openvino", "tensorrt"):
        grids = written_grids(GRAPH, SYMMETRIC, DIALECTS[name])
        assert {grid.role for grid in grids.values()} == {"input"}


@pytest.mark.parametrize("dialect", ["onnxruntime", "openvino"])
def test_int8_becomes_the_uint8_grid_of_the_same_values(dialect: str) -> None:
    grids = written_grids(GRAPH, SYMMETRIC, DIALECTS[dialect])
    for name, grid in grids.items():
        if name == "pixels":
            continue
        assert not grid.signed
        assert grid.scale == SYMMETRIC.activations[name].scale
        assert grid.zero_point == (0 if name.endswith("_act") else 128), name


def test_tensorrt_gets_the_plan_as_it_is() -> None:
    grids = written_grids(GRAPH, SYMMETRIC, DIALECTS["tensorrt"])
    assert all(grids[name] == SYMMETRIC.activations[name] for name in grids)


@pytest.mark.parametrize("plan", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_the_photo_keeps_its_integers(plan: object) -> None:
    for dialect, signed in (("onnxruntime", False), ("openvino", True)):
        grid = written_grids(GRAPH, plan, DIALECTS[dialect])["pixels"]  # type: ignore[arg-type]
        assert (grid.scale, grid.signed) == (1.0, signed)
        assert grid.zero_point == (0 if signed else 128)


def test_sums_are_read_in_float_by_adds_and_rounded_by_layers() -> None:
    dialect = DIALECTS["onnxruntime"]
    reads = rounded_reads(GRAPH, ASYMMETRIC, written_grids(GRAPH, ASYMMETRIC, dialect), dialect)
    assert reads["block2_add"] == {"block3_shortcut"}
    assert reads["block3_shortcut"] == {"block3_add"}
    assert reads["block3_sepconv2_pointwise"] == {"block3_pool"}


def test_what_a_float_layer_writes_is_rounded_for_int8_layers_alone() -> None:
    dialect = DIALECTS["onnxruntime"]
    readers = {"block2_sepconv1_depthwise", "block2_shortcut"}
    for names, rounded in (
        (("block2_shortcut",), readers),  # INT8 writes integers, which everyone reads
        (("block1_conv2", "block2_shortcut"), {"block2_sepconv1_depthwise"}),
    ):
        plan = with_precision(GRAPH, ASYMMETRIC, dict.fromkeys(names, "fp32"))
        reads = rounded_reads(GRAPH, plan, written_grids(GRAPH, plan, dialect), dialect)
        assert reads["block1_conv2_act"] == rounded
