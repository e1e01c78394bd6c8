"""What pruning.py compares, and with what: variants of a recipe, torch-pruning, rows of tables."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray

from edgexception.artifacts import sha256_file
from edgexception.bench.paired import paired
from edgexception.bench.protocol import Engine, build_engine, run_images
from edgexception.bench.statistics import LatencySummary, Times, ratio_of_medians, wilson
from edgexception.data import open_training
from edgexception.device import Device
from edgexception.model.checkpoint import TrainedModel, load_checkpoint, save_checkpoint
from edgexception.model.xception import Xception
from edgexception.pipeline import run
from edgexception.prune.apply import narrowed
from edgexception.prune.recover import recover
from edgexception.prune.structure import structure_of
from edgexception.recipe import CheckpointModel, Gates, Recipe
from edgexception.train.state import Keeper

Logits = NDArray[np.float32]
RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Network:
    """One network to compare: its graphs by runtime, and what it costs in float."""

    name: str
    graphs: Mapping[str, Path]
    macs: int
    parameters: int


# --- ours, by a recipe ----------------------------------------------------------------------------


def exported(name: str, recipe: Recipe, out: Path, *, int8: bool = False) -> Network:
    """Run a recipe up to its graphs. What was done before is not done again."""
    changes = {
        "quantize": recipe.quantize if int8 else None,
        "targets": recipe.targets if int8 else (),
        "export": recipe.export.model_copy(update={"dialects": ()}),
        "bench": None,
        "gates": Gates(),
    }
    report = run(recipe.model_copy(update=changes), out, "export").report
    graphs = {runtime: f"int8-{runtime}" if int8 else "fp32" for runtime in RUNTIMES}
    return Network(
        name,
        {runtime: (out / f"onnx/{graph}.onnx").resolve() for runtime, graph in graphs.items()},
        report.network.macs,
        report.network.parameters,
    )


def at_budget(recipe: Recipe, macs: float, steps: int, images: int) -> Recipe:
    """Return the recipe with another budget of MACs and a shorter recovery on its first images."""
    recovery = recipe.prune.recovery
    source = recovery.source.model_copy(update={"count": images})
    recovery = recovery.model_copy(update={"steps": steps, "source": source})
    prune = recipe.prune.model_copy(update={"macs": macs, "recovery": recovery})
    return recipe.model_copy(update={"prune": prune})


def in_rounds(recipe: Recipe, rounds: int) -> Recipe:
    """Return the recipe with its channels going in rounds, each with its part of the steps."""
    recovery = recipe.prune.recovery.model_copy(update={"rounds": rounds})
    prune = recipe.prune.model_copy(update={"recovery": recovery})
    return recipe.model_copy(update={"prune": prune})


def for_latency_alone(recipe: Recipe) -> Recipe:
    """Return the recipe with the least work that gives graphs of the same operators and shapes."""
    quick = {
        "ranges": "minmax", "rounding": "nearest", "equalization": False, "bias_correction": False,
    }  # fmt: skip
    changes = {
        "calibration": recipe.calibration.model_copy(update={"images": 8}),
        "prune": recipe.prune.model_copy(update={"recovery": None}),
        "quantize": recipe.quantize.model_copy(update=quick),
    }
    return recipe.model_copy(update=changes)


# --- torch-pruning's ------------------------------------------------------------------------------


def by_torch_pruning(recipe: Recipe, out: Path) -> Recipe:
    """Return a recipe of what torch-pruning makes of the recipe's network, at its budget.

    It recovers as ours does: the same teacher, images and steps, but with the weights that
    torch-pruning left.
    """
    spec = recipe.prune
    folder = out / "torch-pruning" / f"{spec.macs:g}-{spec.recovery.steps}"
    path = folder / "model.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(recipe.model_copy(update={"gates": Gates()}), out, "import")
        whole = load_checkpoint((out / "model.safetensors").resolve())
        size = whole.preprocess.input_size
        smaller = magnitude_pruned(whole.network, size, spec.macs, spec.align)
        images = open_training(spec.recovery.source, whole.preprocess, whole.classes)
        teacher = whole.network.requires_grad_(False)
        network = recover(smaller, teacher, spec.recovery, images, None, Keeper(folder))
        model = TrainedModel(network, whole.classes, whole.preprocess, {"format": "torch-pruning"})
        save_checkpoint(model, path)
    model = CheckpointModel(kind="checkpoint", path=path.resolve())
    return recipe.model_copy(update={"model": model, "prune": None})


def magnitude_pruned(
    network: Xception, input_size: tuple[int, int], macs: float, round_to: int
) -> Xception:
    """Return the largest network within a share of MACs that torch-pruning's pruner makes.

    As its documentation shows: GroupMagnitudeImportance of the L2 norm, one ratio for all layers.
    """
    whole = macs_of(network, input_size)
    low, high, found = 0.0, 1.0, None
    for _ in range(8):
        ratio = (low + high) / 2
        candidate = of_our_class(_at_ratio(network, input_size, ratio, round_to))
        if macs_of(candidate, input_size) <= macs * whole:
            high, found = ratio, candidate
        else:
            low = ratio
    if found is None:
        raise RuntimeError(f"torch-pruning leaves more than {macs:g} of the MACs at any ratio")
    return found


def _at_ratio(
    network: Xception, input_size: tuple[int, int], ratio: float, round_to: int
) -> Xception:
    """Let torch-pruning prune a copy of a network in place."""
    changed = copy.deepcopy(network).requires_grad_().eval()
    torch_pruning.pruner.BasePruner(
        changed,
        torch.zeros(1, 3, *input_size),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[changed.predictions],
        round_to=round_to,
    ).step()
    return changed


def of_our_class(changed: Xception) -> Xception:
    """Return a network with the weights of one whose layers were cut in place."""
    widths = {
        name.replace(".", "_"): module.weight.shape[0]
        for name, module in changed.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    smaller = Xception(narrowed(changed.architecture, widths)).eval()
    smaller.load_state_dict(changed.state_dict())
    return smaller


def macs_of(network: Xception, input_size: tuple[int, int]) -> int:
    """Return a network's multiply-accumulates for one image."""
    structure = structure_of(network.architecture, input_size)
    return sum(layer.macs(structure.widths) for layer in structure.layers)


# --- as executed ----------------------------------------------------------------------------------


def engines_of(network: Network, threads: int, device: Device, folder: Path) -> dict[str, Engine]:
    """Build a network's engines for batch 1, by runtime; equal graphs have equal keys."""
    engines = {}
    for runtime, graph in network.graphs.items():
        key = f"{sha256_file(graph)[:16]}-{runtime}"
        record = build_engine(runtime, graph, 1, threads, device, folder / key)
        engines[runtime] = Engine(key, runtime, folder / key / record["engine"], 1, threads)
    return engines


def logits_of(engine: Engine, pixels: Path, device: Device, kept: Path) -> Logits:
    """Return what an engine says of images, or said of them before: see the folder `kept`."""
    path = kept / f"{engine.key}-{sha256_file(pixels)[:16]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, run_images(engine, pixels, device, path.with_suffix("")))
    return np.load(path)


# --- rows -----------------------------------------------------------------------------------------


def accuracy_cells(before: Logits, after: Logits, labels: NDArray[np.int64]) -> str:
    """Return "top-1 | difference in points, 95% | lost/gained (p)" against another network."""
    right = wilson(int((after.argmax(axis=1) == labels).sum()), len(labels))
    pair = paired(before, after, labels)
    points = f"{100 * pair.difference:+.2f} ({100 * pair.low:+.2f} to {100 * pair.high:+.2f})"
    return f"{right.value:.2%} | {points} | {pair.lost}/{pair.gained} ({pair.p_value:.2g})"


def latency_cells(times: list[Times], reference: list[Times]) -> str:
    """Return "median ms | share of the reference's, 95%"; the share is of medians, by rounds."""
    summary, share = LatencySummary.of(times), ratio_of_medians(times, reference)
    noisy = ", noisy" if summary.noisy else ""
    return f"{summary.median_ms:.2f}{noisy} | {share.value:.3f} ({share.low:.3f}-{share.high:.3f})"
