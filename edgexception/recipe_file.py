"""Recipe files: YAML in, YAML out, and the JSON schema that editors complete and check with."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel

from edgexception import strict_yaml
from edgexception.recipe import Recipe
from edgexception.recipe_checks import recipe_faults
from edgexception.strict_yaml import Document, Fault, read_yaml
from edgexception.typed_yaml import report, validate

Value = TypeVar("Value")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; paths in it are taken relative to its folder and come out absolute.

    Raises one UsageError with a line `file:line: field: reason; remedy` for every fault.
    """
    document = read_yaml(path)
    if not document.complete:
        raise report(document, ())
    recipe, faults = validate(document.data, Recipe)
    faults += _faults_between_sections(document, recipe, faults)
    if recipe is None or faults or document.faults:
        raise report(document, faults)
    # Not Path.resolve on the file itself: a checkpoint may be a link whose target has no suffix.
    folder = path.parent.resolve()
    return _map_paths(recipe, lambda inside: Path(os.path.abspath(folder / inside)))


def _faults_between_sections(
    document: Document, recipe: Recipe | None, faults: list[Fault]
) -> list[Fault]:
    """Check the sections that are valid on their own against each other, whatever the rest is."""
    broken = {str(fault.path[0]) for fault in (*document.faults, *faults) if fault.path}
    for name in broken.difference(Recipe.model_fields):  # a misspelt section is that section
        broken.update(difflib.get_close_matches(name, Recipe.model_fields, 1))
    if recipe is None and isinstance(document.data, dict):
        stand_in = {"name": "broken", "model": {"kind": "checkpoint", "path": "broken"}}
        valid = {key: value for key, value in document.data.items() if key not in broken}
        recipe, _ = validate({**stand_in, **valid}, Recipe)
    return recipe_faults(recipe, frozenset(broken)) if recipe else []


def dump_recipe(recipe: Recipe, relative_to: Path | None = None) -> str:
    """Return a recipe as YAML that `load_recipe` reads back to an equal recipe.

    Complete: defaults are written out, so that the file still says the same when a default
    changes. Compact: what is absent (null, or an empty section) is left out, leaves are on one
    line.
    With `relative_to`, the folder that the file will be in, paths are written relative to it.
    """
    if relative_to is not None:
        folder = relative_to.resolve()
        recipe = _map_paths(recipe, lambda path: Path(os.path.relpath(path, folder)))
    return yaml.dump(
        _plain(recipe),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of recipe files."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _map_paths(value: Value, change: Callable[[Path], Path]) -> Value:
    """Return a copy of a spec with every path in it changed."""
    if isinstance(value, Path):
        return cast(Value, change(value))
    if isinstance(value, tuple):
        return cast(Value, tuple(_map_paths(item, change) for item in value))
    if isinstance(value, BaseModel):
        changed = {name: _map_paths(item, change) for name, item in value}
        return cast(Value, value.model_copy(update=changed))
    return value


def _plain(spec: BaseModel) -> dict[str, object]:
    """Return a spec as plain data without what is absent."""
    data = json.loads(spec.model_dump_json(exclude_none=True))
    return {name: value for name, value in data.items() if not _is_empty(value)}


def _is_empty(section: object) -> bool:
    """Tell whether nothing is in a list, or in any field of a section: then it is the default."""
    if isinstance(section, dict):
        return all(value == [] for value in section.values())
    return section == []


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the strict reader would not take for text when it is plain."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _pattern in (strict_yaml.INT, strict_yaml.FLOAT, strict_yaml.OTHER_NUMBER):
    # PyYAML matches from the start only, so the pattern is anchored at its end.
    _anchored = re.compile(f"(?:{_pattern.pattern})$")
    _Dumper.add_implicit_resolver("tag:edgexception,2026:not-text", _anchored, None)
