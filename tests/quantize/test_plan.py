"""A plan is plain data: it goes to JSON and back, and what is not a plan is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import minmax_plan, random_images, small_graph
from pydantic import ValidationError

from edgexception.errors import BadArtifact
from edgexception.quantize.plan import (
    ActivationQuant,
    Provenance,
    QuantPlan,
    WeightQuant,
    load_plan,
)

PROVENANCE = Provenance(
    method="ptq",
    activations="asymmetric",
    ranges="mse",
    bias_correction=True,
    rounding="nearest",
    images=3,
    calibration_digest="0" * 64,
    versions={"nncf": "3.4.0"},
)
scales = st.floats(2.0**-100, 2.0**100, width=32)


@st.composite
def grids(draw: st.DrawFn) -> ActivationQuant:
    signed = draw(st.booleans())
    low = -128 if signed else 0
    return ActivationQuant(
        scale=draw(scales),
        zero_point=draw(st.integers(low, low + 255)),
        signed=signed,
        role=draw(st.sampled_from(("input", "output"))),
    )


weights = st.builds(
    WeightQuant,
    scales=st.lists(scales, min_size=1, max_size=4).map(tuple),
    bits=st.sampled_from((7, 8)),
)
names = st.text(min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, grids()), st.dictionaries(names, weights))
def test_a_plan_survives_json_exactly(
    activations: dict[str, ActivationQuant], layers: dict[str, WeightQuant]
) -> None:
    plan = QuantPlan(activations=activations, weights=layers, provenance=PROVENANCE)
    assert QuantPlan.model_validate_json(plan.to_json()) == plan
    assert plan.to_json() == QuantPlan.model_validate_json(plan.to_json()).to_json()


def test_a_plan_file_is_read(tmp_path: Path) -> None:
    plan = minmax_plan(small_graph(), random_images(2, (40, 40)))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert load_plan(path) == plan


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", 0.0),
        ("scale", -1.0),
        ("scale", float("inf")),
        ("zero_point", 256),
        ("zero_point", -1),
        ("bits", 4),
        ("role", "weight"),
        ("surprise", 1),
    ],
)
def test_a_grid_that_is_none_is_refused_with_its_place(
    tmp_path: Path, field: str, value: Any
) -> None:
    plan = minmax_plan(small_graph(), random_images(2, (40, 40)))
    data = json.loads(plan.to_json())
    data["activations"]["block2_add"][field] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BadArtifact, match=r"plan\.json.*activations\.block2_add.*edgex quantize"):
        load_plan(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 2}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(BadArtifact, match=r"plan\.json: not a quantization plan"):
        load_plan(path)
    with pytest.raises(BadArtifact, match="not a quantization plan"):
        load_plan(tmp_path / "none.json")


def test_weights_without_a_scale_are_refused() -> None:
    with pytest.raises(ValidationError):
        WeightQuant(scales=())


def test_levels_and_limits() -> None:
    grid = ActivationQuant(scale=0.5, zero_point=3, signed=False, role="input")
    assert grid.levels == (0, 255)
    assert grid.model_copy(update={"signed": True}).levels == (-128, 127)
    assert WeightQuant(scales=(1.0,)).limit == 127
    # vpmaddubsw adds two uint8 x int8 products in 16 bits.
    assert 2 * 255 * WeightQuant(scales=(1.0,), bits=7).limit <= 2**15 - 1 < 2 * 255 * 65


def test_symmetric_is_int8_with_zero_point_0() -> None:
    images, graph = random_images(2, (40, 40)), small_graph()
    assert minmax_plan(graph, images, symmetric=True).symmetric
    assert not minmax_plan(graph, images).symmetric
