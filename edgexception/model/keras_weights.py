"""Find the weights of Keras layers in the trees of the two HDF5 layouts Keras has written.

"By name" is the layout of `model.save("x.h5")` and of Keras 2's `save_weights("x.h5")`: a group a
layer, attributes `layer_names` and `weight_names`, nested models as one layer with all weights
(keras/src/legacy/saving/legacy_h5_format.py, tf_keras/saving/legacy/hdf5_format.py).

"By class" is the layout of `.keras` and `.weights.h5` (saving_lib.py since Keras 2.12): groups
`layers/<class>[_<n>]/vars/<i>`, numbered per class in the order of the model's layers. Keras 2.12
and 2.13 say `_layer_checkpoint_dependencies` for `layers` and leave gaps in the numbers; Windows
versions write backslashes; Keras 3.6 and later add the layer's name as an attribute of `vars`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgexception.model.hdf5_file import Group
from edgexception.model.keras_config import CONTAINERS, KerasGraph, LayerPath
from edgexception.model.tensors import StoredTensor, printable, refuse

ROLES = {
    "Conv2D": ("kernel",),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Dense": ("kernel", "bias"),
}
_GROUP_OF = {
    "Conv2D": "conv2d",
    "SeparableConv2D": "separable_conv2d",
    "BatchNormalization": "batch_normalization",
    "Dense": "dense",
    **{container: container.lower() for container in CONTAINERS},
}
# The last part of a weight's name: "kernel:0" (Keras 2), "kernel" (Keras 3), "conv_W:0" (Keras 1,
# which called the moving variance "running_std").
_ROLE = re.compile(
    r"(?:^|_)(depthwise_kernel|pointwise_kernel|kernel|W|bias|b|gamma|beta|"
    r"moving_mean|running_mean|moving_variance|running_variance|running_std)(?:_\d+)?(?::\d+)?$"
)
_SYNONYMS = {
    "W": "kernel",
    "b": "bias",
    "running_mean": "moving_mean",
    "running_variance": "moving_variance",
    "running_std": "moving_variance",
}
_TOP = ("layers", "_layer_checkpoint_dependencies")


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer by role, in the order of the file."""

    name: str | None
    """The layer's name, None where the file does not tell."""
    kind: str
    """Keras's class name."""
    by_role: dict[str, StoredTensor]


def is_seed(name: str) -> bool:
    """Say whether a tensor is the random seed of a Dropout, which is no weight."""
    return "seed_generator" in name


# By name.


def by_name(path: Path, tree: Group) -> list[tuple[LayerPath, LayerWeights]]:
    """Return every layer's weights in the order of the file, from the layout by name.

    The path of a layer is (name,) or (nested model, name). `tree` is the group with the attribute
    `layer_names`.
    """
    found: dict[LayerPath, dict[str, StoredTensor]] = {}
    for top in tree.attributes.get("layer_names", []):
        group = tree.find(top)  # A name with "/" is a path, as h5py reads it.
        if group is None:
            raise refuse(path, f"the weights of layer '{printable(top)}' are missing")
        parsed = [(name, *_parse(path, name)) for name in _weight_names(group)]
        nested = len({layer for _, _, layer in parsed}) > 1
        for name, role, layer in parsed:
            tensor = group.tensor(name)
            if tensor is None:
                raise refuse(path, f"the tensor '{printable(f'{top}/{name}')}' is missing")
            roles = found.setdefault((top, layer) if nested else (top,), {})
            if role in roles:
                raise refuse(path, f"the tensor '{printable(tensor.name)}' is there twice")
            roles[role] = tensor
    return [
        (where, LayerWeights(where[-1], _kind(path, where, roles), roles))
        for where, roles in found.items()
    ]


def _weight_names(group: Group) -> list[str]:
    return [name for name in group.attributes.get("weight_names", []) if not is_seed(name)]


def _parse(path: Path, name: str) -> tuple[str, str]:
    """Return (role, layer) of a weight's name; the layer is "" where the name has none."""
    parts = name.split("/")
    match = _ROLE.search(parts[-1])
    if match is None:
        raise refuse(
            path, f"the tensor '{printable(name)}' has no name that a layer of Xception has"
        )
    role = _SYNONYMS.get(match[1], match[1])
    return role, parts[-2] if len(parts) > 1 else ""


def _kind(path: Path, where: LayerPath, roles: dict[str, StoredTensor]) -> str:
    for kind, names in ROLES.items():
        if set(roles) == set(names):
            return kind
    raise refuse(
        path,
        f"layer '{printable('/'.join(where))}' has the weights {', '.join(sorted(roles))}, which "
        "no layer of Xception has",
    )


# By class.


def model_group(path: Path, tree: Group) -> Group:
    """Return the group of the model's layers in the layout by class."""
    found = [tree.groups[name] for name in _TOP if name in tree.groups]
    if len(found) != 1:
        raise refuse(path, "it has no group 'layers'; it is no Keras weights file")
    return found[0]


def by_class(path: Path, tree: Group, graph: KerasGraph) -> dict[LayerPath, LayerWeights]:
    """Return the weights of every layer of `graph` from the layout by class."""
    found: dict[LayerPath, LayerWeights] = {}
    _container(path, tree, graph, (), found)
    return found


def _container(
    path: Path,
    tree: Group,
    graph: KerasGraph,
    where: LayerPath,
    found: dict[LayerPath, LayerWeights],
) -> None:
    group = model_group(path, tree)
    children = [graph.layers[child] for child in graph.layers[where].children]
    for kind, stem in _GROUP_OF.items():
        layers = [layer for layer in children if layer.kind == kind]
        groups = _numbered(group, stem)
        if len(layers) != len(groups):
            raise refuse(
                path,
                f"its config has {len(layers)} layers of the class {kind} and its weights have "
                f"{len(groups)}" + (f" in '{printable('/'.join(where))}'" if where else ""),
            )
        for layer, below in zip(layers, groups, strict=True):
            name = _stored_name(below)
            if name is not None and name != layer.path[-1]:
                raise refuse(
                    path,
                    f"the weights '{printable(below.path)}' are named '{printable(name)}' where "
                    f"the config has '{layer.name}': config and weights are of two models",
                )
            if kind in CONTAINERS:
                _container(path, below, graph, layer.path, found)
            else:
                found[layer.path] = _class_weights(path, below, kind, name)


def by_class_alone(path: Path, tree: Group) -> Iterator[LayerWeights]:
    """Yield the weights of a file by class without a config: per class in the file's order."""
    group = model_group(path, tree)
    for kind, name in _GROUP_OF.items():
        for below in _numbered(group, name):
            if kind in CONTAINERS:
                yield from by_class_alone(path, below)
            else:
                yield _class_weights(path, below, kind, _stored_name(below))


def _numbered(group: Group, name: str) -> list[Group]:
    """Return the groups `name`, `name_1`, ... in order; Keras 2.12 and 2.13 leave gaps."""
    pattern = re.compile(re.escape(name) + r"(?:_(\d{1,6}))?")
    found = [
        (int(match[1] or 0), below)
        for key, below in group.groups.items()
        if (match := pattern.fullmatch(key)) is not None
    ]
    return [below for _, below in sorted(found, key=lambda pair: pair[0])]


def _stored_name(group: Group) -> str | None:
    variables = group.groups.get("vars")
    return variables.text("name") if variables is not None else None


def _class_weights(path: Path, group: Group, kind: str, name: str | None) -> LayerWeights:
    variables = group.groups.get("vars")
    tensors = variables.tensors if variables is not None else {}
    roles = ROLES[kind]
    if set(tensors) != {str(index) for index in range(len(roles))}:
        raise refuse(
            path,
            f"'{printable(group.path)}' ({kind}) holds {len(tensors)} tensors where Xception's has "
            f"{len(roles)}: {', '.join(roles)}",
        )
    by_role = {role: tensors[str(index)] for index, role in enumerate(roles)}
    return LayerWeights(name, kind, by_role)
