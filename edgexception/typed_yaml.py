"""Plain data as a frozen model, with every fault named in the words of the file it came from."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgexception.errors import UsageError
from edgexception.strict_yaml import MAX_FAULTS, Document, Fault, KeyPath, quoted

Model = TypeVar("Model", bound=BaseModel)


def validate(data: object, model: type[Model]) -> tuple[Model | None, list[Fault]]:
    """Return the model that the data describes, or None and everything that is wrong with it.

    Strict: a number in quotes is text, 1.0 is not a whole number.
    """
    try:
        return model.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        schema = model.model_json_schema()
        return None, [_fault(details, schema) for details in error.errors(include_url=False)]


def report(document: Document, faults: Iterable[Fault]) -> UsageError:
    """Return one error, a line `file:line: field: reason; remedy` for each fault, in file order.

    A fault at or below a value that could not be read says nothing new and is left out.
    """
    unread = {fault.path for fault in document.faults if fault.unread}
    news = [f for f in faults if not any(f.path[:n] in unread for n in range(len(f.path) + 1))]
    rows = {
        (fault.line or document.line(fault.path), field_name(fault.path), fault.text)
        for fault in (*document.faults, *news)
    }
    lines = [
        f"{document.file}:{line}: {name + ': ' if name else ''}{text}"
        for line, name, text in sorted(rows)
    ]
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [
            f"{document.file}: and more; only the first {MAX_FAULTS} faults are shown"
        ]
    return UsageError("\n".join(lines))


def field_name(path: KeyPath) -> str:
    """Return a path as it is written in messages: `targets[0].runtimes`."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w-]{1,60}", part) else quoted(part)
            name += f".{shown}" if name else shown
    return name


def closest(word: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown word: the likely one first, then all that are known."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    listed = ", ".join(known[:40])
    return f"did you mean {near[0]}? (known: {listed})" if near else f"known: {listed}"


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "path": "a path as text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "a mapping of `key: value` lines",
    "model": "a mapping of `key: value` lines",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def _fault(details: ErrorDetails, schema: dict[str, Any]) -> Fault:
    """Say one of pydantic's errors in the words of the file's reader."""
    path, node = _locate(details["loc"], schema)
    kind, context = details["type"], details.get("ctx", {})
    name = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        text = f"is not a known field; {closest(name, node.get('properties', ()))}"
    elif kind == "missing":
        text = f"is missing; add `{name}:` here"
    elif kind.startswith("union_tag"):
        union = node["discriminator"]
        path = (*path, union["propertyName"])
        text = _union_fault(context.get("tag"), union)
    elif kind == "value_error":
        text = str(context["error"])
    else:
        text = _value_fault(kind, details["input"], context) or details["msg"]
    return Fault(path, text)


def _union_fault(tag: object, union: dict[str, Any]) -> str:
    known = list(union["mapping"])
    if tag is None:
        return f"is missing; add `{union['propertyName']}:` with one of: {', '.join(known)}"
    return f"is {quoted(tag)}, which is not known; {closest(str(tag), known)}"


def _value_fault(kind: str, value: object, context: dict[str, Any]) -> str | None:
    given = quoted(value)
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"is {given}; write a number {words} {context[key]}"
    if kind == "literal_error":
        return f"is {given}; write {context['expected']}"
    if kind.endswith(("too_short", "too_long")):
        words = "at least" if kind.endswith("too_short") else "at most"
        bound = context.get("min_length", context.get("max_length"))
        what = "characters" if isinstance(value, str) else "entries"
        count = context.get("actual_length", len(str(value)))  # not told of a text
        return f"has {count} {what}; write {words} {bound}"
    if kind == "string_pattern_mismatch":
        return f"is {given}; write text that matches {context['pattern']}"
    wanted = _WANTED.get(kind.partition("_")[0])
    if wanted is None:
        return None
    return f"is {'the text ' if isinstance(value, str) else ''}{given}; write {wanted}"


def field_path(location: KeyPath, schema: dict[str, Any]) -> KeyPath:
    """Return a pydantic location as the path of fields, without the tags of tagged unions."""
    return _locate(location, schema)[0]


def _locate(location: KeyPath, schema: dict[str, Any]) -> tuple[KeyPath, dict[str, Any]]:
    """Return the file's path of a pydantic location and the schema of the section around it.

    A location also has the tags of tagged unions in it, which the file has not: for the source
    `{kind: folder}` it is `source.folder.path`. Only the schema tells such a tag from a key.
    For an error of a union itself the schema is the union's.
    """
    path: list[str | int] = []
    node = schema
    for index, part in enumerate(location):
        node = _resolve(node, schema)
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
            continue
        path.append(part)
        inner = _inside(node, part)
        if inner is None:
            if index < len(location) - 1:
                path.extend(location[index + 1 :])
            return tuple(path), node
        node = inner
    return tuple(path), _resolve(node, schema)


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while True:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        elif "anyOf" in node:  # `X | None`
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        else:
            return node


def _inside(node: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    if isinstance(part, str):
        found = node.get("properties", {}).get(part, node.get("additionalProperties"))
    else:
        prefix = node.get("prefixItems", ())
        found = prefix[part] if part < len(prefix) else node.get("items")
    return found if isinstance(found, dict) else None
