"""One good recipe, and how it is broken: what the tests of recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgexception.errors import UsageError
from edgexception.recipe_file import load_recipe

GOOD = """\
name: shoes
model:
  kind: checkpoint
  path: ../models/xception.keras
  classes: [boot, "no", sandal]
calibration:
  source: {kind: photos, path: photos/calibration}
  images: 64
evaluation:
  source: {kind: folder, path: photos/test}
quantize: {method: ptq, ranges: percentile, percentile: 99.9}
targets:
  - target: cpu-x86
    runtimes: [onnxruntime, openvino]
bench: {batch_sizes: [1, 8]}
gates: {top1_drop_max: 1e-2, speedup_min: 1}
"""


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def faults(folder: Path, text: str | bytes) -> list[str]:
    """The lines of the refusal, without the file name."""
    path = write(folder, text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{path}:") for line in lines), lines
    return [line.removeprefix(f"{path}:") for line in lines]


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)
