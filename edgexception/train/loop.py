"""The loop that every training runs through: AdamW, warm-up, cosine, averaged weights, resume.

What it ends with follows from the network, the images and the course alone, whatever the process
did before, and however often it was killed and started again: the same bytes on one processor with
one number of threads, the same up to rounding on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgexception.errors import EdgexError, NotPossibleHere, OutOfResources, UsageError
from edgexception.imageset import ImageSet
from edgexception.model.sparsity import zeros_of
from edgexception.train import processes
from edgexception.train.batchnorm import whole_batch_statistics
from edgexception.train.objective import Objective
from edgexception.train.processes import Diverged
from edgexception.train.state import Keeper, State

Report = Callable[[int, int, float, float], None]
"""Called after every step with (steps done, steps in all, seconds left, loss of the step)."""

WARMUP_SHARE = 0.05
"""Share of all steps over which the learning rate rises; after it, half a cosine down to zero."""

BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""x86 instructions for bfloat16, as torch calls them."""


@dataclass(frozen=True)
class Course:
    """How a training goes."""

    section: str
    """Section of the recipe that says so, for messages."""
    steps: int
    batch_size: int
    learning_rate: float
    """The peak; of each group of parameters times its `factor`."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is what a training ends with; 0 ends with
    the weights of the last step."""
    seed: int = 0
    threads: int = 1
    """Of torch. Gradients are sums, and how torch splits a sum among its threads shows in the last
    bits: one thread and two end with different weights (seen on the digits recipe)."""
    bfloat16: bool = False
    """Compute layers in bfloat16; weights and their updates stay float32."""
    as_used: bool = False
    """Learn as the network will be used: BatchNorms with the statistics that they have, which stay,
    and no dropout."""


Group = dict[str, Any]
Grouping = Callable[[nn.Module], list[Group]]
"""Returns groups of named parameters: `params`, `factor` of the learning rate, `weight_decay`."""


def fit(
    network: nn.Module,
    objective: Objective,
    images: ImageSet,
    course: Course,
    grouping: Grouping,
    keeper: Keeper | None = None,
    progress: Report | None = None,
) -> None:
    """Train a network in place, together with every other process that there is.

    1x1 convolutions whose weights are 2:4 sparse stay so.

    With a `keeper`, goes on from the state that it has, and saves one now and then.

    Raises NotPossibleHere for bfloat16 on a processor that would only emulate it, Diverged (a
    UsageError) for numbers that are not finite, OutOfResources when memory runs
    out, BadArtifact for a photo that has changed since the set was opened, or a state that is not
    of this training.
    """
    if course.bfloat16:
        _check_bfloat16(course)
    least = len(images) // batch_count(len(images), course.batch_size)
    if least < processes.size():
        raise UsageError(
            f"{course.section}.batch_size {course.batch_size} with {len(images)} images leaves "
            f"batches of {least}, fewer than the {processes.size()} processes: start fewer"
        )
    state = None
    if keeper is not None:
        state = keeper.load(_Training(network, course, grouping).tensors(), course.steps)
    job = _Job(network, objective, images, course, grouping, state)
    with processes.shared(job):
        job.run(keeper, progress)


def _check_bfloat16(course: Course) -> None:
    """Refuse what would take a day instead of an hour: 45 s a step where float32 takes 5 (the full
    network at 96x96 on a processor with AVX2 only).
    """
    found = torch.cpu.get_capabilities()
    if processes.device().type != "cpu" or found["architecture"] != "x86_64":
        return
    if not any(found[name] for name in BFLOAT16):
        raise NotPossibleHere(
            f"{course.section}.bfloat16: this processor has no bfloat16 arithmetic "
            f"({' or '.join(BFLOAT16)}), and emulated it takes several times as long as float32. "
            "Set `bfloat16: false`, or train on another machine"
        )


@dataclass
class _Job:
    """A training as every process gets it."""

    network: nn.Module
    objective: Objective
    images: ImageSet
    course: Course
    grouping: Grouping
    state: State | None

    def join(self) -> None:
        """Take part as a process that keeps and tells nothing."""
        self.run(None, None)

    def run(self, keeper: Keeper | None, progress: Report | None) -> None:
        """Take every step that is left."""
        course, device = self.course, processes.device()
        with (
            reproducible(course.seed, course.threads),
            out_of_memory(sum(p.numel() for p in self.network.parameters()), self.images, course),
            nullcontext() if course.as_used else whole_batch_statistics(self.network),
        ):
            self.network.to(device).train(not course.as_used)
            if self.objective.teacher is not None:
                self.objective.teacher.to(device).eval()
            training = _Training(self.network, course, self.grouping)
            first = training.restore(self.state)
            began = time.monotonic()
            for step in range(first, course.steps):
                loss = self._step(training, step)
                done = step + 1
                if keeper is not None and done < course.steps and keeper.due():
                    keeper.save(State(done, training.tensors()))
                if progress is not None:
                    each = (time.monotonic() - began) / (done - first)
                    progress(done, course.steps, each * (course.steps - done), loss)
            training.finish()
            self.network.cpu()
        if not all(value.isfinite().all() for value in self.network.state_dict().values()):
            raise self._diverged("weights are not finite after the last step")

    def _step(self, training: _Training, step: int) -> float:
        """Take one step and return the loss of its whole batch."""
        course, device = self.course, processes.device()
        batches = batch_count(len(self.images), course.batch_size)
        epoch, batch = divmod(step, batches)
        chosen = np.array_split(order(course.seed, epoch, len(self.images)), batches)[batch]
        mine = np.array_split(chosen, processes.size())[processes.rank()]
        labels = None
        if self.objective.distillation < 1.0 and self.images.labels is not None:
            labels = torch.from_numpy(self.images.labels[mine]).to(device)
        x = self.objective.batch(self.images, mine).to(device)
        torch.manual_seed(_number(course.seed, "step", step, processes.rank()))
        with torch.autocast(device.type, torch.bfloat16, enabled=course.bfloat16):
            loss = self.objective.losses(self.network, x, labels).sum() / len(chosen)
        training.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        training.hold_zeros()
        value = processes.add_up_gradients(training.parameters, loss.item())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} in epoch {epoch + 1}, step {batch + 1}")
        training.update(step)
        return value

    def _diverged(self, what: str) -> Diverged:
        section = self.course.section
        return Diverged(
            f"training diverged: {what}. Set {section}.learning_rate below "
            f"{self.course.learning_rate:g} (a tenth is a good try), and let mean and std of "
            "model.preprocess bring pixels to about -1 ... 1"
        )


class _Training:
    """The parts that a step changes, and each of them by name."""

    def __init__(self, network: nn.Module, course: Course, grouping: Grouping) -> None:
        self.network = network
        self.course = course
        groups = grouping(network)
        names = {id(p): name for name, p in network.named_parameters()}
        self.parameters = [p for group in groups for p in group["params"]]
        self.names = [names[id(p)] for p in self.parameters]
        self.optimizer = torch.optim.AdamW(groups, lr=course.learning_rate)
        self.average = [p.detach().clone() for p in self.parameters] if course.ema else []
        self.zeros = [zeros_of(p.detach()) for p in self.parameters]

    def hold_zeros(self) -> None:
        """Take the gradients of the zeros of 2:4 weights away: AdamW then leaves them zero."""
        for zeros, parameter in zip(self.zeros, self.parameters, strict=True):
            if zeros is not None and parameter.grad is not None:
                parameter.grad.masked_fill_(zeros, 0.0)

    def update(self, step: int) -> None:
        """Move every parameter by its gradient, and the average after them."""
        share = schedule(step, self.course.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.learning_rate * group["factor"] * share
        self.optimizer.step()
        # The decay grows with the steps, so that a short training forgets where it began, too.
        decay = min(self.course.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(self.average, self.parameters, strict=False):
                mean.lerp_(parameter, 1.0 - decay)

    def finish(self) -> None:
        """End with the averaged weights, where there are any."""
        with torch.no_grad():
            for mean, parameter in zip(self.average, self.parameters, strict=False):
                parameter.copy_(mean)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the next step depends on."""
        found = {f"network/{name}": t for name, t in self.network.state_dict().items()}
        found |= {f"average/{n}": t for n, t in zip(self.names, self.average, strict=False)}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            moments = self.optimizer.state.get(parameter, {})
            found[f"first/{name}"] = moments.get("exp_avg", parameter)
            found[f"second/{name}"] = moments.get("exp_avg_sq", parameter)
        return found

    def restore(self, state: State | None) -> int:
        """Take over a state and return how many steps it has done."""
        if state is None:
            return 0
        device = self.parameters[0].device
        tensors = {name: t.to(device) for name, t in state.tensors.items()}
        self.network.load_state_dict(
            {n.removeprefix("network/"): t for n, t in tensors.items() if n.startswith("network/")}
        )
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.steps)),
                "exp_avg": torch.empty_like(parameter).copy_(tensors[f"first/{name}"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"second/{name}"]),
            }
        for name, mean in zip(self.names, self.average, strict=False):
            mean.copy_(tensors[f"average/{name}"])
        return state.steps


def schedule(step: int, total: int) -> float:
    """Return the share of the full learning rate at a step 0 ... total - 1: in (0, 1]."""
    warmup = math.ceil(WARMUP_SHARE * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def batch_count(images: int, size: int) -> int:
    """Return into how many batches of nearly one size an epoch is split.

    None has more than `size` images, unless that would leave one with a single image: BatchNorm
    needs two, and so the remainder of an epoch is spread over its batches.
    """
    return max(1, min(math.ceil(images / size), images // 2))


def order(seed: int, epoch: int, images: int) -> npt.NDArray[np.int64]:
    """Return the order of the images in an epoch."""
    generator = torch.Generator().manual_seed(_number(seed, "epoch", epoch))
    return torch.randperm(images, generator=generator).numpy()


def _number(*parts: object) -> int:
    """Return the seed that belongs to these words."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@contextmanager
def out_of_memory(parameters: int, images: ImageSet, course: Course) -> Iterator[None]:
    """Turn what torch and numpy raise without memory into OutOfResources."""
    try:
        yield
    except EdgexError:
        raise
    except (MemoryError, RuntimeError) as error:
        words = ("allocate memory", "out of memory")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        height, width = images.preprocess.input_size
        raise OutOfResources(
            f"out of memory while training {parameters:,} parameters "
            f"on batches of {course.batch_size} images of {height}x{width}. Set a "
            f"smaller {course.section}.batch_size, input_size or architecture, or free memory"
        ) from error


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Make what torch computes inside follow from the seed; afterwards torch is as it was."""
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # No devices: the random state of the CPU only. inference_mode(False) brings gradients back if a
    # caller switched them off.
    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.enable_grad():
        try:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
            torch.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.set_num_threads(before)
