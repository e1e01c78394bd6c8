"""What this processor can do, where tests must know it."""

from __future__ import annotations

from typing import Literal

from edgexception.agent import machine

VNNI: bool = machine.facts()["cpu"]["vnni"]
EXACT_BITS: Literal[7, 8] = 8 if VNNI else 7
"""Widest weights with which every runtime's kernels are exact here: without VNNI those of 8 bits
saturate."""
