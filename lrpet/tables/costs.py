"""Multiply-adds and parameters compared with the published ones; nothing is trained."""

from __future__ import annotations

import fnmatch
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lrpet.experiments import Experiment, load_profile
from lrpet.lowrank.cost import cost
from lrpet.lowrank.ranks import compressible_layers, ranks_from_ratio
from lrpet.models import MODELS, build_model
from lrpet.paths import project_file
from lrpet.tables.rows import NUM_CLASSES, of_imagenet, published

__all__ = ["cost_table"]
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
COST_COLUMNS += ("macs_reduction_pct", "paper_macs_reduction_pct", "paper_source")


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
    imagenet = dataset == "imagenet"
    row = dict.fromkeys(COST_COLUMNS, NOT_HERE)
    row |= {"network": network, "dataset": dataset, "method": method, "prune_ratio": _published(ratio)}
    for name in ("macs_m", "params_m", "macs_reduction_pct"):
        row[f"paper_{name}"] = _published(getattr(reported, name))
    row["paper_source"] = reported.source
    if network not in MODELS or method.split(",")[0] not in ("LRPET", "baseline"):
        return row
    model = build_model(network, NUM_CLASSES.get(dataset, 10))
    fixed = json.loads(project_file("paper/fixed_ranks.json").read_text()).get(network)
    known = True
    if ranks is None and method != "baseline":
        if ratio > 0:
            ranks = ranks_from_ratio(model, ratio)
        elif fixed is not None:
            ranks = _ranks_by_pattern(model, fixed["ranks"])
        else:
            known = False  # neither ratio nor list is published
    counted = cost(model, (3, 224, 224) if imagenet else (3, 32, 32), ranks)
    without_bn = sum(layer.params for layer in counted.layers)  # what the authors count
    row["macs_m"] = f"{counted.macs / 1e6:.2f}" if known else NO_RANKS
    row["params_m"] = f"{counted.params / 1e6:.3f}" if known else NO_RANKS
    row["params_without_bn_m"] = f"{without_bn / 1e6:.3f}" if known else NO_RANKS
    reduction = 100 * (1 - counted.macs / counted.dense_macs)
    row["macs_reduction_pct"] = f"{reduction:.1f}" if known else NO_RANKS
    return row


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
