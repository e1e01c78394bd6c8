"""Every HDF5 layout of Keras 1-3 gives back the network that was written, bit by bit."""

import dataclasses
import itertools

import h5py
import pytest
import torch
from checkpoints import (
    NARROW,
    layout,
    model_config,
    random_network,
    timm_state,
    write_by_class,
    write_by_name,
    write_keras,
)
from safetensors.torch import save_file

from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, UsageError
from edgexception.model.checkpoint import load_checkpoint, save_checkpoint
from edgexception.preprocess import Preprocess, PreprocessChanges

CHAIN = NARROW.model_copy(update={"head": (9, 7, 4), "dropout": 0.25})
FAMILY = {
    "paper-like": NARROW,
    "chain": CHAIN,
    "one-entry": NARROW.model_copy(update={"entry": ((10, 10),)}),
    "no-middle": NARROW.model_copy(update={"middle": ()}),
    "uneven": NARROW.model_copy(
        update={"entry": ((8, 9, 7), (10,)), "middle": ((12, 10), (10,)), "tail": (14, 15, 16)}
    ),
    "equal-widths": Architecture(
        stem=(8, 8), entry=((8, 8),) * 3, middle=((8, 8, 8),), exit=(8, 8), tail=(8, 8), head=(3,)
    ),
}


def assert_same(loaded, network):
    """The loaded network is the same, bit by bit."""
    assert loaded.network.architecture == network.architecture
    assert not loaded.network.training
    for (key, ours), theirs in zip(
        loaded.network.state_dict().items(), network.state_dict().values(), strict=True
    ):
        if not key.endswith("num_batches_tracked"):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dialect", [2, 3])
def test_whole_models(tmp_path, name, nested, dialect):
    network = random_network(FAMILY[name])
    model = layout(network, nested=nested, dialect=dialect, offset=4)
    write_by_name(tmp_path / "m.h5", model, keras=dialect, optimizer=True)
    write_keras(tmp_path / "m.keras", model)
    for file in ("m.h5", "m.keras"):
        loaded = load_checkpoint(tmp_path / file)
        assert_same(loaded, network)
        assert loaded.preprocess == Preprocess(input_size=(71, 71))
        assert loaded.source["final_activation"] == "softmax"
        assert loaded.source["file"] == file


@pytest.mark.parametrize(
    ("top", "separator", "gaps", "names"),
    [
        ("_layer_checkpoint_dependencies", "/", True, False),  # Keras 2.12, 2.13
        ("layers", "/", True, False),  # Keras 2.13 and 2.14 by another walk
        ("layers", "/", False, False),  # Keras 2.15, 3.0-3.5
        ("layers", "\\", False, False),  # the same on Windows
        ("layers", "/", False, True),  # Keras 3.6 and later
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_versions_of_the_layout_by_class(tmp_path, top, separator, gaps, names, nested):
    network = random_network(CHAIN)
    options = {"top": top, "separator": separator, "gaps": gaps, "names": names}
    write_keras(tmp_path / "m.keras", layout(network, nested=nested), **options)
    assert_same(load_checkpoint(tmp_path / "m.keras"), network)


@pytest.mark.parametrize("keras", [1, 2, 3])
@pytest.mark.parametrize("head", [(), (5,)])
def test_weights_alone_by_name(tmp_path, keras, head):
    network = random_network(NARROW.model_copy(update={"head": head}))
    for offset in (0, 7):
        write_by_name(tmp_path / "w.h5", layout(network, offset=offset), keras=keras, config=False)
        loaded = load_checkpoint(tmp_path / "w.h5")
        assert_same(loaded, network)
        assert loaded.preprocess == Preprocess(input_size=(299, 299))


@pytest.mark.parametrize("nested", [False, True])
def test_weights_alone_by_class_with_names(tmp_path, nested):
    network = random_network(NARROW)
    write_by_class(tmp_path / "m.weights.h5", layout(network, nested=nested))
    assert_same(load_checkpoint(tmp_path / "m.weights.h5"), network)


def test_weights_alone_by_class_without_names_need_the_papers_repeats(tmp_path):
    write_by_class(tmp_path / "m.weights.h5", layout(random_network(NARROW)), names=False)
    with pytest.raises(BadArtifact, match="the order alone cannot tell"):
        load_checkpoint(tmp_path / "m.weights.h5")
    paper = NARROW.model_copy(
        update={"entry": ((8, 8), (10, 10), (12, 12)), "middle": ((12, 12, 12),) * 8}
    )
    network = random_network(paper)
    write_by_class(tmp_path / "p.weights.h5", layout(network, nested=True), names=False, gaps=True)
    assert_same(load_checkpoint(tmp_path / "p.weights.h5"), network)


def test_weights_alone_do_not_tell_what_lies_between_dense_layers(tmp_path):
    write_by_name(tmp_path / "w.h5", layout(random_network(CHAIN)), config=False)
    with pytest.raises(BadArtifact, match="weights only, of 3 Dense layers"):
        load_checkpoint(tmp_path / "w.h5")


def test_config_and_weights_of_two_models_are_noticed(tmp_path):
    network = random_network(FAMILY["equal-widths"])
    model = layout(network)
    names = iter(["conv2d_1", "conv2d"])
    outer = [
        layer._replace(name=next(names)) if layer.name in ("conv2d", "conv2d_1") else layer
        for layer in model.outer
    ]
    write_keras(tmp_path / "m.keras", model._replace(outer=outer))
    with pytest.raises(BadArtifact, match="config and weights are of two models"):
        load_checkpoint(tmp_path / "m.keras")


@pytest.mark.parametrize("kind", ["f2", "f8", ">f4", "bfloat16"])
def test_float_types(tmp_path, kind):
    network = random_network(NARROW)
    model = layout(network)

    def converted(value):
        if kind == "bfloat16":
            return (value.astype("f4").view("u4") >> 16).astype("u2").view("V2")
        return value.astype(kind)

    outer = [
        layer._replace(weights=tuple((role, converted(value)) for role, value in layer.weights))
        for layer in model.outer
    ]
    write_by_name(tmp_path / "m.h5", model._replace(outer=outer))
    if kind == "bfloat16":
        with h5py.File(tmp_path / "m.h5", "a") as file:
            file.visititems(
                lambda _, item: (
                    item.attrs.update(dtype="bfloat16") if isinstance(item, h5py.Dataset) else None
                )
            )
    loaded = load_checkpoint(tmp_path / "m.h5").network.state_dict()
    rounding = {"f2": 1e-3, "f8": 0, ">f4": 0, "bfloat16": 1e-2}[kind]
    for key, value in network.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=rounding, atol=rounding / 10)


def rescaled(scale, offset):
    model = layout(random_network(NARROW))
    config = model.config["config"]
    rescaling = {
        "class_name": "Rescaling",
        "name": "rescaling",
        "config": {"name": "rescaling", "scale": scale, "offset": offset},
        "inbound_nodes": [[["input_1", 0, 0, {}]]],
    }
    config["layers"][1]["inbound_nodes"] = [[["rescaling", 0, 0, {}]]]
    config["layers"].insert(1, rescaling)
    return model


def test_rescaling_is_folded_into_the_preprocessing(tmp_path):
    write_keras(tmp_path / "m.keras", rescaled(1 / 127.5, -1))
    assert load_checkpoint(tmp_path / "m.keras").preprocess.std == (127.5,) * 3
    write_keras(tmp_path / "n.keras", rescaled(1 / 255, 0.0))
    read = load_checkpoint(tmp_path / "n.keras").preprocess
    assert (read.mean, read.std) == ((0.0,) * 3, (255.0,) * 3)
    write_keras(tmp_path / "o.keras", rescaled([0.5, 0.25, 2.0], [1, 2, -4]))
    read = load_checkpoint(tmp_path / "o.keras").preprocess
    assert (read.mean, read.std) == ((-2.0, -8.0, 2.0), (2.0, 4.0, 0.5))
    write_keras(tmp_path / "p.keras", rescaled([0.5, 0.25], 0.0))
    with pytest.raises(BadArtifact, match=r"layer 'rescaling' \(Rescaling\) has scale="):
        load_checkpoint(tmp_path / "p.keras")


def test_overrides_and_class_names(tmp_path):
    write_keras(tmp_path / "m.keras", layout(random_network(NARROW)))
    mine = PreprocessChanges(input_size=(96, 96), interpolation="nearest")
    names = tuple("abcde")
    loaded = load_checkpoint(tmp_path / "m.keras", classes=names, preprocess=mine)
    assert loaded.classes == names
    # The recipe of the kitchenware says only these two, and means Keras's convention for the rest.
    assert loaded.preprocess == Preprocess(input_size=(96, 96), interpolation="nearest")
    with pytest.raises(UsageError, match="4 class names for a network with 5 outputs"):
        load_checkpoint(tmp_path / "m.keras", classes=names[:4])
    with pytest.raises(UsageError, match="no such file"):
        load_checkpoint(tmp_path / "none.keras")


def test_changes_of_the_preprocessing_leave_the_rest_as_the_checkpoint_says(tmp_path):
    network = random_network(NARROW.model_copy(update={"padding": "timm", "bn_epsilon": 1e-5}))
    torch.save(timm_state(network, "fc"), tmp_path / "timm.pth")
    conventional = load_checkpoint(tmp_path / "timm.pth")
    own = Preprocess(input_size=(80, 96), mean=(1.25, 2, 3), std=(0.1, 0.2, 0.3))
    save_checkpoint(
        dataclasses.replace(conventional, preprocess=own), tmp_path / "ours.safetensors"
    )
    smaller = PreprocessChanges(input_size=(64, 64))
    for name, before in (("timm.pth", conventional.preprocess), ("ours.safetensors", own)):
        after = load_checkpoint(tmp_path / name, preprocess=smaller).preprocess
        assert after == before.model_copy(update={"input_size": (64, 64)})
    crop = PreprocessChanges(crop_fraction=0.5)
    assert load_checkpoint(tmp_path / "timm.pth", preprocess=crop).preprocess.crop_fraction == 0.5
    with pytest.raises(UsageError, match=r"crop_fraction 0\.5 has no effect with resize stretch"):
        load_checkpoint(tmp_path / "ours.safetensors", preprocess=crop)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["paper-like", "no-middle", "one-entry"])
def test_state_dicts_of_timm_and_cadene(tmp_path, suffix, name):
    arch = FAMILY[name].model_copy(update={"padding": "timm", "bn_epsilon": 1e-5})
    network = random_network(arch)
    path = tmp_path / f"m{suffix}"
    for classifier, wrapped in itertools.product(("fc", "last_linear"), (False, True)):
        state = timm_state(network, classifier)
        if wrapped:
            state = {f"module.{key}": value for key, value in state.items()}
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            content = {"state_dict": state, "epoch": 3, "note": "x"} if wrapped else state
            torch.save(content, path, _use_new_zipfile_serialization=suffix == ".pth")
        loaded = load_checkpoint(path)
        assert_same(loaded, network)
        assert loaded.preprocess.crop_fraction == 0.8975
    if suffix == ".pt":  # The file of 2018 has pointwise weights of two axes.
        flat = {k: v.flatten(1) if "pointwise" in k else v for k, v in state.items()}
        torch.save(flat, path, _use_new_zipfile_serialization=False)
        assert_same(load_checkpoint(path), network)


@pytest.mark.parametrize(
    "variant", ["elu", "extreme-inception", "segments", "no-residual", "plain"]
)
def test_our_own_file_goes_round(tmp_path, variant):
    update = {
        "elu": {"intermediate_activation": "elu", "dropout": 0.5},
        "extreme-inception": {"order": "pointwise-first", "intermediate_activation": "relu"},
        "segments": {"segments": 2},
        "no-residual": {"residual": False},
        "plain": {"padding": "timm", "bn_epsilon": 1e-5, "head": (6, 5)},
    }[variant]
    network = random_network(Architecture(**{**NARROW.model_dump(), **update}))
    write_keras(tmp_path / "k.keras", layout(random_network(NARROW)))
    model = dataclasses.replace(
        load_checkpoint(tmp_path / "k.keras"),
        network=network,
        classes=("zebra", "ähre", "\u4e2d", "d", "e"),
        preprocess=Preprocess(input_size=(80, 96), mean=(1.25, 2, 3), std=(0.1, 0.2, 0.3)),
    )
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(model, first)
    again = load_checkpoint(first)
    assert_same(again, network)
    assert (again.classes, again.preprocess) == (model.classes, model.preprocess)
    assert again.source["origin_format"] == "keras-v3"
    save_checkpoint(model, second)
    assert first.read_bytes() == second.read_bytes()
    x = torch.randn(2, 3, 80, 96)
    with torch.no_grad():
        assert torch.equal(again.network(x), network(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "k.keras",
    ]


def test_shortcuts_follow_the_graph_not_their_numbers(tmp_path):
    """Shortcut convolutions of equal shape whose numbers run backwards."""
    network = random_network(FAMILY["equal-widths"])
    model = layout(network)
    count = sum(layer.name.startswith("conv2d") for layer in model.outer)
    new = {f"conv2d{f'_{i}' if i else ''}": f"conv2d_{9 + count - i}" for i in range(count)}
    outer = [
        layer._replace(
            name=new.get(layer.name, layer.name),
            inputs=tuple(new.get(source, source) for source in layer.inputs),
        )
        for layer in model.outer
    ]
    renamed = model._replace(outer=outer, config=model_config(outer))
    write_by_name(tmp_path / "m.h5", renamed)
    write_keras(tmp_path / "m.keras", renamed)
    assert_same(load_checkpoint(tmp_path / "m.h5"), network)
    assert_same(load_checkpoint(tmp_path / "m.keras"), network)
