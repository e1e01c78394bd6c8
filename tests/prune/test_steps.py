"""A network's steps: together they are the network, and each is one that a runtime can execute."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from narrow import deeper_architectures, preprocess_of, random_images, run_onnxruntime, run_openvino

from edgexception.architecture import Architecture
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.cost import macs_of
from edgexception.prune.steps import COPIES, Step, step_graph, steps_of
from edgexception.prune.structure import structure_of
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.nominal import nominal_plan

SIZE = (40, 37)


def own_macs(step: Step, inputs: int, outputs: int) -> float:
    """Return the multiply-accumulates of one copy of a step, without those that surround it."""
    preprocess = preprocess_of((40, 40)).model_copy(update={"input_size": step.size})
    around = 3 * inputs * step.size[0] * step.size[1]
    return (macs_of(step_graph(step, inputs, outputs), preprocess) - around) / COPIES


@settings(max_examples=10, deadline=None)
@given(deeper_architectures())
def test_the_steps_of_a_network_do_what_it_does(architecture: Architecture) -> None:
    structure = structure_of(architecture, SIZE)
    steps = steps_of(architecture, SIZE)
    layers = {layer.name: layer for layer in structure.layers}
    spatial = [name for name in layers if name.endswith("_depthwise")]
    assert {*steps, *spatial} == {*layers}
    widths = structure.widths
    found = sum(
        own_macs(step, widths[layers[name].inputs], widths[layers[name].outputs])
        for name, step in steps.items()
    )
    assert found == sum(layer.macs(widths) for layer in structure.layers)


def test_the_middle_flow_of_the_paper_is_one_step() -> None:
    steps = steps_of(Architecture(), (299, 299))
    middle = {
        f"block{block}_sepconv{number}_pointwise" for block in range(5, 13) for number in (1, 2, 3)
    }
    alike = {name for name, step in steps.items() if step == steps["block5_sepconv1_pointwise"]}
    assert alike == middle | {"block13_sepconv1_pointwise"}
    step = steps["block5_sepconv1_pointwise"]
    assert step == Step(
        kernel=1, stride=1, padding=0, size=(19, 19), then=("relu", "spatial depthwise")
    )


STEPS = [
    Step(kernel=1, stride=2, padding=0, size=(9, 8), then=("relu", "spatial depthwise")),
    Step(kernel=1, stride=1, padding=0, size=(8, 9), then=("pool keras",)),
    Step(kernel=1, stride=1, padding=0, size=(5, 5), then=("relu", "mean")),
    Step(kernel=0, stride=1, padding=0, size=(1, 1), then=("relu",)),
]


@pytest.mark.parametrize("dialect", ["", "onnxruntime", "openvino"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(step.then))
def test_runtimes_execute_every_step_in_float_and_in_int8(step: Step, dialect: str) -> None:
    graph = step_graph(step, 8, 16)
    proto = to_onnx(
        graph,
        preprocess_of((40, 40)).model_copy(update={"input_size": step.size}),
        None,
        plan=nominal_plan(graph, "asymmetric") if dialect else None,
        dialect=DIALECTS[dialect] if dialect else None,
        batch=1,
    )
    images = random_images(1, step.size)
    for run in (run_onnxruntime, run_openvino):
        logits = run(proto, images)
        assert logits.shape == (1, 16)
        assert np.isfinite(logits).all()
