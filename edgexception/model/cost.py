"""What a network costs: multiply-accumulates, counted on its inference graph."""

from __future__ import annotations

import torch
from torch import fx, nn

from edgexception.model.graph import module_of
from edgexception.preprocess import Preprocess


def macs_of(graph: fx.GraphModule, preprocess: Preprocess) -> int:
    """Count the multiply-accumulates of an inference graph for one image."""
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
    return macs
