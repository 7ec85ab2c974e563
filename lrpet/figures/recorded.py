"""Figures of what runs recorded: spectra and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullLocator

from lrpet.figures.style import (
    INK,
    PAPER,
    ProjectFigure,
    add_legend,
    in_style,
    method_style,
    say_in_panel,
    whole_number_ticks,
)
from lrpet.tables.recorded import TINY

__all__ = [
    "plot_energy_kept",
    "plot_gradient_bound",
    "plot_gradient_ratios",
    "plot_gradients",
    "plot_spectra",
    "plot_spectra_over_training",
]
MISSING = "not recorded"
PANELS = 20  # layers on one page
EPOCHS = 4  # lines in one panel
DOTS = 14  # after a projection, in one panel; more run into each other
FLOOR = 1e-5  # of the largest singular value: what is smaller is rounding, and would stretch the axis


def _evenly(values: Sequence, n: int) -> list:
    """Return n of the values at most, the first and the last among them, evenly between."""
    return [
        values[k]
        for k in sorted(set(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int)))
    ]


def _spectrum(table: pd.DataFrame, layer: str, epoch: int, when: str, rank: int | None) -> pd.DataFrame:
    """Return i and s of one spectrum; after a projection the first R only, as the others are rounding."""
    rows = table[(table["layer"] == layer) & (table["epoch"] == epoch) & (table["when"] == when)]
    return rows[rows["i"] <= rank] if when == "after" and rank is not None else rows


def _at_rank(ax, rank: int | None) -> None:
    if rank is not None:
        ax.axvline(rank + 0.5, color=INK, linewidth=0.8, linestyle=":")


@in_style()
def plot_spectra(spectra: Mapping[str, pd.DataFrame], ranks: Mapping[str, int]) -> ProjectFigure:
    """Draw the singular values of each layer at the last epoch that every run recorded.

    Args:
        spectra: method → table of :func:`lrpet.training.recording.load_spectra`; may be empty.
        ranks: layer → R, drawn as a dotted line; values after it are removed.

    Returns:
        A panel per layer, twenty layers evenly chosen of more: s_i against i. Lines are before the
        projection, markers after it.

    >>> plot_spectra({}, {}).axes[0].texts[0].get_text()
    'not recorded'
    """
    layers = _evenly(next(iter(spectra.values()))["layer"].unique(), PANELS) if spectra else [""]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = ProjectFigure(0.9 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax in panels.flat[len(layers) :]:
        ax.remove()
    if not spectra:
        say_in_panel(panels[0, 0], MISSING)
        return figure
    epoch = min(table["epoch"].max() for table in spectra.values())
    for ax, layer in zip(panels.flat, layers, strict=False):
        for method, table in spectra.items():
            style = method_style(method)
            before, after = (
                _spectrum(table, layer, epoch, when, ranks.get(layer)) for when in ("before", "after")
            )
            ax.plot(
                before["i"],
                before["s"],
                color=style.color,
                linestyle=style.linestyle,
                linewidth=1.1,
                label=f"{style.label}, before",
            )
            if len(after):
                ax.plot(
                    after["i"],
                    after["s"],
                    style.marker,
                    color=style.color,
                    markersize=2.8,
                    markevery=-(-len(after) // DOTS),
                    label=f"{style.label}, after",
                )
        _at_rank(ax, ranks.get(layer))
        ax.set_ylim(0, None)
        ax.set_title(layer, fontsize=8.5)
        whole_number_ticks(ax)
    figure.supxlabel(f"i, number of the singular value; dotted: R; epoch {epoch}", fontsize=9.5)
    figure.supylabel("singular value $s_i$", fontsize=9.5)
    add_legend(figure, panels[0, 0])
    return figure


@in_style()
def plot_spectra_over_training(
    spectra: Mapping[str, pd.DataFrame], layers: Sequence[str], ranks: Mapping[str, int]
) -> ProjectFigure:
    """Draw how the singular values of some layers change over the epochs, a column per method.

    Args:
        spectra: method → table of :func:`lrpet.training.recording.load_spectra`; may be empty.
        layers: one row each.
        ranks: layer → R, drawn as a dotted line.

    Returns:
        A grid of panels: s_i on a log scale against i, four of the recorded epochs from pale (early) to dark
        (late). Lines are before the projection that ends the epoch, dots after it. Panels of a row share
        their axes.

    >>> plot_spectra_over_training({}, ["conv"], {}).axes[0].texts[0].get_text()
    'not recorded'
    """
    figure = ProjectFigure(1.1 + 1.75 * len(layers))
    panels = figure.subplots(len(layers), max(1, len(spectra)), squeeze=False, sharex="row", sharey="row")
    if not spectra:
        say_in_panel(panels[0, 0], MISSING)
        return figure
    for column, (method, table) in zip(panels.T, spectra.items(), strict=True):
        epochs = _evenly(sorted(table["epoch"].unique()), EPOCHS)
        colors = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1, len(epochs)))
        for ax, layer in zip(column, layers, strict=True):
            for epoch, color in zip(epochs, colors, strict=True):
                before, after = (
                    _spectrum(table, layer, epoch, when, ranks.get(layer)) for when in ("before", "after")
                )
                ax.plot(before["i"], before["s"], color=color, linewidth=1.1, label=f"epoch {epoch}")
                ax.plot(
                    after["i"],
                    after["s"],
                    "o",
                    color=color,
                    markersize=2.6,
                    markevery=-(-max(1, len(after)) // DOTS),
                )
            _at_rank(ax, ranks.get(layer))
            whole_number_ticks(ax)
        column[0].set_title(method_style(method).label)
    for ax, layer in zip(panels[:, 0], layers, strict=True):
        largest = max(table.loc[table["layer"] == layer, "s"].max() for table in spectra.values())
        ax.set(ylabel=f"$s_i$ of {layer}", yscale="log", ylim=(FLOOR * largest, 2 * largest))
    figure.supxlabel(
        "i, number of the singular value; lines: before the projection, dots: after it; dotted: R",
        fontsize=9.5,
    )
    add_legend(figure, *panels.flat)
    return figure


@in_style()
def plot_energy_kept(shares: pd.DataFrame) -> ProjectFigure:
    """Draw which share of the energy the R largest singular values hold before a projection.

    Args:
        shares: table of :func:`lrpet.tables.recorded.energy_shares`; may be empty.

    Returns:
        Two panels, in %: the layers at the last epoch; mean (thick) and lowest (thin) of all layers over the
        epochs.

    >>> nothing = pd.DataFrame(columns=["method", "epoch", "layer", "kept_pct"])
    >>> plot_energy_kept(nothing).axes[0].texts[0].get_text()
    'not recorded'
    """
    figure = ProjectFigure(3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    if not len(shares):
        say_in_panel(left, MISSING), say_in_panel(right, MISSING)
        return figure
    for k, (method, rows) in enumerate(shares.groupby("method", sort=False)):
        style = method_style(method)
        look = {"color": style.color, "linestyle": style.linestyle}
        last = rows[rows["epoch"] == rows["epoch"].max()]
        beside = 0.16 * (k - 1)  # so that equal values do not hide each other
        left.plot(
            np.arange(len(last)) + beside,
            last["kept_pct"],
            style.marker,
            color=style.color,
            markersize=4,
            label=style.label,
        )
        over = rows.groupby("epoch")["kept_pct"].agg(["mean", "min"])
        right.plot(over.index, over["mean"], marker=style.marker, markersize=3.5, **look)
        right.plot(over.index, over["min"], linewidth=0.7, **look)
    _name_layers(left, last["layer"])
    left.set(ylabel="energy in first R values, %", title="each layer, last epoch")
    right.set(xlabel="epoch", title="over training; thin: lowest layer")
    whole_number_ticks(right)
    add_legend(figure, left)
    return figure


@in_style()
def plot_gradients(gradients: Mapping[str, pd.DataFrame]) -> ProjectFigure:
    """Draw the gradient norms of runs, by layer and over the epochs, with and without the weight's scale.

    Args:
        gradients: method → table of :func:`lrpet.training.recording.load_gradients`; may be empty.

    Returns:
        Four panels on log scales. Left: each layer, geometric mean over the recorded epochs. Right: the first
        layer over the epochs. Above: ‖∂L/∂M‖. Below: ‖M‖·‖∂L/∂M‖, which does not change when a BatchNorm
        follows and M is multiplied by a number.

    >>> plot_gradients({}).axes[0].texts[0].get_text()
    'not recorded'
    """
    figure = ProjectFigure(5.4)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for method, table in gradients.items():
        style = method_style(method)
        look = {
            "color": style.color,
            "linestyle": style.linestyle,
            "marker": style.marker,
            "markersize": 3.5,
            "linewidth": 1.2,
        }
        table = table.assign(scale_free=table["gradient_norm"] * table["weight_norm"])
        for (left, right), quantity in zip(panels, ("gradient_norm", "scale_free"), strict=True):
            means = np.exp(
                np.log(table[quantity].clip(lower=TINY)).groupby(table["layer"], sort=False).mean()
            )
            first = table[table["layer"] == means.index[0]]
            left.plot(np.arange(len(means)), means, label=style.label, **look)
            right.plot(first["epoch"], first[quantity], **look)
        _name_layers(panels[1, 0], means.index)
        panels[0, 1].set_title(f"first layer, {means.index[0]}")
    for ax in panels.flat:
        if gradients:
            _logarithmic(ax)
        else:
            say_in_panel(ax, MISSING)
    panels[0, 0].set(ylabel="gradient norm ‖∂L/∂M‖", title="each layer, geometric mean over epochs")
    panels[1, 0].set_ylabel("scale-free ‖M‖·‖∂L/∂M‖")
    panels[1, 1].set_xlabel("epoch")
    if gradients:
        whole_number_ticks(panels[1, 1])
    add_legend(figure, panels[0, 0])
    return figure


@in_style()
def plot_gradient_ratios(ratios: pd.DataFrame) -> ProjectFigure:
    """Draw LRPET's gradient norm divided by LRP's, for each layer and epoch.

    Args:
        ratios: table of :func:`lrpet.tables.recorded.gradient_ratios`; may be empty.

    Returns:
        Two maps with one log scale of colours that is symmetric about 1; a dot marks where LRPET's is the
        larger one.

    >>> nothing = pd.DataFrame(columns=["epoch", "layer", "gradient", "scale_free"])
    >>> plot_gradient_ratios(nothing).axes[0].texts[0].get_text()
    'not recorded'
    """
    layers = list(dict.fromkeys(ratios["layer"]))
    figure = ProjectFigure(max(2.8, 1.4 + 0.17 * len(layers)))
    panels = figure.subplots(1, 2, sharey=True)
    if not layers:
        say_in_panel(panels[0], MISSING), say_in_panel(panels[1], MISSING)
        return figure
    limit = max(1.1, float(np.exp(np.abs(np.log(ratios[["gradient", "scale_free"]].to_numpy(float))).max())))
    for ax, column, title in zip(panels, ("gradient", "scale_free"), ("‖∂L/∂M‖", "‖M‖·‖∂L/∂M‖"), strict=True):
        table = ratios.pivot(index="layer", columns="epoch", values=column).loc[layers]  # (layers, epochs)
        image = ax.imshow(
            table, aspect="auto", cmap="PuOr", norm=LogNorm(1 / limit, limit), interpolation="nearest"
        )
        y, x = np.nonzero(table.to_numpy() > 1)
        ax.plot(x, y, "o", color=INK, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=3.2)
        ax.set(title=f"{title}, LRPET / LRP", xlabel="epoch")
        ax.grid(visible=False)
        at = _evenly(range(table.shape[1]), 8)
        ax.set_xticks(at, [table.columns[k] for k in at])
    every = -(-len(layers) // 28)
    panels[0].set_yticks(np.arange(len(layers))[::every], layers[::every], fontsize=8)
    panels[0].set_ylabel("layer, from the input")
    ticks = sorted(
        {f"{value:.2g}": value for value in (1 / limit, limit**-0.5, 1.0, limit**0.5, limit)}.values()
    )
    bar = figure.colorbar(
        image, ax=panels, ticks=ticks, format="{x:.2g}", label="ratio; dot: above 1", fraction=0.05
    )
    bar.ax.minorticks_off()
    return figure


@in_style()
def plot_gradient_bound(panels: Mapping[str, Mapping[str, pd.DataFrame]]) -> ProjectFigure:
    """Draw the gradient that arrives at each layer, and the bound by the norms of the layers above it.

    Args:
        panels: title → method → a row per layer from the input, with ``gradient`` = ‖∂L/∂h‖ and ``bound``.

    Returns:
        A panel per title, on a log scale against the number of the layer: markers are measured, thin lines
        the bound.

    >>> table = pd.DataFrame({"gradient": [1.0, 2.0], "bound": [4.0, 2.0]})
    >>> plot_gradient_bound({"one network": {"dense": table}}).axes[0].get_ylabel()
    'gradient norm ‖∂L/∂h‖'
    """
    figure = ProjectFigure(3.6)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for ax, (title, methods) in zip(axes, panels.items(), strict=True):
        for method, table in methods.items():
            style, x = method_style(method), np.arange(1, len(table) + 1)
            ax.plot(
                x,
                table["gradient"],
                color=style.color,
                marker=style.marker,
                markersize=3.5,
                linewidth=1.1,
                label=style.label,
            )
            ax.plot(
                x,
                table["bound"],
                color=style.color,
                linestyle=style.linestyle,
                linewidth=0.8,
                label=f"{style.label}, bound",
            )
        if not methods:
            say_in_panel(ax, "weights not in the store")
        ax.set(title=title, xlabel="layer, from the input", yscale="log")
        whole_number_ticks(ax)
    axes[0].set_ylabel("gradient norm ‖∂L/∂h‖")
    add_legend(figure, *axes)
    return figure


def _logarithmic(ax) -> None:
    """Give the y axis a log scale, labelled at 1, 2, 5 times a power of ten where it spans less than two."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


def _name_layers(ax, names: Sequence[str]) -> None:
    """Write the names of the layers below the x axis, as many as there is room for."""
    every = -(-len(names) // 20)
    ax.set_xticks(np.arange(len(names))[::every], list(names)[::every], rotation=90, fontsize=7.5)
    ax.set_xlabel("layer, from the input")
