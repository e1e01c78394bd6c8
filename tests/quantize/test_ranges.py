"""Ranges of activations: against NumPy, brute force and cases checked by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import random_images, small_graph

from edgexception.errors import BadArtifact
from edgexception.model.graph import layers, to_graph_input
from edgexception.quantize.ranges import (
    BINS,
    Histogram,
    _divergence,
    _least_end,
    grid_of_range,
    observe,
)

values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60)


def histogram(*batches: torch.Tensor) -> Histogram:
    result = Histogram()
    for batch in batches:
        result.add(batch)
    return result


def squared_error(data: np.ndarray, low: float, high: float, symmetric: bool) -> float:
    scale, zero = grid_of_range(low, high, symmetric)
    ends = (-128, 127) if symmetric else (0, 255)
    q = np.clip(np.round(data / scale) + zero, *ends)
    return float(((data - (q - zero) * scale) ** 2).mean())


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=4))
def test_minmax_is_the_extremes_and_zero(batches: list[list[float]]) -> None:
    seen = histogram(*(torch.tensor(b) for b in batches))
    everything = np.concatenate([np.float32(b) for b in batches])
    expected = (min(float(everything.min()), 0.0), max(float(everything.max()), 0.0))
    assert seen.range("minmax", 99.9, symmetric=False) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=4), st.booleans())
def test_every_range_contains_zero_and_stays_within_the_extremes(
    batches: list[list[float]], symmetric: bool
) -> None:
    seen = histogram(*(torch.tensor(b) for b in batches))
    least, most = seen.range("minmax", 100.0, symmetric)
    for method in ("percentile", "mse", "entropy"):
        low, high = seen.range(method, 99.0, symmetric)
        assert least <= low <= 0.0 <= high <= most, method


@settings(max_examples=40, deadline=None)
@given(st.lists(values, min_size=1, max_size=5))
def test_no_value_is_lost_while_bins_grow(batches: list[list[float]]) -> None:
    seen = histogram(*(torch.tensor(b) for b in batches))
    nonzero_width = any(v != 0.0 for b in batches for v in b)
    leading = next((i for i, b in enumerate(batches) if any(v != 0.0 for v in b)), 0)
    counted = sum(len(b) for b in batches[leading:]) if nonzero_width else 0
    assert seen.counts.sum() == counted


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_are_numpys_within_a_bin(percentile: float) -> None:
    data = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(1))
    seen = histogram(*(data * torch.tensor([0.1, 1.0, 3.0, 0.5]).view(4, 1)))
    everything = (data * torch.tensor([0.1, 1.0, 3.0, 0.5]).view(4, 1)).numpy()
    expected = np.percentile(everything, [100 - percentile, percentile])
    low, high = seen.range("percentile", percentile, symmetric=False)
    assert abs(low - expected[0]) < 2 * seen.width + 0.01
    assert abs(high - expected[1]) < 2 * seen.width + 0.01


@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squared_error_beats_minmax_on_an_outlier(symmetric: bool) -> None:
    data = torch.randn(1_000_000, generator=torch.Generator().manual_seed(2))
    data[7] = 20.0
    seen, array = histogram(data), data.numpy().astype(np.float64)
    clipped = squared_error(array, *seen.range("mse", 99.9, symmetric), symmetric)
    plain = squared_error(array, *seen.range("minmax", 99.9, symmetric), symmetric)
    assert clipped < 0.8 * plain
    lows, highs = ([e * s for s in (0.6, 0.8, 1.0)] for e in (array.min(), array.max()))
    least = min(squared_error(array, *ends, symmetric) for ends in product(lows, highs))
    assert clipped <= 1.02 * least  # the histogram's bins are coarser than the data


def test_mse_keeps_the_whole_range_where_clipping_only_costs() -> None:
    seen = histogram(torch.linspace(-1.0, 1.0, 100_001))
    low, high = seen.range("mse", 99.9, symmetric=True)
    assert min(-low, high) > 0.98


# --- entropy


def divergence_as_published(bins: list[int], end: int, levels: int) -> float:
    """Migacz's pseudocode for one threshold, with what his slides leave open: which bins a level
    has (as many for each: `end` is a multiple of `levels`), and how empty ones are counted."""
    reference = [float(count) for count in bins[:end]]
    reference[-1] += sum(bins[end:])
    candidate = [0.0] * end
    each = end // levels
    for first in range(0, end, each):
        held = [i for i in range(first, first + each) if reference[i] > 0]
        for i in held:
            candidate[i] = max(sum(bins[first : first + each]) / len(held), 1e-4)
    p = [count / sum(reference) for count in reference]
    q = [count / sum(candidate) for count in candidate]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=48, max_size=96),
    st.integers(1, 6),
    st.sampled_from((4, 8)),
)
def test_divergence_is_the_published_one(bins: list[int], times: int, levels: int) -> None:
    end = times * levels
    found = _divergence(np.array(bins), 0, end, levels)
    if not any(bins[:end]):
        assert found == np.inf
    else:
        assert found == pytest.approx(divergence_as_published(bins, end, levels), abs=1e-9)


def smooth(name: str) -> np.ndarray:
    """Return 400,000 magnitudes at equal steps of a distribution's quantiles: it has no chance."""
    share = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    if name == "normal":
        return torch.special.ndtri((1 + share) / 2).numpy()
    tail = -torch.log1p(-share)  # the one of Laplace
    return (tail if name == "laplace" else tail + torch.log1p(share)).numpy()


@pytest.mark.parametrize("name", ["normal", "laplace", "logistic"])
def test_onnxruntime_finds_the_same_threshold(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 15%: the least is flat there, and ONNX Runtime hands bins that do not fill a level to
    the last one, which moves its own by as much. It counts both signs, so it has twice the levels.
    """
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    data = smooth(name)
    collector = calibrate.HistogramCollector("entropy", True, 2048, 64, 99.9, "same")
    collector.collect({"tensor": np.concatenate((data, -data)).astype(np.float32)})
    counted = collector.get_histogram_dict()["tensor"]
    low, high = collector.get_entropy_threshold(counted, 64)
    capsys.readouterr()  # it prints
    counts, ends = np.histogram(data, 1024, (0.0, data.max()))
    found = ends[_least_end(counts, 32)]
    assert high == pytest.approx(-low, rel=0.01)
    assert 0.85 * high < found < 1.15 * high
    assert found < 0.9 * data.max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_least_divergence_clips_outliers_and_nothing_else(symmetric: bool) -> None:
    data = torch.from_numpy(smooth("normal")).float()
    data = torch.cat((data, -data))
    data[7], data[-7] = 60.0, -40.0
    low, high = histogram(data).range("entropy", 99.9, symmetric)
    assert 4.0 < high < 6.0
    assert -6.0 < low < -4.0
    full = torch.linspace(-2.0, 3.0, 500_001)
    assert histogram(full).range("entropy", 99.9, symmetric) == (-2.0, 3.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_of_a_relu_say_nothing(symmetric: bool) -> None:
    """Every grid has zero: half of the values being zero must not ask for a range around it."""
    data = torch.from_numpy(smooth("laplace")).float()
    alone = histogram(data).range("entropy", 99.9, symmetric)
    with_zeros = histogram(data, torch.zeros(4_000_000)).range("entropy", 99.9, symmetric)
    assert with_zeros == alone
    assert alone[0] == 0.0
    assert 0.6 * float(data.max()) < alone[1] < 0.95 * float(data.max())


def test_an_asymmetric_grid_has_its_levels_where_the_values_are() -> None:
    """256 levels for one side round finer than 128, so they clip less of a long tail."""
    seen = histogram(torch.from_numpy(smooth("laplace")).float())
    wide, narrow = (seen.range("entropy", 99.9, symmetric)[1] for symmetric in (False, True))
    assert wide > narrow


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [3.0, -0.25])
def test_a_constant_tensor_is_not_clipped(value: float, symmetric: bool) -> None:
    expected = (min(value, 0.0), max(value, 0.0))
    assert histogram(torch.full((50,), value)).range("entropy", 99.9, symmetric) == expected
    few = torch.tensor([0.0, value, value, value * 0.999])
    assert histogram(few).range("entropy", 99.9, symmetric) == expected


@pytest.mark.parametrize(
    ("low", "high", "symmetric", "scale", "zero"),
    [
        (0.0, 255.0, False, 1.0, 0),
        (-255.0, 0.0, False, 1.0, 255),
        (-64.0, 191.0, False, 1.0, 64),
        (-1.0, 2.0, False, 3 / 255, 85),
        (-127.0, 3.0, True, 1.0, 0),
        (0.0, 254.0, True, 2.0, 0),
        (0.0, 0.0, False, 1.0, 0),
        (-1e-40, 1e-40, False, 1.0, 0),
    ],
)
def test_grids_checked_by_hand(
    low: float, high: float, symmetric: bool, scale: float, zero: int
) -> None:
    assert grid_of_range(low, high, symmetric) == (float(np.float32(scale)), zero)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 1e30), st.floats(0.0, 1e30), st.booleans())
def test_a_grid_reaches_both_ends_and_has_zero(low: float, high: float, symmetric: bool) -> None:
    scale, zero = grid_of_range(-low, high, symmetric)
    first, last = (-128, 127) if symmetric else (0, 255)
    assert scale > 0.0
    assert first <= zero <= last
    if max(low, high) >= 1e-30:
        assert (first - zero) * scale <= -low + 0.51 * scale
        assert (last - zero) * scale >= high - 0.51 * scale


def test_a_constant_tensor_has_a_range() -> None:
    for method in ("mse", "entropy"):
        assert histogram(torch.zeros(5)).range(method, 99.9, symmetric=False) == (0.0, 0.0)
    low, high = histogram(torch.full((5,), 3.0)).range("mse", 99.9, symmetric=False)
    assert (low, high) == (0.0, pytest.approx(3.0, rel=0.02))


def test_observing_counts_every_image_and_changes_nothing() -> None:
    graph = small_graph()
    inputs = to_graph_input(torch.from_numpy(random_images(4, (40, 40))))
    whole = observe(graph, ["block2_add"], [inputs])["block2_add"]
    parts = observe(graph, ["block2_add"], list(inputs.split(1)))["block2_add"]
    assert whole.counts.sum() == parts.counts.sum() == 4 * 8 * 9 * 9
    # Smaller batches run other kernels, whose sums round elsewhere.
    assert (whole.low, whole.high) == (pytest.approx(parts.low), pytest.approx(parts.high))
    assert whole.counts.shape == (2 * BINS,)


def test_a_tensor_that_is_not_finite_is_named() -> None:
    graph = small_graph()
    with torch.no_grad():
        layers(graph)["block2_sepconv1_pointwise"].weight.fill_(1e38)
    inputs = to_graph_input(torch.from_numpy(random_images(1, (40, 40))))
    fault = r"image 0: tensor block2_sepconv1_pointwise is not finite: .* checkpoint$"
    with pytest.raises(BadArtifact, match=fault):
        observe(graph, ["block1_conv1_act", "block2_sepconv2_act"], [inputs])
