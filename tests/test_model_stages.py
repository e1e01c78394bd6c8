"""The first stage of a run: fine-tuning from a checkpoint, killed and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import SMALL, preprocess_of, random_network

from edgexception.artifacts import Artifact, Store
from edgexception.device import Progress
from edgexception.errors import BadArtifact
from edgexception.model.checkpoint import TrainedModel, load_checkpoint, save_checkpoint
from edgexception.model_stages import import_model
from edgexception.recipe import FineTunedModel
from edgexception.recipe_data import DigitsSource, EvaluationSpec
from edgexception.report.network import Network
from edgexception.train.state import Keeper
from edgexception.workshop import Workshop

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    classes = ("a", "b", "c", "d", "e")
    save_checkpoint(TrainedModel(random_network(SMALL), classes, preprocess_of((33, 33)), {}), path)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    nobody: Any = None
    with Store(tmp_path / "store") as store:
        yield Workshop(store, nobody, nobody)


def spec_of(checkpoint: Path, **changed: Any) -> FineTunedModel:
    source = DigitsSource(kind="digits", split="calibration")
    given = {"path": checkpoint, "source": source, "head": (10,), "epochs": 2.0, **changed}
    return FineTunedModel(kind="fine-tune", **given)


def fine_tuned(shop: Workshop, checkpoint: Path, **changed: Any) -> tuple[Artifact, Network]:
    return import_model(shop, spec_of(checkpoint, **changed), None)


def test_a_checkpoint_is_fine_tuned_once(shop: Workshop, checkpoint: Path) -> None:
    artifact, card = fine_tuned(shop, checkpoint, preprocess={"input_size": (36, 35)})
    assert card.classes == tuple("0123456789")
    assert card.outputs == 10
    assert card.preprocess == preprocess_of((36, 35)), "mean and std are the checkpoint's"
    assert card.source["origin_file"] == "net.safetensors"
    assert [line.stage for line in shop.done] == ["import", "fine-tune"]
    shop.done.clear()
    assert fine_tuned(shop, checkpoint, preprocess={"input_size": (36, 35)})[0] == artifact
    assert all(line.reused for line in shop.done)
    other, _ = fine_tuned(shop, checkpoint, preprocess={"input_size": (36, 35)}, seed=1)
    assert other.digest != artifact.digest


def test_a_killed_run_goes_on_and_ends_the_same(
    shop: Workshop, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = fine_tuned(shop, checkpoint)
    monkeypatch.setattr(Keeper, "due", lambda _: True)
    nobody: Any = None
    seen: list[int] = []

    def killed(progress: Progress) -> None:
        if progress.what.startswith("training"):
            seen.append(progress.done)
            if progress.done == 5 and seen.count(5) == 1:
                raise KeyboardInterrupt

    store = Store(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        fine_tuned(Workshop(store, nobody, nobody, progress=killed), checkpoint)
    store.close()
    assert len(list((tmp_path / "killed/.unfinished").rglob("*.safetensors"))) == 1
    with Store(tmp_path / "killed") as store:
        resumed, _ = fine_tuned(Workshop(store, nobody, nobody, progress=killed), checkpoint)
    assert seen == [*range(1, 6), *range(6, 15)], "steps are not taken twice"
    assert resumed.digest == whole.digest
    assert not (tmp_path / "killed/.unfinished").exists()


def test_training_photos_in_the_evaluation_are_refused(shop: Workshop, checkpoint: Path) -> None:
    spec = spec_of(checkpoint)
    with pytest.raises(BadArtifact, match="training photos are in the evaluation set"):
        import_model(shop, spec, EvaluationSpec(source=spec.source))


def test_the_backbone_is_that_of_the_checkpoint(shop: Workshop, checkpoint: Path) -> None:
    artifact, _ = fine_tuned(shop, checkpoint, learning_rate=1e-30, epochs=0.1)
    before = load_checkpoint(checkpoint).network.state_dict()
    after = load_checkpoint(artifact.file("model.safetensors")).network.state_dict()
    torch.testing.assert_close(after["block2_sepconv1.pointwise.weight"],
                               before["block2_sepconv1.pointwise.weight"])  # fmt: skip
