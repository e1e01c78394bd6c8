"""Plans on disk: one JSON document of a known schema each."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from edgexception.errors import BadArtifact

Plan = TypeVar("Plan", bound=BaseModel)


def read_plan(path: Path, schema: type[Plan], what: str, command: str) -> Plan:
    """Read a plan file; raise BadArtifact naming the field when it is not `what`."""
    try:
        return schema.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = (
            "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in error.errors()[:3]
            )
            if isinstance(error, ValidationError)
            else str(error)
        )
        raise BadArtifact(
            f"{path}: not {what} ({reason}); make it again with `{command}`"
        ) from error
