"""What a command line's flags make of a recipe, and of the network that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
