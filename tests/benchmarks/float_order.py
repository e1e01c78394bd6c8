"""How far apart two exact readings of one plan are that differ in the order of float sums alone.

    python tests/benchmarks/float_order.py OUT [--images N]

OUT is the folder of a run whose plan keeps layers in float32. Its quantized network is simulated
twice, float layers with float32 sums and with float64 sums, which is closer than any two runtimes
are: neither reading is wrong. The last bit of a float sum decides which of two levels a value
takes that lies between them, and the layers behind pass that on. No runtime can be expected to be
nearer to the simulation than the two are to one another.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgexception.artifacts import Store
from edgexception.bench.statistics import sqnr_db
from edgexception.data import open_evaluation
from edgexception.imageset import first_images
from edgexception.model.checkpoint import load_checkpoint
from edgexception.model.graph import inference_graph, to_graph_input
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.simulate import simulate
from edgexception.recipe_file import load_recipe
from edgexception.stages import load_quantized

BATCH = 8


class _Double(nn.Module):
    """A float32 layer with float64 sums."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.double()).float()


def logits_of(graph: fx.GraphModule, batches: list[torch.Tensor]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.concatenate([graph(batch).numpy() for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    out: Path = arguments.out
    trained = load_checkpoint((out / "model.safetensors").resolve())
    graph = inference_graph(trained.network, trained.preprocess)
    with Store(out / "store") as store:
        key = (out / "plan.json").resolve().parent.name
        plan = load_quantized(graph, store.get("quantize", key))
    evaluation = load_recipe(out / "recipe.yaml").evaluation
    _, images = open_evaluation(evaluation, trained.preprocess, trained.classes)
    chosen = first_images(images, arguments.images)
    batches = [to_graph_input(torch.from_numpy(batch)) for batch in chosen.batches(BATCH)]
    floats = logits_of(graph, batches)
    print(f"{len(chosen)} images, {len(plan.precision)} layers in float")
    for name, dialect in DIALECTS.items():
        if name == "tensorrt" and not plan.symmetric:
            continue
        simulated = simulate(graph, plan, dialect)
        single = logits_of(simulated, batches)
        for layer in plan.precision:
            simulated.set_submodule(layer, _Double(simulated.get_submodule(layer)))
        double = logits_of(simulated, batches)
        print(
            f"{name}: {sqnr_db(single, double):.1f} dB between float32 and float64 sums, "
            f"{sqnr_db(floats, single):.1f} dB between plan and float network"
        )


if __name__ == "__main__":
    main()
