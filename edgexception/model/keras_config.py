"""A Keras model's config.json as a flat graph of layers, for Keras 2 and 3, nested or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgexception.model.tensors import printable, refuse

LayerPath = tuple[str, ...]
"""Names from the outermost model down to the layer; () is the model itself."""

CONTAINERS = frozenset({"Functional", "Model", "Sequential"})
# Layers that compute nothing at inference.
IDENTITIES = frozenset(
    {"Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout"}
    | {"ActivityRegularization", "RandomFlip", "RandomRotation", "RandomZoom"}
    | {"RandomTranslation", "RandomContrast", "RandomBrightness"}
)
MOST_LAYERS = 5_000
MOST_NESTING = 8


@dataclass(frozen=True)
class Layer:
    """One layer of the config; `inputs` still name layers beside it."""

    path: LayerPath
    kind: str
    """Keras's class name."""
    config: dict[str, Any]
    inputs: tuple[LayerPath, ...]
    output: LayerPath | None = None
    """Of a nested model: the layer inside whose output it returns."""
    children: tuple[LayerPath, ...] = ()
    """Of a nested model: its layers in the order of the config."""

    @property
    def name(self) -> str:
        """The layer's path as Keras's users write it."""
        return printable("/".join(self.path) or "the model")


@dataclass(frozen=True)
class KerasGraph:
    """The layers of a model by path, with nested models resolved on demand."""

    file: Path
    layers: dict[LayerPath, Layer]

    def resolved(self, path: LayerPath) -> LayerPath:
        """Return the plain layer that `path` stands for.

        A nested model stands for the layer it returns, its input layer for what feeds the model.
        """
        for _ in range(len(self.layers) + 1):
            layer = self.layers.get(path)
            if layer is None:
                name = printable("/".join(path))
                raise refuse(self.file, f"its config refers to an unknown layer '{name}'")
            if layer.output is not None:
                path = layer.output
            elif layer.kind == "InputLayer" and len(path) > 1:
                feeds = self.layers[path[:-1]].inputs
                if not feeds:
                    return path
                if len(feeds) != 1:
                    raise refuse(self.file, f"the nested model '{layer.name}' has several inputs")
                path = feeds[0]
            else:
                return path
        raise refuse(self.file, "its config describes a loop of layers")

    def plain(self) -> dict[LayerPath, tuple[LayerPath, ...]]:
        """Return the resolved inputs of every layer that computes something."""
        return {
            path: tuple(self.resolved(source) for source in layer.inputs)
            for path, layer in self.layers.items()
            if layer.output is None and self.resolved(path) == path
        }


def parse(file: Path, config: object) -> KerasGraph:
    """Parse the serialized model (`class_name`, `config`) of a Keras file.

    Raises `BadArtifact` for what is no Functional or Sequential model.
    """
    layers: dict[LayerPath, Layer] = {}
    _model(file, _mapping(file, config, "the model config"), (), (), layers)
    return KerasGraph(file, layers)


def _mapping(file: Path, value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(file, f"{what} is no JSON object; the config is damaged")
    return value


def _model(
    file: Path,
    entry: dict[str, Any],
    path: LayerPath,
    inputs: tuple[LayerPath, ...],
    layers: dict[LayerPath, Layer],
) -> None:
    kind = entry.get("class_name")
    where = f"'{printable('/'.join(path))}'" if path else "its model"
    if kind not in CONTAINERS:
        raise refuse(
            file,
            f"{where} is of the class '{printable(kind)}'; only Functional and Sequential models "
            "describe their graph. Rebuild it as one of those and save that",
        )
    if len(path) > MOST_NESTING:
        raise refuse(file, f"{where} is nested more than {MOST_NESTING} models deep")
    config = entry.get("config")
    # Keras 2.2 and older wrote a Sequential's config as the list itself.
    body = {"layers": config} if isinstance(config, list) else _mapping(file, config, where)
    members = body.get("layers")
    if not isinstance(members, list) or not members:
        raise refuse(file, f"{where} has no list of layers; the config is damaged")
    if len(layers) + len(members) > MOST_LAYERS:
        raise refuse(file, f"its config has more than {MOST_LAYERS} layers; no Xception has")
    layers[path] = Layer(path, str(kind), body, inputs, output=path)  # Reserves the place.
    entries = [_mapping(file, member, f"a layer of {where}") for member in members]
    names = [_name(file, member, where) for member in entries]
    if kind == "Sequential":
        children, output = _sequential(file, entries, names, path, layers)
    else:
        children, output = _functional(file, entries, names, path, layers)
        output = (*path, *_single(file, body.get("output_layers"), where))
    layers[path] = Layer(path, str(kind), body, inputs, output=output, children=children)


def _name(file: Path, entry: dict[str, Any], where: str) -> str:
    config = entry.get("config")
    name = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
    if not isinstance(name, str) or not name:
        raise refuse(file, f"a layer of {where} has no name; the config is damaged")
    return name


def _add(
    file: Path,
    entry: dict[str, Any],
    path: LayerPath,
    inputs: tuple[LayerPath, ...],
    layers: dict[LayerPath, Layer],
) -> None:
    if path in layers:
        raise refuse(file, f"two layers are named '{printable('/'.join(path))}'")
    kind = entry.get("class_name")
    if kind in CONTAINERS:
        _model(file, entry, path, inputs, layers)
        return
    config = _mapping(file, entry.get("config"), f"the config of '{printable(path[-1])}'")
    layers[path] = Layer(path, str(kind), config, inputs)


def _sequential(
    file: Path,
    entries: list[dict[str, Any]],
    names: list[str],
    path: LayerPath,
    layers: dict[LayerPath, Layer],
) -> tuple[tuple[LayerPath, ...], LayerPath]:
    children = tuple((*path, name) for name in names)
    previous: LayerPath | None = None
    if entries[0].get("class_name") != "InputLayer":
        # The first layer of an older Sequential carries the input's shape itself.
        previous = (*path, "(input)")
        first = entries[0].get("config")
        config = first if isinstance(first, dict) else {}
        layers[previous] = Layer(previous, "InputLayer", config, ())
    for entry, child in zip(entries, children, strict=True):
        _add(file, entry, child, () if previous is None else (previous,), layers)
        previous = child
    return children, children[-1]


def _functional(
    file: Path,
    entries: list[dict[str, Any]],
    names: list[str],
    path: LayerPath,
    layers: dict[LayerPath, Layer],
) -> tuple[tuple[LayerPath, ...], LayerPath]:
    for entry, name in zip(entries, names, strict=True):
        nodes = entry.get("inbound_nodes", [])
        if not isinstance(nodes, list):
            raise refuse(file, f"layer '{printable(name)}' has no list of inputs")
        if len(nodes) > 1:
            raise refuse(
                file, f"layer '{printable(name)}' is used {len(nodes)} times; Xception shares none"
            )
        # Random layers record their default, training=True, and are still inactive in `predict`.
        random = str(entry.get("class_name")).startswith("Random")
        if not random and any(value is True for value in _trainings(nodes)):
            raise refuse(
                file,
                f"layer '{printable(name)}' is called with training=True: it would use the "
                "statistics of each batch on the device too. Rebuild the model with training=False",
            )
        inputs = tuple((*path, source) for source in _sources(nodes))
        _add(file, entry, (*path, name), inputs, layers)
    return tuple((*path, name) for name in names), path


def _sources(value: object) -> Iterator[str]:
    """Yield the names of the layers that a serialized call refers to.

    Keras 3 writes {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}},
    Keras 2 [name, 0, 0, {...}].
    """
    if isinstance(value, dict):
        history = value.get("keras_history")
        if isinstance(history, list) and history and isinstance(history[0], str):
            yield history[0]
            return
        for part in value.values():
            yield from _sources(part)
    elif isinstance(value, list):
        if len(value) in (3, 4) and isinstance(value[0], str) and isinstance(value[1], int):
            yield value[0]
            value = value[3:]
        for part in value:
            yield from _sources(part)


def _trainings(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key == "training":
                yield part
            yield from _trainings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _trainings(part)


def _single(file: Path, outputs: object, where: str) -> LayerPath:
    """Return the one output layer: [name, 0, 0] (Keras 3) or [[name, 0, 0]] (Keras 2)."""
    found = list(_sources(outputs))
    if len(found) != 1:
        raise refuse(file, f"{where} has {len(found)} outputs; an Xception classifier has one")
    return (found[0],)
