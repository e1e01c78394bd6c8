"""What the sections that prune, and those that train a network further, ask of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from edgexception.errors import UsageError
from edgexception.recipe import QatSpec, Recipe
from edgexception.recipe_data import IdxSource, PhotosSource, Source
from edgexception.recipe_prune import PruneSpec, RecoverySpec
from edgexception.strict_yaml import Fault, KeyPath
from edgexception.targets import find_runtime, find_target

Rule = Callable[[Recipe], Iterator[Fault]]


def _pruning_has_what_it_needs(recipe: Recipe) -> Iterator[Fault]:
    spec = recipe.prune
    if spec is None:
        return
    if not spec.budgets and spec.sparsity is None:
        text = (
            "has no budget; write `macs:`, `parameters:`, `size:` or `latency:` with a share, or "
            '`sparsity: "2:4"`'
        )
        yield Fault(("prune",), text)
    if spec.looks_at_images and not recipe.calibration:
        yield Fault(
            ("prune", "importance"),
            f"{spec.importance} is measured on images; add a `calibration:` section, or set "
            "`importance: magnitude`",
        )
    if spec.recovery and not spec.recovery.source and not recipe.calibration:
        yield Fault(
            ("prune", "recovery"), "needs images to learn from; add a `source:`, or `calibration:`"
        )
    yield from _rounds_are_possible(spec)


def _rounds_are_possible(spec: PruneSpec) -> Iterator[Fault]:
    if spec.recovery is None or spec.recovery.rounds == 1:
        return
    path, rounds = ("prune", "recovery", "rounds"), spec.recovery.rounds
    if spec.latency is not None:
        yield Fault(path, "a latency budget is met in one round; remove it, or name `macs:`")
    elif not spec.budgets:
        yield Fault(path, "no channels go without a budget; remove it, or add `macs:`")
    if 0 < spec.recovery.steps < rounds:
        yield Fault(
            path,
            f"{spec.recovery.steps} steps are too few for {rounds} rounds; give one each, or 0",
        )


def _latency_has_an_engine(recipe: Recipe) -> Iterator[Fault]:
    """A latency is that of an engine, and what says which has no other use."""
    spec = recipe.prune
    if spec is None:
        return
    if spec.latency is None:
        for name in ("runtime", "precision", "threads"):
            if getattr(spec, name) is not None:
                yield Fault(("prune", name), "has no effect without `latency`; remove it")
    elif spec.target is None:
        yield Fault(("prune", "latency"), "needs a device to measure on; add `target: cpu-x86`")
    if spec.target is None:
        return
    try:
        target = find_target(spec.target)
        row = find_runtime(spec.target, spec.runtime or next(iter(target.runtimes)))
    except UsageError as error:
        yield Fault(("prune", "target" if spec.runtime is None else "runtime"), str(error))
        return
    if spec.precision and spec.precision not in row.precisions:
        yield Fault(
            ("prune", "precision"),
            f"{spec.precision} is not built there; built are: {', '.join(row.precisions)}",
        )


_NO_SPARSE_KERNELS = {
    "onnxruntime": "it has no kernels for them",
    "openvino": "it has no kernels for them",
    "onnxruntime-cuda": "it has no kernels for them",
    "onnxruntime-tensorrt": "its TensorRT is not told of them",
    "tensorrt-rtx": "it takes the option, and 1.7.1 builds the same engine, byte for byte",
}


def _sparsity_has_kernels(recipe: Recipe) -> Iterator[Fault]:
    """One network for all targets: zeros that one of them only loses accuracy by are refused."""
    spec = recipe.prune
    if spec is None or spec.sparsity is None:
        return
    path: KeyPath = ("prune", "sparsity")
    if spec.recovery is None:
        yield Fault(path, "is chosen by the fit of `recovery:`; add that section")
    for target in recipe.targets:
        with suppress(UsageError):  # another rule names what is unknown
            for runtime in target.runtime_names:
                reason = _NO_SPARSE_KERNELS.get(runtime)
                sm = find_target(target.target).sm
                if sm is not None and sm < 80:
                    reason = f"its GPU is SM{sm}, and sparse tensor cores begin with SM80"
                if reason is not None:
                    yield Fault(
                        path,
                        f"{runtime} on {target.target} gains nothing by 2:4 weights: {reason}; "
                        "leave sparsity out, or give that target a recipe of its own",
                    )


def _learners(recipe: Recipe) -> Iterator[tuple[KeyPath, QatSpec | RecoverySpec]]:
    """Yield what trains a network that is there already, with its place."""
    if isinstance(recipe.quantize, QatSpec):
        yield ("quantize",), recipe.quantize
    if recipe.prune and recipe.prune.recovery:
        yield ("prune", "recovery"), recipe.prune.recovery


def _learners_have_labels(recipe: Recipe) -> Iterator[Fault]:
    for path, spec in _learners(recipe):
        if spec.distillation == 1.0:
            continue
        if spec.source is None:
            yield Fault(
                (*path, "distillation"),
                f"is {spec.distillation:g}, so labels are needed, and calibration images have "
                "none; add a labelled `source:`, or set it to 1.0",
            )
        else:
            yield from labelled(spec.source, (*path, "source"), "distillation below 1")


def _learners_have_not_seen_the_evaluation(recipe: Recipe) -> Iterator[Fault]:
    for path, spec in _learners(recipe):
        if recipe.evaluation and spec.source == recipe.evaluation.source:
            yield Fault(
                (*path, "source"),
                "is the evaluation's source, too, so the measured accuracy would flatter; "
                "train on other images",
            )


def labelled(source: Source, path: KeyPath, purpose: str) -> Iterator[Fault]:
    """Yield a fault where a source has no labels."""
    if isinstance(source, PhotosSource):
        yield Fault(
            (*path, "kind"),
            f"photos have no labels, which {purpose} needs; use a folder or manifest source",
        )
    elif isinstance(source, IdxSource) and source.labels is None:
        yield Fault(path, f"has no labels, which {purpose} needs; add `labels` and `classes`")


LEARNING_RULES: tuple[tuple[str, Rule], ...] = (
    ("prune calibration", _pruning_has_what_it_needs),
    ("prune", _latency_has_an_engine),
    ("prune targets", _sparsity_has_kernels),
    ("prune quantize", _learners_have_labels),
    ("prune quantize evaluation", _learners_have_not_seen_the_evaluation),
)
"""These rules with the sections they read."""
