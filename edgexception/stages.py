"""The stages of a run: each is done once per content of its inputs, and its result is an artifact.

A stage's key holds everything that its result depends on: the digests of what it reads, its
section of the recipe, and the versions of the libraries and of the machine that do the work. What
needs torch is imported inside a stage, so that a run with nothing left to do does not load it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgexception.artifacts import Artifact, Store, sha256_file, stage_key
from edgexception.bench.protocol import Engine, measure_latency, run_images
from edgexception.calibration import write_calibration_manifest
from edgexception.data import open_training
from edgexception.device import Device, ProbeRecord, Progress
from edgexception.errors import BadArtifact, UsageError
from edgexception.imageset import ImageSet
from edgexception.recipe import (
    BenchSpec,
    CalibrationSpec,
    CheckpointModel,
    ModelSpec,
    PtqSpec,
    TrainedHereModel,
)
from edgexception.report.assemble import compare
from edgexception.report.record import Network, StageLine

if TYPE_CHECKING:
    from torch import fx

    from edgexception.model.checkpoint import TrainedModel
    from edgexception.quantize.plan import QuantPlan

TORCH_BATCH = 8
FLOAT_PARITY_DB = 60.0
"""Least SQNR of an exported float network as a runtime executes it, against torch."""


@dataclass
class Workshop:
    """Where stages run: the store, the device with what it said of itself, and who listens."""

    store: Store
    device: Device
    machine: ProbeRecord
    tell: Callable[[StageLine], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
    done: list[StageLine] = field(default_factory=list)

    def once(
        self,
        stage: str,
        what: str,
        inputs: Mapping[str, Any],
        write: Callable[[Path], None],
    ) -> Artifact:
        """Return the stage's artifact for these inputs, and make it first if it is not there."""
        key = stage_key(stage, inputs)
        start = time.monotonic()
        artifact = self.store.get(stage, key)
        reused = artifact is not None
        if artifact is None:
            self.progress(Progress(f"{stage} {what}", 0, 1, None))
            artifact = self.store.publish(stage, key, inputs, write)
        seconds = round(time.monotonic() - start, 3)
        line = StageLine(stage=stage, what=what, key=key, reused=reused, seconds=seconds)
        self.done.append(line)
        self.tell(line)
        return artifact

    def identity(self, runtime: str) -> dict[str, Any]:
        """Return what a measurement or an engine of `runtime` on this device depends on."""
        return {
            "device": self.device.name,
            "arch": self.machine.arch,
            "cpu": self.machine.cpu.model,
            "flags": list(self.machine.cpu.flags),
            "runtime": runtime,
            "version": self.machine.runtimes[runtime].version,
        }


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, for a stage's key."""
    return {name: version(name) for name in packages}


def write_json(path: Path, value: object) -> None:
    """Write plain data as readable JSON."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


# --- left of the seam -----------------------------------------------------------------------------


def import_model(shop: Workshop, spec: ModelSpec) -> tuple[Artifact, Network]:
    """Read a checkpoint, or train the network: `model.safetensors` and `model.json`."""
    if isinstance(spec, CheckpointModel):
        artifact = _import_checkpoint(shop, spec)
    else:
        artifact = _train(shop, spec)
    return artifact, Network.model_validate_json(artifact.file("model.json").read_bytes())


def _import_checkpoint(shop: Workshop, spec: CheckpointModel) -> Artifact:
    if not spec.path.is_file():
        raise UsageError(f"{spec.path}: there is no such checkpoint file")

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import load_checkpoint

        model = load_checkpoint(spec.path, classes=spec.classes, preprocess=spec.preprocess)
        _write_model(model, folder)

    inputs = {
        "file": spec.path.name,
        "sha256": sha256_file(spec.path),
        "spec": spec.model_dump(exclude={"path"}),
        "versions": versions("torch", "h5py", "safetensors"),
    }
    return shop.once("import", spec.path.name, inputs, write)


def _train(shop: Workshop, spec: TrainedHereModel) -> Artifact:
    images = open_training(spec.source, spec.preprocess)

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import TrainedModel
        from edgexception.train import train

        def report(done: int, total: int, left_s: float, loss: float) -> None:
            shop.progress(Progress(f"training, loss {loss:.3f}", done, total, left_s))

        network = train(spec, images, report)
        source = {"format": "trained by recipe", "images": str(len(images))}
        _write_model(TrainedModel(network, images.classes, spec.preprocess, source), folder)

    inputs = {
        "images": images.digest,
        "spec": spec.model_dump(exclude={"source"}),
        "versions": versions("torch"),
    }
    return shop.once("train", f"{len(images)} images", inputs, write)


def _write_model(model: TrainedModel, folder: Path) -> None:
    from edgexception.model.checkpoint import save_checkpoint
    from edgexception.model.cost import cost_of
    from edgexception.model.graph import inference_graph

    save_checkpoint(model, folder / "model.safetensors")
    cost = cost_of(inference_graph(model.network, model.preprocess), model.preprocess)
    card = Network(
        classes=model.classes,
        preprocess=model.preprocess,
        source=model.source,
        parameters=sum(p.numel() for p in model.network.parameters()),
        macs=cost.macs,
    )
    (folder / "model.json").write_text(card.model_dump_json(indent=1) + "\n")


def _load(model: Artifact) -> TrainedModel:
    from edgexception.model.checkpoint import load_checkpoint

    return load_checkpoint(model.file("model.safetensors"))


def quantize(
    shop: Workshop,
    model: Artifact,
    spec: PtqSpec,
    calibration: CalibrationSpec,
    images: ImageSet,
) -> Artifact:
    """Post-training quantization: `plan.json`, `weights.safetensors` and `calibration.json`."""
    vnni = shop.machine.cpu.vnni or shop.machine.arch != "x86_64"
    bits = (8 if vnni else 7) if spec.weight_bits == "auto" else spec.weight_bits

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        from edgexception.model.graph import inference_graph
        from edgexception.quantize.ptq import quantize_ptq

        trained = _load(model)
        graph = inference_graph(trained.network, trained.preprocess)
        result = quantize_ptq(graph, spec, images, bits)
        state = {name: t.contiguous() for name, t in result.graph.state_dict().items()}
        save_file(state, folder / "weights.safetensors")
        (folder / "plan.json").write_text(result.plan.to_json() + "\n")
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
        "spec": spec.model_dump(),
        "weight_bits": bits,
        "versions": versions("torch", "nncf"),
    }
    return shop.once("quantize", f"{spec.method}, {len(images)} images", inputs, write)


def export(
    shop: Workshop, model: Artifact, quantized: Artifact | None, dialect: str, batch: int | None
) -> Artifact:
    """Write `model.onnx`: in float, or the quantized network in the words of `dialect`."""

    def write(folder: Path) -> None:
        from edgexception.export.dialects import DIALECTS
        from edgexception.export.onnx_graph import to_onnx

        trained = _load(model)
        graph, plan = _graph_and_plan(trained, quantized)
        proto = to_onnx(
            graph,
            trained.preprocess,
            trained.classes,
            plan=plan,
            dialect=None if plan is None else DIALECTS[dialect],
            batch=batch,
        )
        (folder / "model.onnx").write_bytes(proto.SerializeToString(deterministic=True))

    inputs = {
        "model": model.digest,
        "quantized": None if quantized is None else quantized.digest,
        "dialect": None if quantized is None else dialect,
        "batch": batch,
        "versions": versions("torch", "onnx"),
    }
    return shop.once("export", "fp32" if quantized is None else f"int8 {dialect}", inputs, write)


def _graph_and_plan(
    trained: TrainedModel, quantized: Artifact | None
) -> tuple[fx.GraphModule, QuantPlan | None]:
    from safetensors.torch import load_file

    from edgexception.model.graph import inference_graph
    from edgexception.quantize.plan import load_plan

    graph = inference_graph(trained.network, trained.preprocess)
    if quantized is None:
        return graph, None
    graph.load_state_dict(load_file(quantized.file("weights.safetensors")))
    return graph, load_plan(quantized.file("plan.json"))


def reference(shop: Workshop, model: Artifact, images: ImageSet, what: str) -> Artifact:
    """Run the float network in torch: `images.npy` as devices get them, and `logits.npy`."""

    def write(folder: Path) -> None:
        from edgexception.model.graph import inference_graph

        trained = _load(model)
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
    runtime: str,
    dialect: str,
) -> Artifact:
    """Compare torch, its quantized simulation and `runtime` on images: `parity.json`.

    `images` is a `reference` artifact. Raises BadArtifact when the exported float network does not
    compute what torch computes.
    """

    def write(folder: Path) -> None:
        from edgexception.export.dialects import DIALECTS
        from edgexception.quantize.simulate import simulate

        floats = np.load(images.file("logits.npy"), allow_pickle=False)
        rows: dict[str, Any] = {"images": len(floats)}
        expected = floats
        graph, plan = _graph_and_plan(_load(model), quantized)
        if plan is not None:
            simulated = simulate(graph, plan, DIALECTS[dialect])
            expected = _torch_logits(shop, simulated, images.file("images.npy"))
            rows["simulated_vs_float"] = compare(floats, expected)
        executed = _executed(shop, exported, images.file("images.npy"), runtime, folder)
        rows["executed_vs_float"] = compare(floats, executed)
        rows["executed_vs_torch"] = compare(expected, executed)
        sqnr = rows["executed_vs_torch"]["sqnr_db"]
        if plan is None and sqnr is not None and sqnr < FLOAT_PARITY_DB:
            raise BadArtifact(
                f"the exported float network as {runtime} executes it differs from torch: "
                f"{sqnr:.1f} dB, at least {FLOAT_PARITY_DB:.0f} dB expected; do not use it, and "
                "report this with the checkpoint's architecture"
            )
        write_json(folder / "parity.json", rows)

    inputs = {
        "model": model.digest,
        "quantized": None if quantized is None else quantized.digest,
        "exported": exported.digest,
        "images": images.digest,
        "dialect": dialect,
        "machine": shop.identity(runtime),
        "versions": versions("torch"),
    }
    what = f"{'fp32' if quantized is None else 'int8'} on {runtime}"
    return shop.once("verify", what, inputs, write)


def _executed(
    shop: Workshop, exported: Artifact, images: Path, runtime: str, folder: Path
) -> NDArray[np.float32]:
    threads = shop.machine.cpu.usable_cores
    out = folder / "engine"
    record = _call_build(shop, exported, runtime, 1, threads, out)
    engine = Engine("parity", runtime, out / record["engine"], 1, threads)
    logits = run_images(engine, images, shop.device, folder / "run", shop.progress)
    for name in ("engine", "run"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    return logits


# --- right of the seam ----------------------------------------------------------------------------


def build(
    shop: Workshop, exported: Artifact, runtime: str, batch: int, threads: int, what: str
) -> Artifact:
    """Build one engine on the device: the engine file and `build.json`."""

    def write(folder: Path) -> None:
        record = _call_build(shop, exported, runtime, batch, threads, folder)
        write_json(folder / "build.json", record)

    inputs = {
        "exported": exported.digest,
        "batch": batch,
        "threads": threads,
        "machine": shop.identity(runtime),
    }
    return shop.once("build", what, inputs, write)


def _call_build(
    shop: Workshop, exported: Artifact, runtime: str, batch: int, threads: int, out: Path
) -> dict[str, Any]:
    request = {"runtime": runtime, "model": "model.onnx", "batch": batch, "threads": threads}
    files = {"model.onnx": exported.file("model.onnx")}
    return shop.device.call("build", request, files, out, shop.progress)


def evaluate(
    shop: Workshop, engine: Engine, built: Artifact, images: Artifact
) -> NDArray[np.float32]:
    """Return the logits that the device computes on a `reference` artifact's images."""

    def write(folder: Path) -> None:
        logits = run_images(
            engine, images.file("images.npy"), shop.device, folder / "run", shop.progress
        )
        np.save(folder / "logits.npy", logits)

    inputs = {
        "engine": built.digest,
        "images": images.digest,
        "threads": engine.threads,
        "machine": shop.identity(engine.runtime),
    }
    artifact = shop.once("evaluate", engine.key, inputs, write)
    found: NDArray[np.float32] = np.load(artifact.file("logits.npy"), allow_pickle=False)
    return found


def bench(
    shop: Workshop, engines: Sequence[tuple[Engine, Artifact]], spec: BenchSpec
) -> dict[str, list[NDArray[np.int64]]]:
    """Measure all engines in turns; return every raw time in ns, by engine and round."""

    def write(folder: Path) -> None:
        times = measure_latency(
            [engine for engine, _ in engines], spec, shop.device, folder / "rounds", shop.progress
        )
        for number, (engine, _) in enumerate(engines):
            for turn, values in enumerate(times[engine.key]):
                np.save(folder / f"times-{number}-{turn}.npy", values)

    inputs = {
        "engines": [
            [engine.key, built.digest, engine.batch, engine.threads] for engine, built in engines
        ],
        "spec": spec.model_dump(),
        "machines": [shop.identity(runtime) for runtime in sorted({e.runtime for e, _ in engines})],
    }
    artifact = shop.once("bench", f"{len(engines)} engines", inputs, write)
    return {
        engine.key: [
            np.load(artifact.file(f"times-{number}-{turn}.npy"), allow_pickle=False)
            for turn in range(spec.rounds)
        ]
        for number, (engine, _) in enumerate(engines)
    }
