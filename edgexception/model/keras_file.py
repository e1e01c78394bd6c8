"""Read a trained Xception from Keras's files, through zipfile, json and h5py only."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgexception.model.archive import open_archive, read_member
from edgexception.model.hdf5_file import Group, read_tree
from edgexception.model.keras_config import parse
from edgexception.model.keras_graph import KerasXception, recognize
from edgexception.model.keras_weights import (
    LayerWeights,
    by_class,
    by_class_alone,
    by_name,
    is_seed,
)
from edgexception.model.tensors import (
    PAPER,
    StoredTensor,
    Structure,
    architecture_of,
    assemble,
    first_fault,
    listing,
    printable,
    refuse,
)
from edgexception.model.xception import Xception
from edgexception.preprocess import Preprocess

MOST_JSON_BYTES = 64 * 2**20
MOST_WEIGHT_BYTES = 4 * 2**30
DEFAULT_SIDE = 299
_TOPS = frozenset({"layers", "_layer_checkpoint_dependencies"})
_WEIGHTS = "model.weights.h5"


@dataclass(frozen=True)
class KerasFile:
    """What was read from a Keras file."""

    network: Xception
    preprocess: Preprocess
    source: dict[str, str]


def read_keras(path: Path) -> KerasFile:
    """Read a `.keras` archive: its config, and the network with the weights in it."""
    with open_archive(path) as (archive, members):
        for name in members:
            if name not in ("metadata.json", "config.json", _WEIGHTS) and not (
                name.startswith("assets/")
            ):
                raise refuse(path, f"its member '{printable(name)}' is none that Keras writes")
        for name in ("config.json", _WEIGHTS):
            if name not in members:
                raise refuse(path, f"its member '{name}' is missing; save the model again")
        config = _json(path, read_member(path, archive, members["config.json"], MOST_JSON_BYTES))
        metadata: object = {}
        if "metadata.json" in members:
            raw = read_member(path, archive, members["metadata.json"], MOST_JSON_BYTES)
            metadata = _json(path, raw)
        weights = read_member(path, archive, members[_WEIGHTS], MOST_WEIGHT_BYTES)
    graph = parse(path, config)
    found = recognize(graph)
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    with tempfile.TemporaryDirectory(prefix="edgexception-") as folder:
        stored = Path(folder) / _WEIGHTS
        stored.write_bytes(weights)
        del weights
        tree = read_tree(path, stored)
        modules = _located(path, found, by_class(path, tree, graph))
        return _built(path, found, modules, tree, ("keras-v3", version))


def read_keras_hdf5(path: Path) -> KerasFile:
    """Read a `.h5` file: a whole model with its config, or weights in either of two layouts."""
    tree = read_tree(path, path)
    version = tree.text("keras_version")
    if _TOPS & tree.groups.keys():
        found, modules = _without_config(path, list(by_class_alone(path, tree)))
        return _built(path, found, modules, tree, ("keras-weights-h5", version))
    named = tree.groups.get("model_weights", tree)
    version = version or named.text("keras_version")
    layers = by_name(path, named)
    if not layers:
        raise refuse(
            path,
            f"it holds {listing(tree.groups) or 'nothing'} and none of Keras's layouts "
            "('layer_names', 'model_weights' or 'layers')",
        )
    text = tree.text("model_config")
    if text:
        found = recognize(parse(path, _json(path, text.encode())))
        modules = _located(path, found, dict(layers))
        return _built(path, found, modules, named, ("keras-h5", version))
    found, modules = _without_config(path, [weights for _, weights in layers])
    return _built(path, found, modules, named, ("keras-h5-weights", version))


def _json(path: Path, raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(
            path, f"its config is not valid JSON ({printable(error, 120)}); save the model again"
        ) from None


def _located(
    path: Path, found: KerasXception, layers: dict[tuple[str, ...], LayerWeights]
) -> dict[str, LayerWeights]:
    """Return the weights of every module of the network."""
    modules: dict[str, LayerWeights] = {}
    for module, where in found.modules.items():
        # The layout by name knows the outermost nested model and the layer, none between.
        weights = layers.get(where) or layers.get((where[0], where[-1]))
        if weights is None:
            raise refuse(path, f"the weights of layer '{printable('/'.join(where))}' are missing")
        modules[module] = weights
    return modules


# Files without a config.


def _without_config(
    path: Path, layers: list[LayerWeights]
) -> tuple[KerasXception, dict[str, LayerWeights]]:
    """Match weights alone: by the names of keras.applications, or else by its order of layers."""
    dense = [layer for layer in layers if layer.kind == "Dense"]
    if len(dense) > 1:
        raise refuse(
            path,
            f"it holds weights only, of {len(dense)} Dense layers, and not what lies between them; "
            "save the whole model (model.save('model.keras'))",
        )
    named = all(layer.name for layer in layers)
    structure, modules = _by_names(path, layers) if named else _by_order(path, layers)
    if dense:
        modules["predictions"] = dense[0]
    found = KerasXception(
        structure=structure,
        dense_layers=len(dense),
        final_activation="unknown" if dense else "none",
    )
    return found, modules


def _by_names(path: Path, layers: list[LayerWeights]) -> tuple[Structure, dict[str, LayerWeights]]:
    modules: dict[str, LayerWeights] = {}
    shortcuts: dict[str, list[LayerWeights]] = {"Conv2D": [], "BatchNormalization": []}
    counts: dict[int, int] = {}
    for layer in layers:
        name = layer.name or ""
        match = re.fullmatch(r"block(\d{1,3})_sepconv(\d{1,2})(_bn)?", name)
        if match or re.fullmatch(r"block1_conv[12](_bn)?", name):
            if name in modules:
                raise refuse(path, f"the layer '{printable(name)}' is there twice")
            modules[name] = layer
            if match:
                number = int(match[1])
                counts[number] = max(counts.get(number, 0), int(match[2]))
        elif layer.kind in shortcuts:
            shortcuts[layer.kind].append(layer)
        elif layer.kind != "Dense":
            raise refuse(
                path, f"the layer '{printable(name)}' ({layer.kind}) is none of Xception's"
            )
    convs, norms = shortcuts.values()
    blocks = [counts[number] for number in sorted(counts)]
    strided = len(convs)
    if (
        sorted(counts) != list(range(2, 2 + len(blocks)))
        or len(norms) != strided
        or not 1 <= strided <= len(blocks) - 1
    ):
        raise refuse(
            path,
            f"it has the separable convolutions of {len(blocks)} blocks ('blockN_sepconvM'), "
            f"{strided} shortcut convolutions and {len(norms)} BatchNorms for them, which make no "
            "Xception; save the whole model (model.save('model.keras'))",
        )
    structure = Structure(
        tuple(blocks[: strided - 1]), tuple(blocks[strided - 1 : -2]), blocks[-2], blocks[-1]
    )
    names = [name for name, _, is_strided in structure.blocks() if is_strided]
    for name, conv, norm in zip(names, convs, norms, strict=True):
        modules[f"{name}_shortcut"] = conv
        modules[f"{name}_shortcut_bn"] = norm
    return structure, modules


def _by_order(path: Path, layers: list[LayerWeights]) -> tuple[Structure, dict[str, LayerWeights]]:
    """Match unnamed layers: only the paper's repeats, whose order per class is known.

    Keras orders layers by depth; a block's shortcut BatchNorm comes after those of its main branch.
    """
    shortcuts = [f"{name}_shortcut" for name, _, strided in PAPER.blocks() if strided]
    separables: list[str] = []
    norms = ["block1_conv1_bn", "block1_conv2_bn"]
    for name, count, strided in PAPER.blocks():
        inside = [f"{name}_sepconv{index}" for index in range(1, count + 1)]
        separables += inside
        norms += [f"{inner}_bn" for inner in inside] + [f"{name}_shortcut_bn"] * strided
    expected = {
        "Conv2D": ["block1_conv1", "block1_conv2", *shortcuts],
        "SeparableConv2D": separables,
        "BatchNormalization": norms,
    }
    modules: dict[str, LayerWeights] = {}
    for kind, names in expected.items():
        found = [layer for layer in layers if layer.kind == kind]
        if len(found) != len(names):
            raise refuse(
                path,
                f"it holds weights without layer names, and {len(found)} of the class {kind} where "
                f"keras.applications.Xception has {len(names)}: the order alone cannot tell which "
                "is which. Save the whole model (model.save('model.keras'))",
            )
        modules.update(zip(names, found, strict=True))
    return PAPER, modules


# From layers to the network.


def _built(
    path: Path,
    found: KerasXception,
    modules: dict[str, LayerWeights],
    tree: Group,
    origin: tuple[str, object],
) -> KerasFile:
    tensors: dict[str, StoredTensor] = {}
    for module, weights in modules.items():
        tensors.update(_in_torch_layout(path, module, weights))
    used = {tensor.name for weights in modules.values() for tensor in weights.by_role.values()}
    extra = {
        tensor.name
        for tensor in tree.all_tensors()
        if tensor.name not in used and not is_seed(tensor.name)
    }
    # The layout by class keeps the state of training outside `layers`, unopened.
    if extra:
        raise refuse(path, f"the tensors {listing(extra)} belong to no layer of this Xception")
    settings: dict[str, Any] = {"dropout": found.dropout, "bn_epsilon": found.bn_epsilon}
    architecture = architecture_of(path, found.structure, tensors, found.dense_layers, settings)
    preprocess = _preprocess(path, found)
    network = assemble(path, architecture, tensors)
    layout, version = origin
    producer = f"keras {printable(version, 20)}" if isinstance(version, str) else "keras"
    source = {
        "format": layout,
        "producer": producer,
        "final_activation": found.final_activation,
    }
    return KerasFile(network, preprocess, source)


def _in_torch_layout(path: Path, module: str, weights: LayerWeights) -> dict[str, StoredTensor]:
    """Return a layer's tensors under the keys and with the axes of `Xception`."""
    roles = weights.by_role
    expected = "Conv2D"
    if module.endswith("_bn"):
        expected = "BatchNormalization"
    elif "_sepconv" in module:
        expected = "SeparableConv2D"
    elif module == "predictions" or module.startswith("dense"):
        expected = "Dense"
    if weights.kind != expected:
        name = printable(weights.name or module)
        raise refuse(path, f"the layer '{name}' is a {weights.kind}, not a {expected}")
    if expected == "BatchNormalization":
        return {
            f"{module}.weight": roles["gamma"],
            f"{module}.bias": roles["beta"],
            f"{module}.running_mean": roles["moving_mean"],
            f"{module}.running_var": roles["moving_variance"],
        }
    if expected == "SeparableConv2D":
        return {
            # (3, 3, in, 1) -> (in, 1, 3, 3) and (1, 1, in, out) -> (out, in, 1, 1)
            f"{module}.depthwise.weight": roles["depthwise_kernel"].permuted(2, 3, 0, 1),
            f"{module}.pointwise.weight": roles["pointwise_kernel"].permuted(3, 2, 0, 1),
        }
    if expected == "Dense":
        return {
            f"{module}.weight": roles["kernel"].permuted(1, 0),
            f"{module}.bias": roles["bias"],
        }
    return {f"{module}.weight": roles["kernel"].permuted(3, 2, 0, 1)}


def _preprocess(path: Path, found: KerasXception) -> Preprocess:
    """Return the file's own preprocessing: Rescaling layers, else x / 127.5 - 1."""
    height, width = (side or DEFAULT_SIDE for side in found.input_size)
    normalization: dict[str, Any] = {}
    if found.rescaling is not None:
        scales, offsets = found.rescaling
        # scale * x + offset = (x - mean) / std; nine digits undo the rounding of 1 / 127.5.
        normalization["std"] = tuple(float(f"{1 / scale:.9g}") for scale in scales)
        normalization["mean"] = tuple(
            float(f"{-offset / scale:.9g}") for scale, offset in zip(scales, offsets, strict=True)
        )
    try:
        return Preprocess(input_size=(height, width), **normalization)
    except ValidationError as error:
        raise refuse(
            path, f"its input or its Rescaling cannot be used: {first_fault(error)}"
        ) from None
