"""Which step of post-training quantization brings how much: dB of the logits and points of top-1.

    python tests/benchmarks/ablation.py RECIPE [--images N] [--model PATH]

Quantizes a recipe's network on its calibration images, each time with one step more, and prints a
Markdown table: symmetric activations, simulated as the tensorrt dialect computes them, against the
float network on the first N evaluation images, with what the quantization took in float passes over
the calibration images.

A recipe that trains its network trains it here, too; `--model build/NAME/model.safetensors` takes
the one that `edgex run` left instead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from calibration_size import logits_of, network_of

from edgexception.bench.accuracy import fidelity
from edgexception.bench.paired import paired
from edgexception.data import open_calibration, open_evaluation
from edgexception.imageset import first_images
from edgexception.model.graph import inference_graph
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.ptq import quantize_ptq
from edgexception.quantize.simulate import simulate
from edgexception.recipe import PtqSpec
from edgexception.recipe_file import load_recipe

STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "extremes",
        {
            "ranges": "minmax",
            "equalization": False,
            "bias_correction": False,
            "rounding": "nearest",
        },
    ),
    ("least squared error", {"ranges": "mse"}),
    ("ranges by measured effect", {"ranges": "auto"}),
    ("+ equalization", {"equalization": True}),
    ("+ bias correction", {"bias_correction": True}),
    ("+ learned rounding", {"rounding": "learned"}),
)


def main() -> None:
    """Print the table of one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", type=Path, default=None)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    trained = network_of(recipe, arguments.model)
    graph = inference_graph(trained.network, trained.preprocess)
    labelled, evaluation = open_evaluation(recipe.evaluation, trained.preprocess, trained.classes)
    evaluation = first_images(evaluation, arguments.images)
    calibration = open_calibration(recipe.calibration, trained.preprocess, evaluation=labelled)
    floats = logits_of(graph, evaluation)
    start = time.monotonic()
    logits_of(graph, calibration)
    float_pass = time.monotonic() - start
    labels = labelled.labels[: len(evaluation)]
    print(
        f"{recipe.name}, {len(calibration)} calibration and {len(evaluation)} evaluation images, "
        f"{len(labels)} of them labelled; torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads; one float pass over the calibration images: {float_pass:.1f} s\n"
    )
    print("| step | SQNR | changed | top-1 | lost/gained | float passes |")
    print("|---|--:|--:|--:|--:|--:|", flush=True)
    asked: dict[str, Any] = {"method": "ptq", "activations": "symmetric"}
    for name, change in STEPS:
        asked |= change
        start = time.monotonic()
        result = quantize_ptq(graph, PtqSpec(**asked), calibration, weight_bits=8)
        passes = (time.monotonic() - start) / float_pass
        simulated = simulate(result.graph, result.plan, DIALECTS["tensorrt"])
        logits = logits_of(simulated, evaluation)
        near, pair = (
            fidelity(floats, logits),
            paired(floats[: len(labels)], logits[: len(labels)], labels),
        )
        changed = near.agreement.trials - near.agreement.successes
        right = (logits[: len(labels)].argmax(axis=1) == labels).mean()
        print(
            f"| {name} | {near.sqnr_db:.1f} dB | {changed} | {right:.2%} | "
            f"{pair.lost}/{pair.gained} | {passes:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
