"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.methods.base import Dense, is_due
from lrpet.processes import ALONE, Processes
from lrpet.training.interrupt import PatientInterrupt
from lrpet.training.pieces import check_pieces
from lrpet.training.progress import Progress
from lrpet.training.recipes import learning_rate, seed_step, set_learning_rate
from lrpet.training.state import State
from lrpet.training.step import Step
from lrpet.training.tasks import task_of

__all__ = ["Paused", "Session", "train"]


class Paused(Exception):
    """The time budget ended; a checkpoint is written, from which the same call resumes."""


@dataclass(frozen=True)
class Session:
    """One sitting at a run: where it keeps its checkpoint, when it stops, what it shows.

    Args:
        checkpoint: file that is read first, if it exists, and written every ``checkpoint_epochs`` epochs.
        checkpoint_epochs: epochs between two checkpoints.
        deadline: moment of ``time.monotonic()`` after which a checkpoint is written and the run pauses.
        progress: "auto", "bar", "lines" or "off".
        on_epoch: called with the row of each finished epoch, in each process; an exception that it raises
            ends the run.
        device_batch: images that are taken at a time; None: all of this process's part of a batch.
    """

    checkpoint: Path
    checkpoint_epochs: int = 1
    deadline: float | None = None
    progress: str = "auto"
    on_epoch: Callable[[dict], None] | None = None
    device_batch: int | None = None


def train(
    config: RunConfig, method: Dense, batches: Batches, session: Session, processes: Processes = ALONE
) -> State:
    """Train to the end of the schedule; resume from the checkpoint where there is one.

    Several processes make the same steps: each takes its part of a batch, gradients are averaged, and the
    weights stay the same bits in all. What they cannot decide alike by themselves, such as when to stop, they
    agree on.

    Args:
        config: the run.
        method: owner of the model, on the device of ``batches``.
        batches: the data, or this process's part of it.
        session: checkpoint, deadline and progress.
        processes: that train together.

    Returns:
        The last state.

    Raises:
        Paused: the deadline passed.
        KeyboardInterrupt: Ctrl-C; the step under way was finished and a checkpoint written, from which the
            same call resumes.
        ValueError: a process would take one image alone, of which a BatchNorm sees 1×1 pixels.
        FloatingPointError: the loss became NaN or infinite; names epoch, step and the norms of the layers.
        RuntimeError: the processes' weights are no longer the same, as machines of different kinds may make
            them.

    Source: arXiv 2204.05566, method and experimental settings.
    """
    device, steps, last_step = batches.device, batches.steps, config.epochs * batches.steps
    task = task_of(config)
    mix = task.mixer(config, batches.data)
    synchronize = device.type == "cuda"
    check_pieces(method.model, batches, processes.world, session.device_batch)
    state = State(config, method, batches, processes)
    state.load(session.checkpoint)
    clock, recorder, totals = state.clock, state.recorder, state.totals
    shown = session.progress if processes.first else "off"
    bar = Progress(config, steps, state.step, shown)
    method.model.train()
    trainer = _make_step(config, state, session, processes)
    with closing(bar), PatientInterrupt(may_insist=processes.world == 1) as interrupt:
        stop = _Stop(config.run_id, interrupt, session.deadline, processes)
        while len(state.history) < config.epochs:
            epoch, stopping = len(state.history), False
            if method.begin_epoch(epoch):
                state.new_optimizer()
                trainer = _make_step(config, state, session, processes)
            model = method.model
            with clock("train"):
                # no step is left where only the evaluation of the epoch is missing
                for x, y in batches.epoch(epoch, state.step - epoch * steps):
                    in_epoch = state.step % steps
                    last_of_epoch = in_epoch + 1 == steps
                    rate = learning_rate(config, epoch, (in_epoch + 0.5) / steps)
                    set_learning_rate(state.optimizer, rate, device)
                    seed_step(config, state.step, processes.rank)
                    x, target = mix(x, y)
                    trainer.backward(x, target, y, batches.size(in_epoch))
                    sums = processes.sum(totals).tolist() if last_of_epoch else trainer.look()
                    if sums is not None:  # before the end of an epoch, those of this process
                        if not math.isfinite(sums[0]):
                            raise FloatingPointError(_lost(config, model, epoch, in_epoch))
                        bar.step(epoch, task.training_scores(*sums), state.step + 1)
                    with clock("recording"):
                        recorder.record_gradients(model, epoch, in_epoch, last_of_epoch)
                    method.regularize()
                    trainer.update()
                    state.step += 1
                    due = state.step == last_step or is_due(config, state.step, steps)
                    if last_of_epoch:
                        with clock("recording"):
                            recorder.record_spectra(model, epoch, "before")
                    if last_of_epoch and state.best.counts(epoch):
                        with clock("evaluation"):
                            state.best.consider(epoch, method, batches, processes)
                    if synchronize and (due or last_of_epoch):
                        torch.cuda.synchronize(device)  # else steps under way would count as projection
                    with clock("projection") if due else nullcontext():
                        reports = method.after_step(state.step, steps, state.step == last_step)
                    state.projected = reports is not None
                    if reports is not None:
                        method.adapt(state.optimizer, reports)
                        state.layers = [vars(report) for report in reports]
                        state.projections += 1
                        if last_of_epoch:
                            with clock("recording"):
                                recorder.record_spectra(model, epoch, "after")
                    stopping = stop.wanted() and not last_of_epoch
                    if stopping:
                        break
                if synchronize:
                    torch.cuda.synchronize(device)
            if stopping:
                state.save(session.checkpoint)
                raise stop.reason(f"at step {state.step} of {last_step}")
            if not processes.same(list(model.parameters())):
                raise RuntimeError(
                    f"the weights of {config.run_id} differ between processes after epoch {epoch + 1}; "
                    "use machines of one kind"
                )
            # running statistics of the first: each process has those of its own part of the last batch
            processes.copy_from(0, list(model.buffers()))
            try:  # evaluation may take long and changes nothing; but several processes must leave it together
                with clock("evaluation"), interrupt.allowed() if processes.world == 1 else nullcontext():
                    scores = task.evaluate(model, batches, processes)
            except KeyboardInterrupt as request:
                state.save(session.checkpoint)
                raise stop.reason(f"at the evaluation of epoch {epoch + 1} of {config.epochs}") from request
            if not math.isfinite(scores["loss"]):
                raise FloatingPointError(_lost(config, model, epoch, steps - 1))
            state.history.append(_row(config, state, scores, processes.sum(totals).tolist()))
            totals.zero_()
            bar.epoch(state.history[-1], state.step)
            at_end = state.step == last_step
            stopping = stop.wanted() and not at_end
            if (epoch + 1) % session.checkpoint_epochs == 0 or at_end or stopping:
                state.save(session.checkpoint)
            if session.on_epoch is not None:
                session.on_epoch(state.history[-1])
            if stopping:
                raise stop.reason(f"after epoch {epoch + 1} of {config.epochs}")
    return state


def _make_step(config: RunConfig, state: State, session: Session, processes: Processes) -> Step:
    return Step(
        config,
        processes.parallel(state.method.model),
        state.optimizer,
        state.totals,
        # a graph has the weight decay in it, which matched steps change
        graphs=state.device.type == "cuda"
        and processes.world == 1
        # and a new basis of gradients is computed between kernels; Adafactor cannot be recorded
        and not (config.matched_steps or config.gradient_projection or config.optimizer == "adafactor")
        and task_of(config).graphs,
        world=processes.world,
        device_batch=session.device_batch,
    )


class _Stop:
    """Whether a run is to stop, by Ctrl-C or its deadline; its processes agree on it."""

    def __init__(
        self, run_id: str, interrupt: PatientInterrupt, deadline: float | None, processes: Processes
    ):
        self.run_id, self.interrupt, self.deadline, self.processes = run_id, interrupt, deadline, processes

    def wanted(self) -> bool:
        """Ask all processes."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        asked, late = self.processes.any(self.interrupt.asked, late)
        self.interrupt.asked = self.interrupt.asked or asked
        return asked or late

    def reason(self, place: str) -> BaseException:
        """Return what the run ends with at this place."""
        if self.interrupt.asked:
            written = "a checkpoint is written, from which the same call resumes"
            return KeyboardInterrupt(f"{self.run_id} stopped {place}; {written}")
        return Paused(f"{self.run_id} paused {place}")


def _row(config: RunConfig, state: State, scores: dict, sums: list[float]) -> dict:
    """Return the row of the epoch that has just been scored."""
    epoch, column = len(state.history), config.metric.column
    return {
        "epoch": epoch + 1,
        "learning_rate": learning_rate(config, epoch),
        **task_of(config).training_scores(*sums),
        "scored_on": "held out" if config.validation_fraction else "test",
        **scores,
        **({f"unprojected_{column}": state.best.scores[-1]} if state.best.counts(epoch) else {}),
        "projected": state.projected,
        "train_seconds": round(state.clock.seconds["train"], 3),
        "projection_seconds": round(state.clock.seconds["projection"], 3),
    }


def _lost(config: RunConfig, model: nn.Module, epoch: int, step: int) -> str:
    norms = ", ".join(f"{name} {p.norm().item():.3g}" for name, p in model.named_parameters() if p.ndim > 1)
    return (
        f"the loss of {config.run_id} is no longer finite: epoch {epoch + 1}, step {step + 1}. "
        f"Norms of the weights: {norms}. "
        "The last checkpoint is whole; a smaller learning_rate or precision='fp32' usually helps"
    )
