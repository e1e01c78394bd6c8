"""INT8 post-training quantization: calibration images in, a plan and corrected biases out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import fx, nn

from edgexception.errors import BadArtifact
from edgexception.imageset import ImageSet
from edgexception.model.graph import INPUT, PIXEL_OFFSET, layers, to_graph_input
from edgexception.quantize.auto_precision import choose_precision, dialects_for
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.nncf_adapter import Calibrated, calibrate
from edgexception.quantize.plan import ActivationQuant, Provenance, QuantPlan, WeightQuant
from edgexception.quantize.precision import resolve, with_float_layers, with_precision
from edgexception.quantize.ranges import grid_of_range, observe
from edgexception.recipe import PrecisionSpec, PtqSpec

BATCH = 8
Report = Callable[[str, int, int, float], None]
"""Called with (what, batches done, batches in all, seconds left) of each pass over the images."""

BIAS_LIMIT = 2**30
"""Largest |bias| in integer steps, well inside the int32 of the runtimes that quantize biases."""


@dataclass(frozen=True)
class Quantized:
    """The float graph with corrected biases, and the plan that makes it INT8."""

    graph: fx.GraphModule
    plan: QuantPlan


def quantize_ptq(
    graph: fx.GraphModule,
    spec: PtqSpec,
    images: ImageSet,
    weight_bits: int,
    progress: Report | None = None,
    dialects: Sequence[str] = (),
) -> Quantized:
    """Quantize an inference graph on calibration images; `graph` itself is not changed.

    `weight_bits` is 8, or 7 for processors whose uint8 x int8 products saturate at 16 bits.
    `dialects` are those that `precision: {auto: ...}` must hold in; none are all that can say the
    plan. Raises BadArtifact naming the layer or tensor that is not finite, UsageError for names of
    layers that are none, and GateFailed when `auto` cannot reach its bound.
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
    batches = _Batches(images, progress)
    histograms = observe(
        graph, output_edges(graph), batches, [sample.name for sample in images.samples]
    )
    found = calibrate(
        graph,
        batches,
        symmetric=symmetric,
        ranges=spec.ranges,
        percentile=spec.percentile,
        bias_correction=spec.bias_correction,
    )
    activations = {
        edge: _activation(edge, found.ranges[edge], symmetric, "input")
        for edge in input_edges(graph)
    } | {
        edge: _activation(
            edge, histogram.range(spec.ranges, spec.percentile, symmetric), symmetric, "output"
        )
        for edge, histogram in histograms.items()
    }
    corrected = _with_biases(graph, found)
    plan = QuantPlan(
        activations=activations,
        weights=_weights(corrected, found, activations, weight_bits),
        provenance=Provenance(
            method="ptq",
            activations=spec.activations,
            ranges=spec.ranges,
            bias_correction=spec.bias_correction,
            images=len(images),
            calibration_digest=images.digest,
            versions={name: version(name) for name in ("nncf", "torch")},
        ),
    )
    if precision.auto is not None:
        asked = dialects_for(plan, dialects)
        plan = choose_precision(corrected, graph, plan, precision.auto, images, asked, progress)
    elif named:
        plan = with_precision(graph, plan, named)
    return Quantized(with_float_layers(corrected, graph, plan.precision), plan)


class _Batches:
    """The calibration images as the graph's input, decoded anew in every pass over them."""

    def __init__(self, images: ImageSet, progress: Report | None) -> None:
        self.images = images
        self.progress = progress
        self.passes = 0

    def __len__(self) -> int:
        return (len(self.images) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.passes += 1
        what = f"calibration, pass {self.passes}"
        start = time.monotonic()
        for done, batch in enumerate(self.images.batches(BATCH)):
            if self.progress is not None and done:
                left = (time.monotonic() - start) / done * (len(self) - done)
                self.progress(what, done, len(self), left)
            yield to_graph_input(torch.from_numpy(batch))


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


def _with_biases(graph: fx.GraphModule, found: Calibrated) -> fx.GraphModule:
    """Return the graph with NNCF's biases, but for the layer that reads the photo itself.

    NNCF corrects what a layer's mean input does to its output. The photo's edge is exact, and the
    mean of a photo is no photo: on images with a dark border the correction of that one layer cost
    6 dB of logit SQNR (recipes/digits.yaml), on photos 0 to 1 dB (recipes/kitchenware.yaml).
    """
    corrected = copy.deepcopy(graph)
    exact = input_edges(graph)[INPUT]
    for name, layer in layers(corrected).items():
        if name in found.biases and name not in exact:
            layer.bias = nn.Parameter(found.biases[name], requires_grad=False)
    return corrected


def _weights(
    graph: fx.GraphModule,
    found: Calibrated,
    activations: dict[str, ActivationQuant],
    bits: int,
) -> dict[str, WeightQuant]:
    readers = {r: activations[edge] for edge, names in input_edges(graph).items() for r in names}
    result = {}
    for name, layer in layers(graph).items():
        scales = np.array(found.weight_scales[name], dtype=np.float64)
        if bits == 7:
            scales *= 127 / 64
        if layer.bias is not None:
            # A channel with nearly no weights lets its scale grow until its bias fits 32 bits.
            bias = np.abs(layer.bias.detach().double().numpy())
            scales = np.maximum(scales, bias / (readers[name].scale * BIAS_LIMIT))
        result[name] = WeightQuant.model_validate(
            {"scales": tuple(float(s) for s in np.float32(scales)), "bits": bits}
        )
    return result
