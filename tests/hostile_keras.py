"""Keras archives that are bad zip files, or whose graph is no Xception.

Part of `hostile.hostile_checkpoints`.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoints import Layout, write_by_class, write_keras

Case = tuple[str, str, Callable[[Path], Any]]


def archive_cases(model: Layout, chance: random.Random) -> Iterator[Case]:  # noqa: C901, PLR0915
    """`.keras` files that are bad zip archives."""
    weights = io.BytesIO()
    write_by_class(weights, model)
    config, h5 = json.dumps(model.config), weights.getvalue()

    def archive(members: dict[str, Any], *, compression: int = 0, after: Any = None) -> Any:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", compression=compression) as file:
                for name, data in members.items():
                    if data is not None:
                        file.writestr(name, data)
            if after is not None:
                data = bytearray(path.read_bytes())
                after(data)
                path.write_bytes(data)

        return write

    good: dict[str, Any] = {"metadata.json": "{}", "config.json": config, "model.weights.h5": h5}

    def damage(data: bytearray) -> None:
        data[len(data) // 2 + chance.randrange(64)] ^= 0xFF  # Inside the weights: the CRC tells.

    def encrypt(data: bytearray) -> None:
        for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = data.find(magic)
            while at >= 0:
                data[at + offset] |= 1
                at = data.find(magic, at + 4)

    def inflate(data: bytearray) -> None:
        at = data.rfind(b"PK\x01\x02")
        struct.pack_into("<I", data, at + 24, 0xFFFF0000)

    def duplicated(path: Path) -> None:
        archive(good)(path)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("config.jsox", config)
        data = path.read_bytes().replace(b"config.jsox", b"config.json")
        path.write_bytes(data)

    deflated = zipfile.ZIP_DEFLATED
    bomb = {**good, "model.weights.h5": bytes(2**26)}
    yield "zip slip", ".keras", archive({**good, "../../evil.py": "x"})
    yield "zip absolute name", ".keras", archive({**good, "/etc/cron.d/x": "x"})
    yield "zip windows name", ".keras", archive({**good, "..\\..\\evil.py": "x"})
    yield "zip unexpected member", ".keras", archive({**good, "payload.py": "x"})
    yield "zip asset slip", ".keras", archive({**good, "assets/../../evil": "x"})
    yield "zip without weights", ".keras", archive({**good, "model.weights.h5": None})
    yield "zip without config", ".keras", archive({**good, "config.json": None})
    yield "zip with npz weights", ".keras", archive({**good, "model.weights.npz": b"x"})
    yield "zip bomb", ".keras", archive(bomb, compression=deflated)
    yield "zip declared size", ".keras", archive(good, after=inflate)
    yield "zip encrypted", ".keras", archive(good, after=encrypt)
    yield "zip damaged", ".keras", archive(good, after=damage)
    yield "zip lzma garbage", ".keras", archive(bomb, compression=zipfile.ZIP_LZMA)
    yield "zip twice the config", ".keras", duplicated
    yield "zip weights no hdf5", ".keras", archive({**good, "model.weights.h5": b"x" * 999})
    yield "zip weights cut", ".keras", archive({**good, "model.weights.h5": h5[: len(h5) // 2]})
    yield "zip config binary", ".keras", archive({**good, "config.json": b"\xff\x00"})
    yield "zip metadata no json", ".keras", archive({**good, "metadata.json": b"{"})
    for text in ("null", "[]", "3", "{}", '{"class_name": "Functional"}', "[" * 90_000, "NaN"):
        name = f"zip config {text[:10].replace('/', '')}".replace('"', "")
        yield name, ".keras", archive({**good, "config.json": text})
    yield "an empty zip", ".keras", lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18))


def graph_cases(model: Layout, chance: random.Random) -> Iterator[Case]:  # noqa: C901
    """`.keras` files whose graph is no Xception, loops, or hides code."""

    def changed(change: Callable[[dict[str, Any]], Any]) -> Any:
        def write(path: Path) -> None:
            config = json.loads(json.dumps(model.config))
            change(config)
            write_keras(path, model._replace(config=config))

        return write

    def layer(name: str, **update: Any) -> Any:
        def change(config: dict[str, Any]) -> None:
            (entry,) = [entry for entry in config["config"]["layers"] if entry["name"] == name]
            kind = update.get("class_name")
            if kind:
                entry["class_name"] = kind
            entry["config"].update({k: v for k, v in update.items() if k != "class_name"})

        return changed(change)

    def wired(name: str, *sources: str) -> Any:
        def change(config: dict[str, Any]) -> None:
            (entry,) = [entry for entry in config["config"]["layers"] if entry["name"] == name]
            entry["inbound_nodes"] = [[[source, 0, 0, {}] for source in sources]]

        return changed(change)

    def body(**update: Any) -> Any:
        return changed(lambda config: config["config"].update(update))

    def nested(config: dict[str, Any]) -> None:
        inner = config["config"]["layers"]
        for _ in range(40):
            inner = [{"class_name": "Sequential", "name": "s", "config": {"layers": inner}}]
        config["config"]["layers"] = inner

    def rescalings(config: dict[str, Any]) -> None:
        for name, sources in (("r1", ("input_1", "r2")), ("r2", ("r1",))):
            config["config"]["layers"].append(
                {
                    "class_name": "Rescaling",
                    "config": {"name": name, "scale": 0.5, "offset": 0.0},
                    "name": name,
                    "inbound_nodes": [[[source, 0, 0, {}] for source in sources]],
                }
            )
        config["config"]["layers"][1]["inbound_nodes"] = []

    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None}}
    act, conv, norm = "block1_conv1_act", "block1_conv1", "block1_conv2_bn"
    cases = {
        "lambda": layer(act, class_name="Lambda", function=code),
        "custom object": layer(act, class_name="my_package>Evil"),
        "tf operation": layer(act, class_name="TFOpLambda", function="io.read_file"),
        "flatten": layer("avg_pool", class_name="Flatten"),
        "gelu": layer(act, activation="gelu"),
        "activation object": layer(act, activation=code),
        "relu6": layer(act, class_name="ReLU", max_value=6.0),
        "leaky": layer(act, class_name="ReLU", negative_slope=0.1),
        "stride": layer(conv, strides=[1, 1]),
        "same padding": layer(conv, padding="same"),
        "bias": layer(conv, use_bias=True),
        "dilated": layer(conv, dilation_rate=[2, 2]),
        "groups": layer("block1_conv2", groups=2),
        "channels first": layer(conv, data_format="channels_first"),
        "multiplier": layer("block2_sepconv1", depth_multiplier=2),
        "pool": layer("block2_pool", pool_size=[2, 2]),
        "axis": layer(norm, axis=1),
        "no scale": layer(norm, scale=False),
        "epsilon differs": layer(norm, epsilon=chance.uniform(0.1, 0.9)),
        "epsilon text": layer(norm, epsilon="1e-3"),
        "epsilon zero": layer(norm, epsilon=0.0),
        "four channels": layer("input_1", batch_shape=[None, 71, 71, 4]),
        "size zero": layer("input_1", batch_shape=[None, 0, 71, 3]),
        "size huge": layer("input_1", batch_shape=[None, 10**12, 71, 3]),
        "size text": layer("input_1", batch_shape="big"),
        "sigmoid": layer("predictions", activation="sigmoid"),
        "keepdims": layer("avg_pool", keepdims=True),
        "unknown source": wired(act, "nobody"),
        "self loop": wired(act, act),
        "loop in the head": wired("predictions", "avg_pool", "predictions"),
        "loop of rescalings": changed(rescalings),
        "long loop": wired("block1_conv2", "block3_pool"),
        "shortcut elsewhere": wired("conv2d_1", "block2_pool"),
        "three branches": wired("add_2", "add_1", "block4_sepconv2_bn", "block3_pool"),
        "disconnected": wired("predictions", "input_1"),
        "two outputs": body(output_layers=[["add_0", 0, 0], ["predictions", 0, 0]]),
        "early output": body(output_layers=["add_1", 0, 0]),
        "no outputs": body(output_layers=[]),
        "unknown output": body(output_layers=["nobody", 0, 0]),
        "layers a text": body(layers="none"),
        "layers of numbers": body(layers=[1, 2, 3]),
        "no layers": body(layers=[]),
        "too many layers": changed(
            lambda c: c["config"].update(layers=c["config"]["layers"] * 200)
        ),
        "a layer twice": changed(lambda c: c["config"]["layers"].append(c["config"]["layers"][3])),
        "a layer less": changed(lambda c: c["config"]["layers"].pop(chance.randint(2, 40))),
        "subclassed": changed(lambda c: c.update(class_name="MyXception")),
        "nested 40 times": changed(nested),
        "trained at inference": changed(
            lambda c: c["config"]["layers"][2].update(
                inbound_nodes=[[[conv, 0, 0, {"training": True}]]]
            )
        ),
    }
    for name, write in cases.items():
        yield f"graph {name}", ".keras", write
