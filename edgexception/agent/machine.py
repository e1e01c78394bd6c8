"""Facts about this machine that decide a build: cores that may be used, instructions, memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

# INT8 speed and exactness hang on these; the rest of the flags is noise in a report.
X86_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")

_ROOT = Path("/")


def facts(root: Path = _ROOT) -> dict[str, Any]:
    """Return architecture, system, CPU and memory as plain data; None: not known."""
    cpuinfo = read_text(root / "proc/cpuinfo")
    return {
        "arch": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "board": read_text(root / "proc/device-tree/model").strip("\0\n ") or None,
        "cpu": cpu(root, cpuinfo, sorted(os.sched_getaffinity(0))),
        "memory": memory(root),
    }


def cpu(root: Path, cpuinfo: str, cpus: list[int]) -> dict[str, Any]:
    """Return the facts of the CPUs with these numbers, those this process may run on.

    `vnni` says that 8-bit products are summed in 32 bits by one instruction, without the int16
    saturation of plain AVX2 and AVX-512; it is about x86 only.
    """
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    physical = len({_core(root, number) for number in cpus})
    quota = _quota(root)
    return {
        "model": _cpu_model(cpuinfo),
        "logical_cpus": len(cpus),
        "physical_cores": physical,
        "quota_cpus": quota,
        "usable_cores": max(1, min(physical, int(quota) if quota else physical)),
        "flags": [flag for flag in (*X86_FLAGS, *ARM_FLAGS) if flag in flags],
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
    }


def memory(root: Path) -> dict[str, int | None]:
    """Return total and available memory in bytes, within the control group's limit."""
    meminfo = read_text(root / "proc/meminfo")
    sizes: dict[str, int | None] = {}
    for field, name in (("MemTotal", "total_bytes"), ("MemAvailable", "available_bytes")):
        found = re.search(rf"^{field}:\s*(\d+) kB", meminfo, re.MULTILINE)
        sizes[name] = int(found.group(1)) * 1024 if found else None
    limits = _group_values(root, "memory", ("memory.max", "memory.limit_in_bytes"))
    bounds = [int(text) for text in limits if text.isdigit()]
    for name, size in sizes.items():
        if size is not None:
            sizes[name] = min([size, *bounds])
    return sizes


def _core(root: Path, number: int) -> tuple[str, str]:
    """Return (package, core); logical CPUs of one physical core share both."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    package, core = read_text(topology / "physical_package_id"), read_text(topology / "core_id")
    return package.strip(), core.strip() or f"cpu{number}"


def _quota(root: Path) -> float | None:
    """Return how many CPUs' time the control groups grant, or None without a quota."""
    quotas = []
    for text in _group_values(root, "cpu", ("cpu.max",)):
        grant, _, period = text.partition(" ")
        if grant.isdigit() and period.isdigit() and int(period):
            quotas.append(int(grant) / int(period))
    for folder in _groups(root, "cpu"):
        grant = read_text(folder / "cpu.cfs_quota_us").strip()
        period = read_text(folder / "cpu.cfs_period_us").strip()
        if grant.isdigit() and period.isdigit() and int(period):
            quotas.append(int(grant) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)


def _group_values(root: Path, controller: str, names: tuple[str, ...]) -> list[str]:
    texts = [read_text(folder / name) for folder in _groups(root, controller) for name in names]
    return [text.strip() for text in texts if text.strip()]


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group and its parents, versions 1 and 2.

    Inside a container the path may name a group outside it; the mount point is then what counts,
    and it is always among the folders.
    """
    base = root / "sys/fs/cgroup"
    folders = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top = base
        elif controller in controllers.split(","):
            top = base / controller
        else:
            continue
        folder = top / path.lstrip("/")
        folders += [folder, *(up for up in folder.parents if up == top or top in up.parents)]
    return folders


def _cpu_model(cpuinfo: str) -> str | None:
    for pattern in (r"^model name\s*:\s*(.+)$", r"^Hardware\s*:\s*(.+)$"):
        if found := re.search(pattern, cpuinfo, re.MULTILINE):
            return found.group(1).strip()
    implementer = re.search(r"^CPU implementer\s*:\s*(\S+)$", cpuinfo, re.MULTILINE)
    part = re.search(r"^CPU part\s*:\s*(\S+)$", cpuinfo, re.MULTILINE)
    if implementer and part:
        return f"implementer {implementer.group(1)} part {part.group(1)}"
    return None


def read_text(path: Path) -> str:
    """Return a small text file of the kernel, or "" where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
