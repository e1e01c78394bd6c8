"""INT8 post-training quantization: calibration images in, a plan and fitted layers out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import fx

from edgexception.errors import BadArtifact, UsageError
from edgexception.imageset import ImageSet
from edgexception.model.graph import INPUT, PIXEL_OFFSET, layers, to_graph_input
from edgexception.quantize.auto_precision import choose_precision, dialects_for
from edgexception.quantize.choice import Choice, choose
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.equalize import Profile, apply_moves, propose
from edgexception.quantize.nncf_adapter import calibrate
from edgexception.quantize.plan import ActivationQuant, Provenance, QuantPlan, WeightQuant
from edgexception.quantize.precision import resolve, with_float_layers, with_precision
from edgexception.quantize.ranges import grid_of_range, observe
from edgexception.quantize.reconstruct import images_held, reconstruct
from edgexception.recipe import PrecisionSpec, PtqSpec
from edgexception.train.state import Keeper

BATCH = 8
Report = Callable[[str, int, int, float], None]
"""Called with (what, batches done, batches in all, seconds left) of each pass over the images."""

PHOTO_RANGE = (0.0, 255.0)
"""Stands for the photo's own integers, whose grid is known."""
LEAST_WEIGHT = 1e-30
"""Weights below are none: any grid serves them."""
BIAS_LIMIT = 2**30
"""Largest |bias| in integer steps, well inside the int32 of the runtimes that quantize biases."""


@dataclass(frozen=True)
class Quantized:
    """The float graph with its layers fitted, and the plan that makes it INT8."""

    graph: fx.GraphModule
    plan: QuantPlan


def quantize_ptq(
    graph: fx.GraphModule,
    spec: PtqSpec,
    images: ImageSet,
    weight_bits: int,
    progress: Report | None = None,
    dialects: Sequence[str] = (),
    keeper: Keeper | None = None,
) -> Quantized:
    """Quantize an inference graph on calibration images; `graph` itself is not changed.

    `weight_bits` is 8, or 7 for processors whose uint8 x int8 products saturate at 16 bits.
    `dialects` are those that `precision: {auto: ...}` must hold in; none are all that can say the
    plan. With a `keeper`, learned rounding goes on from what an earlier run has saved there. Raises
    BadArtifact naming the layer or tensor that is not finite, UsageError for names of layers that
    are none, and GateFailed when `auto` cannot reach its bound.
    """
    precision = spec.precision or PrecisionSpec()
    named = resolve(graph, {"fp32": precision.fp32, "fp16": precision.fp16})
    for name, layer in layers(graph).items():
        if not all(torch.isfinite(p).all() for p in layer.parameters()):
            raise BadArtifact(
                f"layer {name}: its weights are not finite once BatchNorm is folded; "
                "the checkpoint is damaged or its training diverged"
            )
    symmetric = spec.activations == "symmetric"
    names = [sample.name for sample in images.samples]
    observe(graph, (), _Batches(images, progress, "check"), names)
    choice = _choice(graph, spec, images, progress)
    moved = apply_moves(graph, choice.moves)
    outputs = set(output_edges(graph))
    activations = {
        edge: _activation(edge, found, symmetric, "output" if edge in outputs else "input")
        for edge, found in _ranges(moved, spec, images, choice, progress).items()
    }
    weights = _weights(moved, activations, weight_bits)
    fitted = _fitted(moved, spec, activations, weights, images, progress, keeper)
    plan = QuantPlan(
        activations=activations,
        weights=weights,
        provenance=Provenance(
            method="ptq",
            activations=spec.activations,
            ranges=spec.ranges,
            shares=choice.shares if spec.ranges == "auto" else {},
            equalized={move.group.tensors[0]: move.how for move in choice.moves},
            bias_correction=spec.bias_correction,
            rounding=spec.rounding,
            images=len(images),
            calibration_digest=images.digest,
            versions={name: version(name) for name in ("nncf", "torch")},
        ),
    )
    if precision.auto is not None:
        asked = dialects_for(plan, dialects)
        plan = choose_precision(fitted, moved, plan, precision.auto, images, asked, progress)
    elif named:
        plan = with_precision(moved, plan, named)
    return Quantized(with_float_layers(fitted, moved, plan.precision), plan)


class _Batches:
    """Calibration images as the graph's input, decoded anew in every pass over them."""

    def __init__(self, images: ImageSet, progress: Report | None, what: str) -> None:
        self.images = images
        self.progress = progress
        self.what = what

    def __len__(self) -> int:
        return (len(self.images) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[torch.Tensor]:
        start = time.monotonic()
        for done, batch in enumerate(self.images.batches(BATCH)):
            if self.progress is not None and done:
                left = (time.monotonic() - start) / done * (len(self) - done)
                self.progress(self.what, done, len(self), left)
            yield to_graph_input(torch.from_numpy(batch))


def _choice(
    graph: fx.GraphModule, spec: PtqSpec, images: ImageSet, progress: Report | None
) -> Choice:
    """Find the moves and ranges that measure best; nothing is measured where neither is asked."""
    if spec.ranges != "auto" and not spec.equalization:
        return Choice([], {}, {}, {})
    halves = _halves(images)
    profiles = [
        Profile.of(graph, _Batches(half, progress, f"channels, half {number}"))
        for number, half in enumerate(halves, start=1)
    ]
    moves = propose(graph, Profile.merged(profiles)) if spec.equalization else []
    trials = [propose(graph, profile) if spec.equalization else [] for profile in profiles]
    folds = [
        _Batches(half, progress, f"choice, half {number}")
        for number, half in enumerate(halves, start=1)
    ]
    return choose(graph, moves, trials, profiles, folds, spec.activations == "symmetric")


def _halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split a set in two that share no photo, so that one can judge what the other proposes."""
    photos = list(dict.fromkeys(sample.photo.sha256 for sample in images.samples))
    if len(photos) < 2:
        raise UsageError(
            f"the calibration set has {len(photos)} photo: ranges and equalization are chosen on "
            "photos that they were not made from, and that takes 2. Give more photos, or set "
            "`ranges: minmax` and `equalization: false`"
        )
    parity = {photo: number % 2 for number, photo in enumerate(photos)}
    first, second = (
        dataclasses.replace(
            images,
            samples=tuple(s for s in images.samples if parity[s.photo.sha256] == half),
        )
        for half in (0, 1)
    )
    return first, second


def _first(images: ImageSet, count: int) -> ImageSet:
    return dataclasses.replace(images, samples=images.samples[:count])


def _ranges(
    graph: fx.GraphModule,
    spec: PtqSpec,
    images: ImageSet,
    choice: Choice,
    progress: Report | None,
) -> dict[str, tuple[float, float]]:
    """Return the range of every edge: as chosen, or by one method for all of them."""
    batches = _Batches(images, progress, "ranges")
    if spec.ranges == "auto":
        return {INPUT: PHOTO_RANGE} | choice.ranges
    symmetric = spec.activations == "symmetric"
    edges, found = output_edges(graph), {}
    if spec.ranges == "entropy":  # NNCF has no such method
        edges += input_edges(graph)
    else:
        found = calibrate(
            graph, batches, symmetric=symmetric, ranges=spec.ranges, percentile=spec.percentile
        )
    histograms = observe(graph, edges, batches)
    return found | {
        edge: histogram.range(spec.ranges, spec.percentile, symmetric)
        for edge, histogram in histograms.items()
    }


def _fitted(
    graph: fx.GraphModule,
    spec: PtqSpec,
    activations: dict[str, ActivationQuant],
    weights: dict[str, WeightQuant],
    images: ImageSet,
    progress: Report | None,
    keeper: Keeper | None,
) -> fx.GraphModule:
    """Return the graph with the rounding and the biases that the spec asks for."""
    learned = spec.rounding == "learned"
    if not (learned or spec.bias_correction):
        return graph
    start = time.monotonic()

    def layer_done(done: int, total: int) -> None:
        if progress is not None:
            left = (time.monotonic() - start) / done * (total - done)
            progress("rounding and biases" if learned else "biases", done, total, left)

    one = to_graph_input(torch.from_numpy(next(images.batches(1))))
    held = _first(images, images_held(graph, one))
    return reconstruct(
        graph,
        activations,
        weights,
        _Batches(held, None, ""),
        rounding=learned,
        biases=spec.bias_correction,
        keeper=keeper,
        progress=layer_done,
    )


def _activation(
    edge: str, found: tuple[float, float], symmetric: bool, role: str
) -> ActivationQuant:
    if edge == INPUT:  # the photo's own integers
        return ActivationQuant(
            scale=1.0, zero_point=0 if symmetric else PIXEL_OFFSET, signed=symmetric, role="input"
        )
    if not all(np.isfinite(found)):
        raise BadArtifact(
            f"tensor {edge} has the range {found} on the calibration images: the checkpoint's "
            "weights overflow there; check the preprocessing and the checkpoint"
        )
    scale, zero_point = grid_of_range(min(found[0], 0.0), max(found[1], 0.0), symmetric)
    return ActivationQuant.model_validate(
        {"scale": scale, "zero_point": zero_point, "signed": symmetric, "role": role}
    )


def _weights(
    graph: fx.GraphModule, activations: dict[str, ActivationQuant], bits: int
) -> dict[str, WeightQuant]:
    """Return the grids that reach the largest weight of every output channel."""
    readers = {r: activations[edge] for edge, names in input_edges(graph).items() for r in names}
    result = {}
    for name, layer in layers(graph).items():
        largest = layer.weight.detach().abs().flatten(1).amax(dim=1).double().numpy()
        scales = np.where(largest > LEAST_WEIGHT, largest, 1.0) / (127 if bits == 8 else 64)
        if layer.bias is not None:
            # A channel with nearly no weights lets its scale grow until its bias fits 32 bits.
            bias = np.abs(layer.bias.detach().double().numpy())
            scales = np.maximum(scales, bias / (readers[name].scale * BIAS_LIMIT))
        result[name] = WeightQuant.model_validate(
            {"scales": tuple(float(s) for s in np.float32(scales)), "bits": bits}
        )
    return result
