"""What a report says of the network itself: the part of the record that stages write.

`record` changes with every figure that a report gets, and nothing is to be trained again for that.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from edgexception.preprocess import Preprocess


class Network(BaseModel):
    """The network as it was imported or trained; `model.json` of its stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True)

    source: dict[str, str]
    classes: tuple[str, ...] | None
    preprocess: Preprocess
    outputs: int
    parameters: int
    macs: int
    """Multiply-accumulates for one image."""
