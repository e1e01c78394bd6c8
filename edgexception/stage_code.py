"""Which of this package's modules a stage can run: its key names their content and no other's.

A stage is a function `write`. What it can run is found from the function itself:

1. the module that it stands in, and this package's version;
2. the modules that it imports inside, and so every function of a module of stages that it names;
3. the modules where the other functions and classes that these name, and the values that they close
   over, were defined;
4. from those of 2 and 3 on, every module of this package that a module's text mentions, be it in an
   import for type checking, and the data files that it mentions. The agent runs in a process of its
   own, so it is one piece: whoever mentions it mentions all of it.

A few modules are left out: what they do has no part in a result. `tests/traced_stages.py` watches
each stage that a test runs in its process and fails when other code ran than is found here.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import CodeType
from typing import NamedTuple

PACKAGE = __name__.partition(".")[0]
AGENT = f"{PACKAGE}.agent"
WITHOUT_PART = {
    f"{PACKAGE}.errors",  # a stage that raises has no result
    f"{PACKAGE}.recipe",  # what a spec says stands in the key as a value
    f"{PACKAGE}.recipe_data",
    f"{PACKAGE}.recipe_prune",
    f"{PACKAGE}.workshop",  # it runs stages, and tells of them
}
_DOTTED = re.compile(rf"\b{PACKAGE}(?:\.\w+)*")
_FROM = re.compile(rf"^\s*from\s+({PACKAGE}[\w.]*)\s+import\s+(\([^)]*\)|[^\n]*)", re.MULTILINE)


class Module(NamedTuple):
    """One source file."""

    sha256: str
    """Of the file, and of the data files that it mentions."""
    mentions: tuple[str, ...]
    """Other modules of this package."""


def stage_code(write: Callable[..., object]) -> str:
    """Return a sha256 over the sources that a stage's function can run."""
    package = sources()
    text = "".join(f"{name}\0{package[name].sha256}\n" for name in sorted(stage_modules(write)))
    return hashlib.sha256(text.encode()).hexdigest()


def stage_modules(write: Callable[..., object]) -> set[str]:
    """Return the modules of this package that a stage's function can run."""
    package = sources()
    found = {PACKAGE, write.__module__} & package.keys()
    pending = list(_named_by(write))
    while pending:
        name = pending.pop()
        if name in package and name not in found | WITHOUT_PART:
            found.add(name)
            pending += () if _holds_stages(name) else package[name].mentions
            if name.startswith(AGENT):
                pending += (other for other in package if other.startswith(AGENT))
    return found


@functools.cache
def sources() -> dict[str, Module]:
    """Read every source of this package (about 20 ms, once)."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
    content = {path: path.read_bytes() for path in files}
    data = [path for path in files if path.suffix != ".py"]
    modules: dict[str, tuple[bytes, str]] = {}
    for path in files:
        if path.suffix == ".py":
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((PACKAGE, *parts)).removesuffix(".__init__")
            text = content[path].decode()
            used = [content[other] for other in data if other.name in text]
            modules[name] = b"\0".join((content[path], *used)), text
    return {
        name: Module(hashlib.sha256(data).hexdigest(), _mentions(name, text, modules.keys()))
        for name, (data, text) in modules.items()
    }


def _mentions(name: str, text: str, known: AbstractSet[str]) -> tuple[str, ...]:
    words = set(_DOTTED.findall(text))
    for module, names in _FROM.findall(text):
        words.update(f"{module}.{word}" for word in re.findall(r"\w+", names))
    return tuple(sorted((words & known) - {name, PACKAGE}))


def _holds_stages(module: str) -> bool:
    """Tell whether the functions of a module count one by one: it holds one stage and another."""
    return module.endswith("stages")


def _named_by(function: Callable[..., object]) -> Iterator[str]:
    """Yield the modules that a function names, itself and through others of modules of stages."""
    package = sources().keys()
    pending: list[object] = [function]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        value = inspect.unwrap(value) if callable(value) else value
        if inspect.ismodule(value):
            yield value.__name__
        elif not inspect.isfunction(value) and not inspect.isclass(value):
            yield type(value).__module__
        elif value.__module__ != function.__module__ and not _holds_stages(value.__module__):
            yield value.__module__
        elif inspect.isclass(value):
            pending += vars(value).values()
        else:
            yield value.__module__
            constants = _constants(value.__module__)
            pending += (cell.cell_contents for cell in value.__closure__ or ())
            names = set(_names(value.__code__))
            pending += (value.__globals__[name] for name in names & value.__globals__.keys())
            # Where a constant is from, its type does not tell.
            yield from (constants[name] for name in names & constants.keys())
            for module in names & package:
                yield module
                yield from (f"{module}.{name}" for name in names)


@functools.cache
def _constants(module: str) -> dict[str, str]:
    """Return from where a module imports, at its top, what is neither function nor class."""
    namespace = vars(sys.modules[module])
    return {
        name: source
        for source, names in _FROM.findall(inspect.getsource(sys.modules[module]))
        for name in re.findall(r"\w+", names)
        if not inspect.isfunction(namespace.get(name)) and not inspect.isclass(namespace.get(name))
    }


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names in a function's code: globals, attributes, and the modules it imports."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
