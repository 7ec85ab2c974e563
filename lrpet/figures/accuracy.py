"""Figures of accuracy: against multiply-adds, over settings, in a search."""

from __future__ import annotations

import dataclasses
import json
from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from lrpet.config import RunConfig
from lrpet.figures.style import (
    METHOD_STYLES,
    PAPER,
    MethodStyle,
    ProjectFigure,
    add_legend,
    in_style,
    method_style,
    say_in_panel,
)
from lrpet.registry import METHODS, Metric, metric_of
from lrpet.tables.claims import AS_IT_IS
from lrpet.tables.statistics import half_width

__all__ = ["plot_ablations", "plot_accuracy_against_macs", "plot_rank_search"]


@in_style()
def plot_accuracy_against_macs(runs: pd.DataFrame, published: pd.DataFrame | None = None) -> ProjectFigure:
    """Draw accuracy against cost: runs full, with mean and 95 % interval over seeds, published ones hollow.

    Runs that differ in the seed only are one point: mean of the last epoch's accuracy and of the MACs, bars
    of the 95 % interval by Student's t where there are two seeds or more. Points of equal cost stand side by
    side.

    Args:
        runs: rows of :func:`lrpet.load_runs`, of one data set and one profile; may be empty.
        published: rows of ``paper/reported.csv``. Drawn are those of a data set and network that ``runs``
            has, with an accuracy and a cost. Where only the saved share of the MACs is published, the cost is
            what is left of the dense network's as counted here; a baseline costs the dense network.

    Returns:
        One panel: top-1 accuracy in %, or the metric of another task, against MACs in millions, on a log
        scale if they span a factor of ten.

    Raises:
        ValueError: the runs are of several data sets or profiles.

    Source: the figures of this kind in arXiv 2204.05566.

    >>> plot_accuracy_against_macs(pd.DataFrame()).axes[0].get_xlabel()
    'MACs of one image, millions'
    """
    for column in ("dataset", "profile"):
        if column in runs and runs[column].nunique() > 1:
            got = ", ".join(sorted(runs[column].unique()))
            raise ValueError(f"runs must be of one {column}, else their numbers do not compare; got {got}")
    everything = _series_of_runs(runs) if len(runs) else []
    if everything and published is not None:
        everything += _series_of_published(published, runs)
    figure = ProjectFigure(4.2)
    ax = figure.subplots()
    dodges = _dodges(everything)
    for series, dodge in zip(everything, dodges, strict=True):
        _draw_series(ax, series, ScaledTranslation(dodge / 72, 0, figure.dpi_scale_trans))
    if len({series.model for series in everything}) > 1:
        _name_networks(ax, everything)
    if not everything:
        say_in_panel(ax, "no run has finished")
    where = sorted(set(runs["scored_on"])) if "scored_on" in runs else []
    aside = "; points of equal cost stand side by side" * any(dodges)
    ax.set(
        xlabel=f"MACs of one image, millions{aside}",
        ylabel=_score_label(metric_of(runs), where),
    )
    hollow = "; hollow: published" if any(series.hollow for series in everything) else ""
    seeds = sorted({n for series in everything for n in series.seeds})
    if everything:
        spread = "" if seeds[-1] == 1 else "mean and 95 % interval over "
        ax.set_title(f"last epoch, {spread}{_count(seeds)}{hollow}", color="#555555")
    ax.margins(0.08)
    macs = [value for series in everything for value in series.points["macs"]]
    if macs and max(macs) >= 10 * min(macs) > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    elif macs:
        ax.set_xlim(0, 1.12 * max(macs))
    add_legend(figure, ax)
    return figure


@in_style()
def plot_rank_search(candidates: pd.DataFrame, uniform: pd.DataFrame) -> ProjectFigure:
    """Draw accuracy against MACs of searched ranks, their Pareto front, and one ratio for all layers.

    Args:
        candidates: ``top1_pct``, ``macs`` and ``pareto`` of each candidate, as
            :func:`lrpet.runs.search.trials_table` returns them.
        uniform: the same without ``pareto``, a row per ratio.

    Returns:
        One panel; both axes cover the data.

    >>> some = pd.DataFrame({"macs": [1e6, 2e6], "top1_pct": [90.0, 91.0], "pareto": [True, True]})
    >>> plot_rank_search(some, some).axes[0].get_xlabel()
    'MACs of one image, millions'
    """
    figure = ProjectFigure(3.4)
    ax = figure.subplots()
    searched, plain = METHOD_STYLES["lrpet"], METHOD_STYLES["narrow"]
    front = candidates[candidates.pareto].sort_values("macs")
    ax.plot(
        candidates.macs / 1e6,
        candidates.top1_pct,
        linestyle="none",
        marker="o",
        markerfacecolor="none",
        color=searched.color,
        label="candidate",
    )
    ax.plot(
        front.macs / 1e6,
        front.top1_pct,
        marker="o",
        color=searched.color,
        linestyle="-",
        label="Pareto front of the candidates",
    )
    line = uniform.sort_values("macs")
    ax.plot(
        line.macs / 1e6,
        line.top1_pct,
        marker=plain.marker,
        color=plain.color,
        linestyle="--",
        label="one ratio for all layers",
    )
    ax.set(xlabel="MACs of one image, millions", ylabel="top-1 accuracy, held-out images, %")
    add_legend(figure, ax)
    return figure


def _score_label(metric: Metric, where: list[str]) -> str:
    """Say what a score was measured on, between its name and its unit."""
    return ", ".join(filter(None, [metric.title, f"{' and '.join(where) or 'test'} images", metric.unit]))


class _Series(NamedTuple):
    """Points of one method, network and variant, in the order of their cost."""

    label: str
    model: str
    style: MethodStyle
    fill: str  # which part of the marker is filled
    seeds: frozenset[int]  # how many; empty where nothing is said
    points: pd.DataFrame  # macs in millions, top1 in percent, and half their intervals
    hollow: bool = False


def _draw_series(ax, series: _Series, shift: ScaledTranslation) -> None:
    points, style = series.points, series.style
    inside = (
        {"markerfacecolor": PAPER, "markeredgewidth": 1.5}
        if series.hollow
        else {"fillstyle": series.fill, "markerfacecoloralt": PAPER}
    )
    look = {
        "color": style.color,
        "linestyle": style.linestyle,
        "marker": style.marker,
        "markersize": 7,
        "linewidth": 0.9,
        **inside,
    }
    lines = ax.plot(points["macs"], points["top1"], label=series.label, **look)
    interval = {"xerr": points["macs_half"].where(points["macs_half"] > 0), "yerr": points["top1_half"]}
    bars = ax.errorbar(
        points["macs"], points["top1"], **interval, fmt="none", ecolor=style.color, elinewidth=1.1
    )
    for artist in (
        *lines,
        *bars[1],
        *bars[2],
    ):  # shifted only now, as a shifted artist does not count for the axis limits
        artist.set_transform(artist.get_transform() + shift)


def _name_networks(ax, everything: list[_Series]) -> None:
    for k, series in enumerate(sorted(everything, key=lambda series: series.points["macs"].max())):
        x, y, below = (
            *series.points[["macs", "top1"]].iloc[-1],
            k % 2 == 0,
        )  # by turns, so that neighbours do not collide
        place = {
            "ha": "left" if below else "right",
            "va": "top" if below else "bottom",
            "textcoords": "offset points",
        }
        ax.annotate(series.model, (x, y), (6, -4) if below else (-6, 4), fontsize=8, color="#555555", **place)


def _half(values: pd.Series) -> float:
    return half_width(values) if len(values) > 1 else np.nan


def _dodges(everything: list[_Series]) -> list[float]:
    """Return a sideways shift in points for each series, so that points of equal cost stand side by side."""
    costs = [{f"{value:.3g}" for value in series.points["macs"]} for series in everything]
    shifts = []
    for k in range(len(costs)):
        alike = [j for j, other in enumerate(costs) if other & costs[k]]
        shifts.append(8.0 * (alike.index(k) - (len(alike) - 1) / 2))
    return shifts


def _series_of_runs(runs: pd.DataFrame) -> list[_Series]:
    """Average over seeds, then split by method, network, and settings that differ within a method."""
    fields = [
        f.name
        for f in dataclasses.fields(RunConfig)
        if f.name in runs and f.name not in ("seed", "profile", "dataset")
    ]
    key = runs[fields].map(
        lambda value: json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)
    )
    key["macs"], key["top1"], key["seed"] = runs["macs"] / 1e6, runs[metric_of(runs).column], runs["seed"]
    everything = []
    for method in [*METHOD_STYLES, *sorted(set(key["method"]) - set(METHOD_STYLES))]:
        mine = key[key["method"] == method]
        differ = [f for f in fields if f not in ("model", "prune_ratio", "ranks") and mine[f].nunique() > 1]
        usual = METHODS[method].reads if method in METHODS else {}
        rows_of = mine[differ].drop_duplicates().sort_values(differ).itertuples(index=False) if differ else []
        variants = {
            tuple(row): [
                _setting(f, v)
                for f, v in zip(differ, row, strict=True)
                if f not in usual or v != str(usual[f])
            ]
            for row in rows_of
        }
        variants = dict(
            sorted(variants.items(), key=lambda variant: len(variant[1]))
        )  # as the method is meant first, with a full marker
        fills = dict(zip(variants, cycle(["full", "left", "bottom", "right", "top"]), strict=False))
        place = {row: k for k, row in enumerate(variants)}
        for (model, *row), rows in sorted(
            mine.groupby(["model", *differ]), key=lambda group: place.get(group[0][1:], 0)
        ):
            points = rows.groupby(fields).agg(
                macs=("macs", "mean"),
                macs_half=("macs", _half),
                top1=("top1", "mean"),
                top1_half=("top1", _half),
                seeds=("seed", "nunique"),
            )
            style, seeds = method_style(method), frozenset(points["seeds"])
            name = ", ".join([style.label, *variants.get(tuple(row), [])]).replace(
                ", without BN", " without BN"
            )  # as in the tables
            everything.append(
                _Series(name, model, style, fills.get(tuple(row), "full"), seeds, points.sort_values("macs"))
            )
    if len(set().union(*(series.seeds for series in everything))) > 1:  # else the title says it once for all
        everything = [
            series._replace(label=f"{series.label} ({_count(sorted(series.seeds))})") for series in everything
        ]
    return everything


def _setting(field: str, value: str) -> str:
    """Write a setting that tells two variants of a method apart."""
    return (
        f"{'with' if value == 'True' else 'without'} BN rectification"
        if field == "bn_rectification"
        else f"{field}={value}"
    )


def _count(seeds: list[int]) -> str:
    """Write numbers of seeds, ascending, as "1 seed" or "2 to 3 seeds"."""
    return f"{seeds[0]} seed{'s' * (seeds != [1])}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"


def _series_of_published(published: pd.DataFrame, runs: pd.DataFrame) -> list[_Series]:
    """Return a hollow point for each published row that compares with the runs."""
    table = published.rename(columns={"macs_m": "macs", "top1_pct": "top1"})
    table = table[table["dataset"].isin(runs["dataset"]) & table["model"].isin(runs["model"])]
    dense = table["model"].map(runs.groupby("model")["dense_macs"].max()).astype(float) / 1e6
    saved = table["macs_reduction_pct"].where(~table["method"].str.startswith("baseline"), 0.0)
    table = table.assign(
        macs=table["macs"].fillna(dense * (1 - saved / 100)), macs_half=np.nan, top1_half=np.nan
    )
    table = table.dropna(subset=["macs", "top1"])
    return [
        _Series(
            f"{name}, published",
            model,
            method_style(name),
            "full",
            frozenset(),
            points.sort_values("macs"),
            hollow=True,
        )
        for (name, model), points in table.groupby(["method", "model"], sort=False)
    ]


@in_style()
def plot_ablations(table: pd.DataFrame, runs: pd.DataFrame) -> ProjectFigure:
    """Draw the accuracy of each setting of each ablation: the seeds as dots, their mean as a bar across.

    Args:
        table: of :func:`lrpet.tables.claims.ablation_table`.
        runs: of :func:`lrpet.tables.rows.profile_runs`, from which it was made.

    Returns:
        A panel per question of which two settings or more have run, a line per setting; the method as it is
        has the filled marker, and a dotted line stands at its mean. A setting that was not run says so.

    >>> columns = ["question", "setting", "experiment", "verdict"]
    >>> rows = [["residual factor", "0", "a", "LRPET as it is"], ["residual factor", "0.3", "b", "lower"]]
    >>> runs = pd.DataFrame({"experiment": ["a", "b"], "top1_pct": [90.0, 89.0]})
    >>> plot_ablations(pd.DataFrame(rows, columns=columns), runs).axes[0].get_xlabel()
    'top-1 accuracy, %'
    """
    accuracies = {
        name: seeds.dropna().astype(float)
        for name, seeds in runs.groupby("experiment")[metric_of(runs).column]
    }
    finished = table.loc[[not accuracies[name].empty for name in table.experiment]].question.value_counts()
    questions = [q for q in dict.fromkeys(table.question) if finished.get(q, 0) > 1]
    if not questions:
        figure = ProjectFigure(0.6)
        text = "no ablation of this profile has two settings that were run"
        figure.text(0.5, 0.5, text, ha="center", va="center", color="#666666")
        return figure
    sizes = [(table.question == question).sum() + 0.7 for question in questions]
    figure = ProjectFigure(0.5 + 0.22 * sum(sizes) + 0.25 * len(sizes))
    panels = figure.subplots(len(sizes), 1, height_ratios=sizes, squeeze=False, sharex="all").flatten()
    for ax, question in zip(panels, questions, strict=False):
        part = table[table.question == question].reset_index(drop=True)
        style = METHOD_STYLES["lrp" if question.endswith(", LRP") else "lrpet"]
        for y, row in part.iterrows():
            _draw_setting(ax, y, accuracies[row.experiment], style, base=row.verdict in AS_IT_IS)
        ax.set(
            title=question, yticks=range(len(part)), yticklabels=part.setting, ylim=(len(part) - 0.4, -0.6)
        )
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
    panels[-1].set_xlabel(metric_of(runs).label)
    return figure


def _draw_setting(ax, y: int, values: pd.Series, style: MethodStyle, *, base: bool) -> None:
    if values.empty:
        place = {"transform": ax.get_yaxis_transform(), "ha": "center", "va": "center"}
        ax.text(0.5, y, "not run", color="#666666", fontsize=8.5, backgroundcolor=PAPER, **place)
        return
    face = style.color if base else PAPER
    ax.plot(values, [y] * len(values), style.marker, color=style.color, markerfacecolor=face)
    ax.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=style.color)
    if base:
        ax.axvline(values.mean(), color="#999999", linewidth=0.8, linestyle=":", zorder=0)
