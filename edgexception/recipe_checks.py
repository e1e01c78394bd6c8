"""What the sections of a recipe ask of each other and of the targets."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress

from edgexception.errors import UsageError
from edgexception.recipe import AUTO, CheckpointModel, Recipe, TargetSpec, TrainedHereModel
from edgexception.recipe_checks_learning import LEARNING_RULES, Rule, labelled
from edgexception.recipe_data import IdxSource, PhotosSource, Source
from edgexception.strict_yaml import Fault, KeyPath
from edgexception.targets import (
    Dialect,
    find_dialect,
    find_runtime,
    find_target,
    is_half,
    is_int8,
    load_aliases,
    load_dialects,
    load_targets,
)
from edgexception.typed_yaml import field_name


def recipe_faults(recipe: Recipe, broken: frozenset[str] = frozenset()) -> list[Fault]:
    """Return what does not fit together in a recipe whose single fields are valid.

    `broken` names sections that are not what the user wrote (they did not validate): rules that
    read one of them are left out.
    """
    faults: list[Fault] = []
    for sections, rule in RULES:
        if not broken.intersection(sections.split()):
            faults.extend(rule(recipe))
    return faults


def check_recipe(recipe: Recipe) -> None:
    """Raise one UsageError that names everything that does not fit together in a recipe.

    For recipes that a command line made; those of files are checked by `load_recipe`.
    """
    if faults := recipe_faults(recipe):
        raise UsageError("\n".join(f"{field_name(fault.path)}: {fault.text}" for fault in faults))


def _quantize_calibrates(recipe: Recipe) -> Iterator[Fault]:
    if recipe.quantize and not recipe.calibration:
        yield Fault(
            ("quantize",),
            "needs images to find activation ranges on; add a `calibration:` section",
        )


def _percentile_is_used(recipe: Recipe) -> Iterator[Fault]:
    spec = recipe.quantize
    if spec and spec.ranges != "percentile" and spec.percentile != _default(spec, "percentile"):
        yield Fault(
            ("quantize", "percentile"),
            f"has no effect with ranges: {spec.ranges}; set `ranges: percentile` or remove it",
        )


def dialects_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the dialects that a recipe writes its INT8 network in; unknown names are left out."""
    names = []
    for spec in recipe.targets:
        with suppress(UsageError):
            names += [
                find_runtime(spec.target, runtime).dialect
                for runtime in spec.runtime_names
                if any(map(is_int8, spec.precisions))
            ]
    if any(map(is_int8, recipe.export.precisions)):
        names += recipe.export.dialects
    return tuple(dict.fromkeys(names))


def _precision_is_one_way(recipe: Recipe) -> Iterator[Fault]:
    if recipe.quantize is None or recipe.quantize.precision is None:
        return
    spec, path = recipe.quantize.precision, ("quantize", "precision")
    for name in ("fp32", "fp16"):
        yield from _distinct(getattr(spec, name), (*path, name), "name")
    auto = spec.auto
    if auto is None:
        if not spec.fp32 and not spec.fp16:
            yield Fault(path, "names no layer; write `fp32:`, `fp16:` or `auto:`, or remove it")
        return
    if spec.fp32 or spec.fp16:
        yield Fault((*path, "auto"), "chooses the layers itself; name layers or write auto")
    if auto.sqnr_db_min is None and auto.agreement_min is None:
        yield Fault((*path, "auto"), "needs a bound; write `sqnr_db_min:` or `agreement_min:`")
    if auto.times is not None and auto.weigh != _default(auto, "weigh"):
        yield Fault((*path, "auto", "weigh"), "has no effect beside `times`; remove one of them")


def _half_layers_have_kernels(recipe: Recipe) -> Iterator[Fault]:
    precision = recipe.quantize.precision if recipe.quantize else None
    if precision is None or not precision.fp16:
        return
    for name in dialects_of(recipe):
        if "fp16" not in load_dialects()[name].float_layers:
            yield Fault(
                ("quantize", "precision", "fp16"),
                f"{name} has no kernels for float16 layers; write them under `fp32:`, or take "
                f"{name} out",
            )


def _default(spec: object, name: str) -> object:
    return type(spec).model_fields[name].default  # type: ignore[attr-defined]


def _training_fits(recipe: Recipe) -> Iterator[Fault]:
    model = recipe.model
    if isinstance(model, CheckpointModel):
        yield from _distinct(model.classes or (), ("model", "classes"), "class")
        return
    if isinstance(model, TrainedHereModel) and not model.architecture.head:
        yield Fault(
            ("model", "architecture", "head"),
            "is empty, so there are no classes to train; write the number of classes",
        )
    yield from labelled(model.source, ("model", "source"), "training")


def _crop_is_used(recipe: Recipe) -> Iterator[Fault]:
    preprocess = recipe.model.preprocess
    # A checkpoint's own resize is not known here; `PreprocessChanges.applied_to` looks at it.
    if preprocess is None or preprocess.resize != "stretch":
        return
    if preprocess.crop_fraction not in (None, 1.0):
        yield Fault(
            ("model", "preprocess", "crop_fraction"),
            "has no effect with resize: stretch; set `resize: shortest-side` or remove it",
        )


def _evaluation_is_unseen(recipe: Recipe) -> Iterator[Fault]:
    if recipe.evaluation is None:
        return
    source = recipe.evaluation.source
    calibration = recipe.calibration
    if calibration and calibration.manifest is None and calibration.source == source:
        yield Fault(
            ("calibration", "source"),
            "is the evaluation's source, too, so the measured accuracy would flatter; "
            "calibrate on other images",
        )
    if not isinstance(recipe.model, CheckpointModel) and recipe.model.source == source:
        yield Fault(
            ("model", "source"),
            "is the evaluation's source, too, so the measured accuracy would mean nothing; "
            "train on other images",
        )


def _idx_labels_are_named(recipe: Recipe) -> Iterator[Fault]:
    places: tuple[tuple[KeyPath, object], ...] = (
        (("model", "source"), recipe.model),
        (("calibration", "source"), recipe.calibration),
        (("evaluation", "source"), recipe.evaluation),
    )
    for path, section in places:
        source = getattr(section, "source", None)
        if not isinstance(source, IdxSource):
            continue
        if (source.labels is None) != (source.classes is None):
            has, lacks = ("labels", "classes") if source.labels else ("classes", "labels")
            yield Fault(path, f"has `{has}` without `{lacks}`; write both or neither")
        yield from _distinct(source.classes or (), (*path, "classes"), "class")


def _distinct(values: Sequence[Hashable], path: KeyPath, what: str) -> Iterator[Fault]:
    for index, value in enumerate(values):
        if value in values[:index]:
            yield Fault((*path, index), f"the {what} {value} is listed twice; remove one")


def _lists_are_distinct(recipe: Recipe) -> Iterator[Fault]:
    names = [spec.target for spec in recipe.targets]
    for index, name in enumerate(names):
        if name in names[:index]:
            first = names.index(name)
            yield Fault(
                ("targets", index, "target"),
                f"{name} is already targets[{first}]; list its runtimes and precisions there",
            )
    for index, spec in enumerate(recipe.targets):
        yield from _distinct(spec.runtimes, ("targets", index, "runtimes"), "runtime")
        yield from _distinct(spec.precisions, ("targets", index, "precisions"), "precision")


def _batch_sizes_are_distinct(recipe: Recipe) -> Iterator[Fault]:
    if recipe.bench:
        yield from _distinct(recipe.bench.batch_sizes, ("bench", "batch_sizes"), "batch size")


def _bench_has_targets(recipe: Recipe) -> Iterator[Fault]:
    if recipe.bench and not recipe.targets:
        yield Fault(("bench",), "has nothing to measure; add a `targets:` section")


def _targets_exist(recipe: Recipe) -> Iterator[Fault]:
    """Names and precisions that targets.yaml knows."""
    for index, spec in enumerate(recipe.targets):
        path: KeyPath = ("targets", index)
        try:
            find_target(spec.target)
        except UsageError as error:
            yield Fault((*path, "target"), str(error))
            continue
        if spec.tensorrt and "tensorrt" not in spec.runtime_names:
            yield Fault((*path, "tensorrt"), "has no effect without the runtime tensorrt")
        for position, runtime in _runtimes(spec):
            if runtime == "auto":
                text = "auto is every runtime of the target; leave out the others, or it"
                yield Fault((*path, "runtimes", position), text)
                continue
            try:
                row = find_runtime(spec.target, runtime)
            except UsageError as error:
                yield Fault((*path, "runtimes", position), str(error))
                continue
            for precision in set(spec.precisions).difference(row.precisions):
                yield Fault(
                    (*path, "precisions"),
                    f"{runtime} on {spec.target} does not build {precision}; "
                    f"it builds: {', '.join(row.precisions)}",
                )


def _runtimes(spec: TargetSpec) -> Iterator[tuple[int, str]]:
    """Yield each runtime with the place of the entry that asks for it."""
    if spec.runtimes != AUTO:
        yield from enumerate(spec.runtimes)
    elif spec.target in (*load_targets(), *load_aliases()):
        yield from ((0, runtime) for runtime in spec.runtime_names)


def _int8_is_quantized(recipe: Recipe) -> Iterator[Fault]:
    if recipe.quantize is None:
        for index, spec in enumerate(recipe.targets):
            if any(map(is_int8, spec.precisions)):
                yield Fault(
                    ("targets", index, "precisions"),
                    "asks for int8, but nothing is quantized; add a `quantize:` section "
                    "or set `precisions: [fp32]`",
                )


def _dialects_can_say_the_plan(recipe: Recipe) -> Iterator[Fault]:
    if recipe.quantize is None:
        return
    for index, spec in enumerate(recipe.targets):
        for position, runtime in _runtimes(spec):
            try:
                dialect = find_dialect(spec.target, runtime)
            except UsageError:
                continue  # another rule names it
            if any(map(is_int8, spec.precisions)):
                path: KeyPath = ("targets", index, "runtimes", position)
                yield from _can_say(runtime, dialect, recipe.quantize.activations, path)


def _can_say(name: str, dialect: Dialect, activations: str, path: KeyPath) -> Iterator[Fault]:
    if activations not in dialect.activations:
        yield Fault(
            path,
            f"{name} cannot express {activations} activations; set "
            f"`quantize.activations: {dialect.activations[0]}` or remove it",
        )


def _exports_are_quantized(recipe: Recipe) -> Iterator[Fault]:
    yield from _distinct(recipe.export.dialects, ("export", "dialects"), "dialect")
    yield from _distinct(recipe.export.precisions, ("export", "precisions"), "precision")
    if not any(map(is_int8, recipe.export.precisions)):
        return
    if recipe.quantize is None:
        if recipe.export.dialects:
            yield Fault(
                ("export", "dialects"),
                "are ways to write the INT8 network, but nothing is quantized; add a `quantize:` "
                "section or remove them",
            )
        return
    for position, name in enumerate(recipe.export.dialects):
        path: KeyPath = ("export", "dialects", position)
        yield from _can_say(name, load_dialects()[name], recipe.quantize.activations, path)


def _half_has_what_it_needs(recipe: Recipe) -> Iterator[Fault]:
    """FP16 needs ranges to be safe, and a dialect that has it."""
    asked: list[KeyPath] = [
        ("targets", index, "precisions")
        for index, spec in enumerate(recipe.targets)
        if any(map(is_half, spec.precisions))
    ]
    if any(map(is_half, recipe.export.precisions)):
        path: KeyPath = ("export", "precisions")
        asked.append(path)
        if not recipe.export.dialects:
            yield Fault(path, "asks for float16, but `export.dialects` is empty; add tensorrt")
        for name in recipe.export.dialects:
            if "fp16" not in load_dialects()[name].float_layers:
                yield Fault(path, f"asks for float16, which {name} does not have; take it out")
    for path in asked if recipe.calibration is None else ():
        yield Fault(
            path,
            "asks for float16, which needs images to see that no tensor goes beyond 65,504; add a "
            "`calibration:` section",
        )


def _batch_is_measured(recipe: Recipe) -> Iterator[Fault]:
    batch = recipe.export.batch
    if batch is not None and recipe.bench and recipe.bench.batch_sizes != (batch,):
        sizes = ", ".join(str(size) for size in recipe.bench.batch_sizes)
        yield Fault(
            ("export", "batch"),
            f"fixes the batch size at {batch}, but bench measures {sizes}; set "
            f"`bench.batch_sizes: [{batch}]`, or remove `export.batch`, which leaves it open",
        )


def _dynamic_batch_has_bounds(recipe: Recipe) -> Iterator[Fault]:
    for index, spec in enumerate(recipe.targets):
        path: KeyPath = ("targets", index, "dynamic_batch")
        if not spec.dynamic_batch:
            continue
        if max(recipe.bench.batch_sizes if recipe.bench else (1,)) == 1:
            yield Fault(
                path,
                "is for batches from 1 to the largest of `bench.batch_sizes`, and none is above 1; "
                "write `bench: {batch_sizes: [1, 8]}`, or remove it",
            )
        if recipe.export.batch is not None:
            yield Fault(path, "needs an open batch; remove `export.batch`, which fixes it")
        if spec.tensorrt is not None and spec.tensorrt.dla_core is not None:
            yield Fault(path, "is not for a DLA, which takes one batch; remove it, or `dla_core`")


_GATES_WITHOUT_IMAGES = ("speedup_min", "executed_int8_share_min")


def _gates_are_measured(recipe: Recipe) -> Iterator[Fault]:
    gates = recipe.gates
    for name in type(gates).model_fields:
        if getattr(gates, name) is None:
            continue
        path: KeyPath = ("gates", name)
        pruned = name.startswith("pruned_")
        if pruned and not recipe.prune:
            yield Fault(path, "nothing is pruned; add a `prune:` section or remove this gate")
        if not pruned and not recipe.bench:
            yield Fault(path, "nothing measures it; add a `bench:` section or remove this gate")
        if name not in _GATES_WITHOUT_IMAGES and not recipe.evaluation:
            yield Fault(path, "there are no images to measure it on; add an `evaluation:` section")
        elif "top1" in name and recipe.evaluation:
            yield from _gate_has_labels(recipe.evaluation.source, path)
        if not pruned:
            yield from _gate_has_engines(name, recipe.targets, path)


def _gate_has_labels(source: Source, path: KeyPath) -> Iterator[Fault]:
    if isinstance(source, PhotosSource) or (isinstance(source, IdxSource) and not source.labels):
        yield Fault(
            path,
            "photos have no labels, so there is no accuracy; evaluate on labelled ones (a folder, "
            "a manifest) or remove this gate",
        )


def _gate_has_engines(name: str, targets: Sequence[TargetSpec], path: KeyPath) -> Iterator[Fault]:
    if not any(is_int8(precision) for spec in targets for precision in spec.precisions):
        yield Fault(path, "bounds int8 engines, but no target builds one; remove this gate")
    if name in ("top1_drop_max", "speedup_min"):
        for index, spec in enumerate(targets):
            if any(map(is_int8, spec.precisions)) and "fp32" not in spec.precisions:
                yield Fault(
                    path,
                    f"compares int8 with fp32, which targets[{index}] does not build; "
                    "add fp32 to its precisions or remove this gate",
                )


RULES: tuple[tuple[str, Rule], ...] = (
    *LEARNING_RULES,
    ("quantize calibration", _quantize_calibrates),
    ("quantize", _percentile_is_used),
    ("quantize", _precision_is_one_way),
    ("quantize targets export", _half_layers_have_kernels),
    ("model", _training_fits),
    ("model", _crop_is_used),
    ("model calibration evaluation", _idx_labels_are_named),
    ("model calibration evaluation", _evaluation_is_unseen),
    ("targets", _lists_are_distinct),
    ("bench", _batch_sizes_are_distinct),
    ("bench targets", _bench_has_targets),
    ("targets", _targets_exist),
    ("quantize targets", _int8_is_quantized),
    ("quantize targets", _dialects_can_say_the_plan),
    ("quantize export", _exports_are_quantized),
    ("calibration targets export", _half_has_what_it_needs),
    ("export bench", _batch_is_measured),
    ("targets export bench", _dynamic_batch_has_bounds),
    ("gates prune bench evaluation targets", _gates_are_measured),
)
"""Every rule with the sections it reads."""
