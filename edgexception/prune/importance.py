"""How important each channel is, in four ways.

magnitude, batchnorm and activation are a channel's share of all that a layer writes or a tensor
has, so every layer is as important as another: half of 64 channels is worth half of 1,536. taylor
is a power of the logits, the same unit everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgexception.imageset import ImageSet
from edgexception.model.graph import inference_graph, layers, to_graph_input
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess
from edgexception.prune.plan import Importance, Structure

BATCH = 8
SEED = 0
Progress = Callable[[int, int], None]
"""Called with the images done and in all."""
Vectors = dict[str, torch.Tensor]
"""One number a channel, by the name of a layer or a tensor."""


def importance(
    network: Xception,
    preprocess: Preprocess,
    structure: Structure,
    kind: Importance,
    images: ImageSet | None,
    progress: Progress = lambda done, total: None,
) -> dict[str, NDArray[np.float64]]:
    """Return the importance of every channel of every group that may be cut.

    magnitude: the norm of the weights that write it, BatchNorm folded into them.
    batchnorm: the size of BatchNorm's factor; the norm of the weights where there is none.
    activation: the mean size of what the layers that mix channels read, on the images.
    taylor: by how much the logits would change without it, squared, to first order, on the images.

    A group of several writing layers has the sum of theirs. `images` may be None for the first two.
    """
    graph = inference_graph(network, preprocess)
    groups = [group for group in structure.groups if not group.fixed]
    if kind in ("magnitude", "batchnorm"):
        found = _norms(graph) | (_factors(network) if kind == "batchnorm" else {})
        return {g.name: _relative(found[name] for name in g.writers) for g in groups}
    assert images is not None  # noqa: S101 - the recipe's rules ask for a calibration section
    group_of = {name: group.name for group in groups for name in group.readers}
    if kind == "activation":
        sizes = _sizes(graph, group_of, images, progress)
        return {g.name: _relative(sizes[name] for name in g.readers) for g in groups}
    return {name: v.numpy() for name, v in _taylor(graph, group_of, images, progress).items()}


def _relative(vectors: Iterator[torch.Tensor]) -> NDArray[np.float64]:
    """Add up vectors, each over its own sum."""
    each = [vector / vector.sum().clamp_min(torch.finfo(vector.dtype).tiny) for vector in vectors]
    total: NDArray[np.float64] = torch.stack(each).sum(dim=0).numpy()
    return total


def _norms(graph: fx.GraphModule) -> Vectors:
    return {name: la.weight.double().flatten(1).norm(dim=1) for name, la in layers(graph).items()}


def _factors(network: Xception) -> Vectors:
    """Return the size of BatchNorm's factors by the layer that mixes channels before it."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layer = name.removesuffix("_bn")
            separable = hasattr(network.get_submodule(layer), "pointwise")
            key = f"{layer}_pointwise" if separable else layer
            found[key] = module.weight.detach().double().abs()
    return found


class _Watch(fx.Interpreter):
    """Runs a graph and keeps what some layers read, apart from what others make of it."""

    def __init__(self, graph: fx.GraphModule, layers: Collection[str]) -> None:
        super().__init__(graph)
        self.layers = layers
        self.seen: Vectors = {}

    def run_node(self, n: fx.Node) -> object:
        if n.name not in self.layers:
            return super().run_node(n)
        (read,), _ = self.fetch_args_kwargs_from_env(n)
        # A view of its own has the gradient of this layer alone, where several read one tensor.
        self.seen[n.name] = read.view_as(read)
        return self.call_module(cast(str, n.target), (self.seen[n.name],), {})


def _batches(images: ImageSet, progress: Progress) -> Iterator[torch.Tensor]:
    done = 0
    for batch in images.batches(BATCH):
        yield to_graph_input(torch.from_numpy(batch))
        done += len(batch)
        progress(done, len(images))


def _positions(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor (n, channels, positions) of one with any number of dimensions."""
    return value.double().flatten(2) if value.ndim > 2 else value.double().unsqueeze(2)


def _sizes(
    graph: fx.GraphModule, group_of: dict[str, str], images: ImageSet, progress: Progress
) -> Vectors:
    watch = _Watch(graph, group_of)
    sums: Vectors = {}
    with torch.inference_mode():
        for batch in _batches(images, progress):
            watch.run(batch)
            for name, value in watch.seen.items():
                sums[name] = sums.get(name, 0) + _positions(value).abs().mean(dim=2).sum(dim=0)
    return sums


def _taylor(
    graph: fx.GraphModule, group_of: dict[str, str], images: ImageSet, progress: Progress
) -> Vectors:
    """Return the mean over the images of the squared derivative of the logits by each channel.

    The derivative is by a factor on the channel, wherever it is read: minus that is what taking it
    out does to the logits, to first order. One backward pass with random signs on the logits gives
    a number whose square is, on average over the signs, the sum of the squares of all logits'.
    """
    watch = _Watch(graph, group_of)
    signs = torch.Generator().manual_seed(SEED)
    sums: Vectors = {}
    for batch in _batches(images, progress):
        logits = watch.run(batch.requires_grad_())
        for value in watch.seen.values():
            value.retain_grad()
        sign = torch.randint(0, 2, logits.shape, generator=signs) * 2.0 - 1.0
        (logits * sign).sum().backward()
        derivatives: Vectors = {}
        for name, value in watch.seen.items():
            slope = (_positions(value.detach()) * _positions(value.grad)).sum(dim=2)  # type: ignore[arg-type]
            group = group_of[name]
            derivatives[group] = derivatives.get(group, 0) + slope
        for group, slope in derivatives.items():
            sums[group] = sums.get(group, 0) + (slope**2).sum(dim=0) / len(images)
    return sums
