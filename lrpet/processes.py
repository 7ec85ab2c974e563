"""The processes of a run: those that torchrun started, or just this one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes", "divide", "join_processes"]

PATIENCE = timedelta(hours=6)  # for one another: the first process may decode a large data set, or wait for the lock of the run


@dataclass(frozen=True)
class Processes:
    """This process among those that train one network together; by default it is alone.

    What one of them calls, all must call, in the same order: every method here is a conversation, and costs nothing where one is alone.

    >>> Processes().first, Processes().any(True), Processes().share(lambda: "made here")
    (True, True, 'made here')
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine
    device: torch.device = torch.device("cpu")  # where what they tell each other lies

    @classmethod
    def now(cls) -> Processes:
        """Return this process as PyTorch's default process group knows it; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank = dist.get_rank()
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
        return cls(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """Let the first process make something, and return it in every process."""
        if self.world == 1:
            return make()
        made = [make() if self.first else None]
        dist.broadcast_object_list(made, device=self.device)
        return made[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the given one is left alone."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Tell whether something holds in at least one process."""
        return here if self.world == 1 else bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)

    @torch.no_grad()
    def copy_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors, of any types and shapes, with those of one process: bit by bit, in one message.

        Args:
            source: rank of that process.
            tensors: the same number, types and shapes in each process, all on one device.
        """
        if self.world == 1 or not tensors:
            return
        tensors = sorted(tensors, key=lambda t: -t.element_size())  # so that each begins at a multiple of its element size
        flat = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])
        dist.broadcast(flat, source)
        if self.rank != source:
            for tensor, part in zip(tensors, flat.split([t.nbytes for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let one process of each machine go through the body before the others of it: what it leaves in a cache, they find there."""
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                yield
            if self.world > 1:
                self.any(False)  # returns when all are here


def join_processes(device: torch.device, environ: Mapping[str, str] = os.environ) -> tuple[Processes, torch.device]:
    """Meet the other processes of a run where torchrun started several: over NCCL on GPUs, over gloo on CPUs.

    Args:
        device: "cuda" without a number becomes the GPU of this process: as many of a machine's GPUs are used as it runs processes.
        environ: where torchrun says who this is: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``.

    Returns:
        This process among the others, and its device.

    Raises:
        ValueError: the machine has fewer GPUs than processes, or all were given the same one.

    >>> join_processes(torch.device("cpu"), environ={})[0].world
    1
    """
    world, local_rank = int(environ.get("WORLD_SIZE", 1)), int(environ.get("LOCAL_RANK", 0))
    if world == 1 and not dist.is_initialized():
        return Processes(), device
    if device.type == "cuda":
        if device.index is not None and int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise ValueError(f"device must be 'cuda' or 'auto' where several processes share a machine: each takes a GPU of its own; got '{device}'")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun --nproc-per-node must be at most {torch.cuda.device_count()}, the GPUs of this machine; got process {local_rank + 1}"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Processes.now(), device


def divide(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """Divide jobs into parts of about the same cost: the dearest job first, each to the part that has least to do so far.

    Returns:
        The names of each part's jobs in the order of ``costs``; a part may have none.

    >>> divide({"a": 3, "b": 5, "c": 3}, 2)
    [['b'], ['a', 'c']]
    """
    loads, part_of = [0.0] * parts, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        part_of[name] = loads.index(min(loads))
        loads[part_of[name]] += costs[name]
    return [[name for name in costs if part_of[name] == part] for part in range(parts)]
