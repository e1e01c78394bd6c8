"""A run's record as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgexception.report.record import (
    Estimate,
    Fidelity,
    GateResult,
    Paired,
    Parity,
    Report,
    Share,
    row_name,
)


def to_text(report: Report) -> str:
    """Return the measured rows, the gates and the parity as lines for a terminal."""
    network = report.network
    height, width = network.preprocess.input_size
    lines = [
        f"network: {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC at "
        f"{height}x{width}, {network.outputs} outputs"
    ]
    if report.calibration is not None:
        c = report.calibration
        lines.append(
            f"quantized: {c.activations} activations, {c.weight_bits}-bit weights, {c.ranges} "
            f"ranges of {c.images} images"
        )
    for row in report.rows:
        latency = f"{row.latency.median_ms:9.2f} ms" if row.latency else f"{row.status:>12}"
        facts = [
            "fastest" if row.fastest else "",
            f"{row.speedup.value:.2f}x" if row.speedup else "",
            f"top-1 {_share(row.top1)}" if row.top1 else "",
            f"{row.paired.changed} changed" if row.paired else "",
        ]
        facts += [f"SQNR {_sqnr(row.fidelity)}" if row.fidelity else "", row.reason or ""]
        lines.append(f"{row_name(row):<36}{latency}  {'  '.join(fact for fact in facts if fact)}")
    for parity in report.parity:
        name = f"{parity.form} on {parity.runtime}" if parity.runtime else parity.form
        found = f"{_sqnr(parity.executed_vs_torch)} executed against torch"
        found += ": differs" if parity.differs else ""
        lines.append(f"{name:<36}{_not_compared(parity) or found}")
    return "\n".join([*lines, *gate_lines(report.gates)])


def gate_lines(gates: Sequence[GateResult]) -> list[str]:
    """Return one line a gate: what was bounded, where, and what was found."""
    lines = []
    for gate in gates:
        found = gate.reason if gate.value is None else f"{gate.value:.4g}"
        state = "passed" if gate.passed else "missed"
        lines.append(f"gate {gate.gate} {gate.bound} {state} by {gate.row}: {found}")
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
    )
    return environment.get_template("report.md.j2").render(report=report)


def _not_compared(parity: Parity) -> str:
    if parity.failed:
        return f"failed: {parity.failed}"
    return f"skipped: {parity.skipped}" if parity.skipped else ""


def _share(share: Share | None) -> str:
    if share is None:
        return "not measured"
    percent = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
    return f"{share.successes}/{share.trials} = {percent}"


def _sqnr(fidelity: Fidelity | None) -> str:
    if fidelity is None:
        return "not measured"
    return "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f} dB"


def _difference(paired: Paired) -> str:
    """Return the difference of top-1 in points, with interval and p."""
    points = (f"{100 * x:+.2f}" for x in (paired.difference, paired.low, paired.high))
    return "{} points ({} to {}), p {:.2g}".format(*points, paired.p_value)


def _estimate(estimate: Estimate | None) -> str:
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
