"""Generators of broken and hostile recipes: every one is refused with a line for each fault."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import yaml
from recipe_texts import GOOD


def hostile_recipes(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (what is wrong, the file's bytes). The seed chooses bytes and values."""
    chance = random.Random(seed)
    for what, text in _texts(chance):
        yield what, text.encode() if isinstance(text, str) else text
    for what, data in _data(chance):
        yield what, yaml.safe_dump(data, sort_keys=False).encode()


def _texts(chance: random.Random) -> Iterator[tuple[str, str | bytes]]:
    yield "empty", ""
    yield "only a comment", "# nothing\n"
    yield "a list", "- name: shoes\n"
    yield "a number", "42\n"
    yield "two documents", f"{GOOD}---\n{GOOD}"
    yield "a tab", GOOD.replace("  kind", "\tkind", 1)
    yield "an open bracket", GOOD.replace("[1, 8]", "[1, 8")
    yield "an open quote", GOOD.replace("shoes", '"shoes')
    yield "a key twice", GOOD + "name: boots\n"
    yield "a Python object", GOOD.replace("shoes", '!!python/object/apply:os.system ["echo"]')
    yield "an unknown tag", GOOD.replace("shoes", "!secret shoes")
    yield "an anchor and alias", GOOD.replace("shoes", "&a shoes") + "colour: *a\n"
    laughs = "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9))
    yield "billion laughs", f"l0: &l0 [x]\n{laughs}"
    yield "a merge key", GOOD + "<<: {name: boots}\n"
    yield "deep nesting", "a: " + "[" * 5000
    yield "deep flow nesting", "a: " + "[" * 900 + "]" * 900
    yield "a null byte", GOOD.replace("shoes", "sh\0oes")
    yield "control characters", GOOD.replace("shoes", "sh\x1b[31moes")
    yield "UTF-16", GOOD.encode("utf-16")
    yield "latin-1", GOOD.replace("shoes", "schön").encode("latin-1")
    yield "random bytes", chance.randbytes(500)
    yield "a checkpoint", b"\x89HDF\r\n\x1a\n" + chance.randbytes(200)
    yield "an endless file", "#" * (8 << 20)
    yield "an endless number", GOOD.replace("64", "9" * 5000)
    yield "a huge float", GOOD.replace("1e-2", "1e999")
    yield "a word for a number", GOOD.replace("64", "yes")
    yield "an octal number", GOOD.replace("64", "0o100")
    yield "a sexagesimal number", GOOD.replace("64", "1:04")
    cut = chance.randrange(len(GOOD) // 3, 2 * len(GOOD) // 3)
    yield "cut within a word", GOOD[:cut].rstrip() + " {["


def _data(chance: random.Random) -> Iterator[tuple[str, Any]]:
    good = yaml.safe_load(GOOD)
    for path in _places(good):
        label = ".".join(map(str, path))
        old = _at(good, path)
        if isinstance(old, dict | list):
            value = chance.choice([-1, "text", True, 2.5])
        elif isinstance(old, str):
            value = chance.choice([{"a": 1}, [[1]], -1, 3.5, [], True])
        else:
            value = chance.choice([{"a": 1}, [[1]], -1, "text", [], True])
        yield f"{label} is {value!r}", _with(good, path, value)
        if isinstance(old, dict):
            yield f"{label} has an unknown field", _with(good, (*path, "colour"), "red")
    for name in ("name", "model", "calibration", "quantize", "targets"):
        yield f"no {name}", {key: value for key, value in good.items() if key != name}


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in items:
        yield (*path, key)
        if isinstance(inside, dict | list):
            yield from _places(inside, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with one place changed."""
    if not path:
        return new
    copy = value.copy()
    if isinstance(copy, dict):
        copy[path[0]] = _with(value.get(path[0]), path[1:], new)
    else:
        copy[path[0]] = _with(value[path[0]], path[1:], new)
    return copy
