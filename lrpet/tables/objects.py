"""Boxes and masks: score and cost of each experiment, and the two published networks with ours beside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrpet.experiments import load_profile
from lrpet.tables.costs import OTHER_TASKS, cost_table
from lrpet.tables.rows import NOT_RUN, counted_cost, profile_runs, published, spread

__all__ = ["object_tables", "objects_against_paper", "objects_table"]
TASKS = ("detection", "segmentation")


def objects_table(profile: str, task: str, results: Path | None = None) -> pd.DataFrame:
    """Return score and cost of each experiment of a task: last epoch, mean and 95 % interval over seeds.

    Multiply-adds and parameters follow from the ranks where nothing was run; those of a detector are counted
    with as many proposals as it takes.

    Args:
        profile: of ``experiments.yaml``.
        task: "detection" or "segmentation".
        results: root of the store.
    """
    runs, rows = profile_runs(profile, results, task), []
    for _, seeds in runs.groupby("experiment", sort=False):
        first = seeds.iloc[0]
        metric = first.config.metric
        done = seeds.dropna(subset=metric.column)
        macs, params, dense = counted_cost(done.iloc[0] if len(done) else first)
        rows.append(
            {
                "network": first.network,
                "method": first.label,
                "prune_ratio": "" if pd.isna(first.ratio) else f"{first.ratio:g}",
                "epochs": f"{first.config.epochs}",
                metric.column: spread(seeds[metric.column]),
                "macs_m": f"{macs / 1e6:.2f}",
                "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}",
                "params_m": f"{params / 1e6:.3f}",
                "seeds": f"{len(done)} of {len(seeds)}",
                "train_minutes": f"{done.train_seconds.mean() / 60:.1f}" if len(done) else NOT_RUN,
            }
        )
    return pd.DataFrame(rows)


def objects_against_paper(results: Path | None = None) -> pd.DataFrame:
    """Return the published rows of both networks, our costs, and our scores of profile ``voc``."""
    reported = published().set_index(["model", "method"]).top1_pct
    costs, rows = cost_table(), []
    for row in costs[costs.network.isin(OTHER_TASKS)].itertuples():
        task = next(t for t in TASKS if (t == "detection") == row.network.startswith("fasterrcnn"))
        method = {"baseline": "dense", "LRPET": "lrpet"}[row.method]
        runs = profile_runs("voc", results, task)
        mine = runs[[config.method == method for config in runs.config]]
        metric = mine.config.iloc[0].metric
        rows.append(
            {
                "network": row.network,
                "method": row.method,
                "metric": metric.title,
                "paper_pct": f"{reported[row.network, row.method]:.2f}",
                "ours_pct": spread(mine[metric.column]),
                "macs_m": row.macs_m,
                "paper_macs_reduction_pct": row.paper_macs_reduction_pct,
                "macs_reduction_pct": row.macs_reduction_pct,
                "input": row.input,
            }
        )
    return pd.DataFrame(rows)


def object_tables(profile: str, results: Path | None = None) -> dict[str, pd.DataFrame]:
    """Return the tables of a profile's boxes and masks, by task; with the paper's for profile ``voc``."""
    tasks = {experiment.config.task for experiment in load_profile(profile).experiments}
    tables = {task: objects_table(profile, task, results) for task in TASKS if task in tasks}
    return tables | ({"published": objects_against_paper(results)} if profile == "voc" else {})
