"""Networks trained by a recipe: from nothing, or from the backbone of a checkpoint.

Cross-entropy on labelled images, AdamW, no augmentation. At the end the BatchNorm statistics are
those of the images under the final weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from edgexception.architecture import Architecture
from edgexception.errors import UsageError
from edgexception.imageset import ImageSet
from edgexception.model.xception import Xception
from edgexception.recipe import FineTunedModel, TrainedHereModel
from edgexception.train.batchnorm import MOST_SETTLING, settle
from edgexception.train.loop import (
    Course,
    Group,
    Report,
    batch_count,
    fit,
    order,
    out_of_memory,
    reproducible,
)
from edgexception.train.objective import Objective, normalized
from edgexception.train.state import Keeper

_HEAD = ("dense", "predictions")


def train(
    spec: TrainedHereModel,
    images: ImageSet,
    progress: Report | None = None,
    keeper: Keeper | None = None,
) -> Xception:
    """Train the spec's network from nothing and return it on the CPU in eval mode.

    Raises UsageError for images without labels or whose classes are not the network's, a class
    without images, or a loss that is not finite; OutOfResources when memory runs out;
    BadArtifact for a photo that has changed since the set was opened.
    """
    _check_labels(spec, spec.architecture, images)
    with _training(spec, spec.architecture, images) as course:
        network = Xception(spec.architecture)
        return learn(
            network, Objective("normalized"), images, course, spec.weight_decay, keeper, progress
        )


def fine_tune(
    spec: FineTunedModel,
    pretrained: Xception,
    images: ImageSet,
    progress: Report | None = None,
    keeper: Keeper | None = None,
) -> Xception:
    """Train a network that starts with the backbone of `pretrained` and a new head.

    Every weight learns, those of the backbone, too. Raises like `train`.
    """
    architecture = fine_tuned_architecture(spec, pretrained.architecture)
    _check_labels(spec, architecture, images)
    with _training(spec, architecture, images) as course:
        network = Xception(architecture)
        backbone = {
            name: value
            for name, value in pretrained.state_dict().items()
            if not name.startswith(_HEAD)
        }
        network.load_state_dict(backbone, strict=False)  # all but the head: one family, one body
        return learn(
            network, Objective("normalized"), images, course, spec.weight_decay, keeper, progress
        )


def fine_tuned_architecture(spec: FineTunedModel, pretrained: Architecture) -> Architecture:
    """Return the architecture of a checkpoint with the head that the spec asks for."""
    return Architecture.model_validate({**dict(pretrained), "head": spec.head})


@contextmanager
def _training(
    spec: TrainedHereModel | FineTunedModel, architecture: Architecture, images: ImageSet
) -> Iterator[Course]:
    """Yield how a spec's training goes; what is made inside follows from its seed."""
    batches = batch_count(len(images), spec.batch_size)
    course = Course(
        section="model",
        steps=max(1, round(spec.epochs * batches)),
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        ema=spec.ema,
        seed=spec.seed,
        threads=spec.threads,
        bfloat16=spec.bfloat16,
    )
    with (
        reproducible(spec.seed, spec.threads),
        out_of_memory(architecture.parameters, images, course),
    ):
        yield course


def learn(
    network: Xception,
    objective: Objective,
    images: ImageSet,
    course: Course,
    weight_decay: float,
    keeper: Keeper | None,
    progress: Report | None,
) -> Xception:
    """Train a network in place and return it in eval mode; its BatchNorms get the images'
    statistics, unless it learned with those that it has. Raises what `fit` raises.
    """
    fit(network, objective, images, course, partial(decaying, weight_decay), keeper, progress)

    def sample() -> Iterator[torch.Tensor]:
        # In an order of its own: a batch of one class would be no sample.
        chosen = order(course.seed, -1, len(images))[:MOST_SETTLING]
        for batch in np.array_split(chosen, batch_count(len(chosen), course.batch_size)):
            yield normalized(images, batch)

    if not course.as_used:
        settle(network, sample)
    return network.eval()


def decaying(weight_decay: float, network: nn.Module) -> list[Group]:
    """Let the weights of layers decay, but no bias and nothing of a BatchNorm."""
    parameters = list(network.parameters())
    weights = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim == 1]
    return [
        {"params": weights, "factor": 1.0, "weight_decay": weight_decay},
        {"params": others, "factor": 1.0, "weight_decay": 0.0},
    ]


# --- what is refused


def _check_labels(
    spec: TrainedHereModel | FineTunedModel, architecture: Architecture, images: ImageSet
) -> None:
    """Raise UsageError if the network cannot learn from the images."""
    labels, outputs = images.labels, architecture.classes
    if labels is None or images.classes is None:
        raise UsageError(
            "model.source: training needs a label for every image, and some of these have none. "
            "Use a folder with one sub-folder a class, or a manifest with labels"
        )
    if outputs != len(images.classes):
        field = "model.architecture.head" if isinstance(spec, TrainedHereModel) else "model.head"
        raise UsageError(
            f"{field}: the network has {outputs or 'no'} outputs, but model.source "
            f"has {len(images.classes)} classes ({', '.join(images.classes)[:200]}). "
            f"Set the last entry of head to {len(images.classes)}"
        )
    present = set(labels.tolist())
    absent = [name for index, name in enumerate(images.classes) if index not in present]
    if absent:
        raise UsageError(
            f"model.source: {len(images)} images are too few: there is none of "
            f"{len(absent)} of the {outputs} classes ({', '.join(absent)[:200]}). "
            "Add images of them, or leave those classes out"
        )
    if min(len(images), spec.batch_size) < 2:
        raise UsageError(
            f"model.batch_size {spec.batch_size} with {len(images)} images leaves one image a "
            "step, and BatchNorm learns from differences between images. Give 2 or more of both"
        )
