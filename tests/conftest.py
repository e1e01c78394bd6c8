"""Fixtures that several test folders share; being here it also puts tests/ on the module path."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of tiny_engine.py as an ONNX file."""
    pytest.importorskip("onnx")
    from tiny_engine import save_tiny  # noqa: PLC0415 - onnx is a workstation package

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model.onnx")
