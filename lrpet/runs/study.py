"""A study of Optuna that several processes work on and that outlives them: a journal in the store."""

from __future__ import annotations

import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lrpet.config import RunConfig
from lrpet.paths import results_root

__all__ = ["open_study", "optimize", "side_by_side"]
OVER = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def open_study(
    config: RunConfig,
    sampler: str,
    objectives: int,
    per_layer: bool,
    results: str | Path | None = None,
    *,
    alone: bool = True,
) -> optuna.Study:
    """Return the study of a configuration, begun or resumed; see :func:`lrpet.runs.search.search`.

    With ``alone`` its candidates follow from the seed; workers side by side must not draw the same.
    """
    root = Path(results or results_root()) / config.profile / "search"
    root.mkdir(parents=True, exist_ok=True)
    dense = dataclasses.replace(config, method="dense", prune_ratio=None, ranks=None, multiple_of=None)
    name = f"{dense.run_id}-{sampler}-{objectives}-{'layer' if per_layer else 'stage'}"
    if config.multiple_of is not None:
        name += f"-{config.multiple_of}"
    seed = config.seed if alone and multiprocessing.parent_process() is None else None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampler == "tpe":
            choose = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        else:
            choose = optuna.samplers.GPSampler(seed=seed)
        study = {
            "study_name": name,
            "storage": JournalStorage(JournalFileBackend(str(root / f"{name}.journal"))),
            "sampler": choose,
            "pruner": optuna.pruners.MedianPruner(n_startup_trials=5),
        }
        try:
            return optuna.load_study(**study)  # a journal that is only read stays as it is
        except KeyError:
            directions = ["minimize"] if objectives == 1 else ["maximize", "minimize"]
            return optuna.create_study(**study, directions=directions, load_if_exists=True)


def side_by_side(workers: int, function: Callable, *args, **kwargs) -> None:
    """Call a function in several processes, and wait for all."""
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=function, args=args, kwargs=kwargs) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def optimize(study: optuna.Study, objective: Callable[[optuna.Trial], object], trials: int) -> None:
    """Work on a study until it holds a number of finished or pruned trials, whoever made them."""
    missing = trials - len(study.get_trials(deepcopy=False, states=OVER))
    enough = optuna.study.MaxTrialsCallback(trials, states=OVER)
    study.optimize(objective, n_trials=max(0, missing), callbacks=[enough])
