"""The runs of a profile as rows, and what their cells are made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.experiments import MAIN, load_profile
from lrpet.lowrank.cost import cost_of_run, counted_run
from lrpet.methods.base import build_network, count_cost, example_input, ranks_of
from lrpet.models import build_model, unboxed
from lrpet.models.pretrained import freeze_batchnorms
from lrpet.paths import project_file, results_root
from lrpet.registry import TASKS, metric_of
from lrpet.runs.store import load_runs
from lrpet.tables.names import PUBLISHED_NAMES, label_of
from lrpet.tables.statistics import NOT_RUN, half_width

__all__ = ["profile_runs", "published"]
COMPETITORS, ABLATIONS = "competitors", "ablations"  # what experiments of other tables feed
NUM_CLASSES = {
    "cifar100": 100,
    "imagenet": 1000,
    "topics": 256,
    "text": 256,
    "voc": 20,
    "coco": 80,
}  # of data with other than ten classes
WANTED = ("experiment", "feeds", "network", "label", "run_id", "ratio", "config", "task")
MACS_TOLERANCE = 0.02  # two networks whose multiply-adds differ by less are compared as equal


def published() -> pd.DataFrame:
    """Return the published numbers, ``paper/reported.csv``.

    >>> published().query("model == 'resnet56' and prune_ratio == 0.57").top1_pct.item()
    93.27
    """
    return pd.read_csv(project_file("paper/reported.csv"))


def profile_runs(profile: str, results: Path | None = None, task: str = "classification") -> pd.DataFrame:
    """Return a row per run of a task that a profile asks for, finished or not, as ordered there.

    Args:
        profile: one of ``lrpet.config.PROFILES``.
        results: root of the store.
        task: numbers of several tasks do not compare.

    Returns:
        ``experiment``, ``feeds``, ``network``, ``label``, ``run_id`` and, where the run is finished, every
        column of :func:`lrpet.load_runs`; missing values elsewhere. ``network`` names the data too where
        they are not those of the profile's first experiment.
    """
    store = load_runs((results or results_root()) / profile).drop(columns="task", errors="ignore")
    experiments = [e for e in load_profile(profile).experiments if e.config.task == task]
    usual = next((e.config.dataset for e in experiments), "")
    wanted = pd.DataFrame(
        [
            {
                "experiment": e.name.rsplit("-s", 1)[0],
                "feeds": e.feeds,
                "network": e.config.model + f", {e.config.dataset}" * (e.config.dataset != usual),
                "label": label_of(e.config),
                "run_id": e.config.run_id,
                "ratio": e.config.prune_ratio,
                "config": e.config,
                "task": task,
            }
            for e in experiments
        ],
        columns=WANTED,
    )
    column = TASKS[task].metric.column
    known = ["run_id", column, f"best_{column}", "macs", "params", "dense_macs", "train_seconds"]
    missing = [name for name in known if name not in store]  # of which no run has finished
    store = store.reindex(columns=[*store.columns, *missing])
    return wanted.merge(store, on="run_id", how="left")


def spread(values: pd.Series, digits: int = 2) -> str:
    """Format seeds as "mean [95 % interval by Student's t] (n)"; one seed has no interval."""
    values = values.dropna()
    if values.empty:
        return NOT_RUN
    mean, half = values.mean(), half_width(values) if len(values) > 1 else 0.0
    interval = f" [{mean - half:.{digits}f}, {mean + half:.{digits}f}]" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{interval} (n={len(values)})"


def counted_cost(row: pd.Series) -> tuple[int | None, int | None, int]:
    """Return MACs, parameters and dense MACs, measured or else by rank; None where only training tells."""
    if not pd.isna(row.macs):
        return row.macs, row.params, row.dense_macs
    return _expected(row.config)


def _expected(config: RunConfig) -> tuple[int | None, int | None, int]:
    method = config.method if config.method in ("dense", "narrow", "filter_pruning") else "low-rank"
    key = (config.task, config.model, _num_classes(config), config.image_size, method)
    key += (config.prune_ratio, str(config.ranks), config.layers, config.dense_layers, config.multiple_of)
    key += (str(config.unfolding), config.dataset, config.pretrained_backbone)
    if key not in _counted:  # runs that differ in nothing but seed or schedule are counted once
        _counted[key] = _count(config)
    return _counted[key]


_counted: dict[tuple, tuple[int | None, int | None, int]] = {}


def _count(config: RunConfig) -> tuple[int | None, int | None, int]:
    classes = _num_classes(config)
    frozen = config.task == "detection" and bool(config.pretrained_backbone)
    model, run = network_and_run(config.model, classes, tuple(example_input(config).shape[1:]), frozen=frozen)
    ranks = {} if config.method == "narrow" else ranks_of(model, config)
    counted = cost_of_run(model, run, ranks, config.unfolding or "rows")
    if config.method == "narrow":
        with torch.device("meta"):
            narrow = count_cost(build_network(config, classes), config)
        return narrow.macs, narrow.params, counted.macs
    known = config.method == "dense" or config.ranks is not None or config.prune_ratio is not None
    if not known or config.method == "filter_pruning":
        return None, None, counted.dense_macs
    return counted.macs, counted.params, counted.dense_macs


@cache
def network_and_run(
    network: str, classes: int, shape: tuple[int, ...], *, frozen: bool = False
) -> tuple[nn.Module, dict]:
    """Return a network of shapes alone, and one run of it; costs at any ranks are arithmetic on these.

    Args:
        network: as for :func:`lrpet.models.build_model`.
        classes: width of the classifier.
        shape: (C, H, W) of an image, or (T,) of a text.
        frozen: with the BatchNorms of a pretrained detector.
    """
    with torch.device("meta"):
        model = build_model(network, classes)
        model = unboxed(freeze_batchnorms(model) if frozen else model)
    x = torch.zeros(1, *shape, dtype=torch.int64 if len(shape) == 1 else None)
    return model, counted_run(model, example_inputs=x)


def lrpet_targets(runs: pd.DataFrame) -> dict[str, int]:
    """Return the multiply-adds of each network's LRPET at the main ratio, which competitors aim at."""
    mains = runs[runs.feeds.isin(MAIN) & (runs.label == "LRPET")].drop_duplicates("network")
    return {row.network: _expected(row.config)[0] for row in mains.itertuples()}


def off_target(feeds: str, macs: int | None, target: int | None) -> str:
    """Say how far a competitor's multiply-adds are from those of LRPET; empty for all others."""
    if feeds != COMPETITORS or not target or not macs:
        return ""
    return "equal" if abs(macs / target - 1) <= MACS_TOLERANCE else f"{100 * (macs / target - 1):+.0f} %"


def of_imagenet(config: RunConfig) -> bool:
    """Tell whether a run is meant to be of ImageNet; any other tree of images has no published numbers."""
    return config.profile == "imagenet"


def _num_classes(config: RunConfig) -> int:
    ground = config.task == "segmentation"  # one class more
    return 1000 if of_imagenet(config) else NUM_CLASSES.get(config.dataset, 10) + ground


def as_published(done: pd.DataFrame) -> bool:
    """Tell whether finished runs followed the paper's schedule, on data of as many classes."""
    done = done.dropna(subset=metric_of(done).column)
    config = done.iloc[0].config
    epochs = 120 if of_imagenet(config) else 100 if config.model == "vit" else 400
    return (done.epochs == epochs).all() and (
        not of_imagenet(config) or (done.num_classes == NUM_CLASSES["imagenet"]).all()
    )


def published_row(reported: pd.DataFrame, config: RunConfig, macs: float) -> pd.DataFrame:
    """Return the published rows of the same data, network, method and multiply-adds, these within 1 %."""
    if not macs:
        return reported.iloc[:0]
    dataset, label = "imagenet" if of_imagenet(config) else config.dataset, label_of(config)
    same = reported[
        (reported.dataset == dataset)
        & (reported.model == config.model)
        & (reported.method == PUBLISHED_NAMES.get(label, label))
    ]
    return same[(same.macs_m * 1e6 / macs - 1).abs() < 0.01]
