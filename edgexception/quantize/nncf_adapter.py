"""NNCF's calibration of an inference graph, read back as data: one range method for all tensors.

NNCF (https://github.com/openvinotoolkit/nncf, 3.4) calibrates the range of every layer's input. Its
own placement quantizes residual adds, pools and, per channel, the inputs of depthwise convolutions;
a plan has none of these as input edges, so they are switched off and what is left is checked to be
exactly the plan's input edges.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, cast

import rich
import torch
from torch import fx, nn

os.environ.setdefault(
    "NNCF_CI", "1"
)  # NNCF reports every use to Google Analytics unless told not to

import nncf
import nncf.torch.quantization.quantize_functions as nncf_functions
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    RangeEstimatorParametersSet,
    StatisticsCollectorParameters,
    StatisticsType,
)
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SymmetricQuantizer
from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

from edgexception.errors import EdgexError
from edgexception.model.graph import layers
from edgexception.quantize.edges import input_edges

_NOT_INPUT_EDGES = ("add", "mean", "relu", "elu", "max_pool2d")
_ROOT = "network"


class _Network(nn.Module):
    """A plain module around the graph: NNCF treats a bare GraphModule as an exported program."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.network = graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.network(x))


class Batches(Protocol):
    """Batches that can be gone over more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...


def calibrate(
    graph: fx.GraphModule,
    batches: Batches,
    *,
    symmetric: bool,
    ranges: Literal["minmax", "percentile", "mse"],
    percentile: float,
) -> dict[str, tuple[float, float]]:
    """Run NNCF's PTQ over `batches` of the graph's input; `graph` itself is not changed.

    NNCF goes over the batches several times. `percentile` is NNCF's: the mean of the batches' own.
    """
    with _quiet_eager_nncf():
        quantized = nncf.quantize(
            _Network(copy.deepcopy(graph)),
            nncf.Dataset(batches),
            preset=(
                nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED
            ),
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(types=list(_NOT_INPUT_EDGES), validate=False),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.DISABLE,
                disable_bias_correction=True,
                activations_quantization_params=QuantizationParameters(per_channel=False),
                activations_range_estimator_params=_range_estimator(ranges, percentile),
            ),
        )
    return _read(graph, quantized)


def _range_estimator(ranges: str, percentile: float) -> RangeEstimatorParameters:
    if ranges == "minmax":
        return RangeEstimatorParametersSet.MINMAX
    if ranges == "mse":  # the histogram search of least squared error
        return RangeEstimatorParametersSet.HISTOGRAM
    tail = 1.0 - percentile / 100.0
    return RangeEstimatorParameters(
        *(
            StatisticsCollectorParameters(
                statistics_type=StatisticsType.QUANTILE,
                aggregator_type=AggregatorType.MEAN,
                quantile_outlier_prob=tail,
            )
            for _ in ("min", "max")
        )
    )


@contextmanager
def _quiet_eager_nncf() -> Iterator[None]:
    """Keep NNCF's log for problems, its progress bars off, and its quantizers plain torch.

    NNCF would compile a C++ extension on first use and torch.compile the fallback: minutes on a
    small machine, a compiler that may not be there, and a stale lock after a killed run.
    """
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    console = rich.get_console()  # NNCF draws on this one: on stdout, where only data belongs
    drawn, console.quiet = console.quiet, True
    nncf_functions.QuantizedFunctionsCPU._loaded_namespace = ReferenceQuantizedFunctions
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        logger.setLevel(level)
        console.quiet = drawn


def _read(graph: fx.GraphModule, quantized: nn.Module) -> dict[str, tuple[float, float]]:
    """Map NNCF's hooks back to edges and layers; anything unexpected is a bug, never dropped."""
    edges = input_edges(graph)
    readers = {reader: edge for edge, names in edges.items() for reader in names}
    ranges: dict[str, tuple[float, float]] = {}
    weights: set[str] = set()
    for key, module in quantized.named_modules():
        if not isinstance(module, BaseQuantizer):
            continue
        kind, node, port = _location(key)
        if kind == "pre_hooks" and port == 1:
            weights.add(node)
        else:
            edge = readers[node] if kind == "pre_hooks" else node
            ranges[edge] = _activation_range(module)
    if set(ranges) != set(edges) or weights != set(layers(graph)):
        raise EdgexError(
            "NNCF quantized other tensors than the plan's: "
            f"{sorted(set(ranges) ^ set(edges))} {sorted(weights ^ set(layers(graph)))}"
        )
    return ranges


def _location(key: str) -> tuple[str, str, int]:
    """Split "__nncf_hooks.post_hooks.network/block3_pool/max_pool2d/0__0.0" into its parts."""
    _, kind, rest = key.split(".", 2)
    operation, _, port = rest.partition("__")
    parts = operation.split("/")
    name = parts[1] if parts[0] == _ROOT else "pixels"  # the one hook outside is the input's
    return kind, name, int(port.split(".")[0])


def _activation_range(quantizer: BaseQuantizer) -> tuple[float, float]:
    if isinstance(quantizer, AsymmetricQuantizer):
        low = float(quantizer.input_low.detach())
        return low, low + float(quantizer.input_range.detach())
    symmetric = cast(SymmetricQuantizer, quantizer)
    high = float(symmetric.scale.detach())
    return (-high if symmetric.signed else 0.0), high
