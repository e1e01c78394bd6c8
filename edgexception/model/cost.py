"""What a network costs: parameters and multiply-accumulates, counted on its inference graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx, nn

from edgexception.model.graph import module_of
from edgexception.preprocess import Preprocess


class Cost(NamedTuple):
    """Size and work of one network for one image."""

    parameters: int
    macs: int


def cost_of(graph: fx.GraphModule, preprocess: Preprocess) -> Cost:
    """Count an inference graph's parameters (BatchNorm folded) and multiply-accumulates."""
    macs = 0

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal macs
            value = super().run_node(n)
            if n.op == "call_module" and isinstance(value, torch.Tensor):
                module = module_of(graph, n)
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    macs += value.numel() * module.weight[0].numel()
            return value

    with torch.inference_mode():
        Count(graph).run(torch.zeros(1, 3, *preprocess.input_size))
    return Cost(sum(p.numel() for p in graph.parameters()), macs)
