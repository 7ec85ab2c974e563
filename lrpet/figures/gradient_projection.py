"""Figures of gradient projection: what is reached with how much optimizer state, and at what size."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from lrpet.figures.style import METHOD_STYLES, OTHER, ProjectFigure, in_style, say_in_panel, state
from lrpet.registry import Metric, metric_of
from lrpet.tables.gradient_projection import way_of
from lrpet.tables.statistics import half_width

__all__ = ["plot_against_memory"]
AXES = {  # column → label of the axis, in 10⁶, its scale, and what a title says of a value
    "optimizer_state_bytes": ("optimizer state, MB", "log", "with {:.1f} MB of optimizer state"),
    "params": ("parameters of the result, millions", "linear", "with {:.2f} million parameters"),
}
CUT = "cut at the end"
KINDS = {  # kind of row → colour and marker
    "dense result": (METHOD_STYLES["dense"].color, "s"),
    "dense result, gradients projected": (METHOD_STYLES["svd_finetune"].color, "v"),
    CUT: (METHOD_STYLES["lrp"].color, "^"),
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
        One panel: mean of the last epoch's metric, a point a way, and from three seeds on its 95 % interval
        by Student's t. Beside it their names and scores, highest first, without the settings that most share.
        What was only cut at the end may lie beyond the panel: it stands at its edge.
        What is good in both pictures trains small and leaves a small network.

    Raises:
        ValueError: another column.

    >>> runs = pd.DataFrame({"experiment": [], "bits_per_byte": []})
    >>> plot_against_memory(runs, "params").axes[0].get_xlabel()
    'parameters of the result, millions'
    """
    if column not in AXES:
        raise ValueError(f"column must be one of {', '.join(AXES)}; got {column!r}")
    metric, figure = metric_of(runs), ProjectFigure(5.2)
    ax = figure.subplots()
    label, scale, said = AXES[column]
    ax.set(xlabel=label, ylabel=metric.label)
    done = runs[runs[metric.column].notna()]
    if done.empty:
        say_in_panel(ax, "no run has finished")
        return figure
    points = _points(done, column, metric.column)
    trained = points[points.kind != CUT]
    low, high = (trained.y - trained.half.fillna(0)).min(), (trained.y + trained.half.fillna(0)).max()
    room = max(0.12 * (high - low), 0.01 * abs(high))
    low, high = low - room, high + room
    ax.set(xscale=scale, ylim=(low, high))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(x=0.1)
    drawn = points.y.clip(low, high)
    for kind, (color, marker) in KINDS.items():
        of = points[points.kind == kind]
        look = {"color": color, "linestyle": "none", "markersize": 11 if marker == "*" else 6}
        if len(of):
            half = of.half.where(of.kind != CUT).fillna(0)  # what lies beyond the panel has no interval in it
            ax.errorbar(of.x, drawn[of.index], yerr=half, marker=marker, label=kind, elinewidth=1.0, **look)
    _names_beside(ax, points, drawn, metric)
    better = "higher" if metric.higher_is_better else "lower"
    ax.set_title(f"{better} and further left is better", color="#555555")
    best = points.loc[(metric.sign * points.y).idxmax()]
    state(figure, f"Best: {best.way}, {metric.text(best.y)} {metric.title} {said.format(best.x)}", ax)
    return figure


def _points(done: pd.DataFrame, column: str, score: str) -> pd.DataFrame:
    """Return a row per way to train: where it stands, how far its interval reaches, its kind and name."""
    rows = []
    for _, seeds in done.groupby("experiment", sort=False):
        config, scores = seeds.iloc[0].config, seeds[score].astype(float)
        half = half_width(scores) if len(scores) >= 3 else None
        way, x = way_of(config), seeds.iloc[0][column] / 1e6
        rows.append({"way": way, "kind": _kind(config), "x": x, "y": scores.mean(), "half": half})
    points = pd.DataFrame(rows).astype({"half": float})
    words = points.way.str.split(", ").explode()
    shared = {
        words[words.str.startswith(setting)].mode().get(0) for setting in ("r = ", "T = ")
    }  # the commonest of each
    points["way"] = [", ".join(w for w in way.split(", ") if w not in shared) for way in points.way]
    return points


def _names_beside(ax: Axes, points: pd.DataFrame, drawn: pd.Series, metric: Metric) -> None:
    """Write the names right of the panel, in the order of their scores, each with a line to its point."""
    order = points.y.sort_values(ascending=False).index
    for place, index in enumerate(order):
        row = points.loc[index]
        beyond = " ↑" if row.y > drawn[index] else " ↓" if row.y < drawn[index] else ""
        ax.annotate(
            f"{metric.text(row.y)}{beyond}  {row.way}",
            (row.x, drawn[index]),
            (1.06, 1 - (place + 0.5) / len(order)),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=KINDS[row.kind][0],
            arrowprops={"arrowstyle": "-", "color": OTHER.color, "linewidth": 0.4, "relpos": (0, 0.5)},
        )


def _kind(config) -> str:
    if config.method == "dense":
        return "dense result" + ", gradients projected" * (config.gradient_projection is not None)
    if config.method == "lrp":
        return CUT
    return "LRPET" + ", gradients projected" * (config.gradient_projection is not None)
