"""Accuracy and cost of each experiment, compared with the paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrpet.config import RunConfig
from lrpet.paths import results_root
from lrpet.registry import metric_of
from lrpet.runs.store import or_leave_out, read_map
from lrpet.tables.rows import (
    ABLATIONS,
    NOT_RUN,
    as_published,
    counted_cost,
    lrpet_targets,
    of_imagenet,
    off_target,
    published,
    published_row,
    spread,
)

__all__ = ["accuracy_table", "imagenet_table"]


def accuracy_table(runs: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and cost of each experiment of a profile and the published row, if any.

    Args:
        runs: of :func:`profile_runs`, for one profile.
        reported: of :func:`published`.

    Returns:
        A row per experiment. ``top1_pct``, or the metric of another task, is the last epoch's, mean and 95 %
        interval over seeds. What was not run says so. The difference to the paper is given for the schedule
        of the paper only. Where a profile sets ``best_of_last`` its score stands beside, as its authors
        take it: the best of the last epochs, chosen before its projection by the test images, then cut by an
        SVD.
    """
    rows = []
    target = lrpet_targets(runs)
    column = metric_of(runs).column
    runs = runs.reindex(columns=[*runs.columns, *({f"best_of_last_{column}"} - set(runs.columns))])
    asked = any(config.best_of_last is not None for config in runs.config)
    for _, seeds in runs[runs.feeds != ABLATIONS].groupby("experiment", sort=False):
        first, done = seeds.iloc[0], seeds[column].dropna()
        macs, params, dense = counted_cost(
            seeds.loc[seeds[column].first_valid_index()] if len(done) else first
        )
        config = first.config
        paper = published_row(reported, first.config, macs).reindex(columns=[column])[column].dropna()
        comparable = len(paper) and len(done) and as_published(seeds)
        cut = seeds[f"best_of_last_{column}"]
        rows.append(
            {
                "network": first.network,
                "method": first.label,
                "prune_ratio": "ranks given"
                if config.ranks
                else ""
                if pd.isna(first.ratio)
                else f"{first.ratio:g}",
                "epochs": f"{config.epochs}"
                + (f" ({config.pretrain_epochs} dense first)" if config.pretrain_epochs else ""),
                "macs_m": f"{macs / 1e6:.2f}" if macs else NOT_RUN,
                "params_m": f"{params / 1e6:.3f}" if macs else NOT_RUN,
                "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}" if macs else NOT_RUN,
                "macs_against_lrpet": off_target(first.feeds, macs, target.get(first.network)),
                column: spread(seeds[column]),
                f"best_epoch_{column}": spread(seeds[f"best_{column}"]),
                **({f"best_of_last_then_svd_{column}": spread(cut)} if asked else {}),
                "seeds": f"{len(done)} of {len(seeds)}",
                "train_minutes": NOT_RUN if done.empty else f"{seeds.train_seconds.mean() / 60:.1f}",
                f"paper_{column}": f"{paper.iloc[0]:.2f}" if len(paper) else "",
                "difference_pct": _difference(done, paper) if comparable else "",
                **(
                    {"best_of_last_difference_pct": _difference(cut, paper) if comparable else ""}
                    if asked
                    else {}
                ),
            }
        )
    return pd.DataFrame(rows)


def _difference(ours: pd.Series, paper: pd.Series) -> str:
    """Write a mean of seeds less the published number, in points; empty where there is no seed."""
    return f"{ours.mean() - paper.iloc[0]:+.2f}" if ours.notna().any() else ""


IMAGENET_IMAGES = 1_281_167  # training images of ILSVRC 2012


def imagenet_table(runs: pd.DataFrame, reported: pd.DataFrame, results: Path | None = None) -> pd.DataFrame:
    """Return accuracy and cost of each experiment on larger images; for ImageNet with the published numbers.

    Args:
        runs: of :func:`profile_runs`, for profile imagenet or imagenette.
        reported: of :func:`published`.
        results: root of the store, in whose ``bench`` measured throughputs are.

    Returns:
        A row per experiment: exact multiply-adds and parameters, accuracy of the last epoch as mean and 95 %
        interval (n). For profile imagenet also the published accuracies with the difference, and
        the command of the row with the hours it takes, estimated from the throughput that was measured on a
        GPU; "not measured" where none was.
    """
    rows = []
    for name, seeds in runs.groupby("experiment", sort=False):
        seeds = seeds.reindex(
            columns=[*seeds.columns, *({"top5_pct", "num_classes", "epochs"} - set(seeds.columns))]
        )
        first, done = seeds.iloc[0], seeds.dropna(subset=["top1_pct"])
        config = first.config
        macs, params, dense = counted_cost(done.iloc[0] if len(done) else first)
        row = {
            "network": first.network,
            "method": first.label,
            "prune_ratio": "" if pd.isna(first.ratio) else f"{first.ratio:g}",
            "epochs": f"{config.epochs}",
            "macs_m": f"{macs / 1e6:.2f}",
            "params_m": f"{params / 1e6:.3f}",
            "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}",
            "top1_pct": spread(seeds.top1_pct),
            "top5_pct": spread(seeds.top5_pct)
            if done.top5_pct.notna().any() or done.empty
            else "not recorded",
            "seeds": f"{len(done)} of {len(seeds)}",
        }
        if of_imagenet(config):
            paper = published_row(reported, config, macs)
            for top in ("top1", "top5"):
                value = paper[f"{top}_pct"].dropna()
                comparable = len(value) and len(done) and as_published(done)
                row[f"paper_{top}_pct"] = f"{value.iloc[0]:.2f}" if len(value) else ""
                row[f"{top}_difference_pct"] = (
                    f"{done[f'{top}_pct'].mean() - value.iloc[0]:+.2f}" if comparable else ""
                )
            row["hardware"], row["hours_of_a_run"] = "one CUDA GPU or more", _estimated_hours(config, results)
            row["command"] = f"python -m lrpet run '{name}-s*' --profile imagenet --data DIR"
        rows.append(row)
    return pd.DataFrame(rows)


def _estimated_hours(config: RunConfig, results: Path | None) -> str:
    """Return the hours of a run on ImageNet at the highest throughput that was measured for it on a GPU."""
    kept = ((results or results_root()) / "bench").glob(
        f"throughput-{config.model}-{config.method}-{config.image_size}-*.json"
    )
    needed = ("device", "both_images_per_second")
    results = [or_leave_out(lambda file: read_map(file, needed), file) for file in sorted(kept)]
    measured = [result for result in results if result and not result["device"].startswith("CPU")]
    if not measured:
        return "not measured"
    best = max(measured, key=lambda result: result["both_images_per_second"])
    hours = config.epochs * IMAGENET_IMAGES / best["both_images_per_second"] / 3600
    measured = f"{best['both_images_per_second']:.0f} images/s measured on one {best['device']}"
    return f"{hours:.0f}, estimated from {measured}, training alone counted"


def related_table() -> pd.DataFrame:
    """Return the published CIFAR-10 rows of Trained Rank Pruning: another schedule, for orientation only."""
    rows = published().query("table == 'related' and dataset == 'cifar10'")
    rows = rows[["model", "method", "params_m", "macs_reduction_pct", "top1_pct", "source"]].rename(
        columns={"model": "network"}
    )
    return rows.astype(object).where(rows.notna(), "").reset_index(drop=True)
