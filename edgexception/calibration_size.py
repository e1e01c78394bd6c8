"""How many different photos a calibration needs: what was measured, and a warning from it."""

from __future__ import annotations

from collections.abc import Mapping

SQNR_DB: Mapping[str, Mapping[int, float]] = {
    "auto": {16: 33.0, 64: 36.1, 256: 35.8},
}
"""By method of ranges and number of different photos, of the full-size network on Fashion-MNIST at
96x96 (`tests/benchmarks/calibration_size.py recipes/fashion-mnist.yaml --images 500`). Nothing is
said of methods and numbers that were not measured."""
ENOUGH_DB = 1.0
"""Photos are enough where more of them have brought no more than this."""


def too_few(ranges: str, photos: int) -> str | None:
    """Return a warning with figures where a method has needed more different photos than these."""
    measured = SQNR_DB.get(ranges)
    if measured is None:
        return None
    best = max(measured.values())
    enough = min(count for count, decibels in measured.items() if decibels >= best - ENOUGH_DB)
    if photos >= enough:
        return None
    few = max((count for count in measured if count <= photos), default=min(measured))
    return (
        f"{photos} different calibration photos may be too few for `ranges: {ranges}`. With {few} "
        f"a full-size network kept {measured[few]:.1f} dB SQNR, with {enough} "
        f"{measured[enough]:.1f} dB (Fashion-MNIST). Give calibration {enough} photos or more"
    )
