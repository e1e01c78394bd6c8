"""A run's record as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgexception.agent.placement import WIDEST_FIRST
from edgexception.bench.paired import Paired
from edgexception.bench.statistics import Interval, Proportion
from edgexception.prune.plan import LayerChange
from edgexception.report.dla import dla_lines
from edgexception.report.measures import Fidelity, Gain, Listing, Machine
from edgexception.report.record import (
    Exceptions,
    GateResult,
    Parity,
    Pruning,
    Report,
    Row,
    row_name,
)
from edgexception.report.sensitivity import budget, decibels, sensitivity_lines, shade, worst_first
from edgexception.targets import is_int8

_BLAMED = 4
"""How many blocks a message names."""
_CONVERTS = ("quantize", "dequantize", "cast", "reorder")
_PADDED = 0.01
"""From this share of an engine's weights on, its padding is worth a word."""


def to_text(report: Report) -> str:
    """Return the measured rows, the gates and the parity as lines for a terminal."""
    network = report.network
    height, width = network.preprocess.input_size
    lines = [
        f"network: {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC at "
        f"{height}x{width}, {network.outputs} outputs"
    ]
    lines += pruning_lines(report.pruning)
    if report.calibration is not None:
        c = report.calibration
        lines.append(
            f"quantized: {c.activations} activations, {c.weight_bits}-bit weights, {c.ranges} "
            f"ranges of {c.images} images"
        )
        lines += [f"warning: {c.warning}"] if c.warning else []
        lines += _exception_lines(c.exceptions)
    for types in report.types:
        kept = [f"{node} stays float32: {reason}" for node, reason in types.fp32.items()]
        lines += [f"{types.form}: {line}" for line in (f"{types.fp16} nodes in float16", *kept)]
    lines += sensitivity_lines(report.sensitivity) if report.sensitivity else []
    for row in report.rows:
        latency = f"{row.latency.median_ms:9.2f} ms" if row.latency else f"{row.status:>12}"
        facts = [
            "fastest" if row.fastest else "",
            "throttled" if row.conditions and row.conditions.throttled else "",
            f"{row.speedup.value:.2f}x" if row.speedup else "",
            f"top-1 {_share(row.top1)}" if row.top1 else "",
            f"{row.paired.changed} changed" if row.paired else "",
        ]
        facts += [f"SQNR {_sqnr(row.fidelity)}" if row.fidelity else "", row.reason or ""]
        facts += [f"on {machine_line(row.machine)}" if row.machine else ""]
        lines.append(f"{row_name(row):<36}{latency}  {'  '.join(fact for fact in facts if fact)}")
    lines += regret_lines(report.rows)
    lines += condition_lines(report.rows)
    for row in report.rows:
        if row.executed is not None and row.precision != "fp32":
            lines.append(f"{row_name(row):<36}{executed_line(row)}")
    lines += dla_lines(report.rows)
    lines += listing_lines(report.rows)
    for parity in report.parity:
        name = f"{parity.form} on {parity.runtime}" if parity.runtime else parity.form
        found = f"{_sqnr(parity.executed_vs_torch)} executed against torch"
        found += ": differs" if parity.differs else ""
        lines.append(f"{name:<36}{_not_compared(parity) or found}")
    return "\n".join([*lines, *gate_lines(report.gates)])


def _exception_lines(found: Exceptions | None) -> list[str]:
    if found is None:
        return []
    named = ", ".join(f"{name} {precision}" for name, precision in found.layers.items()) or "none"
    return [f"not INT8: {named}", *([_reason(found.chosen)] if found.chosen else [])]


def _reason(chosen: Mapping[str, Any]) -> str:
    """Say why the exceptions are what they are: the bound, and what was measured."""
    bounds = ", ".join(f"{name} {bound:g}" for name, bound in chosen["bounds"].items())
    before, after = (_nearness(chosen[key]) for key in ("before", "after"))
    return (
        f"chosen for {bounds} on {chosen['images']} calibration images: {before} all INT8, "
        f"{after} with them ({', '.join(chosen['dialects'])}, simulated)"
    )


def _nearness(found: Mapping[str, Any]) -> str:
    decibels = "equal" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f} dB"
    share = found["agreement"]
    return decibels if share is None else f"{decibels} and agreement {share:.4f}"


def gate_lines(gates: Sequence[GateResult]) -> list[str]:
    """Return one line a gate: what was bounded, where, and what was found."""
    lines = []
    for gate in gates:
        found = gate.reason if gate.value is None else f"{gate.value:.4g}"
        state = "passed" if gate.passed else "missed"
        remark = f" ({gate.reason})" if gate.reason and gate.value is not None else ""
        lines.append(f"gate {gate.gate} {gate.bound} {state} by {gate.row}: {found}{remark}")
    return lines


def to_markdown(report: Report) -> str:
    """Return the report as Markdown; what was not measured says so and shows no number."""
    environment = Environment(
        loader=PackageLoader("edgexception.report"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, and `cell` escapes what came from files
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        share=_share,
        sqnr=_sqnr,
        estimate=_estimate,
        difference=_difference,
        cell=_cell,
        mib=_mib,
        row_name=row_name,
        not_compared=_not_compared,
        budget=budget,
        decibels=decibels,
        worst_first=worst_first,
        shade=shade,
        exception_lines=_exception_lines,
        executed_line=executed_line,
        listing_lines=listing_lines,
        dla_lines=dla_lines,
        regret_lines=regret_lines,
        condition_lines=condition_lines,
        machine_line=machine_line,
        pruning_lines=pruning_lines,
        cut_layers=cut_layers,
    )
    return environment.get_template("report.md.j2").render(report=report)


def machine_line(machine: Machine) -> str:
    """Say in one line which machine a kit was run on."""
    mode = f", power mode {machine.power_mode}" if machine.power_mode else ""
    name = machine.board or machine.cpu or machine.arch
    return f"{name}{mode}, {machine.system}, Python {machine.python} ({machine.device})"


def regret_lines(rows: Sequence[Row]) -> list[str]:
    """Say of every INT8 engine that is not surely faster than a float one that it is not."""
    return [
        f"INT8 is not worth it on {row_name(row)}: {_estimate(row.gain.ratio)} as fast as "
        f"{row.gain.over}, which is nearer to the network; {_blame(row, row.gain)}"
        for row in rows
        if row.gain is not None and not row.gain.sure
    ]


def condition_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Say of engines what ran and timed them, what throttled, and what an image costs in energy."""
    for row in rows:
        if row.program is not None:
            way = "" if row.timing is None else f"; {row.timing}"
            yield f"{row_name(row)}: {row.program} in place of a Python package{way}"
        found = row.conditions
        if found is None:
            continue
        if found.throttled:
            yield (
                f"{row_name(row)} throttled in {found.marked} of {found.samples} samples "
                f"({'; '.join(found.reasons)}): the device can do better"
            )
        if found.energy is not None:
            e, mode = found.energy, f", power mode {found.power_mode}" if found.power_mode else ""
            mode += ", clocks held" if found.clocks_held else ""
            yield (
                f"{row_name(row)}: {e.millijoules:.2f} mJ an image: {e.busy_watts:.2f} W less "
                f"{e.idle_watts:.2f} W idle, of {' + '.join(e.rails)}{mode}"
            )


def _blame(row: Row, gain: Gain) -> str:
    """Say which blocks INT8 makes slower, and what changing types and layouts takes."""
    if gain.slower is None or row.spent is None:
        return "which blocks are to blame is not known: the runtime does not tell their times"
    named = ", ".join(
        f"{each.block} {each.int8_ms:.3g} ms ({gain.over} {each.float_ms:.3g} ms)"
        for each in gain.slower[:_BLAMED]
    )
    more = f" and {len(gain.slower) - _BLAMED} more" if len(gain.slower) > _BLAMED else ""
    share = sum(row.spent.shares.get(what, 0.0) for what in _CONVERTS)
    return (
        f"slower in INT8 by their kernels' times: {named or 'no block'}{more}; "
        f"{_part(share)} of INT8's time only changes types and layouts"
    )


def executed_line(row: Row) -> str:
    """Say in one line what an engine runs, and which nodes it has beside the layers."""
    found = row.executed
    if found is None:
        return ""
    shares = (f"{_part(share)} in {name.upper()}" for name, share in found.shares.items())
    nodes = ", ".join(f"{count} {kind}" for kind, count in found.conversions.items())
    line = f"{_runs(row)} {', '.join(shares)} (multiply-accumulates of the convolutions); "
    line += f"conversions: {nodes or 'none'}"
    line += f"; not told: {', '.join(found.unknown)}" if found.unknown else ""
    if row.spent is None:
        return line
    times = (
        f"{_part(share)} {what.upper() if what in WIDEST_FIRST else what}"
        for what, share in row.spent.shares.items()
    )
    return f"{line}; by its kernels' times {', '.join(times)}"


def _runs(row: Row) -> str:
    """Say how sure it is what an engine runs: what has not run yet is only built to."""
    return "runs" if row.status == "measured" else "is built to run"


def listing_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for every engine whose builder lists its kernels: size, traffic, INT8 left."""
    return [_listing_line(row, row.listing, rows) for row in rows if row.listing is not None]


def _listing_line(row: Row, found: Listing, rows: Sequence[Row]) -> str:
    parts = [f"{found.kernels} kernels, listed by the builder and not measured"]
    if found.weights_bytes is not None and row.engine_bytes is not None:
        padding = f" ({_mb(found.zeros_bytes)} of it zeros that pad)" if found.zeros_bytes else ""
        parts.append(
            f"the engine's {_mb(row.engine_bytes)} are {_mb(found.weights_bytes)} of weights"
            f"{padding} and {_mb(row.engine_bytes - found.weights_bytes)} of code, the ONNX file "
            f"has {_mb(row.onnx_bytes)}"
        )
    parts.append(
        f"for one batch they read {_mb(found.read_bytes)} and write {_mb(found.written_bytes)}"
        f"{_beside_floats(row, found, rows)}"
    )
    if found.int8_widened:
        parts.append(
            f"{found.int8_widened} of {found.int8_kernels} INT8 kernels write a wider type, which "
            "another kernel makes INT8 again"
        )
    if is_int8(row.precision) and (found.zeros_bytes or 0) > _PADDED * (found.weights_bytes or 0):
        parts.append(
            "the zeros pad depthwise layers, which have no INT8 kernel: quantize.precision "
            '{fp16: ["*_depthwise"]} leaves those in FP16, and the zeros out'
        )
    return f"{row_name(row)}: {'; '.join(parts)}"


def _beside_floats(row: Row, found: Listing, rows: Sequence[Row]) -> str:
    """Return how much more or less an INT8 engine moves than the float ones of its place."""
    ratios = [
        f"{found.moved_bytes / other.listing.moved_bytes:.2f} times what {other.precision} moves"
        for other in rows
        if other.listing is not None
        and is_int8(row.precision)
        and not is_int8(other.precision)
        and (other.target, other.runtime, other.batch) == (row.target, row.runtime, row.batch)
    ]
    return f" ({', '.join(ratios)})" if ratios else ""


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"


def _part(share: float) -> str:
    """Return a share in percent; only all of it is 100%, and only nothing is 0%."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def _not_compared(parity: Parity) -> str:
    if parity.failed:
        return f"failed: {parity.failed}"
    return f"skipped: {parity.skipped}" if parity.skipped else ""


def _share(share: Proportion | None) -> str:
    if share is None:
        return "not measured"
    percent = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
    return f"{share.successes}/{share.trials} = {percent}"


def pruning_lines(found: Pruning | None) -> Iterator[str]:
    """Say in a few lines what was asked for, what is left, and what it cost."""
    if found is None:
        return
    asked = " and ".join(f"{share:g} of the {name}" for name, share in found.budgets.items())
    images = f" on {found.images} images" if found.images else ""
    rounds = f", in {found.rounds} rounds" if found.rounds > 1 else ""
    if asked:
        yield (
            f"pruned to {asked}: {_left(found.macs)} of the multiply-accumulates and "
            f"{_left(found.parameters)} of the parameters are left; {found.ranking} ranking by "
            f"{found.importance}{images}, widths in multiples of {found.align}{rounds}"
        )
    if found.sparse:
        macs = sum(layer.macs[1] for layer in found.layers if layer.layer in found.sparse)
        yield (
            f"2:4 sparse weights in {len(found.sparse)} 1x1 convolutions, "
            f"{_part(macs / found.macs[1])} of the multiply-accumulates"
        )
    if found.latency is not None:
        asked_for, check = found.budgets["latency"], found.latency.check
        whole, left = check.median_ms
        yield (
            f"latency budget {asked_for:g}, {'met' if found.latency.met else 'MISSED'}: measured "
            f"{check.share.value:.3f} ({check.share.low:.3f} to {check.share.high:.3f}), "
            f"{whole:.2f} to {left:.2f} ms on {found.latency.engine} with "
            f"{found.latency.threads} threads, in turns{', noisy' if check.noisy else ''}; plan "
            f"{found.latency.plans} times measured, and {found.latency.gain:.2f} of what its "
            "steps save alone"
        )
    if found.effect is None:
        return
    near = found.effect.fidelity
    share = near.agreement
    agreement = f", agreement {share.successes}/{share.trials}" if share else ""
    yield f"against the unpruned network in torch: SQNR {_sqnr(near)}{agreement}"
    if found.effect.top1 and found.effect.paired:
        before, after = found.effect.top1
        d = found.effect.paired
        points = ", ".join(f"{100 * value:+.2f}" for value in (d.low, d.high))
        yield (
            f"top-1 {before.value:.2%} before and {after.value:.2%} after "
            f"({100 * d.difference:+.2f} points, 95% {points}; {d.lost} lost, {d.gained} gained "
            f"of {d.images})"
        )


def cut_layers(found: Pruning) -> list[LayerChange]:
    """Return the layers whose widths change."""
    return [
        la for la in found.layers if la.inputs[0] != la.inputs[1] or la.outputs[0] != la.outputs[1]
    ]


def _left(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{after / before:.1%}"


def _sqnr(fidelity: Fidelity | None) -> str:
    if fidelity is None:
        return "not measured"
    return "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f} dB"


def _difference(paired: Paired) -> str:
    """Return the difference of top-1 in points, with interval and p."""
    points = (f"{100 * x:+.2f}" for x in (paired.difference, paired.low, paired.high))
    return "{} points ({} to {}), p {:.2g}".format(*points, paired.p_value)


def _estimate(estimate: Interval | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.2f}x ({estimate.low:.2f} to {estimate.high:.2f})"


def _cell(text: object) -> str:
    """Keep a text from a file inside its table cell, and from being read as HTML or Markdown."""
    plain = " ".join(str(text).split())
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)
    for character in "\\`*_[]<>|#&~":
        plain = plain.replace(character, f"\\{character}")
    return plain


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"
