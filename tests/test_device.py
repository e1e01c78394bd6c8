"""The local transport: what it does with an agent that lies, dies, floods or is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import agent_that

from edgexception.agent.protocol import EXIT_CODES
from edgexception.agent.remote import LOG_LINES
from edgexception.device import LocalDevice, ProbeRecord, Progress, local_device
from edgexception.errors import (
    BadArtifact,
    EdgexError,
    MeasurementInvalid,
    NotPossibleHere,
    OutOfResources,
    UsageError,
)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_real_agent_answers_probe(tmp_path: Path) -> None:
    record = local_device().call("probe", {}, {}, tmp_path / "out")
    facts = ProbeRecord.model_validate(record)
    assert facts.arch == os.uname().machine
    assert facts.cpu.usable_cores >= 1
    assert left_in(tmp_path) == ["out"], "the work folder is gone"


def test_the_agent_comes_from_the_package_of_the_host(tmp_path: Path) -> None:
    """Also where another copy of the package is installed for the same Python."""
    package = Path(__file__).parents[1] / "edgexception"
    shutil.copytree(package, tmp_path / "edgexception")
    machine = tmp_path / "edgexception/agent/machine.py"
    text = machine.read_text()
    assert "platform.machine()" in text
    machine.write_text(text.replace("platform.machine()", "'this copy'"))
    adapter = tmp_path / "edgexception/agent/runtimes/ort.py"
    adapter.write_text("raise ImportError('this copy, too')")
    (tmp_path / "json.py").write_text("raise SystemExit('a module beside the package shadows')")
    host = "from pathlib import Path; from edgexception.device import local_device; "
    host += "print(local_device().call('probe', {}, {}, Path('out')))"
    start = f"import json, sys; sys.path.insert(0, {str(tmp_path)!r}); {host}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "'arch': 'this copy'" in done.stdout
    assert "this copy, too" in done.stdout


def test_the_agent_imports_from_the_folders_of_the_host_but_not_from_the_current_one(
    tmp_path: Path,
) -> None:
    """`pip install --user` puts runtimes into a folder that an isolated Python does not know."""
    user, here = tmp_path / "user", tmp_path / "here"
    user.mkdir()
    here.mkdir()
    (user / "openvino.py").write_text("raise ImportError('found in the user site')")
    (user / "json.py").write_text("raise SystemExit('shadows the library')")
    (here / "onnxruntime.py").write_text("raise ImportError('found in the current folder')")
    host = "import json, sys; from pathlib import Path; sys.path[:0] = sys.argv[1:]; "
    host += "from edgexception.device import local_device; "
    host += "print(local_device().call('probe', {}, {}, Path('out')))"
    root = str(Path(__file__).parents[1])
    # With -c the current folder is '' on the path; with -m it is there by its full name.
    for first in ("relative", str(here)):
        done = subprocess.run(
            [sys.executable, "-c", host, first, str(user), root, str(user / "gone")],
            capture_output=True,
            text=True,
            check=False,
            cwd=here,
        )
        assert done.returncode == 0, done.stderr
        assert "found in the user site" in done.stdout
        assert "found in the current folder" not in done.stdout


def test_request_and_files_arrive_and_the_answer_lies_in_out(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"abc")
    device = agent_that(
        """
        request = json.loads((asked / "request.json").read_text())
        (answered / "echo").write_bytes((asked / request["data"]).read_bytes() * 2)
        (answered / "unasked").write_text("not declared")
        well(files={"echo": 6})
    """.replace("\n        ", "\n")
    )
    out = tmp_path / "deep" / "out"
    device.call("probe", {"data": "d"}, {"d": tmp_path / "data.bin"}, out)
    assert (out / "echo").read_bytes() == b"abcabc"
    assert left_in(out) == ["echo"], "only what the answer declares is taken over"
    assert left_in(out.parent) == ["out"]
    assert (tmp_path / "data.bin").read_bytes() == b"abc"


def test_the_agent_gets_a_small_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "PYTHONSTARTUP", "PYTHONPATH", "SECRET_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    device = agent_that("(answered / 'e').write_text(json.dumps(dict(os.environ)))\n"
                        "well(files={'e': (answered / 'e').stat().st_size})")  # fmt: skip
    device.call("probe", {}, {}, tmp_path / "out")
    given = set(json.loads((tmp_path / "out/e").read_text()))
    # LC_CTYPE: Python itself sets it for its child where the locale is C.
    assert given - {"LC_CTYPE"} <= {"PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL"}
    assert "LD_LIBRARY_PATH" in given


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("usage", UsageError),
        ("not-possible-here", NotPossibleHere),
        ("bad-artifact", BadArtifact),
        ("measurement-invalid", MeasurementInvalid),
        ("out-of-resources", OutOfResources),
        ("bug", EdgexError),
    ],
)
def test_a_fault_becomes_the_error_of_its_branch(
    tmp_path: Path, kind: str, error: type[EdgexError]
) -> None:
    device = agent_that(f"""
respond({{"protocol": 1, "ok": False,
          "error": {{"kind": {kind!r}, "message": "because \\u001b[31m of\\nit"}}}})
sys.exit({EXIT_CODES[kind]})
""")
    with pytest.raises(error) as caught:
        device.call("probe", {}, {}, tmp_path / "out")
    assert type(caught.value) is error
    assert caught.value.exit_code == EXIT_CODES[kind], "agent and host number alike"
    assert str(caught.value) == "probe on fake: because  [31m of it", "no control characters"
    assert left_in(tmp_path) == [], "nothing half-written"


@pytest.mark.parametrize(
    ("death", "verb", "error", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "run", OutOfResources, "memory ran out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "run", BadArtifact, "SIGSEGV.*engine crashed"),
        ("os.abort()", "build", BadArtifact, "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGILL)", "probe", NotPossibleHere, "SIGILL"),
        ("print('what(): std::bad_alloc', flush=True); os.abort()", "run", OutOfResources, "memor"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "run", EdgexError, "from outside by signal 15"),
        ("print('last words', file=sys.stderr); sys.exit(3)", "run", EdgexError, "3.*last words"),
        (
            "print('disk full', flush=True); sys.exit(6)",
            "run",
            OutOfResources,
            "no answer.*disk full",
        ),
        ("sys.exit(0)", "run", BadArtifact, "answer is broken"),
        ("well(); sys.exit(5)", "probe", EdgexError, "went well but ended with code 5"),
        ("well(); os.kill(os.getpid(), signal.SIGSEGV)", "run", BadArtifact, "SIGSEGV"),
    ],
)
def test_an_agent_that_dies_is_named_for_what_killed_it(
    tmp_path: Path, death: str, verb: str, error: type[EdgexError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        agent_that(death).call(verb, {}, {}, tmp_path / "out")
    assert type(caught.value) is error
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("respond('{')", "Expecting"),
        ("respond('[' * 100000)", "broken"),
        ("respond([])", "field"),
        ("well(protocol=2)", "protocol"),
        ("well(extra=1)", "extra"),
        ("well(record=None)", "either a record or an error"),
        ("well(record={})", "arch"),
        ("FACTS['cpu']['usable_cores'] = '2'; well()", "cpu.usable_cores"),
        ("FACTS['cpu']['usable_cores'] = 0; well()", "cpu.usable_cores"),
        ("FACTS['cpu']['quota_cpus'] = float('nan'); well()", "NaN"),
        ("well(files={'../escaped': 1})", "plain name"),
        ("well(files={'/etc/passwd': 1})", "plain name"),
        ("well(files={'x': 5})", "No such file"),
        ("(answered / 'x').write_text('abc'); well(files={'x': 5})", "5 bytes"),
        ("(answered / 'x').symlink_to('/etc/hostname'); well(files={'x': 3})", "bytes"),
        ("(answered / 'x').mkdir(); well(files={'x': 4096})", "bytes"),
        ("well(); os.rename(answered / 'response.json', answered / 'r');"
         "os.symlink('r', answered / 'response.json')", "not a file"),
        ("os.mkfifo(answered / 'response.json')", "not a file"),
        ("well(pad='x' * (17 << 20))", "at most"),
        ("respond({'protocol': 1, 'ok': False})", "either"),
        ("respond({'protocol': 1, 'ok': False, 'error': {'kind': 'x', 'message': ''}})", "kind"),
    ],
)  # fmt: skip
def test_a_broken_or_hostile_answer_is_refused(tmp_path: Path, answer: str, says: str) -> None:
    with pytest.raises(BadArtifact, match=says) as caught:
        agent_that(answer).call("probe", {}, {}, tmp_path / "out")
    assert len(str(caught.value)) < 2500
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_progress_arrives_and_everything_else_is_log(tmp_path: Path) -> None:
    device = agent_that("""
def say(**event): print(json.dumps(event), file=sys.stderr, flush=True)
say(event="progress", what="step", done=1, total=4, left_s=2.5)
say(event="progress", what="step", done=2, total=4, left_s=None)
say(event="progress", what="step", done=-1, total=4, left_s=None)
say(event="progress", what="step", done=1, total=4, left_s=float("nan"))
say(event="other")
print("a runtime \\x1b[31mwarns", flush=True)
print("{not json", flush=True)
well()
""")
    steps: list[Progress] = []
    record = device.call("probe", {}, {}, tmp_path / "out", steps.append)
    assert steps == [Progress("step", 1, 4, 2.5), Progress("step", 2, 4, None)]
    assert record["log"][-2:] == ["a runtime  [31mwarns", "{not json"]
    assert len(record["log"]) == 5


def test_a_flood_on_stderr_is_bounded(tmp_path: Path) -> None:
    device = agent_that("""
for _ in range(64): sys.stderr.write("x" * (1 << 20))
sys.stderr.write("\\n")
for number in range(5000): sys.stderr.write(f"line {number}\\n")
sys.stderr.flush()
well()
""")
    start = time.monotonic()
    record = device.call("probe", {}, {}, tmp_path / "out")
    assert time.monotonic() - start < 12, "an endless line is dropped as it comes, not collected"
    assert len(record["log"]) == LOG_LINES
    assert record["log"][-1] == "line 4999"
    assert sum(map(len, record["log"])) < 1 << 19


def test_what_an_agent_leaves_running_is_killed_and_not_waited_for(tmp_path: Path) -> None:
    device = agent_that("""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(child.pid, flush=True)
well()
""")
    start = time.monotonic()
    record = device.call("probe", {}, {}, tmp_path / "out")
    assert time.monotonic() - start < 20
    wait_until(lambda: not alive(int(record["log"][-1])))


@pytest.mark.parametrize("name", ["../x", "/x", "", ".hidden", "a/b", "request.json", "x" * 200])
def test_a_request_file_needs_a_plain_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(UsageError, match="plain file name"):
        local_device().call("probe", {}, {name: tmp_path / "data"}, tmp_path / "out")


def test_a_missing_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    device = LocalDevice(command=("/nonexistent",))
    with pytest.raises(BadArtifact, match=r"engine\.onnx is not there"):
        device.call("run", {}, {"e": tmp_path / "engine.onnx"}, tmp_path / "out")


# --- who survives whom --------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# A host that measures for minutes with the real agent and says the agent's process id.
HOST = """
import os, sys
from pathlib import Path
from edgexception.device import local_device
device, work = local_device(), Path(sys.argv[2])
asked = {"runtime": "onnxruntime", "batch": 1, "threads": 1}
device.call("build", {**asked, "model": "m"}, {"m": Path(sys.argv[1])}, work / "built")
def progress(step):
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            print(child, flush=True)
timing = {"warmup_ms": 60_000, "duration_ms": 60_000, "min_iterations": 1}
files = {name: work / "built" / name for name in ("engine.onnx", "engine.json")}
asked |= {"engine": "engine.onnx", "manifest": "engine.json", "images": None, "timing": timing}
device.call("run", asked, files, work / "out", progress)
"""


def measuring_host(tiny_onnx: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(tiny_onnx), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert host.stdout is not None
    agent = int(host.stdout.readline())
    assert alive(agent)
    return host, agent


def test_ctrl_c_at_the_host_leaves_no_process(tiny_onnx: Path, tmp_path: Path) -> None:
    host, agent = measuring_host(tiny_onnx, tmp_path)
    host.send_signal(signal.SIGINT)
    _, errors = host.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert host.returncode == -signal.SIGINT
    assert not alive(agent), "it was ended before the host went on"
    assert left_in(tmp_path) == ["built"], "the work folder is cleared and no result was published"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_agent_does_not_survive_a_killed_host(
    tiny_onnx: Path, tmp_path: Path, number: signal.Signals
) -> None:
    host, agent = measuring_host(tiny_onnx, tmp_path)
    host.send_signal(number)
    host.communicate(timeout=20)
    wait_until(lambda: not alive(agent))


def test_an_agent_killed_while_it_measures_is_out_of_resources(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    host, agent = measuring_host(tiny_onnx, tmp_path)
    os.kill(agent, signal.SIGKILL)
    _, errors = host.communicate(timeout=20)
    assert "OutOfResources: run on local: the agent's process was killed" in errors
    assert left_in(tmp_path) == ["built"]


def test_a_progress_callback_that_raises_ends_the_agent(tmp_path: Path) -> None:
    device = agent_that("""
(asked.parents[1] / "pid").write_text(str(os.getpid()))
print('{"event": "progress", "what": "x", "done": 0, "total": 1, "left_s": null}', flush=True)
time.sleep(100)
""")

    def progress(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.call("probe", {}, {}, tmp_path / "out", progress)
    assert not alive(int((tmp_path / "pid").read_text()))
