"""What a report says of sensitivity: which edges and weights cost how much."""

from __future__ import annotations

import math

from edgexception.report.record import Effect, Sensitivity, UnitSensitivity

KINDS = {
    "input": "inputs of layers",
    "inner": "depthwise to pointwise",
    "weights": "weights",
    "output": "outputs",
}


def sensitivity_lines(table: Sensitivity) -> list[str]:
    """Return the table of what each edge and weight costs, worst first."""
    lines = [
        f"SQNR in dB of the logits with only this quantized ({table.dialect}, {table.images} "
        f"calibration images, {table.seconds:.0f} s on {table.threads} threads); "
        f"all: {decibels(table.everything)}",
        "noise by kind: "
        + ", ".join(f"{kind} {db} ({share:.0%})" for kind, db, share in budget(table)),
        f"{'unit':<24}{'input':>7}{'inner':>7}{'weights':>9}{'output':>8}{'unit':>7}"
        f"{'all but it':>12}  share of the noise",
    ]
    for row, share in worst_first(table):
        lines.append(
            f"{row.unit:<24}{decibels(row.input):>7}{decibels(row.inner):>7}"
            f"{decibels(row.weights):>9}{decibels(row.output):>8}{decibels(row.exception):>7}"
            f"{decibels(row.without):>12}  {share:6.1%} {shade(share)}"
        )
    return lines


def budget(table: Sensitivity) -> list[tuple[str, str, float]]:
    """Return for each kind of edge, and for weights: SQNR as text, and share of the noise.

    The noises of all units are added up as if none knew of another, so that all kinds together need
    not make the noise of the whole plan. Weights that learned rounding has put on their levels, and
    biases, make theirs together.
    """
    noises = {
        text: sum(effect.noise for row in table.units if (effect := getattr(row, kind)))
        for kind, text in KINDS.items()
    }
    noises["fitted weights and biases"] = table.fitted.noise
    total = sum(noises.values()) or 1.0
    return [
        (text, f"{-10 * math.log10(noise):.1f} dB", noise / total)
        for text, noise in noises.items()
        if noise > 0.0
    ]


def worst_first(table: Sensitivity) -> list[tuple[UnitSensitivity, float]]:
    """Return the units with their shares of the sum of all units' noises."""
    total = sum(row.exception.noise for row in table.units) or 1.0
    rows = sorted(table.units, key=lambda row: row.exception.noise, reverse=True)
    return [(row, row.exception.noise / total) for row in rows]


def shade(share: float) -> str:
    """Return a bar of one block for every percent, at least one."""
    return "\N{FULL BLOCK}" * max(1, min(60, round(share * 100)))


def decibels(effect: Effect | None) -> str:
    """Return an effect's SQNR as text."""
    if effect is None:
        return "-"
    return "equal" if effect.sqnr_db is None else f"{effect.sqnr_db:.1f}"
