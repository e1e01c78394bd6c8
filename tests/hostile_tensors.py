"""Torch and safetensors files with code, lies and damaged tensors.

Part of `hostile.hostile_checkpoints`.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

Case = tuple[str, str, Callable[[Path], Any]]


class _Payload:
    """A pickle that would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path.parent / 'PWNED'}",)


def pickle_cases(state: dict[str, torch.Tensor], chance: random.Random) -> Iterator[Case]:  # noqa: C901
    """`.pth` files: code, other objects, and state dicts with one tensor changed."""

    def saved(change: Callable[[dict[str, Any]], Any], *, new: bool = True) -> Any:
        def write(path: Path) -> None:
            content: Any = dict(state)
            changed = change(content)
            content = content if changed is None else changed
            torch.save(content, path, _use_new_zipfile_serialization=new)

        return write

    def code(*, new: bool, place: str | None) -> Any:
        def write(path: Path) -> None:
            content: Any = {**state, place: _Payload(path)} if place else _Payload(path)
            torch.save(content, path, _use_new_zipfile_serialization=new)

        return write

    def repacked(path: Path) -> None:
        torch.save(state, path)
        old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))

    def shrunk(path: Path) -> None:
        torch.save(state, path)
        old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                new.writestr(info.filename, data[:4] if "/data/" in info.filename else data)

    key = chance.choice([key for key in state if key.endswith("weight") and "block" in key])
    variance = chance.choice([key for key in state if key.endswith("running_var")])
    wide = torch.zeros(1).expand(2**20, 2**20, 3, 3)
    for new in (True, False):
        form = "zip" if new else "stream"
        yield f"{form} pickle is code", ".pth", code(new=new, place=None)
        yield f"{form} pickle holds code", ".pth", code(new=new, place="extra")
        yield (
            f"{form} pickle is a module",
            ".pth",
            saved(lambda _: torch.nn.Conv2d(3, 3, 3), new=new),
        )
        yield f"{form} pickle is a list", ".pth", saved(lambda s: list(s.values()), new=new)
        yield f"{form} pickle is a tensor", ".pth", saved(lambda s: s[key], new=new)
        yield f"{form} pickle shape bomb", ".pth", saved(lambda s: s.update({key: wide}), new=new)
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "is empty": lambda s: {},
        "of numbers": lambda s: {"conv1.weight": 3},
        "of another network": lambda s: {"layer1.0.conv1.weight": torch.zeros(3)},
        "integers": lambda s: s.update({key: s[key].to(torch.int8)}),
        "complex": lambda s: s.update({key: s[key].to(torch.complex64)}),
        "sparse": lambda s: s.update({key: s[key].to_sparse()}),
        "transposed": lambda s: s.update({"fc.weight": s["fc.weight"].T}),
        "one axis less": lambda s: s.update({"conv1.weight": s["conv1.weight"].flatten(1)}),
        "nan": lambda s: s.update({key: s[key] * float("nan")}),
        "inf": lambda s: s.update({key: s[key].double() * 1e300}),
        "negative variance": lambda s: s.update({variance: -s[variance]}),
        "missing": lambda s: s.__delitem__(key),
        "extra": lambda s: s.update({"extra.weight": torch.zeros(3)}),
        "renamed": lambda s: s.update({f"x{key}": s.pop(key)}),
        "two heads": lambda s: s.update({"last_linear.weight": s["fc.weight"]}),
        "a block less": lambda s: {k: v for k, v in s.items() if not k.startswith("block2.")},
        "numbers as names": lambda s: s.update({3: torch.zeros(3)}),
    }
    for name, change in changes.items():
        yield f"pickle {name}", ".pth", saved(change)
    yield "pickle compressed", ".pth", repacked
    yield "pickle without values", ".pth", shrunk
    yield "pickle opcodes", ".pth", lambda path: path.write_bytes(b"\x80\x02" + b"((((" * 999)
    yield "pickle memo", ".pth", lambda path: path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")


def safetensors_cases(state: dict[str, Any], network: Any, chance: random.Random) -> Iterator[Case]:
    """`.safetensors`: lying headers, timm tensors changed, our own metadata changed."""

    def raw(header: Any, data: bytes = b"", length: int | None = None) -> Any:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = struct.pack("<Q", len(text) if length is None else length)
        return lambda path: path.write_bytes(size + text + data)

    def one(**update: Any) -> dict[str, Any]:
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **update}
        return {"conv1.weight": entry}

    def timm(**update: Any) -> Any:
        return lambda path: path.write_bytes(safetensors_bytes({**state, **update}))

    own = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    good = {
        "version": 1,
        "architecture": network.architecture.model_dump(mode="json"),
        "classes": list("abcde"),
        "preprocess": {"input_size": [71, 71]},
        "source": {},
    }

    def ours(tensors: Any = None, metadata: Any = None, **update: Any) -> Any:
        text = json.dumps({**good, **update}) if metadata is None else metadata
        tensors = {**own, **(tensors or {})}
        data = safetensors_bytes(tensors, metadata={"edgexception": text})
        return lambda path: path.write_bytes(data)

    def arch(**update: Any) -> Any:
        return ours(architecture={**good["architecture"], **update})  # type: ignore[dict-item]

    key = chance.choice([key for key in own if key.endswith("weight")])
    cases = {
        "header too long": raw(b"{}", length=2**62),
        "header beyond the file": raw(b"{" + b" " * 50, length=4096),
        "header no json": raw(b"{nonsense}" * 9),
        "header nested": raw(b'{"a":' + b"[" * 50_000),
        "offsets beyond": raw(one(data_offsets=[0, 2**40]), bytes(16)),
        "offsets backwards": raw(one(data_offsets=[16, 0]), bytes(16)),
        "shape bomb": raw(one(shape=[2**31, 2**31]), bytes(16)),
        "shape overflow": raw(one(shape=[2**40, 2**40, 2**40]), bytes(16)),
        "shape negative": raw(one(shape=[-4]), bytes(16)),
        "unknown type": raw(one(dtype="Q77"), bytes(16)),
        "one tensor": raw(one(), bytes(16)),
        "no tensors": raw({}),
        "trailing bytes": raw(one(), bytes(99)),
        "overlap": raw({**one(), "b": one()["conv1.weight"]}, bytes(16)),
        "timm nan": timm(**{"fc.bias": torch.full((5,), torch.nan)}),
        "timm integers": timm(**{"fc.bias": torch.zeros(5, dtype=torch.int32)}),
        "timm extra": timm(extra=torch.zeros(3)),
        "own metadata no json": ours(metadata="{"),
        "own metadata nested": ours(metadata="[" * 60_000),
        "own version": ours(version=2),
        "own extra field": ours(hook="os.system"),
        "own field missing": ours(metadata=json.dumps({"version": 1})),
        "own no architecture": ours(architecture=None),
        "own unknown padding": arch(padding="reflect"),
        "own wide": arch(stem=[4, 10**9]),
        "own negative": arch(tail=[-1]),
        "own other widths": arch(tail=[14, 17]),
        "own endless": arch(middle=[[10]] * 10_000),
        "own epsilon": arch(bn_epsilon=0),
        "own class count": ours(classes=["a", "b"]),
        "own class numbers": ours(classes=[1, 2, 3, 4, 5]),
        "own size": ours(preprocess={"input_size": [0, 10**9]}),
        "own nan": ours({key: own[key] * float("nan")}),
        "own extra tensor": ours({"evil": torch.zeros(2)}),
        "own integers": ours({key: own[key].to(torch.int64)}),
        "own shape": ours({key: own[key][:1]}),
    }
    for name, write in cases.items():
        yield f"safetensors {name}", ".safetensors", write
