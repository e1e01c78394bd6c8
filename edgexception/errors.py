"""The errors of edgexception: one branch, one exit code.

    EdgexError                    70  a bug of ours, when nothing below fits
    ├── GateFailed                 1  a measured value misses a gate of the recipe
    ├── UsageError                 2  a command line or recipe that cannot be followed
    ├── NotPossibleHere            3  a runtime, a package or a device that is missing here
    │   └── DeviceLost             3  a device that was there and is no more: the run ends
    ├── BadArtifact                4  a file that is broken, hostile or not what it claims
    ├── MeasurementInvalid         5  a measurement ran and its numbers cannot be trusted
    └── OutOfResources             6  out of memory or disk

Every message names the file, field or layer, the reason and the remedy; `edgex` prints it
as one paragraph and exits with the code of its branch. An interrupt (Ctrl-C) exits with 130.
"""

from __future__ import annotations


class EdgexError(Exception):
    """Base of every error that edgexception raises on purpose."""

    exit_code = 70
    engine: str | None = None
    """The engine whose measurement failed, where several are measured together."""


class GateFailed(EdgexError):
    """A measured value misses a gate of the recipe."""

    exit_code = 1


class UsageError(EdgexError):
    """A command line, a recipe or a combination of settings that cannot be followed."""

    exit_code = 2


class NotPossibleHere(EdgexError):
    """A runtime, a package or a device that this machine does not have."""

    exit_code = 3


class DeviceLost(NotPossibleHere):
    """The connection to a device ended while it worked."""


class BadArtifact(EdgexError):
    """A checkpoint, image, manifest, graph or engine that is broken, hostile or mislabelled."""

    exit_code = 4


class MeasurementInvalid(EdgexError):
    """A measurement that ran, but whose numbers cannot be trusted."""

    exit_code = 5


class OutOfResources(EdgexError):
    """Memory or disk ran out."""

    exit_code = 6
