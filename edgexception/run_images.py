"""The images of a run: those it calibrates and evaluates with, and those it learns from."""

from __future__ import annotations

from edgexception.data import (
    open_calibration,
    open_evaluation,
    open_photos,
    open_training,
    refuse_leak,
)
from edgexception.errors import UsageError
from edgexception.imageset import ImageSet
from edgexception.recipe import QatSpec
from edgexception.recipe_prune import RecoverySpec
from edgexception.report.network import Network
from edgexception.run_state import RunState


def open_images(state: RunState) -> None:
    """Open the evaluation and the calibration images that the recipe names."""
    recipe, preprocess = state.recipe, state.card.preprocess
    if recipe.evaluation is not None:
        state.labelled, state.evaluation = open_evaluation(
            recipe.evaluation, preprocess, state.card.classes
        )
        _check_classes(state.labelled, state.card, "the evaluation")
    if recipe.calibration is not None:
        state.calibration = open_calibration(
            recipe.calibration, preprocess, evaluation=state.labelled
        )


def _check_classes(labelled: ImageSet, card: Network, what: str) -> None:
    """Refuse labelled folders as the network's classes when their number is another."""
    if labelled.labels is not None and len(labelled.classes or ()) != card.outputs:
        raise UsageError(
            f"{what} has {len(labelled.classes or ())} classes and the network "
            f"{card.outputs} outputs: list the class names in the order of the outputs as "
            "model.classes (--classes)"
        )


def images_to_learn(state: RunState, spec: QatSpec | RecoverySpec, section: str) -> ImageSet | None:
    """Return the photos of the spec's source, if it has one."""
    if spec.source is None:
        return None
    if spec.distillation == 1.0:
        images = open_photos(spec.source, state.card.preprocess)
    else:
        images = open_training(spec.source, state.card.preprocess, state.card.classes)
        _check_classes(images, state.card, f"{section}.source")
    if state.labelled is not None:
        refuse_leak(images, state.labelled, "training")
    return images
