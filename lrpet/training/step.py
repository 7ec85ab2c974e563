"""One step of training: forward, loss, backward, optimizer; on a GPU recorded as CUDA graphs and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lrpet.config import RunConfig
from lrpet.training.bfloat16 import Bfloat16Products, has_bfloat16_products
from lrpet.training.pieces import count_pieces
from lrpet.training.tasks import task_of

__all__ = ["Step"]
# steps done plainly before they are recorded: by then cuDNN has its algorithms and the optimizer its buffers
WARM_UP = 3
# how far gradients of a replayed step may be from those of a plain one, relative to a layer's
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}


class Step:
    """Makes the steps of one network with one optimizer, and keeps their running totals on the device.

    A step of a small network is about a thousand kernels of a few microseconds, less than it takes to launch
    each from Python. So on a GPU the kernels of a whole batch are recorded as two graphs, cut where gradients
    are complete (there they may be read or added to), and each is launched by one call. A smaller last batch
    is done plainly. Nothing here waits for the GPU except the recording itself. The first recorded step is
    done both ways and compared; where they differ, or recording fails, all steps are plain, after a warning.

    Args:
        config: of the run; its recipe and precision are read.
        model: in training mode, on the device of ``totals``.
        optimizer: of its parameters; on a GPU with learning rates as tensors, see
            :func:`lrpet.training.recipes.set_learning_rate`.
        totals: (3,), float64: sum of losses, number of correct answers and of images; each step adds to it.
        graphs: record and replay; only on a GPU, and in one process.
        world: processes that each do a part of a batch; ``model`` then averages their gradients
            (DistributedDataParallel).
        device_batch: images that are taken at a time; gradients of several pieces add up.

    Source: CUDA graphs as in the PyTorch notes "CUDA semantics", section "CUDA Graphs".

    >>> model, totals = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(3, dtype=torch.float64)
    >>> step = Step(RunConfig(), model, torch.optim.SGD(model.parameters(), lr=0.1), totals)
    >>> step.backward(torch.zeros(5, 1, 2, 2), torch.zeros(5).long(), torch.zeros(5).long())
    >>> step.update()
    >>> step.look()[2]
    5.0
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        totals: Tensor,
        *,
        graphs: bool = False,
        world: int = 1,
        device_batch: int | None = None,
    ):
        self.config, self.model, self.optimizer, self.totals = config, model, optimizer, totals
        self.world, self.device_batch, self.task = world, device_batch, task_of(config)
        self._stream = torch.cuda.Stream() if graphs else None
        self._calls, self._graphs = 0, None  # graphs: (backward, update)
        self._trusted = True  # until graphs were compared with plain steps
        self._host, self._copied = None, None

    def backward(self, x: Tensor, target: Tensor, y: Tensor, images: int | None = None) -> None:
        """Leave the gradients of a batch in the parameters and add to the totals.

        Args:
            x: (B, 3, H, W); of several processes, this one's part of the batch, which may hold no image.
            target: what the loss compares with, (B,) or (B, classes).
            y: the labels that a correct answer has, (B,).
            images: of the whole batch, over which the loss is a mean; None: B.
        """
        images = len(y) if images is None else images
        whole = self._calls >= WARM_UP and len(y) == self.config.batch_size
        if whole and self._stream is not None and self._trusted and self._graphs is None:
            self._rehearse(x, target, y)
        self._replaying = whole and self._graphs is not None
        if self._replaying:
            self._replay(x, target, y)
        else:
            self._calls += 1
            self._aside(self._backward, x, target, y, images)

    def update(self) -> None:
        """Let the optimizer make its step."""
        self._graphs[1].replay() if self._replaying else self.optimizer.step()

    def look(self) -> list[float] | None:
        """Return the totals; on a GPU of one of the last steps, or None while they are on their way."""
        if self.totals.device.type != "cuda":
            return self.totals.tolist()
        if self._copied is not None and not self._copied.query():
            return None
        values = self._host.tolist() if self._copied else None
        if self._host is None:
            self._host = torch.empty(3, dtype=self.totals.dtype, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._host.copy_(self.totals, non_blocking=True)
        self._copied.record()
        return values

    def _backward(self, x: Tensor, target: Tensor, y: Tensor, images: int) -> None:
        self.optimizer.zero_grad()
        self._forward_backward(x, target, y, images)

    def _forward_backward(self, x: Tensor, target: Tensor, y: Tensor, images: int) -> None:
        count = count_pieces(len(y), self.device_batch or self.config.batch_size)
        pieces = zip(*(whole.tensor_split(count) for whole in (x, target, y)), strict=True)
        for left, piece in zip(reversed(range(count)), pieces, strict=True):
            # processes meet at the last piece
            with self.model.no_sync() if left and self.world > 1 else nullcontext():
                self._add_gradients(*piece, images)

    def _add_gradients(self, x: Tensor, target: Tensor, y: Tensor, images: int) -> None:
        bf16 = self.config.precision == "bf16"
        with Bfloat16Products() if bf16 and not has_bfloat16_products(x.device) else nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                logits = self.task.forward(self.model, x, target)
                # of no image the sum is 0, and so are its gradients
                loss = self.task.loss(self.config, logits, target) if len(y) else logits.sum()
            weight = self.world * len(y) / images  # so that the mean over processes is that over all images
            (loss if weight == 1 else weight * loss).backward()
        self.totals[0] += loss.detach() * len(y)
        self.totals[1] += self.task.correct(logits.detach(), y)
        self.totals[2] += len(y)

    def _aside(self, work, *arguments) -> None:
        """Work on the stream of the recording, where autograd then finds what it keeps for a parameter."""
        if self._stream is None:
            work(*arguments)
            return
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work(*arguments)
        here.wait_stream(self._stream)

    def _replay(self, *batch: Tensor) -> None:
        for static, new in zip(self._batch, batch, strict=True):
            static.copy_(new)
        if self._grads and self._grads[0][0].grad is not self._grads[0][1]:  # a plain step came between
            for p, grad in self._grads:
                p.grad = grad
        self._graphs[0].replay()

    def _rehearse(self, *batch: Tensor) -> None:
        """Record a step, and keep the graphs only if they do what a plain one does; all else is as before."""
        tolerance, wrong = TOLERANCE[self.config.precision], None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            apart = self._compare(
                lambda: self._aside(self._backward, *batch, len(batch[-1])),
                lambda: (self._record(*batch), self._replay(*batch)),
                [self.totals, *self.model.buffers()],
                lambda: [p.grad for p in parameters if p.grad is not None],
            )
            if not apart <= tolerance:  # also where it is not a number
                wrong = f"loss or gradients of a replayed step are {apart:.1e} from those of a plain one"
            else:
                moved = [v for state in self.optimizer.state.values() for v in state.values()]
                changing = parameters + [value for value in moved if isinstance(value, Tensor)]
                apart = self._compare(self.optimizer.step, self._graphs[1].replay, changing)
                if not apart <= tolerance:
                    wrong = f"weights after a replayed step are {apart:.1e} from those after a plain one"
        except RuntimeError as error:
            wrong = f"a step could not be recorded ({error})"
        if wrong:
            self._trusted, self._graphs = False, None
            warnings.warn(f"CUDA graphs are not used: {wrong}; steps are plain, and slower", stacklevel=2)

    @torch.no_grad()
    def _compare(
        self, plain: Callable, replayed: Callable, state: list[Tensor], results: Callable = list
    ) -> float:
        """Return how far two ways of a step are apart, in results and in changes of a state; undo both."""
        before, seen = [tensor.clone() for tensor in state], []
        for way in (plain, replayed):
            on = [self.totals.device] if self.totals.is_cuda else []
            with torch.random.fork_rng(devices=on), torch.enable_grad():
                way()
            changes = [(tensor - old).clone() for tensor, old in zip(state, before, strict=True)]
            seen.append(([value.clone() for value in results()], changes))
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        (one, changed), (other, changed_too) = seen
        # the gradient of a bias before a BatchNorm is nothing but rounding: a floor for all
        floor = 0.01 * sum(value.double().square().sum() for value in one) ** 0.5 if one else 0.0
        return max(_apart(one, other, floor), _apart(changed, changed_too, 0.0))

    def _record(self, *batch: Tensor) -> None:
        self._batch = [tensor.clone() for tensor in batch]
        self.optimizer.zero_grad()  # gradients are made in the graph's memory, so replaying overwrites them
        backward = _capture(
            lambda: self._forward_backward(*self._batch, self.config.batch_size), self._stream
        )
        self._grads = [
            (p, p.grad)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        self._graphs = backward, _capture(self.optimizer.step, self._stream, backward.pool())


def _apart(some: list[Tensor], others: list[Tensor], floor: Tensor | float) -> float:
    """Return the largest norm of a difference of two tensors, relative to the first or to a floor."""
    if len(some) != len(others):
        return float("inf")
    ratios = [
        torch.linalg.vector_norm(a.double() - b.double())
        / (torch.linalg.vector_norm(a.double()) + floor).clamp(min=1e-30)
        for a, b in zip(some, others, strict=True)
    ]
    return torch.stack(ratios).max().item() if ratios else 0.0


def _capture(work: Callable, stream: torch.cuda.Stream, pool: tuple | None = None) -> torch.cuda.CUDAGraph:
    """Return the kernels of ``work`` as a graph; they are not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        work()
    return graph
