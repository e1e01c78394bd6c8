"""The output folder: what a run leaves there by name, beside the store that holds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgexception.artifacts import Store, atomic_write
from edgexception.errors import UsageError

_REPORTS = ("report.json", "report.md")
_TEXTS = ("recipe.yaml", *_REPORTS)
_LINKS = ("model.safetensors", "plan.json", "calibration.json")
_LINK_FOLDERS = ("onnx", "engines")
"""What a run leaves in its output folder, beside the store."""


def open_output(out: Path) -> Store:
    """Make or take over an output folder, and return its store with the lock held.

    Takes away the last run's report, so that a run that fails leaves none that looks like its own.
    Raises UsageError where that cannot be, or where something of the user's is in the way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be the output folder ({error.strerror}); name another one with --out"
        ) from error
    _refuse_foreign(out)
    store = Store(out / "store")
    for name in _REPORTS:
        (out / name).unlink(missing_ok=True)
    return store


def fill_output(
    out: Path, store: Store, links: Mapping[str, Path], texts: Mapping[str, str]
) -> None:
    """Link results of `store` from the output folder by name, then write the texts beside them."""
    with store.scratch() as work:
        _replace_links(out, links, work)
        for name, text in texts.items():
            atomic_write(work / name, text)
            (work / name).replace(out / name)


def _refuse_foreign(out: Path) -> None:
    """Refuse to replace anything under a name of ours that an earlier run did not put there."""
    ran_before = (out / "store" / ".lock").is_file()
    texts = [out / name for name in _TEXTS if os.path.lexists(out / name)]
    foreign = [p for p in texts if not ran_before or p.is_symlink() or not p.is_file()]
    links = [out / name for name in _LINKS if os.path.lexists(out / name)]
    for folder in (out / name for name in _LINK_FOLDERS):
        if folder.is_dir() and not folder.is_symlink():
            links += folder.iterdir()
        elif os.path.lexists(folder):
            foreign.append(folder)
    foreign += [path for path in links if not _ours(path)]
    if foreign:
        raise UsageError(
            f"{foreign[0]}: is there already, and is not a result of edgex, which would have to "
            "replace it; choose another output folder with --out"
        )


def _ours(path: Path) -> bool:
    """Tell whether a path is a link that a run put there: relative, into the store beside it."""
    return path.is_symlink() and os.readlink(path).removeprefix("../").startswith("store/")


def _replace_links(out: Path, links: Mapping[str, Path], work: Path) -> None:
    """Put each link in place in one step, and remove those of ours that an earlier run left."""
    for folder in (out, *(out / name for name in _LINK_FOLDERS)):
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if _ours(old) and old.relative_to(out).as_posix() not in links:
                old.unlink()
    for name, path in links.items():
        (work / "link").symlink_to(os.path.relpath(path, (out / name).parent))
        (work / "link").replace(out / name)
