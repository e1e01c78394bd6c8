"""A plan without calibration: for engines whose time counts, and whose logits nobody reads."""

from __future__ import annotations

from torch import fx, nn

from edgexception.model.graph import INPUT, layers, module_of
from edgexception.quantize.edges import input_edges, output_edges
from edgexception.quantize.plan import ActivationQuant, Provenance, QuantPlan, WeightQuant
from edgexception.targets import Activations

SCALE = 1 / 16
"""Of every activation. No integer kernel is faster for one scale than for another."""


def nominal_plan(graph: fx.GraphModule, activations: Activations) -> QuantPlan:
    """Return a plan that makes every layer INT8, with ranges that nothing was measured for."""
    signed = activations == "symmetric"
    inputs, outputs = input_edges(graph), output_edges(graph)
    relus = {
        node.name
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(module_of(graph, node), nn.ReLU)
    }
    return QuantPlan(
        activations={
            edge: ActivationQuant(
                scale=1.0 if edge == INPUT else SCALE,
                # Behind a ReLU it is 0: only then a runtime takes the ReLU for the grid's end.
                zero_point=0 if signed or edge in relus else 128,
                signed=signed,
                role="input" if edge in inputs else "output",
            )
            for edge in (*inputs, *outputs)
        },
        weights={
            name: WeightQuant(
                scales=tuple((layer.weight.flatten(1).abs().amax(1) / 127).clamp_min(1e-9).tolist())
            )
            for name, layer in layers(graph).items()
        },
        provenance=Provenance(
            method="nominal",
            activations=activations,
            ranges="none",
            bias_correction=False,
            rounding="nearest",
            images=0,
            calibration_digest="0" * 64,
            versions={},
        ),
    )
