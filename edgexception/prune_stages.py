"""The stages that prune: a plan, and the network that it leaves; what needs torch comes inside."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgexception.artifacts import Artifact
from edgexception.device import Progress
from edgexception.imageset import ImageSet
from edgexception.model_stages import card_of, load_model, training_report, write_model
from edgexception.prune.plan import (
    Importance,
    LayerShape,
    PlannedLatency,
    PrunePlan,
    changes,
    load_prune_plan,
)
from edgexception.recipe_prune import PruneSpec, RecoverySpec
from edgexception.report.pruning import effect_of
from edgexception.report.record import PruningEffect
from edgexception.stages import reference
from edgexception.workshop import Workshop, versions


def weigh_channels(
    shop: Workshop, model: Artifact, kind: Importance, images: ImageSet | None
) -> Artifact:
    """Measure how important channels are: `importance.safetensors`; some kinds look at `images`."""

    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        from edgexception.prune.importance import importance
        from edgexception.prune.structure import structure_of

        start = time.monotonic()

        def report(done: int, total: int) -> None:
            left = (time.monotonic() - start) / done * (total - done)
            shop.progress(Progress("importance of channels", done, total, left))

        trained = load_model(model)
        network, preprocess = trained.network, trained.preprocess
        structure = structure_of(network.architecture, preprocess.input_size)
        scores = importance(network, preprocess, structure, kind, images, report)
        save_file(scores, folder / "importance.safetensors")

    inputs = {
        "model": model.digest,
        "images": None if images is None else images.digest,
        "kind": kind,
        "versions": versions("torch"),
    }
    return shop.once("importance", kind, inputs, write)


@dataclass(frozen=True)
class Timed:
    """What a latency budget is planned with."""

    table: Artifact
    gain: float = 1.0
    """How much of what the steps' times save the network saves."""


def plan_pruning(
    shop: Workshop,
    model: Artifact,
    spec: PruneSpec,
    align: int,
    weighed: Artifact | None,
    timed: Timed | None = None,
    *,
    images: int | None,
    int8: bool,
) -> Artifact:
    """Choose the channels that stay, and the layers that become sparse: `prune.json`.

    `weighed` is None without a budget: then all channels stay. `images` is how many the importance
    was measured on. With `int8` a budget of size is one of INT8 weights.
    """

    def write(folder: Path) -> None:
        from safetensors.numpy import load_file

        from edgexception.prune.budget import PRICES, Price, share_left, solve
        from edgexception.prune.latency import LatencyTable
        from edgexception.prune.sparse import layers_to_thin
        from edgexception.prune.structure import structure_of

        trained = load_model(model)
        structure = structure_of(trained.network.architecture, trained.preprocess.input_size)
        prices = {**PRICES, "size": Price(partial(LayerShape.bytes_as, int8=int8))}
        if timed is not None:
            text = timed.table.file("latency.json").read_bytes()
            table = LatencyTable.model_validate_json(text)
            prices["latency"] = Price(table.price(), timed.gain)
        kept = {}
        if weighed is not None:
            scores = load_file(weighed.file("importance.safetensors"))
            kept = solve(structure, scores, spec.ranking, align, spec.budgets, prices)
        left = {name: share_left(structure, kept, prices[name]) for name in spec.budgets}
        latency = timed and PlannedLatency(
            engine=table.engine,
            threads=table.threads,
            gain=timed.gain,
            predicted=left["latency"],
        )
        plan = PrunePlan(
            kept=kept,
            layers=changes(structure, kept),
            importance=spec.importance,
            ranking=spec.ranking,
            align=align,
            budgets=spec.budgets,
            left=left,
            images=images,
            latency=latency,
            sparse=layers_to_thin(trained.network, structure, kept) if spec.sparsity else (),
        )
        (folder / "prune.json").write_text(plan.to_json() + "\n")

    inputs = {
        "model": model.digest,
        "importance": None if weighed is None else weighed.digest,
        "sparsity": spec.sparsity,
        "images": images,
        "ranking": spec.ranking,
        "align": align,
        "budgets": spec.budgets,
        "int8": int8,
        "latency": None if timed is None else [timed.table.digest, timed.gain],
        "versions": versions("torch"),
    }
    how = f"{spec.ranking}, by {spec.importance}" if weighed else "all channels stay"
    return shop.once("prune-plan", how, inputs, write)


def join_plans(shop: Workshop, first: Artifact, later: Artifact) -> Artifact:
    """Make one plan of the whole network of one and that of the network it leaves: `prune.json`."""

    def write(folder: Path) -> None:
        one, other = (load_prune_plan(plan.file("prune.json")) for plan in (first, later))
        (folder / "prune.json").write_text(one.then(other).to_json() + "\n")

    inputs = {"first": first.digest, "later": later.digest}
    return shop.once("prune-plan", "of the rounds so far", inputs, write)


def apply_pruning(
    shop: Workshop, model: Artifact, planned: Artifact, joined: Artifact | None = None
) -> Artifact:
    """Take the channels out: `model.safetensors` and `model.json`, as of an imported network.

    `joined` is the plan of all rounds, where others came before.
    """

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import TrainedModel
        from edgexception.prune.apply import pruned

        trained = load_model(model)
        plan = load_prune_plan(planned.file("prune.json"))
        in_all = load_prune_plan((joined or planned).file("prune.json"))
        (macs, macs_left), (parameters, parameters_left) = in_all.macs, in_all.parameters
        source = {
            **card_of(model).source,
            "pruned": f"{macs_left / macs:.1%} of {macs / 1e9:.3f} GMAC, "
            f"{parameters_left / parameters:.1%} of {parameters:,} parameters",
        }
        smaller = pruned(trained.network, plan)
        write_model(TrainedModel(smaller, trained.classes, trained.preprocess, source), folder)

    inputs = {
        "model": model.digest,
        "plan": planned.digest,
        "joined": None if joined is None else joined.digest,
        "versions": versions("torch", "safetensors"),
    }
    return shop.once("prune", "copied weights", inputs, write)


def recover_pruned(
    shop: Workshop,
    networks: tuple[Artifact, Artifact],
    planned: Artifact,
    spec: RecoverySpec,
    images: ImageSet,
) -> Artifact:
    """Train the pruned network, the unpruned one its teacher; the same files as of `prune`.

    `networks` are the unpruned one and the pruned one.
    """
    whole, smaller = networks

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import TrainedModel
        from edgexception.prune.recover import recover
        from edgexception.train.state import Keeper

        begun = load_model(smaller)
        teacher = load_model(whole).network.requires_grad_(False)
        keeper = Keeper(shop.unfinished)
        plan = load_prune_plan(planned.file("prune.json"))
        told = training_report(shop)
        sparse = bool(plan.sparse)
        network = recover(
            begun.network, teacher, spec, images, plan.kept, keeper, told, sparse=sparse
        )
        before = card_of(smaller).source
        steps = f"{spec.steps} steps on {len(images)} images"
        source = {
            **before,
            **({"sparsity": f"2:4 in {len(plan.sparse)} layers"} if sparse else {}),
            "recovered": ", then ".join(filter(None, (before.get("recovered"), steps))),
        }
        write_model(TrainedModel(network, begun.classes, begun.preprocess, source), folder)

    inputs = {
        "whole": whole.digest,
        "pruned": smaller.digest,
        "plan": planned.digest,
        "images": images.digest,
        "spec": spec.model_dump(exclude={"source"}),
        "versions": versions("torch", "safetensors"),
    }
    return shop.once("recover", f"{spec.steps} steps on {len(images)} images", inputs, write)


def pruning_effect(
    shop: Workshop,
    networks: tuple[Artifact, Artifact],
    images: ImageSet,
    labels: NDArray[np.integer[Any]] | None,
) -> PruningEffect:
    """Run the network before and after pruning in torch, and compare what they say."""
    before, after = (
        np.load(reference(shop, model, images, what).file("logits.npy"), allow_pickle=False)
        for model, what in zip(networks, ("unpruned", "for evaluation"), strict=True)
    )
    return effect_of(before, after, labels)
