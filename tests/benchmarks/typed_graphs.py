"""What the typed forms of a network cost: dB of the logits, kernels and traffic in TensorRT-RTX.

    python tests/benchmarks/typed_graphs.py RECIPE [--model PATH] [--sm 89] [--keep FOLDER]

Quantizes a recipe's network on its calibration images (extremes, symmetric) and prints a Markdown
table. Every form is simulated on the calibration images against the float network, and, where
TensorRT-RTX is installed, built for a GPU of that compute capability (none is needed): kernels, and
what they read and write for one image, as its builder lists them. `--keep` leaves the ONNX files.

The last rows are forms that are not exported, to show why:

- residual Q/DQ: in INT8+FP16 every add reads its residual input (a block's own input, or what was
  pooled) through Q/DQ with the extremes of that tensor.
- residual Q/DQ, one scale: the sum and the ReLU that reads it share the sum's scale, too.
- depthwise in FP16: only the other convolutions are INT8.

`--model build/NAME/model.safetensors` takes the network that `edgex run` left, for a recipe that
trains.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from calibration_size import logits_of, network_of
from onnx import helper, numpy_helper
from torch import fx, nn

from edgexception.agent.protocol import AgentError
from edgexception.agent.runtimes import Options, load
from edgexception.bench.accuracy import fidelity
from edgexception.data import open_calibration
from edgexception.export.onnx_graph import to_onnx
from edgexception.imageset import ImageSet
from edgexception.model.graph import inference_graph, layers, module_of, to_graph_input
from edgexception.model.xception import Add, MaxPoolSame
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.half import FloatTypes, peaks_of, type_graph
from edgexception.quantize.plan import QuantPlan
from edgexception.quantize.precision import with_precision
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.simulate import simulate, simulate_float
from edgexception.recipe import PtqSpec
from edgexception.recipe_file import load_recipe

TENSORRT = DIALECTS["tensorrt"]
EXTREMES = PtqSpec(
    method="ptq",
    activations="symmetric",
    ranges="minmax",
    equalization=False,
    bias_correction=False,
)


class Form(NamedTuple):
    """A graph to simulate, and the same as ONNX."""

    name: str
    types: FloatTypes
    simulated: fx.GraphModule
    model: onnx.ModelProto


class _Levels(nn.Module):
    """A tensor on an INT8 grid without zero point."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x / self.scale).clamp(-128, 127) * self.scale


def main() -> None:
    """Print the table of one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--sm", type=int, default=89)
    parser.add_argument("--keep", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    trained = network_of(recipe, arguments.model)
    images = open_calibration(recipe.calibration, trained.preprocess, evaluation=None)
    graph = inference_graph(trained.network, trained.preprocess)
    floats = logits_of(graph, images)
    print(f"{len(images)} images, TensorRT-RTX for SM{arguments.sm}\n")
    print("| form | nodes in float32 | logit SQNR | ONNX | kernels | read and written |")
    print("|---|--:|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for form in _forms(graph, trained.preprocess, images):
            path = folder / f"{form.name.replace(' ', '-').replace('/', '').replace(',', '')}.onnx"
            path.write_bytes(form.model.SerializeToString(deterministic=True))
            noise = fidelity(floats, logits_of(form.simulated, images)).sqnr_db
            kernels = _kernels(path, arguments.sm, Path(scratch) / "engine")
            print(
                f"| {form.name} | {len(form.types.kept)} | "
                f"{'equal' if np.isinf(noise) else f'{noise:.1f} dB'} | "
                f"{path.stat().st_size / 1e6:.1f} MB | {kernels} |",
                flush=True,
            )


def _forms(graph: fx.GraphModule, preprocess: Any, images: ImageSet) -> Iterator[Form]:
    def written(plan: QuantPlan | None, types: FloatTypes) -> onnx.ModelProto:
        dialect = TENSORRT if plan else None
        source = quantized.graph if plan else graph
        return to_onnx(source, preprocess, None, plan=plan, dialect=dialect, types=types, batch=1)

    single = FloatTypes()
    quantized = quantize_ptq(graph, EXTREMES, images, 8)
    batches = [to_graph_input(torch.from_numpy(batch)) for batch in images.batches(8)]
    peaks = peaks_of(quantized.graph, batches)
    half = type_graph(graph, None, "fp16", peaks_of(graph, batches))
    yield Form("FP32", single, graph, written(None, single))
    yield Form("FP16", half, simulate_float(graph, half), written(None, half))
    plan, source = quantized.plan, quantized.graph
    for name, base in (("INT8+FP32", "fp32"), ("INT8+FP16", "fp16")):
        types = type_graph(source, plan, base, peaks)  # type: ignore[arg-type]
        yield Form(name, types, simulate(source, plan, TENSORRT, types), written(plan, types))
    yield _with_residuals("residual Q/DQ", source, plan, types, peaks, written(plan, types))
    shared = _sharing(source, plan, peaks)
    model = written(shared, types)
    yield _with_residuals("residual Q/DQ, one scale", source, shared, types, peaks, model)
    named = {name: "fp16" for name in layers(source) if name.endswith("_depthwise")}
    mixed = with_precision(source, plan, named)  # type: ignore[arg-type]
    types = type_graph(source, mixed, "fp16", peaks)
    simulated = simulate(source, mixed, TENSORRT, types)
    yield Form("depthwise in FP16", types, simulated, written(mixed, types))


def _residuals(graph: fx.GraphModule) -> dict[str, str]:
    """Return add -> the tensor that it reads beside a convolution's."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(module_of(graph, node), Add):
            main, other = node.args
            pooled = isinstance(module_of(graph, main), MaxPoolSame)
            found[node.name] = main.name if pooled else other.name
    return found


def _sharing(graph: fx.GraphModule, plan: QuantPlan, peaks: Mapping[str, float]) -> QuantPlan:
    """Return a plan where a sum and what reads it through a ReLU have one scale."""
    grids = dict(plan.activations)
    for node in graph.graph.nodes:
        if node.name in _residuals(graph):
            users = [user.name for user in node.users if user.op == "call_module"]
            for name in {node.name, *users}.intersection(grids):
                scale = peaks[node.name] / 127
                grids[name] = grids[name].model_copy(update={"scale": scale})
    return plan.model_copy(update={"activations": grids})


def _with_residuals(
    name: str,
    graph: fx.GraphModule,
    plan: QuantPlan,
    types: FloatTypes,
    peaks: Mapping[str, float],
    model: onnx.ModelProto,
) -> Form:
    """Put Q/DQ before the residual input of every add, in the simulation and in the ONNX graph."""
    simulated, written = simulate(graph, plan, TENSORRT, types), copy.deepcopy(model)
    nodes = {node.name: node for node in simulated.graph.nodes}
    for add, tensor in _residuals(graph).items():
        scale = float(np.float16(peaks[tensor] / 127))
        simulated.add_module(f"{add}_residual", _Levels(scale))
        with simulated.graph.inserting_before(nodes[add]):
            levels = simulated.graph.call_module(f"{add}_residual", (nodes[tensor],))
        nodes[add].replace_input_with(nodes[tensor], levels)
        _read_through_levels(written, add, tensor, scale)
    simulated.recompile()
    return Form(name, types, simulated, written)


def _read_through_levels(model: onnx.ModelProto, add: str, tensor: str, scale: float) -> None:
    names = [f"{add}_residual_{part}" for part in ("scale", "zero", "q", "dq")]
    for name, value in zip(names, (np.float16(scale), np.int8(0)), strict=False):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    (node,) = (n for n in model.graph.node if n.name == add)
    place = list(model.graph.node).index(node)
    node.input[list(node.input).index(tensor)] = names[3]
    pair = [
        helper.make_node("QuantizeLinear", [tensor, *names[:2]], [names[2]], name=names[2]),
        helper.make_node("DequantizeLinear", [names[2], *names[:2]], [names[3]], name=names[3]),
    ]
    for offset, inserted in enumerate(pair):
        model.graph.node.insert(place + offset, inserted)


def _kernels(path: Path, sm: int, engine: Path) -> str:
    try:
        record = load("tensorrt-rtx").build(path, Options(1, 1, sm), engine)
    except (AgentError, KeyError) as error:
        return f"not built: {error} | "
    found = record["inspection"]
    traffic = found["read_bytes"] + found["written_bytes"]
    return f"{sum(record['layers'].values())} | {traffic / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
