"""The first stage: a network is read from a checkpoint, trained from nothing, or fine-tuned.

What needs torch is imported inside a stage, so that a run with nothing left to do does not load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgexception.artifacts import Artifact, sha256_file
from edgexception.data import ImageSet, open_evaluation, open_training, refuse_leak
from edgexception.device import Progress
from edgexception.errors import BadArtifact, UsageError
from edgexception.recipe import CheckpointModel, FineTunedModel, ModelSpec, TrainedHereModel
from edgexception.recipe_data import EvaluationSpec, Source
from edgexception.report.network import Network
from edgexception.workshop import Workshop, versions

if TYPE_CHECKING:
    from edgexception.model.checkpoint import TrainedModel
    from edgexception.preprocess import Preprocess
    from edgexception.train.loop import Report


def import_model(
    shop: Workshop, spec: ModelSpec, evaluation: EvaluationSpec | None
) -> tuple[Artifact, Network]:
    """Read a checkpoint, or train the network: `model.safetensors` and `model.json`."""
    if isinstance(spec, CheckpointModel):
        artifact = _import_checkpoint(shop, spec)
    elif isinstance(spec, TrainedHereModel):
        artifact = _train(shop, spec, evaluation)
    else:
        artifact = _fine_tune(shop, spec, evaluation)
    return artifact, card_of(artifact)


def card_of(model: Artifact) -> Network:
    """Return what is said of a network."""
    return Network.model_validate_json(model.file("model.json").read_bytes())


def _import_checkpoint(shop: Workshop, spec: CheckpointModel) -> Artifact:
    digest = _digest(spec.path)

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import load_checkpoint

        model = load_checkpoint(spec.path, classes=spec.classes, preprocess=spec.preprocess)
        if model.source["sha256"] != digest:
            raise BadArtifact(f"{spec.path}: has changed while it was read; run again")
        write_model(model, folder)

    inputs = {
        "file": spec.path.name,
        "sha256": digest,
        "spec": spec.model_dump(exclude={"path"}),
        "versions": versions("torch", "h5py", "safetensors"),
    }
    return shop.once("import", spec.path.name, inputs, write)


def find_checkpoint(path: Path) -> None:
    """Raise UsageError unless there is a file; a pipe or a device would be read without end."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "there is no such checkpoint"
        raise UsageError(f"{path}: {what}; name a .keras, .h5, .pth or .safetensors file")


def _digest(path: Path) -> str:
    find_checkpoint(path)
    try:
        return sha256_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the rights") from error


def _train(shop: Workshop, spec: TrainedHereModel, evaluation: EvaluationSpec | None) -> Artifact:
    images = _open_training(spec.source, spec.preprocess, evaluation)

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import TrainedModel
        from edgexception.train.classifier import train
        from edgexception.train.state import Keeper

        network = train(spec, images, training_report(shop), Keeper(shop.unfinished))
        source = {"format": "trained by recipe", "images": str(len(images))}
        write_model(TrainedModel(network, images.classes, spec.preprocess, source), folder)

    inputs = {
        "images": images.digest,
        "spec": spec.model_dump(exclude={"source"}),
        "versions": versions("torch"),
    }
    return shop.once("train", f"{len(images)} images", inputs, write)


def _fine_tune(shop: Workshop, spec: FineTunedModel, evaluation: EvaluationSpec | None) -> Artifact:
    pretrained = _import_checkpoint(
        shop, CheckpointModel(kind="checkpoint", path=spec.path, preprocess=spec.preprocess)
    )
    card = card_of(pretrained)
    preprocess = card.preprocess
    images = _open_training(spec.source, preprocess, evaluation)

    def write(folder: Path) -> None:
        from edgexception.model.checkpoint import TrainedModel
        from edgexception.train.classifier import fine_tune
        from edgexception.train.state import Keeper

        begun = load_model(pretrained).network
        network = fine_tune(spec, begun, images, training_report(shop), Keeper(shop.unfinished))
        origin = {f"origin_{key}": card.source[key] for key in ("file", "sha256")}
        source = {"format": "fine-tuned by recipe", "images": str(len(images)), **origin}
        write_model(TrainedModel(network, images.classes, preprocess, source), folder)

    inputs = {
        "pretrained": pretrained.digest,
        "images": images.digest,
        "spec": spec.model_dump(exclude={"source", "path", "preprocess"}),
        "versions": versions("torch"),
    }
    return shop.once("fine-tune", f"{len(images)} images", inputs, write)


def _open_training(
    source: Source, preprocess: Preprocess, evaluation: EvaluationSpec | None
) -> ImageSet:
    images = open_training(source, preprocess)
    if evaluation is not None:
        labelled, _ = open_evaluation(evaluation, preprocess, images.classes)
        refuse_leak(images, labelled, "training")
    return images


def training_report(shop: Workshop) -> Report:
    """Return what tells the listener of a run how far a training is."""

    def report(done: int, total: int, left_s: float, loss: float) -> None:
        shop.progress(Progress(f"training, loss {loss:.3g}", done, total, left_s))

    return report


def write_model(model: TrainedModel, folder: Path) -> None:
    """Write `model.safetensors` and `model.json`."""
    from edgexception.model.checkpoint import save_checkpoint
    from edgexception.model.cost import macs_of
    from edgexception.model.graph import inference_graph

    save_checkpoint(model, folder / "model.safetensors")
    graph = inference_graph(model.network, model.preprocess)
    card = Network(
        classes=model.classes,
        preprocess=model.preprocess,
        source=model.source,
        outputs=model.network.architecture.outputs,
        parameters=sum(p.numel() for p in model.network.parameters()),
        macs=macs_of(graph, model.preprocess),
    )
    (folder / "model.json").write_text(card.model_dump_json(indent=1) + "\n")


def load_model(model: Artifact) -> TrainedModel:
    """Return the network of an artifact."""
    from edgexception.model.checkpoint import load_checkpoint

    return load_checkpoint(model.file("model.safetensors"))
