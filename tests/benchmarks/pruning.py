"""What pruning costs and brings: accuracy against measured latency, and against torch-pruning.

    python tests/benchmarks/pruning.py [RECIPE] [--part target|speed|curve ...] [--budgets ...]
                                       [--macs M] [--steps N] [--rounds N] [--images N]
                                       [--judged N] [--out FOLDER]

The recipe names a trained network, a budget of MACs (`--macs` is another for the first two parts),
and the images of recovery. Three parts, each with a table of its own:

target  the recipe as it is: top-1 on all evaluation images before and after, and latency.
speed   pruned and INT8 at 299x299 against float32 of the unpruned network. Latency alone: the
        network was trained at another size, and ranges and rounding are the quick ones.
curve   every budget of `--budgets`, by us and by torch-pruning's magnitude pruner, both with the
        same recovery of `--steps` steps on the first `--images` images, judged on the first
        `--judged` evaluation images; with `--rounds` ours once more, the same steps in so many
        rounds. A reduced training: the same budget in `target` loses less.

Engines have batch 1 and all cores; those of one table are measured in turns, round by round.
Decisions are those of ONNX Runtime's engine. Results are kept in `--out`, build/pruning by default:
a second run trains nothing again, and a killed one goes on where it stopped. Recovery with
the recipe's 250 steps took about 15 minutes on a loaded Intel Xeon with AMX, `curve` with 40 steps
50 minutes on a loaded AMD EPYC, `speed` 8 minutes on an idle one.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from peers import at_size
from pruning_tools import (
    RUNTIMES,
    Network,
    accuracy_cells,
    at_budget,
    by_torch_pruning,
    engines_of,
    exported,
    for_latency_alone,
    in_rounds,
    latency_cells,
    logits_of,
)

from edgexception.bench.protocol import measure_latency
from edgexception.data import open_evaluation
from edgexception.device import local_device
from edgexception.pipeline import run
from edgexception.recipe import BenchSpec, Gates, Recipe
from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report

RECIPE = Path("recipes/fashion-mnist-pruned.yaml")
PARTS = ("target", "speed", "curve")
BUDGETS = (0.7, 0.5, 0.4, 0.3, 0.2)
SIDE = 299


def target(recipe: Recipe, arguments: argparse.Namespace) -> list[Network]:
    """Return the unpruned network and what the recipe makes of it."""
    return [whole(recipe, arguments), exported("pruned", recipe, arguments.out)]


def whole(recipe: Recipe, arguments: argparse.Namespace) -> Network:
    """Return the unpruned network."""
    return exported("unpruned", recipe.model_copy(update={"prune": None}), arguments.out)


def speed(recipe: Recipe, arguments: argparse.Namespace) -> list[Network]:
    """Return both at 299x299, and the pruned one in INT8."""
    recipe = for_latency_alone(at_size(recipe, SIDE))
    return [
        *target(recipe, arguments),
        exported("pruned, INT8", recipe, arguments.out, int8=True),
    ]


def curve(recipe: Recipe, arguments: argparse.Namespace) -> list[Network]:
    """Return the unpruned network, and for every budget ours and torch-pruning's."""
    networks = [whole(recipe, arguments)]
    for macs in arguments.budgets:
        reduced = at_budget(recipe, macs, arguments.steps, arguments.images)
        networks.append(exported(f"edgexception {macs:g}", reduced, arguments.out))
        if arguments.rounds > 1:
            name = f"edgexception {macs:g}, {arguments.rounds} rounds"
            networks.append(exported(name, in_rounds(reduced, arguments.rounds), arguments.out))
        theirs = by_torch_pruning(reduced, arguments.out)
        networks.append(exported(f"torch-pruning {macs:g}", theirs, arguments.out))
    return networks


def table(
    networks: list[Network], recipe: Recipe, report: Report, most: int | None, out: Path
) -> None:
    """Print a row for every network, against the first one; `most` images are judged,
    None is all.

    Accuracies come first, so that a kill while others are measured costs the latencies alone.
    """
    device, threads = local_device(), report.machine.cores
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        engines = [engines_of(net, threads, device, work) for net in networks]
        judged = [""] * len(networks)
        if most != 0:
            network = report.network
            labelled, _ = open_evaluation(recipe.evaluation, network.preprocess, network.classes)
            labelled = replace(labelled, samples=labelled.samples[:most])
            labelled.write_npy(work / "images.npy")
            logits = []
            for number, (net, built) in enumerate(zip(networks, engines, strict=True)):
                engine = built["onnxruntime"]
                logits.append(logits_of(engine, work / "images.npy", device, out / "logits"))
                judged[number] = accuracy_cells(logits[0], logits[-1], labelled.labels)
                print(f"{net.name}: {judged[number]}", flush=True)
        unique = {engine.key: engine for built in engines for engine in built.values()}
        spec = recipe.bench or BenchSpec()
        times = measure_latency(list(unique.values()), spec, device, work / "rounds")
    accuracy = "top-1 | difference in points (95%) | lost/gained (p) | " if most != 0 else ""
    print(f"\n| network | GMAC | M parameters | {accuracy}", end="")
    print(" | ".join(f"{runtime} ms | share of unpruned (95%)" for runtime in RUNTIMES), "|")
    print("|---" + "|--:" * (6 + 3 * (most != 0)) + "|")
    for net, cells, built in zip(networks, judged, engines, strict=True):
        first = engines[0]
        found = [latency_cells(times[built[r].key], times[first[r].key]) for r in RUNTIMES]
        row = [net.name, f"{net.macs / 1e9:.3f}", f"{net.parameters / 1e6:.1f}", cells, *found]
        print("|", " | ".join(cell for cell in row if cell), "|", flush=True)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--part", action="append", choices=PARTS, default=[])
    parser.add_argument("--macs", type=float, default=None)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--judged", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("build/pruning"))
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    if arguments.macs is not None:
        prune = recipe.prune.model_copy(update={"macs": arguments.macs})
        recipe = recipe.model_copy(update={"prune": prune})
    bare = recipe.model_copy(update={"prune": None, "gates": Gates()})
    report = run(bare, arguments.out, "import").report
    machine = report.machine
    names = ("torch", "onnxruntime", "openvino", "torch-pruning")
    print(
        f"{machine.cpu}, {machine.cores} threads; batch 1; "
        + ", ".join(f"{name} {version(name)}" for name in names)
    )
    judged = {"target": None, "speed": 0, "curve": arguments.judged}
    for part in arguments.part or PARTS:
        networks = {"target": target, "speed": speed, "curve": curve}[part](recipe, arguments)
        print(f"\n### {part}\n", flush=True)
        table(networks, recipe, report, judged[part], arguments.out)


if __name__ == "__main__":
    main()
