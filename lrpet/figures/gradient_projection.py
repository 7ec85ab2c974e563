"""Figures of gradient projection: what is reached with how much optimizer state, and at what size."""

from __future__ import annotations

import pandas as pd

from lrpet.figures.style import METHOD_STYLES, OTHER, ProjectFigure, in_style, say_in_panel, state
from lrpet.registry import metric_of
from lrpet.tables.gradient_projection import way_of
from lrpet.tables.statistics import half_width

__all__ = ["plot_against_memory"]
AXES = {  # column → label of the axis, in 10⁶
    "optimizer_state_bytes": "optimizer state, MB",
    "params": "parameters of the result, millions",
}
KINDS = {  # kind of row → colour and marker
    "dense result": (METHOD_STYLES["dense"].color, "s"),
    "dense result, gradients projected": (METHOD_STYLES["svd_finetune"].color, "v"),
    "cut at the end": (METHOD_STYLES["lrp"].color, "^"),
    "LRPET": (METHOD_STYLES["lrpet"].color, "o"),
    "LRPET, gradients projected": (METHOD_STYLES["factorized"].color, "*"),
}


@in_style()
def plot_against_memory(runs: pd.DataFrame, column: str) -> ProjectFigure:
    """Draw the score of each way to train against its optimizer state, or against the size of its result.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for one task of profile language.
        column: ``optimizer_state_bytes`` or ``params``.

    Returns:
        One panel: mean of the last epoch's metric and its 95 % interval by Student's t, a point a way. Low in
        both pictures is what trains small and leaves a small network.

    Raises:
        ValueError: another column.

    >>> runs = pd.DataFrame({"experiment": [], "bits_per_byte": []})
    >>> plot_against_memory(runs, "params").axes[0].get_xlabel()
    'parameters of the result, millions'
    """
    if column not in AXES:
        raise ValueError(f"column must be one of {', '.join(AXES)}; got {column!r}")
    metric, figure = metric_of(runs), ProjectFigure(4.6)
    ax = figure.subplots()
    ax.set(xlabel=AXES[column], ylabel=metric.label)
    done = runs[runs[metric.column].notna()]
    if done.empty:
        say_in_panel(ax, "no run has finished")
        return figure
    for place, (_, seeds) in enumerate(done.groupby("experiment", sort=False)):
        config, scores = seeds.iloc[0].config, seeds[metric.column].astype(float)
        color, marker = KINDS[_kind(config)]
        x, y = seeds.iloc[0][column] / 1e6, scores.mean()
        half = half_width(scores) if len(scores) > 1 else None
        look = {"color": color, "linestyle": "none", "markersize": 11 if marker == "*" else 6}
        ax.errorbar(x, y, yerr=half, marker=marker, label=_kind(config), elinewidth=1.0, **look)
        below = place % 2 == 0
        ax.annotate(
            way_of(config),
            (x, y),
            (5, -3 if below else 3),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=8,
            color=OTHER.color,
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(x=0.25, y=0.1)
    better = "higher" if metric.higher_is_better else "lower"
    ax.set_title(f"{better} and further left is better", color="#555555")
    means = metric.sign * done.groupby("experiment")[metric.column].mean().astype(float)
    best = done[done.experiment == means.idxmax()].iloc[0]
    at = f"{best[column] / 1e6:.1f} {AXES[column].split(', ')[1]} of {AXES[column].split(', ')[0]}"
    state(
        figure, f"Best: {way_of(best.config)}, {metric.text(abs(means.max()))} {metric.title} with {at}", ax
    )
    return figure


def _kind(config) -> str:
    if config.method == "dense":
        return "dense result" + ", gradients projected" * (config.gradient_projection is not None)
    if config.method == "lrp":
        return "cut at the end"
    return "LRPET" + ", gradients projected" * (config.gradient_projection is not None)
