"""Checkpoints for tests, written without Keras: every layout that Keras 1-3 has used.

The layouts follow the sources of Keras: keras/src/legacy/saving/legacy_h5_format.py and
tf_keras/saving/legacy/hdf5_format.py ("by name"), saving_lib.py of 2.12-2.15 and 3.x ("by class").
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from edgexception.architecture import Architecture
from edgexception.model.xception import Xception

SIDE = 71
NARROW = Architecture(
    stem=(4, 6),
    entry=((8, 8), (10, 10)),
    middle=((10, 10, 10), (10, 10, 10)),
    exit=(10, 12),
    tail=(14, 16),
    head=(5,),
)


class KerasLayer(NamedTuple):
    """One layer as Keras describes and stores it."""

    name: str
    kind: str
    config: dict[str, Any]
    inputs: tuple[str, ...]
    weights: tuple[tuple[str, np.ndarray], ...] = ()


def random_network(architecture: Architecture, seed: int = 0) -> Xception:
    """A network whose every tensor is random, moving statistics included; eval mode."""
    torch.manual_seed(seed)
    network = Xception(architecture).eval()
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif "_bn." in key and value.is_floating_point():
            value.uniform_(-0.5, 1.5)
        elif value.is_floating_point():
            value.mul_(2.0)
    return network


def keras_layers(network: Xception, side: int = SIDE, offset: int = 0) -> list[KerasLayer]:
    """The layers of `network` in Keras's order (by depth); unnamed ones count from `offset`."""
    arch = network.architecture
    state = {key: value.numpy() for key, value in network.state_dict().items()}
    layers = [KerasLayer("input_1", "InputLayer", {"batch_shape": [None, side, side, 3]}, ())]
    counter = offset

    def add(name: str, kind: str, inputs: tuple[str, ...], weights: Any = (), **config: Any) -> str:
        layers.append(KerasLayer(name, kind, config, inputs, tuple(weights)))
        return name

    def norm(name: str, source: str, key: str) -> str:
        roles = ("gamma", "beta", "moving_mean", "moving_variance")
        keys = ("weight", "bias", "running_mean", "running_var")
        weights = [(role, state[f"{key}.{k}"]) for role, k in zip(roles, keys, strict=True)]
        return add(name, "BatchNormalization", (source,), weights, axis=-1, epsilon=arch.bn_epsilon)

    def relu(name: str, source: str) -> str:
        return add(name, "Activation", (source,), activation="relu")

    def separable(name: str, source: str) -> str:
        depthwise = state[f"{name}.depthwise.weight"].transpose(2, 3, 0, 1)
        pointwise = state[f"{name}.pointwise.weight"].transpose(2, 3, 1, 0)
        weights = [("depthwise_kernel", depthwise), ("pointwise_kernel", pointwise)]
        config = {"kernel_size": [3, 3], "strides": [1, 1], "padding": "same", "use_bias": False}
        add(name, "SeparableConv2D", (source,), weights, **config)
        return norm(f"{name}_bn", name, f"{name}_bn")

    at = "input_1"
    for index, stride in ((1, 2), (2, 1)):
        name = f"block1_conv{index}"
        weights = [("kernel", state[f"{name}.weight"].transpose(2, 3, 1, 0))]
        config = {"kernel_size": [3, 3], "strides": [stride] * 2, "padding": "valid"}
        add(name, "Conv2D", (at,), weights, use_bias=False, **config)
        at = relu(f"{name}_act", norm(f"{name}_bn", name, f"{name}_bn"))
    for number, (block, widths, strided) in enumerate(arch.blocks()):
        entered = at
        for index in range(1, len(widths) + 1):
            name = f"{block}_sepconv{index}"
            at = separable(name, at if not number and index == 1 else relu(f"{name}_act", at))
        if strided:
            suffix = f"_{counter}" if counter else ""
            counter += 1
            conv = state[f"{block}_shortcut.weight"].transpose(2, 3, 1, 0)
            config = {"kernel_size": [1, 1], "strides": [2, 2], "padding": "same"}
            entered = add(
                f"conv2d{suffix}",
                "Conv2D",
                (entered,),
                [("kernel", conv)],
                use_bias=False,
                **config,
            )
            config = {"pool_size": [3, 3], "strides": [2, 2], "padding": "same"}
            at = add(f"{block}_pool", "MaxPooling2D", (at,), **config)
            entered = norm(f"batch_normalization{suffix}", entered, f"{block}_shortcut_bn")
        at = add(f"add_{number}", "Add", (at, entered))
    for index in range(1, len(arch.tail) + 1):
        name = f"{arch.tail_name}_sepconv{index}"
        at = relu(f"{name}_act", separable(name, at))
    return layers


def head_layers(network: Xception, source: str) -> list[KerasLayer]:
    """The layers of the head after `source`: pooling, Dense, ReLU, Dropout."""
    head = network.architecture.head
    layers = [KerasLayer("avg_pool", "GlobalAveragePooling2D", {}, (source,))]
    for index in range(len(head)):
        last = index == len(head) - 1
        module = "predictions" if last else f"dense{index + 1}"
        name = "predictions" if last else f"dense_{index}"
        if last and network.architecture.dropout:
            rate = {"rate": network.architecture.dropout}
            layers.append(KerasLayer("dropout", "Dropout", rate, (layers[-1].name,)))
        linear = network.get_submodule(module)
        weights = (
            ("kernel", linear.weight.detach().numpy().T),
            ("bias", linear.bias.detach().numpy()),
        )
        config = {"use_bias": True, "activation": "softmax" if last else "relu"}
        layers.append(KerasLayer(name, "Dense", config, (layers[-1].name,), weights))
    return layers


def model_config(
    layers: list[KerasLayer], *, dialect: int = 3, name: str = "model", nested: Any = None
) -> dict[str, Any]:
    """The config of a Functional model in the dialect of Keras 2 or 3.

    `nested`: (name of a layer, its own config) for a layer that is a model itself.
    """

    def node(sources: tuple[str, ...]) -> list[Any]:
        if not sources:
            return []
        if dialect == 2:
            return [[[source, 0, 0, {}] for source in sources]]
        tensors = [
            {
                "class_name": "__keras_tensor__",
                "config": {"shape": [None], "dtype": "float32", "keras_history": [source, 0, 0]},
            }
            for source in sources
        ]
        args = [tensors] if len(tensors) > 1 else tensors
        return [{"args": args, "kwargs": {}}]

    members = []
    for layer in layers:
        config = {"name": layer.name, **layer.config}
        if dialect == 2 and "batch_shape" in config:
            config["batch_input_shape"] = config.pop("batch_shape")
        entry = {"class_name": layer.kind, "config": config, "name": layer.name}
        if nested is not None and nested[0] == layer.name:
            entry = {**nested[1], "name": layer.name}
        members.append({**entry, "inbound_nodes": node(layer.inputs)})
    ends = [layers[0].name, 0, 0], [layers[-1].name, 0, 0]
    inputs, outputs = ([[end] for end in ends]) if dialect == 2 else ends
    body = {"name": name, "layers": members, "input_layers": inputs, "output_layers": outputs}
    return {"class_name": "Functional", "config": body}


class Layout(NamedTuple):
    """A model as Keras would save it: the outer layers, and those of a nested backbone."""

    outer: list[KerasLayer]
    inner: list[KerasLayer]
    """Empty for a flat model."""
    config: dict[str, Any]


def layout(
    network: Xception, *, nested: bool = False, dialect: int = 3, side: int = SIDE, offset: int = 0
) -> Layout:
    """Describe `network` flat, or with the backbone as a nested model named "xception"."""
    backbone = keras_layers(network, side, offset)
    if not nested:
        head = head_layers(network, backbone[-1].name) if network.architecture.head else []
        layers = backbone + head
        return Layout(layers, [], model_config(layers, dialect=dialect))
    inner = model_config(backbone, dialect=dialect, name="xception")
    outer = [
        KerasLayer("input_2", "InputLayer", {"batch_shape": [None, side, side, 3]}, ()),
        KerasLayer("xception", "Functional", {}, ("input_2",)),
        *head_layers(network, "xception"),
    ]
    config = model_config(outer, dialect=dialect, nested=("xception", inner))
    return Layout(outer, backbone, config)


def write_by_name(
    path: Path, model: Layout, *, keras: int = 2, config: bool = True, optimizer: bool = False
) -> None:
    """Write the layout by name of Keras 1, 2 or 3; without `config` as `save_weights` did."""

    def weight_name(layer: KerasLayer, role: str) -> str:
        if keras == 1:
            old = {"kernel": "W", "bias": "b", "moving_mean": "running_mean"}
            old["moving_variance"] = "running_std"
            return f"{layer.name}_{old.get(role, role)}:0"
        return f"{layer.name}/{role}" + (":0" if keras == 2 else "")

    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if config else file
        group.attrs["layer_names"] = [layer.name.encode() for layer in model.outer]
        group.attrs["keras_version"] = {1: b"1.2.2", 2: b"2.11.0", 3: b"3.15.1"}[keras]
        group.attrs["backend"] = b"tensorflow"
        if config:
            file.attrs["model_config"] = json.dumps(model.config).encode()
        for layer in model.outer:
            below = group.create_group(layer.name)
            inside = model.inner if layer.kind == "Functional" else [layer]
            # Keras stores all trainable weights first, then the moving statistics.
            weights = [(part, role, value) for part in inside for role, value in part.weights]
            weights.sort(key=lambda weight: weight[1].startswith("moving"))
            names = [weight_name(part, role).encode() for part, role, _ in weights]
            chunks = 2 if len(names) > 20 else 1  # As for attributes of more than 64 KiB.
            for chunk, part in enumerate(np.array_split(np.array(names), chunks)):
                below.attrs[f"weight_names{chunk}" if chunks > 1 else "weight_names"] = part
            for name, (_, _, value) in zip(names, weights, strict=True):
                below.create_dataset(name.decode(), data=value)
        if optimizer:
            state = file.create_group("optimizer_weights")
            state.attrs["weight_names"] = [b"adam/iter:0"]
            state.create_dataset("adam/iter:0", data=np.int64(3))


SNAKE = {
    "Conv2D": "conv2d",
    "SeparableConv2D": "separable_conv2d",
    "BatchNormalization": "batch_normalization",
    "MaxPooling2D": "max_pooling2d",
    "GlobalAveragePooling2D": "global_average_pooling2d",
    "InputLayer": "input_layer",
}


def write_by_class(
    target: Path | io.BytesIO,
    model: Layout,
    *,
    top: str = "layers",
    separator: str = "/",
    gaps: bool = False,
    names: bool = True,
    optimizer: bool = True,
) -> None:
    """Write the layout by class.

    `top`: "_layer_checkpoint_dependencies" in Keras 2.12 and 2.13, which also left `gaps` in the
    numbers of layers with weights. `separator`: a backslash on Windows. `names`: Keras >= 3.6.
    """
    with h5py.File(target, "w") as file:

        def container(prefix: str, layers: list[KerasLayer]) -> None:
            used: dict[str, int] = {}
            for layer in layers:
                stem = SNAKE.get(layer.kind, layer.kind.lower())
                count = used.get(stem, 0)
                used[stem] = count + (2 if gaps and layer.weights else 1)
                where = f"{prefix}{top}{separator}{stem}" + (f"_{count}" if count else "")
                variables = file.create_group(where).create_group("vars")
                if names:
                    variables.attrs["name"] = layer.name
                for index, (_, value) in enumerate(layer.weights):
                    variables.create_dataset(str(index), data=value)
                if layer.kind == "Functional":
                    container(where + separator, model.inner)

        container("", model.outer)
        file.create_group("vars")
        if optimizer:
            state = file.create_group("optimizer").create_group("vars")
            state.create_dataset("0", data=np.int64(3))
            state.create_dataset("1", data=np.float32(1e-3))


def write_keras(path: Path, model: Layout, **options: Any) -> None:
    """Write a `.keras` archive."""
    weights = io.BytesIO()
    write_by_class(weights, model, **options)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.3.3"}))
        archive.writestr("config.json", json.dumps(model.config))
        archive.writestr("model.weights.h5", weights.getvalue())


def timm_state(network: Xception, classifier: str = "fc") -> dict[str, torch.Tensor]:
    """The state dict of `network` under timm's names (`last_linear`: Cadene's)."""
    arch = network.architecture
    blocks = list(arch.blocks())
    state: dict[str, torch.Tensor] = {}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        block, _, rest = module.partition("_")
        number = int(block.removeprefix("block")) if block.startswith("block") else 0
        norm = rest.endswith("_bn")
        part = rest.removesuffix("_bn").partition(".")
        if number == 0:
            name = classifier
        elif number == 1:
            name = ("bn" if norm else "conv") + rest[4]
        elif part[0] == "shortcut":
            name = f"block{number - 1}.skip{'bn' if norm else ''}"
        elif number == len(blocks) + 2:
            name = ("bn" if norm else "conv") + str(int(part[0][7:]) + 2)
        else:
            at = 3 * (int(part[0][7:]) - 1) + (0 if number == 2 else 1) + norm
            name = f"block{number - 1}.rep.{at}"
        if part[2]:
            name += ".conv1" if part[2] == "depthwise" else ".pointwise"
        state[f"{name}.{kind}"] = value.clone()
    return state
