"""A command line is a recipe in short form: flags in, the same `Recipe` out that a file gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgexception.errors import UsageError
from edgexception.recipe import AUTO, Recipe
from edgexception.recipe_checks import check_recipe
from edgexception.recipe_file import load_recipe
from edgexception.recipe_prune import BUDGETS
from edgexception.targets import (
    TargetRuntime,
    is_int8,
    load_aliases,
    load_dialects,
    load_targets,
    side_by_side,
)
from edgexception.typed_yaml import field_path

RECIPE_SUFFIXES = (".yaml", ".yml")

_NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "prune": {"prune": BUDGETS},
    "quantize": {"quantize": ("calibration",)},
    "sensitivity": {"quantize": ("calibration",)},
    "build": {"targets": ("target",)},
    "bench": {"targets": ("target",), "bench": ("target",)},
}
"""Stage -> the sections that a recipe needs to get there, with the flags that make each."""

_DEPENDENT = {
    "calibration": ("images", "crops", "activations", "ranges", "weight_bits", "dialect"),
    "target": ("runtime", "batch", "dynamic", "threads"),
}


DYNAMIC_BATCHES = "1,8"
"""What `--dynamic` is without `--batch`."""


@dataclass(frozen=True)
class Flags:
    """What a command line says beside the checkpoint; None is not said."""

    macs: float | None = None
    parameters: float | None = None
    size: float | None = None
    latency: float | None = None
    importance: str | None = None
    ranking: str | None = None
    align: int | None = None
    classes: str | None = None
    input_size: int | None = None
    resize: str | None = None
    interpolation: str | None = None
    calibration: Path | None = None
    images: int | None = None
    crops: int | None = None
    evaluation: Path | None = None
    activations: str | None = None
    ranges: str | None = None
    weight_bits: str | None = None
    dialect: tuple[str, ...] = ()
    target: str | None = None
    runtime: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    batch: str | None = None
    dynamic: bool | None = None
    threads: int | None = None


def recipe_of(source: Path, flags: Flags, last: str = "import") -> Recipe:
    """Return the recipe that `source` is, or that `source` (a checkpoint) and the flags make.

    A recipe file takes one flag, `--target`, which keeps that target of it alone. Raises UsageError
    for flags that cannot be followed, and for what does not get as far as the stage `last`.
    """
    if source.suffix.lower() in RECIPE_SUFFIXES:
        recipe = _narrowed(load_recipe(source), source, flags)
        lacking = [name for name in _NEEDED.get(last, {}) if not getattr(recipe, name)]
        if lacking:
            raise UsageError(f"{source}: has no `{lacking[0]}:` section; add one for this command")
        return recipe
    for names in _NEEDED.get(last, {}).values():
        if all(getattr(flags, name) is None for name in names):
            hint = "; `edgex targets` lists them" if "target" in names else ""
            asked = " or ".join(f"--{name}" for name in names)
            raise UsageError(f"{source}: this command needs {asked} with a checkpoint{hint}")
    _check_used(flags)
    sections = _sections(source, flags, last)
    try:
        recipe = Recipe.model_validate(sections)
    except ValidationError as error:
        schema = Recipe.model_json_schema()
        faults = "; ".join(
            f"{'.'.join(map(str, field_path(fault['loc'], schema)))}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise UsageError(f"these flags make no recipe: {faults}") from error
    check_recipe(recipe)
    return recipe


def _check_used(flags: Flags) -> None:
    """Refuse a flag that says something about a part of the recipe that is not there."""
    for base, dependents in _DEPENDENT.items():
        if getattr(flags, base) is None:
            for name in dependents:
                if getattr(flags, name) not in (None, ()):
                    raise UsageError(f"--{_flag(name)} has no effect without --{_flag(base)}")
    pruned = any(getattr(flags, name) is not None for name in BUDGETS)
    if pruned and flags.calibration and flags.importance in ("magnitude", "batchnorm"):
        raise UsageError(f"--calibration has no effect with --importance {flags.importance}")
    if flags.precision and flags.target is None and not flags.dialect:
        raise UsageError("--precision has no effect without --target, or --dialect for export")
    for name in ("activations", "ranges", "weight_bits"):
        if getattr(flags, name) is not None and not _quantizes(flags):
            asked = ", ".join(_precisions(flags) if flags.target else flags.precision)
            raise UsageError(f"--{_flag(name)} has no effect with --precision {asked} alone")


def _quantizes(flags: Flags) -> bool:
    return any(map(is_int8, _precisions(flags) if flags.target else flags.precision or ("int8",)))


def _precisions(flags: Flags) -> tuple[str, ...]:
    """Return what the engines compute in; `auto`, the default, is float and INT8 side by side.

    Of several runtimes: what all of them build. An unknown name is left for the recipe's checks.
    """
    if flags.precision and flags.precision != AUTO:
        return flags.precision
    able: list[set[str]] = [set(row.precisions) for row in _rows(flags)]
    images = flags.calibration is not None
    return side_by_side(set[str].intersection(*able), images=images) if able else ("fp32",)


def _rows(flags: Flags) -> list[TargetRuntime]:
    """Return the runtimes that the flags name, or all of the target; the unknown are left out."""
    name = load_aliases().get(flags.target or "", flags.target or "")
    target = load_targets().get(name)
    every = not flags.runtime or flags.runtime == AUTO
    rows = target.runtimes.items() if target else ()
    return [row for name, row in rows if every or name in flags.runtime]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _narrowed(recipe: Recipe, source: Path, flags: Flags) -> Recipe:
    given = [
        name for name, value in vars(flags).items() if value not in (None, ()) and name != "target"
    ]
    if given:
        raise UsageError(
            f"{source}: is a recipe, so --{_flag(given[0])} has no place; write it into "
            "the recipe, or name a checkpoint instead"
        )
    if flags.target is None:
        return recipe
    kept = tuple(spec for spec in recipe.targets if spec.target == flags.target)
    if not kept:
        named = ", ".join(spec.target for spec in recipe.targets) or "none"
        raise UsageError(f"{source}: has no target {flags.target}; it has: {named}")
    return recipe.model_copy(update={"targets": kept})


def _sections(source: Path, flags: Flags, last: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"name": _name(source), "model": _model(source, flags)}
    if flags.calibration is not None:
        sections["calibration"] = _set(
            {
                "source": _photos(flags.calibration),
                "images": flags.images,
                "crops_per_photo": flags.crops,
            }
        )
    if last == "prune":
        names = (*BUDGETS, "importance", "ranking", "align", "target", "threads")
        engine = {name: _one(flags, name) for name in ("runtime", "precision")}
        sections["prune"] = _set({**{name: getattr(flags, name) for name in names}, **engine})
    elif flags.calibration is not None and _quantizes(flags):
        sections["quantize"] = _set(
            {
                "method": "ptq",
                "activations": flags.activations or _activations_needed(flags),
                "ranges": flags.ranges,
                "weight_bits": _bits(flags.weight_bits),
            }
        )
    if flags.evaluation is not None:
        sections["evaluation"] = {"source": _labelled(flags.evaluation)}
    batches = _batches(flags.batch or (DYNAMIC_BATCHES if flags.dynamic else None))
    if flags.dialect:
        sections["export"] = _set(
            {"dialects": flags.dialect, "precisions": flags.precision or None}
        )
    if flags.target is not None and last != "prune":
        sections["targets"] = [
            _set(
                {
                    "target": flags.target,
                    "runtimes": flags.runtime or AUTO,
                    "precisions": _precisions(flags),
                    "threads": flags.threads,
                    "dynamic_batch": flags.dynamic,
                }
            )
        ]
        if last == "bench" or batches:
            sections["bench"] = _set({"batch_sizes": batches})
    return sections


def _activations_needed(flags: Flags) -> str | None:
    """Return the activations of the dialects asked for where they have one kind alone."""
    dialects = load_dialects()
    names = [*(row.dialect for row in _rows(flags)), *flags.dialect]
    kinds = {dialects[name].activations for name in names if name in dialects}
    single = {kind[0] for kind in kinds if len(kind) == 1}
    return single.pop() if len(single) == 1 else None


def _one(flags: Flags, name: str) -> str | None:
    values: tuple[str, ...] = getattr(flags, name) or ()
    if len(values) > 1:
        raise UsageError(f"--{name}: a network is pruned for one engine; name one")
    return values[0] if values else None


def _set(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not said, so that the recipe's defaults hold."""
    return {key: value for key, value in section.items() if value is not None}


def _name(source: Path) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", source.stem.lower()).strip("-")[:60]
    return plain or "network"


def _model(source: Path, flags: Flags) -> dict[str, Any]:
    model: dict[str, Any] = {"kind": "checkpoint", "path": source.absolute()}
    if flags.classes is not None:
        model["classes"] = tuple(name.strip() for name in flags.classes.split(","))
    side = flags.input_size
    changes = _set(
        {
            "input_size": None if side is None else (side, side),
            "resize": flags.resize,
            "interpolation": flags.interpolation,
        }
    )
    if changes:
        model["preprocess"] = changes
    return model


def _bits(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _batches(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise UsageError(f"--batch {text!r}: give batch sizes separated by commas, such as 1,8")
    return tuple(int(part) for part in text.split(","))


def _photos(path: Path) -> dict[str, Any]:
    """Photos for calibration: labels, if there are any, are not used."""
    kind = "manifest" if path.suffix.lower() in (".csv", ".jsonl") else "photos"
    return {"kind": kind, "path": path.absolute()}


def _labelled(path: Path) -> dict[str, Any]:
    """A manifest, a folder with one sub-folder a class, or a plain folder of photos."""
    if path.suffix.lower() in (".csv", ".jsonl"):
        return {"kind": "manifest", "path": path.absolute()}
    folders = path.is_dir() and any(entry.is_dir() for entry in path.iterdir())
    return {"kind": "folder" if folders else "photos", "path": path.absolute()}
