"""What a change of a tensor does to the logits, measured for many changes at once.

The error of a single tensor says little: of two edges with equal rounding noise one may decide the
logits and the other vanish in the next ReLU. To run the network again for every edge and every
candidate would take hours. So the network is linearised around each image: with J the Jacobian of
the logits with respect to a tensor, a change d of the tensor moves the logits by J d, and for
probes v of random signs the mean of (v' J d)^2 is |J d|^2 (Hutchinson's estimator). One backward
pass a probe gives v' J for all tensors of the network; a candidate then costs a dot product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

PROBES = 2
"""Backward passes a batch. With 128 images an effect is known to about 9%, sqrt(2 / (PROBES *
images)), and candidates are compared on the same images and probes."""

Values = Mapping[str, torch.Tensor]
Change = Callable[[Values], torch.Tensor]
"""From the tensors of a batch to the change of one of them, of its shape."""


def effects(
    graph: fx.GraphModule,
    batches: Iterable[torch.Tensor],
    changes: Mapping[str, Sequence[Change]],
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """Return tensor -> noise-to-signal ratio of the logits under each of its changes.

    The ratio is E|J d|^2 / E|logits|^2 over all images; -10 log10 of it is an SQNR in dB. Effects
    of several small independent changes add up.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {name: np.zeros(len(questions)) for name, questions in changes.items()}
    signal = 0.0
    for batch in batches:
        values, slopes, power = linearised(graph, batch, list(changes), generator)
        signal += power
        with torch.inference_mode():
            for name, questions in changes.items():
                for number, question in enumerate(questions):
                    change = question(values).flatten(1).unsqueeze(2)  # (images, values, 1)
                    moved = torch.bmm(slopes[name], change)  # (images, probes, 1)
                    found[name][number] += float(moved.double().square().sum())
    return {name: total / (PROBES * max(signal, 1e-30)) for name, total in found.items()}


def linearised(
    graph: fx.GraphModule,
    batch: torch.Tensor,
    names: list[str],
    generator: torch.Generator,
    probes: int = PROBES,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Return every tensor, the slopes v' J of the named ones as (images, probes, values), and the
    logits' power.
    """
    values: dict[str, torch.Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                values[n.name] = value
            return value

    slopes: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with torch.inference_mode(False), torch.enable_grad():
        # A leaf that wants gradients: the weights of an inference graph do not.
        logits = Keep(graph).run(batch.clone().requires_grad_())
        watched = [values[name] for name in names]
        for _ in range(probes):
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
            grads = torch.autograd.grad(logits, watched, signs, retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                slopes[name].append(grad.flatten(1))
    detached = {name: value.detach() for name, value in values.items()}
    stacked = {name: torch.stack(grads, dim=1) for name, grads in slopes.items()}
    return detached, stacked, float(logits.detach().double().square().sum())
