"""Which edges and weights cost how much: the noise that each alone leaves in the logits.

For every unit (a separable convolution, or a layer of the stem, a shortcut or the head) the network
runs in float with one thing of it quantized: its input edge, the edge between its two layers, its
weights, or what other operations read of its output (on runtimes whose layers write integers). And
the other way round: everything quantized but this unit. The first say where noise comes from. So
does the last, but hardly: a full-size network in INT8 (25.7 dB) has any of 43 units in float with
25.2 to 26.6 dB, in no order that its parts explain, because a change anywhere moves levels
everywhere after it. What an exception brings is read from its parts: `exception` is the noise of
just those roundings that it would take away.

Only what comes after the changed layer is computed again: the tensors of the float network and of
the quantized one are kept for one batch of images at a time. Roundings are those of the plan's
meaning, x -> (clamp(round(x / scale) + zero_point) - zero_point) * scale; a runtime's own order of
float32 operations (`simulate`) moves single levels, which changes no figure here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import fx, nn

from edgexception.imageset import ImageSet
from edgexception.model.graph import layers, module_of, to_graph_input
from edgexception.quantize.dialects import Dialect, rounded_reads, written_grids
from edgexception.quantize.edges import layer_outputs
from edgexception.quantize.plan import FloatPrecision, QuantPlan
from edgexception.quantize.precision import units_of, with_precision
from edgexception.quantize.ranges import refuse_overflow
from edgexception.quantize.simulate import quantize_weight

BATCH = 4
"""Images whose tensors are kept at a time: 0.6 GB at 299x299, twice."""
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Effect:
    """What one change does to the logits, against the float network's."""

    sqnr_db: float | None
    """None where nothing changes."""
    agreement: float | None
    """Share of images with the same greatest logit; None for networks with one output."""
    noise: float
    """Power of the difference over the power of the logits: 10 ** (-sqnr_db / 10)."""


@dataclass(frozen=True)
class UnitSensitivity:
    """One unit; None is what it does not have, or what the dialect does not round."""

    unit: str
    layers: tuple[str, ...]
    macs: int
    input: Effect
    inner: Effect | None
    weights: Effect
    output: Effect | None
    exception: Effect
    """All that would not be rounded with this unit in float, alone."""
    without: Effect
    """Everything quantized but this unit."""


@dataclass(frozen=True)
class Sensitivity:
    """The table: every unit in the order of the network."""

    dialect: str
    images: int
    everything: Effect
    """The whole plan."""
    fitted: Effect
    """The weights that rounding was learned for and the corrected biases, in float."""
    units: tuple[UnitSensitivity, ...]


@dataclass(frozen=True)
class Rounded:
    """What is quantized: tensors as certain nodes read them, and layers' weights."""

    reads: frozenset[tuple[str, str]] = frozenset()
    weights: frozenset[str] = frozenset()

    def less(self, other: Rounded) -> Rounded:
        """Return what is quantized here and not in `other`."""
        return Rounded(self.reads - other.reads, self.weights - other.weights)


def sensitivity(
    graph: fx.GraphModule,
    plan: QuantPlan,
    dialect: Dialect,
    images: ImageSet,
    progress: Progress | None = None,
    trained: fx.GraphModule | None = None,
) -> Sensitivity:
    """Measure every unit that is not in float already, on `images`.

    `trained` is the float network where it is not `graph`, whose weights may be rounded already and
    whose biases corrected for the plan: single parts are judged against `graph` in float, the whole
    plan, and `graph` in float, against `trained`. Raises BadArtifact naming the image and the
    tensor that are not finite.
    """
    units = _integer_units(graph, plan)
    everything = rounded_by(graph, plan, dialect)
    variants = {("everything", ""): everything, ("fitted", ""): Rounded()}
    for unit, names in units.items():
        parts = _parts(graph, plan, dialect, names)
        variants |= {(part, unit): change for part, change in parts.items()}
        without = variants["without", unit] = _without(graph, plan, dialect, names)
        variants["exception", unit] = everything.less(without)
    runner = Runner(graph, plan, dialect)
    noises = _measure(runner, variants, images, progress, trained)
    return Sensitivity(
        dialect=dialect.name,
        images=len(images),
        everything=noises["everything", ""],
        fitted=noises["fitted", ""],
        units=tuple(
            UnitSensitivity(
                unit,
                names,
                sum(runner.macs[name] for name in names),
                noises["input", unit],
                noises.get(("inner", unit)),
                noises["weights", unit],
                noises.get(("output", unit)),
                noises["exception", unit],
                noises["without", unit],
            )
            for unit, names in units.items()
        ),
    )


def gains(
    graph: fx.GraphModule,
    plan: QuantPlan,
    dialect: Dialect,
    images: ImageSet,
    progress: Progress | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Return unit -> the noise that an exception takes away (see `Effect`), and unit -> MACs."""
    units = _integer_units(graph, plan)
    everything = rounded_by(graph, plan, dialect)
    variants = {
        ("exception", unit): everything.less(_without(graph, plan, dialect, names))
        for unit, names in units.items()
    }
    runner = Runner(graph, plan, dialect)
    noises = _measure(runner, variants, images, progress)
    return (
        {unit: noises["exception", unit].noise for unit in units},
        {unit: sum(runner.macs[name] for name in names) for unit, names in units.items()},
    )


def rounded_by(graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect) -> Rounded:
    """Return everything that a plan quantizes in a dialect."""
    reads = rounded_reads(graph, plan, written_grids(graph, plan, dialect), dialect)
    return Rounded(
        frozenset((tensor, reader) for tensor, readers in reads.items() for reader in readers),
        frozenset(plan.weights),
    )


def _integer_units(graph: fx.GraphModule, plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """Return unit -> its INT8 layers, of the units that have some."""
    found = {
        unit: tuple(name for name in names if name not in plan.precision)
        for unit, names in units_of(graph).items()
    }
    return {unit: names for unit, names in found.items() if names}


def _without(
    graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect, names: tuple[str, ...]
) -> Rounded:
    exceptions: dict[str, FloatPrecision] = {**plan.precision, **dict.fromkeys(names, "fp32")}
    return rounded_by(graph, with_precision(graph, plan, exceptions), dialect)


def _parts(
    graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect, names: tuple[str, ...]
) -> dict[str, Rounded]:
    """Return the single parts of a unit: input, inner, weights, output."""
    everything = rounded_by(graph, plan, dialect).reads
    weighted = layers(graph)
    written = {layer: tensor for tensor, layer in layer_outputs(graph).items()}
    parts = {
        "input": frozenset(read for read in everything if read[1] == names[0]),
        "inner": frozenset(read for read in everything if read[1] in names[1:]),
        "output": frozenset(
            read
            for read in everything
            if read[0] == written.get(names[-1]) and read[1] not in weighted
        ),
    }
    found = {part: Rounded(reads=reads) for part, reads in parts.items() if reads}
    return {**found, "weights": Rounded(weights=frozenset(names))}


# --- running --------------------------------------------------------------------------------------


class Runner:
    """Runs a graph with some of a plan quantized, again only where something changed."""

    def __init__(self, graph: fx.GraphModule, plan: QuantPlan, dialect: Dialect) -> None:
        self.graph = graph
        self.grids = written_grids(graph, plan, dialect)
        self.layers = layers(graph)
        self.macs = dict.fromkeys(self.layers, 0)
        """Multiply-accumulates of every layer for one image, known after the first run."""
        self._weights: dict[str, torch.Tensor] = {}
        for name, grid in plan.weights.items():
            weight = self.layers[name].weight.detach()
            scales = torch.tensor(grid.scales).view(-1, *[1] * (weight.ndim - 1))
            self._weights[name] = quantize_weight(weight, grid).float() * scales

    def run(
        self,
        pixels: torch.Tensor,
        rounded: Rounded,
        known: Mapping[str, torch.Tensor] | None = None,
        knew: Rounded | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return every tensor; those of `known`, computed with `knew` quantized, where equal."""
        values: dict[str, torch.Tensor] = {}
        changed: set[str] = set()
        differ = _differing(rounded, knew) if knew else set()
        for node in self.graph.graph.nodes:
            inputs = [cast(fx.Node, argument).name for argument in node.args]
            if known is not None and node.name not in differ and not changed.intersection(inputs):
                values[node.name] = known[node.name]
                continue
            changed.add(node.name)
            if node.op == "placeholder":
                values[node.name] = pixels
            elif node.op == "output":
                values[node.name] = values[inputs[0]]
            else:
                arguments = [self._read(values, name, node.name, rounded) for name in inputs]
                values[node.name] = self._compute(node, arguments, rounded)
        return values

    def _read(
        self, values: Mapping[str, torch.Tensor], tensor: str, reader: str, rounded: Rounded
    ) -> torch.Tensor:
        if (tensor, reader) not in rounded.reads:
            return values[tensor]
        grid = self.grids[tensor]
        return torch.fake_quantize_per_tensor_affine(
            values[tensor], float(np.float32(grid.scale)), grid.zero_point, *grid.levels
        )

    def _compute(self, node: fx.Node, inputs: list[torch.Tensor], rounded: Rounded) -> torch.Tensor:
        module = module_of(self.graph, node)
        if node.name not in self.layers:
            return cast(torch.Tensor, module(*inputs))
        layer = self.layers[node.name]
        float_weight = layer.weight
        if node.name in rounded.weights:
            layer.weight = nn.Parameter(self._weights[node.name], requires_grad=False)
        try:
            value = cast(torch.Tensor, layer(*inputs))
        finally:
            layer.weight = float_weight
        self.macs[node.name] = value[0].numel() * float_weight[0].numel()
        return value


def _differing(a: Rounded, b: Rounded) -> set[str]:
    """Return the nodes that read or weigh something else in `a` than in `b`."""
    return {reader for _, reader in a.reads ^ b.reads} | set(a.weights ^ b.weights)


@dataclass
class _Sum:
    """Noise so far."""

    noise: float = 0.0
    agreed: int = 0


@dataclass
class _Sums:
    power: float = 0.0
    images: int = 0
    outputs: int = 0
    variants: dict[tuple[str, str], _Sum] = field(default_factory=dict)


def _measure(
    runner: Runner,
    variants: Mapping[tuple[str, str], Rounded],
    images: ImageSet,
    progress: Progress | None,
    trained: fx.GraphModule | None = None,
) -> dict[tuple[str, str], Effect]:
    sums = _Sums(variants={key: _Sum() for key in variants})
    everything = variants.get(("everything", ""))
    total = (len(images) + BATCH - 1) // BATCH * len(variants)
    names = [sample.name for sample in images.samples]
    start, done = time.monotonic(), 0
    with torch.inference_mode():
        for first, batch in zip(range(0, len(images), BATCH), images.batches(BATCH), strict=True):
            pixels = to_graph_input(torch.from_numpy(batch))
            plain = runner.run(pixels, Rounded())
            for name, value in plain.items():
                refuse_overflow(name, value, names, first)
            full = runner.run(pixels, everything) if everything else {}
            against = plain["output"]
            target = against if trained is None or everything is None else trained(pixels)
            sums.power += float(against.double().square().sum())
            sums.images += len(batch)
            sums.outputs = against.shape[1]
            for key, rounded in variants.items():
                whole = key[0] in ("without", "everything")
                known, knew = (full, everything) if whole else (plain, Rounded())
                logits = runner.run(pixels, rounded, known, knew)["output"]
                wanted = target if whole or key[0] == "fitted" else against
                sums.variants[key].noise += float((logits - wanted).double().square().sum())
                same = logits.argmax(dim=1) == wanted.argmax(dim=1)
                sums.variants[key].agreed += int(same.sum())
                done += 1
                if progress is not None:
                    left = (time.monotonic() - start) / done * (total - done)
                    progress("sensitivity", done, total, left)
    return {key: _effect(found, sums) for key, found in sums.variants.items()}


def _effect(found: _Sum, sums: _Sums) -> Effect:
    noise = found.noise / max(sums.power, 1e-30)
    return Effect(
        sqnr_db=None if found.noise == 0.0 else float(-10 * np.log10(noise)),
        agreement=None if sums.outputs < 2 else found.agreed / sums.images,
        noise=noise,
    )
