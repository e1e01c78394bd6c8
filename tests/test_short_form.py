"""What a command line's flags make of a recipe, and of the network that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgexception.agent.runtimes import MAX_BATCH
from edgexception.errors import UsageError
from edgexception.recipe import CheckpointModel
from edgexception.short_form import Flags, recipe_of
from edgexception.targets import find_target


@pytest.mark.parametrize("classes", ["a,b,", "a,,b", "", " ", f"a,{'b' * 1001}"])
def test_a_class_needs_a_name_of_usual_length(classes: str) -> None:
    with pytest.raises(UsageError, match=r"model.*classes\.\d: .* (at least 1|at most 1000) char"):
        recipe_of(Path("net.keras"), Flags(classes=classes))


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ({}, None),
        ({"input_size": 64}, {"input_size": (64, 64)}),
        ({"resize": "stretch"}, {"resize": "stretch"}),
        ({"interpolation": "nearest"}, {"interpolation": "nearest"}),
    ],
)
def test_only_what_the_flags_say_is_changed_in_the_preprocessing(
    flags: dict[str, Any], changes: dict[str, Any] | None
) -> None:
    model = recipe_of(Path("net.keras"), Flags(**flags)).model
    assert isinstance(model, CheckpointModel)
    found = model.preprocess
    assert changes == (None if found is None else found.model_dump(exclude_none=True))


@pytest.mark.parametrize("runtime", [(), ("auto",)])
def test_runtimes_that_are_not_named_are_all_of_the_target(runtime: tuple[str, ...]) -> None:
    flags = Flags(target="cpu-x86", runtime=runtime, precision=("fp32",))
    (spec,) = recipe_of(Path("net.keras"), flags, "bench").targets
    assert spec.runtimes == ("auto",)
    assert spec.runtime_names == tuple(find_target("cpu-x86").runtimes)


def test_precisions_are_those_of_the_exported_dialects() -> None:
    flags = Flags(
        calibration=Path("photos"),
        activations="symmetric",
        dialect=("tensorrt",),
        precision=("fp16", "int8-fp16"),
    )
    recipe = recipe_of(Path("net.keras"), flags, "export")
    assert recipe.export.precisions == ("fp16", "int8-fp16")
    assert recipe.quantize is not None
    plain = recipe_of(Path("net.keras"), replace(flags, precision=()), "export")
    assert plain.export.precisions == ("int8",)


@pytest.mark.parametrize(
    ("target", "runtime", "with_photos", "without"),
    [
        ("cpu-x86", (), ("fp32", "int8"), ("fp32",)),
        ("rtx-4090", (), ("fp16", "int8-fp16"), ("fp32",)),
        ("jetson-orin-nano-8gb", ("auto",), ("fp16", "int8-fp16"), ("fp32",)),
        # Its CUDA provider has no INT8.
        ("nvidia-gpu", ("auto",), ("fp16",), ("fp32",)),
        ("nvidia-gpu", ("onnxruntime-tensorrt",), ("fp16", "int8-fp16"), ("fp32",)),
    ],
)
@pytest.mark.parametrize("asked", [(), ("auto",)])
def test_float_and_int8_stand_side_by_side_in_their_quickest_forms(
    target: str,
    runtime: tuple[str, ...],
    with_photos: tuple[str, ...],
    without: tuple[str, ...],
    asked: tuple[str, ...],
) -> None:
    flags = Flags(target=target, runtime=runtime, precision=asked, calibration=Path("photos"))
    recipe = recipe_of(Path("net.keras"), flags, "build")
    assert recipe.targets[0].precisions == with_photos
    assert (recipe.quantize is not None) == (len(with_photos) == 2)
    recipe = recipe_of(Path("net.keras"), replace(flags, calibration=None), "build")
    assert recipe.targets[0].precisions == without


def test_what_only_builds_float16_needs_photos_to_see_that_it_may() -> None:
    with pytest.raises(UsageError, match="needs images to see that no tensor goes beyond"):
        recipe_of(Path("net.keras"), Flags(target="rtx-20"), "build")
    flags = Flags(target="rtx-20", calibration=Path("photos"))
    recipe = recipe_of(Path("net.keras"), flags, "build")
    assert (recipe.targets[0].precisions, recipe.quantize) == (("fp16",), None)
    with pytest.raises(UsageError, match="--ranges has no effect with --precision fp16 alone"):
        recipe_of(Path("net.keras"), replace(flags, ranges="mse"), "build")


def test_float16_alone_quantizes_nothing() -> None:
    flags = Flags(calibration=Path("photos"), dialect=("tensorrt",), precision=("fp16",))
    recipe = recipe_of(Path("net.keras"), flags, "export")
    assert recipe.quantize is None
    assert recipe.calibration is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"precision": ("fp16",)}, "--precision has no effect without --target, or --dialect"),
        (
            {"dialect": ("tensorrt",), "precision": ("fp16",), "ranges": "mse"},
            "--ranges has no effect with --precision fp16 alone",
        ),
        ({"dialect": ("openvino",), "precision": ("fp16",)}, "which openvino does not have"),
        ({"dialect": ("tensorrt",), "precision": ("fp8",)}, "export.precisions.0: "),
    ],
)
def test_precisions_that_cannot_be_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(Path("net.keras"), Flags(calibration=Path("photos"), **flags), "export")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("0", "bench.batch_sizes.0: Input should be greater"),
        (
            f"{MAX_BATCH + 1}",
            f"bench.batch_sizes.0: Input should be less than or equal to {MAX_BATCH}",
        ),
        ("1,1", "is listed twice"),
        ("1-8", "give batch sizes separated by commas"),
    ],
)
def test_batches_that_no_agent_builds_are_refused_at_once(batch: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(Path("net.keras"), Flags(target="cpu-x86", batch=batch), "build")
    flags = Flags(target="cpu-x86", batch=f"1,{MAX_BATCH}")
    bench = recipe_of(Path("net.keras"), flags, "build").bench
    assert bench is not None
    assert bench.batch_sizes == (1, MAX_BATCH)


def test_a_dynamic_engine_is_for_the_batches_that_are_named_or_for_1_to_8() -> None:
    for batch, sizes in ((None, (1, 8)), ("4,1,16", (4, 1, 16))):
        flags = Flags(target="cpu-x86", dynamic=True, batch=batch)
        recipe = recipe_of(Path("net.keras"), flags, "build")
        assert recipe.bench is not None
        assert recipe.bench.batch_sizes == sizes
        assert recipe.targets[0].dynamic_batch
    with pytest.raises(UsageError, match=r"dynamic_batch: .* none is above 1"):
        recipe_of(Path("net.keras"), Flags(target="cpu-x86", dynamic=True, batch="1"), "build")
    with pytest.raises(UsageError, match="--dynamic has no effect without --target"):
        recipe_of(Path("net.keras"), Flags(dynamic=True), "export")
