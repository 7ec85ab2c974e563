"""The headline: every method at equal cost as a row of dots, one per seed."""

from __future__ import annotations

import pandas as pd

from lrpet.experiments import MAIN
from lrpet.figures.style import GRID, INK, METHOD_STYLES, ProjectFigure, in_style, say_in_panel, state
from lrpet.registry import metric_of
from lrpet.tables.claims import PLAIN, differences
from lrpet.tables.rows import ABLATIONS, MACS_TOLERANCE
from lrpet.tables.statistics import FEWEST, half_width

__all__ = ["plot_headline"]
QUIET = "#666666"
ROW_INCHES = 0.34
SHOWN = (*MAIN, PLAIN, "competitors", "control", ABLATIONS)
DATA = {"cifar10": "CIFAR-10", "digits": "digits"}


@in_style()
def plot_headline(runs: pd.DataFrame, network: str | None = None) -> ProjectFigure:
    """Draw each method at LRPET's cost as a row: a dot per seed, the mean and its 95 % interval.

    The rows are those at LRPET's ratio and within 2 % of its multiply-adds, sorted by their means; the dense
    network stands above a rule. A thin line carries LRPET's mean through all rows. Fewer than three seeds
    have no interval: by Student's t that of two is nine times as wide as they are apart. The title says what
    :func:`lrpet.tables.claims.differences` decides.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for one profile.
        network: of the runs; None is the first with a main table.

    Returns:
        One panel: top-1 accuracy of the last epoch in percent, or the metric of another task.

    Source: interval by Student's t; dots and intervals instead of bars as in Cleveland, "The Elements of
    Graphing Data".
    """
    metric = metric_of(runs)
    done = runs[runs[metric.column].notna()]
    base = done[(done.label == METHOD_STYLES["lrpet"].label) & done.feeds.isin((*MAIN, PLAIN))]
    base = base[base.feeds.isin(MAIN) if network is None else base.network == network]
    if base.empty:
        figure = ProjectFigure(2)
        say_in_panel(figure.subplots(), "no run of LRPET has finished")
        return figure
    base = base[base.network == base.network.iloc[0]]
    rows = _rows(done[(done.network == base.network.iloc[0]) & done.feeds.isin(SHOWN)], base.iloc[0])
    figure = ProjectFigure(1.3 + ROW_INCHES * len(rows))
    ax = figure.subplots()
    for place, (label, values) in enumerate(reversed(rows)):
        _draw_row(ax, place, label, values)
    if rows[0][0] == METHOD_STYLES["dense"].label:
        ax.axhline(len(rows) - 1.5, color=INK, linewidth=0.6)
    ax.axvline(base[metric.column].mean(), color=METHOD_STYLES["lrpet"].color, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), [_name(label, base.iloc[0]) for label, _ in reversed(rows)])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x", color=GRID)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    config = base.config.iloc[0]
    on = f"{config.model}, {DATA.get(config.dataset, 'images of the tree')}, {base.scored_on.iloc[0]} images"
    key = "circle: a seed; bar: mean; pale: its 95 % interval, of three seeds or more; dotted: LRPET's mean"
    unit = f", {metric.unit}" * bool(metric.unit)
    ax.set_xlabel(f"{metric.title} after {config.epochs} epochs{unit}   ({on})")
    figure.supxlabel(key, fontsize=8.5, color=QUIET)
    state(figure, _finding(runs, base))
    return figure


def _rows(done: pd.DataFrame, base: pd.Series) -> list[tuple[str, pd.Series]]:
    """Return the scores of each experiment to be shown: the dense one, then the others, best first."""
    metric = metric_of(done)
    equal = (done.macs / base.macs - 1).abs() <= MACS_TOLERANCE
    alike = equal & (done.ratio.isna() | (done.ratio == base.ratio))
    # of the ablations only the competitor that the paper names, not every setting
    alike &= (done.feeds != ABLATIONS) | done.label.str.contains("trained network")
    groups = [
        (seeds.label.iloc[0] + _rate(seeds.config.iloc[0]), seeds[metric.column])
        for _, seeds in done[alike].groupby("experiment", sort=False)
    ]
    dense = done[done.label == METHOD_STYLES["dense"].label][metric.column]
    first = [(METHOD_STYLES["dense"].label, dense)] if len(dense) else []
    return first + sorted(groups, key=lambda row: -metric.sign * row[1].mean())


def _rate(config) -> str:
    if config.pretrain_epochs is None or config.finetune_learning_rate is None or config.method != "lrpet":
        return ""
    return f", rate {config.finetune_learning_rate:g}"


def _name(label: str, base: pd.Series) -> str:
    return f"{label} ({base.dense_macs / 1e6:.1f} M MACs)" if label == METHOD_STYLES["dense"].label else label


def _draw_row(ax, place: int, label: str, values: pd.Series) -> None:
    color = {METHOD_STYLES[m].label: METHOD_STYLES[m].color for m in ("dense", "lrpet")}.get(label, QUIET)
    mean, n = values.mean(), len(values)
    if n >= FEWEST:
        half = half_width(values)
        ax.plot([mean - half, mean + half], [place, place], color=color, alpha=0.45, linewidth=2.5)
    ax.plot(values, [place] * n, linestyle="none", marker="o", markerfacecolor="none", color=color)
    ax.plot([mean, mean], [place - 0.27, place + 0.27], color=color, linewidth=2)
    text = f"{mean:.2f}  ({n} seed{'s' * (n > 1)})"
    ax.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", color=color, fontsize=9)


def _finding(runs: pd.DataFrame, base: pd.DataFrame) -> str:
    """Say what the differences of a profile decide about LRPET, and nothing that they do not."""
    first, lrpet = base.iloc[0], METHOD_STYLES["lrpet"].label
    table = differences(runs)
    mine = table[(table.network == first.network) & (table.prune_ratio == f"{first.ratio:g}")]
    mine = mine[mine.pair.str.startswith(f"{lrpet} − ")]
    other = mine.pair.str.removeprefix(f"{lrpet} − ")
    won, lost = ("higher", "lower")[:: metric_of(runs).sign]
    beaten = [name for name in other[mine.verdict == won] if name != "dense"]
    better = [name for name in other[mine.verdict == lost] if name != "dense"]
    parts = [f"LRPET beats {_listed(beaten)}"] if beaten else []
    parts += [f"{_listed(better)} beat{'s' * (len(better) == 1)} LRPET"] if better else []
    at = f"At {first.macs / 1e6:.1f} M multiply-adds"
    if parts:
        return f"{at} {' and '.join(parts)}; no other difference is decided"
    if len(base) < FEWEST:
        few = "1 seed of LRPET is" if len(base) == 1 else f"{len(base)} seeds of LRPET are"
        return f"{at} {few} too few for a verdict on {first.network}"
    return f"{at} no method is shown to differ from LRPET"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
