"""One run compared with the paper."""

from __future__ import annotations

import pandas as pd

from lrpet.tables.names import label_of
from lrpet.tables.rows import of_imagenet, published, published_row
from lrpet.tables.shown import header

__all__ = ["comparison", "verdict"]


def comparison(run) -> pd.DataFrame:
    """Return the published numbers of a run's network, method and ratio, ours, and the difference.

    Args:
        run: a finished :class:`lrpet.runs.store.Run`.

    Returns:
        A row per quantity: published ("none" where the paper has no such row), ours, difference.
    """
    config, summary = run.config, run.summary
    reported = published()
    other = of_imagenet(config) and summary["num_classes"] != 1000  # a tree of other images
    match = published_row(reported, config, None if other else summary["macs"])
    ours = {
        "macs_m": summary["macs"] / 1e6,
        "params_m": summary["params"] / 1e6,
        config.metric.column: summary[config.metric.column],
    }
    if config.dataset == "imagefolder" and "top5_pct" in summary:
        ours["top5_pct"] = summary["top5_pct"]
    rows = []
    for name, value in ours.items():
        paper = match.reindex(columns=[name])[name].dropna()
        known = len(paper) > 0
        rows.append(
            {
                "quantity": header(name),
                "published": f"{paper.iloc[0]:.2f}" if known else "none",
                "ours": f"{value:.2f}",
                "difference": f"{value - paper.iloc[0]:+.2f}" if known else "",
            }
        )
    return pd.DataFrame(rows)


def verdict(run) -> str:
    """Return in words what of one run agrees with the paper and what cannot be compared."""
    s, config = run.summary, run.config
    same = s["compact_max_relative_error"] < 1e-4
    agrees = "agrees" if same else "**does not agree**"
    error = f"bound 1e-4, measured {s['compact_max_relative_error']:.1e}"
    lines = [f"- The compact network {agrees} with the projected one ({error})."]
    for row in comparison(run).itertuples():
        if row.published == "none":
            continue
        schedule = 120 if of_imagenet(config) else 400
        accuracy = (header(config.metric.column), header("top5_pct"))
        if row.quantity in accuracy and (config.epochs, config.validation_fraction) != (
            schedule,
            0.0,
        ):
            schedules = f"{config.epochs} epochs here, {schedule} in the paper"
            lines.append(
                f"- {row.quantity}, is not comparable with the published {row.published}: {schedules}."
            )
        else:
            lines.append(
                f"- {row.quantity}: {row.ours} here, {row.published} published, difference {row.difference}."
            )
    if len(lines) == 1:
        lines.append(
            f"- The paper has no row for {config.model}, {label_of(config)}, {config.dataset} at this ratio:"
            " nothing to compare."
        )
    return "\n".join(lines)
