"""Devices as rows of data: their runtimes, the dialects these read, and what is known of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgexception.errors import EdgexError, UsageError
from edgexception.strict_yaml import parse_yaml, quoted
from edgexception.typed_yaml import closest, report, validate

Precision = Literal["fp32", "fp16", "int8", "int8-fp16"]
"""What a network computes in. int8: what is not INT8 is float32. int8-fp16: it is float16."""
Activations = Literal["asymmetric", "symmetric"]


@dataclass(frozen=True)
class Form:
    """One way to write a network as ONNX: in a precision, for the runtimes of a dialect."""

    precision: Precision
    dialect: str = ""
    """None for fp32, which every runtime reads."""

    @property
    def name(self) -> str:
        """What files and reports call it: "fp32", "int8-openvino", "int8-fp16-tensorrt"."""
        return f"{self.precision}-{self.dialect}" if self.dialect else self.precision

    @property
    def int8(self) -> bool:
        """Whether the quantized network is written."""
        return is_int8(self.precision)

    @property
    def half(self) -> bool:
        """Whether all is float16 that is not INT8 and need not be float32."""
        return is_half(self.precision)


def form_of(precision: Precision, dialect: str) -> Form:
    """Return the form that an engine of `precision` is built from where `dialect` is read."""
    return Form("fp32") if precision == "fp32" else Form(precision, dialect)


def is_int8(precision: str) -> bool:
    """Whether a precision is one of the quantized network."""
    return precision in ("int8", "int8-fp16")


def side_by_side(able: Collection[str], *, images: bool) -> tuple[Precision, ...]:
    """Return the quickest float and INT8 forms that a runtime builds.

    FP16 and INT8 need images to calibrate on: without them float32 comes first.
    """
    orders: tuple[tuple[Precision, ...], ...] = (("fp32", "fp16"),)
    if images:
        orders = (("fp16", "fp32"), ("int8-fp16", "int8"))
    best = (next((each for each in order if each in able), None) for order in orders)
    return tuple(each for each in best if each is not None)


def is_half(precision: str) -> bool:
    """Whether the float parts of a precision are float16."""
    return precision in ("fp16", "int8-fp16")


class Row(BaseModel):
    """Base of every row: frozen, and a column that is not known is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fact(Row):
    """One property of a device, and where it is known from."""

    value: bool | int | float | str | None
    """None is not known here: the device itself is asked."""
    unit: str | None = None
    source: str
    """Where the value comes from: a document with its date, or `probe`."""

    @model_validator(mode="after")
    def _sourced(self) -> Fact:
        if (self.value is None) != (self.source == "probe"):
            raise ValueError("a fact without value has the source `probe`, and no other fact has")
        return self


class Dialect(Row):
    """How one family of runtimes wants a quantized network written."""

    description: str
    activations: Annotated[tuple[Activations, ...], Field(min_length=1)]
    """The kinds of activation ranges that it can express."""
    float_layers: Annotated[tuple[Literal["fp32", "fp16"], ...], Field(min_length=1)]
    """What layers that are not INT8 may be."""
    align: Fact
    """Widths of which multiple its runtimes' kernels fill."""
    saturates_without_vnni: bool = False
    """On x86 without VNNI its runtime adds products of 8-bit weights in 16 saturating bits."""
    opset_max: dict[str, Fact] = {}
    """The highest ONNX opset that a version of its runtimes parses, where it matters."""


class TargetRuntime(Row):
    """One runtime of a target."""

    dialect: str
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    cross_built: bool = False
    """Built on other machines than the target, too: its engines hold no code for a processor."""


class Module(Row):
    """How a Jetson module is known: by the words in its device tree's model, and its memory."""

    family: Literal["orin-nano", "orin-nx", "agx-orin", "agx-thor"]
    board: str
    super: bool
    """Whether it has the clocks of "Super", and the word in its model."""


class PowerMode(Row):
    """The GPU in one power mode."""

    tpcs: int | None
    """Texture processing clusters that are on: two streaming multiprocessors (SM) each."""
    gpu_mhz: int | None
    """The highest clock."""
    source: str


class JetPack(Row):
    """One release of a Jetson's software; None is not known here."""

    jetpack: str
    l4t: str | None
    cuda: str | None
    tensorrt: str
    python: str
    families: tuple[str, ...]
    shipped: bool
    """Whether this TensorRT is part of it; otherwise it can be installed."""
    source: str


class Target(Row):
    """One kind of device."""

    description: str
    arch: Literal["x86_64", "aarch64"]
    runtimes: Annotated[dict[str, TargetRuntime], Field(min_length=1)]
    facts: dict[str, Fact] = {}
    module: Module | None = None
    """Of a Jetson."""
    power_modes: dict[str, PowerMode] = {}
    """Of a Jetson, by the name that nvpmodel tells."""
    verified_on: str | None
    """The hardware that this row has been run on; None is never."""

    @property
    def sm(self) -> int | None:
        """Compute capability times 10 of its NVIDIA GPU; None without one."""
        return self.integer("sm")

    def integer(self, name: str) -> int | None:
        """Return a fact as a whole number; None where it is not known."""
        fact = self.facts.get(name)
        return None if fact is None or fact.value is None else int(fact.value)

    def dense_tops(self, mode: PowerMode, precision: Literal["int8", "fp16"]) -> float | None:
        """Return the tensor cores' peak in 1e12 operations a second, without 2:4 sparsity."""
        rate = self.integer(f"{precision}_rate")
        if rate is None or mode.tpcs is None or mode.gpu_mhz is None:
            return None
        return rate * 2 * mode.tpcs * mode.gpu_mhz * 1e6 / 1e12


class _Table(Row):
    dialects: dict[str, Dialect] = {}
    targets: dict[str, Target]
    aliases: dict[str, str] = {}
    """Other names of targets."""
    jetpacks: tuple[JetPack, ...] = ()


@functools.cache
def _table() -> _Table:
    """Return what targets.yaml and jetson.yaml hold, as one table."""
    first, second = _read("targets.yaml"), _read("jetson.yaml")
    table = second.model_copy(
        update={"dialects": first.dialects, "targets": {**first.targets, **second.targets}}
    )
    for name, target in table.targets.items():
        for runtime, row in target.runtimes.items():
            if row.dialect not in table.dialects:
                raise EdgexError(
                    f"targets.{name}.runtimes.{runtime}: there is no dialect "
                    f"{quoted(row.dialect)}; {closest(row.dialect, table.dialects)}"
                )
    return table


def _read(name: str) -> _Table:
    data = resources.files("edgexception").joinpath(name).read_bytes()
    document = parse_yaml(data, f"edgexception/{name}")
    table, faults = validate(document.data, _Table)
    if table is None or document.faults:
        raise EdgexError(str(report(document, faults)))
    return table


def extra_of(runtime: str) -> str | None:
    """Return the extra of this package that brings a runtime.

    None where none can: onnxruntime-gpu and onnxruntime are the same files, only one can be there.
    """
    own = {"tensorrt-rtx": "rtx", "onnxruntime-cuda": None, "onnxruntime-tensorrt": None}
    return own.get(runtime, runtime)


def align_of(target: str, runtimes: Iterable[str]) -> int:
    """Return the least width of which every multiple fills the kernels of a target's runtimes."""
    facts = [find_dialect(target, runtime).align.value for runtime in runtimes]
    return math.lcm(*(int(value) for value in facts if value is not None))


def load_targets() -> dict[str, Target]:
    """Return every target by name, in the order of the file."""
    return dict(_table().targets)


def load_dialects() -> dict[str, Dialect]:
    """Return every dialect by name."""
    return dict(_table().dialects)


def load_aliases() -> dict[str, str]:
    """Return other names of targets: "jetson" is a module to take where no device says more."""
    return dict(_table().aliases)


def load_jetpacks() -> tuple[JetPack, ...]:
    """Return the releases of the Jetsons' software, oldest first."""
    return _table().jetpacks


def find_target(name: str) -> Target:
    """Return the target of that name; raises UsageError with the closest name if there is none."""
    table = _table()
    row = table.targets.get(table.aliases.get(name, name))
    if row is None:
        known = (*table.targets, *table.aliases)
        raise UsageError(f"there is no target {quoted(name)}; {closest(name, known)}")
    return row


def find_runtime(target: str, runtime: str) -> TargetRuntime:
    """Return that runtime of that target; raises UsageError naming the closest if it has none."""
    runtimes = find_target(target).runtimes
    if runtime not in runtimes:
        raise UsageError(
            f"the target {target} has no runtime {quoted(runtime)}; {closest(runtime, runtimes)}"
        )
    return runtimes[runtime]


def find_dialect(target: str, runtime: str) -> Dialect:
    """Return the dialect that a runtime of a target reads; raises UsageError for unknown names."""
    return _table().dialects[find_runtime(target, runtime).dialect]
