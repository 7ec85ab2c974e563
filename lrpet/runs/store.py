"""Finished runs, read back and checked."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from lrpet.config import PROFILES, RunConfig
from lrpet.lowrank.compact_file import compact_header, load_compact
from lrpet.methods.base import build_network
from lrpet.methods.filter_pruning import keep_filters
from lrpet.paths import expanded, results_root

__all__ = [
    "Damaged",
    "Run",
    "is_complete",
    "load_network",
    "load_run",
    "load_runs",
    "or_leave_out",
    "read_map",
    "weights_file",
]
T = TypeVar("T")
ANEW = "move the folder away to run it anew, or take it from where you got it"
WEIGHTS = "compact.safetensors"
HALF_WEIGHTS = "compact-half.safetensors"  # of some runs, see results/README.md
REPEATS = "repeats"  # folder of runs that were done a second time, on another machine
FILES = ("config.json", "environment.json", "history.csv", "layers.csv", "summary.json")
ORIGIN = ("device", "commit", "finished", "data_train_sha256")  # of environment.json
NUMBERS = ("run_id", "scored_on", "macs")  # of summary.json, with the score


class Damaged(UserWarning):
    """Something in the store that cannot be read; it is left out, and all else is read all the same."""


@dataclass(frozen=True)
class Run:
    """A finished run: configuration, summary, one row per epoch, one per layer, and where it came from."""

    config: RunConfig
    summary: dict
    history: pd.DataFrame
    layers: pd.DataFrame
    environment: dict
    folder: Path


def is_complete(folder: Path) -> bool:
    """Tell whether a run folder holds a finished run; ``summary.json`` is written last and by rename.

    A folder that another user has closed counts as one, so that it is read, which says what is in the way.
    """
    try:
        return stat.S_ISREG(os.stat(folder / "summary.json").st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def load_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: the run is not complete.
        ValueError: a file of it is damaged or may not be read; names the file.
    """
    if not is_complete(folder):
        raise FileNotFoundError(f"{folder} holds no finished run: it has no summary.json")
    _verify(folder)
    config = _read(folder / "config.json", lambda file: RunConfig.from_dict(read_map(file)))
    summary = read_json(folder / "summary.json", (*NUMBERS, config.metric.column))
    environment = read_json(folder / "environment.json", ORIGIN)
    history, layers = (_read(folder / f"{name}.csv", pd.read_csv) for name in ("history", "layers"))
    return Run(config, summary, history, layers, environment, folder)


def or_leave_out(read: Callable[[Path], T], path: Path) -> T | None:
    """Read one of several runs or files: None where it cannot be read.

    Warns:
        Damaged: it cannot be read, and why.
    """
    try:
        return read(path)
    except (ValueError, OSError) as error:
        warnings.warn(f"{path} is left out: {error}", Damaged, stacklevel=3)
        return None


def _verify(folder: Path) -> None:
    """Refuse a run whose files are not as ``SHA256SUMS`` says; the oldest runs have none."""
    sums = folder / "SHA256SUMS"
    if os.path.isfile(sums):
        told = _read(
            sums,
            lambda file: {line[66:]: line[:64] for line in file.read_text(encoding="utf-8").splitlines()},
        )
        for name in FILES:
            found = _read(folder / name, lambda file: hashlib.sha256(file.read_bytes()).hexdigest())
            if told.get(name) != found:
                raise ValueError(
                    f"{folder / name} is damaged, or {sums.name} beside it: the two disagree; {ANEW}"
                )


def read_json(file: Path, needed: Sequence[str] = ()) -> dict:
    return _read(file, lambda file: read_map(file, needed))


def read_map(file: Path, needed: Sequence[str] = ()) -> dict:
    """Read a JSON file that must hold a map with some keys.

    Raises:
        ValueError: it holds something else.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    missing = [name for name in needed if name not in values] if isinstance(values, dict) else ["a map"]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return values


def _read(file: Path, read: Callable):
    try:
        return read(file)
    except PermissionError as error:
        raise ValueError(f"{file} may not be read by you; ask its owner, or set LRPET_RESULTS") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); {ANEW}") from error


def load_runs(root: str | Path | None = None) -> pd.DataFrame:
    """Return the finished runs below a folder: one row per run, one column per field and summary value.

    What cannot be read is left out, and what is no run of its own: a summary.json of something else, and a
    copy of a run, whose folder does not have the name of the run or which is there a second time. So are,
    without a word, the runs of ``results/repeats``, which were done twice on purpose.

    Args:
        root: ``results/``, ``results/<profile>`` or any folder above run folders; None is the project's
            results.

    Returns:
        A DataFrame, with the run folder, device and commit as further columns; empty where nothing has
        finished.

    Warns:
        UserWarning: what is left out, and why; of a run that is damaged, :class:`Damaged`.

    >>> len(load_runs("no such folder"))
    0
    """
    rows, seen = [], {}
    root = expanded(root or results_root())
    folders = [folder for folder in _finished(root) if REPEATS not in folder.relative_to(root).parts]
    for folder in sorted(folders, key=lambda f: (not _in_its_place(f), len(f.parts), f)):
        odd = _no_run(folder)
        done = None if odd else or_leave_out(load_run, folder)
        if done and done.config.run_id != folder.name:
            odd = f"it is a copy of the run {done.config.run_id}, or was renamed"
        elif done and seen.setdefault(folder.name, folder) != folder:
            odd = f"the same run is in {seen[folder.name]}"
        if odd:
            warnings.warn(f"{folder} is left out: {odd}", stacklevel=2)
        elif done:
            origin = {name: done.environment[name] for name in ORIGIN}
            rows.append({**done.config.to_dict(), **done.summary, **origin, "folder": str(done.folder)})
    return pd.DataFrame(rows)


def _finished(root: Path) -> list[Path]:
    """Return the folders with a summary.json below a folder; links are followed, to each place once."""
    found, seen = [], set()

    def closed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            warnings.warn(f"{error.filename} is left out: {error.strerror}", Damaged, stacklevel=5)

    for place, folders, files in os.walk(root, onerror=closed, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(folders)
        found += [Path(place)] * ("summary.json" in files and real not in seen)
        seen.add(real)
    return found


def _in_its_place(folder: Path) -> bool:
    return folder.parent.name == "runs" and folder.parent.parent.name in PROFILES


def _no_run(folder: Path) -> str:
    """Say why a folder with a summary.json is no run of this project; empty where it is, even damaged."""
    if (folder / "SHA256SUMS").is_file():
        return ""
    try:
        RunConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return f"its summary.json is of no run of this project, for its config.json is none ({error})"
    return ""


def weights_file(folder: Path) -> Path:
    """Return the file with a finished run's weights: as trained, else rounded to half precision.

    Raises:
        ValueError: neither is there, as in most results that came with the repository.
    """
    kept = [folder / name for name in (WEIGHTS, HALF_WEIGHTS) if (folder / name).is_file()]
    if not kept:
        raise ValueError(
            f"{folder / WEIGHTS} is not there: the repository keeps the weights of few runs; "
            "run it in another results folder (LRPET_RESULTS) to have them"
        )
    return kept[0]


def load_network(finished: Run) -> torch.nn.Module:
    """Return the network of a finished run as it would be deployed, in float32.

    Raises:
        ValueError: the weights are not there, as in most results that came with the repository.
    """
    return read_network(finished.config, weights_file(finished.folder))


def read_network(config: RunConfig, file: Path) -> torch.nn.Module:
    """Return the network in a file of weights that a run of a configuration wrote."""
    header = compact_header(file)
    model = build_network(config, header["num_classes"])
    if config.method == "filter_pruning":
        model = keep_filters(model, header["filters"], (3, config.image_size, config.image_size))
    return load_compact(file, model)
