"""The store: a folder a run; trained, resumed or loaded by one call."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from lrpet.config import PROJECT, RunConfig, results_root
from lrpet.cost import cost
from lrpet.data import ON_CORRUPT, data_folder
from lrpet.factorize import compact_header, load_compact, save_compact
from lrpet.files import write_whole
from lrpet.filter_pruning import keep_filters
from lrpet.methods import build_network, make_method
from lrpet.models import build_model
from lrpet.processes import join_processes
from lrpet.projector import LayerReport
from lrpet.streaming import StreamData, load_images, make_batches
from lrpet.throughput import measure, throughput_line
from lrpet.training import evaluate, has_checkpoint, train

ANEW = "delete the folder to run it anew, or take it from where you got it"
WEIGHTS, HALF_WEIGHTS = "compact.safetensors", "compact-half.safetensors"  # the second of some runs, see results/README.md
FILES = ("config.json", "environment.json", "history.csv", "layers.csv", "summary.json")

__all__ = ["Run", "environment", "is_complete", "load_network", "load_run", "load_runs", "run", "weights_file"]


@dataclass(frozen=True)
class Run:
    """A finished run: its configuration, summary, one row an epoch, one row a layer, and where it came from."""

    config: RunConfig
    summary: dict
    history: pd.DataFrame
    layers: pd.DataFrame
    environment: dict
    folder: Path


def is_complete(folder: Path) -> bool:
    """Tell whether a run folder holds a finished run; ``summary.json`` is written last and by rename."""
    return (folder / "summary.json").is_file()


def load_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: the run is not complete.
        ValueError: a file of it is damaged; names the file.
    """
    if not is_complete(folder):
        raise FileNotFoundError(f"{folder} holds no finished run: it has no summary.json")
    _verify(folder)
    config, summary, environment = (_read_json(folder / f"{name}.json") for name in ("config", "summary", "environment"))
    history, layers = (_read(folder / f"{name}.csv", pd.read_csv) for name in ("history", "layers"))
    return Run(RunConfig.from_dict(config), summary, history, layers, environment, folder)


def _verify(folder: Path) -> None:
    """Refuse a run whose files are not as ``SHA256SUMS`` says, which ``sha256sum -c`` reads too; runs from before it came have none."""
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        told = _read(sums, lambda file: {line[66:]: line[:64] for line in file.read_text().splitlines()})
        for name in FILES:
            if told.get(name) != _read(folder / name, lambda file: hashlib.sha256(file.read_bytes()).hexdigest()):
                raise ValueError(f"{folder / name} is damaged, or {sums.name} beside it: the two disagree; {ANEW}")


def _read_json(file: Path) -> dict:
    return _read(file, lambda file: json.loads(file.read_text()))


def _read(file: Path, read: Callable):
    try:
        return read(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); {ANEW}") from error


def load_runs(root: str | Path | None = None) -> pd.DataFrame:
    """Return every finished run below a folder: a row a run, a column for each config field and summary value.

    Args:
        root: ``results/``, ``results/<profile>`` or any folder above run folders; None is the project's results.

    Returns:
        A DataFrame, with the run folder, device and commit as further columns; empty where nothing has finished.

    >>> len(load_runs("no such folder"))
    0
    """
    rows = []
    for file in sorted(Path(root or results_root()).glob("**/summary.json")):
        run = load_run(file.parent)
        origin = {name: run.environment[name] for name in ("device", "commit", "finished", "data_train_sha256")}
        rows.append({**run.config.to_dict(), **run.summary, **origin, "folder": str(run.folder)})
    return pd.DataFrame(rows)


def weights_file(folder: Path) -> Path:
    """Return the file with a finished run's weights: as they were trained, else rounded to half precision, as the repository keeps a few.

    Raises:
        ValueError: neither is there, as in most results that came with the repository.
    """
    kept = [folder / name for name in (WEIGHTS, HALF_WEIGHTS) if (folder / name).is_file()]
    if not kept:
        raise ValueError(f"{folder / WEIGHTS} is not there: the repository keeps the weights of few runs; delete the run's folder and run it anew")
    return kept[0]


def load_network(finished: Run) -> torch.nn.Module:
    """Return the network of a finished run as it would be deployed, in float32: compact, or dense where nothing was factorized.

    Raises:
        ValueError: the weights are not there, as in most results that came with the repository.
    """
    file = weights_file(finished.folder)
    header = compact_header(file)
    model = build_network(finished.config, header["num_classes"])
    if finished.config.method == "filter_pruning":
        model = keep_filters(model, header["filters"], (3, finished.config.image_size, finished.config.image_size))
    return load_compact(file, model)


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
    _check_arguments(config, data, device, results, checkpoint_epochs, time_budget, progress, on_epoch, deterministic, device_batch, on_corrupt)
    deadline = None if time_budget is None else time.monotonic() + time_budget
    folder = config.folder(None if results is None else Path(results))
    processes = join_processes()
    say = print if progress != "off" and processes.first else lambda *_, **__: None
    if not processes.share(lambda: is_complete(folder)):
        where = processes.own_device(device_of(device, config, processes.world > 1))
        with _hold(folder, say) if processes.first else nullcontext():
            if not processes.share(lambda: is_complete(folder)):
                with _deterministic(deterministic):
                    schedule = {"checkpoint_epochs": checkpoint_epochs, "deadline": deadline, "progress": progress, "on_epoch": on_epoch}
                    return _train(config, folder, data, where, processes, say, on_corrupt, schedule | {"device_batch": device_batch})
    done = processes.share(lambda: load_run(folder))
    _same_classes(done, data)
    if processes.first:
        _tidy(folder)  # where it was killed between its summary and this
    e = done.environment
    say(f"{config.run_id}: loaded, trained {e['finished'][:16]} on {e['device']} at commit {e['commit'][:9]}", flush=True)
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
        raise ValueError(f"results must be a folder that can be written; got {folder}: {error.strerror}; set LRPET_RESULTS") from error


def _check_arguments(
    config, data, device, results, checkpoint_epochs, time_budget, progress, on_epoch, deterministic, device_batch, on_corrupt
) -> None:
    """Refuse what cannot be meant, before a folder is made."""
    for name, value, good, wanted in (
        ("config", config, isinstance(config, RunConfig), "a RunConfig; RunConfig.from_dict makes one of a map"),
        ("data", data, data is None or isinstance(data, (str, Path)), "the path of a folder, or None"),
        ("device", device, isinstance(device, str), "auto, cpu, cuda or cuda:1"),
        ("results", results, results is None or isinstance(results, (str, Path)), "the path of a folder, or None"),
        ("checkpoint_epochs", checkpoint_epochs, type(checkpoint_epochs) is int and checkpoint_epochs >= 1, "a whole number of at least 1"),
        ("time_budget", time_budget, time_budget is None or (type(time_budget) in (int, float) and time_budget >= 0), "seconds, 0 or more, or None"),
        ("progress", progress, progress in ("auto", "bar", "lines", "off"), "auto, bar, lines or off"),
        ("on_epoch", on_epoch, on_epoch is None or callable(on_epoch), "a function of the row of an epoch, or None"),
        ("deterministic", deterministic, isinstance(deterministic, bool), "True or False"),
        ("device_batch", device_batch, device_batch is None or (type(device_batch) is int and device_batch >= 1), "a number of images, or None"),
        ("on_corrupt", on_corrupt, on_corrupt in ON_CORRUPT, " or ".join(ON_CORRUPT)),
    ):
        if not good:
            raise ValueError(f"{name} must be {wanted}; got {value!r}")


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Let PyTorch refuse algorithms whose result varies, or else cuDNN measure which are fastest; afterwards all is as before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use in this process
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def device_of(name: str, config: RunConfig, several: bool = False) -> torch.device:
    """Return the device that a name means, after checking that it is there and can do what the configuration asks for.

    With ``several``, for processes that train together.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA GPU; use 'cpu' or 'auto'")
    if config.sync_batchnorm and device.type != "cuda" and several:
        raise ValueError("sync_batchnorm needs CUDA GPUs where several processes train together: PyTorch has it for no other device; got 'cpu'")
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError("precision 'tf32' exists on CUDA GPUs only; use 'fp32' or 'bf16' on a CPU")
    return device


def _train(config, folder, data, device, processes, say, on_corrupt, schedule) -> Run:
    checkpoint = folder / "checkpoint.pt"
    streamed, resumed = processes.share(lambda: (_was_streamed(folder), has_checkpoint(checkpoint)))
    with processes.in_turn():
        images = load_images(config, data, device=device, on_corrupt=on_corrupt, streamed=streamed)
    if processes.any(isinstance(images, StreamData))[0] and not isinstance(images, StreamData):  # there was room for them in this process only
        images = load_images(config, data, device=device, on_corrupt=on_corrupt, streamed=True)
    origin = environment(device) | {"processes": processes.world} | images.fingerprint
    if processes.any(processes.share(lambda: images.fingerprint) != images.fingerprint)[0]:
        raise ValueError("data must hold the same images for every process; got others on another machine: give them the same copy by --data")
    if config.dataset == "imagefolder":
        origin["data_classes_sha256"] = _digest(images.classes)
    if images.corrupt:
        origin["corrupt_images"] = list(images.corrupt)
    if processes.first:
        _same_data(folder, origin)
        _write(folder / "config.json", _json(config.to_dict()))
        _write(folder / "environment.json", _json(origin))
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
    say(f"{config.run_id}: {verb} {config.epochs} epochs of {batches.steps} steps on {times}{origin['device']}", flush=True)
    state = train(config, method, batches, checkpoint, processes=processes, **schedule)

    compact = method.compact()
    compact_top1_pct = evaluate(compact, batches, processes)["top1_pct"]
    if processes.first:
        _finish(config, folder, images, batches, method, state, compact, compact_top1_pct, origin)
    return processes.share(lambda: load_run(folder))


def _finish(config, folder, images, batches, method, state, compact, compact_top1_pct, origin) -> None:
    """Write what a run leaves, its summary last."""
    shape = (3, config.image_size, config.image_size)
    full = build_model(config.model, len(images.classes))
    deployed, counted = cost(compact, shape), cost(full, shape, method.ranks)
    history = pd.DataFrame(state["history"])
    rows = _layer_rows(counted, deployed, getattr(compact, "factorization", []), state["layers"])
    best = history["top1_pct"].idxmax()
    summary = {
        "run_id": config.run_id,
        "scored_on": state["history"][-1]["scored_on"],
        "top1_pct": state["history"][-1]["top1_pct"],
        **{name: state["history"][-1][name] for name in ("top5_pct",) if name in history},  # of more than five classes
        "best_top1_pct": float(history["top1_pct"][best]),
        "best_epoch": int(history["epoch"][best]),
        "compact_top1_pct": compact_top1_pct,
        "compact_max_relative_error": _difference(method.model, compact, batches),
        "train_loss": state["history"][-1]["train_loss"],
        "params": deployed.params,
        "macs": deployed.macs,
        "macs_by_rank": counted.macs if method.ranks else deployed.macs,
        "dense_params": counted.dense_params,
        "dense_macs": counted.dense_macs,
        "num_classes": len(images.classes),
        "corrupt_images": len(images.corrupt),
        "dead_layers": sum(row["action"] == "constant" for row in rows),
        "projections": state["projections"],
        "train_seconds": round(state["train"], 3),
        "projection_seconds": round(state["projection"], 3),
        "evaluation_seconds": round(state["evaluation"], 3),
        "recording_seconds": round(state["recording"], 3),
    }
    compact.factorization = getattr(compact, "factorization", [])  # a dense network is one with nothing factorized
    filters = method.structure if config.method == "filter_pruning" else None
    save_compact(compact, folder / WEIGHTS, model=config.model, num_classes=len(images.classes), filters=filters)
    for name, content in state["recorder"].files().items():
        _write(folder / name, content)
    content = {
        "config.json": _json(config.to_dict()),
        "environment.json": _json(origin | {"finished": _now()}),
        "history.csv": history.to_csv(index=False),
        "layers.csv": pd.DataFrame(rows).to_csv(index=False),
        "summary.json": _json(summary),
    }
    content = {"SHA256SUMS": "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in content.items())} | content
    for name, text in content.items():  # the summary last: it says that all others are there
        _write(folder / name, text)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Delete what a finished run needs no more: its checkpoints, and what it was writing when it was killed."""
    for left in (*folder.glob("checkpoint.*"), *folder.glob("*.part*")):
        left.unlink(missing_ok=True)


def _layer_rows(full, deployed, factorization, projected) -> list[dict]:
    """Return a row for each layer of the full network: what it cost there, and what its part of the compact one costs."""
    actions = {layer.name: layer for layer in factorization}
    last = {layer["name"]: layer["energy_kept"] for layer in projected}
    rows = []
    for layer in full.layers:
        parts = [part for part in deployed.layers if part.name in (layer.name, f"{layer.name}.0", f"{layer.name}.1")]
        action = actions.get(layer.name, LayerReport(layer.name, None, math.nan, "dense"))
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "N": layer.N,
                "D": layer.D,
                "rank": layer.rank,
                "energy_kept": last.get(layer.name, action.energy_kept),
                "action": action.action,
                "reason": action.reason,
                "macs": sum(part.macs for part in parts),
                "dense_macs": layer.dense_macs,
                "params": sum(part.params for part in parts),
                "dense_params": layer.dense_params,
            }
        )
    return rows


@torch.no_grad()
def _difference(model, compact, batches) -> float:
    """Return the largest difference of the two networks' logits on a batch, relative to the largest logit."""
    x, _ = next(batches.test(256))
    model.eval(), compact.eval()
    reference = model(x)
    return ((compact(x) - reference).abs().max() / reference.abs().max()).item()


def _was_streamed(folder: Path) -> bool | None:
    """Tell how the images of a run to be resumed were read; the same again, however much memory is free now. None: nothing to resume."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return None
    return _read_json(folder / "environment.json")["data_train_sha256"].startswith("files:")


def _same_data(folder: Path, environment: dict) -> None:
    """Refuse to go on with other images than a run began with."""
    if not has_checkpoint(folder / "checkpoint.pt"):
        return
    before = _read_json(folder / "environment.json")
    for name in ("data_train_sha256", "data_test_sha256"):
        if before.get(name) != environment[name]:
            raise ValueError(f"{folder} was begun with other images ({name} differs); give the data it began with, or another results folder")


def _same_classes(done: Run, data: str | Path | None) -> None:
    """Refuse to show a finished run for a tree of other classes: which images it saw is no part of its name."""
    root, seen = data_folder(data), done.environment.get("data_classes_sha256")
    if seen is None or root is None or not root.is_dir():
        return
    place = root / "train" if (root / "train").is_dir() else root
    if _digest(sorted(entry.name for entry in place.iterdir() if entry.is_dir())) != seen:
        raise ValueError(f"{done.folder} is a finished run on other classes than {root} holds; give another seed or results folder (LRPET_RESULTS)")


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def environment(device: torch.device) -> dict:
    """Return where something runs: commit, versions, device, threads and the time."""
    git = ["git", "-C", str(PROJECT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit or os.environ.get("LRPET_COMMIT", "unknown"),  # of a copy without .git, as on a machine that is lent
        "dirty": bool(changed.strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # AVX2 has no products of bfloat16, see lrpet/bfloat16.py
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": _now(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.is_file() else []
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json(values: dict) -> str:
    return json.dumps(values, indent=1) + "\n"


def _write(path: Path, content: str | bytes) -> None:
    with write_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
