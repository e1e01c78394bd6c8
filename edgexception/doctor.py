"""What this machine has for `edgex`, what it lacks, and how to get it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgexception import __version__
from edgexception.ability import why_not_built, why_not_run
from edgexception.device import Device, ProbeRecord, local_device, open_device
from edgexception.resolver import fact_lines
from edgexception.targets import extra_of, find_target, load_aliases, load_targets

_PACKAGES = {
    "torch": "workstation",
    "nncf": "workstation",
    "onnx": "workstation",
    "h5py": "workstation",
    "safetensors": "workstation",
    "scikit-learn": "all",
}
"""Package -> the extra that brings it; runtimes are asked by loading them."""


def probe(where: str | None = None) -> ProbeRecord:
    """Ask the agent, here or on the device that `where` names, what it has."""
    there: AbstractContextManager[Device] = (
        nullcontext(local_device()) if where is None else open_device(where)
    )
    with tempfile.TemporaryDirectory(prefix="edgex-probe-") as folder, there as device:
        answer = device.call("probe", {}, {}, Path(folder) / "answer")
    return ProbeRecord.model_validate(answer)


def examine() -> dict[str, Any]:
    """Return versions, or what is missing and the command that brings it, as plain data."""
    machine = probe()
    packages: dict[str, Any] = {}
    for name, extra in _PACKAGES.items():
        try:
            packages[name] = {"version": version(name)}
        except PackageNotFoundError:  # noqa: PERF203 - six packages
            packages[name] = _missing("not installed", extra)
    for name, facts in machine.runtimes.items():
        packages[name] = (
            {"version": facts.version, **({"program": facts.program} if facts.program else {})}
            if facts.missing is None
            else _missing(facts.missing, extra_of(name))
        )
    return {
        "edgexception": __version__,
        "python": sys.version.split()[0],
        "machine": machine.model_dump(include={"arch", "system", "board", "cpu", "memory"}),
        "free_disk_bytes": shutil.disk_usage(os.getcwd()).free,
        "packages": packages,
    }


def _missing(reason: str, extra: str | None) -> dict[str, str]:
    remedy = {"remedy": f"pip install 'edgexception[{extra}]'"} if extra else {}
    return {"missing": reason, **remedy}


def finding_lines(findings: dict[str, Any]) -> list[str]:
    """Return the findings as lines to read."""
    machine = findings["machine"]
    cpu, memory = machine["cpu"], machine["memory"]["available_bytes"]
    vnni = "" if machine["arch"] != "x86_64" else ", VNNI" if cpu["vnni"] else ", no VNNI"
    lines = [
        f"edgexception {findings['edgexception']}, Python {findings['python']}",
        f"{cpu['model'] or machine['arch']}: {cpu['usable_cores']} cores{vnni}, "
        f"{(memory or 0) / 2**30:.1f} GiB memory available, "
        f"{findings['free_disk_bytes'] / 2**30:.1f} GiB disk free",
    ]
    for name, facts in findings["packages"].items():
        if "version" in facts:
            lines.append(f"  ok       {name} {facts['version']}{_through(facts.get('program'))}")
        else:
            remedy = f"; {facts['remedy']}" if "remedy" in facts else ""
            lines.append(f"  missing  {name}: {facts['missing']}{remedy}")
    return lines


def _through(program: str | None) -> str:
    return f" through {program}, without its Python package" if program else ""


def target_rows(where: str | None = None, only: str | None = None) -> list[dict[str, Any]]:
    """Return what each runtime of every target, or of one, can do here or there, as plain data.

    Of one target all that is known of it, too.
    """
    known = load_targets()
    if only is not None:
        known = {load_aliases().get(only, only): find_target(only)}
    machine = probe(where)
    rows = []
    for name, target in known.items():
        runtimes = {}
        for runtime, row in target.runtimes.items():
            facts = machine.runtimes.get(runtime)
            reason = why_not_built(name, runtime, machine) or ""
            not_run = why_not_run(name, runtime, machine) or ""
            runtimes[runtime] = {
                "dialect": row.dialect,
                "precisions": list(row.precisions),
                "version": facts.version if facts else None,
                "program": facts.program if facts else None,
                "here": not reason,
                "reason": reason,
                "runs": not not_run,
                "not_run": not_run,
            }
        rows.append(
            {
                "target": name,
                "description": target.description,
                "arch": target.arch,
                "verified_on": target.verified_on,
                "runtimes": runtimes,
                "also": [alias for alias, named in load_aliases().items() if named == name],
                "facts": {key: fact.model_dump() for key, fact in target.facts.items()},
                "known": [] if only is None else list(fact_lines(name)),
            }
        )
    return rows


def target_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as lines to read."""
    lines = []
    for row in rows:
        verified = row["verified_on"] or "not run on hardware"
        also = "".join(f"; {alias} where no device says more" for alias in row["also"])
        about = f"{row['arch']}; verified: {verified}{also}"
        lines.append(f"{row['target']}: {row['description']} ({about})")
        for name, runtime in row["runtimes"].items():
            precisions = ", ".join(runtime["precisions"])
            found = f"{runtime['version']}{_through(runtime['program'])}"
            state = f"{found}, here" if runtime["here"] else f"no: {runtime['reason']}"
            if runtime["here"] and not runtime["runs"]:
                state = f"{found}, builds here; does not run: {runtime['not_run']}"
            lines.append(f"  {name} ({precisions}): {state}")
        lines += [f"  {line}" for line in row["known"]]
    return lines
