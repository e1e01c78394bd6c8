"""What ONNX Runtime's adapter builds where products of int8 weights saturate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from narrow import minmax_plan, preprocess_of, random_images, small_graph
from onnx import numpy_helper

from edgexception.agent import machine
from edgexception.agent.runtimes import Options, ort
from edgexception.export.onnx_graph import to_onnx
from edgexception.quantize.dialects import DIALECTS

SIZE = (40, 40)
OPTIONS = Options(batch=1, threads=1)
VNNI = machine.facts()["cpu"]["vnni"]
IMAGES = random_images(1, SIZE)

torch.set_num_threads(1)


def model(path: Path, bits: Literal[7, 8]) -> Path:
    graph = small_graph()
    plan = minmax_plan(graph, random_images(2, SIZE), bits=bits)
    written = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS["onnxruntime"])
    onnx.save(written, path)
    return path


def weight_types(engine: Path) -> set[np.dtype[Any]]:
    tensors = [numpy_helper.to_array(t) for t in onnx.load(engine).graph.initializer]
    return {tensor.dtype for tensor in tensors if tensor.ndim == 4}


@pytest.mark.parametrize(
    ("vnni", "bits", "expected"),
    [(True, 8, np.int8), (False, 8, np.uint8), (False, 7, np.int8)],
)
def test_weights_become_uint8_where_their_products_saturate(
    vnni: bool,
    bits: Literal[7, 8],
    expected: type[np.generic],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = model(tmp_path / "model.onnx", bits)
    facts = {"cpu": {"vnni": True}}
    monkeypatch.setattr(ort.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "facts", lambda: facts)
    ort.build(source, OPTIONS, tmp_path / "plain.onnx")
    facts["cpu"]["vnni"] = vnni
    record = ort.build(source, OPTIONS, tmp_path / "engine.onnx")
    assert weight_types(tmp_path / "engine.onnx") == {np.dtype(expected)}
    assert record["layers"]["com.microsoft:QLinearConv"] >= 10
    if VNNI:
        plain, found = (
            ort.open(tmp_path / name, OPTIONS).call(IMAGES)
            for name in ("plain.onnx", "engine.onnx")
        )
        assert np.array_equal(plain, found)
