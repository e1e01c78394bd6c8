"""Run by torchrun (or alone): trains with BatchNorm and as INT8, and rank 0 writes what came of it.

Usage: two_processes.py OUT BATCH_SIZE WHAT_GOES_WRONG
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from narrow import SMALL, minmax_plan, preprocess_of, random_images, random_network
from safetensors.torch import save_file
from torch import nn
from training import image_set

from edgexception.imageset import ImageSet
from edgexception.model.graph import inference_graph
from edgexception.quantize.dialects import DIALECTS
from edgexception.quantize.ptq import Quantized
from edgexception.quantize.qat import quantize_qat
from edgexception.recipe import QatSpec
from edgexception.train.classifier import decaying
from edgexception.train.loop import Course, fit
from edgexception.train.objective import Objective
from edgexception.train.processes import Diverged, leading, serve

PIXELS = random_images(26, (40, 40))


class Fragile(ImageSet):
    """Photos that rank 1 cannot read."""

    def image(self, index: int) -> np.ndarray:
        if os.environ.get("RANK") == "1":
            raise RuntimeError("the disk of rank 1 is gone")
        return super().image(index)


def main(out: Path, size: int, fault: str) -> None:
    images = image_set(PIXELS, labels=np.arange(26) % 5)
    if fault == "disk":
        images = Fragile(images.samples, images.classes, images.preprocess)
    network = random_network(SMALL).requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    losses: list[float] = []
    tell = lambda *now: losses.append(now[3])  # noqa: E731
    course = Course("model", steps=6, batch_size=size, learning_rate=1e-3, ema=0.5)
    train = partial(fit, objective=Objective("normalized"), images=images,
                    grouping=partial(decaying, 0.01))  # fmt: skip
    with suppress(Diverged):  # every process finds that, and is ready for the next training
        train(
            random_network(SMALL).requires_grad_(True), course=replace(course, learning_rate=1e30)
        )
    train(network, course=course, progress=tell)
    graph = inference_graph(random_network(SMALL), preprocess_of((40, 40)))
    start = Quantized(graph, minmax_plan(graph, PIXELS, symmetric=True))
    spec = QatSpec(method="qat", steps=6, batch_size=size, learning_rate=0.01)
    learned = quantize_qat(graph, start, spec, images, DIALECTS["onnxruntime"], None, tell)
    tensors = {f"network/{n}": t for n, t in network.state_dict().items()}
    tensors |= {f"int8/{n}": t.contiguous() for n, t in learned.graph.state_dict().items()}
    scales = [grid.scale for grid in learned.plan.activations.values()]
    tensors |= {"scales": torch.tensor(scales), "losses": torch.tensor(losses)}
    save_file(tensors, out)


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if "RANK" not in os.environ:
        main(*arguments)
    elif os.environ["RANK"] == "0":
        with leading():
            main(*arguments)
    else:
        serve()
