"""A network small enough to be computed by hand in numpy, with the contract of every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE, CLASSES = 12, 7
WEIGHT = np.random.default_rng(5).normal(0, 0.05, (CLASSES, 3, 3, 3)).astype(np.float32)


def tiny_model(batch: str | int = "batch", last: str = "ReduceMean") -> onnx.ModelProto:
    """Cast, transpose, 3x3 convolution, mean: (batch, SIDE, SIDE, 3) uint8 to (batch, CLASSES)."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weight"], ["features"]),
        helper.make_node(last, ["features"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save_tiny(path: Path) -> Path:
    onnx.save(tiny_model(), path)
    return path


def tiny_images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def tiny_logits(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The network in numpy, float64: the mean over positions commutes with the convolution."""
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (3, 3), (1, 2))
    logits: NDArray[np.float64] = np.einsum("nyxcij,kcij->nk", windows, WEIGHT) / (SIDE - 2) ** 2
    return logits
