"""What an engine really runs, beside what its name promises: from the build record to shares."""

from __future__ import annotations

from dataclasses import dataclass

from edgexception.device import BuildRecord, LayerPlacement
from edgexception.errors import BadArtifact

NAMED = 4
"""How many layers a message names."""


@dataclass(frozen=True)
class Executed:
    """In which precisions a network's layers run."""

    shares: dict[str, float]
    """Of the convolutions' multiply-accumulates, by precision; "unknown" is not told."""
    conversions: dict[str, int]
    misplaced: tuple[LayerPlacement, ...]
    """Layers that run in another precision than planned."""
    unknown: tuple[str, ...]
    """Layers of which the runtime does not tell."""


def executed(record: BuildRecord) -> Executed | None:
    """Sum up the layers of an engine; None where its ONNX file says nothing of them."""
    convolutions = [layer for layer in record.placement if layer.kind == "convolution"]
    total = sum(layer.macs for layer in convolutions)
    if not total:
        return None
    macs: dict[str, int] = {}
    for layer in convolutions:
        name = layer.executed or "unknown"
        macs[name] = macs.get(name, 0) + layer.macs
    return Executed(
        shares={name: count / total for name, count in sorted(macs.items())},
        conversions=record.conversions,
        misplaced=tuple(
            layer for layer in record.placement if layer.executed not in (None, layer.planned)
        ),
        unknown=tuple(layer.name for layer in record.placement if layer.executed is None),
    )


def check_placement(record: BuildRecord, engine: str) -> None:
    """Raise BadArtifact when a layer runs in another precision than the plan says.

    A layer that the runtime does not tell of is not a fault: nothing wrong was seen.
    """
    found = executed(record)
    if found is None or not found.misplaced:
        return
    wrong = sorted(found.misplaced, key=lambda layer: -layer.macs)
    total = sum(layer.macs for layer in record.placement)
    share = sum(layer.macs for layer in wrong) / total
    named = ", ".join(
        f"{layer.name} (planned {layer.planned}, runs in {layer.executed}, {layer.kernel})"
        for layer in wrong[:NAMED]
    )
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    raise BadArtifact(
        f"{engine} is not what its name says: {len(wrong)} of {len(record.placement)} layers, "
        f"{share:.1%} of the multiply-accumulates, do not run as planned: {named}{more}. Plan them "
        f"as they run (`quantize.precision`), or take another runtime or version of "
        f"{record.runtime}"
    )
