"""Figures of accuracy: against multiply-adds, over settings, in a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullLocator

from lrpet.experiments import MAIN
from lrpet.figures.style import (
    METHOD_STYLES,
    PAPER,
    MethodStyle,
    ProjectFigure,
    draw_band,
    in_style,
    say_in_panel,
    state,
)
from lrpet.registry import Metric, metric_of
from lrpet.tables.claims import AS_IT_IS, ablations_with_verdict

__all__ = ["plot_ablations", "plot_accuracy_against_macs", "plot_rank_search"]
QUIET = "#555555"
FAINT = "#999999"
SEED = {"markersize": 4, "markerfacecolor": "none", "markeredgewidth": 0.7}  # beside a mean and its band


@in_style()
def plot_accuracy_against_macs(runs: pd.DataFrame, published: pd.DataFrame | None = None) -> ProjectFigure:
    """Draw what smaller ratios and larger ones cost in accuracy: LRP and LRPET, a line each.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for one profile. Drawn are the networks of which LRP
            or LRPET has finished with two ratios or more and with nothing else changed.
        published: rows of ``paper/reported.csv``. Drawn hollow are those of LRPET and LRP for the same data
            and network, with an accuracy and a cost.

    Returns:
        A panel per network: top-1 accuracy of the last epoch in %, or the metric of another task, against
        MACs in millions. The line is the mean over seeds, the band goes from the lowest seed to the highest,
        each seed is a dot. Without such a network one line says so, and ``finding`` is empty.

    Source: the figures of this kind in arXiv 2204.05566.

    >>> from lrpet.tables.rows import profile_runs
    >>> plot_accuracy_against_macs(profile_runs("imagenet")).axes[0].texts[0].get_text()
    'no two ratios of one network have been run'
    """
    metric = metric_of(runs)
    runs = runs.assign(score=runs[metric.column].astype(float))
    sweeps = {network: _sweeps_of(group) for network, group in runs.groupby("network", sort=False)}
    sweeps = {network: found for network, found in sweeps.items() if found}
    if not sweeps:
        figure = ProjectFigure(1.2)
        say_in_panel(figure.subplots(), "no two ratios of one network have been run")
        return figure
    figure = ProjectFigure(1.2 + 2.9 * len(sweeps))
    panels = figure.subplots(len(sweeps), 1, squeeze=False)[:, 0]
    for ax, (network, found) in zip(panels, sweeps.items(), strict=True):
        _draw_sweeps(ax, found)
        first = next(iter(found.values())).iloc[0]
        dense = runs[(runs.network == network) & (runs.label == METHOD_STYLES["dense"].label)].score
        if dense.notna().any():
            _draw_dense(ax, dense.mean(), first, metric)
        if published is not None:
            _draw_published(ax, published, first)
        ax.margins(0.06)
        counts = pd.concat(found).groupby(["label", "ratio"]).size()
        count = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        title = f"{network}, {count} seed{'s' * bool(counts.max() > 1)} a point"
        ax.set(title=title, ylabel=_score_label(metric, first.scored_on))
    panels[-1].set_xlabel("multiply-adds (MACs) of one image, millions")
    state(figure, _finding_of_sweeps(sweeps, metric), *panels)
    return figure


def _score_label(metric: Metric, where: str) -> str:
    """Say what a score was measured on, between its name and its unit."""
    return ", ".join(filter(None, [metric.title, f"{where} images", metric.unit]))


def _sweeps_of(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return method → finished runs that differ in ratio and seed only, of two ratios or more."""
    found = {}
    for method in ("lrp", "lrpet"):
        mine = runs[(runs.label == METHOD_STYLES[method].label) & runs.ratio.notna() & runs.score.notna()]
        base = mine[mine.feeds.isin(MAIN)]
        if base.empty:
            continue
        usual = base.config.iloc[0]
        alike = [replace(c, prune_ratio=usual.prune_ratio, seed=usual.seed) == usual for c in mine.config]
        if mine[alike].ratio.nunique() > 1:
            found[method] = mine[alike].assign(
                macs_m=mine[alike].groupby("ratio").macs.transform("mean").astype(float) / 1e6
            )
    return found


def _draw_sweeps(ax, sweeps: Mapping[str, pd.DataFrame]) -> None:
    for method, table in sweeps.items():
        style = METHOD_STYLES[method]
        draw_band(ax, table, "macs_m", "score", style, label=style.label)
        ax.plot(table.macs_m, table.score, "o", color=style.color, **SEED)


def _draw_dense(ax, score: float, first: pd.Series, metric: Metric) -> None:
    ax.axhline(score, color=METHOD_STYLES["dense"].color, linewidth=0.9, linestyle=":")
    text = f"dense, {first.dense_macs / 1e6:.1f} M: {metric.text(score)}"
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": QUIET}
    place |= {"bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}}
    ax.annotate(text, (0.01, score), (0, -3), va="top", **place)


def _draw_published(ax, published: pd.DataFrame, first: pd.Series) -> None:
    same = published[(published.dataset == first.dataset) & (published.model == first.config.model)]
    for method in ("lrp", "lrpet"):
        style = METHOD_STYLES[method]
        rows = same[same.method == style.label].dropna(subset=["macs_m", "top1_pct"]).sort_values("macs_m")
        if len(rows):
            look = {"marker": style.marker, "markerfacecolor": PAPER, "color": style.color, "linewidth": 0.7}
            ax.plot(rows.macs_m, rows.top1_pct, linestyle=":", label=f"{style.label}, published", **look)


def _finding_of_sweeps(sweeps: Mapping[str, Mapping[str, pd.DataFrame]], metric: Metric) -> str:
    network, found = next(iter(sweeps.items()))
    table = next(reversed(found.values()))
    means = table.groupby("macs_m").score.mean()
    few, many = means.index.min(), means.index.max()
    change = f"from {means[many]:.{metric.digits}f} to {metric.text(means[few])}"
    macs = f"{many:.1f} M multiply-adds become {few:.1f} M"
    return f"{network}: {table.label.iloc[0]} goes {change} as {macs}"


@in_style()
def plot_rank_search(candidates: pd.DataFrame, uniform: pd.DataFrame) -> ProjectFigure:
    """Draw accuracy against MACs of searched ranks, their Pareto front, and one ratio for all layers.

    Args:
        candidates: ``top1_pct``, ``macs`` and ``pareto`` of each candidate, as
            :func:`lrpet.runs.search.trials_table` returns them.
        uniform: the same without ``pareto``, a row per ratio.

    Returns:
        One panel; both axes cover the data. The title counts the points of the front that lie above the line
        of one ratio, where that line goes.

    >>> some = pd.DataFrame({"macs": [1e6, 2e6], "top1_pct": [90.0, 91.0], "pareto": [True, True]})
    >>> plot_rank_search(some, some).finding
    'Searched ranks: 0 of 2 on the Pareto front lie above one ratio for all layers'
    """
    figure = ProjectFigure(3.6)
    ax = figure.subplots()
    searched, plain = METHOD_STYLES["lrpet"], METHOD_STYLES["narrow"]
    front, line = candidates[candidates.pareto].sort_values("macs"), uniform.sort_values("macs")
    hollow = {"linestyle": "none", "marker": "o", "markerfacecolor": "none"}
    full = {"linestyle": "-", "marker": "o"}
    dashed = {"linestyle": "--", "marker": plain.marker}
    for table, label, color, look in (
        (candidates, "candidate", searched.color, hollow),
        (front, "Pareto front of the candidates", searched.color, full),
        (line, "one ratio for all layers", plain.color, dashed),
    ):
        ax.plot(table.macs / 1e6, table.top1_pct, color=color, label=label, **look)
    ax.set(xlabel="multiply-adds (MACs) of one image, millions", ylabel="top-1 accuracy, held-out images, %")
    beside = front[front.macs.between(line.macs.min(), line.macs.max())]
    above = int((beside.top1_pct > np.interp(beside.macs, line.macs, line.top1_pct)).sum())
    finding = f"{above} of {len(beside)} on the Pareto front lie above one ratio for all layers"
    state(figure, f"Searched ranks: {finding}", ax)
    return figure


# Ablations along an axis: question → column of the runs, label of the axis, its scale. All others are rows.
SWEEPS = {
    "prune ratio": ("ratio", "prune ratio", "linear"),
    "projection interval": ("projections", "projections in the whole training", "log"),
    "residual factor": ("residual", "residual factor", "linear"),
}
LRP = ", LRP"  # ends a question about LRP


@in_style()
def plot_ablations(table: pd.DataFrame, runs: pd.DataFrame) -> ProjectFigure:
    """Draw the accuracy of each setting of each ablation, and count in the title what is decided.

    Args:
        table: of :func:`lrpet.tables.claims.ablation_table`.
        runs: of :func:`lrpet.tables.rows.profile_runs`, from which it was made.

    Returns:
        Above, a panel per question of which two settings or more have run, a row per setting: a dot per seed
        and a bar at their mean; LRPET as it is has the filled dots, and a dotted line stands at its mean. A
        setting that was not run says so. Below, a panel per setting that is a number, with LRPET and LRP:
        the line is the mean over seeds, the band goes from the lowest seed to the highest.

    >>> columns = ["question", "setting", "experiment", "verdict"]
    >>> rows = [["from", "scratch", "a", "LRPET as it is"], ["from", "a trained one", "b", "lower"]]
    >>> runs = pd.DataFrame({"experiment": ["a", "b"], "top1_pct": [90.0, 89.0]})
    >>> plot_ablations(pd.DataFrame(rows, columns=columns), runs).finding
    '1 of 1 settings with enough seeds is shown to differ from LRPET as it is'
    """
    metric = metric_of(runs)
    runs = runs.assign(score=runs[metric.column].astype(float))
    done = set(runs.experiment[runs.score.notna()])
    finished = table[table.experiment.isin(done)].question.value_counts()
    questions = [q for q in dict.fromkeys(table.question) if finished.get(q, 0) > 1]
    sweeps = [name for name in SWEEPS if {name, name + LRP} & set(questions)]
    rows = [q for q in questions if q.removesuffix(LRP) not in SWEEPS]
    if not questions:
        figure = ProjectFigure(0.6)
        text = "no ablation of this profile has two settings that were run"
        figure.text(0.5, 0.5, text, ha="center", va="center", color="#666666")
        return figure
    sizes = [(table.question == q).sum() + 0.7 for q in rows]
    heights = [0.6 + 0.22 * sum(sizes) + 0.25 * len(sizes)] * bool(rows) + [2.6] * -(-len(sweeps) // 2)
    figure = ProjectFigure(0.45 + sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if rows:
        panels = parts[0].subplots(len(rows), 1, height_ratios=sizes, squeeze=False, sharex="all")[:, 0]
        for ax, question in zip(panels, rows, strict=True):
            _draw_rows(ax, table[table.question == question], runs)
        panels[-1].set_xlabel(metric.label)
        panels[-1].locator_params(axis="x", nbins=6)
    lines = []
    for k, part in enumerate(parts[len(parts) - -(-len(sweeps) // 2) :]):
        pair = sweeps[2 * k : 2 * k + 2]
        for ax, name in zip(part.subplots(1, len(pair), squeeze=False)[0], pair, strict=True):
            _draw_setting_sweep(ax, name, table, runs)
            lines.append(ax)
    state(figure, _finding_of_ablations(table), *lines)
    return figure


def _finding_of_ablations(table: pd.DataFrame) -> str:
    tested, decided = ablations_with_verdict(table)
    if tested.empty:
        return "Too few seeds to show that a changed setting differs from LRPET as it is"
    be = "is" if len(decided) == 1 else "are"
    return (
        f"{len(decided)} of {len(tested)} settings with enough seeds {be} shown to differ from LRPET as it is"
    )


def _draw_rows(ax, part: pd.DataFrame, runs: pd.DataFrame) -> None:
    part = part.reset_index(drop=True)
    style = METHOD_STYLES["lrp" if part.question[0].endswith(LRP) else "lrpet"]
    for y, row in part.iterrows():
        values = runs.score[runs.experiment == row.experiment].dropna()
        _draw_setting(ax, y, values, style, base=row.verdict in AS_IT_IS)
    ax.set(title=part.question[0], yticks=range(len(part)), ylim=(len(part) - 0.4, -0.6))
    ax.set_yticklabels(part.setting)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")


def _draw_setting(ax, y: int, values: pd.Series, style: MethodStyle, *, base: bool) -> None:
    if values.empty:
        place = {"transform": ax.get_yaxis_transform(), "ha": "center", "va": "center"}
        ax.text(0.5, y, "not run", color="#666666", fontsize=8.5, backgroundcolor=PAPER, **place)
        return
    face = style.color if base else PAPER
    ax.plot(values, [y] * len(values), style.marker, color=style.color, markerfacecolor=face)
    ax.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=style.color)
    if base:
        ax.axvline(values.mean(), color=FAINT, linewidth=0.8, linestyle=":", zorder=0)


def _draw_setting_sweep(ax, name: str, table: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Draw accuracy over the values of one setting, for LRP and LRPET as far as they were run."""
    column, label, scale = SWEEPS[name]
    missing = {}
    for method, question in (("lrp", name + LRP), ("lrpet", name)):
        part, style = table[table.question == question], METHOD_STYLES[method]
        mine = runs[runs.experiment.isin(part.experiment) & runs.score.notna()]
        if mine.experiment.nunique() > 1:
            mine = mine.assign(x=mine.groupby("experiment")[column].transform("mean").astype(float))
            draw_band(ax, mine, "x", "score", style, label=style.label)
            ax.plot(mine.x, mine.score, "o", color=style.color, **SEED)
            missing |= dict.fromkeys(part.setting[~part.experiment.isin(mine.experiment)])
    ax.set_xscale(scale)
    if scale == "log":
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set(title=name, xlabel=label, ylabel=metric_of(runs).label)
    if missing:
        ax.set_xlabel(f"{label}\nnot run: {', '.join(missing)}")
