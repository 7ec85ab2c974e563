"""Multiply-adds and parameters compared with the published ones; nothing is trained."""

from __future__ import annotations

import fnmatch
import json
import warnings
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd

from lrpet.experiments import Experiment, load_profile
from lrpet.lowrank.cost import Cost, cost_of_run
from lrpet.lowrank.ranks import compressible_layers, ranks_from_ratio
from lrpet.models import MODELS
from lrpet.paths import project_file
from lrpet.tables.rows import NUM_CLASSES, network_and_run, of_imagenet, published

__all__ = ["cost_table"]
COUNTED = ("macs_m", "params_m", "params_without_bn_m", "macs_reduction_pct")


class _OtherTask(NamedTuple):
    """A published network that finds boxes or pixels, and what its cost is counted on."""

    model: str
    classes: int
    prune_ratio: float  # of the authors' source
    dense_layers: str
    input: tuple[int, int]
    said: str


# inputs were not published: they hardly change the share that PSPNet saves, and do change Faster R-CNN's
OTHER_TASKS = {
    "fasterrcnn_resnet50": _OtherTask(
        *("fasterrcnn_resnet50_fpn", 20, 0.55, ""),
        (800, 1066),
        "800×1066, to which torchvision enlarges 375×500; 1000 proposals",
    ),
    "pspnet_resnet50": _OtherTask(
        *("pspnet_resnet50", 21, 0.43, "encoder.layer4.2.conv3", (480, 480), "480×480")
    ),
}
NOT_HERE = "not here"  # a network or method of others
NO_RANKS = "ranks not published"  # a network whose ranks nobody can know
COST_COLUMNS = (
    "network",
    "dataset",
    "method",
    "prune_ratio",
    "macs_m",
    "paper_macs_m",
    "params_m",
    "params_without_bn_m",
    "paper_params_m",
)
COST_COLUMNS += ("macs_reduction_pct", "paper_macs_reduction_pct", "input", "paper_source")


def cost_table() -> pd.DataFrame:
    """Return multiply-adds and parameters, ours and published, of every published network that we have.

    Nothing is trained: ranks come from the published ratio or list, costs from layer shapes. The authors'
    further ratios and rank lists, of which ``experiments.yaml`` has experiments but nothing was published
    that we have, come last.

    >>> cost_table().query("network == 'resnet56' and prune_ratio == '0.57'").macs_m.item()
    '56.06'
    """
    return pd.DataFrame(_cost_rows())


@cache
def _cost_rows() -> list[dict]:
    rows = []
    for row in published().itertuples():
        if row.table != "related":  # other authors' networks stand in their own table
            rows.append(_cost_row(row.model, row.dataset, row.method, row.prune_ratio, None, row))
    for name, entry in json.loads(project_file("paper/searched_ranks.json").read_text()).items():
        if isinstance(entry, dict):
            reported = SimpleNamespace(
                macs_m=np.nan,
                params_m=np.nan,
                macs_reduction_pct=entry["macs_reduction_pct"],
                source="authors' rank list",
            )
            rows.append(
                _cost_row(
                    name.split("_")[0],
                    entry["dataset"],
                    f"LRPET, {name} ranks",
                    np.nan,
                    entry["ranks"],
                    reported,
                )
            )
    known = {(row["network"], row["dataset"], row["macs_m"]) for row in rows}
    further = [
        _further_row(e)
        for name in ("paper", "imagenet")
        for e in load_profile(name).experiments
        if e.feeds == "ratios"
    ]
    return rows + [row for row in further if (row["network"], row["dataset"], row["macs_m"]) not in known]


def _further_row(experiment: Experiment) -> dict:
    config = experiment.config
    dataset = "imagenet" if of_imagenet(config) else config.dataset
    ratio = np.nan if config.prune_ratio is None else config.prune_ratio
    method = f"LRPET, ranks of {experiment.name.rpartition('-s')[0]}" if config.ranks else "LRPET"
    nothing = SimpleNamespace(macs_m=np.nan, params_m=np.nan, macs_reduction_pct=np.nan, source="")
    return _cost_row(config.model, dataset, method, ratio, config.ranks, nothing)


def _cost_row(network: str, dataset: str, method: str, ratio: float, ranks, reported) -> dict:
    row = dict.fromkeys(COST_COLUMNS, NOT_HERE)
    row |= {"network": network, "dataset": dataset, "method": method, "prune_ratio": _published(ratio)}
    for name in ("macs_m", "params_m", "macs_reduction_pct"):
        row[f"paper_{name}"] = _published(getattr(reported, name))
    row["paper_source"] = reported.source
    if network in OTHER_TASKS and method in ("LRPET", "baseline"):
        return row | _other_task(network, method)
    if network not in MODELS or method.split(",")[0] not in ("LRPET", "baseline"):
        return row
    edge = 224 if dataset == "imagenet" else 32
    model, run = network_and_run(network, NUM_CLASSES.get(dataset, 10), (3, edge, edge))
    fixed = json.loads(project_file("paper/fixed_ranks.json").read_text()).get(network)
    known = True
    if ranks is None and method != "baseline":
        if ratio > 0:
            ranks = ranks_from_ratio(model, ratio)
        elif fixed is not None:
            ranks = _ranks_by_pattern(model, fixed["ranks"])
        else:
            known = False  # neither ratio nor list is published
    row["input"] = f"{edge}×{edge}"
    counted = cost_of_run(model, run, ranks)
    return row | _counted(counted) if known else row | dict.fromkeys(COUNTED, NO_RANKS)


def _counted(counted: Cost) -> dict[str, str]:
    """Return the cells that are ours."""
    without_bn = sum(layer.params for layer in counted.layers)  # what the authors count
    values = (counted.macs / 1e6, counted.params / 1e6, without_bn / 1e6)
    cells = [f"{value:.{digits}f}" for value, digits in zip(values, (2, 3, 3), strict=True)]
    return dict(zip(COUNTED, [*cells, f"{100 * (1 - counted.macs / counted.dense_macs):.1f}"], strict=True))


def _other_task(name: str, method: str) -> dict[str, str]:
    """Return our cells of a detector or segmenter: ranks of all convolutions, at the published ratio.

    A network whose package is not installed keeps the cells that are committed.
    """
    network = OTHER_TASKS[name]
    try:
        model, run = network_and_run(network.model, network.classes, (3, *network.input))
    except ImportError:
        file = project_file("results/paper/tables/cost.csv")
        committed = pd.read_csv(file, dtype=str, keep_default_na=False)
        row = committed[(committed.network == name) & (committed.method == method)].iloc[0]
        return {column: row[column] for column in ("prune_ratio", "input", *COUNTED)}
    ranks = None
    if method != "baseline":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some small layers cost more as factors
            ranks = ranks_from_ratio(model, network.prune_ratio, exclude=network.dense_layers)
    ratio = {"prune_ratio": "" if ranks is None else f"{network.prune_ratio:g}"}
    return _counted(cost_of_run(model, run, ranks)) | ratio | {"input": network.said}


def _published(value: float) -> str:
    return "" if pd.isna(value) else f"{value:g}"


def _ranks_by_pattern(model, patterns: dict[str, int]) -> dict[str, int]:
    """Return the rank of the first pattern that matches, for each layer that one matches."""
    layers = compressible_layers(model, "*")
    matches = {
        name: [rank for pattern, rank in patterns.items() if fnmatch.fnmatch(name, pattern)]
        for name in layers
    }
    classifier = list(layers)[-1]
    return {name: ranks[0] for name, ranks in matches.items() if ranks and name != classifier}
