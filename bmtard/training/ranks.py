"""Processes that train or evaluate one network together, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bmtard.types import Share


class SharedError(ValueError):
    """What kept one of the processes from beginning, raised on all of them; rank 0 tells it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One process among those that work together; by default it is alone.

    Its methods are collective: every process calls them in the same order. Those on Python numbers
    go through the host and wait for no GPU.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Of each batch."""
        return Share(self.rank, self.count)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raises on every process if one of them cannot do what is inside, which no collective is.

        Afterwards all of them have done it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            if self.count == 1:
                raise
            error = found
        if self.count == 1:
            return
        messages: list[Any] = [None] * self.count
        dist.all_gather_object(messages, error and str(error), group=self.group)
        if error is not None and not isinstance(error, (ValueError, OSError, ImportError)):
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise SharedError(f"rank {rank}: {message}" if rank else message) from error

    def highest(self, value: int) -> int:
        return int(self._reduced(value, dist.ReduceOp.MAX))

    def sum(self, value: int) -> int:
        return int(self._reduced(value, dist.ReduceOp.SUM))

    def _reduced(self, value: int, how: dist.ReduceOp.RedOpType) -> Tensor:
        result = torch.tensor(value)
        if self.count > 1:
            work = dist.all_reduce(result, how, group=self.group, async_op=True)
            assert work is not None
            # Python hears of signals between two looks, and would not inside wait().
            while not work.is_completed():
                time.sleep(1e-4)
            work.wait()
        return result

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites floating tensors of one device with their means over the processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.count
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, mean in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))


ALONE = Ranks()


def launched() -> bool:
    """Whether a launcher has started this process together with others."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process talks to the user: it is alone, or rank 0."""
    return not launched() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, connected: by gloo, and by NCCL on GPUs.

    device: as in the configuration. Where torch.distributed is in use already, its default group,
    which must take tensors of the CPU, too.
    """
    begun = dist.is_available() and dist.is_initialized()
    if not (begun or launched()):
        yield ALONE
        return
    if not begun:
        if not dist.is_available():
            raise ValueError("this torch has no torch.distributed: start one process, not several")
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), count=dist.get_world_size(), group=dist.group.WORLD)
    finally:
        if not begun:
            dist.destroy_process_group()


def local_device(name: str, count: int) -> str:
    """That of this process: with "auto" and "cuda" each process on a node has a GPU of its own."""
    if count == 1:
        return name
    if name.startswith("cuda:"):
        raise ValueError(f"device {name!r}: {count} processes need a GPU each; say cuda or auto")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name
