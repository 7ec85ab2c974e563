"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.methods.base import Dense, is_due
from lrpet.processes import ALONE, Processes
from lrpet.training.checkpoint import load_checkpoint, save_checkpoint
from lrpet.training.evaluate import evaluate
from lrpet.training.interrupt import PatientInterrupt
from lrpet.training.progress import Progress
from lrpet.training.recipes import learning_rate, make_mixer, make_optimizer, set_learning_rate
from lrpet.training.recording import Recorder
from lrpet.training.step import Step

__all__ = ["Paused", "train"]


class Paused(Exception):
    """The time budget ended; a checkpoint is written, and the same call goes on from it."""


def train(
    config: RunConfig,
    method: Dense,
    batches: Batches,
    checkpoint: Path,
    *,
    checkpoint_epochs: int = 1,
    deadline: float | None = None,
    progress: str = "auto",
    on_epoch: Callable[[dict], None] | None = None,
    processes: Processes = ALONE,
    device_batch: int | None = None,
) -> dict:
    """Train to the end of the schedule, going on from the checkpoint where there is one.

    Several processes make the same steps: each takes its part of a batch, gradients are averaged, and the weights stay the same bits
    in all. What they cannot decide alike by themselves, such as when to stop, they agree on. The checkpoint is the first's; it is
    that of one process, but that its sums are those of all.

    Args:
        config: the run.
        method: owner of the model, on the device of ``batches``.
        batches: the data, or this process's part of it.
        checkpoint: file that is read first, if it exists, and written every ``checkpoint_epochs`` epochs.
        deadline: moment of ``time.monotonic()`` after which a checkpoint is written and the run pauses.
        progress: "auto", "bar", "lines" or "off".
        on_epoch: called with the row of each finished epoch, in each process; an exception that it raises ends the run.
        processes: that train together.
        device_batch: images that are taken at a time; None: all of this process's part of a batch.

    Returns:
        The last state: ``history`` (a row an epoch), ``layers`` (report of the last projection), ``recorder`` and seconds spent.

    Raises:
        Paused: the deadline passed.
        KeyboardInterrupt: Ctrl-C; the step under way was finished and a checkpoint written, from which the same call goes on.
        FloatingPointError: the loss became NaN or infinite; names epoch, step and the norms of the layers.
        RuntimeError: the processes' weights are no longer the same, as machines of different kinds may make them.

    Source: arXiv 2204.05566, method and experimental settings.
    """
    device, steps = batches.device, batches.steps
    mix = make_mixer(config, len(batches.data.classes))
    state = load_checkpoint(checkpoint, device, processes) or {
        "step": 0,
        "history": [],
        "layers": [],
        "sums": [0.0, 0.0, 0.0],
    }
    recorder = Recorder(config.epochs, steps)
    if state["step"]:
        method.restore(state["structure"])
        method.model.load_state_dict(state["model"])
        recorder.state = state["records"]
    model, optimizer = method.model, make_optimizer(config, method.model, device, method.undecayed)
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
    step, history, layers, projected = (
        state["step"],
        state["history"],
        state["layers"],
        state.get("projected", False),
    )
    totals = (
        torch.tensor(state["sums"], dtype=torch.float64, device=device) * processes.first
    )  # of the epoch: losses, correct answers, images
    clock = state.get(
        "clock", {"train": 0.0, "projection": 0.0, "evaluation": 0.0, "recording": 0.0, "projections": 0}
    )
    bar = Progress(config.run_id, config.epochs, steps, step, progress if processes.first else "off")
    on_gpu = device.type == "cuda"
    make_step = lambda: Step(
        config,
        processes.parallel(model),
        optimizer,
        totals,
        graphs=on_gpu and processes.world == 1,
        world=processes.world,
        device_batch=device_batch,
    )

    def wanted_to_stop() -> bool:
        asked, late = processes.any(interrupt.asked, deadline is not None and time.monotonic() > deadline)
        interrupt.asked = interrupt.asked or asked
        return asked or late

    def stopped(place: str) -> BaseException:
        if interrupt.asked:
            return KeyboardInterrupt(
                f"{config.run_id} stopped {place}; a checkpoint is written, and the same call goes on from it"
            )
        return Paused(f"{config.run_id} paused {place}")

    def keep():
        sums = processes.sum(totals).tolist()
        if not processes.first:
            return
        save_checkpoint(
            checkpoint,
            {
                "step": step,
                "structure": method.structure,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "history": history,
                "layers": layers,
                "records": recorder.state,
                "projected": projected,
                "sums": sums,
                "clock": clock,
            },
        )

    def book(began: float, projecting: float, recording: float):
        clock["train"] += time.perf_counter() - began - projecting - recording
        clock["projection"] += projecting
        clock["recording"] += recording

    model.train()
    trainer = make_step()
    with closing(bar), PatientInterrupt(may_insist=processes.world == 1) as interrupt:
        while len(history) < config.epochs:
            epoch, in_epoch = (
                len(history),
                step - len(history) * steps,
            )  # in_epoch = steps: only its evaluation is missing
            if method.begin_epoch(epoch):
                model, optimizer = (
                    method.model,
                    make_optimizer(config, method.model, device, method.undecayed),
                )
                trainer = make_step()
            set_learning_rate(optimizer, learning_rate(config, epoch), device)
            began, projecting, recording = time.perf_counter(), 0.0, 0.0
            for x, y in batches.epoch(epoch, in_epoch):
                x, target = mix(x, y)
                trainer.backward(x, target, y, batches.size(step % steps))
                last_of_epoch = (step + 1) % steps == 0
                sums = (
                    processes.sum(totals).tolist() if last_of_epoch else trainer.look()
                )  # on the way, this process's own
                if sums is not None:
                    loss_sum, correct, seen = sums
                    if not math.isfinite(loss_sum):
                        raise FloatingPointError(_lost(config, model, epoch, step % steps))
                    bar.step(epoch, loss_sum / max(seen, 1), 100 * correct / max(seen, 1), step + 1)
                then = time.perf_counter()
                recorder.record_gradients(model, epoch, step % steps, last_of_epoch)
                recording += time.perf_counter() - then
                method.regularize()
                trainer.update()
                step += 1
                then = time.perf_counter()
                if last_of_epoch:
                    recorder.record_spectra(model, epoch, "before")
                    recording += time.perf_counter() - then
                if on_gpu and (last_of_epoch or is_due(config, step, steps)):
                    torch.cuda.synchronize(
                        device
                    )  # else the projection's clock would run for steps that are still under way
                then = time.perf_counter()
                reports = method.after_step(step, steps, step == config.epochs * steps)
                projected = reports is not None
                if projected:
                    layers = [vars(report) for report in reports]
                    projecting += time.perf_counter() - then
                    clock["projections"] += 1
                    if last_of_epoch:
                        then = time.perf_counter()
                        recorder.record_spectra(model, epoch, "after")
                        recording += time.perf_counter() - then
                if wanted_to_stop() and not last_of_epoch:
                    book(began, projecting, recording)
                    keep()
                    raise stopped(f"at step {step} of {config.epochs * steps}")
            if on_gpu:
                torch.cuda.synchronize(device)
            book(began, projecting, recording)
            if not processes.same(list(model.parameters())):
                raise RuntimeError(
                    f"the weights of {config.run_id} differ between processes after epoch {epoch + 1}; use machines of one kind"
                )
            processes.copy_from(
                0, list(model.buffers())
            )  # the first's running statistics: those of this process have its own part of the last batch
            then = time.perf_counter()
            try:  # a large test set takes long, and evaluation changes nothing; but several processes must leave it together
                with interrupt.allowed() if processes.world == 1 else nullcontext():
                    scores = evaluate(model, batches, processes)
            except KeyboardInterrupt as request:
                keep()
                raise stopped(f"at the evaluation of epoch {epoch + 1} of {config.epochs}") from request
            clock["evaluation"] += time.perf_counter() - then
            if not math.isfinite(scores["loss"]):
                raise FloatingPointError(_lost(config, model, epoch, steps - 1))
            loss_sum, correct, seen = processes.sum(totals).tolist()
            history = history + [
                {
                    "epoch": epoch + 1,
                    "learning_rate": learning_rate(config, epoch),
                    "train_loss": loss_sum / seen,
                    "train_top1_pct": 100 * correct / seen,
                    "scored_on": "held out" if config.validation_fraction else "test",
                    **scores,
                    "projected": projected,
                    "train_seconds": round(clock["train"], 3),
                    "projection_seconds": round(clock["projection"], 3),
                }
            ]
            totals.zero_()
            bar.epoch(history[-1], step)
            over = wanted_to_stop() and step < config.epochs * steps
            if (epoch + 1) % checkpoint_epochs == 0 or step == config.epochs * steps or over:
                keep()
            if on_epoch is not None:
                on_epoch(history[-1])
            if over:
                raise stopped(f"after epoch {epoch + 1} of {config.epochs}")
    return {"history": history, "layers": layers, "recorder": recorder, **clock}


def _lost(config: RunConfig, model: nn.Module, epoch: int, step: int) -> str:
    norms = ", ".join(f"{name} {p.norm().item():.3g}" for name, p in model.named_parameters() if p.ndim > 1)
    return (
        f"the loss of {config.run_id} is no longer finite: epoch {epoch + 1}, step {step + 1}. Norms of the weights: {norms}. "
        "The last checkpoint is whole; a smaller learning_rate or precision='fp32' usually helps"
    )
