"""The stage that trains a quantized network; what needs torch is imported inside."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgexception.artifacts import Artifact
from edgexception.imageset import ImageSet
from edgexception.model_stages import load_model, training_report
from edgexception.recipe import PtqSpec, QatSpec
from edgexception.stages import load_quantized, write_quantized
from edgexception.workshop import Workshop, versions


def train_quantized(
    shop: Workshop,
    model: Artifact,
    quantized: Artifact,
    spec: QatSpec,
    images: ImageSet,
    dialect: str,
) -> Artifact:
    """Train a quantized network that rounds as in `dialect`; the same files as of `quantize`."""

    def write(folder: Path) -> None:
        from edgexception.model.graph import inference_graph
        from edgexception.quantize.dialects import DIALECTS
        from edgexception.quantize.ptq import Quantized
        from edgexception.quantize.qat import quantize_qat
        from edgexception.train.state import Keeper

        trained = load_model(model)
        teacher, graph = (inference_graph(trained.network, trained.preprocess) for _ in range(2))
        result = quantize_qat(
            teacher,
            Quantized(graph, load_quantized(graph, quantized)),
            spec,
            images,
            DIALECTS[dialect],
            Keeper(shop.unfinished),
            training_report(shop),
        )
        write_quantized(result, folder)
        shutil.copyfile(quantized.file("calibration.json"), folder / "calibration.json")

    inputs = {
        "model": model.digest,
        "quantized": quantized.digest,
        "images": images.digest,
        "spec": spec.model_dump(exclude={"source", *PtqSpec.model_fields}),
        "dialect": dialect,
        "versions": versions("torch"),
    }
    return shop.once("qat", f"{spec.steps} steps on {len(images)} images", inputs, write)
