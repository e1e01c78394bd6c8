"""Fixtures that several test folders share; being here it also puts tests/ on the module path."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from traced_stages import watch_stages

watch_stages()

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits that; the tests
# of Ctrl-C are about processes that hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of tiny_engine.py as an ONNX file."""
    pytest.importorskip("onnx")
    from tiny_engine import save_tiny  # noqa: PLC0415 - onnx is a workstation package

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model.onnx")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a narrow trained network, photos to calibrate on, and labelled ones.

    net.safetensors (5 classes at 71x71), photos/ (12), test/<class>/ (3 each).
    """
    pytest.importorskip("torch")
    from checkpoints import NARROW, random_network  # noqa: PLC0415 - needs workstation packages
    from hostile_data import picture  # noqa: PLC0415

    from edgexception.model.checkpoint import TrainedModel, save_checkpoint  # noqa: PLC0415
    from edgexception.preprocess import Preprocess  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("world")
    classes = ("cup", "fork", "glass", "knife", "plate")
    model = TrainedModel(
        random_network(NARROW, 1), classes, Preprocess(input_size=(71, 71)), {"format": "test"}
    )
    save_checkpoint(model, folder / "net.safetensors")
    (folder / "photos").mkdir()
    for number in range(12):
        picture(number).save(folder / f"photos/{number}.png")
    for index, name in enumerate(classes):
        (folder / "test" / name).mkdir(parents=True)
        for number in range(3):
            picture(100 + 10 * index + number).save(folder / f"test/{name}/{number}.png")
    return folder
