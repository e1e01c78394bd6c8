"""2:4 sparse weights: which go, and that no stage after brings one back."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import SMALL, deeper_architectures, preprocess_of, random_images, random_network
from test_apply import plan_of
from torch import nn
from training import image_set

from edgexception.agent.placement import sparse_layers
from edgexception.architecture import Architecture
from edgexception.errors import BadArtifact, UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.export.sparse import check_sparse
from edgexception.model.graph import inference_graph, layers
from edgexception.model.sparsity import is_sparse
from edgexception.model.xception import Xception
from edgexception.prune.apply import pruned
from edgexception.prune.recover import recover
from edgexception.prune.refit import refit
from edgexception.prune.sparse import layers_to_thin, pointwise_layers, thinned
from edgexception.prune.structure import structure_of
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.equalize import Profile, apply_moves, propose
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.qat import quantize_qat
from edgexception.quantize.simulate import quantize_weight
from edgexception.recipe import PtqSpec, QatSpec
from edgexception.recipe_prune import RecoverySpec

SIZE = (36, 36)
IMAGES = image_set(random_images(12, SIZE))
X = torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(0))
KEPT = {"block3_sepconv2_pointwise": tuple(range(0, 16, 2))}


def dense_layers(network: Xception) -> list[str]:
    """Return the 1x1 convolutions that are not 2:4."""
    names = {name.replace(".", "_"): module for name, module in network.named_modules()}
    return [name for name in pointwise_layers(network) if not is_sparse(names[name].weight)]


def sparse_network() -> Xception:
    teacher = random_network(SMALL)
    network = pruned(teacher, plan_of(SMALL, KEPT))
    refit(network, teacher, KEPT, X, sparse=True)
    return network.requires_grad_(False)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_two_of_every_four_go(rows: int, fours: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * fours, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, 4 * fours, 1, 1, generator=generator)
    found = thinned(weight, x @ x.T)
    assert ((found != 0).view(rows, -1, 4).sum(dim=2) == 2).all()


def test_the_others_make_up_for_those_that_go() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 6, generator=generator) @ torch.randn(6, 400, generator=generator)
    x = mixed + 0.1 * torch.randn(16, 400, generator=generator)
    weight = torch.randn(8, 16, 1, 1, generator=generator)
    fours = weight.view(8, -1, 4)
    small = fours.abs().argsort(dim=2)[:, :, :2]
    largest = fours.scatter(2, small, 0.0).view(8, 16)
    power = (x @ x.T).double() + torch.eye(16)
    exact = weight.flatten(1) @ x
    errors = [
        float(((found @ x - exact) ** 2).sum())
        for found in (thinned(weight, power).flatten(1), largest)
    ]
    assert errors[0] < 0.6 * errors[1]


@settings(max_examples=5, deadline=None)
@given(deeper_architectures())
def test_every_1x1_convolution_of_the_family_becomes_sparse(architecture: Architecture) -> None:
    teacher = random_network(architecture)
    network = copy.deepcopy(teacher)
    refit(network, teacher, {}, X, sparse=True)
    assert dense_layers(network) == []
    structure = structure_of(architecture, SIZE)
    assert layers_to_thin(network, structure, {}) == pointwise_layers(network)


def test_widths_that_are_no_multiple_of_four_are_refused() -> None:
    structure = structure_of(SMALL, SIZE)
    kept = {"block3_sepconv1_pointwise": tuple(range(15))}
    message = (
        r"block3_sepconv2_pointwise has 15; the nearest possible is 12. Set prune.align to a mult"
    )
    with pytest.raises(UsageError, match=message):
        layers_to_thin(random_network(SMALL), structure, kept)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_recovery_leaves_zeros_zero_and_moves_the_others(ema: float) -> None:
    teacher = random_network(SMALL)
    spec = RecoverySpec(steps=5, batch_size=6, learning_rate=1e-2, weight_decay=0.1, ema=ema)
    fitted = sparse_network()
    network = pruned(teacher, plan_of(SMALL, KEPT))
    found = recover(network, teacher, spec, IMAGES, KEPT, sparse=True)
    assert dense_layers(found) == []
    weight, before = found.block5_sepconv1.pointwise.weight, fitted.block5_sepconv1.pointwise.weight
    assert not torch.equal(weight, before)
    dense = recover(pruned(teacher, plan_of(SMALL, KEPT)), teacher, spec, IMAGES, KEPT)
    assert dense_layers(dense) == list(pointwise_layers(dense)), "only what is sparse is held"


@pytest.mark.parametrize("bits", [7, 8])
def test_quantization_leaves_zeros_at_level_zero(bits: int, tmp_path: Path) -> None:
    network = sparse_network()
    graph = inference_graph(network, preprocess_of(SIZE))
    names = pointwise_layers(network)
    moves = propose(graph, Profile.of(graph, [torch.from_numpy(PIXELS)]))
    assert moves
    equalized = layers(apply_moves(graph, moves))
    assert all(is_sparse(equalized[name].weight) for name in names)
    ptq = quantize_ptq(graph, PtqSpec(method="ptq", activations="symmetric"), IMAGES, bits)
    spec = QatSpec(method="qat", steps=3, batch_size=6, learning_rate=0.5)
    qat = quantize_qat(graph, ptq, spec, IMAGES, DIALECTS["tensorrt"])
    for found in (ptq, qat):
        weights = {n: quantize_weight(la.weight, found.plan.weights[n]) for n, la in
                   layers(found.graph).items()}  # fmt: skip
        assert all(is_sparse(weights[name]) for name in names)
        exported(tmp_path, found.graph, found.plan)
        check_sparse(tmp_path / "model.onnx", names)
        assert sparse_layers(tmp_path / "model.onnx") == list(names)
    assert any(
        not torch.equal(layers(ptq.graph)[name].weight, layers(qat.graph)[name].weight)
        for name in names
    )


def test_a_weight_that_came_back_is_refused_at_export(tmp_path: Path) -> None:
    network = sparse_network()
    graph = inference_graph(network, preprocess_of(SIZE))
    names = pointwise_layers(network)
    exported(tmp_path, graph)
    check_sparse(tmp_path / "model.onnx", names)
    weight = layers(graph)["block3_sepconv2_pointwise"].weight
    weight.view(-1)[int((weight == 0).flatten().nonzero()[0])] = 0.1
    exported(tmp_path, graph)
    with pytest.raises(BadArtifact, match="layer block3_sepconv2_pointwise was pruned to 2:4"):
        check_sparse(tmp_path / "model.onnx", names)
    assert sparse_layers(tmp_path / "model.onnx") == [
        n for n in names if "block3_sepconv2" not in n
    ]


PIXELS = (IMAGES.image(0)[None].astype("float32") - 128).transpose(0, 3, 1, 2).copy()


def exported(folder: Path, graph: nn.Module, plan: object = None) -> None:
    dialect = None if plan is None else DIALECTS["tensorrt"]
    model = to_onnx(graph, preprocess_of(SIZE), None, plan=plan, dialect=dialect)
    onnx.save(model, folder / "model.onnx")
