"""The figures: DataFrames and matrices in, a Figure out, and one style for all of them.

Needs matplotlib (``pip install lrpet[notebooks]``), which the rest of the package does without. Figures are
made without pyplot: nothing is shown, kept open or set for other code. A notebook shows the one that a cell ends with.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from lrpet.config import METHODS, PROFILES, PROJECT, RunConfig, figures_root
from lrpet.projection import project

__all__ = [
    "METHOD_STYLES",
    "STYLE",
    "MethodStyle",
    "ProjectFigure",
    "method_style",
    "plot_ablations",
    "plot_accuracy_against_macs",
    "plot_by_depth",
    "plot_channel_errors",
    "plot_history",
    "plot_layers",
    "plot_rank_search",
    "plot_rank_sweep",
    "plot_spectrum",
    "save_figure",
    "saved_figures",
]


class MethodStyle(NamedTuple):
    """How one method looks in every figure; the marker and the line tell it apart in grayscale too."""

    label: str
    color: str
    marker: str
    linestyle: str | tuple


# Okabe and Ito's colours, then three that are as far from them and each other as possible for each kind of colour blindness.
METHOD_STYLES = {
    "dense": MethodStyle("dense", "#222222", "s", "-"),
    "lrp": MethodStyle("LRP", "#D55E00", "^", "--"),
    "lrpet": MethodStyle("LRPET", "#0072B2", "o", "-"),
    "svd_finetune": MethodStyle("SVD, then fine-tuned", "#009E73", "D", "-."),
    "factorized": MethodStyle("trained as factors", "#CC79A7", "v", ":"),
    "trp": MethodStyle("TRP", "#E69F00", "P", (0, (5, 1))),
    "warmup_switch": MethodStyle("dense, then factors", "#56B4E9", "X", (0, (3, 1, 1, 1))),
    "svd_training": MethodStyle("SVD training", "#AA55FF", "<", (0, (1, 1))),
    "filter_pruning": MethodStyle("filter pruning", "#1515AA", ">", (0, (5, 1, 1, 1, 1, 1))),
    "narrow": MethodStyle("narrow network", "#6A2A00", "d", (0, (8, 2))),
}
OTHER = MethodStyle("", "#777777", "h", (0, (2, 2)))  # a method that is not ours to run, with its own label

INK, GRID, PAPER = "#222222", "#DDDDDD", "#FFFFFF"
STYLE = {
    "figure.facecolor": PAPER,  # an own light background: on a dark screen nothing shines through
    "figure.dpi": 110,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 150,
    "svg.hashsalt": "lrpet",  # names inside an SVG are hashes; a fixed salt makes them the same every time
    "font.size": 9.5,
    "text.color": INK,
    "axes.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "errorbar.capsize": 3,
}


def _in_style():
    """Return the style as a context manager, also usable as a decorator; whatever the caller has set stays out."""
    return matplotlib.style.context(["default", STYLE])


class ProjectFigure(Figure):
    """A figure that is drawn in the style of the project wherever and whenever it is drawn.

    Args:
        height: inches; the width is that of a page, 7.5.

    >>> ProjectFigure(3).get_size_inches().tolist()
    [7.5, 3.0]
    """

    def __init__(self, height: float = 3.2):
        super().__init__(figsize=(7.5, height), layout="constrained")

    def draw(self, renderer):
        """Draw; ticks and labels come into being only now, so the style has to hold now too."""
        with _in_style():
            super().draw(renderer)

    def png(self, dpi: int | str = "figure") -> bytes:
        """Return the figure as a PNG file in memory."""
        with _in_style():
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
            return file.getvalue()

    def svg(self) -> bytes:
        """Return the figure as an SVG file in memory."""
        with _in_style():
            file = io.BytesIO()
            self.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return file.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def method_style(name: str) -> MethodStyle:
    """Return the style of a method by its name, by the name of a run or experiment, or by its name in a published table.

    Args:
        name: a method of RunConfig, or a text with one in it ("resnet20-lrpet-s1", "TRP+nuclear (channel)"). "baseline"
            means dense. Any other ("EViT") gets a style of its own.

    >>> method_style("baseline (TRP)").color == METHOD_STYLES["dense"].color
    True
    >>> method_style("EViT").label
    'EViT'
    """
    for word in re.split(r"[^a-z_]+", name.lower()):
        word = {"baseline": "dense"}.get(word, word)
        if word in METHOD_STYLES:
            return METHOD_STYLES[word] if name == word else METHOD_STYLES[word]._replace(label=name)
    return OTHER._replace(label=name)


def _legend(figure: Figure, *axes) -> None:
    """Put one legend above the panels, where it hides no data: equal labels once, in as many columns as the page is wide."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries)
    widths = {n: sum(11 + max(map(len, column)) for column in np.array_split(labels, n)) for n in range(1, len(labels) + 1)}
    fitting = [n for n, letters in widths.items() if letters <= 118]  # 118 letters of 9 points fill 7.5 inches
    if labels:
        figure.legend(entries.values(), labels, loc="outside upper left", ncols=max(fitting, default=1))


def _whole_numbers(ax) -> None:
    """Tick the x axis at whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def _mark_rank(ax, x: float, text: str, *, at_top: bool = False) -> None:
    """Draw a dotted vertical line with a text beside it, on the side that has room."""
    ax.axvline(x, color=INK, linewidth=0.8, linestyle=":")
    low, high = ax.get_xlim()
    side, align = (-3, "right") if x > low + 0.7 * (high - low) else (3, "left")
    offset, vertical = (-1, "top") if at_top else (3, "bottom")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": align, "va": vertical}
    ax.annotate(text, (x, float(at_top)), (side, offset), **place)


def _say(ax, text: str) -> None:
    """Write a line in the middle of a panel that has nothing to show."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#666666")
    ax.set(xticks=[], yticks=[])


@_in_style()
def plot_spectrum(matrix: Tensor, rank: int) -> ProjectFigure:
    """Draw the singular values of a matrix before the projection, after LRP and after LRPET, and their cumulative energy.

    Args:
        matrix: M, (N, D), floating point.
        rank: R, 1 ≤ R ≤ min(N, D).

    Returns:
        Two panels: s_i against i, the removed ones hatched; Σ_{j≤i} s_j² in % of E against i.

    Raises:
        ValueError: the rank does not fit the matrix.

    Source: arXiv 2204.05566.

    >>> plot_spectrum(torch.diag(torch.tensor([4.0, 3.0])), 1).axes[1].get_ylabel()
    'cumulative energy, % of E'
    """
    M = matrix.detach().double().cpu()
    projected = {name: project(M, rank, energy_transfer=name == "lrpet") for name in ("lrp", "lrpet")}
    s = {name: torch.linalg.svdvals(A).numpy() for name, A in {"dense": M, **projected}.items()}  # (K,) each
    E = float(np.square(s["dense"]).sum()) or 1.0
    i = np.arange(1, len(s["dense"]) + 1)
    figure = ProjectFigure()
    left, right = figure.subplots(1, 2)

    kept = i <= rank
    bars = {"width": 0.8, "edgecolor": "#777777", "linewidth": 0.5}
    left.bar(i[kept], s["dense"][kept], color="#D0D0D0", label="before, kept", **bars)
    left.bar(i[~kept], s["dense"][~kept], color=PAPER, hatch="//////", label="before, removed", **bars)
    for name in ("lrp", "lrpet"):
        style = METHOD_STYLES[name]
        left.plot(i[kept], s[name][kept], style.marker, color=style.color, markersize=4, label=style.label)
    left.set(xlabel="i, number of the singular value", ylabel="singular value $s_i$", xlim=(0.2, len(i) + 0.8))
    left.set_ylim(0, 1.12 * max(values[0] for values in s.values()) or 1)

    for name, width in (("dense", 3.5), ("lrp", 1.6), ("lrpet", 1.6)):
        style = METHOD_STYLES[name]
        color, linestyle = ("#B0B0B0", "-") if name == "dense" else (style.color, style.linestyle)
        label = "before" if name == "dense" else style.label
        percent = 100 * np.cumsum(np.square(s[name])) / E
        right.plot([0, *i], [0, *percent], color=color, linestyle=linestyle, linewidth=width, label=label)
        if name == "lrp" and rank < len(i):
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}
            place = {"textcoords": "offset points", "ha": "right", "va": "top", "color": color, "bbox": box}
            right.annotate(f"{percent[-1]:.1f} %", (i[-1], percent[-1]), (0, -8), **place)
    right.set(xlabel="i, number of the singular value", ylabel="cumulative energy, % of E", xlim=(0, len(i) + 0.8), ylim=(0, 106))
    for ax in (left, right):
        _whole_numbers(ax)
    _mark_rank(left, rank + 0.5, f"R = {rank}", at_top=True)
    _mark_rank(right, rank, f"R = {rank}")
    _legend(figure, left, right)
    return figure


@_in_style()
def plot_rank_sweep(matrix: Tensor, rank: int | None = None) -> ProjectFigure:
    """Draw which energy is kept and how far the projection moves the matrix, for every rank.

    With κ = Σ_{i≤R} s_i² / E the relative error ‖P − M‖ / ‖M‖ is sqrt(1 − κ) for LRP, the least possible, and
    sqrt(2 − 2·sqrt κ) for LRPET.

    Args:
        matrix: M, (N, D), floating point.
        rank: an R to mark, or None.

    Returns:
        Two panels against R: energy in % of E, and the relative error.

    Source: arXiv 2204.05566; the second formula follows from the factor 1 / sqrt κ.

    >>> plot_rank_sweep(torch.eye(4)).axes[1].get_ylabel()
    'relative error ‖P − M‖ / ‖M‖'
    """
    energy = torch.linalg.svdvals(matrix.detach().double().cpu()).square().numpy()
    kappa = np.minimum(1.0, np.cumsum(energy) / (energy.sum() or 1.0))
    R = np.arange(1, len(kappa) + 1)
    figure = ProjectFigure()
    left, right = figure.subplots(1, 2)
    curves = {"lrp": (100 * kappa, np.sqrt(1 - kappa)), "lrpet": (np.full(len(R), 100.0), np.sqrt(2 - 2 * np.sqrt(kappa)))}
    for name, (percent, error) in curves.items():
        style = METHOD_STYLES[name]
        for ax, values in ((left, percent), (right, error)):
            ax.plot(R, values, color=style.color, linestyle=style.linestyle, label=style.label)
            if rank is not None:
                ax.plot(rank, values[rank - 1], style.marker, color=style.color)
    left.set(xlabel="rank R", ylabel="energy after the projection, % of E", xlim=(0, len(R) + 0.5), ylim=(0, 106))
    right.set(xlabel="rank R", ylabel="relative error ‖P − M‖ / ‖M‖", xlim=(0, len(R) + 0.5), ylim=(0, None))
    for ax in (left, right):
        _whole_numbers(ax)
        if rank is not None:
            _mark_rank(ax, rank, f"R = {rank}")
    _legend(figure, left)
    return figure


@_in_style()
def plot_history(histories: pd.DataFrame | Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]]) -> ProjectFigure:
    """Draw loss and accuracy over the epochs of one run or of several.

    Args:
        histories: the ``history`` of a run, or name → history or list of histories. A list is one run in
            several seeds: its mean is drawn, and a band from the lowest to the highest. Names are those of
            methods or hold one ("lrpet", "lrpet, seed 1") and take its colour; others get a colour of their own.

    Returns:
        Two panels against the epoch: cross-entropy in nats on a log scale, top-1 accuracy in %. Pale lines are
        the training images, with augmentation; full lines the images that ``scored_on`` names. Dotted vertical
        lines are where the learning rate falls.

    >>> table = {"epoch": [1, 2], "learning_rate": 0.1, "train_loss": [2, 1], "train_top1_pct": [30, 60], "loss": [2, 1], "top1_pct": [30, 60]}
    >>> plot_history(pd.DataFrame(table)).axes[1].get_ylabel()
    'top-1 accuracy, %'
    """
    runs = {"": histories} if isinstance(histories, pd.DataFrame) else histories
    runs = {name: [run] if isinstance(run, pd.DataFrame) else list(run) for name, run in runs.items() if len(run)}
    figure = ProjectFigure(3.4)
    panels = figure.subplots(1, 2)
    for (name, seeds), style in zip(runs.items(), _line_styles(runs), strict=True):
        table = pd.concat(seeds, ignore_index=True)
        label = style.label + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        for ax, column in zip(panels, ("loss", "top1_pct"), strict=True):
            for source, look in ((f"train_{column}", {"linewidth": 0.9, "alpha": 0.6}), (column, {"label": label if name else None})):
                values = table.groupby("epoch")[source].agg(["mean", "min", "max"])
                marker = style.marker if len(values) == 1 else None  # a line of one point would not show
                ax.plot(values.index, values["mean"], color=style.color, linestyle=style.linestyle, marker=marker, **look)
                if len(seeds) > 1 and source == column:
                    ax.fill_between(values.index, values["min"], values["max"], color=style.color, alpha=0.15, linewidth=0)
    falls = sorted({epoch - 0.5 for seeds in runs.values() for t in seeds for epoch in t["epoch"][t["learning_rate"].diff() < 0]})
    for ax in panels:
        ax.set_xlabel("epoch")
        _whole_numbers(ax)
        for epoch in falls:
            ax.axvline(epoch, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        if not runs:
            _say(ax, "no run has finished")
    panels[0].set_ylabel("loss (cross-entropy), nats")
    panels[1].set_ylabel("top-1 accuracy, %")
    if runs:
        where = sorted({images for seeds in runs.values() for t in seeds for images in t.get("scored_on", ["test"])})
        panels[0].set(yscale="log")
        panels[0].set_title(f"full: {' and '.join(where)} images, pale: training images", color="#555555")
    if falls:
        panels[1].set_title("dotted: the learning rate falls", color="#555555")
    _legend(figure, panels[0])
    return figure


def _line_styles(names) -> list[MethodStyle]:
    """Return a style for each name; a name without a method, or a second one with the same method, looks different from all before."""
    unused = [style for name, style in METHOD_STYLES.items() if name not in ("dense", "lrp", "lrpet")]
    dashes = ["-", (0, (4, 2)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (2, 3))]
    styles = []
    for name in names:
        style = METHOD_STYLES["dense"] if not name else method_style(name)
        if style.color == OTHER.color:
            style = (unused.pop(0) if unused else OTHER)._replace(label=name)
        twins = sum(other.color == style.color for other in styles)
        styles.append(style._replace(linestyle=dashes[twins % len(dashes)]) if twins else style)
    return styles


@_in_style()
def plot_layers(layers: pd.DataFrame) -> ProjectFigure:
    """Draw the cost of every layer, dense and compact, and which share of its energy the kept singular values hold.

    Args:
        layers: the ``layers`` of a run, or any table with the columns ``name``, ``macs`` and ``dense_macs``
            (multiply-adds for one image), and if there are any ``energy_kept`` (0 to 1, before energy transfer) and
            ``action`` ("constant" marks a dead layer).

    Returns:
        Two panels against the layer, in the order of execution: MACs in millions, energy kept in %.

    Raises:
        ValueError: a column is missing.

    >>> plot_layers(pd.DataFrame({"name": ["conv"], "macs": [5e5], "dense_macs": [1e6]})).axes[0].get_ylabel()
    'MACs, millions'
    """
    missing = [name for name in ("name", "macs", "dense_macs") if name not in layers]
    if missing:
        raise ValueError(f"layers must have a column {missing[0]!r}; got {', '.join(map(str, layers.columns))}")
    x = np.arange(len(layers))
    figure = ProjectFigure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    total, dense = (f"{layers[column].sum() / 1e6:#.3g}".rstrip(".") for column in ("macs", "dense_macs"))
    edge = 0.6 if len(x) <= 60 else 0
    top.bar(x, layers["dense_macs"] / 1e6, color="#E4E4E4", edgecolor="#777777", linewidth=edge, width=0.8, label=f"dense, {dense} M in all")
    compact = METHOD_STYLES["lrpet"].color
    top.bar(x, layers["macs"] / 1e6, color=compact, width=0.5, label=f"compact, {total} M in all")
    if "action" in layers and (layers["action"] == "constant").any():
        dead = x[layers["action"] == "constant"]
        top.plot(dead, np.zeros(len(dead)), "x", color=METHOD_STYLES["lrp"].color, clip_on=False, label="dead layer, no MACs")
    top.set_ylabel("MACs, millions")

    energy = 100 * layers["energy_kept"].astype(float) if "energy_kept" in layers else pd.Series(np.nan, layers.index)
    if energy.notna().any():
        bottom.plot(x, energy, "o", color=compact, markersize=4 if len(x) <= 60 else 3)
        low = energy.min()
        bottom.set_ylim(0 if low < 90 else 89, 100 + (4 if low < 90 else 0.5))
    else:
        _say(bottom, "no layer was projected")
    bottom.set_ylabel("energy kept, %")
    every = -(-len(x) // 28)  # more names than this would run into each other
    bottom.set_xticks(x[::every], layers["name"].iloc[::every], rotation=90, fontsize=8)
    bottom.set(xlabel="layer, in the order of execution", xlim=(-0.7, len(x) - 0.3))
    _legend(figure, top)
    return figure


@_in_style()
def plot_by_depth(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> ProjectFigure:
    """Draw quantities that have a value a layer, relative to the dense network, from the first layer to the last.

    Args:
        panels: label of the y axis → method → a value a layer, above 0; 1 means "as in the dense network".

    Returns:
        A panel a quantity, side by side, against the number of the layer; on a log scale if it spans a factor of ten.

    >>> plot_by_depth({"norm, relative": {"lrp": [0.8, 0.6]}}).axes[0].get_xlabel()
    'layer, from the input'
    """
    figure = ProjectFigure()
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for ax, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, values in curves.items():
            style = method_style(name)
            look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker}
            ax.plot(np.arange(1, len(values) + 1), values, markersize=3.5, linewidth=1.2, label=style.label, **look)
        ax.axhline(1, color="#888888", linewidth=0.8, zorder=1)
        ax.set(xlabel="layer, from the input", ylabel=label)
        everything = np.concatenate([np.asarray(values, float) for values in curves.values()])
        if everything.max() >= 10 * everything.min() > 0:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
        else:
            ax.set_ylim(0, None)
        _whole_numbers(ax)
    _legend(figure, *axes)
    return figure


@_in_style()
def plot_channel_errors(scales: Sequence[float], errors: Mapping[str, Sequence[float]]) -> ProjectFigure:
    """Draw how wrong each output channel is after a projection, against the scale that BatchNorm gives the channel.

    Args:
        scales: |a| of each channel, all above 0.
        errors: label → relative error of each channel (1 means 100 %).

    Returns:
        One panel with a logarithmic x axis; the channels of one label are joined by a line.

    Source: what arXiv 2204.05566, is about.

    >>> plot_channel_errors([0.1, 1.0], {"without": [0.5, 0.5], "with": [0.9, 0.1]}).axes[0].get_xlabel()
    'scale |a| that BatchNorm gives the channel'
    """
    figure = ProjectFigure(2.9)
    ax = figure.subplots()
    looks = cycle([METHOD_STYLES["narrow"], METHOD_STYLES["lrpet"], METHOD_STYLES["svd_finetune"]])
    order = np.argsort(scales)
    for (label, values), style in zip(errors.items(), looks, strict=False):
        look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker, "markersize": 4, "linewidth": 1}
        ax.plot(np.asarray(scales)[order], 100 * np.asarray(values)[order], label=label, **look)
    ax.set(xscale="log", xlabel="scale |a| that BatchNorm gives the channel", ylabel="error of the channel, %", ylim=(0, None))
    ax.xaxis.set_major_formatter("{x:g}")
    _legend(figure, ax)
    return figure


@_in_style()
def plot_accuracy_against_macs(runs: pd.DataFrame, published: pd.DataFrame | None = None) -> ProjectFigure:
    """Draw accuracy against cost: runs as full markers with mean and deviation over their seeds, published ones hollow.

    Runs that differ in the seed only are one point: mean of the last epoch's accuracy and of the MACs, bars of
    one standard deviation (n − 1) where there are two seeds or more. Points of equal cost stand side by side.

    Args:
        runs: rows of :func:`lrpet.load_runs`, of one data set and one profile; may be empty.
        published: rows of ``paper/reported.csv``. Drawn are those of a data set and network that ``runs`` has, with an
            accuracy and a cost. Where only the saved share of the MACs is published, the cost is what is left of the
            dense network's as counted here; a baseline costs the dense network.

    Returns:
        One panel: top-1 accuracy in % against MACs in millions, on a log scale if they span a factor of ten.

    Raises:
        ValueError: the runs are of several data sets or profiles.

    Source: the figures of this kind in arXiv 2204.05566.

    >>> plot_accuracy_against_macs(pd.DataFrame()).axes[0].get_xlabel()
    'MACs of one image, millions'
    """
    for column in ("dataset", "profile"):
        if column in runs and runs[column].nunique() > 1:
            raise ValueError(f"runs must be of one {column}, else their numbers do not compare; got {', '.join(sorted(runs[column].unique()))}")
    everything = _series_of_runs(runs) if len(runs) else []
    if everything and published is not None:
        everything += _series_of_published(published, runs)
    figure = ProjectFigure(4.2)
    ax = figure.subplots()
    dodges = _dodges(everything)
    for series, dodge in zip(everything, dodges, strict=True):
        points, style = series.points, series.style
        inside = {"markerfacecolor": PAPER, "markeredgewidth": 1.5} if series.hollow else {"fillstyle": series.fill, "markerfacecoloralt": PAPER}
        look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker, "markersize": 7, "linewidth": 0.9, **inside}
        lines = ax.plot(points["macs"], points["top1"], label=series.label, **look)
        deviation = {"xerr": points["macs_std"].where(points["macs_std"] > 0), "yerr": points["top1_std"]}
        bars = ax.errorbar(points["macs"], points["top1"], **deviation, fmt="none", ecolor=style.color, elinewidth=1.1)
        for artist in (*lines, *bars[1], *bars[2]):  # shifted only now, as a shifted artist does not count for the axis limits
            artist.set_transform(artist.get_transform() + ScaledTranslation(dodge / 72, 0, figure.dpi_scale_trans))
    if len({series.model for series in everything}) > 1:
        for k, series in enumerate(sorted(everything, key=lambda series: series.points["macs"].max())):
            x, y, below = *series.points[["macs", "top1"]].iloc[-1], k % 2 == 0  # by turns, so that neighbours do not collide
            place = {"ha": "left" if below else "right", "va": "top" if below else "bottom", "textcoords": "offset points"}
            ax.annotate(series.model, (x, y), (6, -4) if below else (-6, 4), fontsize=8, color="#555555", **place)
    if not everything:
        _say(ax, "no run has finished")
    where = sorted(set(runs["scored_on"])) if "scored_on" in runs else []
    aside = "; points of equal cost stand side by side" * any(dodges)
    ax.set(xlabel=f"MACs of one image, millions{aside}", ylabel=f"top-1 accuracy, {' and '.join(where) or 'test'} images, %")
    hollow = "; hollow: published" if any(series.hollow for series in everything) else ""
    seeds = sorted({n for series in everything for n in series.seeds})
    if everything:
        spread = "" if seeds[-1] == 1 else "mean and standard deviation over "
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
    _legend(figure, ax)
    return figure


@_in_style()
def plot_rank_search(candidates: pd.DataFrame, uniform: pd.DataFrame) -> ProjectFigure:
    """Draw accuracy against MACs of searched ranks, their Pareto front, and one ratio for all layers.

    Args:
        candidates: ``top1_pct``, ``macs`` and ``pareto`` of each candidate, as :func:`lrpet.search.trials_table` returns them.
        uniform: the same without ``pareto``, a row a ratio.

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
    ax.plot(candidates.macs / 1e6, candidates.top1_pct, linestyle="none", marker="o", markerfacecolor="none", color=searched.color, label="candidate")
    ax.plot(front.macs / 1e6, front.top1_pct, marker="o", color=searched.color, linestyle="-", label="Pareto front of the candidates")
    line = uniform.sort_values("macs")
    ax.plot(line.macs / 1e6, line.top1_pct, marker=plain.marker, color=plain.color, linestyle="--", label="one ratio for all layers")
    ax.set(xlabel="MACs of one image, millions", ylabel="top-1 accuracy, held-out images, %")
    _legend(figure, ax)
    return figure


class _Series(NamedTuple):
    """Points of one method, network and variant, in the order of their cost."""

    label: str
    model: str
    style: MethodStyle
    fill: str  # which part of the marker is filled
    seeds: frozenset[int]  # how many; empty where nothing is said
    points: pd.DataFrame  # macs and macs_std in millions, top1 and top1_std in percent
    hollow: bool = False


def _dodges(everything: list[_Series]) -> list[float]:
    """Return a sideways shift in points for each series, so that points of equal cost stand side by side."""
    costs = [{f"{value:.3g}" for value in series.points["macs"]} for series in everything]
    shifts = []
    for k in range(len(costs)):
        alike = [j for j, other in enumerate(costs) if other & costs[k]]
        shifts.append(8.0 * (alike.index(k) - (len(alike) - 1) / 2))
    return shifts


def _series_of_runs(runs: pd.DataFrame) -> list[_Series]:
    """Average over seeds, then split by what the figure tells apart: method, network, and settings that differ within a method."""
    fields = [f.name for f in dataclasses.fields(RunConfig) if f.name in runs and f.name not in ("seed", "profile", "dataset")]
    key = runs[fields].map(lambda value: json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value))
    key["macs"], key["top1"], key["seed"] = runs["macs"] / 1e6, runs["top1_pct"], runs["seed"]
    everything = []
    for method in [*METHOD_STYLES, *sorted(set(key["method"]) - set(METHOD_STYLES))]:
        mine = key[key["method"] == method]
        differ = [f for f in fields if f not in ("model", "prune_ratio", "ranks") and mine[f].nunique() > 1]
        usual = METHODS.get(method, {})
        rows_of = mine[differ].drop_duplicates().sort_values(differ).itertuples(index=False) if differ else []
        variants = {tuple(row): [_setting(f, v) for f, v in zip(differ, row, strict=True) if f not in usual or v != str(usual[f])] for row in rows_of}
        variants = dict(sorted(variants.items(), key=lambda variant: len(variant[1])))  # as the method is meant first, with a full marker
        fills = dict(zip(variants, cycle(["full", "left", "bottom", "right", "top"]), strict=False))
        place = {row: k for k, row in enumerate(variants)}
        for (model, *row), rows in sorted(mine.groupby(["model", *differ]), key=lambda group: place.get(group[0][1:], 0)):
            points = rows.groupby(fields).agg(
                macs=("macs", "mean"), macs_std=("macs", "std"), top1=("top1", "mean"), top1_std=("top1", "std"), seeds=("seed", "nunique")
            )
            style, seeds = method_style(method), frozenset(points["seeds"])
            name = ", ".join([style.label, *variants.get(tuple(row), [])]).replace(", without BN", " without BN")  # as in the tables
            everything.append(_Series(name, model, style, fills.get(tuple(row), "full"), seeds, points.sort_values("macs")))
    if len(set().union(*(series.seeds for series in everything))) > 1:  # else the title says it once for all
        everything = [series._replace(label=f"{series.label} ({_count(sorted(series.seeds))})") for series in everything]
    return everything


def _setting(field: str, value: str) -> str:
    """Write a setting that tells two variants of a method apart."""
    return f"{'with' if value == 'True' else 'without'} BN rectification" if field == "bn_rectification" else f"{field}={value}"


def _count(seeds: list[int]) -> str:
    """Write numbers of seeds, ascending, as "1 seed" or "2 to 3 seeds"."""
    return f"{seeds[0]} seed{'s' * (seeds != [1])}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"


def _series_of_published(published: pd.DataFrame, runs: pd.DataFrame) -> list[_Series]:
    """Return a hollow point for each published row that can stand beside the runs."""
    table = published.rename(columns={"macs_m": "macs", "top1_pct": "top1"})
    table = table[table["dataset"].isin(runs["dataset"]) & table["model"].isin(runs["model"])]
    dense = table["model"].map(runs.groupby("model")["dense_macs"].max()).astype(float) / 1e6
    saved = table["macs_reduction_pct"].where(~table["method"].str.startswith("baseline"), 0.0)
    table = table.assign(macs=table["macs"].fillna(dense * (1 - saved / 100)), macs_std=np.nan, top1_std=np.nan)
    table = table.dropna(subset=["macs", "top1"])
    return [
        _Series(f"{name}, published", model, method_style(name), "full", frozenset(), points.sort_values("macs"), hollow=True)
        for (name, model), points in table.groupby(["method", "model"], sort=False)
    ]


@_in_style()
def plot_ablations(table: pd.DataFrame, runs: pd.DataFrame) -> ProjectFigure:
    """Draw the accuracy of each setting of each ablation: the seeds as dots, their mean as a bar across.

    Args:
        table: of :func:`lrpet.tables.ablation_table`.
        runs: of :func:`lrpet.tables.profile_runs`, from which it was made.

    Returns:
        A panel a question, a line a setting; LRPET as it is has the filled marker, and a dotted line stands at its mean.
        A setting that was not run says so, and so does a profile without ablations.

    >>> columns = ["question", "setting", "experiment", "verdict"]
    >>> rows = pd.DataFrame([["residual factor", "0", "a", "LRPET as it is"]], columns=columns)
    >>> plot_ablations(rows, pd.DataFrame({"experiment": ["a"], "top1_pct": [90.0]})).axes[0].get_xlabel()
    'top-1 accuracy, %'
    """
    if table.empty:
        figure = ProjectFigure(0.6)
        figure.text(0.5, 0.5, "this profile has no ablations", ha="center", va="center", color="#666666")
        return figure
    questions = list(dict.fromkeys(table.question))
    sizes = [(table.question == question).sum() + 0.7 for question in questions]
    figure = ProjectFigure(0.5 + 0.22 * sum(sizes) + 0.25 * len(sizes))
    panels = figure.subplots(len(sizes), 1, height_ratios=sizes, squeeze=False, sharex="all").flatten()
    style = METHOD_STYLES["lrpet"]
    for ax, question in zip(panels, questions, strict=False):
        part = table[table.question == question].reset_index(drop=True)
        for y, row in part.iterrows():
            values = runs[runs.experiment == row.experiment].top1_pct.dropna().astype(float)
            base = row.verdict == "LRPET as it is"
            if values.empty:
                ax.text(0.5, y, "not run", transform=ax.get_yaxis_transform(), ha="center", va="center", color="#666666", fontsize=8.5)
                continue
            ax.plot(values, [y] * len(values), style.marker, color=style.color, markerfacecolor=style.color if base else PAPER)
            ax.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=style.color)
            if base:
                ax.axvline(values.mean(), color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        ax.set(title=question, yticks=range(len(part)), yticklabels=part.setting, ylim=(len(part) - 0.4, -0.6))
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
    panels[-1].set_xlabel("top-1 accuracy, %")
    return figure


def saved_figures(profile: str) -> list[tuple[str, Path]]:
    """Return the PNG files of a profile with a caption each: by which notebook and from which runs, as ``figures/README.md`` says."""
    rows = re.findall(r"\| `<profile>/([^`]+)` \| `([^`]+)` \| (.+) \|", (PROJECT / "figures" / "README.md").read_text(encoding="utf-8"))
    found = []
    for path in sorted((figures_root() / profile).glob("*.png")):
        origin = next((f"made by `{notebook}` from {source}" for name, notebook, source in rows if path.match(f"{name}.png") or path.match(name)), "")
        found.append((f"**{path.stem}**, {origin}", path))
    return found


def save_figure(figure: ProjectFigure, name: str, profile: str) -> tuple[Path, Path]:
    """Write a figure as PNG (150 dots an inch) and as SVG; the same figure gives the same bytes.

    Args:
        figure: of a function of this module.
        name: file name without its ending; letters, digits, "-", "_" and ".".
        profile: smoke, short, paper, imagenette or imagenet; the folder below ``figures_root()``.

    Returns:
        The paths of the PNG and of the SVG file.

    Raises:
        ValueError: the name or the profile is not allowed.

    >>> save_figure(plot_rank_sweep(torch.eye(2)), "../sweep", "smoke")
    Traceback (most recent call last):
    ...
    ValueError: name must be letters, digits, '-', '_' and '.' only; got '../sweep'
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"name must be letters, digits, '-', '_' and '.' only; got {name!r}")
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}; got {profile!r}")
    folder = figures_root() / profile
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    for path, content in zip(paths, (figure.png(STYLE["savefig.dpi"]), figure.svg()), strict=True):
        part = path.with_name(f"{path.name}.part{os.getpid()}")
        part.write_bytes(content)
        os.replace(part, path)  # whole or not at all
    return paths
