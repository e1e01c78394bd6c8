"""Which layers of a network an engine runs in which precision, beside what was planned.

The exporter writes what it planned into the ONNX file (`edgexception.layers`: precision,
multiply-accumulates for one image, and "2:4" for sparse weights, by layer). A runtime renames and
fuses nodes; what it calls a kernel is led back to a layer through the nodes of that file: a
convolution named after the ReLU behind it is still that convolution.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgexception.agent.onnx_file import Node, main_graph
from edgexception.agent.protocol import AgentError

METADATA = "edgexception.layers"
SPARSE = "2:4"
WIDEST_FIRST = ("fp32", "bf16", "fp16", "int8")

_KINDS = {"Conv": "convolution", "Gemm": "dense"}
# What a runtime may fuse behind a layer and name the kernel after.
_FOLLOWERS = {"Relu", "Elu", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Ran:
    """One kernel as a runtime tells of it: names it goes by, precision (None: not told), kind."""

    names: tuple[str, ...]
    precision: str | None
    kernel: str


def placement(
    model: Path, kernels: Iterable[Ran], *, by_followers: bool = True
) -> list[dict[str, Any]]:
    """Return every layer of an ONNX file with the precision planned and the one that ran.

    `by_followers` False is for a runtime that names every node in a kernel: there a kernel with
    the ReLU alone is not the layer.
    `executed` is None where no kernel of that name is there or its precision was not told; where
    several run one layer it is the widest. A file that says nothing of its layers has none.
    """
    metadata, nodes = main_graph(model)
    planned = _planned(metadata, model.name)
    owner = _owners(planned, nodes) if by_followers else {name: name for name in planned}
    ran: dict[str, list[Ran]] = {}
    for kernel in kernels:
        for layer in {owner[name] for name in kernel.names if name in owner}:
            ran.setdefault(layer, []).append(kernel)
    kinds = {node.name: _KINDS.get(node.operator, node.operator) for node in nodes}
    return [
        {
            "name": name,
            "kind": kinds.get(name, ""),
            "macs": facts["macs"],
            "planned": facts["precision"],
            "executed": _widest(ran.get(name, ())),
            "kernel": ", ".join(sorted({kernel.kernel for kernel in ran.get(name, ())})),
        }
        for name, facts in planned.items()
    ]


def sparse_layers(model: Path) -> list[str]:
    """Return the layers of an ONNX file whose weights are marked as 2:4 sparse."""
    metadata, _ = main_graph(model)
    planned = _planned(metadata, model.name)
    return [name for name, facts in planned.items() if "sparse" in facts]


def check_sparse(model: Path) -> None:
    """Raise the AgentError of an engine that would gain nothing from sparse kernels."""
    if not sparse_layers(model):
        raise AgentError(
            "usage",
            f"sparse_weights: no layer of {model.name} has 2 zeros in every 4 weights; prune with "
            "`sparsity`, or leave it out",
        )


def _planned(metadata: dict[str, str], file: str) -> dict[str, dict[str, Any]]:
    try:
        planned = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        planned = None
    if not isinstance(planned, dict) or not all(map(_is_planned, planned.values())):
        raise AgentError(
            "bad-artifact", f"{file}: its metadata {METADATA} is broken: export it again"
        )
    return planned


def _is_planned(facts: object) -> bool:
    return (
        isinstance(facts, dict)
        and {"precision", "macs"} <= set(facts) <= {"precision", "macs", "sparse"}
        and facts.get("sparse", SPARSE) == SPARSE
        and facts["precision"] in WIDEST_FIRST
        and type(facts["macs"]) is int
        and facts["macs"] >= 0
    )


def _owners(planned: Collection[str], nodes: list[Node]) -> dict[str, str]:
    """Return name -> layer for nodes and tensors: of the layers, and of what follows one."""
    owner: dict[str, str] = {}
    for node in nodes:
        follows = node.operator in _FOLLOWERS and len(node.inputs) > 0
        layer = owner.get(node.inputs[0], "") if follows else node.name
        if layer in planned:
            owner |= dict.fromkeys((node.name, *node.outputs), layer)
    return owner


def _widest(kernels: Iterable[Ran]) -> str | None:
    found = {kernel.precision for kernel in kernels}
    if not found or None in found:
        return None
    return min((p for p in found if p is not None), key=WIDEST_FIRST.index)
