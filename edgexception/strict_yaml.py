"""YAML files as plain data with line numbers: what is refused is noted, with its reason and remedy.

What is read is the part of YAML 1.2 on which all readers agree: mappings with text keys, lists,
text, numbers, true/false and null. Refused are anchors and aliases (a kilobyte of them can mean
gigabytes), merge keys, tags, several documents, duplicate keys, numbers that are not finite,
control characters, and every unquoted word that YAML 1.1 and 1.2 read differently (`no`, `010`,
`1:30`, `2026-01-31`). `1e-3` is a number here, as in YAML 1.2.
"""

from __future__ import annotations

import functools
import math
import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgexception.errors import UsageError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_FAULTS = 50

# YAML 1.2 core schema (yaml.org/spec/1.2.2, section 10.3.2), without octal and hexadecimal.
NULL = re.compile(r"~|null|Null|NULL")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# Numbers of YAML 1.2 that stay out, since YAML 1.1 gives them another value or none.
OTHER_NUMBER = re.compile(
    r"0o[0-7]+|0x[0-9a-fA-F]+|[-+]?0[0-9]+([.eE].*)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
MAX_DIGITS = 18


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, and the reason with its remedy."""

    path: KeyPath
    text: str
    line: int | None = None
    """1-based; None is the line of the field, or of the nearest section around it."""
    unread: bool = False
    """The value could not be read and None stands in for it: judging that says nothing new."""


@dataclass(frozen=True)
class Document:
    """A parsed file: plain data, the line of every value in it, and what was refused in it."""

    file: str
    data: object
    lines: Mapping[KeyPath, int]
    faults: tuple[Fault, ...]
    complete: bool
    """Whether the file could be read to its end; if not, `data` is None."""

    def line(self, path: KeyPath) -> int:
        """Return the line of a field, or of the nearest section around one that is not there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Stop(Exception):
    """Nothing after this point can be read sensibly."""


def read_yaml(path: Path) -> Document:
    """Read one YAML file of at most 1 MiB.

    Raises UsageError when there is no such regular file or it is too large. What is wrong inside
    it is noted in the document's faults, so that it can be reported with all other faults.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path}: is not a file; name a YAML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{path}: cannot be read ({reason}); check the name and the rights"
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: is larger than 1 MiB; a file of this kind is a few kilobytes")
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes, file: str) -> Document:
    """Parse the bytes of one YAML file; `file` names it in messages."""
    walk = _Walk()
    value, complete = None, False
    try:
        text = data.decode("utf-8-sig")
        walk.open(text)
        value, complete = walk.document(), True
    except _Stop:
        pass
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        walk.faults.append(Fault((), "is not UTF-8 text; save the file as UTF-8", line))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = (
            f"U+{ord(error.character):04X}"
            if isinstance(error.character, str)
            else f"U+{error.character:04X}"
        )
        walk.faults.append(Fault((), f"the character {character} is not allowed; remove it", line))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, (error.context, error.problem)))
        message = f"is not YAML: {reason}; check the indentation, quotes and brackets here"
        walk.faults.append(Fault((), message, mark.line + 1 if mark else 1))
    except (
        ValueError,
        OverflowError,
    ):  # PyYAML's chr() and int() of an impossible escape or directive
        message = "has an escape or directive with an impossible number; remove it"
        walk.faults.append(Fault((), message, walk.line))
    return Document(file, value, walk.lines, tuple(walk.faults), complete)


@dataclass
class _Walk:
    """Builds plain data from the parser's events. The parser itself does not recurse."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    line: int = 1
    loader: Any = field(init=False)

    def open(self, text: str) -> None:
        self.loader = yaml.SafeLoader(text)

    def next(self) -> Any:
        event = self.loader.get_event()
        self.line = event.start_mark.line + 1
        return event

    def fault(self, path: KeyPath, text: str, event: Any, *, unread: bool = False) -> None:
        self.faults.append(Fault(path, text, event.start_mark.line + 1, unread))
        if len(self.faults) > MAX_FAULTS:
            raise _Stop

    def document(self) -> object:
        self.next()  # stream start
        if isinstance(event := self.next(), yaml.StreamEndEvent):
            self.fault((), "is empty; write the fields of this file", event)
            raise _Stop
        value = self.node(self.next(), ())
        self.next()  # document end
        if not isinstance(event := self.next(), yaml.StreamEndEvent):
            self.fault((), "a second document starts here; keep one document a file", event)
        return value

    def node(self, event: Any, path: KeyPath) -> object:
        self.lines.setdefault(path, event.start_mark.line + 1)
        if isinstance(event, yaml.AliasEvent):
            message = f"the alias *{event.anchor} is not read; write the value itself"
            self.fault(path, message, event, unread=True)
            return None
        self.plain(event, path)
        if isinstance(event, yaml.ScalarEvent):
            try:
                return scalar(event)
            except ValueError as error:
                self.fault(path, str(error), event, unread=True)
                return None
        if len(path) >= MAX_DEPTH:
            self.fault(path, f"is nested deeper than {MAX_DEPTH} levels; no field is", event)
            raise _Stop
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        return self.mapping(path)

    def plain(self, event: Any, path: KeyPath) -> None:
        """Note an anchor or tag; the value itself is read all the same."""
        if event.anchor:
            self.fault(path, f"the anchor &{event.anchor} is not read; remove it", event)
        if event.tag:
            self.fault(path, f"the tag {event.tag} is not read; remove it", event)

    def sequence(self, path: KeyPath) -> list[object]:
        values: list[object] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            values.append(self.node(event, (*path, len(values))))
        return values

    def mapping(self, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self.key(event, path)
            inside = (*path, key)
            if key in values:
                first = self.lines[inside]
                self.fault(inside, f"is already set at line {first}; keep one of the two", event)
                self.node(self.next(), (*path, f"{key} (again)"))
            else:
                self.lines[inside] = event.start_mark.line + 1
                values[key] = self.node(self.next(), inside)
        return values

    def key(self, event: Any, path: KeyPath) -> str:
        """Return a mapping key; one that is not text is noted, and its spelling stands in."""
        if not isinstance(event, yaml.ScalarEvent):
            self.fault(
                path, "a key must be text, not a list, mapping or alias; write `name: value`", event
            )
            raise _Stop
        key: str = event.value
        inside = (*path, key)
        self.plain(event, inside)
        try:
            value = scalar(event)
        except ValueError as error:
            self.fault(inside, f"this key {error}", event, unread=True)
        else:
            if not isinstance(value, str):
                self.fault(
                    inside, "this key is not text; write the name of a field", event, unread=True
                )
        return key


def scalar(event: yaml.ScalarEvent) -> object:
    """Return the value of a scalar; raises ValueError with reason and remedy for a refused one."""
    text: str = event.value
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError("has a line break or control character; write the text on one line")
    if not text:
        if event.style is not None:
            raise ValueError("is an empty text; write a value, or remove the field")
        raise ValueError("has no value; write one ({} for defaults, null for none) or remove it")
    if event.style is not None:
        return text
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    return _number_or_text(text)


def _number_or_text(text: str) -> int | float | str:
    if INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"is a number of more than {MAX_DIGITS} digits; no field takes that")
        return int(text)
    if FLOAT.fullmatch(text):
        if not math.isfinite(number := float(text)):
            raise ValueError("is too large for a number; no field takes that")
        return number
    # Text in YAML 1.2 unless it is in OTHER_NUMBER. What is it in YAML 1.1?
    kind = _yaml11().resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if kind == "merge":
        raise ValueError("merge keys (<<) are not read; write the fields themselves")
    if kind in ("int", "float") or OTHER_NUMBER.fullmatch(text):
        kind = "number"
    if kind != "str":
        remedy = {
            "bool": "write true or false, or quote the text",
            "number": "write a plain, finite decimal number, or quote the text",
        }.get(kind, "quote the text")
        raise ValueError(f"is {quoted(text)}, which YAML readers disagree on; {remedy}")
    return text


@functools.cache
def _yaml11() -> Any:
    """Return PyYAML's reader, whose rules for unquoted words are those of YAML 1.1."""
    return yaml.SafeLoader("")


def quoted(value: object) -> str:
    """Return a value for a message: printable, on one line, at most 60 characters."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else f"'{value}'"
    return text if len(text) <= 60 else text[:57] + "..."
