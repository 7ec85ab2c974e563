"""One configuration to one folder: trained, resumed or loaded by one call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from lrpet.bench.loading import measure, throughput_line
from lrpet.config import RunConfig
from lrpet.data.load import load_images, make_batches
from lrpet.data.stream import StreamData
from lrpet.data.tree import ON_CORRUPT
from lrpet.methods import make_method
from lrpet.methods.base import build_network
from lrpet.paths import data_folder
from lrpet.processes import join_processes
from lrpet.runs.device import deterministic_algorithms, device_of
from lrpet.runs.environment import environment
from lrpet.runs.finish import Trained, as_json, finish_run, tidy, write_file
from lrpet.runs.store import Run, is_complete, load_run, read_json
from lrpet.training.checkpoint import has_checkpoint
from lrpet.training.evaluate import evaluate
from lrpet.training.loop import Session, train

__all__ = ["run"]


def run(
    config: RunConfig,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    results: str | Path | None = None,
    checkpoint_epochs: int = 1,
    time_budget: float | None = None,
    progress: str = "auto",
    on_epoch: Callable[[dict], None] | None = None,
    deterministic: bool = False,
    device_batch: int | None = None,
    on_corrupt: str = "stop",
) -> Run:
    """Do a run, or go on with it, or load it: whichever its folder calls for.

    Under torchrun its processes train together, each on its part of every batch; all of them call this, and get the same. Only
    the first reads and writes the folder. A checkpoint knows the number of steps done, nothing of processes: any number goes on from it.

    Args:
        config: what to run.
        data: folder of the images; None takes ``LRPET_DATA``. A finished run needs none.
        device: "auto" (CUDA where there is a GPU), "cpu", "cuda" or "cuda:1".
        results: root of the store; None is ``LRPET_RESULTS`` or ``results/`` of the project.
        checkpoint_epochs: epochs between two checkpoints.
        time_budget: seconds after which to write a checkpoint and stop.
        progress: "auto", "bar" (terminal and Jupyter), "lines" (one an epoch) or "off".
        on_epoch: called with the row of each finished epoch, as ``history`` holds it; may raise to end the run.
        deterministic: use only algorithms that give the same bits each time, which costs time on a GPU and changes nothing on a
            CPU. What the same seed does not promise: the same bits on another device, number of threads or version of PyTorch.
        device_batch: images that a device takes at a time; a larger part of a batch is taken in pieces, whose gradients add up, so that
            a batch means the same on fewer or smaller devices (but for BatchNorm, which sees a piece). None: whatever its part is.
        on_corrupt: "stop" ends the run at an image that cannot be decoded, "skip" goes on without such images; each is named, and
            the summary counts them. For imagefolder.

    Returns:
        The finished run.

    Raises:
        Paused: the time budget ended before the run did.
        KeyboardInterrupt: Ctrl-C, behind a checkpoint.
        OSError: a file could not be written, as on a full disk; the checkpoint before is untouched.
        RuntimeError: ``deterministic``, and PyTorch has no such algorithm for an operation of the network; names it.
        DataError, ValueError: data or configuration cannot be used.
        FloatingPointError: the loss became NaN or infinite.

    Two processes asked for the same run do not both train it: the second waits, then loads.
    """
    _check_arguments(
        config,
        data,
        device,
        results,
        checkpoint_epochs,
        time_budget,
        progress,
        on_epoch,
        deterministic,
        device_batch,
        on_corrupt,
    )
    deadline = None if time_budget is None else time.monotonic() + time_budget
    folder = config.folder(None if results is None else Path(results))
    session = Session(
        folder / "checkpoint.pt", checkpoint_epochs, deadline, progress, on_epoch, device_batch
    )
    processes = join_processes()
    say = print if progress != "off" and processes.first else lambda *_, **__: None
    if not processes.share(lambda: is_complete(folder)):
        where = processes.own_device(device_of(device, config, processes.world > 1))
        with _hold(folder, say) if processes.first else nullcontext():
            if not processes.share(lambda: is_complete(folder)):
                with deterministic_algorithms(deterministic):
                    return _train(config, data, where, processes, say, on_corrupt, session)
    done = processes.share(lambda: load_run(folder))
    _same_classes(done, data)
    if processes.first:
        tidy(folder)  # where it was killed between its summary and this
    e = done.environment
    say(
        f"{config.run_id}: loaded, trained {e['finished'][:16]} on {e['device']} at commit {e['commit'][:9]}",
        flush=True,
    )
    return done


def _hold(folder: Path, say: Callable) -> AcquireReturnProxy:
    """Return the lock of a run, held; it is released on the way out of it, also by an error, and by the kernel when the process dies."""
    lock = FileLock(folder / "run.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder.name} is being trained by another process; waiting for it", flush=True)
        return lock.acquire()
    except OSError as error:
        raise ValueError(
            f"results must be a folder that can be written; got {folder}: {error.strerror}; set LRPET_RESULTS"
        ) from error


def _check_arguments(
    config,
    data,
    device,
    results,
    checkpoint_epochs,
    time_budget,
    progress,
    on_epoch,
    deterministic,
    device_batch,
    on_corrupt,
) -> None:
    """Refuse what cannot be meant, before a folder is made."""
    for name, value, good, wanted in (
        (
            "config",
            config,
            isinstance(config, RunConfig),
            "a RunConfig; RunConfig.from_dict makes one of a map",
        ),
        ("data", data, data is None or isinstance(data, (str, Path)), "the path of a folder, or None"),
        ("device", device, isinstance(device, str), "auto, cpu, cuda or cuda:1"),
        (
            "results",
            results,
            results is None or isinstance(results, (str, Path)),
            "the path of a folder, or None",
        ),
        (
            "checkpoint_epochs",
            checkpoint_epochs,
            type(checkpoint_epochs) is int and checkpoint_epochs >= 1,
            "a whole number of at least 1",
        ),
        (
            "time_budget",
            time_budget,
            time_budget is None or (type(time_budget) in (int, float) and time_budget >= 0),
            "seconds, 0 or more, or None",
        ),
        ("progress", progress, progress in ("auto", "bar", "lines", "off"), "auto, bar, lines or off"),
        (
            "on_epoch",
            on_epoch,
            on_epoch is None or callable(on_epoch),
            "a function of the row of an epoch, or None",
        ),
        ("deterministic", deterministic, isinstance(deterministic, bool), "True or False"),
        (
            "device_batch",
            device_batch,
            device_batch is None or (type(device_batch) is int and device_batch >= 1),
            "a number of images, or None",
        ),
        ("on_corrupt", on_corrupt, on_corrupt in ON_CORRUPT, " or ".join(ON_CORRUPT)),
    ):
        if not good:
            raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _train(config, data, device, processes, say, on_corrupt, session) -> Run:
    checkpoint, folder = session.checkpoint, session.checkpoint.parent
    streamed, resumed = processes.share(lambda: (_was_streamed(folder), has_checkpoint(checkpoint)))
    with processes.in_turn():
        images = load_images(config, data, device=device, on_corrupt=on_corrupt, streamed=streamed)
    if processes.any(isinstance(images, StreamData))[0] and not isinstance(
        images, StreamData
    ):  # there was room for them in this process only
        images = load_images(config, data, device=device, on_corrupt=on_corrupt, streamed=True)
    origin = environment(device) | {"processes": processes.world} | images.fingerprint
    if processes.any(processes.share(lambda: images.fingerprint) != images.fingerprint)[0]:
        raise ValueError(
            "data must hold the same images for every process; got others on another machine: give them the same copy by --data"
        )
    if config.dataset == "imagefolder":
        origin["data_classes_sha256"] = _digest(images.classes)
    if images.corrupt:
        origin["corrupt_images"] = list(images.corrupt)
    if processes.first:
        _same_data(folder, origin)
        write_file(folder / "config.json", as_json(config.to_dict()))
        write_file(folder / "environment.json", as_json(origin))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    batches = make_batches(images, config.batch_size, device, config.seed, processes.rank, processes.world)
    if isinstance(images, StreamData) and not resumed:
        say(throughput_line(measure(config, batches)), flush=True)
    torch.manual_seed(config.seed)  # before the model exists
    model = build_network(config, len(images.classes))
    if config.sync_batchnorm and processes.world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    method = make_method(model, config)
    verb, times = "resuming" if resumed else "training", f"{processes.world} × " * (processes.world > 1)
    say(
        f"{config.run_id}: {verb} {config.epochs} epochs of {batches.steps} steps on {times}{origin['device']}",
        flush=True,
    )
    state = train(config, method, batches, session, processes)
    compact = method.compact()
    compact_top1_pct = evaluate(compact, batches, processes)["top1_pct"]
    if processes.first:
        finish_run(Trained(folder, state, batches, compact, compact_top1_pct, origin))
    return processes.share(lambda: load_run(folder))


def _was_streamed(folder: Path) -> bool | None:
    """Tell how the images of a run to be resumed were read; the same again, however much memory is free now. None: nothing to resume."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return None
    return read_json(folder / "environment.json")["data_train_sha256"].startswith("files:")


def _same_data(folder: Path, environment: dict) -> None:
    """Refuse to go on with other images than a run began with."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return
    before = read_json(folder / "environment.json")
    for name in ("data_train_sha256", "data_test_sha256"):
        if before.get(name) != environment[name]:
            raise ValueError(
                f"{folder} was begun with other images ({name} differs); give the data it began with, or another results folder"
            )


def _same_classes(done: Run, data: str | Path | None) -> None:
    """Refuse to show a finished run for a tree of other classes: which images it saw is no part of its name."""
    root, seen = data_folder(data), done.environment.get("data_classes_sha256")
    if seen is None or root is None or not root.is_dir():
        return
    place = root / "train" if (root / "train").is_dir() else root
    if _digest(sorted(entry.name for entry in place.iterdir() if entry.is_dir())) != seen:
        raise ValueError(
            f"{done.folder} is a finished run on other classes than {root} holds; give another seed or results folder (LRPET_RESULTS)"
        )


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
