"""The full-size network as engines for every GPU of TensorRT-RTX, with the command a user types.

`make rtx` fetches the network and runs this; without the network it is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import edgex

from edgexception.recipe_file import load_recipe
from edgexception.report.record import Report
from edgexception.targets import find_target

pytest.importorskip("tensorrt_rtx_bindings")

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "kitchenware-rtx-all.yaml"
GPUS = {75, 80, 86, 89, 120, 121}
MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / ".data" / "kitchenware").exists(), reason="`make rtx` fetches the network"
    ),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("side", [150, 299])
def test_every_gpu_has_its_engines_and_their_bytes_are_explained(side: int, tmp_path: Path) -> None:
    text = RECIPE.read_text().replace("../", f"{ROOT}/").replace("150, 150", f"{side}, {side}")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    done = edgex("build-engine", path, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = Report.model_validate_json(done.out)
    assert report.network.preprocess.input_size == (side, side)
    assert report.network.parameters == 21_012_458
    assert {find_target(row.target).sm for row in report.rows} == GPUS
    assert len(report.rows) == sum(len(spec.precisions) for spec in load_recipe(path).targets)
    for row in report.rows:
        name = f"{row.target} {row.precision}"
        assert row.status == "built", name
        assert row.executed is not None, name
        assert row.executed.shares == {row.precision.partition("-")[0]: 1.0}, name
        engine = tmp_path / f"out/engines/{row.target}-tensorrt-rtx-{row.precision}-b1.rtx"
        manifest = json.loads(engine.with_suffix(".json").read_bytes())
        assert manifest["needs"]["sm"] == find_target(row.target).sm
        assert engine.stat().st_size == row.engine_bytes, name
        found = row.listing
        assert found is not None, name
        assert found.weights_bytes is not None, name
        assert found.zeros_bytes is not None, name
        assert row.onnx_bytes is not None, name
        # What is not padding is the weights of the file once, in their own type: no FP32 copy.
        # Depthwise layers are padded in runs too short to be counted as such.
        assert found.weights_bytes - found.zeros_bytes < 1.1 * row.onnx_bytes, name
