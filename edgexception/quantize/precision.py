"""Which layers of a plan are not INT8: names resolved, the plan rewritten and checked."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from edgexception.errors import BadArtifact, EdgexError, UsageError
from edgexception.model.graph import layers
from edgexception.quantize.edges import input_edges, layer_outputs
from edgexception.quantize.plan import FloatPrecision, QuantPlan


def units_of(graph: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Return unit -> its layers: a separable convolution has two, every other layer is its own."""
    units: dict[str, list[str]] = {}
    for name in layers(graph):
        unit, _, step = name.rpartition("_")
        units.setdefault(unit if step in ("depthwise", "pointwise") else name, []).append(name)
    return {unit: tuple(names) for unit, names in units.items()}


def layers_named(graph: fx.GraphModule, name: str) -> tuple[str, ...]:
    """Return the layers that a name of a recipe means, in the order of the graph.

    A layer, a separable convolution (`block5_sepconv1`), a block (`block5`), or a glob over any of
    them. Raises UsageError with the nearest names when it means none.
    """
    units = units_of(graph)
    blocks = {unit.split("_")[0] for unit in units if "_" in unit}
    known = dict.fromkeys((*sorted(blocks), *units, *layers(graph)))
    meant = {entry for entry in known if fnmatchcase(entry, name)}
    if not meant:
        near = difflib.get_close_matches(name, known, 3) or list(units)[:3]
        raise UsageError(
            f"{name!r} is no layer, separable convolution or block of this network; near it are: "
            f"{', '.join(near)}"
        )
    return tuple(
        layer
        for unit, names in units.items()
        for layer in names
        if meant.intersection((layer, unit, unit.split("_")[0]))
    )


def resolve(
    graph: fx.GraphModule, named: Mapping[FloatPrecision, Collection[str]]
) -> dict[str, FloatPrecision]:
    """Return layer -> precision for names as a recipe has them.

    Raises UsageError naming every name that means nothing, or a layer that is named with both
    precisions.
    """
    found: dict[str, FloatPrecision] = {}
    faults = []
    for precision, names in named.items():
        for name in names:
            try:
                meant = layers_named(graph, name)
            except UsageError as error:
                faults.append(f"quantize.precision.{precision}: {error}")
                continue
            twice = [layer for layer in meant if found.get(layer, precision) != precision]
            if twice:
                faults.append(
                    f"quantize.precision: {twice[0]} is named as {found[twice[0]]} and, through "
                    f"{name!r}, as {precision}; name it once"
                )
            found |= dict.fromkeys(meant, precision)
    if faults:
        raise UsageError("\n".join(faults))
    if len(found) == len(layers(graph)):
        raise UsageError(
            "quantize.precision: names every layer, so nothing is left in INT8; name fewer, or "
            "leave out `quantize:`"
        )
    return {name: found[name] for name in layers(graph) if name in found}


def with_precision(
    graph: fx.GraphModule, plan: QuantPlan, precision: Mapping[str, FloatPrecision]
) -> QuantPlan:
    """Return a plan with layers in float, among them those that it has in float already.

    Their weights lose their grids, and so do the tensors that no INT8 layer reads; but a tensor
    that an INT8 layer writes keeps its grid as an output.
    """
    if not plan.precision.items() <= precision.items():
        raise EdgexError("a layer that is in float in a plan has no grids to go back to INT8 with")
    read = {
        edge
        for edge, readers in input_edges(graph).items()
        if any(reader not in precision for reader in readers)
    }
    written = layer_outputs(graph, precision)
    return plan.model_copy(
        update={
            "activations": {
                name: grid if name in read else grid.model_copy(update={"role": "output"})
                for name, grid in plan.activations.items()
                if name in read or name in written
            },
            "weights": {n: grid for n, grid in plan.weights.items() if n not in precision},
            "precision": dict(precision),
        }
    )


def with_float_layers(
    graph: fx.GraphModule, trained: fx.GraphModule, names: Collection[str]
) -> fx.GraphModule:
    """Return `graph` with the weights and biases that some layers have in `trained`.

    What quantization did to them (rounded weights, corrected biases) would be an error in float.
    """
    result = copy.deepcopy(graph)
    sources = layers(trained)
    for name, layer in layers(result).items():
        if name in names:
            layer.weight = _constant(sources[name].weight)
            bias = sources[name].bias
            layer.bias = None if bias is None else _constant(bias)
    return result


def _constant(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def check_fits(graph: fx.GraphModule, plan: QuantPlan) -> None:
    """Raise BadArtifact naming the first layer or tensor where a plan is not one of this graph."""
    for fault in _misfits(graph, plan):
        raise BadArtifact(
            f"the quantization plan does not fit the network: {fault}; make it again with "
            "`edgex quantize`"
        )


def _misfits(graph: fx.GraphModule, plan: QuantPlan) -> Iterator[str]:
    known = layers(graph)
    nodes = {node.name for node in graph.graph.nodes}
    sections = {"precision": known, "weights": known, "activations": nodes}
    for section, names in sections.items():
        for name in set(getattr(plan, section)).difference(names):
            near = difflib.get_close_matches(name, names, 1)
            yield f"{section} names {name}, which is not in it" + (
                f" (is it {near[0]}?)" if near else ""
            )
    for name, layer in known.items():
        yield from _layer_misfits(plan, name, layer.weight.shape[0])
    for edge, readers in input_edges(graph).items():
        grid = plan.activations.get(edge)
        reader = next((r for r in readers if r not in plan.precision), None)
        if reader is not None and (grid is None or grid.role != "input"):
            yield f"tensor {edge}, which {reader} reads, has no input grid"


def _layer_misfits(plan: QuantPlan, name: str, channels: int) -> Iterator[str]:
    grid = plan.weights.get(name)
    if name in plan.precision:
        if grid is not None:
            yield f"layer {name} is {plan.precision[name]} and has a weight grid, too"
    elif grid is None:
        yield f"layer {name} has no weight grid and is not in `precision`"
    elif len(grid.scales) != channels:
        yield f"layer {name} has {channels} output channels and {len(grid.scales)} weight scales"
