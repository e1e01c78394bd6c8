"""What an exported graph says of its sparse weights, held to what was planned."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edgexception.agent.placement import sparse_layers
from edgexception.errors import BadArtifact


def check_sparse(model: Path, planned: Collection[str]) -> None:
    """Raise BadArtifact naming a layer that was to be 2:4 sparse, and is not as it is written."""
    marked = set(sparse_layers(model))
    for name in planned:
        if name not in marked:
            raise BadArtifact(
                f"layer {name} was pruned to 2:4 sparse weights, and those written to {model.name} "
                "are not: an engine for sparse weights would compute something else; prune again"
            )
