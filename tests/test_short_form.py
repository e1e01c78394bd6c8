"""What a command line's flags make of a recipe, and of the network that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgexception.errors import UsageError
from edgexception.short_form import Flags, recipe_of


@pytest.mark.parametrize("classes", ["a,b,", "a,,b", "", " ", f"a,{'b' * 1001}"])
def test_a_class_needs_a_name_of_usual_length(classes: str) -> None:
    with pytest.raises(UsageError, match=r"model.*classes\.\d: .* (at least 1|at most 1000) char"):
        recipe_of(Path("net.keras"), Flags(classes=classes))
