"""How many calibration images each range method needs: SQNR and changed predictions by set size.

    python tests/benchmarks/calibration_size.py RECIPE [--images N] [--sizes 16,64,256,1024]
                                                [--ranges METHOD,...] [--plain]

Quantizes a recipe's network with `ranges: auto` and with every fixed method, on the first 16, 64,
... images of the recipe's calibration source (as many as are there), and prints a Markdown table:
symmetric activations, simulated as the tensorrt dialect computes them, against the float network on
the first N evaluation images. All else is as the recipe's `quantize` section says; with `--plain`
there is nothing else: no equalization, no bias correction, nearest levels.

A recipe that trains its network trains it here, too; `--model build/NAME/model.safetensors` takes
the one that `edgex run` left instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from edgexception.bench.accuracy import fidelity
from edgexception.calibration import load_calibration_manifest
from edgexception.data import open_calibration, open_evaluation
from edgexception.imageset import ImageSet, first_images
from edgexception.model.checkpoint import TrainedModel, load_checkpoint
from edgexception.model.graph import inference_graph, to_graph_input
from edgexception.pipeline import run
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.simulate import simulate
from edgexception.recipe import PtqSpec, QatSpec, Recipe
from edgexception.recipe_data import CalibrationSpec
from edgexception.recipe_file import load_recipe
from edgexception.sources import list_source

METHODS = get_args(PtqSpec.model_fields["ranges"].annotation)
BATCH = 8
PLAIN = {"equalization": False, "bias_correction": False, "rounding": "nearest"}


def network_of(recipe: Recipe, model: Path | None) -> TrainedModel:
    """Load the recipe's network, and train it first if there is none yet."""
    if model is None:
        out = Path("build/calibration-size") / recipe.name
        run(recipe, out, "import")
        model = out / "model.safetensors"
    return load_checkpoint(model)


def available(spec: CalibrationSpec) -> int:
    """Return how many calibration images a recipe's source has."""
    manifest = spec.manifest
    photos = load_calibration_manifest(manifest).photos if manifest else None
    return len(photos or list_source(spec.source).entries) * spec.crops_per_photo


def sizes_of(asked: Sequence[int], most: int) -> list[int]:
    """Return the sizes that can be had, and say aloud where one cannot."""
    for size in asked:
        if size > most:
            print(f"{size} calibration images are asked for, and {most} are there", file=sys.stderr)
    return sorted({min(size, most) for size in asked})


def logits_of(graph: fx.GraphModule, images: ImageSet) -> NDArray[np.float32]:
    """Run images through a graph."""
    with torch.inference_mode():
        batches = (to_graph_input(torch.from_numpy(batch)) for batch in images.batches(BATCH))
        return np.concatenate([graph(batch).numpy() for batch in batches])


def main() -> None:
    """Print the table of one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--sizes", default="16,64,256,1024")
    parser.add_argument("--ranges", default=",".join(METHODS))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--model", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    trained = network_of(recipe, arguments.model)
    graph = inference_graph(trained.network, trained.preprocess)
    labelled, evaluation = open_evaluation(recipe.evaluation, trained.preprocess, trained.classes)
    evaluation = first_images(evaluation, arguments.images)
    sizes = sizes_of(
        [int(size) for size in arguments.sizes.split(",")], available(recipe.calibration)
    )
    spec = recipe.calibration.model_copy(update={"images": sizes[-1]})
    calibration = open_calibration(spec, trained.preprocess, evaluation=labelled)
    base = recipe.quantize.ptq if isinstance(recipe.quantize, QatSpec) else recipe.quantize
    floats = logits_of(graph, evaluation)
    threads = torch.get_num_threads()
    print(f"{recipe.name}, {len(evaluation)} evaluation images, {threads} threads\n")
    print("| ranges | calibration images | SQNR | changed | seconds |\n|---|--:|--:|--:|--:|")
    for method in arguments.ranges.split(","):
        changes = {
            "ranges": method,
            "activations": "symmetric",
            **(PLAIN if arguments.plain else {}),
        }
        asked = base.model_copy(update=changes)
        for size in sizes:
            start = time.monotonic()
            result = quantize_ptq(graph, asked, first_images(calibration, size), weight_bits=8)
            seconds = time.monotonic() - start
            simulated = simulate(result.graph, result.plan, DIALECTS["tensorrt"])
            found = fidelity(floats, logits_of(simulated, evaluation))
            changed = found.agreement.trials - found.agreement.successes
            print(
                f"| {method} | {size} | {found.sqnr_db:.2f} dB | {changed} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
