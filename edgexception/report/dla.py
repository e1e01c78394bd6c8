"""What is planned for the DLA of a Jetson, beside what the builder made of it, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgexception.report.measures import DlaPlanned
from edgexception.report.record import Row, row_name

if TYPE_CHECKING:
    from edgexception.export.dla import DlaPlan

MAX_PARTS = 16
"""Parts of networks that a core holds at once (DLA Supported Layers and Restrictions)."""
_NAMED = 4
"""How many layers a message names."""


def dla_planned(plan: DlaPlan, not_on_dla: object = None) -> DlaPlanned:
    """Return a plan as it is reported; `not_on_dla` lists what the builder put on the GPU, if told.

    TensorRT names its layers as the ONNX nodes; those that it adds itself are in no plan.
    """
    planned = {layer.name for layer in plan.layers if layer.precision}
    others = {layer.name for layer in plan.layers} - planned
    on_gpu = {str(name) for name in not_on_dla} if isinstance(not_on_dla, list) else None
    total = sum(layer.macs for layer in plan.layers)
    return DlaPlanned(
        layers=len(plan.layers),
        macs_share=sum(la.macs for la in plan.layers if la.precision) / total if total else 0.0,
        precisions=dict(Counter(la.precision for la in plan.layers if la.precision)),
        parts=plan.parts,
        gpu={layer.name: layer.why for layer in plan.layers if not layer.precision},
        fell_back=None if on_gpu is None else tuple(sorted(planned & on_gpu)),
        taken=None if on_gpu is None else tuple(sorted(others - on_gpu)),
    )


def dla_lines(rows: Sequence[Row]) -> list[str]:
    """Say of every engine for a DLA what is planned for it, and where its builder did otherwise."""
    return [f"{row_name(row)}: {dla_line(row.dla)}" for row in rows if row.dla is not None]


def dla_line(found: DlaPlanned) -> str:
    """Say in one line which layers a DLA runs."""
    precisions = " and ".join(f"{n} in {name}" for name, n in sorted(found.precisions.items()))
    line = (
        f"planned for the DLA: {found.on_dla} of {found.layers} layers "
        f"({precisions}), {found.macs_share:.1%} of the multiply-accumulates, in "
        f"{found.parts} {'part' if found.parts == 1 else 'parts'} or more"
    )
    why = "; ".join(f"{_some(names)}: {reason}" for reason, names in _reasons(found.gpu).items())
    line += f"; the GPU runs {len(found.gpu)} ({why})" if found.gpu else ""
    if found.parts > MAX_PARTS:
        line += f"; a core holds {MAX_PARTS} parts at once"
    if found.fell_back is None or found.taken is None:
        return line
    others = (
        ("the builder put on the GPU, too", found.fell_back),
        ("the builder took for the DLA, too", found.taken),
    )
    told = [f"{what}: {_some(names)}" for what, names in others if names]
    return f"{line}; {'; '.join(told) or 'the builder did as planned'}"


def _reasons(gpu: Mapping[str, str]) -> dict[str, list[str]]:
    """Return every reason with the layers that it holds for."""
    found: dict[str, list[str]] = {}
    for name, reason in gpu.items():
        found.setdefault(reason, []).append(name)
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
