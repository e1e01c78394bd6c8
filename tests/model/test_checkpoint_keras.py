"""Keras's networks, saved by Keras in every format it has, give Keras's logits here."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("KERAS_BACKEND", "torch")  # Before Keras is imported.
keras = pytest.importorskip("keras")

from edgexception.model.checkpoint import load_checkpoint  # noqa: E402

LIMIT = 1e-4
KITCHENWARE = Path(__file__).parents[2] / ".data" / "kitchenware"


def randomize(model, seed=3):
    """Random values in every BatchNorm, moving statistics included."""
    generator = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            randomize(layer, seed + 1)
        elif isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.gamma.shape
            layer.set_weights(
                [
                    generator.uniform(0.5, 1.5, shape),
                    generator.normal(0, 0.1, shape),
                    generator.normal(0, 0.1, shape),
                    generator.uniform(0.5, 2.0, shape),
                ]
            )
    return model


def difference(model, network, size, pixels=False):
    """Largest absolute difference of the outputs on random images, and the outputs' range."""
    image = np.random.default_rng(size).uniform(0, 255, (1, size, size, 3)).astype("float32")
    normalized = image / 127.5 - 1
    with torch.no_grad():
        theirs = model(torch.from_numpy(image if pixels else normalized), training=False)
        if theirs.ndim == 4:  # Without pooling.
            theirs = theirs.mean(dim=(1, 2))
        ours = network(torch.from_numpy(normalized).permute(0, 3, 1, 2))
    assert theirs.shape == ours.shape
    return (theirs - ours).abs().max().item(), theirs.abs().max().item()


@pytest.fixture(scope="module")
def paper():
    """The paper's network as Keras builds it, without a fixed size, so that it is built once."""
    model = keras.applications.Xception(
        weights=None, input_shape=(299, 299, 3), classifier_activation=None
    )
    return randomize(model)


@pytest.mark.parametrize("size", [299, 150, 128, 71])
@pytest.mark.parametrize("top", [True, False])
def test_parity_with_keras_applications(tmp_path, paper, size, top):
    model = keras.applications.Xception(
        weights=None,
        include_top=top,
        input_shape=(size, size, 3),
        **({"classifier_activation": None} if top else {"pooling": "avg" if size > 100 else None}),
    )
    # The weights do not depend on the size; without top the last two are missing.
    model.set_weights(paper.get_weights() if top else paper.get_weights()[:-2])
    # One format a size here, all formats below on a narrow network.
    suffix = {299: ".keras", 150: ".h5", 128: ".weights.h5", 71: ".keras"}[size]
    path = tmp_path / f"x{suffix}"
    (model.save_weights if "weights" in suffix else model.save)(path)
    loaded = load_checkpoint(path)
    expected = (299, 299) if "weights" in suffix else (size, size)
    assert loaded.preprocess.input_size == expected
    if top:
        assert sum(p.numel() for p in loaded.network.parameters()) == 22_855_952
    else:
        assert loaded.network.architecture.head == ()
    largest, scale = difference(model, loaded.network, size)
    print(f"keras {size} top={top} {suffix}: {largest:.2e} of {scale:.3g}")
    assert scale > 0.01
    assert largest <= LIMIT


def narrow_backbone(size=71, input_tensor=None):
    """A narrow Xception with Keras's layers, shortcuts unnamed as in keras.applications."""
    layers = keras.layers
    entered = keras.Input((size, size, 3)) if input_tensor is None else input_tensor

    def convolution(x, width, name, strides):
        x = layers.Conv2D(width, 3, strides=strides, use_bias=False, name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return layers.ReLU()(x)

    def separable(x, width, name):
        x = layers.SeparableConv2D(width, 3, padding="same", use_bias=False, name=name)(x)
        return layers.BatchNormalization(name=f"{name}_bn")(x)

    x = convolution(convolution(entered, 4, "block1_conv1", 2), 6, "block1_conv2", 1)
    blocks = [
        ((8, 8), True),
        ((10, 10), True),
        ((10, 10), False),
        ((10, 10), False),
        ((9, 12), True),
    ]
    for number, (widths, strided) in enumerate(blocks, start=2):
        shortcut = x
        if strided:
            shortcut = layers.Conv2D(widths[-1], 1, strides=2, padding="same", use_bias=False)(x)
            shortcut = layers.BatchNormalization()(shortcut)
        for index, width in enumerate(widths, start=1):
            if number > 2 or index > 1:
                x = layers.Activation("relu")(x)
            x = separable(x, width, f"block{number}_sepconv{index}")
        if strided:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
        x = layers.add([x, shortcut])
    for index, width in enumerate((14, 16), start=1):
        x = layers.ReLU()(separable(x, width, f"block7_sepconv{index}"))
    return entered, x


def head(x, kind):
    layers = keras.layers
    x = layers.GlobalAveragePooling2D()(x)
    if kind == "chain":
        x = layers.Dense(9, activation="relu")(x)
        x = layers.Dropout(0.3)(x)
        x = layers.ReLU()(layers.Dense(8)(x))
        x = layers.Dropout(0.2)(x)
    return layers.Dense(5)(x)


def narrow(kind):
    """Return a model: flat, nested, a Sequential, or with the images' preprocessing inside."""
    size = 71
    entered, features = narrow_backbone(size)
    if kind == "flat":
        return keras.Model(entered, head(features, "single"))
    backbone = keras.Model(entered, features, name="xception")
    if kind == "sequential":
        layers = [keras.Input((size, size, 3)), backbone, keras.layers.GlobalAveragePooling2D()]
        return keras.Sequential([*layers, keras.layers.Dropout(0.2), keras.layers.Dense(5)])
    outer = x = keras.Input((size, size, 3))
    if kind == "preprocessing":
        x = keras.layers.RandomFlip("horizontal")(x)
        x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    return keras.Model(outer, head(backbone(x, training=False), "chain"))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["flat", "nested", "sequential", "preprocessing"])
def test_every_format_that_keras_writes(tmp_path, kind, trained):
    model = randomize(narrow(kind))
    if trained:  # A frozen backbone changes the order of weights in .h5; the optimizer adds state.
        if kind == "nested":
            model.get_layer("xception").trainable = False
        if kind == "preprocessing":
            for layer in model.get_layer("xception").layers[:9]:
                layer.trainable = False
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        images = np.random.default_rng(0).uniform(-1, 1, (2, 71, 71, 3)).astype("float32")
        model.fit(images, np.array([0, 1]), epochs=1, verbose=0)
    for name in ("m.keras", "m.h5", "m.weights.h5"):
        (model.save_weights if "weights" in name else model.save)(tmp_path / name)
        if "weights" in name and kind in ("nested", "preprocessing"):
            continue  # A chain of Dense layers without a config is refused, as tested elsewhere.
        loaded = load_checkpoint(tmp_path / name)
        largest, scale = difference(model, loaded.network, 71, pixels=kind == "preprocessing")
        assert scale > 0.001
        assert largest <= LIMIT, name
        assert loaded.source["producer"] == (
            "keras" if "weights" in name else f"keras {keras.__version__}"
        )
        if kind in ("nested", "preprocessing"):
            assert loaded.network.architecture.head == (9, 8, 5)
            assert loaded.network.architecture.dropout == 0.2


def test_other_models_are_refused_by_layer(tmp_path):
    from edgexception.errors import BadArtifact  # noqa: PLC0415

    layers = keras.layers
    entered, features = narrow_backbone()
    flattened = keras.Model(entered, layers.Dense(3)(layers.Flatten(name="flat")(features)))
    pooled = layers.GlobalAveragePooling2D()(features)
    heads = {
        "maxpool": layers.Dense(3)(layers.GlobalMaxPooling2D(name="maxpool")(features)),
        "sigmoid_layer": layers.Dense(1, activation="sigmoid", name="sigmoid_layer")(pooled),
        "norm": layers.Dense(3)(layers.BatchNormalization(name="norm")(pooled)),
        "no_bias": layers.Dense(3, use_bias=False, name="no_bias")(pooled),
        "second": layers.Dense(3, name="second")(layers.Dense(4)(pooled)),
        "secret": layers.Dense(3)(layers.Lambda(lambda x: x * 2, name="secret")(pooled)),
        "rescale": layers.Dense(3)(layers.Rescaling(0.5, name="rescale")(pooled)),
    }
    models = {"flat": flattened, **{n: keras.Model(entered, out) for n, out in heads.items()}}
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
        with pytest.raises(BadArtifact, match=f"layer '{name}'"):
            load_checkpoint(tmp_path / f"{name}.keras")
    keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3)).save(tmp_path / "o.keras")
    with pytest.raises(BadArtifact, match=r"layer .conv1. .* has padding=same where Xception"):
        load_checkpoint(tmp_path / "o.keras")


def test_the_kitchenware_model():
    """A network that someone trained: 9 labelled photos, and Keras's own logits."""
    checkpoint, table = KITCHENWARE / "model.keras", KITCHENWARE / "evaluation.csv"
    if not checkpoint.is_file() or not table.is_file():
        pytest.skip("the kitchenware model is not in .data/kitchenware: `make demo` fetches it")
    model = keras.models.load_model(checkpoint, compile=False)
    names = ("cup", "fork", "glass", "knife", "plate", "spoon")
    loaded = load_checkpoint(checkpoint, classes=names)
    assert loaded.preprocess.input_size == (150, 150)
    assert loaded.network.architecture.head == (100, 6)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    photos = [Image.open(KITCHENWARE / row["path"]).convert("RGB") for row in rows]
    resized = [np.asarray(photo.resize((150, 150), Image.NEAREST), "float32") for photo in photos]
    batch = torch.from_numpy(np.stack(resized) / 127.5 - 1)
    with torch.no_grad():
        theirs = model(batch, training=False)
        ours = loaded.network(batch.permute(0, 3, 1, 2))
    largest = (theirs - ours).abs().max().item()
    print(f"kitchenware, {len(rows)} photos: {largest:.2e} of {theirs.abs().max():.3g}")
    assert [names[i] for i in ours.argmax(1).tolist()] == [row["label"] for row in rows]
    assert len(rows) == 9
    assert largest <= LIMIT
