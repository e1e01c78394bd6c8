"""The `QuantPlan`: what INT8 means for one network, as plain data.

A quantized network is the float inference graph plus this plan; no runtime's notation is in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgexception.artifacts import canonical_json
from edgexception.plan_file import read_plan

Scale = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FloatPrecision = Literal["fp32", "fp16"]
Change = Literal["added", "removed", "kept"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActivationQuant(_Data):
    """Grid of one activation tensor: value = (q - zero_point) * scale, one grid per tensor."""

    scale: Scale
    zero_point: int
    signed: bool
    bits: Literal[8] = 8
    role: Literal["input", "output"]
    """input: INT8 layers read it. output: an INT8 layer writes it and only other operations (add,
    pool, a layer in float) read it; runtimes that compute a layer only between quantized tensors
    need it, the others keep it in float."""

    @property
    def levels(self) -> tuple[int, int]:
        """Lowest and highest integer of the grid."""
        return (-128, 127) if self.signed else (0, 255)

    @model_validator(mode="after")
    def _zero_is_a_level(self) -> ActivationQuant:
        low, high = self.levels
        if not low <= self.zero_point <= high:
            raise ValueError(f"zero_point {self.zero_point} is outside {low}...{high}")
        return self


class WeightQuant(_Data):
    """Grid of one layer's weights: value = q * scales[output channel], zero point 0."""

    scales: Annotated[tuple[Scale, ...], Field(min_length=1)]
    bits: Literal[7, 8] = 8

    @property
    def limit(self) -> int:
        """Largest |q|: 127, or 64 at 7 bits, where two products of uint8 x int8 fit 16 bits.

        Without VNNI OpenVINO adds such pairs in 16 saturating bits, and knows no other way: in an
        emulated Haswell (qemu) the logits of the full-size network at 150x150 have 6.5 dB SQNR
        against the same plan on VNNI with 8 bits, and are equal bit for bit with 7. Elsewhere 7
        bits only cost (18.9 dB against the float network where 8 bits have 23.0). ONNX Runtime has
        kernels that do not saturate (see `agent.runtimes.ort`).
        """
        return 127 if self.bits == 8 else 64


class Nearness(_Data):
    """How near a quantized network's logits are to the float network's: the worst dialect."""

    sqnr_db: float | None
    """None where they are equal."""
    agreement: float | None
    """Share of images with the same greatest logit; None for networks with one output."""


class ExceptionStep(_Data):
    """One exception that was tried, and what the network measured with it, or then without it."""

    unit: str
    """A separable convolution, or a layer of the stem, a shortcut or the head."""
    change: Change
    """kept: it was taken out again, and the bound did not hold without it."""
    measured: Nearness


class PrecisionChoice(_Data):
    """How the exceptions of a plan were chosen."""

    bounds: dict[str, float]
    dialects: tuple[str, ...]
    images: int
    before: Nearness
    after: Nearness
    steps: tuple[ExceptionStep, ...]


class Provenance(_Data):
    """How a plan came to be."""

    method: str
    activations: Literal["asymmetric", "symmetric"]
    ranges: str
    shares: dict[str, float] = {}
    """`ranges: auto`: the range of each tensor over the one that calibration saw."""
    equalized: dict[str, str] = {}
    """How channels were rescaled, by the first tensor of their group."""
    bias_correction: bool
    rounding: Literal["nearest", "learned"]
    images: int
    calibration_digest: str
    versions: dict[str, str]
    precision: PrecisionChoice | None = None
    """How `auto` chose the layers that are not INT8."""


class QuantPlan(_Data):
    """Grids of a network's activations (by the node that produces them) and weights (by layer)."""

    schema_version: Literal[1] = 1
    activations: dict[str, ActivationQuant]
    weights: dict[str, WeightQuant]
    precision: dict[str, FloatPrecision] = {}
    """The layers that are not INT8. They have no weight grid, and a tensor that neither an INT8
    layer reads nor one writes has no grid either."""
    provenance: Provenance

    @property
    def symmetric(self) -> bool:
        """Whether every activation is int8 with zero point 0, as TensorRT needs."""
        return all(a.signed and a.zero_point == 0 for a in self.activations.values())

    def to_json(self) -> str:
        """Return the plan as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


def load_plan(path: Path) -> QuantPlan:
    """Read a plan file; raise BadArtifact naming the field when it is not one."""
    return read_plan(path, QuantPlan, "a quantization plan", "edgex quantize")
