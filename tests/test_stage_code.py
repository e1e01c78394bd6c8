"""Which sources a stage's key names: all that it can run, and no more than need be."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from traced_stages import StaleKey

import edgexception.bench.statistics as bench_statistics
from edgexception import engine_stages, model_stages, stage_code, stages
from edgexception.artifacts import Store, stage_key
from edgexception.device import Progress, local_device
from edgexception.output import open_output
from edgexception.photos import FORMATS
from edgexception.preprocess import Preprocess, PreprocessChanges
from edgexception.stage_code import PACKAGE, WITHOUT_PART, Module, sources, stage_modules

ROOT = Path(stage_code.__file__).parent


def found(write: Callable[..., object]) -> set[str]:
    return {name.removeprefix(f"{PACKAGE}.") for name in stage_modules(write)} - {PACKAGE}


def rooms(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_a_stage_is_done_again_for_what_it_runs_and_for_nothing_else() -> None:
    outside = {"pipeline", "cli", "console", "report", "bench", "agent", "doctor", "short_form"}
    train = found(model_stages._train) - {"report.network"}
    assert {"train.loop", "model_stages", "imageset", "model.xception", "model.checkpoint"} <= train
    assert not rooms(train) & (outside | {"quantize", "export"})
    quantize = found(stages.quantize)
    assert {"quantize.ptq", "quantize.ranges", "model.graph", "calibration"} <= quantize
    assert not rooms(quantize) & (outside | {"export"})
    assert {name for name in quantize if name.startswith("train.")} == {"train.state"}
    build = found(engine_stages.build)
    assert {"device.local", "agent.verbs", "agent.runtimes.ort"} <= build
    assert not rooms(build) & {"quantize", "model", "train", "report", "cli"}
    verify = found(stages.verify)
    assert {"quantize.simulate", "agent.verbs", "report.assemble", "bench.protocol"} <= verify
    assert not rooms(verify) & {"train", "cli", "console"}


# --- how a function's modules are found


def imports_inside() -> object:
    from edgexception.model import archive  # noqa: PLC0415

    return archive


def calls_it() -> object:
    return imports_inside()


class Helper:
    def opens(self) -> object:
        return open_output


@pytest.mark.parametrize(
    ("write", "first"),
    [
        (imports_inside, "model.archive"),
        (calls_it, "model.archive"),
        (lambda: [imports_inside() for _ in "ab"], "model.archive"),
        (lambda: Helper().opens(), "output"),
        (lambda: FORMATS, "photos"),
        (lambda: bench_statistics, "bench.statistics"),
        (lambda: Progress, "device.contract"),
    ],
)
def test_what_a_function_names_is_found(write: Callable[..., object], first: str) -> None:
    direct = {name.removeprefix(f"{PACKAGE}.") for name in sources()[f"{PACKAGE}.{first}"].mentions}
    assert {first} <= found(write)
    assert direct - {"errors"} <= found(write)
    assert first == "device.contract" or "device" not in rooms(found(write))


def test_what_a_function_closes_over_is_found() -> None:
    value = Preprocess(input_size=(71, 71))
    assert found(lambda: value) == {"preprocess"}


def test_whoever_mentions_the_agent_mentions_all_of_it() -> None:
    agent = {name for name in sources() if name.startswith(f"{PACKAGE}.agent")}
    assert len(agent) > 8
    assert agent <= stage_modules(lambda: local_device)
    assert agent <= stage_modules(engine_stages.build)


def test_every_import_is_seen_and_none_is_dynamic() -> None:
    for name, module in sources().items():
        path = ROOT.parent / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        mentioned = {*module.mentions, name, PACKAGE}
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: a relative import would not be seen"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {node.module or ""} & sources().keys()
            else:
                continue
            assert names & sources().keys() <= mentioned, name
            # Text that says which module to import next is for the agent alone: it is one piece.
            dynamic = names & {"importlib", "importlib.import_module", "runpy", "pkgutil"}
            assert not dynamic or name.startswith(f"{PACKAGE}.agent"), name


def test_what_has_no_part_in_a_result_is_in_no_key() -> None:
    assert sources().keys() >= WITHOUT_PART
    assert not stage_modules(engine_stages.build) & WITHOUT_PART


# --- from modules to a key


def test_an_edit_changes_the_code_of_those_that_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_code.stage_code(imports_inside), stage_code.stage_code(Helper)
    name = f"{PACKAGE}.model.archive"
    edited = {**sources(), name: Module("0" * 64, sources()[name].mentions)}
    monkeypatch.setattr(stage_code, "sources", lambda: edited)
    after = stage_code.stage_code(imports_inside), stage_code.stage_code(Helper)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


def test_sources_see_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(**files: str) -> dict[str, str]:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        found = sources.__wrapped__()
        return {name.removeprefix(PACKAGE): module.sha256 for name, module in found.items()}

    monkeypatch.setattr(stage_code, "__file__", str(tmp_path / "stage_code.py"))
    first = read(a_dot_py='open("t.yaml")', b__c_dot_py="", t_dot_yaml="1")
    assert first.keys() == {".a", ".b.c"}
    assert read(b__c_dot_pyc="compiled") == first
    second = read(t_dot_yaml="2")
    assert [first[name] == second[name] for name in (".a", ".b.c")] == [False, True]
    third = read(b__c_dot_py="x = 1")
    assert [second[name] == third[name] for name in (".a", ".b.c")] == [True, False]


def test_data_files_are_named_by_a_module() -> None:
    texts = [path.read_text() for path in ROOT.rglob("*.py")]
    for path in ROOT.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(path.name in text for text in texts), path


# --- the watch over all this


def test_code_outside_of_a_key_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Preprocess(input_size=(71, 71))
    hidden = [lambda: PreprocessChanges().applied_to(own)]

    def write(folder: Path) -> None:
        hidden[0]()

    # The watch is over the package's own stages, and such a one hides nothing like this.
    monkeypatch.setattr(write, "__module__", f"{PACKAGE}.engine_stages")
    with (
        Store(tmp_path) as store,
        pytest.raises(StaleKey, match=r"its key: edgexception.preprocess"),
    ):
        store.publish("stage", stage_key("stage", {}, "code"), {}, "code", write)
