from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgexception.agent import machine

X86 = "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f{}\n"
ARM = "Features\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_the_facts_of_this_machine_are_json_and_plausible() -> None:
    found = json.loads(json.dumps(machine.facts()))
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["logical_cpus"]
    assert found["cpu"]["logical_cpus"] == len(os.sched_getaffinity(0))
    assert 1 << 26 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]


@pytest.mark.parametrize(
    ("flags", "vnni"), [("", False), (" avx512_vnni", True), (" avx_vnni", True)]
)
def test_vnni_is_either_of_its_two_forms(tmp_path: Path, flags: str, vnni: bool) -> None:
    found = machine.cpu(tmp_path, X86.format(flags), [0])
    assert found["vnni"] is vnni
    assert found["model"] == "Some CPU"
    assert set(found["flags"]) == {"avx2", "avx512f", *flags.split()}


def test_an_arm_core_is_named_by_its_numbers(tmp_path: Path) -> None:
    found = machine.cpu(tmp_path, ARM, [0])
    assert found["model"] == "implementer 0x41 part 0xd42"
    assert found["flags"] == ["asimd", "asimddp", "i8mm"]
    assert found["vnni"] is False


def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    for number in range(8):
        put(tmp_path, f"sys/devices/system/cpu/cpu{number}/topology/physical_package_id", "0\n")
        put(tmp_path, f"sys/devices/system/cpu/cpu{number}/topology/core_id", f"{number // 2}\n")
    assert machine.cpu(tmp_path, "", list(range(8)))["usable_cores"] == 4
    assert machine.cpu(tmp_path, "", [1, 2, 3])["usable_cores"] == 2


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/a/b\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "400000 100000"}, 1.5),
        ("0::/outside\n", {"cpu.max": "300000 100000"}, 3.0),
        ("2:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1"}, None),
        ("0::/a\n", {"cpu.max": "garbage here"}, None),
    ],
)
def test_the_quota_of_the_control_groups_is_found(
    tmp_path: Path, group: str, files: dict[str, str], quota: float | None
) -> None:
    put(tmp_path, "proc/self/cgroup", group)
    for name, text in files.items():
        put(tmp_path, f"sys/fs/cgroup/{name}", text + "\n")
    found = machine.cpu(tmp_path, "", list(range(8)))
    assert found["quota_cpus"] == quota
    assert found["usable_cores"] == (int(quota) if quota else 8)


def test_version_1_groups_have_quota_and_period_apart(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "3:cpu:/x\n")
    put(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000\n")
    put(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n")
    found = machine.cpu(tmp_path, "", [0, 1])
    assert found["quota_cpus"] == 0.5
    assert found["usable_cores"] == 1, "half a core is still one thread"


def test_memory_is_bounded_by_the_control_group(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 100 kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/job\n")
    put(tmp_path, "sys/fs/cgroup/job/memory.max", "1048576\n")
    assert machine.memory(tmp_path) == {"total_bytes": 1048576, "available_bytes": 102400}


def test_a_silent_system_gives_none(tmp_path: Path) -> None:
    assert machine.memory(tmp_path) == {"total_bytes": None, "available_bytes": None}
    assert machine.cpu(tmp_path, "", [0])["model"] is None
