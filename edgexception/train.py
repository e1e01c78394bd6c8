"""The one fine-tuning loop: today a network trained from nothing on labelled images.

The weights follow from the spec and the images alone: every run on one machine ends with the same
bytes, whatever else the process did before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgexception.errors import EdgexError, OutOfResources, UsageError
from edgexception.imageset import ImageSet, in_parallel
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess
from edgexception.recipe import TrainedHereModel

Report = Callable[[int, int, float, float], None]
"""Called after every step with (steps done, steps in all, seconds left, loss of the step)."""

THREADS = 1
"""Of torch while it trains. Gradients are sums, and how torch splits a sum among its threads shows
in the last bits: one thread and two end with different weights (seen on the digits recipe). One is
also the only number that a busy machine does not punish: there, two took 13 times as long."""

WARMUP_SHARE = 0.05
"""Share of all steps over which the learning rate rises; after it, half a cosine down to zero."""


def train(spec: TrainedHereModel, images: ImageSet, progress: Report | None = None) -> Xception:
    """Train the spec's network from nothing and return it on the CPU in eval mode.

    Cross-entropy, AdamW, `spec.epochs` times over all images in batches of `spec.batch_size`, no
    augmentation. At the end the BatchNorm statistics are those of all images under the
    final weights.

    Raises UsageError for images without labels or whose classes are not the network's, a class
    without images, or a loss that is not finite; OutOfResources when memory runs out;
    BadArtifact for a photo that has changed since the set was opened.
    """
    labels = _checked_labels(spec, images)
    with _reproducible(spec.seed), _out_of_memory(spec):
        network = Xception(spec.architecture)
        _fit(network, spec, images, labels, progress)
        _settle_batch_norms(network, images, spec.batch_size)
        if not all(value.isfinite().all() for value in network.state_dict().values()):
            raise _diverged(spec, "weights are not finite after the last step")
    return network.eval()


def _fit(
    network: Xception,
    spec: TrainedHereModel,
    images: ImageSet,
    labels: torch.Tensor,
    progress: Report | None,
) -> None:
    """Run every step of the training."""
    batches = _batches(len(images), spec.batch_size)
    total = spec.epochs * batches
    optimizer = _optimizer(network, spec.learning_rate, spec.weight_decay)
    network.train()
    began = time.monotonic()
    for epoch in range(spec.epochs):
        order = torch.randperm(len(images)).numpy()
        for batch, chosen in enumerate(np.array_split(order, batches)):
            step = epoch * batches + batch
            rate = spec.learning_rate * schedule(step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = network(normalized(images, chosen))
            loss = nn.functional.cross_entropy(logits, labels[torch.from_numpy(chosen)])
            if not math.isfinite(value := loss.item()):
                raise _diverged(spec, f"the loss is {value} in epoch {epoch + 1}, step {batch + 1}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if progress is not None:
                left = (time.monotonic() - began) / (step + 1) * (total - step - 1)
                progress(step + 1, total, left, value)


def schedule(step: int, total: int) -> float:
    """Return the share of the full learning rate at a step 0 ... total - 1: in (0, 1]."""
    warmup = math.ceil(WARMUP_SHARE * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def normalized(images: ImageSet, chosen: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the images at those indices as the network's input, float32 (n, 3, H, W)."""
    pixels = torch.from_numpy(np.stack(in_parallel(images.image, chosen.tolist())))
    mean, std = _normalization(images.preprocess)
    # Left in the order of the pixels, channels last, which torch's convolutions keep from layer to
    # layer: so the digits recipe trains in 8 seconds instead of 13.
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def _normalization(preprocess: Preprocess) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(preprocess.mean).view(1, 3, 1, 1),
        torch.tensor(preprocess.std).view(1, 3, 1, 1),
    )


def _optimizer(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays the weights of layers, but no bias and nothing of a BatchNorm."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def _batches(images: int, size: int) -> int:
    """Return into how many batches of nearly one size an epoch is split.

    None has more than `size` images, unless that would leave one with a single image: BatchNorm
    needs two, and so the remainder of an epoch is spread over its batches.
    """
    return min(math.ceil(images / size), images // 2)


def _settle_batch_norms(network: nn.Module, images: ImageSet, batch_size: int) -> None:
    """Set the statistics of every BatchNorm to their mean over one pass, weights unchanged.

    The running averages of training lag behind the weights, and after a few dozen steps they still
    hold a share of their initial values; with little data that alone costs most of the accuracy.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    network.train()
    with torch.no_grad():
        order = torch.randperm(len(images)).numpy()  # a batch of one class would be no sample
        for chosen in np.array_split(order, _batches(len(images), batch_size)):
            network(normalized(images, chosen))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# --- what is refused


def _checked_labels(spec: TrainedHereModel, images: ImageSet) -> torch.Tensor:
    """Return the labels (N,), or raise UsageError if the network cannot learn from the images."""
    labels, outputs = images.labels, spec.architecture.classes
    if labels is None or images.classes is None:
        raise UsageError(
            "model.source: training needs a label for every image, and some of these have none. "
            "Use a folder with one sub-folder a class, or a manifest with labels"
        )
    if outputs != len(images.classes):
        raise UsageError(
            f"model.architecture.head: the network has {outputs or 'no'} outputs, but model.source "
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
    return torch.from_numpy(labels)


def _diverged(spec: TrainedHereModel, what: str) -> UsageError:
    return UsageError(
        f"training diverged: {what}. Set model.learning_rate below {spec.learning_rate:g} (a tenth "
        "is a good try), and let mean and std of model.preprocess bring pixels to about -1 ... 1"
    )


@contextmanager
def _out_of_memory(spec: TrainedHereModel) -> Iterator[None]:
    """Turn what torch and numpy raise without memory into OutOfResources."""
    try:
        yield
    except EdgexError:
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        height, width = spec.preprocess.input_size
        raise OutOfResources(
            f"out of memory while training {spec.architecture.parameters:,} parameters "
            f"on batches of {spec.batch_size} images of {height}x{width}. Set a smaller "
            "model.batch_size, input_size or architecture, or free memory"
        ) from error


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Make what torch computes inside follow from the seed; afterwards torch is as it was."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # No devices: the random state of the CPU only. inference_mode(False) brings gradients back if a
    # caller switched them off.
    with torch.random.fork_rng(devices=()), torch.inference_mode(False):
        try:
            torch.set_num_threads(THREADS)
            torch.use_deterministic_algorithms(True)
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_num_threads(threads)
