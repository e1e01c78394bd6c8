"""A pruned network gets back what it lost: least squares, the loop of every training, BatchNorm."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgexception.errors import UsageError
from edgexception.imageset import ImageSet
from edgexception.model.xception import Xception
from edgexception.prune.refit import refit
from edgexception.recipe_prune import RecoverySpec
from edgexception.train.classifier import learn
from edgexception.train.loop import Course, Report, order, reproducible
from edgexception.train.objective import Objective, normalized
from edgexception.train.state import Keeper

SECTION = "prune.recovery"
REFIT_PIXELS = 2**22
"""Pixels of the images that weights are fitted to, which are all in memory at once: 455 images of
96x96."""


def recover(
    network: Xception,
    teacher: Xception,
    spec: RecoverySpec,
    images: ImageSet,
    kept: Mapping[str, tuple[int, ...]] | None,
    keeper: Keeper | None = None,
    progress: Report | None = None,
    *,
    sparse: bool = False,
) -> Xception:
    """Train a pruned network in place and return it in eval mode; `teacher` is the unpruned one.

    First the weights are fitted to the teacher's layers (see `refit`); `kept` is the plan's, and
    None leaves them as they are. With `batchnorm: images` the statistics are at the end those of
    the images under the final weights. With `sparse` the 1x1 convolutions are 2:4 after the fit,
    and stay so. Raises UsageError for a single image a step or a training that diverges, and what
    `fit` raises.
    """
    if min(len(images), spec.batch_size) < 2:
        raise UsageError(
            f"{SECTION}.batch_size {spec.batch_size} with {len(images)} images leaves one image a "
            "step, and BatchNorm learns from differences between images. Give 2 or more of both"
        )
    if kept is not None:
        height, width = images.preprocess.input_size
        count = max(2, REFIT_PIXELS // (height * width))
        with reproducible(spec.seed, spec.threads):
            chosen = np.sort(order(spec.seed, -1, len(images))[:count])
            x = normalized(images, chosen)
            refit(network, teacher, kept, x, spec.batchnorm, sparse=sparse)
    if spec.steps == 0:
        return network.eval()
    course = Course(
        section=SECTION,
        steps=spec.steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        ema=spec.ema,
        seed=spec.seed,
        threads=spec.threads,
        bfloat16=spec.bfloat16,
        as_used=spec.batchnorm == "teacher",
    )
    objective = Objective(
        "normalized", spec.distillation, teacher if spec.distillation > 0.0 else None
    )
    network.requires_grad_()
    return learn(network, objective, images, course, spec.weight_decay, keeper, progress)
