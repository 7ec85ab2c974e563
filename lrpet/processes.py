"""The processes of a run: those that torchrun started, or just this one."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "join_processes"]
PATIENCE = timedelta(hours=6)  # the first process may decode a large data set, or wait for a lock


@dataclass(frozen=True)
class Processes:
    """This process among those that train one network together; by default it is alone.

    What one of them calls, all must call, in the same order: every method here is a conversation, and costs
    nothing where one is alone.

    >>> Processes().first, Processes().any(True, False), Processes().share(lambda: "made here")
    (True, [True, False], 'made here')
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its machine

    @classmethod
    def now(cls) -> Processes:
        """Return this process as PyTorch's default process group knows it; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank = dist.get_rank()
        return cls(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """Let the first process make something, and return it, or raise its error, in every process."""
        if self.world == 1:
            return make()
        made, error = None, None
        if self.first:
            try:
                made = make()
            except Exception as raised:
                error = raised
        told = [made, error]
        dist.broadcast_object_list(told, device="cpu")
        if told[1] is not None:
            raise told[1]
        return told[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the given one is left alone."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list:
        """Return the value of every process, of any type that pickles, in the order of their ranks."""
        if self.world == 1:
            return [value]
        told = [None] * self.world
        dist.all_gather_object(told, value)
        return told

    def any(self, *here: bool) -> list[bool]:
        """Tell of each of some things whether it holds in at least one process."""
        if self.world == 1:
            return list(here)
        return [count > 0 for count in self.sum(torch.tensor(here, dtype=torch.int64)).tolist()]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether tensors, all on one device, hold the same bits in every process."""
        first = [tensor.detach().clone() for tensor in tensors] if self.world > 1 else []
        self.copy_from(0, first)
        differ = [not torch.equal(_bits(a), _bits(b)) for a, b in zip(first, tensors, strict=False)]
        return not self.any(any(differ))[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model so wrapped that backward averages gradients over the processes; alone, the model.

        Before each step it takes over the first process's BatchNorm statistics, and each then adds those of
        its own part.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    @torch.no_grad()
    def copy_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors, of any types and shapes, with those of one process: bit by bit, in one message.

        Args:
            source: rank of that process.
            tensors: the same number, types and shapes in each process, all on one device.
        """
        if self.world == 1 or not tensors:
            return
        # so that each begins at a multiple of its element size
        tensors = sorted(tensors, key=lambda t: -t.element_size())
        flat = torch.cat([_bits(tensor) for tensor in tensors])
        dist.broadcast(flat, source)
        if self.rank != source:
            for tensor, part in zip(tensors, flat.split([t.nbytes for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))

    def own_device(self, device: torch.device) -> torch.device:
        """Return the device of this process: of several on a machine with GPUs, each takes one.

        Raises:
            ValueError: there are more processes than GPUs, or one GPU was named for all processes.
        """
        if self.world == 1 or device.type != "cuda":
            return device
        gpus = torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(
                "device must be auto, cpu or cuda where several processes train together, "
                f"each on its own GPU; got '{device}'"
            )
        if self.local_rank >= gpus:
            raise ValueError(
                f"torchrun --nproc-per-node must be at most {gpus}, the GPUs of this machine; "
                f"got at least {self.local_rank + 1}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let one process per machine go through the body first: what it caches, the others find."""
        for turn in (True, False):
            if (self.local_rank == 0) == turn:
                yield
            if self.world > 1:
                self.any(False)  # returns when all are here


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def join_processes(environ: Mapping[str, str] = os.environ) -> Processes:
    """Meet the other processes that torchrun started: over NCCL for what is on GPUs, over gloo otherwise.

    Args:
        environ: where torchrun says who this is: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
            ``MASTER_PORT``.

    Returns:
        This process among the others.

    >>> join_processes(environ={}).world
    1
    """
    if int(environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(_agree_on_name(store, rank, world), store)
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Processes.now()


def _agree_on_name(store: dist.Store, rank: int, world: int) -> str:
    """Return a new name for this start of the processes, the same in all of them.

    torchrun's store outlives the processes that it restarts, and would give the new ones the addresses of
    those that have died.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"asks {rank}", mine)
        name = store.get(f"answer to {mine}").decode()  # waits for it
        store.set(f"{rank} has {name}", "")
        return name
    waiting = set(range(1, world))
    while waiting:
        for other in waiting:
            # perhaps one that has died; nobody reads the answer to it
            if store.check([f"asks {other}"]):
                store.set(f"answer to {store.get(f'asks {other}').decode()}", mine)
        waiting = {other for other in waiting if not store.check([f"{other} has {mine}"])}
        time.sleep(0.01)
    return mine


ALONE = Processes()
