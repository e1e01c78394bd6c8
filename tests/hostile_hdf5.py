"""Keras's HDF5 layouts with one dataset, link or attribute replaced.

Part of `hostile.hostile_checkpoints`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from checkpoints import Layout, write_by_class, write_by_name

Case = tuple[str, str, Callable[[Path], Any]]


def hdf5_cases(model: Layout, chance: random.Random) -> Iterator[Case]:  # noqa: C901 - a list of cases
    """The layouts by name and by class with one dataset or attribute replaced."""

    def replaced(change: Callable[[h5py.Group, str, np.ndarray], Any], at: str = "") -> Any:
        def write(path: Path) -> None:
            write_by_name(path, model)
            with h5py.File(path, "a") as file:
                names: list[str] = []
                file["model_weights"].visititems(
                    lambda name, item: (
                        names.append(name) if isinstance(item, h5py.Dataset) else None
                    )
                )
                name = chance.choice([name for name in names if at in name])
                parent = file["model_weights"][name].parent
                value, leaf = file["model_weights"][name][...], name.rpartition("/")[2]
                del parent[leaf]
                change(parent, leaf, value)

        return write

    def put(convert: Callable[[np.ndarray], Any]) -> Any:
        return lambda group, name, value: group.create_dataset(name, data=convert(value))

    def poisoned(number: float) -> Any:
        def convert(value: np.ndarray) -> np.ndarray:
            value.flat[chance.randrange(value.size)] = number
            return value

        return put(convert)

    def soft(group: h5py.Group, name: str, value: np.ndarray) -> None:
        group.create_dataset("elsewhere", data=value)
        group[name] = h5py.SoftLink(f"{group.name}/elsewhere")

    def external(group: h5py.Group, name: str, _: np.ndarray) -> None:
        group[name] = h5py.ExternalLink("/etc/passwd", "/x")

    def virtual(group: h5py.Group, name: str, value: np.ndarray) -> None:
        plan = h5py.VirtualLayout(shape=value.shape, dtype="f4")
        plan[...] = h5py.VirtualSource("other.h5", "x", shape=value.shape)
        group.create_virtual_dataset(name, plan)

    def outside(group: h5py.Group, name: str, value: np.ndarray) -> None:
        group.create_dataset(
            name, value.shape, "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
        )

    def bomb(group: h5py.Group, name: str, _: np.ndarray) -> None:
        group.create_dataset(name, (2**20, 2**20, 3, 3), "f4", chunks=(64, 64, 1, 1), fillvalue=1)

    def squeezed(group: h5py.Group, name: str, value: np.ndarray) -> None:
        group.create_dataset(name, data=value, compression="gzip")

    def unwritten(group: h5py.Group, name: str, value: np.ndarray) -> None:
        group.create_dataset(name, value.shape, "f4")

    def loop(group: h5py.Group, name: str, _: np.ndarray) -> None:
        group[name] = group.file["model_weights"]

    def twin(group: h5py.Group, name: str, value: np.ndarray) -> None:
        group.create_dataset(name, data=value)
        group[f"{name}x"] = group[name]

    def named(group: h5py.Group, name: str, _: np.ndarray) -> None:
        group[name] = np.dtype("f4")

    changes: dict[str, Any] = {
        "soft link": soft,
        "external link": external,
        "virtual dataset": virtual,
        "external storage": outside,
        "chunked shape bomb": bomb,
        "compressed": squeezed,
        "no values": unwritten,
        "hard link loop": loop,
        "two names": twin,
        "a type instead": named,
        "a group instead": lambda group, name, _: group.create_group(name),
        "missing": lambda *_: None,
        "renamed": lambda group, name, value: group.create_dataset(f"{name}2", data=value),
        "integers": put(lambda value: value.astype("i4")),
        "bytes": put(lambda value: value.astype("u1")),
        "complex": put(lambda value: value.astype("c8")),
        "booleans": put(lambda value: value > 0),
        "long double": put(lambda value: value.astype("longdouble")),
        "strings": put(lambda value: value.astype("S9")),
        "opaque": put(lambda value: value.astype("f2").view("V2")),
        "records": put(lambda value: np.zeros(value.shape, [("a", "f4"), ("b", "f4")])),
        "scalar": put(lambda value: np.float32(1)),
        "null": put(lambda value: h5py.Empty("f4")),
        "one axis more": put(lambda value: value[None]),
        "flattened": put(lambda value: np.append(value.ravel(), np.float32(0))),
        "no channels": put(lambda value: value[..., :0]),
        "nan": poisoned(np.nan),
        "inf": poisoned(-np.inf),
    }
    for name, change in changes.items():
        yield f"hdf5 {name}", ".h5", replaced(change)
    yield "hdf5 beyond float32", ".h5", replaced(put(lambda value: value.astype("f8") + 1e60))
    yield "hdf5 negative variance", ".h5", replaced(put(lambda v: v - 9), "moving_variance")
    yield (
        "hdf5 swapped depthwise",
        ".h5",
        replaced(put(lambda value: value.transpose(0, 1, 3, 2)), "depthwise_kernel"),
    )
    yield (
        "hdf5 swapped pointwise",
        ".h5",
        replaced(put(lambda value: value.transpose(2, 3, 0, 1)), "pointwise_kernel"),
    )
    yield (
        "hdf5 wide stem",
        ".h5",
        replaced(put(lambda value: np.zeros((3, 3, 3, 9000), "f4")), "block1_conv1/kernel"),
    )
    yield from _hdf5_attributes(model)
    yield from _hdf5_by_class(model)


def _hdf5_attributes(model: Layout) -> Iterator[Case]:
    def changed(change: Callable[[h5py.File], Any]) -> Any:
        def write(path: Path) -> None:
            write_by_name(path, model)
            with h5py.File(path, "a") as file:
                change(file)

        return write

    def attribute(name: str, value: Any, group: str = "/") -> Any:
        return changed(lambda file: file[group].attrs.__setitem__(name, value))

    def many(file: h5py.File) -> None:
        for index in range(20_100):
            file.create_group(f"model_weights/g{index}")

    def deep(file: h5py.File) -> None:
        file.create_group("model_weights/" + "/".join("a" * 40))

    layers = "model_weights"
    yield "hdf5 layer names are numbers", ".h5", attribute("layer_names", [1, 2], layers)
    yield "hdf5 unknown layer name", ".h5", attribute("layer_names", [b"nobody"], layers)
    yield "hdf5 layer names leave the file", ".h5", attribute("layer_names", [b"../.."], layers)
    yield "hdf5 no utf-8", ".h5", attribute("layer_names", np.array([b"\xff\xfe"]), layers)
    yield "hdf5 config no json", ".h5", attribute("model_config", b"{'a': __import__('os')}")
    yield "hdf5 config nested deep", ".h5", attribute("model_config", b"[" * 60_000)
    yield "hdf5 config a number", ".h5", attribute("model_config", 3)
    yield (
        "hdf5 twice the same layer",
        ".h5",
        attribute("layer_names", [layer.name.encode() for layer in model.outer] * 2, layers),
    )
    yield "hdf5 too many groups", ".h5", changed(many)
    yield "hdf5 too deep", ".h5", changed(deep)
    yield (
        "hdf5 extra tensor",
        ".h5",
        changed(lambda file: file[layers].create_dataset("extra", data=np.zeros(3, "f4"))),
    )


def _hdf5_by_class(model: Layout) -> Iterator[Case]:
    def changed(change: Callable[[h5py.Group], Any]) -> Any:
        def write(path: Path) -> None:
            write_by_class(path, model)
            with h5py.File(path, "a") as file:
                inner = file["layers"]
                change(inner["functional/layers"] if model.inner else inner)

        return write

    def swapped(group: h5py.Group) -> None:
        group.move("separable_conv2d", "x")
        group.move("separable_conv2d_2", "separable_conv2d")
        group.move("x", "separable_conv2d_2")
        for index, name in ((0, "block2_sepconv1"), (2, "block3_sepconv1")):
            where = f"separable_conv2d{f'_{index}' if index else ''}/vars"
            group[where].attrs["name"] = name

    yield "weights without a layer", ".h5", changed(lambda g: g.__delitem__("conv2d_1"))
    yield "weights with a layer more", ".h5", changed(lambda g: g.copy("conv2d", "conv2d_99"))
    yield (
        "weights without a tensor",
        ".h5",
        changed(lambda g: g["batch_normalization_3/vars"].__delitem__("2")),
    )
    yield (
        "weights with a tensor more",
        ".h5",
        changed(lambda g: g["conv2d/vars"].create_dataset("1", data=np.zeros(4, "f4"))),
    )
    yield (
        "weights of another class",
        ".h5",
        changed(lambda g: g.create_dataset("depthwise_conv2d/vars/0", data=np.zeros(4, "f4"))),
    )
    yield "weights in another order", ".h5", changed(swapped)
