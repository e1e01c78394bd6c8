"""Dumping a recipe loses nothing, arbitrary files do no harm, and the schema is whole."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD, write

from edgexception.architecture import Architecture
from edgexception.errors import UsageError
from edgexception.preprocess import Preprocess, PreprocessChanges
from edgexception.recipe import (
    BenchSpec,
    CheckpointModel,
    FineTunedModel,
    Gates,
    PtqSpec,
    QatSpec,
    Recipe,
    TargetSpec,
    TrainedHereModel,
)
from edgexception.recipe_data import (
    CalibrationSpec,
    DigitsSource,
    EvaluationSpec,
    FolderSource,
    IdxSource,
    ManifestSource,
)
from edgexception.recipe_file import dump_recipe, load_recipe, recipe_schema


def many(examples: int) -> settings:
    allowed = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, suppress_health_check=allowed)


TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20
)
TRICKY = st.sampled_from(
    "no on y ~ null Null true 010 0o7 0x1F 1:30 1_000 1e3 1e-3 .5 -.inf .nan << = 2026-01-31 "  # noqa: SIM905
    "- ? # a:b a#b 'a \"a {} [] & * ! | > % @ ` 0 -1 +1 1.5.2".split()
)
NAMES = st.one_of(TEXTS, TRICKY)
PATHS = NAMES.filter(lambda text: "/" not in text and text.strip(".")).map(Path)
INTS = st.integers(1, 5000)
SHARES = st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)
SOURCES = st.one_of(
    st.builds(FolderSource, kind=st.just("folder"), path=PATHS),
    st.builds(ManifestSource, kind=st.just("manifest"), path=PATHS),
    st.builds(DigitsSource, kind=st.just("digits"), split=st.sampled_from(["train", "test"])),
    st.builds(
        IdxSource,
        kind=st.just("idx"),
        images=PATHS,
        labels=PATHS,
        classes=st.lists(NAMES, min_size=1, max_size=3, unique=True).map(tuple),
        first=INTS,
        count=st.none() | INTS,
    ),
)
PREPROCESS = st.builds(
    Preprocess,
    input_size=st.tuples(st.integers(32, 4096), st.integers(32, 4096)),
    resize=st.just("shortest-side"),
    crop_fraction=st.floats(0.2, 1),
    mean=st.tuples(*[st.floats(-1e4, 1e4)] * 3),
    std=st.tuples(*[st.floats(1e-30, 1e4)] * 3),
)
CHANGES = st.builds(
    PreprocessChanges,
    input_size=st.none() | st.tuples(st.integers(32, 4096), st.integers(32, 4096)),
    resize=st.none() | st.just("shortest-side"),
    interpolation=st.none() | st.just("nearest"),
    crop_fraction=st.none() | st.floats(0.2, 1),
    mean=st.none() | st.tuples(*[st.floats(-1e4, 1e4)] * 3),
    std=st.none() | st.tuples(*[st.floats(1e-30, 1e4)] * 3),
)
ARCHITECTURES = st.builds(
    Architecture,
    entry=st.lists(st.lists(INTS, min_size=1, max_size=3).map(tuple), max_size=2).map(tuple),
    middle=st.just(()),
    tail=st.lists(INTS, min_size=1, max_size=3).map(tuple),
    head=st.lists(INTS, min_size=1, max_size=2).map(tuple),
    intermediate_activation=st.sampled_from(["none", "relu", "elu"]),
    bn_epsilon=st.floats(1e-12, 0.5),
)
MODELS = st.one_of(
    st.builds(
        CheckpointModel,
        kind=st.just("checkpoint"),
        path=PATHS,
        classes=st.none() | st.lists(NAMES, min_size=1, max_size=5, unique=True).map(tuple),
        preprocess=st.none() | CHANGES,
    ),
    st.builds(
        TrainedHereModel,
        kind=st.just("train"),
        architecture=ARCHITECTURES,
        preprocess=PREPROCESS,
        source=SOURCES,
        learning_rate=st.floats(1e-12, 10),
        epochs=st.floats(1e-3, 1e6),
        seed=SEEDS,
    ),
    st.builds(
        FineTunedModel,
        kind=st.just("fine-tune"),
        path=PATHS,
        source=SOURCES,
        head=st.lists(INTS, min_size=1, max_size=2).map(tuple),
        preprocess=st.none() | CHANGES,
        ema=st.floats(0, 0.9999),
        threads=st.integers(1, 64),
    ),
)
GATES = st.builds(
    Gates,
    top1_min=st.none() | SHARES,
    sqnr_db_min=st.none() | st.floats(-200, 200),
    executed_int8_share_min=st.none() | SHARES,
    speedup_min=st.none() | st.floats(0.001, 1000),
)
RECIPE = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    model=MODELS,
    calibration=st.builds(
        CalibrationSpec,
        source=SOURCES,
        images=INTS,
        seed=SEEDS,
        manifest=st.none() | PATHS,
    ),
    evaluation=st.builds(
        EvaluationSpec,
        source=st.builds(FolderSource, kind=st.just("folder"), path=st.just(Path("test-set"))),
    ),
    quantize=st.builds(
        PtqSpec,
        method=st.just("ptq"),
        ranges=st.just("percentile"),
        percentile=st.floats(50.01, 100),
        weight_bits=st.sampled_from(["auto", 7, 8]),
    )
    | st.builds(
        QatSpec,
        method=st.just("qat"),
        source=st.none() | SOURCES,
        steps=INTS,
        ema=st.floats(0, 0.9999),
    ),
    targets=st.just((TargetSpec(target="cpu-x86", runtimes=("openvino",), threads=2),)),
    bench=st.builds(
        BenchSpec, batch_sizes=st.lists(st.integers(1, 4096), min_size=1, unique=True).map(tuple)
    ),
    gates=GATES,
)


@many(60)
@given(recipe=RECIPE)
def test_a_dumped_recipe_loads_to_an_equal_recipe(tmp_path: Path, recipe: Recipe) -> None:
    absolute = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert load_recipe(write(tmp_path, dump_recipe(absolute))) == absolute
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    moved = write(tmp_path / "elsewhere", dump_recipe(absolute, tmp_path / "elsewhere"))
    assert load_recipe(moved) == absolute
    assert str(tmp_path) not in moved.read_text()
    # Nothing but the paths changed on the way.
    relative = absolute.model_dump_json().replace(f"{tmp_path}/", "")
    assert json.loads(relative) == json.loads(recipe.model_dump_json())


def test_a_dump_is_complete_and_compact(tmp_path: Path) -> None:
    text = """\
name: a
model: {kind: checkpoint, path: b.keras}
bench: {}
targets: [{target: cpu-x86, runtimes: [openvino], precisions: [fp32]}]
"""
    recipe = load_recipe(write(tmp_path, text))
    assert (
        dump_recipe(recipe, tmp_path)
        == """\
name: a
model: {kind: checkpoint, path: b.keras}
export:
  dialects: []
  precisions: [int8]
targets:
- target: cpu-x86
  runtimes: [openvino]
  precisions: [fp32]
  dynamic_batch: false
bench:
  batch_sizes: [1]
  warmup_ms: 500
  duration_ms: 2000
  min_iterations: 30
  rounds: 3
"""
    )


def test_what_is_absent_means_null_in_every_section() -> None:
    """Dumping leaves null out, so null must be the default wherever it is allowed."""

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if any(option == {"type": "null"} for option in node.get("anyOf", ())):
                assert node["default"] is None
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(recipe_schema())


@many(300)
@given(
    data=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_arbitrary_bytes_are_refused_in_one_message(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UsageError):
        load_recipe(write(tmp_path, data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | TRICKY,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["kind", "path", "source", "target"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@many(300)
@given(data=st.data())
def test_a_recipe_with_any_value_replaced_loads_or_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    tree = yaml.safe_load(GOOD)
    place, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(place[key], dict | list) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
    place[key] = data.draw(JSON)
    text = yaml.safe_dump(tree, allow_unicode=data.draw(st.booleans()))
    with contextlib.suppress(UsageError):
        load_recipe(write(tmp_path, text))


# --- schema


def test_the_schema_describes_every_section() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    bench = schema["$defs"]["BenchSpec"]["properties"]
    assert bench["duration_ms"]["description"].startswith("Measured time per engine")
    assert schema["$defs"]["CalibrationSpec"]["properties"]["source"]["discriminator"]
