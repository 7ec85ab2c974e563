"""One configuration to one folder: trained, resumed or loaded by one call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from lrpet.config import RunConfig
from lrpet.data.load import load_images, make_batches
from lrpet.data.objects import ObjectData
from lrpet.data.sets import ImageData
from lrpet.data.stream import StreamData
from lrpet.files import write_file
from lrpet.methods import make_method
from lrpet.methods.base import Dense, build_network
from lrpet.models.pretrained import load_backbone
from lrpet.paths import data_folder, expanded
from lrpet.processes import Processes, join_processes
from lrpet.runs.device import deterministic_algorithms, device_of
from lrpet.runs.environment import environment
from lrpet.runs.finish import Trained, as_json, finish_run, tidy
from lrpet.runs.store import Run, is_complete, load_run, read_json
from lrpet.training.checkpoint import has_checkpoint
from lrpet.training.loop import Session, train
from lrpet.training.recipes import augmentation
from lrpet.training.step_cost import step_cost
from lrpet.training.tasks import task_of

__all__ = ["run"]
# of the images that a run saw, and of the weights that it began with
IDENTITY = ("data_train_sha256", "data_test_sha256", "data_classes_sha256", "backbone_sha256")
ARGUMENTS = {  # of run: what each must be, in a test and in words
    "config": (lambda v: isinstance(v, RunConfig), "a RunConfig; RunConfig.from_dict makes one of a map"),
    "data": (lambda v: v is None or isinstance(v, (str, Path)), "the path of a folder, or None"),
    "device": (lambda v: isinstance(v, str), "auto, cpu, cuda or cuda:1"),
    "results": (lambda v: v is None or isinstance(v, (str, Path)), "the path of a folder, or None"),
    "checkpoint_epochs": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
    "time_budget": (
        lambda v: v is None or (type(v) in (int, float) and v >= 0),
        "seconds, 0 or more, or None",
    ),
    "progress": (lambda v: v in ("auto", "bar", "lines", "off"), "auto, bar, lines or off"),
    "on_epoch": (lambda v: v is None or callable(v), "a function of the row of an epoch, or None"),
    "deterministic": (lambda v: isinstance(v, bool), "True or False"),
    "device_batch": (lambda v: v is None or (type(v) is int and v >= 1), "a number of images, or None"),
}


@dataclass(frozen=True)
class _Job:
    """What one call of :func:`run` trains, where and with whom."""

    config: RunConfig
    data: str | Path | None
    device: torch.device | None  # None: nothing to train
    processes: Processes
    session: Session

    @property
    def folder(self) -> Path:
        return self.session.checkpoint.parent

    def say(self, text: str) -> None:
        if self.session.progress != "off" and self.processes.first:
            print(text, flush=True)


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
) -> Run:
    """Do a run, resume it or load it: whichever its folder calls for.

    Under torchrun its processes train together, each on its part of every batch; all of them call this, and
    get the same. Only the first reads and writes the folder. A checkpoint knows the number of steps done,
    nothing of processes: any number of them resumes from it.

    Args:
        config: what to run.
        data: folder of the images; None takes ``LRPET_DATA``. A finished run needs none.
        device: "auto" (CUDA where there is a GPU), "cpu", "cuda" or "cuda:1".
        results: root of the store; None is ``LRPET_RESULTS`` or ``results/`` of the project.
        checkpoint_epochs: epochs between two checkpoints.
        time_budget: seconds after which to write a checkpoint and stop.
        progress: "auto", "bar" (terminal and Jupyter), "lines" (one per epoch) or "off".
        on_epoch: called with the row of each finished epoch, as in ``history``; may raise to end the run.
        deterministic: use only algorithms that give the same bits each time, which costs time on a GPU and
            changes nothing on a CPU. What the same seed does not promise: the same bits on another device,
            number of threads or version of PyTorch.
        device_batch: images that a device takes at a time; a larger part of a batch is taken in pieces, whose
            gradients add up, so that a batch means the same on fewer or smaller devices (except for
            BatchNorm, which sees a piece). None: whatever its part is.

    Returns:
        The finished run.

    Raises:
        Paused: the time budget ended before the run did.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
        OSError: a file could not be written, as on a full disk; the checkpoint before is untouched.
        RuntimeError: ``deterministic``, and PyTorch has no such algorithm for an operation of the network;
            names it.
        DataError, ValueError: data or configuration cannot be used, or the folder holds another
            configuration.
        FloatingPointError: the loss became NaN or infinite.
        MemoryError: the device's memory is too small for a batch.

    Two processes asked for the same run do not both train it: the second waits, then loads.
    """
    _check_arguments(locals())
    deadline = None if time_budget is None else time.monotonic() + time_budget
    folder = config.folder(None if results is None else expanded(results))
    checkpoint = folder / "checkpoint.pt"
    session = Session(checkpoint, checkpoint_epochs, deadline, progress, on_epoch, device_batch)
    processes = join_processes()
    job = _Job(config, data, None, processes, session)
    if not processes.share(lambda: is_complete(folder)):
        job = replace(job, device=processes.own_device(device_of(device, config, processes.world > 1)))
        with _hold(job) if processes.first else nullcontext():
            if not processes.share(lambda: is_complete(folder)):
                with deterministic_algorithms(deterministic):
                    return _train(job)
    done = processes.share(lambda: load_run(folder))
    _same_config(folder, done.config, config)
    processes.share(lambda: _same_as_seen(done, data))
    if processes.first:
        with suppress(OSError):  # a run that may only be read is as good
            tidy(folder)  # where it was killed between its summary and this
    e = done.environment
    trained = f"trained {e['finished'][:16]} on {e['device']} at commit {e['commit'][:9]}"
    job.say(f"{config.run_id}: loaded, {trained}")
    return done


def _check_arguments(given: Mapping) -> None:
    """Refuse what cannot be meant, before a folder is made."""
    for name, (good, wanted) in ARGUMENTS.items():
        if not good(given[name]):
            raise ValueError(f"{name} must be {wanted}; got {given[name]!r}")


def _hold(job: _Job) -> AcquireReturnProxy:
    """Return the lock of a run, held until its block ends, also by an error, or the process dies."""
    folder = job.folder
    lock = FileLock(folder / "run.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except Timeout:
        job.say(f"{folder.name} is being trained by another process; waiting for it")
        return lock.acquire()
    except OSError as error:
        raise ValueError(
            f"results must be a folder that can be written; got {folder}: {error.strerror}; set LRPET_RESULTS"
        ) from error


def _train(job: _Job) -> Run:
    """Train or resume the run, and write its folder."""
    config, processes, device = job.config, job.processes, job.device
    resumed = processes.share(lambda: has_checkpoint(job.session.checkpoint))
    images = _load(job)
    origin = processes.share(lambda: _begin(job, images))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    where = device, config.seed, processes.rank, processes.world
    batches = make_batches(images, config.batch_size, *where, **augmentation(config))
    method = _new_method(job, images)
    verb, times = "resuming" if resumed else "training", f"{processes.world} × " * (processes.world > 1)
    length = f"{config.epochs} epochs of {batches.steps} steps"
    job.say(f"{config.run_id}: {verb} {length} on {times}{origin['device']}")
    try:
        state = train(config, method, batches, job.session, processes)
    except torch.OutOfMemoryError as error:
        pieces = job.session.device_batch or -(-config.batch_size // processes.world)
        raise MemoryError(
            f"{origin['device']} has too little memory for batch_size {config.batch_size}, of which it takes "
            f"{pieces} images at a time: give --device-batch {max(1, pieces // 2)} (device_batch=) or less, "
            f"which takes a batch in pieces, or a smaller batch_size; {str(error).splitlines()[0]}"
        ) from error
    compact = method.compact()
    column = config.metric.column
    scores = {f"compact_{column}": task_of(config).evaluate(compact, batches, processes)[column]}
    scores |= state.best.summary(config, method, state.history, batches, processes)
    if config.recipe == "cosine" and processes.world == 1:
        scores |= step_cost(config, method.model, state.optimizer, batches)
    if processes.first:
        finish_run(Trained(job.folder, state, batches, compact, scores, origin))
    return processes.share(lambda: load_run(job.folder))


def _load(job: _Job) -> ImageData | StreamData | ObjectData:
    """Return the images, in memory or streamed: alike in all processes, and as a run to be resumed began."""
    processes, where = job.processes, {"device": job.device}
    streamed = processes.share(lambda: _was_streamed(job.folder))
    with processes.in_turn():
        images = load_images(job.config, job.data, streamed=streamed, **where)
    if processes.any(isinstance(images, StreamData))[0] and not isinstance(images, StreamData):
        images = load_images(job.config, job.data, streamed=True, **where)  # only this process had room
    if processes.any(processes.share(lambda: images.fingerprint) != images.fingerprint)[0]:
        raise ValueError(
            "data must hold the same images for every process; got others on another machine: "
            "give them the same copy by --data"
        )
    return images


def _begin(job: _Job, images: ImageData | StreamData | ObjectData) -> dict:
    """Write down what a run begins with, and return where it comes from; refuse one that began otherwise."""
    origin = environment(job.device) | {"processes": job.processes.world} | _identity(job.config, images)
    begun = job.folder / "config.json"
    if begun.is_file():
        _same_config(job.folder, RunConfig.from_dict(read_json(begun)), job.config)
    _same_data(job.folder, origin)
    write_file(begun, as_json(job.config.to_dict()))
    write_file(job.folder / "environment.json", as_json(origin))
    return origin


def _new_method(job: _Job, images: ImageData | StreamData | ObjectData) -> Dense:
    """Return the method around the network that it starts from."""
    torch.manual_seed(job.config.seed)  # before the model exists
    model = build_network(job.config, len(images.classes))
    if job.config.pretrained_backbone:
        load_backbone(model, images.backbone)
    if job.config.sync_batchnorm and job.processes.world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return make_method(model.to(job.device, memory_format=torch.channels_last), job.config)


def _was_streamed(folder: Path) -> bool | None:
    """Tell how the images of a run to be resumed were read. None: nothing to resume."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return None
    return read_json(folder / "environment.json")["data_train_sha256"].startswith("files:")


def _same_config(folder: Path, there: RunConfig, asked: RunConfig) -> None:
    """Refuse a folder of another configuration, as two may have one name: it ends with 24 bits of a hash."""
    one, other = there.to_dict(), asked.to_dict()
    names = [name for name in one if one[name] != other[name]]
    if names:
        differ = "; ".join(f"{name} {one[name]!r} there, {other[name]!r} asked for" for name in names)
        raise ValueError(
            f"{folder} holds another configuration of the same name than the one asked for: {differ}. "
            "Give another seed or results folder (LRPET_RESULTS)"
        )


def _identity(config: RunConfig, images: ImageData | StreamData | ObjectData) -> dict[str, str]:
    """Return what tells the images of a run from others: their content and, of a tree, its classes."""
    if config.dataset != "imagefolder":
        return images.fingerprint
    classes = hashlib.sha256("\n".join(images.classes).encode()).hexdigest()
    return images.fingerprint | {"data_classes_sha256": classes}


def _other(before: dict, now: dict) -> str | None:
    """Return the name of what differs between images as recorded and as they are."""
    return next((name for name in IDENTITY if name in before and before[name] != now.get(name)), None)


def _same_data(folder: Path, origin: dict) -> None:
    """Refuse to resume with other images than a run began with."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return
    name = _other(read_json(folder / "environment.json"), origin)
    if name is not None:
        raise ValueError(
            f"{folder} was begun with other images ({name} differs); "
            "give the data it began with, or another results folder"
        )


def _same_as_seen(done: Run, data: str | Path | None) -> None:
    """Refuse to show a finished run for other images: its name does not say which it saw."""
    root, before = data_folder(data), done.environment
    embedded = done.config.dataset in ("digits", "topics")
    if embedded or root is None or not root.exists() or IDENTITY[0] not in before:
        return
    images = load_images(done.config, root, streamed=before[IDENTITY[0]].startswith("files:"))
    name = _other(before, _identity(done.config, images))
    if name is not None:
        raise ValueError(
            f"{done.folder} is a finished run on other images than {root} holds ({name} differs); give the "
            "data that it saw, or none, or another seed or results folder (LRPET_RESULTS)"
        )
