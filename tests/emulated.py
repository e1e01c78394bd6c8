"""An aarch64 machine on an x86-64 one: qemu-user, Debian's Python, PyPI's NumPy and ONNX Runtime.

    python tests/emulated.py FOLDER                                  set it up: 250 MB, a minute
    FOLDER/enter CPU SHARED python3 agent.pyz probe REQUEST RESPONSE   run something in it

Everything comes from Debian's and PyPI's mirrors, the packages checked by apt's signatures; nothing
is installed on this machine, and no root is needed where user namespaces are allowed. Inside, only
the folder SHARED of this machine is seen, under its own path.

What runs there shows that the agent, its runtime and the runtime's ARM kernels are *correct*. It
shows nothing of speed: every instruction is translated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from edgexception.device import LocalDevice
from edgexception.device.archive import agent_archive

RELEASE, PYTHON = "bookworm", "3.11"
"""The Debian release, and its Python: of 3.10 to 3.12 the one that a Debian mirror has."""
PACKAGES = (
    "python3-minimal",
    f"libpython{PYTHON}-stdlib",
    "libgomp1",
    "libstdc++6",
    "qemu-user-static:amd64",
    "busybox-static:amd64",
)
WHEELS = ("numpy", "onnxruntime")

CPUS = {
    # What ONNX Runtime chooses its kernels by. The first has the instructions of the Cortex-A78AE
    # of Orin: 8-bit dot products. The second has the 8-bit matrix products of newer cores, too.
    "cortex-a76": ("0x41", "0xd0b", "fp asimd fphp asimdhp asimdrdm atomics asimddp"),
    "max": ("0x00", "0x051", "fp asimd fphp asimdhp asimdrdm atomics asimddp i8mm bf16 sve"),
}

# No binfmt_misc is needed: what asks for Python inside finds a script, run by a native busybox.
_PYTHON = """#!/busybox sh
exec /qemu-aarch64-static -cpu {cpu} -0 "$0" /usr/bin/python{python} "$@"
"""
_ENTER = """#!/bin/sh
# usage: enter CPU SHARED COMMAND...
exec unshare --map-root-user --mount sh -c '
set -e
root=$0/root cpu=$1 shared=$2
shift 2
mount --rbind /proc "$root/proc"
mount --bind "$0/cpu/$cpu" "$root/proc/cpuinfo"
mount --bind /dev/null "$root/dev/null"
mkdir -p "$root$shared"
mount --bind "$shared" "$root$shared"
PATH=/$cpu:/bin
exec /usr/sbin/chroot "$root" "$@"' "$(dirname "$0")" "$@"
"""


def set_up(folder: Path) -> Path:
    """Make the machine in a folder, unless it is there already; return its `enter` command."""
    folder = folder.resolve()
    enter = folder / "enter"
    if not enter.exists():
        shutil.rmtree(folder, ignore_errors=True)
        root = folder / "root"
        root.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as work:
            for package in _download(Path(work, "apt")):
                target = Path(work, "native") if "_amd64." in package.name else root
                subprocess.run(["dpkg-deb", "-x", package, target], check=True)
            for name in ("usr/bin/qemu-aarch64-static", "bin/busybox"):
                shutil.copy(Path(work, "native", name), root)
        _install_wheels(root / f"usr/local/lib/python{PYTHON}/dist-packages")
        _furnish(folder, root)
        enter.write_text(_ENTER)
        enter.chmod(0o755)
    return enter


def emulated_device(folder: Path, shared: Path, cpu: str = "cortex-a76") -> LocalDevice:
    """Return the machine as a device that runs the agent's zipapp; `shared` holds what it reads."""
    agent = shared / "agent.pyz"
    agent.write_bytes(agent_archive())
    enter = str(set_up(folder))
    return LocalDevice(f"emulated {cpu}", (enter, cpu, str(shared), "python3", "-E", str(agent)))


def find_python(version: str) -> Path:
    """Return a native Python "3.10" of this machine: on the PATH, or one of pyenv's."""
    pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
    for found in (shutil.which(f"python{version}"), *pyenv):
        # pyenv puts a stand-in on the PATH that refuses where that version is not chosen.
        if (
            found
            and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            return Path(found)
    raise LookupError(f"there is no Python {version} here")


def native_device(folder: Path, shared: Path, version: str) -> LocalDevice:
    """Return this machine as a device that runs the agent's zipapp in another Python.

    NumPy and ONNX Runtime come from PyPI, into a virtual environment in `folder`.
    """
    agent, python = shared / "agent.pyz", folder / "bin/python"
    agent.write_bytes(agent_archive())
    if not (folder / "ready").exists():
        subprocess.run([find_python(version), "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *WHEELS], check=True)
        (folder / "ready").touch()
    return LocalDevice(f"Python {version}", (str(python), "-E", str(agent)))


def _download(apt: Path) -> list[Path]:
    """Return Debian's packages and all that they need, for both architectures."""
    for name in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "etc/preferences.d").mkdir(exist_ok=True)
    (apt / "status").write_text("")
    (apt / "etc/sources.list").write_text(
        "deb [arch=arm64,amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
        f"http://deb.debian.org/debian {RELEASE} main\n"
    )
    (apt / "apt.conf").write_text(
        f'Dir "{apt}"; Dir::State "state"; Dir::State::status "status"; Dir::Cache "cache";\n'
        f'Dir::State::status "{apt / "status"}"; Dir::Etc "etc"; Dir::Etc::sourceparts "none";\n'
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; "amd64"; };\n'
        'APT::Install-Recommends "false"; APT::Sandbox::User "";\n'
    )
    for command in (["update"], ["install", "--yes", "--download-only", *PACKAGES]):
        subprocess.run(
            ["apt-get", "--quiet=2", *command],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "APT_CONFIG": str(apt / "apt.conf")},
            check=True,
        )
    return sorted((apt / "cache/archives").glob("*.deb"))


def _install_wheels(target: Path) -> None:
    """Install aarch64 wheels; of ONNX Runtime the version that is compared with."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--target", target, "--no-deps", "--only-binary=:all:", *platforms,
         "--implementation=cp", f"--python-version={PYTHON}",
         *(f"{name}=={version(name)}" for name in WHEELS)],
        check=True,
    )  # fmt: skip


def _furnish(folder: Path, root: Path) -> None:
    """Give it devices, processors, and a Python for each of these."""
    for name in ("dev", "proc", "tmp", "sys/devices/system/cpu"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "dev/null").touch()
    (root / "bin/sh").symlink_to("/busybox")
    for name in ("possible", "present"):
        (root / "sys/devices/system/cpu" / name).write_text("0\n")
    (folder / "cpu").mkdir(exist_ok=True)
    for cpu, (implementer, part, features) in CPUS.items():
        (folder / "cpu" / cpu).write_text(
            f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: {implementer}\n"
            f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 0\n"
        )
        (root / cpu).mkdir()
        python = root / cpu / "python3"
        python.write_text(_PYTHON.format(cpu=cpu, python=PYTHON))
        python.chmod(0o755)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(set_up(Path(sys.argv[1])))
