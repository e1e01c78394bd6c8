"""Recognize an Xception in a Keras graph by its layers and edges, whatever their names."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgexception.errors import BadArtifact
from edgexception.model.keras_config import IDENTITIES, KerasGraph, Layer, LayerPath
from edgexception.model.tensors import PAPER, Structure, module_of_dense, printable, refuse

FLATTEN_REASON = (
    "ties the head to one input size, and Xception's head is a global average pool: train the head "
    "on GlobalAveragePooling2D"
)


@dataclass
class KerasXception:
    """Where the parts of an Xception lie in a Keras graph, and what its config says of them."""

    modules: dict[str, LayerPath] = field(default_factory=dict)
    """Module name in `Xception` -> layer that holds its weights."""
    structure: Structure = PAPER
    dense_layers: int = 0
    dropout: float = 0.0
    bn_epsilon: float = 1e-3
    input_size: tuple[int | None, int | None] = (None, None)
    rescaling: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """(scale, offset) per channel of the Rescaling layers in the graph."""
    final_activation: str = "linear"


def recognize(graph: KerasGraph) -> KerasXception:
    """Find Xception's parts by walking the graph from its input.

    Raises `BadArtifact` naming the first layer that Xception does not have there.
    """
    return _Walk(graph).run()


class _Walk:
    def __init__(self, graph: KerasGraph) -> None:
        self.graph = graph
        self.inputs = graph.plain()
        self.output = graph.resolved(())
        self.users: dict[LayerPath, list[LayerPath]] = {path: [] for path in self.inputs}
        for path, sources in self.inputs.items():
            kind = self.layer(path).kind
            # So no loop can be reached from the input: Add's inputs are checked at every block.
            if kind not in ("Add", "InputLayer") and len(sources) != 1:
                raise self.fail(self.layer(path), f"has {len(sources)} inputs where one belongs")
            for source in sources:
                self.users[source].append(path)
        self.epsilons: dict[float, str] = {}
        self.found = KerasXception()

    def run(self) -> KerasXception:
        at = self._preprocessing(self._input())
        at = self._conv("block1_conv1", at, 3, 2, "valid")
        at = self._relu(at)
        at = self._conv("block1_conv2", at, 3, 1, "valid")
        at = self._relu(at)
        at = self._blocks(at)
        self._head(at)
        if len(self.epsilons) > 1:
            raise refuse(
                self.graph.file,
                f"its BatchNorms differ in epsilon ({self.epsilons}); Xception has one for all",
            )
        self.found.bn_epsilon = next(iter(self.epsilons))
        return self.found

    # Steps along the graph.

    def fail(self, layer: Layer, reason: str) -> BadArtifact:
        kind = printable(layer.kind, 60)
        return refuse(self.graph.file, f"layer '{layer.name}' ({kind}) {reason}")

    def layer(self, path: LayerPath) -> Layer:
        return self.graph.layers[path]

    def _following(self, path: LayerPath) -> list[Layer]:
        """Return the layers that use an output, identities at inference skipped."""
        following: list[Layer] = []
        pending = list(self.users[path])
        for _ in range(len(self.inputs) + 1):
            if not pending:
                break
            layer = self.layer(pending.pop(0))
            if layer.kind in IDENTITIES and layer.path != self.output:
                pending += self.users[layer.path]
            else:
                following.append(layer)
        return following

    def _next(self, path: LayerPath, *kinds: str) -> Layer:
        """Return the one layer that uses an output; it must be of one of the kinds."""
        following = self._following(path)
        here = self.layer(path)
        if not following:
            raise self.fail(here, f"ends the network, where Xception goes on with {kinds[0]}")
        if len(following) > 1:
            raise self.fail(here, f"feeds {len(following)} layers where Xception has one branch")
        if following[0].kind not in kinds:
            raise self.fail(following[0], f"stands where Xception has {' or '.join(kinds)}")
        return following[0]

    def expect(self, layer: Layer, **values: object) -> None:
        """Refuse a layer whose config differs from these values; absent means Keras's default."""
        for key, wanted in values.items():
            given = layer.config.get(key, wanted)
            if key == "activation" and given is None:
                given = "linear"
            if isinstance(given, list):
                given = tuple(given)
            if given != wanted:
                raise self.fail(
                    layer, f"has {key}={printable(given, 60)} where Xception has {wanted}"
                )

    # The parts of the network, in order.

    def _input(self) -> LayerPath:
        paths = [path for path in self.inputs if self.layer(path).kind == "InputLayer"]
        if len(paths) != 1:
            raise refuse(self.graph.file, f"it has {len(paths)} inputs; an Xception has one")
        config = self.layer(paths[0]).config
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if shape is None and isinstance(config.get("input_shape"), list):
            shape = [None, *config["input_shape"]]
        if shape is not None:
            sizes_ok = (
                isinstance(shape, list)
                and len(shape) == 4
                and all(size is None or (isinstance(size, int) and size > 0) for size in shape)
            )
            if not sizes_ok or shape[3] not in (3, None):
                raise self.fail(
                    self.layer(paths[0]),
                    f"has the shape {printable(shape, 80)}; Xception takes (N, height, width, 3)",
                )
            self.found.input_size = (shape[1], shape[2])
        return paths[0]

    def _preprocessing(self, path: LayerPath) -> LayerPath:
        scale: tuple[float, ...] = (1.0,) * 3
        offset: tuple[float, ...] = (0.0,) * 3
        while True:
            layer = self._next(path, "Conv2D", "Rescaling")
            if layer.kind == "Conv2D":
                return path
            by = self._channels(layer, "scale")
            plus = self._channels(layer, "offset")
            if any(value <= 0 for value in by):
                raise self.fail(layer, "has a scale that is not positive: it is no normalization")
            scale = tuple(old * new for old, new in zip(scale, by, strict=True))
            offset = tuple(old * new + add for old, new, add in zip(offset, by, plus, strict=True))
            self.found.rescaling = (scale, offset)
            path = layer.path

    def _channels(self, layer: Layer, key: str) -> tuple[float, ...]:
        value = layer.config.get(key, 0.0)
        values = value if isinstance(value, list) else [value] * 3
        if len(values) != 3 or not all(
            isinstance(part, (int, float)) and not isinstance(part, bool) for part in values
        ):
            raise self.fail(
                layer,
                f"has {key}={printable(value, 60)}; only a number or three, one a channel, can be "
                "folded into the preprocessing",
            )
        return tuple(float(part) for part in values)

    def _conv(
        self, name: str, path: LayerPath, kernel: int, stride: int, padding: str
    ) -> LayerPath:
        """Match a dense convolution and its BatchNorm after `path`."""
        layer = self._next(path, "Conv2D")
        return self._conv_at(name, layer, kernel, stride, padding)

    def _conv_at(
        self, name: str, layer: Layer, kernel: int, stride: int, padding: str
    ) -> LayerPath:
        self.expect(
            layer,
            kernel_size=(kernel, kernel),
            strides=(stride, stride),
            dilation_rate=(1, 1),
            groups=1,
            use_bias=False,
            activation="linear",
            data_format="channels_last",
        )
        if kernel > 1:  # A 1x1 kernel has nothing to pad.
            self.expect(layer, padding=padding)
        self.found.modules[name] = layer.path
        return self._batch_norm(name, layer.path)

    def _batch_norm(self, name: str, path: LayerPath) -> LayerPath:
        layer = self._next(path, "BatchNormalization")
        if layer.config.get("axis", -1) not in (-1, 3, [-1], [3]):
            raise self.fail(layer, "normalizes another axis than the channels (the last)")
        self.expect(layer, scale=True, center=True, renorm=False)
        epsilon = layer.config.get("epsilon", 1e-3)
        if not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0:
            raise self.fail(layer, f"has epsilon={printable(epsilon, 40)}")
        self.epsilons.setdefault(epsilon, layer.name)
        self.found.modules[f"{name}_bn"] = layer.path
        return layer.path

    def _is_relu(self, layer: Layer) -> bool:
        if layer.kind == "Activation":
            return layer.config.get("activation") == "relu"
        if layer.kind != "ReLU":
            return False
        self.expect(layer, max_value=None, threshold=0.0, negative_slope=0.0)
        return True

    def _relu(self, path: LayerPath) -> LayerPath:
        layer = self._next(path, "Activation", "ReLU")
        if not self._is_relu(layer):
            raise self.fail(layer, f"is {printable(layer.config.get('activation'), 60)}, not ReLU")
        return layer.path

    def _separable(self, name: str, layer: Layer) -> LayerPath:
        """Match a separable convolution and its BatchNorm."""
        self.expect(
            layer,
            kernel_size=(3, 3),
            strides=(1, 1),
            dilation_rate=(1, 1),
            padding="same",
            depth_multiplier=1,
            use_bias=False,
            activation="linear",
            data_format="channels_last",
        )
        self.found.modules[name] = layer.path
        return self._batch_norm(name, layer.path)

    def _blocks(self, path: LayerPath) -> LayerPath:
        """Match all blocks with shortcuts, then the tail."""
        counts: list[tuple[int, bool]] = []
        while len(following := self._following(path)) == 2:
            name = f"block{len(counts) + 2}"
            path, count, strided = self._block(name, path, following, first=not counts)
            counts.append((count, strided))
        entry = next((i for i, (_, strided) in enumerate(counts) if not strided), len(counts) - 1)
        inner = counts[entry:-1]
        if not counts or not counts[-1][1] or any(strided for _, strided in inner):
            raise self.fail(
                self.layer(path),
                "ends a sequence of blocks that is not Xception's (strided entry blocks, middle "
                "blocks, one strided exit block, each with its shortcut)",
            )
        tail = 0
        while True:
            following = self._following(path)
            if len(following) != 1 or following[0].kind != "SeparableConv2D":
                break
            tail += 1
            name = f"block{len(counts) + 2}_sepconv{tail}"
            path = self._relu(self._separable(name, following[0]))
        if not tail:
            raise self.fail(self.layer(path), "is not followed by the last separable convolutions")
        self.found.structure = Structure(
            tuple(count for count, _ in counts[:entry]),
            tuple(count for count, _ in inner),
            counts[-1][0],
            tail,
        )
        return path

    def _block(
        self, name: str, path: LayerPath, following: list[Layer], *, first: bool
    ) -> tuple[LayerPath, int, bool]:
        """Match one block; return (its Add, number of separable convolutions, strided)."""
        shortcut = path
        strided = [layer for layer in following if layer.kind == "Conv2D"]
        joins = [layer for layer in following if layer.kind == "Add"]
        if len(strided) == 1:
            shortcut = self._conv_at(f"{name}_shortcut", strided[0], 1, 2, "same")
        elif len(joins) != 1:
            raise self.fail(self.layer(path), "feeds two branches that are no block of Xception")
        branch = (strided or joins)[0]
        (main,) = [layer for layer in following if layer.path != branch.path]
        at = self._main_step(f"{name}_sepconv1", main, bare=first)
        count = 1
        while (layer := self._next(at, "Activation", "ReLU", "MaxPooling2D", "Add")).kind in (
            "Activation",
            "ReLU",
        ):
            count += 1
            at = self._main_step(f"{name}_sepconv{count}", layer, bare=False)
        if strided:
            layer = self._next(at, "MaxPooling2D")
            self.expect(layer, pool_size=(3, 3), strides=(2, 2), padding="same")
            at = layer.path
        join = self._next(at, "Add")
        if sorted(self.inputs[join.path]) != sorted((at, shortcut)):
            raise self.fail(join, f"does not join the two branches of {name}")
        return join.path, count, bool(strided)

    def _main_step(self, name: str, layer: Layer, *, bare: bool) -> LayerPath:
        """Match [ReLU,] separable convolution, BatchNorm; `layer` is the first of them."""
        # The stem ends with its own ReLU, so the first block starts without one.
        if not bare:
            if not self._is_relu(layer):
                raise self.fail(layer, "stands where Xception has a ReLU")
            layer = self._next(layer.path, "SeparableConv2D")
        if layer.kind != "SeparableConv2D":
            raise self.fail(layer, "stands where Xception has its first SeparableConv2D")
        return self._separable(name, layer)

    # The head: pooling, then Dense, ReLU and Dropout.

    def _head(self, path: LayerPath) -> None:
        path = self._pooling(path)
        dense: list[LayerPath] = []
        activation, dropout = "relu", 0.0
        while path != self.output:
            layer = self._next_of_head(path, bool(dense))
            path = layer.path
            if layer.kind == "Dropout":
                dropout = self._rate(layer)
            elif layer.kind == "Dense":
                if activation != "relu":
                    raise self.fail(layer, f"follows a Dense that ends with {activation}, not relu")
                dense.append(path)
                self.found.dropout, dropout = dropout, 0.0
                activation = self._activation(layer)
            elif layer.kind not in IDENTITIES:
                if activation != "linear":
                    raise self.fail(layer, f"follows an activation ({activation}) already")
                activation = self._activation(layer)
        if dense and activation not in ("linear", "softmax"):
            raise self.fail(
                self.layer(dense[-1]),
                f"ends the network with {activation}; a classifier ends with logits or softmax",
            )
        self.found.final_activation = activation if dense else "none"
        self.found.dense_layers = len(dense)
        for index, where in enumerate(dense):
            self.found.modules[module_of_dense(index, len(dense))] = where

    def _pooling(self, path: LayerPath) -> LayerPath:
        if self._ends(path):
            return path
        layer = self._next(path, "GlobalAveragePooling2D", "Flatten")
        if layer.kind == "Flatten":
            raise self.fail(layer, FLATTEN_REASON)
        self.expect(layer, keepdims=False, data_format="channels_last")
        return layer.path

    def _next_of_head(self, path: LayerPath, after_dense: bool) -> Layer:
        users = self.users[path]
        if len(users) != 1:
            raise self.fail(self.layer(path), f"feeds {len(users)} layers in the head")
        layer = self.layer(users[0])
        activation = layer.kind in ("Activation", "ReLU", "Softmax") and after_dense
        if not activation and layer.kind != "Dense" and layer.kind not in IDENTITIES:
            raise self.fail(layer, "is not supported in a head (none, or Dense, ReLU and Dropout)")
        return layer

    def _ends(self, path: LayerPath) -> bool:
        """Say whether nothing but identities lies between `path` and the output."""
        for _ in range(len(self.inputs) + 1):
            if path == self.output:
                return True
            users = self.users[path]
            if len(users) != 1 or self.layer(users[0]).kind not in IDENTITIES:
                return False
            path = users[0]
        return False

    def _rate(self, layer: Layer) -> float:
        rate = layer.config.get("rate", 0.0)
        if not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
            raise self.fail(layer, f"has rate={printable(rate, 40)}")
        return float(rate)

    def _activation(self, layer: Layer) -> str:
        """Return linear, relu or softmax; refuse all else."""
        if layer.kind == "ReLU":
            self._is_relu(layer)
            return "relu"
        if layer.kind == "Softmax":
            self.expect(layer, axis=-1)
            return "softmax"
        if layer.kind == "Dense":
            self.expect(layer, use_bias=True)
        name = layer.config.get("activation") or "linear"
        if name not in ("linear", "relu", "softmax"):
            raise self.fail(
                layer,
                f"has the activation {printable(name, 60)}; a head may use relu between its "
                "layers, and end with logits or softmax",
            )
        return str(name)
