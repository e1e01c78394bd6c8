"""Training on several processes: `torchrun --nproc-per-node 2 -m edgexception run recipe.yaml`.

Rank 0 runs the command. The other ranks wait; when a training begins they get it as one picklable
object, do their share of every batch, and wait again until rank 0 has ended. Gloo carries numbers
between processors, NCCL between GPUs, one GPU a process. A process that ends in the middle of a
training breaks the connections of the others, which then end, too, so that none hangs.

Rank 0 alone knows the recipe, so photos must be found under the same paths on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from edgexception.errors import NotPossibleHere, UsageError

_PATIENCE = timedelta(days=7)
"""How long a rank waits for the others: rank 0 may be measuring engines meanwhile. A process that
has ended is noticed at once, by its closed connection."""


_MEETING = timedelta(minutes=5)
"""How long all ranks have to find each other."""


class Diverged(UsageError):
    """A training whose numbers are not finite; every process finds that at the same step."""


class Job(Protocol):
    """A training that every process takes part in."""

    def join(self) -> None:
        """Do this process's share of it, beside rank 0."""


class _State:
    in_step = True
    """Whether the other ranks wait for the next job, as far as this one knows."""


def rank() -> int:
    """Return the number of this process in its group, 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def device() -> torch.device:
    """Return what this process trains on: its own GPU where there is one, else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def leading() -> Iterator[None]:
    """Be rank 0: inside, trainings are shared; at the end the other ranks are sent home."""
    _connect()
    try:
        yield
    finally:
        if _State.in_step:
            with suppress(RuntimeError):  # gone already: interrupted together with this process
                _tell(None)
        distributed.destroy_process_group()


def serve() -> None:
    """Be any other rank: join every training until rank 0 has ended."""
    _connect()
    while True:
        try:
            job = _hear()
        except RuntimeError as error:
            raise NotPossibleHere(
                "the process with rank 0 has ended; its own message says why"
            ) from error
        if job is None:
            break
        with suppress(Diverged):  # rank 0 says so
            job.join()
    distributed.destroy_process_group()


@contextmanager
def shared(job: Job) -> Iterator[None]:
    """Let the other ranks join a job that rank 0 does inside."""
    if size() == 1 or rank():
        yield
        return
    _tell(job)
    _State.in_step = False
    try:
        yield
    except Diverged:
        _State.in_step = True
        raise
    _State.in_step = True


def _connect() -> None:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    store, number, count = next(rendezvous("env://", timeout=_MEETING))
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=_PATIENCE
    )


def _tell(job: Job | None) -> None:
    distributed.broadcast_object_list([job], src=0, device=torch.device("cpu"))


def _hear() -> Job | None:
    heard: list[object] = [None]
    distributed.broadcast_object_list(heard, src=0, device=torch.device("cpu"))
    return cast("Job | None", heard[0])


def add_up(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes; gradients flow back through it."""
    if size() == 1:
        return values
    return cast(torch.Tensor, _Sum.apply(values))  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """What every process adds to the sum moves the losses of all of them."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> Any:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _summed(gradients[0])


def _summed(values: torch.Tensor) -> torch.Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    try:
        distributed.all_reduce(total)
    except RuntimeError as error:
        raise NotPossibleHere(
            "another process of this training has ended; its own message says why"
        ) from error
    return total


def add_up_gradients(parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
    """Replace gradients by their sums over all processes; return the sum of the losses."""
    if size() == 1:
        return loss
    gradients = [cast(torch.Tensor, parameter.grad) for parameter in parameters]
    last = torch.tensor([loss], device=gradients[0].device)
    flat = _summed(torch.cat([*(gradient.flatten() for gradient in gradients), last]))
    done = 0
    for gradient in gradients:
        gradient.copy_(flat[done : done + gradient.numel()].view_as(gradient))
        done += gradient.numel()
    return float(flat[-1])
