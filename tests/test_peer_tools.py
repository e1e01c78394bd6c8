"""Peers are judged in float32 arithmetic: it must compute what their INT8 is defined to be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parent / "benchmarks"))
import peer_tools  # noqa: E402
from openvino import opset13 as ops  # noqa: E402


def saved(folder: Path, low: float, high: float, levels: int) -> Path:
    """Write an IR with one FakeQuantize."""
    value = ops.parameter([4, 500], np.float32)
    low, high = np.float32(low), np.float32(high)
    quantized = ops.fake_quantize(value, low, high, low, high, levels)
    path = folder / "net.xml"
    openvino.save_model(openvino.Model([quantized], [value]), path, compress_to_fp16=False)
    return path


def computed(model: openvino.Model, values: np.ndarray) -> np.ndarray:
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([values])[0]


VALUES = np.random.default_rng(0).normal(0, 2, (4, 500)).astype(np.float32)


@pytest.mark.parametrize(("low", "high", "levels"), [(-3, 2.9, 256), (0, 5, 256), (-1, 1, 255)])
def test_fake_quantize_is_replaced_by_what_it_computes(
    tmp_path: Path, low: float, high: float, levels: int
) -> None:
    path = saved(tmp_path, low, high, levels)
    model = peer_tools.in_elementary_operators(path)
    assert "FakeQuantize" not in {node.get_type_name() for node in model.get_ops()}
    expected = computed(openvino.Core().read_model(path), VALUES)
    np.testing.assert_allclose(computed(model, VALUES), expected, atol=2e-6)
    assert len(np.unique(expected)) > 100


def test_an_unsigned_range_on_the_int8_grid_has_half_the_steps(tmp_path: Path) -> None:
    found = computed(peer_tools._signed(saved(tmp_path, 0, 5, 256)), VALUES)
    step = 5 / 127
    np.testing.assert_allclose(found, np.clip(np.rint(VALUES / step), -128, 127) * step, atol=2e-6)
    signed = saved(tmp_path, -3, 2.9, 256)
    np.testing.assert_array_equal(
        computed(peer_tools._signed(signed), VALUES),
        computed(openvino.Core().read_model(signed), VALUES),
    )
