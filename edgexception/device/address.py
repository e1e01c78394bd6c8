"""How a device is named: `ssh://user@host:port`, or a name in `~/.config/edgex/devices.yaml`.

    devices:
      orin:
        host: 192.168.1.7
        user: nvidia
        python: /home/nvidia/venv/bin/python
        folder: /mnt/nvme/work

What a host or user may be is narrow on purpose: a `ProxyCommand` of the user's own ssh_config is
run by a shell with the host's name in it. A folder and a Python may have any name: they travel as
data, and no shell sees them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from edgexception.errors import UsageError
from edgexception.strict_yaml import quoted, read_yaml
from edgexception.typed_yaml import closest, report, validate

_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}"
_ADDRESS = r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?"  # IPv6, with a zone
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
_URL = re.compile(rf"ssh://(?:({_USER})@)?(?:({_HOST})|\[({_ADDRESS})\])(?::([0-9]{{1,5}}))?/?")


class SshAddress(BaseModel):
    """Where a device is, and what is asked for there; None is what ssh or the device has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(pattern=rf"^(?:{_HOST}|{_ADDRESS})$")]
    """A name of ssh_config, a host name, or an IP address."""
    user: Annotated[str, Field(pattern=rf"^{_USER}$")] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    python: str | None = None
    """The interpreter that has numpy and the runtimes. Default: the device's `python3`."""
    folder: str | None = None
    """Where our folder is made. Default: the user's home."""


class _Devices(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: dict[str, SshAddress]


def devices_file() -> Path:
    """Return where named devices are written down."""
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "edgex/devices.yaml"
    )


def find_address(text: str) -> SshAddress:
    """Return the address that `--device` names; raises UsageError with the remedy if none."""
    if "://" in text:
        found = _URL.fullmatch(text)
        port = int(found[4]) if found and found[4] else None
        if found is None or (port is not None and not 1 <= port <= 65535):
            raise UsageError(
                f"--device {quoted(text)}: write ssh://user@host or ssh://user@host:port; host and "
                "user have letters, digits, dots, dashes and underscores alone"
            )
        return SshAddress(host=found[2] or found[3], user=found[1], port=port)
    path = devices_file()
    if not path.exists():
        raise UsageError(
            f"--device {quoted(text)}: write ssh://user@host, or name the device in {path}"
        )
    document = read_yaml(path)
    table, faults = validate(document.data, _Devices)
    if table is None or document.faults:
        raise report(document, faults)
    if text not in table.devices:
        raise UsageError(f"{path}: has no device {quoted(text)}; {closest(text, table.devices)}")
    return table.devices[text]
