"""Figures of what runs recorded: spectra and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm

from lrpet.figures.style import (
    INK,
    PAPER,
    ProjectFigure,
    draw_band,
    in_style,
    logarithmic,
    method_style,
    say_in_panel,
    state,
    whole_number_ticks,
)
from lrpet.tables.recorded import TINY

__all__ = [
    "plot_energy_kept",
    "plot_gradient_bound",
    "plot_gradient_ratios",
    "plot_gradients",
    "plot_spectra",
    "plot_spectrum_map",
    "telling_layers",
]
MISSING = "not recorded"
PANELS = 20  # layers on one page
DIFFER = 0.02  # of the largest singular value: what changes by less does not show in a panel
FLOOR = 1e-3  # of the largest singular value: what is smaller shows as zero in a map
RATIOS = (1e-6, 1e-4, 0.01, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 100, 1e4, 1e6)  # ticks of a scale about 1
MAP = {"cbar": False, "xticklabels": False, "yticklabels": False, "rasterized": True}  # small in an SVG too
NAMES = 8  # points, of layers along an axis
GRADIENT, SCALE_FREE = r"$\|\partial L/\partial M\|$", r"$\|M\|\cdot\|\partial L/\partial M\|$"


def _evenly(values: Sequence, n: int) -> list:
    """Return n of the values at most, the first and the last among them, evenly between."""
    return [
        values[k]
        for k in sorted(set(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int)))
    ]


def _at_the_end(spectra: Mapping[str, pd.DataFrame]) -> tuple[int, dict[tuple, pd.Series]]:
    """Return the last epoch that every run recorded, and (method, layer, when) → s over i there."""
    epoch, found = min(table["epoch"].max() for table in spectra.values()), {}
    for method, table in spectra.items():
        last = table[table["epoch"] == epoch]
        for (layer, when), rows in last.groupby(["layer", "when"], sort=False):
            found[method, layer, when] = rows.set_index("i")["s"].astype(float)
    return epoch, found


def _beyond(ends: Mapping[tuple, pd.Series], layers: Sequence[str], ranks: Mapping[str, int]) -> str:
    """Say which share of the energy each method has beyond R at the last epoch, mean over layers."""
    parts = []
    for method in dict.fromkeys(method for method, *_ in ends):
        energies = {layer: ends[method, layer, "before"] ** 2 for layer in layers}
        kept = [e[e.index <= ranks.get(layer, len(e))].sum() / e.sum() for layer, e in energies.items()]
        parts.append(f"{method_style(method).label} {100 - 100 * np.mean(kept):.1f} %".replace("-0.0", "0.0"))
    return ", ".join(parts)


def telling_layers(spectra: Mapping[str, pd.DataFrame], n: int = 4) -> list[str]:
    """Return layers in which two methods end with the most alike and the least alike singular values.

    Compared are the last two methods, as LRP and LRPET, by ‖s − s'‖ / ‖s‖ at the last epoch.

    Args:
        spectra: method → table of :func:`lrpet.training.recording.load_spectra`.
        n: how many; half of them are most alike, half least.

    Returns:
        Names of layers, from the input; n evenly chosen ones where there is one method only.

    >>> rows = {"layer": ["a", "b", "c"], "epoch": 1, "when": "before", "i": 1}
    >>> one, other = (pd.DataFrame(rows | {"s": s}) for s in ([1, 1, 1], [1, 2, 3]))
    >>> telling_layers({"lrp": one, "lrpet": other}, 2)
    ['a', 'c']
    """
    if not spectra:
        return []
    layers = list(next(iter(spectra.values()))["layer"].unique())
    if len(spectra) < 2:
        return _evenly(layers, n)
    (_, ends), apart = _at_the_end(spectra), {}
    for layer in layers:
        a, b = (ends[method, layer, "before"] for method in list(spectra)[-2:])
        apart[layer] = np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0)
    order = sorted(layers, key=apart.get)
    chosen = {*order[: n // 2], *order[len(order) - (n - n // 2) :]}
    return [layer for layer in layers if layer in chosen]


@in_style()
def plot_spectra(
    spectra: Mapping[str, pd.DataFrame], layers: Sequence[str], ranks: Mapping[str, int]
) -> ProjectFigure:
    """Draw the singular values of some layers at the last epoch that every run recorded.

    Args:
        spectra: method → table of :func:`lrpet.training.recording.load_spectra`; may be empty.
        layers: a panel each, twenty evenly chosen of more.
        ranks: layer → R, drawn as a dotted line; values after it are removed.

    Returns:
        A panel per layer: s_i against i before the projection, as lines; after it, as markers, where that
        differs by more than 2 % of the largest.

    >>> plot_spectra({}, [], {}).axes[0].texts[0].get_text()
    'not recorded'
    """
    if not spectra or not layers:
        figure = ProjectFigure(2)
        say_in_panel(figure.subplots(), MISSING)
        return figure
    layers = _evenly(layers, PANELS)
    columns = min(2 if len(layers) < 5 else 4, len(layers))
    rows = -(-len(layers) // columns)
    figure = ProjectFigure(1.1 + (2.0 if columns < 4 else 1.55) * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax in panels.flat[len(layers) :]:
        ax.remove()
    (epoch, ends), shown = _at_the_end(spectra), panels.flatten()[: len(layers)]
    for ax, layer in zip(shown, layers, strict=True):
        for method in spectra:
            style, before = method_style(method), ends[method, layer, "before"]
            after = ends.get((method, layer, "after"), before[:0])
            after = after[after.index <= ranks.get(layer, len(before))]  # the others are rounding
            look = {"color": style.color, "linestyle": style.linestyle, "linewidth": 1.3}
            ax.plot(before.index, before, label=style.label, **look)
            if len(after) and (after - before[after.index]).abs().max() > DIFFER * before.max():
                label, look = f"{style.label}, after the projection", {"color": style.color, "markersize": 3}
                ax.plot(after.index, after, style.marker, label=label, **look)
        if layer in ranks:
            ax.axvline(ranks[layer] + 0.5, color=INK, linewidth=0.8, linestyle=":")
        ax.set_ylim(0, None)
        rank = f", $R = {ranks[layer]}$" if layer in ranks and columns < 4 else ""
        ax.set_title(f"{layer}{rank}", fontsize=9)
        whole_number_ticks(ax, 4 if columns == 4 else 8)
    figure.supxlabel("number $i$ of the singular value; dotted: the rank $R$ that is kept", fontsize=9.5)
    figure.supylabel("singular value $s_i$", fontsize=9.5)
    found = f"Mean energy beyond $R$ after epoch {epoch}: {_beyond(ends, layers, ranks)}"
    state(figure, found, *shown)
    return figure


@in_style()
def plot_spectrum_map(
    spectra: Mapping[str, pd.DataFrame], layer: str, ranks: Mapping[str, int]
) -> ProjectFigure:
    """Draw how the singular values of one layer change over the epochs, as a map per method.

    Args:
        spectra: method → table of :func:`lrpet.training.recording.load_spectra`; may be empty.
        layer: which.
        ranks: layer → R, drawn as a line.

    Returns:
        A panel per method: i downwards, the recorded epochs to the right, s_i before the projection that
        ends the epoch as colour, on one log scale from a thousandth of the largest; smaller ones look the
        same as that.

    >>> plot_spectrum_map({}, "conv", {}).axes[0].texts[0].get_text()
    'not recorded'
    """
    figure = ProjectFigure(3.6)
    panels = figure.subplots(1, max(1, len(spectra)), squeeze=False, sharey=True)[0]
    if not spectra:
        say_in_panel(panels[0], MISSING)
        return figure
    maps = {}
    for method, table in spectra.items():
        rows = table[(table["layer"] == layer) & (table["when"] == "before")]
        maps[method] = rows.pivot(index="i", columns="epoch", values="s").astype(float)
    largest = max(values.to_numpy().max() for values in maps.values())
    norm = LogNorm(FLOOR * largest, largest)
    for ax, (method, values) in zip(panels, maps.items(), strict=True):
        drawn = values.clip(lower=FLOOR * largest)
        sns.heatmap(drawn, ax=ax, cmap="cividis", norm=norm, **MAP)
        if layer in ranks:
            ax.axhline(ranks[layer], color=PAPER, linewidth=1.2, linestyle="--")
        _tick_epochs(ax, values.columns)
        ax.set(title=method_style(method).label, ylabel="")
        ax.grid(visible=False)
    K = len(maps[method])
    step = 2 ** int(np.ceil(np.log2(K / 6)))
    i = np.array([1, *range(max(2, step), K + 1, max(2, step))])
    panels[0].set_yticks(i - 0.5, i, rotation=0)
    panels[0].set_ylabel("number $i$ of the singular value")
    bar = figure.colorbar(panels[-1].collections[0], ax=panels, label="singular value $s_i$", fraction=0.05)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    beyond = f"energy beyond $R = {ranks[layer]}$ at the end" if layer in ranks else "all is kept"
    state(figure, f"{layer}, {beyond}: {_beyond(_at_the_end(spectra)[1], [layer], ranks)}")
    return figure


def _tick_epochs(ax, epochs: Sequence[int]) -> None:
    at = _evenly(range(len(epochs)), 8)
    ax.set_xticks(np.array(at) + 0.5, [epochs[k] for k in at], rotation=0)
    ax.set_xlabel("epoch")
    ax.tick_params(left=ax.get_subplotspec().is_first_col())


@in_style()
def plot_energy_kept(shares: pd.DataFrame) -> ProjectFigure:
    """Draw which share of the energy the R largest singular values hold before a projection.

    Where the learning rate is small, a network that is projected every so often has no time to leave rank R:
    its share is forced to 100 %. That of the dense network is not.

    Args:
        shares: table of :func:`lrpet.tables.recorded.energy_shares`; may be empty.

    Returns:
        Two panels, in %: the layers at the last epoch; over the epochs the mean of all layers as a line, and
        a band from the lowest layer to the highest.

    >>> nothing = pd.DataFrame(columns=["method", "epoch", "layer", "kept_pct"])
    >>> plot_energy_kept(nothing).axes[0].texts[0].get_text()
    'not recorded'
    """
    figure = ProjectFigure(3.0 + 0.1 * max(map(len, shares["layer"]), default=8))
    left, right = figure.subplots(1, 2, sharey=True)
    if not len(shares):
        say_in_panel(left, MISSING), say_in_panel(right, MISSING)
        return figure
    ends = {}
    for k, (method, rows) in enumerate(shares.groupby("method", sort=False)):
        style = method_style(method)
        last = rows[rows["epoch"] == rows["epoch"].max()]
        ends[method] = last["kept_pct"].mean()
        beside = 0.16 * (k - 1)  # so that equal values do not hide each other
        look = {"color": style.color, "markersize": 4, "label": style.label}
        left.plot(np.arange(len(last)) + beside, last["kept_pct"], style.marker, **look)
        draw_band(right, rows.astype({"kept_pct": float}), "epoch", "kept_pct", style, markersize=4)
    _name_layers(left, last["layer"])
    left.set(ylabel="energy in the first $R$ values, %", title="each layer, last epoch")
    right.set(xlabel="epoch", title="mean of all layers; band: lowest to highest")
    whole_number_ticks(right)
    state(figure, _finding_of_energy(ends), left)
    return figure


def _finding_of_energy(ends: Mapping[str, float]) -> str:
    """Say with which share each method ends, and which of them had no choice."""
    forced = [method for method, value in ends.items() if method != "dense" and value > 99.5]
    named = [f"{method_style(m).label} ends at {value:.0f} %" for m, value in ends.items() if m not in forced]
    if forced:
        names = " and ".join(method_style(method).label for method in forced)
        named.insert(0, f"{names} forced to 100 % by projections")
    return f"Energy in the first $R$ values: {', '.join(named)}"


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
    figure = ProjectFigure(5.6)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    firsts = {}
    for method, table in gradients.items():
        style = method_style(method)
        look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker}
        look |= {"markersize": 3.5, "linewidth": 1.2}
        table = table.assign(scale_free=table["gradient_norm"] * table["weight_norm"])
        for (left, right), quantity in zip(panels, ("gradient_norm", "scale_free"), strict=True):
            means = np.exp(
                np.log(table[quantity].clip(lower=TINY)).groupby(table["layer"], sort=False).mean()
            )
            first = table[table["layer"] == means.index[0]]
            left.plot(np.arange(len(means)), means, label=style.label, **look)
            right.plot(first["epoch"], first[quantity], **look)
            firsts[method, quantity] = means.iloc[0]
        _name_layers(panels[1, 0], means.index)
        panels[0, 1].set_title(f"first layer, {means.index[0]}")
    for ax in panels.flat:
        if gradients:
            logarithmic(ax)
        else:
            say_in_panel(ax, MISSING)
    panels[0, 0].set(ylabel=f"gradient norm {GRADIENT}", title="each layer, geometric mean over epochs")
    panels[1, 0].set_ylabel(f"scale-free {SCALE_FREE}")
    panels[1, 1].set_xlabel("epoch")
    if gradients:
        whole_number_ticks(panels[1, 1])
        finding = "Gradient norms of each layer and over the epochs"
        if {"lrp", "lrpet"} <= set(gradients):
            ratio, free = (firsts["lrpet", q] / firsts["lrp", q] for q in ("gradient_norm", "scale_free"))
            finding = f"First layer, LRPET / LRP: gradient {ratio:.2f}, scale-free gradient {free:.2f}"
        state(figure, finding, panels[0, 0])
    return figure


@in_style()
def plot_gradient_ratios(ratios: pd.DataFrame) -> ProjectFigure:
    """Draw LRPET's gradient norm divided by LRP's, for each layer and epoch.

    Args:
        ratios: table of :func:`lrpet.tables.recorded.gradient_ratios`; may be empty.

    Returns:
        Two maps with one log scale of colours that is symmetric about 1; a dot marks where LRPET's is the
        larger one, so that the map can be read without colours.

    >>> nothing = pd.DataFrame(columns=["epoch", "layer", "gradient", "scale_free"])
    >>> plot_gradient_ratios(nothing).axes[0].texts[0].get_text()
    'not recorded'
    """
    layers = list(dict.fromkeys(ratios["layer"]))
    figure = ProjectFigure(max(2.8, 1.6 + 0.17 * len(layers)))
    panels = figure.subplots(1, 2, sharey=True)
    if not layers:
        say_in_panel(panels[0], MISSING), say_in_panel(panels[1], MISSING)
        return figure
    logs = np.log2(ratios[["gradient", "scale_free"]].astype(float))
    limit = max(np.log2(1.25), np.abs(logs.to_numpy()).max())  # symmetric, so that the middle colour is 1
    for ax, column, title in zip(panels, logs, (GRADIENT, SCALE_FREE), strict=True):
        table = (
            ratios.assign(log=logs[column]).pivot(index="layer", columns="epoch", values="log").loc[layers]
        )
        sns.heatmap(
            table,
            ax=ax,
            cmap="PuOr",
            vmin=-limit,
            vmax=limit,
            **MAP,
        )
        y, x = np.nonzero(table.to_numpy() > 0)
        ax.plot(x + 0.5, y + 0.5, "o", color=INK, markeredgecolor=PAPER, markeredgewidth=0.6, markersize=3.2)
        ax.set(title=f"{title}, LRPET / LRP", ylabel="")
        _tick_epochs(ax, table.columns)
        ax.grid(visible=False)
    every = -(-len(layers) // 28)
    panels[0].set_yticks(np.arange(len(layers))[::every] + 0.5, layers[::every], fontsize=NAMES, rotation=0)
    panels[0].set_ylabel("layer, from the input")
    shown = [value for value in RATIOS if abs(np.log2(value)) <= limit]
    bar = figure.colorbar(panels[-1].collections[0], ax=panels, label="ratio; dot: above 1", fraction=0.05)
    bar.set_ticks(np.log2(shown), labels=[f"{value:g}" for value in shown])
    above = (logs > 0).sum()
    finding = f"LRPET's gradient is the larger one in {above.gradient} of {len(logs)} cells"
    state(figure, f"{finding}, free of scale in {above.scale_free}")
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
    >>> plot_gradient_bound({"one network": {"dense": table}}).finding
    "First layer's gradient divided by the last one's: dense 0.5"
    """
    figure = ProjectFigure(3.8)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    left = {}
    for ax, (title, methods) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        for method, table in methods.items():
            style, x = method_style(method), np.arange(1, len(table) + 1)
            look = {"color": style.color, "marker": style.marker, "markersize": 3.5, "linewidth": 1.1}
            ax.plot(x, table["gradient"], label=style.label, **look)
            look = {"color": style.color, "linestyle": style.linestyle, "linewidth": 0.8}
            ax.plot(x, table["bound"], label=f"{style.label}, bound", **look)
            left.setdefault(style.label, table["gradient"].iloc[0] / table["gradient"].iloc[-1])
        if not methods:
            say_in_panel(ax, "weights not in the store")
            continue
        ax.set(xlabel="layer, from the input", yscale="log")
        whole_number_ticks(ax)
    axes[0].set_ylabel(r"gradient norm $\|\partial L/\partial h\|$")
    named = ", ".join(f"{label} {value:.2g}" for label, value in left.items())
    state(figure, f"First layer's gradient divided by the last one's: {named or 'not measured'}", *axes)
    return figure


def _name_layers(ax, names: Sequence[str]) -> None:
    """Write the names of the layers below the x axis, as many as there is room for."""
    every = -(-len(names) // 20)
    ax.set_xticks(np.arange(len(names))[::every], list(names)[::every], rotation=90, fontsize=NAMES)
    ax.set_xlabel("layer, from the input")
