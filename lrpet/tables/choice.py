"""How the schedule of the profile ``scaled`` was chosen, and what a seed does not fix."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrpet.config import RunConfig
from lrpet.paths import results_root
from lrpet.runs.store import load_run, or_leave_out
from lrpet.tables.names import setting_of
from lrpet.tables.rows import NOT_RUN

__all__ = ["repeats_table", "selection_table"]
CHOSEN_BY = ("dense", "narrow", "lrp", "lrpet")  # the methods whose mean decides


def _decay(config: RunConfig) -> str:
    if config.normalized_weight_decay is None:
        return f"{config.weight_decay:g} on all"
    return (
        f"{config.normalized_weight_decay:g} where a BatchNorm follows, {config.weight_decay:g} on the rest"
    )


def selection_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the held-out accuracy of every schedule that was tried, the chosen one first.

    The rule: the largest mean over the dense network, the narrow one, LRP and LRPET, last epoch, one seed.
    It favours no method; the dense and the narrow network, which are never projected, count for both
    projection intervals.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for the profile ``selection``.

    Returns:
        A row per weight decay and projection interval: the accuracies in percent, their mean, and which one
        was chosen; nothing is chosen before every schedule has its runs.
    """
    accuracy, schedules = {}, []
    for row in runs.itertuples():
        decay = _decay(row.config)
        projected = row.config.projection_unit is not None
        interval = setting_of(row.config, ("projection_unit",)) if projected else None
        accuracy[decay, interval, row.config.method] = row.top1_pct
        if projected and (decay, interval) not in schedules:
            schedules.append((decay, interval))
    rows = []
    for decay, interval in schedules:
        scores = {m: accuracy.get((decay, interval if "lrp" in m else None, m)) for m in CHOSEN_BY}
        rows.append({"weight_decay": decay, "projection": interval, **scores})
    table = pd.DataFrame(rows)
    table["mean"] = table[list(CHOSEN_BY)].mean(axis=1, skipna=False)
    table = table.sort_values("mean", ascending=False, kind="stable", ignore_index=True)
    complete = table["mean"].notna().all()
    table["chosen"] = ["chosen" if k == 0 and complete else "" for k in range(len(table))]
    for name in (*CHOSEN_BY, "mean"):
        table[name] = [NOT_RUN if pd.isna(v) else f"{v:.2f}" for v in table[name].astype(float)]
    return table


def repeats_table(results: Path | None = None) -> pd.DataFrame:
    """Return the runs that were done twice with the same seed: what another machine changes.

    Args:
        results: root of the store; its ``repeats/`` holds the second runs, below it the same folders.

    Returns:
        A row per repeated run: where each of the two ran, both accuracies in percent and their difference.

    Warns:
        Damaged: one of the two cannot be read; the pair is left out.
    """
    root, rows = results or results_root(), []
    for file in sorted((root / "repeats").glob("**/summary.json")):
        again = or_leave_out(load_run, file.parent)
        first = again and or_leave_out(load_run, again.config.folder(root))
        if not first:
            continue
        column = again.config.metric.column
        rows.append(
            {
                "run": again.config.run_id,
                "profile": again.config.profile,
                "on": first.environment["device"],
                column: f"{first.summary[column]:.2f}",
                "again_on": again.environment["device"],
                f"again_{column}": f"{again.summary[column]:.2f}",
                "difference": f"{again.summary[column] - first.summary[column]:+.2f}",
            }
        )
    return pd.DataFrame(rows)
