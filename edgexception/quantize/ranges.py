"""Ranges of activation tensors on calibration images: from their extremes or their histogram."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import fx

from edgexception.errors import BadArtifact

BINS = 4096
_SHARES = tuple(float(share) for share in np.linspace(1.0, 0.3, 71))
"""Tried ranges over the full one; of equal ones the first, which is the widest, wins."""
_NOTHING = 1e-30
"""Ranges below would have scales that float32 cannot divide by."""
_ENDS = tuple(float(share) for share in np.linspace(1.0, 1 / 16, 121))
"""Tried ends of least divergence over the full ones: a sixteenth and up, as in its source."""
_EMPTY = 1e-4
"""What a bin counts that rounding leaves empty though it holds values: a logarithm needs some."""


class Histogram:
    """Distribution of one tensor's values; bins grow by doubling, so one pass is enough."""

    def __init__(self) -> None:
        self.counts = np.zeros(2 * BINS, dtype=np.int64)  # symmetric around zero
        self.zeros = 0  # how many of those counted are exactly zero; they are in bin BINS
        self.width = 0.0
        self.low = np.inf
        self.high = -np.inf

    def add(self, values: torch.Tensor) -> None:
        """Count `values` of any shape."""
        low, high = (float(v) for v in torch.aminmax(values))
        self.low, self.high = min(self.low, low), max(self.high, high)
        peak = max(abs(low), abs(high))
        if self.width == 0.0 and peak > 0.0:
            self.width = peak / BINS
        while peak > self.width * BINS:
            merged = self.counts.reshape(BINS, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 2 : BINS // 2 + BINS] = merged
            self.width *= 2
        if self.width:
            limit = self.width * BINS
            counts = torch.histc(values.float(), bins=2 * BINS, min=-limit, max=limit)
            self.counts += counts.numpy().astype(np.int64)
            self.zeros += values.numel() - int(values.count_nonzero())

    def range(self, method: str, percentile: float, symmetric: bool) -> tuple[float, float]:
        """Return the (low, high) to quantize, which always contains zero."""
        if method == "minmax" or self.width == 0.0:
            return min(self.low, 0.0), max(self.high, 0.0)
        if method == "percentile":
            return self._percentile(percentile)
        if method == "entropy":
            return self._least_divergence(symmetric)
        return self._least_squared_error(symmetric)

    @property
    def _centers(self) -> np.ndarray:
        return (np.arange(2 * BINS) - BINS + 0.5) * self.width

    def _percentile(self, percentile: float) -> tuple[float, float]:
        cumulative = np.cumsum(self.counts) / self.counts.sum()
        share = percentile / 100.0
        low = self._centers[int(np.searchsorted(cumulative, 1.0 - share))]
        high = self._centers[min(int(np.searchsorted(cumulative, share)), 2 * BINS - 1)]
        return max(min(low, 0.0), min(self.low, 0.0)), min(max(high, 0.0), max(self.high, 0.0))

    def _least_squared_error(self, symmetric: bool) -> tuple[float, float]:
        """Return the shrunken range with the least squared rounding and clipping error.

        A symmetric grid has one end to move; of an asymmetric one first the upper end is moved,
        then the lower one.
        """
        used = self.counts > 0
        values, counts = self._centers[used], self.counts[used]

        def error(ends: tuple[float, float]) -> float:
            scale, zero_point, limits = _grid(*ends, symmetric)
            q = np.clip(np.round(values / scale) + zero_point, *limits)
            return float(((values - (q - zero_point) * scale) ** 2 * counts).sum())

        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if symmetric:
            return min(((low * share, high * share) for share in _SHARES), key=error)
        low, high = min(((low, high * share) for share in _SHARES), key=error)
        return min(((low * share, high) for share in _SHARES), key=error)

    def _least_divergence(self, symmetric: bool) -> tuple[float, float]:
        """Return the range that changes the distribution least (Migacz, "8-bit inference with
        TensorRT", GTC 2017).

        A symmetric grid is judged by magnitudes on its 128 levels; of an asymmetric one with 256
        first the upper end is moved, then the lower one. Exact zeros are left out: every grid has
        them exactly, and half of a ReLU's output is zeros, which would ask for the least range.
        """
        counts = self.counts.copy()
        counts[BINS] -= self.zeros
        below, above = counts[:BINS][::-1], counts[BINS:]
        if symmetric:
            low = high = _least_end(below + above, 128) * self.width
        else:
            first, last = _ends(below)[0], _ends(above)[0]
            last = min(_ends(above), key=lambda n: _divergence(counts, BINS - first, BINS + n, 256))
            first = min(_ends(below), key=lambda n: _divergence(counts, BINS - n, BINS + last, 256))
            low, high = first * self.width, last * self.width
        return max(-low, min(self.low, 0.0)), min(high, max(self.high, 0.0))


def _ends(counts: np.ndarray) -> list[int]:
    """Return how many bins away from zero a range may end, the widest first."""
    filled = np.flatnonzero(counts)
    return [round(share * (filled[-1] + 1)) for share in _ENDS] if len(filled) else [0]


def _least_end(counts: np.ndarray, levels: int) -> int:
    """Return how many bins of one side a range of least divergence has."""
    return min(_ends(counts), key=lambda end: _divergence(counts, 0, end, levels))


def _divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """Return the divergence of counts clipped to [first, last) from those left by `levels` levels.

    Kullback and Leibler's. A level spreads what it holds over those of its bins that hold any;
    clipped values stay in the last bin that is left, and no level knows of them.
    """
    inside = counts[first:last].astype(np.float64)
    if len(inside) < levels or not inside.any():  # nothing is known of what rounding does there
        return np.inf
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    filled = clipped > 0
    level = np.arange(len(inside)) * levels // len(inside)
    bins = np.maximum(np.bincount(level, filled, levels), 1)
    rounded = (np.bincount(level, inside, levels) / bins)[level]
    p, q = clipped[filled], np.maximum(rounded[filled], _EMPTY)
    return float((p * np.log((p / p.sum()) / (q / q.sum()))).sum() / p.sum())


def _grid(low: float, high: float, symmetric: bool) -> tuple[float, int, tuple[int, int]]:
    if symmetric:
        return max(-low, high) / 127, 0, (-128, 127)
    scale = (high - low) / 255
    return scale, int(np.clip(np.round(-low / scale), 0, 255)), (0, 255)


def grid_of_range(low: float, high: float, symmetric: bool) -> tuple[float, int]:
    """Return (scale, zero_point) of the 8-bit grid over a range that contains zero.

    A tensor that was as good as zero on every image gets the scale 1: any grid serves it.
    """
    if max(-low, high) < _NOTHING:
        return 1.0, 0
    scale, zero_point, _ = _grid(low, high, symmetric)
    return float(np.float32(scale)), zero_point


def observe(
    graph: fx.GraphModule,
    edges: Iterable[str],
    batches: Iterable[torch.Tensor],
    names: Sequence[str] = (),
) -> dict[str, Histogram]:
    """Run the float graph over `batches` of its input and return a histogram of every edge.

    Raises BadArtifact naming the first image (by its name, if `names` are given) and the first
    tensor that are not finite.
    """
    histograms = {edge: Histogram() for edge in edges}
    done = 0

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                refuse_overflow(n.name, value, names, done)
                if n.name in histograms:
                    histograms[n.name].add(value)
            return value

    watch = Watch(graph)
    watch.extra_traceback = False  # torch would append it to the message
    with torch.inference_mode():
        for batch in batches:
            watch.run(batch)
            done += len(batch)
    return histograms


def refuse_overflow(
    tensor: str, values: torch.Tensor, names: Sequence[str], first: int = 0
) -> None:
    """Raise BadArtifact naming image and tensor where `values` (N, ...) are not finite.

    `names` are those of all images, of which `values` has those from number `first` on.
    """
    if torch.isfinite(values.sum()) or torch.isfinite(values).all():  # a sum tells at no cost
        return
    bad = first + int(torch.isfinite(values).flatten(1).all(dim=1).int().argmin())
    image = names[bad] if bad < len(names) else bad
    raise BadArtifact(
        f"calibration image {image}: tensor {tensor} is not finite: the weights overflow there; "
        "check the image, the preprocessing and the checkpoint"
    )
