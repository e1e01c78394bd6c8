"""The section of a recipe that prunes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgexception.recipe_data import (
    Budget,
    Count,
    Decay,
    LearningRate,
    Seed,
    Share,
    Source,
    Spec,
    Threads,
)
from edgexception.targets import Precision

BUDGETS = ("macs", "parameters", "size", "latency")


class RecoverySpec(Spec):
    """How a pruned network gets back what it lost: its weights are fitted to the unpruned one's
    layers by least squares, its BatchNorm statistics are brought up to date, and it learns on."""

    source: Source | None = None
    """Images to learn from; None takes the calibration images. Labels count only where
    `distillation` is below 1."""
    steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 300
    """In all rounds together; 0 is the fit alone."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    """In how many the channels go, each by the same factor of the budget: what stays is fitted and
    takes its part of the steps, and the next round weighs the channels of that network. A plan of
    several rounds follows from the training between them, so `--plan-only` trains, too."""
    batch_size: Count = 32
    learning_rate: LearningRate = 1e-3
    """The peak: it rises for 5% of the steps, then falls to zero as a cosine."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-4
    distillation: Share = 1.0
    """Share of the loss that is the distance to the unpruned network's logits; it needs no label.
    The rest is cross-entropy with the labels of `source`."""
    batchnorm: Literal["teacher", "images"] = "teacher"
    """teacher: the unpruned network's statistics, moved by as much as pruning moved the tensors on
    the images; they stay so while it learns, and no dropout is added to its distance from the
    teacher. A few photos are enough for that. images: those of the images alone, which takes
    hundreds of different ones."""
    ema: Decay = 0.0
    """Decay of a moving average of the weights, which the network ends with; 0 is none."""
    bfloat16: bool = False
    """Compute layers in bfloat16, as for training."""
    threads: Threads = 1
    """Of the processor, as for training."""
    seed: Seed = 0


class PruneSpec(Spec):
    """Fewer channels: as many as a budget leaves, those that matter most; or sparse weights, or
    both.

    One budget at least, or `sparsity`; of two budgets both hold.
    """

    macs: Budget | None = None
    """Share of the network's multiply-accumulates that is left."""
    parameters: Budget | None = None
    """Share of its parameters that is left."""
    size: Budget | None = None
    """Share of the bytes of its weights that is left, as exported: in float32, or where the recipe
    quantizes in INT8 with float scales."""
    latency: Budget | None = None
    """Share of its latency that is left, as measured on `target`, batch size 1."""
    target: str | None = None
    """The device that the network is pruned for. Its row says `align`, and latency is its."""
    runtime: str | None = None
    """The one whose engines are timed; None is the first of the target."""
    precision: Precision | None = None
    """That the engines are timed in; None is fp32."""
    threads: Threads | None = None
    """Of the engines that are timed; None is one per physical core the process may use."""
    importance: Literal["magnitude", "batchnorm", "activation", "taylor"] = "taylor"
    """taylor: how much the logits of calibration images would change without a channel, to first
    order. activation: its mean size on those images. magnitude: the norm of its weights, BatchNorm
    folded in. batchnorm: its factor there. No labels are used."""
    ranking: Literal["global", "local"] = "global"
    """global: how much each layer loses follows from its importance and its cost. local: all lose
    the same share."""
    align: Annotated[int, Field(ge=1, le=1024)] | None = None
    """A width that is cut becomes a multiple of this. Vector units and tensor cores work on 8, 16
    or 32 channels at once; the rest of such a set is computed and thrown away. None is what the
    rows of `target`, or of the recipe's targets, name; 8 without any."""
    sparsity: Literal["2:4"] | None = None
    """2:4: of every four input channels of a 1x1 convolution two weights become zero, those that
    the others make up for best. TensorRT has kernels for it from SM80 on, and is told so. It needs
    `recovery`, whose fit it is part of."""
    recovery: RecoverySpec | None = None
    """None leaves the network with the weights that it has."""

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        found = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def looks_at_images(self) -> bool:
        """Whether the importance is measured on calibration images."""
        return bool(self.budgets) and self.importance in ("activation", "taylor")
