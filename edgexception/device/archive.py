"""The agent as one file for a device: `edgexception/agent/` and a start, as a zipapp."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

import edgexception.agent

_START = "import runpy\nrunpy.run_module('edgexception.agent', run_name='__main__')\n"


@functools.cache
def agent_archive() -> bytes:
    """Return the zipapp: for the same sources always the same bytes."""
    folder = Path(edgexception.agent.__file__).parent
    files = {
        f"edgexception/agent/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*.py"))
    }
    files |= {"edgexception/__init__.py": b"", "__main__.py": _START.encode()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A date of its own: the file's would change the bytes with every checkout.
            archive.writestr(
                zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED
            )
    return content.getvalue()
