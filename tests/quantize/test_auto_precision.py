"""Exceptions chosen for a bound: few, the right ones, and the bound holds where it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow import minmax_plan, preprocess_of, random_images, run_torch, sqnr_db
from test_precision import RUNTIMES
from test_ptq import image_set
from test_sensitivity import planted
from torch import fx

from edgexception.errors import BadArtifact, GateFailed, UsageError
from edgexception.export.onnx_graph import to_onnx
from edgexception.model.graph import layers
from edgexception.quantize.auto_precision import choose_precision, dialects_for, load_times
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.precision import with_precision
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.simulate import simulate
from edgexception.recipe import AutoPrecision, PtqSpec

SIZE = (40, 40)
PIXELS = random_images(10, SIZE)
GRAPH = planted()
PLAN = minmax_plan(GRAPH, PIXELS, bits=7)  # no processor saturates
PLANTED = ["block3_sepconv2_depthwise", "block3_sepconv2_pointwise"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def choose(
    dialect: str = "onnxruntime", plan: QuantPlan = PLAN, graph: fx.GraphModule = GRAPH, **spec: Any
) -> QuantPlan:
    auto = AutoPrecision.model_validate(spec)
    return choose_precision(graph, graph, plan, auto, image_set(PIXELS), (DIALECTS[dialect],))


def executed_db(plan: QuantPlan, dialect: str) -> float:
    model = to_onnx(GRAPH, preprocess_of(SIZE), None, plan=plan, dialect=DIALECTS[dialect])
    return sqnr_db(run_torch(GRAPH, PIXELS), RUNTIMES[dialect](model, PIXELS))


def simulated_db(plan: QuantPlan, dialect: str) -> float:
    return sqnr_db(
        run_torch(GRAPH, PIXELS), run_torch(simulate(GRAPH, plan, DIALECTS[dialect]), PIXELS)
    )


@pytest.mark.parametrize("dialect", RUNTIMES)
def test_the_planted_layer_is_the_one_that_is_taken_out(dialect: str) -> None:
    planted_out = with_precision(GRAPH, PLAN, dict.fromkeys(PLANTED, "fp32"))
    before, after = (simulated_db(plan, dialect) for plan in (PLAN, planted_out))
    assert before < after - 3
    plan = choose(dialect, sqnr_db_min=after - 1)
    assert list(plan.precision) == PLANTED
    choice = plan.provenance.precision
    assert choice is not None
    assert choice.before.sqnr_db == pytest.approx(before)
    assert choice.after.sqnr_db == pytest.approx(after)
    assert [(s.unit, s.change) for s in choice.steps] == [("block3_sepconv2", "added")]
    assert (choice.images, choice.dialects) == (10, (dialect,))
    assert QuantPlan.model_validate_json(plan.to_json()) == plan


@pytest.mark.parametrize("dialect", RUNTIMES)
def test_the_bound_holds_where_the_network_is_executed(dialect: str) -> None:
    planted_out = with_precision(GRAPH, PLAN, dict.fromkeys(PLANTED, "fp32"))
    bound = simulated_db(planted_out, dialect) + 3
    plan = choose(dialect, sqnr_db_min=bound, exceptions_max=20)
    assert len(plan.precision) > 2
    assert executed_db(PLAN, dialect) < bound
    assert executed_db(plan, dialect) > bound - 0.05


def test_no_exception_is_kept_that_the_bound_holds_without() -> None:
    planted_out = with_precision(GRAPH, PLAN, dict.fromkeys(PLANTED, "fp32"))
    bound = simulated_db(planted_out, "onnxruntime") + 3
    plan = choose(sqnr_db_min=bound, exceptions_max=20)
    assert plan.provenance.precision is not None
    steps = plan.provenance.precision.steps
    added = [s.unit for s in steps if s.change == "added"]
    removed = {s.unit for s in steps if s.change == "removed"}
    assert {s.unit for s in steps if s.change != "added"} == set(added[:-1])
    kept = [unit for unit in added if unit not in removed]
    of = {u: [n for n in layers(GRAPH) if n == u or n.startswith(f"{u}_")] for u in kept}
    assert set(plan.precision) == {name for names in of.values() for name in names}
    last = steps[len(added) :]
    assert all((s.measured.sqnr_db or 0) < bound for s in last if s.change == "kept")


def test_a_bound_that_holds_needs_no_exception() -> None:
    plan = choose(sqnr_db_min=5.0, agreement_min=0.0)
    assert plan.precision == {}
    assert plan.provenance.precision is not None
    assert plan.provenance.precision.steps == ()


def test_agreement_is_a_bound_too() -> None:
    exact = run_torch(GRAPH, PIXELS).argmax(1)
    plan = choose(agreement_min=1.0, exceptions_max=20)
    quantized = run_torch(simulate(GRAPH, plan, DIALECTS["onnxruntime"]), PIXELS)
    assert np.array_equal(quantized.argmax(1), exact)


def test_a_bound_out_of_reach_is_refused_with_the_best() -> None:
    fault = r"sqnr_db_min 90 cannot be reached with 2 exceptions; the best is (\d+\.\d) dB"
    with pytest.raises(GateFailed, match=fault + r".*block3_sepconv2.*exceptions_max") as error:
        choose(sqnr_db_min=90.0, exceptions_max=2)
    best = float(str(error.value).partition("best is ")[2].partition(" dB")[0])
    assert simulated_db(PLAN, "onnxruntime") + 3 < best < 90


def test_the_worst_dialect_counts() -> None:
    auto = AutoPrecision(sqnr_db_min=5.0)
    both = (DIALECTS["onnxruntime"], DIALECTS["openvino"])
    plan = choose_precision(GRAPH, GRAPH, PLAN, auto, image_set(PIXELS), both)
    assert plan.provenance.precision is not None
    worst = min(simulated_db(PLAN, d.name) for d in both)
    assert plan.provenance.precision.before.sqnr_db == pytest.approx(worst)
    assert [d.name for d in dialects_for(PLAN, ())] == ["onnxruntime", "openvino"]
    assert [d.name for d in dialects_for(PLAN, ["openvino", "openvino"])] == ["openvino"]


def test_costs_change_what_is_taken_first(tmp_path: Path) -> None:
    """The planted layer made a thousand times as dear as any other is not the first any more."""
    times = dict.fromkeys(layers(GRAPH), 0.001) | dict.fromkeys(PLANTED, 1e6)
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times))
    bound = simulated_db(PLAN, "openvino") + 0.3
    plan = choose("openvino", sqnr_db_min=bound, times=path, exceptions_max=20)
    assert plan.provenance.precision is not None
    assert plan.provenance.precision.steps[0].unit != "block3_sepconv2"
    assert choose("openvino", sqnr_db_min=bound).provenance.precision.steps[0].unit == (  # type: ignore[union-attr]
        "block3_sepconv2"
    )
    path.write_text(json.dumps({"predictions": 1.0}))
    with pytest.raises(BadArtifact, match=r"times\.json: has no time of layer block1_conv1 \("):
        choose("openvino", sqnr_db_min=bound, times=path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": "1"}', '{"a": 0}', '{"a": NaN}', '{"a": true'])
def test_a_table_of_times_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(BadArtifact, match=r"times\.json"):
        load_times(path)


def test_tensorrt_gets_half_precision() -> None:
    plan = minmax_plan(GRAPH, PIXELS, symmetric=True)
    bound = simulated_db(plan, "tensorrt") + 2
    chosen = choose("tensorrt", plan, sqnr_db_min=bound)
    assert set(chosen.precision.values()) == {"fp16"}


# --- through quantize_ptq


def ptq(**precision: Any) -> QuantPlan:
    spec = PtqSpec.model_validate(
        {
            "method": "ptq",
            "activations": "symmetric",
            "equalization": False,  # which rewrites the weights of float layers, too
            "precision": precision,
        }
    )
    result = quantize_ptq(GRAPH, spec, image_set(PIXELS), 8)
    for name in result.plan.precision:
        layer, trained = layers(result.graph)[name], layers(GRAPH)[name]
        assert torch.equal(layer.weight, trained.weight)
        assert (layer.bias is None) == (trained.bias is None)
        assert trained.bias is None or torch.equal(layer.bias, trained.bias)
    return result.plan


def test_ptq_keeps_named_layers_in_float_with_their_trained_numbers() -> None:
    plan = ptq(fp32=["block3_sepconv2"], fp16=["predictions"])
    assert plan.precision == {**dict.fromkeys(PLANTED, "fp32"), "predictions": "fp16"}
    spec = PtqSpec(method="ptq", equalization=False)
    int8 = quantize_ptq(GRAPH, spec, image_set(PIXELS), 8).graph
    corrected, trained = (layers(g)[PLANTED[1]].bias for g in (int8, GRAPH))
    assert not torch.equal(corrected, trained)  # else nothing was given back above
    assert not set(plan.precision).intersection(plan.weights)


def test_ptq_refuses_unknown_names_before_it_looks_at_an_image() -> None:
    spec = PtqSpec.model_validate({"method": "ptq", "precision": {"fp32": ["block33"]}})
    with pytest.raises(UsageError, match=r"precision.fp32: 'block33' is no layer"):
        quantize_ptq(GRAPH, spec, None, 8)  # type: ignore[arg-type]


def test_ptq_chooses() -> None:
    plan = ptq(auto={"sqnr_db_min": 20.0, "exceptions_max": 20})
    assert plan.provenance.precision is not None
    assert plan.provenance.precision.after.sqnr_db >= 20.0  # type: ignore[operator]
    assert plan.provenance.precision.dialects == ("onnxruntime", "openvino", "tensorrt")
