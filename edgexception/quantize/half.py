"""Which tensors of a strongly typed graph are float16, and which must stay float32.

TensorRT runs the types that the graph has, so a network in FP16 is a graph whose tensors are FP16.
That is decided node by node, before anything is written, from the weights and from the largest
value that every tensor had on the calibration images:

- A tensor is float16 if `MARGIN` times its largest value is at most 65,504. Photos that were not in
  calibration may be louder; beyond 65,504 a value is infinite and the logits are lost. Tensors that
  never reach 2**-14, below which float16 loses bits, stay float32 too.
- A float layer is float16 if its weights are as good there: in no output channel may rounding take
  more than 2**-8 of the weights' sum of magnitudes. Normal numbers lose at most 2**-11, those below
  2**-14 more. A channel that cannot reach float16's least number, 2**-24, is none.
- An INT8 layer is float16 (scales, bias, output) if its scales are as good there. A weight scale is
  rounded up, so that no weight clips, to 2**-21 at least; where that makes a grid coarser by more
  than 1/8, the layer stays float32. A tensor's scale is rounded to nearest and may change by 2**-8.
- A layer that the plan has in fp32 is float32.
- A ReLU, an ELU or a max-pool is float32 where the node that it reads is, so that runtimes can fuse
  the two.

What stays float32 is named with its reason. The full-size networks at hand have nothing to name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx, nn

from edgexception.errors import EdgexError, UsageError
from edgexception.model.graph import module_of
from edgexception.model.xception import MaxPoolSame
from edgexception.quantize.edges import input_edges
from edgexception.quantize.plan import FloatPrecision, QuantPlan
from edgexception.quantize.ranges import refuse_overflow

LARGEST = 65504.0
"""float16's largest finite number."""
MARGIN = 4.0
"""How many times louder than on the calibration images a tensor may become."""
NORMAL = 2.0**-14
"""float16's least number with all its bits."""
LEAST = 2.0**-24
"""float16's least number, and the step of those below `NORMAL`."""
WEIGHT_LOSS = 2.0**-8
"""Largest part of a channel's weights that may be lost to rounding."""
LEAST_SCALE = 8 * LEAST
"""Least weight scale that is written in float16: three of its bits are left."""
SCALE_GROWTH = 1 / 8
"""How much coarser the grid of a channel's weights may become."""
SCALE_CHANGE = 2.0**-8
"""How much the grid of a tensor may change."""


@dataclass(frozen=True)
class FloatTypes:
    """The float types of a graph, by node: what a node computes in and writes."""

    half: frozenset[str] = frozenset()
    """Nodes in float16; all others are float32."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Nodes that stay float32 though float16 is asked for, and why."""


def peaks_of(
    graph: fx.GraphModule, batches: Iterable[torch.Tensor], names: Sequence[str] = ()
) -> dict[str, float]:
    """Return the largest |value| of every tensor while the float graph runs over `batches`.

    `names` are the images', for messages. Raises BadArtifact naming the first tensor that is not
    finite, UsageError without images.
    """
    peaks: dict[str, float] = {}
    done = 0

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                refuse_overflow(n.name, value, names, done)
                peaks[n.name] = max(peaks.get(n.name, 0.0), float(value.abs().max()))
            return value

    watch = Watch(graph)
    watch.extra_traceback = False  # torch would append it to the message
    with torch.inference_mode():
        for batch in batches:
            watch.run(batch)
            done += len(batch)
    if not done:
        raise UsageError(
            "FP16 needs calibration images: without them nobody knows which tensors stay within "
            "float16's 65,504; add a `calibration:` section (--calibration)"
        )
    return peaks


def type_graph(
    graph: fx.GraphModule,
    plan: QuantPlan | None,
    base: FloatPrecision,
    peaks: Mapping[str, float] | None = None,
) -> FloatTypes:
    """Decide the float type of every node, where `base` is asked for all that the plan leaves open.

    `peaks` are the tensors' largest values, which base fp16 needs. With base fp32 only those layers
    are float16 that the plan has so; one that may overflow there raises UsageError naming it.
    """
    if base == "fp16":
        if peaks is None:
            raise EdgexError("float16 needs the tensors' largest values")
        return _half_graph(graph, plan, peaks)
    named = frozenset(n for n, p in (plan.precision if plan else {}).items() if p == "fp16")
    for node in graph.graph.nodes:
        fault = _overflow(graph, node, None, peaks) if node.name in named else None
        if fault:
            raise UsageError(
                f"layer {node.name}: {fault}; keep it in INT8, or name it under "
                "`quantize.precision: {fp32: [...]}`"
            )
    return FloatTypes(named)


def _half_graph(
    graph: fx.GraphModule, plan: QuantPlan | None, peaks: Mapping[str, float]
) -> FloatTypes:
    half: set[str] = set()
    kept: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        if _follows(graph, node) and node.all_input_nodes[0].name not in half:
            continue  # float32 like the node before it, which is named
        fault = (
            "the plan has it in fp32"
            if plan is not None and plan.precision.get(node.name) == "fp32"
            else _overflow(graph, node, plan, peaks) or _loss(graph, node, plan, peaks)
        )
        if fault:
            kept[node.name] = fault
        else:
            half.add(node.name)
    return FloatTypes(frozenset(half), kept)


def _module(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return module_of(graph, node) if node.op == "call_module" else None


def _follows(graph: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_module(graph, node), (nn.ReLU, nn.ELU, MaxPoolSame))


def _overflow(
    graph: fx.GraphModule,
    node: fx.Node,
    plan: QuantPlan | None,
    peaks: Mapping[str, float] | None,
) -> str | None:
    """Return what of a node's tensors and numbers may be beyond float16, or None."""
    layer = _module(graph, node)
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        for what, values in (("weights", layer.weight), ("biases", layer.bias)):
            largest = 0.0 if values is None else float(values.detach().abs().max())
            if largest > LARGEST:
                return f"its {what} reach {largest:.3g}, beyond the 65,504 of float16"
    integer = plan is not None and node.name in plan.weights  # reads levels, not the tensor
    sources = [] if integer else [source.name for source in node.all_input_nodes]
    for tensor in (*sources, node.name):
        if peaks is not None and peaks[tensor] * MARGIN > LARGEST:
            return (
                f"tensor {tensor} reaches {peaks[tensor]:.3g} on the calibration images, and "
                f"{MARGIN:g} times that is beyond the 65,504 of float16"
            )
    return None


def _loss(
    graph: fx.GraphModule, node: fx.Node, plan: QuantPlan | None, peaks: Mapping[str, float]
) -> str | None:
    """Return what of a node's tensor and numbers loses too many bits below 2**-14, or None."""
    if 0.0 < peaks[node.name] < NORMAL:
        return f"tensor {node.name} reaches {peaks[node.name]:.3g} only, where float16 loses bits"
    layer = _module(graph, node)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return None
    source = node.all_input_nodes[0].name
    weight = layer.weight.detach().flatten(1)
    audible = weight.abs().sum(dim=1) * peaks[source] >= LEAST
    if plan is None or node.name not in plan.weights:
        return _weight_loss(weight, audible)
    scale = plan.activations[source].scale
    if scale * 128 > LARGEST or abs(float(np.float16(scale)) / scale - 1) > SCALE_CHANGE:
        return f"the scale {scale:.3g} of tensor {source} does not fit float16"
    scales = np.array(plan.weights[node.name].scales)
    grown = (_rounded_up(scales) > scales * (1 + SCALE_GROWTH)) & audible.numpy()
    bad = np.flatnonzero(grown | (scales > LARGEST))
    if not len(bad):
        return None
    return f"the weight scale {scales[bad[0]]:.3g} of channel {bad[0]} does not fit float16"


def _weight_loss(weight: torch.Tensor, audible: torch.Tensor) -> str | None:
    size = weight.abs().sum(dim=1)
    lost = (weight - weight.half().float()).abs().sum(dim=1)
    channels = torch.nonzero((lost > WEIGHT_LOSS * size) & audible).flatten().tolist()
    if not channels:
        return None
    channel = channels[0]
    return (
        f"float16 loses {float(lost[channel] / size[channel]):.1%} of the weights of channel "
        f"{channel}, whose largest is {float(weight[channel].abs().max()):.3g}"
    )


# --- scales that are float16 numbers --------------------------------------------------------------


def with_half_scales(plan: QuantPlan, graph: fx.GraphModule, types: FloatTypes) -> QuantPlan:
    """Return the plan with every scale that a float16 layer uses as a float16 number.

    Integers must be made with these scales: they are the ones that the written graph has.
    """
    edges = {
        edge
        for edge, names in input_edges(graph).items()
        if any(name in types.half and name in plan.weights for name in names)
    }
    activations = {
        name: grid.model_copy(update={"scale": float(np.float16(grid.scale))})
        if name in edges
        else grid
        for name, grid in plan.activations.items()
    }
    weights = {
        name: grid.model_copy(update={"scales": tuple(_rounded_up(np.array(grid.scales)).tolist())})
        if name in types.half
        else grid
        for name, grid in plan.weights.items()
    }
    return plan.model_copy(update={"activations": activations, "weights": weights})


def _rounded_up(scales: np.ndarray) -> np.ndarray:
    """Return the next float16 at or above each scale, at least `LEAST_SCALE`, as float64."""
    least = np.maximum(scales, LEAST_SCALE)
    with np.errstate(over="ignore"):
        nearest = least.astype(np.float16)
        above = np.nextafter(nearest, np.float16(np.inf))
    rounded: np.ndarray = np.where(nearest < least, above, nearest).astype(np.float64)
    return rounded


def is_half_number(scale: float) -> bool:
    """Tell whether a scale is a float16 number."""
    return float(np.float16(scale)) == float(np.float32(scale))
