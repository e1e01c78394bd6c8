"""A pruned network learns back what it lost: the loop of every training, then BatchNorm."""

from __future__ import annotations

from edgexception.errors import UsageError
from edgexception.imageset import ImageSet
from edgexception.model.xception import Xception
from edgexception.recipe_prune import RecoverySpec
from edgexception.train.classifier import learn
from edgexception.train.loop import Course, Report
from edgexception.train.objective import Objective
from edgexception.train.state import Keeper

SECTION = "prune.recovery"


def recover(
    network: Xception,
    teacher: Xception,
    spec: RecoverySpec,
    images: ImageSet,
    keeper: Keeper | None = None,
    progress: Report | None = None,
) -> Xception:
    """Train a pruned network in place and return it in eval mode; `teacher` is the unpruned one.

    At the end the BatchNorm statistics are those of the images under the final weights. Raises
    UsageError for a single image a step or a training that diverges, and what `fit` raises.
    """
    if min(len(images), spec.batch_size) < 2:
        raise UsageError(
            f"{SECTION}.batch_size {spec.batch_size} with {len(images)} images leaves one image a "
            "step, and BatchNorm learns from differences between images. Give 2 or more of both"
        )
    course = Course(
        section=SECTION,
        steps=spec.steps,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        ema=spec.ema,
        seed=spec.seed,
        threads=spec.threads,
        bfloat16=spec.bfloat16,
    )
    objective = Objective(
        "normalized", spec.distillation, teacher if spec.distillation > 0.0 else None
    )
    network.requires_grad_()
    return learn(network, objective, images, course, spec.weight_decay, keeper, progress)
