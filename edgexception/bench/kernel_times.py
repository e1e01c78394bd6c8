"""Where an engine's time goes, and which blocks INT8 makes slower: from the times of its kernels.

A runtime that tells times takes longer than one that does not, so these are shares and differences
of engines that were all asked; latency is measured without.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgexception.device import Profile

REST = "the rest"
"""What belongs to no block: input, head, and nodes that a runtime named itself."""
_BLOCK = re.compile(r"block\d+(?!\d)")


@dataclass(frozen=True)
class Spent:
    """Sums over the kernels, for one call."""

    calls: int
    total_ms: float
    shares: dict[str, float]
    """By what kernels do: compute a layer in "int8", "fp32", ..., "quantize", ..., "other"."""
    blocks: dict[str, float]
    """In ms, by block of the network; what stands between two blocks is of the one it names."""


@dataclass(frozen=True)
class Slower:
    """A block that takes longer in INT8."""

    block: str
    int8_ms: float
    float_ms: float


def spent(profile: Profile) -> Spent:
    """Sum up the kernels of an engine; one that took no time at all has no shares."""
    total = sum(kernel.ns for kernel in profile.kernels)
    does: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for kernel in profile.kernels:
        found = _BLOCK.search(kernel.name)
        block = found.group() if found else REST
        does[kernel.does] = does.get(kernel.does, 0) + kernel.ns
        blocks[block] = blocks.get(block, 0) + kernel.ns
    return Spent(
        calls=profile.calls,
        total_ms=total / 1e6,
        shares={name: ns / total for name, ns in sorted(does.items()) if total},
        blocks={name: ns / 1e6 for name, ns in blocks.items()},
    )


def slower_blocks(int8: Spent, floats: Spent) -> tuple[Slower, ...]:
    """Return the blocks that take longer in INT8, the one that costs most first."""
    found = [
        Slower(block, int8.blocks.get(block, 0.0), floats.blocks.get(block, 0.0))
        for block in {**int8.blocks, **floats.blocks}
    ]
    slower = [each for each in found if each.int8_ms > each.float_ms]
    return tuple(sorted(slower, key=lambda each: each.float_ms - each.int8_ms))
