"""The stages from a trained network to the ONNX seam, and the comparison of what was exported.

A stage's key holds everything that its result depends on: the digests of what it reads, its
section of the recipe, and the versions of the libraries and of the machine that do the work. What
needs torch is imported inside a stage, so that a run with nothing left to do does not load it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgexception.ability import Reader
from edgexception.artifacts import Artifact, sha256_file
from edgexception.bench.protocol import Engine, build_engine, run_images
from edgexception.calibration import write_calibration_manifest
from edgexception.device import Progress
from edgexception.errors import BadArtifact, UsageError
from edgexception.imageset import ImageSet
from edgexception.model_stages import load_model
from edgexception.recipe import PtqSpec
from edgexception.recipe_data import CalibrationSpec
from edgexception.report.assemble import compare
from edgexception.targets import Form, load_dialects
from edgexception.workshop import Workshop, versions, write_json

if TYPE_CHECKING:
    from torch import fx

    from edgexception.model.checkpoint import TrainedModel
    from edgexception.quantize.half import FloatTypes
    from edgexception.quantize.plan import QuantPlan
    from edgexception.quantize.ptq import Quantized

TORCH_BATCH = 8
FLOAT_PARITY_DB = 60.0
"""Least SQNR of an exported float network as a runtime executes it, against torch."""


def quantize(
    shop: Workshop,
    model: Artifact,
    spec: PtqSpec,
    calibration: CalibrationSpec,
    images: ImageSet,
    bits: int,
    dialects: tuple[str, ...],
) -> Artifact:
    """Quantize after training: `plan.json`, `weights.safetensors` and `calibration.json`.

    `dialects` are those in which an `auto` precision must hold.
    """
    auto = spec.precision.auto if spec.precision else None

    def write(folder: Path) -> None:
        from edgexception.model.graph import inference_graph
        from edgexception.quantize.ptq import quantize_ptq
        from edgexception.train.state import Keeper

        trained = load_model(model)
        graph = inference_graph(trained.network, trained.preprocess)

        def report(what: str, done: int, total: int, left_s: float) -> None:
            shop.progress(Progress(what, done, total, left_s))

        keeper = Keeper(shop.unfinished)
        result = quantize_ptq(graph, spec, images, bits, report, dialects, keeper)
        write_quantized(result, folder)
        write_calibration_manifest(
            folder / "calibration.json",
            sorted({(s.photo.name, s.photo.sha256) for s in images.samples}),
            chosen="the photos that this plan was calibrated on",
            seed=calibration.seed,
            crops_per_photo=calibration.crops_per_photo,
        )

    inputs = {
        "model": model.digest,
        "calibration": images.digest,
        "manifest": calibration.model_dump(include={"seed", "crops_per_photo"}),
        "spec": spec.model_dump(exclude={"precision": {"auto": {"times"}}}),
        "weight_bits": bits,
        "dialects": dialects if auto else None,
        "times": _digest(auto.times) if auto and auto.times else None,
        "versions": versions("torch", "nncf"),
    }
    return shop.once("quantize", f"{spec.method}, {len(images)} images", inputs, write)


def write_quantized(result: Quantized, folder: Path) -> None:
    """Write `plan.json` and `weights.safetensors`."""
    from safetensors.torch import save_file

    state = {name: t.contiguous() for name, t in result.graph.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    (folder / "plan.json").write_text(result.plan.to_json() + "\n")


def _digest(times: Path) -> str:
    try:
        return sha256_file(times)
    except OSError as error:
        raise UsageError(
            f"quantize.precision.auto.times: {times} cannot be read ({error.strerror}); name a "
            "JSON file"
        ) from error


def sensitivity(
    shop: Workshop, model: Artifact, quantized: Artifact, images: ImageSet, dialect: str
) -> Artifact:
    """Measure what each edge and weight of the quantized network costs: `sensitivity.json`."""

    def write(folder: Path) -> None:
        import torch

        from edgexception.model.graph import inference_graph
        from edgexception.quantize.dialects import DIALECTS
        from edgexception.quantize.sensitivity import sensitivity as measure

        def report(what: str, done: int, total: int, left_s: float) -> None:
            shop.progress(Progress(what, done, total, left_s))

        loaded = load_model(model)
        trained = inference_graph(loaded.network, loaded.preprocess)
        graph = inference_graph(loaded.network, loaded.preprocess)
        plan = load_quantized(graph, quantized)
        start = time.monotonic()
        table = measure(graph, plan, DIALECTS[dialect], images, report, trained)
        facts = {"seconds": round(time.monotonic() - start, 1), "threads": torch.get_num_threads()}
        write_json(folder / "sensitivity.json", {**asdict(table), **facts})

    inputs = {
        "model": model.digest,
        "quantized": quantized.digest,
        "images": images.digest,
        "dialect": dialect,
        "versions": versions("torch"),
    }
    return shop.once("sensitivity", f"{dialect}, {len(images)} images", inputs, write)


def export(
    shop: Workshop,
    model: Artifact,
    quantized: Artifact | None,
    form: Form,
    batch: int | None,
    images: ImageSet | None,
    sparse: tuple[str, ...] = (),
) -> Artifact:
    """Write a network in one form: `model.onnx`, and `types.json` on its float16 nodes.

    `quantized` is None for forms without INT8. Where the form has float16 nodes, `images` show
    which tensors stay within its range. The layers of `sparse` must be 2:4 as written.
    """
    looked_at = images if form.dialect and "fp16" in _float_layers(form) else None

    def write(folder: Path) -> None:
        from edgexception.export.onnx_graph import to_onnx
        from edgexception.export.sparse import check_sparse
        from edgexception.quantize.dialects import DIALECTS

        trained = load_model(model)
        graph, plan = _graph_and_plan(trained, quantized)
        types = _types(shop, graph, plan, form, looked_at, folder)
        proto = to_onnx(
            graph,
            trained.preprocess,
            trained.classes,
            plan=plan,
            dialect=None if plan is None else DIALECTS[form.dialect],
            types=types,
            batch=batch,
        )
        (folder / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        check_sparse(folder / "model.onnx", sparse)

    inputs = {
        "model": model.digest,
        "quantized": None if quantized is None else quantized.digest,
        "form": form.name,
        "images": None if looked_at is None else looked_at.digest,
        "batch": batch,
        "sparse": sparse,
        "versions": versions("torch", "onnx"),
    }
    return shop.once("export", form.name, inputs, write)


def _float_layers(form: Form) -> tuple[str, ...]:
    return load_dialects()[form.dialect].float_layers


def _types(
    shop: Workshop,
    graph: fx.GraphModule,
    plan: QuantPlan | None,
    form: Form,
    images: ImageSet | None,
    folder: Path,
) -> FloatTypes:
    """Decide the float types of a graph and write them down: `types.json`."""
    import torch

    from edgexception.model.graph import to_graph_input
    from edgexception.quantize.half import MARGIN, peaks_of, type_graph

    asked = form.half or (plan is not None and "fp16" in plan.precision.values())
    peaks = None
    if asked:
        batches = () if images is None else images.batches(TORCH_BATCH)
        names = () if images is None else [sample.name for sample in images.samples]
        shop.progress(Progress("ranges for float16", 0, 1, None))
        peaks = peaks_of(graph, (to_graph_input(torch.from_numpy(b)) for b in batches), names)
    types = type_graph(graph, plan, "fp16" if form.half else "fp32", peaks)
    facts = {
        "fp16": sorted(types.half),
        "fp32": types.kept,
        "margin": MARGIN,
        "images": len(images) if images is not None and asked else None,
        "peaks": peaks,
    }
    write_json(folder / "types.json", facts)
    return types


def _types_of(exported: Artifact) -> FloatTypes:
    from edgexception.quantize.half import FloatTypes

    facts = json.loads(exported.file("types.json").read_bytes())
    return FloatTypes(frozenset(facts["fp16"]), facts["fp32"])


def _graph_and_plan(
    trained: TrainedModel, quantized: Artifact | None
) -> tuple[fx.GraphModule, QuantPlan | None]:
    from edgexception.model.graph import inference_graph

    graph = inference_graph(trained.network, trained.preprocess)
    return graph, None if quantized is None else load_quantized(graph, quantized)


def load_quantized(graph: fx.GraphModule, quantized: Artifact) -> QuantPlan:
    """Give a network's inference graph its weights after quantization, and return the plan."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch import nn

    from edgexception.model.graph import layers
    from edgexception.quantize.plan import load_plan

    path = quantized.file("weights.safetensors")
    try:
        state = load_file(path)
        for name, layer in layers(graph).items():
            if layer.bias is None and f"{name}.bias" in state:  # equalization adds some
                layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]), requires_grad=False)
        graph.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise BadArtifact(
            f"{path}: does not hold this network's weights; remove {path.parent} to quantize again"
        ) from error
    return load_plan(quantized.file("plan.json"))


def reference(shop: Workshop, model: Artifact, images: ImageSet, what: str) -> Artifact:
    """Run the float network in torch: `images.npy` as devices get them, and `logits.npy`."""

    def write(folder: Path) -> None:
        from edgexception.model.graph import inference_graph

        trained = load_model(model)
        images.write_npy(folder / "images.npy")
        graph = inference_graph(trained.network, trained.preprocess)
        np.save(folder / "logits.npy", _torch_logits(shop, graph, folder / "images.npy"))

    inputs = {"model": model.digest, "images": images.digest, "versions": versions("torch")}
    return shop.once("reference", f"{what}, {len(images)} images", inputs, write)


def _torch_logits(shop: Workshop, graph: fx.GraphModule, images: Path) -> NDArray[np.float32]:
    import torch

    from edgexception.model.graph import to_graph_input

    pixels = np.load(images, mmap_mode="r", allow_pickle=False)
    logits = []
    start = time.monotonic()
    with torch.inference_mode():
        for first in range(0, len(pixels), TORCH_BATCH):
            batch = torch.from_numpy(np.array(pixels[first : first + TORCH_BATCH]))
            logits.append(graph(to_graph_input(batch)).numpy())
            done = first + len(batch)
            left = (time.monotonic() - start) / done * (len(pixels) - done)
            shop.progress(Progress("float network in torch", done, len(pixels), left))
    found = np.concatenate(logits)
    if not np.isfinite(found).all():
        image = int(np.argmin(np.isfinite(found).all(axis=1)))
        raise BadArtifact(
            f"the float network's logits of image {image} are not finite: its weights overflow "
            "there; check the preprocessing and the checkpoint"
        )
    return found


# --- the seam: what was exported is compared by number --------------------------------------------


def verify(
    shop: Workshop,
    model: Artifact,
    quantized: Artifact | None,
    exported: Artifact,
    images: Artifact,
    form: Form,
    reader: Reader,
    batch: int,
) -> Artifact:
    """Compare torch, its quantized simulation and a runtime on images: `parity.json`.

    `images` is a `reference` artifact, `batch` a size that the exported graph takes; where the
    reader does not run here, only the simulation is compared. Raises BadArtifact when the exported
    float network does not compute what torch computes.
    """
    runtime = reader.runtime

    def write(folder: Path) -> None:
        from edgexception.quantize.dialects import DIALECTS
        from edgexception.quantize.simulate import simulate, simulate_float

        floats = np.load(images.file("logits.npy"), allow_pickle=False)
        rows: dict[str, Any] = {"images": len(floats), "runtime": runtime}
        expected = floats
        graph, plan = _graph_and_plan(load_model(model), quantized)
        if form.dialect:
            types = _types_of(exported)
            simulated = (
                simulate_float(graph, types)
                if plan is None
                else simulate(graph, plan, DIALECTS[form.dialect], types)
            )
            expected = _torch_logits(shop, simulated, images.file("images.npy"))
            rows["simulated_vs_float"] = compare(floats, expected)
        if runtime is None or reader.not_run is not None:
            rows["skipped"] = reader.not_run
        else:
            with shop.store.scratch() as work:
                pixels = images.file("images.npy")
                executed = _executed(shop, exported, pixels, runtime, batch, work)
            rows["executed_vs_float"] = compare(floats, executed)
            rows["executed_vs_torch"] = compare(expected, executed)
            if form.name == "fp32":
                _check_float(rows["executed_vs_torch"]["sqnr_db"], runtime)
        write_json(folder / "parity.json", rows)

    inputs = {
        "model": model.digest,
        "quantized": None if quantized is None else quantized.digest,
        "exported": exported.digest,
        "images": images.digest,
        "form": form.name,
        "batch": batch,
        "not_run": reader.not_run,
        "machine": None if runtime is None else shop.identity(runtime),
        "versions": versions("torch"),
    }
    what = f"{form.name}, simulated only" if reader.not_run else f"{form.name} on {runtime}"
    return shop.once("verify", what, inputs, write)


def _check_float(sqnr: float | None, runtime: str) -> None:
    if sqnr is not None and sqnr < FLOAT_PARITY_DB:
        raise BadArtifact(
            f"the exported float network as {runtime} executes it differs from torch: "
            f"{sqnr:.1f} dB, at least {FLOAT_PARITY_DB:.0f} dB expected; do not use it, and "
            "report this with the checkpoint's architecture"
        )


def _executed(
    shop: Workshop, exported: Artifact, images: Path, runtime: str, batch: int, work: Path
) -> NDArray[np.float32]:
    threads = shop.machine.cpu.usable_cores
    model, built = exported.file("model.onnx"), work / "engine"
    gpus = shop.machine.runtimes[runtime].gpus
    sm = gpus[0].sm if gpus else None
    record = build_engine(
        runtime, model, batch, threads, shop.device, built, shop.progress, {"sm": sm}
    )
    engine = Engine("parity", runtime, built / record["engine"], batch, threads)
    return run_images(engine, images, shop.device, work / "run", shop.progress)
