"""A network in steps, each a layer that mixes channels with all that follows it up to the next one.

What follows such a layer has its output channels: the activation, the spatial convolution of the
next separable one, a pool. So what a step takes depends on two widths alone. Adds are left out:
runtimes compute them as part of a convolution.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import fx, nn

from edgexception.architecture import Architecture
from edgexception.model.graph import INPUT
from edgexception.model.xception import Add, GlobalAveragePool, MaxPoolSame, Xception
from edgexception.prune.structure import is_spatial, trace

COPIES = 3
"""Of a step in one engine: weights then come from further away than the nearest cache, as in the
network, and what surrounds them weighs less."""


class Step(BaseModel):
    """One step but for its widths; steps that are equal take equally long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: int
    """Side of the kernel; 0 is a dense layer."""
    stride: int
    padding: int
    size: tuple[int, int]
    """Height and width of what it reads."""
    then: tuple[str, ...]
    """What follows: "relu", "elu", "spatial SEGMENTS", "pool PADDING", "mean"."""


def steps_of(architecture: Architecture, input_size: tuple[int, int]) -> dict[str, Step]:
    """Return the steps of a network by the layer that each begins with."""
    with torch.device("meta"):  # shapes without numbers: nothing is computed or allocated
        network = Xception(architecture).eval()
        graph = trace(network)
        sizes = _sizes(network, graph, input_size)
    steps: dict[str, Step] = {}
    name = ""
    for node in graph.nodes:
        module = network.get_submodule(cast(str, node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_spatial(node):
            name, size = node.name, sizes[node.all_input_nodes[0].name]
            steps[name] = _begun(module, size)
        elif module is not None and (word := _word(module, architecture)):
            steps[name] = steps[name].model_copy(update={"then": (*steps[name].then, word)})
    return steps


def _begun(layer: nn.Conv2d | nn.Linear, size: tuple[int, int]) -> Step:
    if isinstance(layer, nn.Linear):
        return Step(kernel=0, stride=1, padding=0, size=(1, 1), then=())
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    return Step(kernel=kernel, stride=stride, padding=padding, size=size, then=())


def _word(module: nn.Module, architecture: Architecture) -> str | None:
    if isinstance(module, nn.Conv2d):
        return f"spatial {architecture.segments or 'depthwise'}"
    words = {
        nn.ReLU: "relu",
        nn.ELU: "elu",
        MaxPoolSame: f"pool {architecture.padding}",
        GlobalAveragePool: "mean",
    }
    return words.get(type(module))


def _sizes(
    network: Xception, graph: fx.Graph, input_size: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}

    class Measure(fx.Interpreter):
        def run_node(self, n: fx.Node) -> torch.Tensor:
            value = cast(torch.Tensor, super().run_node(n))
            height, width = value.shape[2:] if value.ndim == 4 else (1, 1)
            sizes[n.name] = int(height), int(width)
            return value

    Measure(fx.GraphModule(network, graph)).run(torch.zeros(1, 3, *input_size))
    return sizes


def step_graph(step: Step, inputs: int, outputs: int) -> fx.GraphModule:
    """Return copies of a step as an inference graph, from pixels of the step's size to one vector.

    A 1x1 convolution makes the channels that the copies read; what they write is added up. Weights
    are random, which no layer is faster or slower for.
    """
    root, graph = nn.Module(), fx.Graph()

    def add(name: str, module: nn.Module, *arguments: fx.Node) -> fx.Node:
        root.add_module(name, module)
        return graph.call_module(name, arguments)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        read = add("channels", nn.Conv2d(3, inputs, 1), graph.placeholder(INPUT))
        if step.kernel == 0:
            read = add("channels_mean", GlobalAveragePool(), read)
        ends = []
        for copy in range(COPIES):
            value = add(f"copy{copy}", _layer(step, inputs, outputs), read)
            for index, word in enumerate(step.then):
                value = add(f"copy{copy}_{index}", _module(word, outputs), value)
            ends.append(value)
    total = ends[0]
    for copy, end in enumerate(ends[1:], start=1):
        total = add(f"sum{copy}", Add(), total, end)
    if step.kernel and "mean" not in step.then:
        total = add("mean", GlobalAveragePool(), total)
    graph.output(total)
    return fx.GraphModule(root, graph).eval().requires_grad_(False)


def _layer(step: Step, inputs: int, outputs: int) -> nn.Module:
    if step.kernel == 0:
        return nn.Linear(inputs, outputs)
    return nn.Conv2d(inputs, outputs, step.kernel, step.stride, step.padding)


def _module(word: str, channels: int) -> nn.Module:
    kind, _, how = word.partition(" ")
    if kind == "spatial":
        groups = channels if how == "depthwise" else int(how)
        return nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
    if kind == "pool":
        return MaxPoolSame(how)
    if kind == "mean":
        return GlobalAveragePool()
    return nn.ReLU() if kind == "relu" else nn.ELU()
