"""The network family: shapes, parameters and gradients over all of it, and Keras's padding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from edgexception.architecture import MAX_PARAMETERS, Architecture, SeparableSpec
from edgexception.model.xception import MaxPoolSame, SeparableConv2d, Xception


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are tiny: on a busy machine a second thread costs fifty times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


def trainable(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def total(network: nn.Module) -> int:
    """Parameters as Keras counts them: with the running statistics of BatchNorm."""
    statistics = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    return trainable(network) + statistics


# --- the network of the paper


def test_the_default_is_the_network_of_the_paper(keras: Any) -> None:
    with torch.device("meta"):
        network, headless = Xception(Architecture()), Xception(Architecture(head=()))
    assert trainable(network) == 22_855_952
    assert total(headless) == 20_861_480
    reference = keras.applications.Xception(weights=None, include_top=False)
    assert total(headless) == reference.count_params()
    assert total(network) == reference.count_params() + 2048 * 1000 + 1000
    counts = sorted(int(np.prod(weight.shape)) for weight in reference.trainable_weights)
    assert sorted(parameter.numel() for parameter in headless.parameters()) == counts
    named = {layer.name for layer in reference.layers if layer.name.startswith("block")}
    ours = {name for name, _ in headless.named_children()}
    # A pool and the ReLU in front of a strided block's first convolution are layers in both; what
    # Keras leaves unnamed (shortcuts, sums) has our own names.
    assert named <= ours
    assert all(
        "shortcut" in name or name.endswith("_add") or name == "avg_pool" for name in ours - named
    )


def test_the_default_works_at_every_size_that_keras_takes() -> None:
    network = Xception(Architecture(head=())).eval()
    seen: list[tuple[int, ...]] = []
    network.avg_pool.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    for size, last in ((71, 3), (128, 4)):
        with torch.inference_mode():
            assert network(torch.zeros(1, 3, size, size)).shape == (1, 2048)
        assert seen.pop() == (1, 2048, last, last)


# --- the whole family

WIDTH = st.integers(1, 6)
WIDTHS = st.lists(WIDTH, min_size=1, max_size=3).map(tuple)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    residual = draw(st.booleans())
    order = draw(st.sampled_from(["depthwise-first", "pointwise-first"]))
    activation = (
        "relu" if order == "pointwise-first" else draw(st.sampled_from(["none", "relu", "elu"]))
    )
    # Segments must divide every width of a spatial convolution, so widths are multiples of them.
    segments = draw(st.none() | st.integers(1, 3))
    unit = segments or 1
    widths = WIDTHS.map(lambda row: tuple(unit * width for width in row))
    stem = (draw(WIDTH), unit * draw(WIDTH))
    entry = tuple(draw(st.lists(widths, max_size=3)))
    middle = draw(st.lists(widths, max_size=2))
    if residual:
        last = entry[-1][-1] if entry else stem[-1]
        middle = [(*row[:-1], last) for row in middle]
    return Architecture(
        stem=stem,
        entry=entry,
        middle=tuple(middle),
        exit=draw(widths),
        tail=draw(widths),
        head=tuple(draw(st.lists(st.integers(1, 5), max_size=3))),
        segments=segments,
        order=order,
        intermediate_activation=activation,
        residual=residual,
        padding=draw(st.sampled_from(["keras", "timm"])),
        dropout=draw(st.sampled_from([0.0, 0.5])),
    )


def closed_form(a: Architecture) -> int:
    """Trainable parameters from the widths alone, by figure 5 of the paper; every convolution has
    2 more per output channel for its BatchNorm."""
    count = 3 * 9 * a.stem[0] + 2 * a.stem[0] + a.stem[0] * 9 * a.stem[1] + 2 * a.stem[1]
    width = a.stem[1]
    strided = [True] * len(a.entry) + [False] * len(a.middle) + [True]
    blocks = [*a.entry, *a.middle, a.exit]
    for block, strides in zip(blocks, strided, strict=True):
        if a.residual and strides:
            count += width * block[-1] + 2 * block[-1]
        for out in block:
            count += separable(a, width, out)
            width = out
    for out in a.tail:
        count += separable(a, width, out)
        width = out
    for out in a.head:
        count += (width + 1) * out
        width = out
    return count


def separable(a: Architecture, width: int, out: int) -> int:
    spatial = width if a.order == "depthwise-first" else out
    inputs_of_each = 1 if a.segments is None else spatial // a.segments
    return spatial * inputs_of_each * 9 + width * out + 2 * out


def test_the_closed_form_itself_gives_the_papers_count() -> None:
    assert closed_form(Architecture()) == 22_855_952


@quick(200)
@given(a=architectures())
def test_an_architecture_knows_its_parameters(a: Architecture) -> None:
    assert a.parameters == closed_form(a)
    with torch.device("meta"):
        assert a.parameters == trainable(Xception(a))


def test_a_network_of_terabytes_is_refused_before_anything_is_allocated() -> None:
    """Every field within its own bound: 64 middle blocks of 8 layers of 8192 x 8192 weights."""
    with pytest.raises(
        ValidationError, match=r"35,\d{3},\d{3},\d{3} parameters, more than .* widths"
    ):
        Architecture(
            stem=(8192, 8192),
            entry=(),
            middle=((8192,) * 8,) * 64,
            exit=(8192,),
            tail=(8192,),
        )
    # One dense spatial convolution per layer instead of a depthwise one.
    wide = {"stem": (32, 4096), "entry": (), "middle": (), "exit": (4096,) * 3, "tail": (8,)}
    assert Architecture(**wide).parameters < 80_000_000
    with pytest.raises(ValidationError, match="more segments"):
        Architecture(**wide, segments=1)


def test_networks_up_to_the_bound_are_allowed() -> None:
    small = {"stem": (1, 1), "entry": (), "middle": (), "exit": (1,), "tail": (7628,)}
    fits = Architecture(**small, head=(65536,))
    assert MAX_PARAMETERS - 2 * 7629 * 65536 < fits.parameters <= MAX_PARAMETERS
    with pytest.raises(ValidationError, match="500,000,000"):
        Architecture(**{**small, "tail": (7629,)}, head=(65536,))


@quick(60)
@given(a=architectures(), height=st.integers(16, 40), width=st.integers(16, 40))
def test_shapes_parameters_and_determinism(a: Architecture, height: int, width: int) -> None:
    torch.manual_seed(0)
    network = Xception(a).eval()
    assert trainable(network) == closed_form(a)
    x = torch.randn(2, 3, height, width)
    seen: list[torch.Size] = []
    network.avg_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.inference_mode():
        first = network(x)
        assert torch.equal(first, network(x)), "an eval network is deterministic"
        alone = network(x[:1])
    assert first.shape == (2, a.head[-1] if a.head else a.tail[-1])
    assert a.classes == (a.head[-1] if a.head else None)
    torch.testing.assert_close(alone, first[:1], rtol=1e-4, atol=1e-5)
    assert seen[0] == (
        2,
        a.tail[-1],
        *(final_size(side, len(a.entry) + 1) for side in (height, width)),
    )


def final_size(side: int, strided_blocks: int) -> int:
    side = (side - 3) // 2 + 1 - 2  # the stem: 3x3/2 and 3x3, both without padding
    for _ in range(strided_blocks):
        side = -(-side // 2)
    return side


@quick(60)
@given(a=architectures())
def test_gradients_reach_every_parameter(a: Architecture) -> None:
    """With leaky ReLUs, since one that is dead by chance cuts a layer one channel wide, and in
    eval mode, since a BatchNorm in training takes the gradient of a lone weight away."""
    torch.manual_seed(1)
    network = Xception(a).eval()
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ELU):
                setattr(module, name, nn.LeakyReLU(0.1))
    network(torch.randn(2, 3, 33, 34)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_in_training_reach_everything() -> None:
    widths = {"stem": (8, 16), "entry": ((24, 24), (32, 32)), "middle": ((32, 32, 32),) * 2}
    for order, activation in (("depthwise-first", "none"), ("pointwise-first", "relu")):
        a = Architecture(
            **widths,
            exit=(32, 48),
            tail=(48, 64),
            head=(32, 10),
            order=order,
            intermediate_activation=activation,
        )
        torch.manual_seed(0)
        network = Xception(a).train()
        network(torch.randn(8, 3, 48, 48)).logsumexp(1).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


# --- the two steps of a separable convolution


def step(**settings: Any) -> SeparableConv2d:
    torch.manual_seed(0)
    architecture = Architecture(stem=(4, 4), entry=(), middle=(), exit=(4,), tail=(8,), **settings)
    return SeparableConv2d(SeparableSpec("sepconv", 4, 8), architecture)


def test_one_segment_is_a_dense_convolution() -> None:
    layer, x = step(segments=1), torch.randn(2, 4, 7, 6)
    assert layer.depthwise.weight.shape == (4, 4, 3, 3)
    dense = F.conv2d(x, layer.depthwise.weight, padding=1)
    # Followed by the pointwise convolution it is linear, so the pair is one dense 3x3 convolution.
    merged = torch.einsum(
        "op,pikl->oikl", layer.pointwise.weight[:, :, 0, 0], layer.depthwise.weight
    )
    torch.testing.assert_close(layer(x), layer.pointwise(dense))
    torch.testing.assert_close(layer(x), F.conv2d(x, merged, padding=1), rtol=1e-4, atol=1e-5)


def test_one_segment_per_channel_is_a_depthwise_convolution() -> None:
    by_number, by_default, x = step(segments=4), step(), torch.randn(2, 4, 7, 6)
    assert by_number.depthwise.weight.shape == (4, 1, 3, 3)
    assert torch.equal(by_number(x), by_default(x))
    for channel in range(4):
        alone = F.conv2d(
            x[:, channel : channel + 1], by_number.depthwise.weight[channel][None], padding=1
        )
        torch.testing.assert_close(by_number.depthwise(x)[:, channel : channel + 1], alone)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_a_segment_sees_only_its_own_channels(segments: int) -> None:
    layer, size = step(segments=segments), 4 // segments
    before = layer.depthwise(torch.zeros(1, 4, 5, 5))
    x = torch.zeros(1, 4, 5, 5)
    x[:, 0] = 1.0
    changed = (layer.depthwise(x) != before).any(dim=3).any(dim=2)[0]
    assert changed.tolist() == [channel < size for channel in range(4)]


@pytest.mark.parametrize(
    ("name", "function"), [("none", lambda x: x), ("relu", F.relu), ("elu", F.elu)]
)
def test_the_intermediate_activation_is_between_the_steps(name: str, function: Any) -> None:
    layer, x = step(intermediate_activation=name), torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(layer(x), layer.pointwise(function(layer.depthwise(x))))


def test_pointwise_first_has_a_relu_after_both_steps() -> None:
    layer = step(order="pointwise-first", intermediate_activation="relu")
    x = torch.randn(2, 4, 7, 6)
    assert layer.depthwise.weight.shape == (8, 1, 3, 3)
    torch.testing.assert_close(layer(x), layer.depthwise(F.relu(layer.pointwise(x))))

    a = Architecture(
        stem=(4, 8),
        entry=((8, 8),),
        middle=((8, 8, 8),),
        exit=(8, 8),
        tail=(8, 8),
        order="pointwise-first",
        intermediate_activation="relu",
    )
    network, inputs = Xception(a).eval(), []
    for module in network.modules():
        if isinstance(module, SeparableConv2d):
            module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].min().item()))
    with torch.inference_mode():
        network(torch.randn(2, 3, 40, 40))
    # The ReLU after the second step is behind its BatchNorm (and sum), in front of the next first
    # step. As in Keras, the tail begins at the bare sum of the block before it.
    separables = [spec.name for spec in a.separables()]
    assert {name for name, least in zip(separables, inputs, strict=True) if least < 0} == {
        f"{a.tail_name}_sepconv1"
    }


def test_without_residual_there_are_no_shortcuts() -> None:
    network = Xception(
        Architecture(
            stem=(4, 4), entry=((4,),), middle=((5,),), exit=(4,), tail=(4,), residual=False
        )
    )
    assert not [name for name, _ in network.named_children() if "shortcut" in name or "add" in name]


# --- max-pool padding


@quick(60)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_max_pool_is_keras_same(keras: Any, height: int, width: int, seed: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 3.0
    layer = keras.layers.MaxPooling2D(3, 2, padding="same", data_format="channels_last")
    expected = keras.ops.convert_to_numpy(layer(x.permute(0, 2, 3, 1).numpy()))
    ours = MaxPoolSame("keras")(x).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(ours, expected)


@quick(60)
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_max_pool_is_timms(height: int, width: int, seed: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) - 3.0
    assert torch.equal(MaxPoolSame("timm")(x), nn.MaxPool2d(3, 2, 1)(x))


def test_the_two_paddings_differ_at_even_sizes_only() -> None:
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(MaxPoolSame("keras")(x), MaxPoolSame("timm")(x))
    assert torch.equal(MaxPoolSame("keras")(x[..., :7, :7]), MaxPoolSame("timm")(x[..., :7, :7]))


# --- what is no member of the family


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"order": "pointwise-first"}, "intermediate_activation to 'relu'"),
        ({"middle": ((728, 700),)}, "block5 ends with 700 channels but its shortcut carries 728"),
        ({"entry": (), "middle": ((65,),)},
         "block2 ends with 65 channels but its shortcut carries 64"),
        ({"segments": 3}, "segments 3 does not divide the 64 channels .* of block2_sepconv1"),
        ({"segments": 64}, "segments 64 does not divide the 728 channels .* of block4_sepconv2"),
        ({"segments": 128, "order": "pointwise-first", "intermediate_activation": "relu"},
         "segments 128 does not divide the 728 channels .* of block4_sepconv1"),
        ({"segments": 0}, "segments"),
        ({"tail": ()}, "tail"),
        ({"exit": (0,)}, "exit"),
        ({"stem": (8,)}, "stem"),
        ({"stem": (8, 10 ** 9)}, "stem"),
        ({"middle": ((728,),) * 65}, "middle"),
        ({"head": (0,)}, "head"),
        ({"dropout": 1.0}, "dropout"),
        ({"bn_epsilon": 0.0}, "bn_epsilon"),
        ({"padding": "same"}, "padding"),
        ({"widths": 1}, "widths"),
    ],
)  # fmt: skip
def test_what_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Architecture(**settings)


def test_residual_widths_do_not_bind_without_residual() -> None:
    Architecture(middle=((728, 700),), residual=False)
    Architecture(segments=8)
    Architecture(segments=64, entry=((128, 128),), middle=((64, 128),), exit=(64,), tail=(64,))
