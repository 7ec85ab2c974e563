"""Figures of speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator

from lrpet.figures.style import INK, METHOD_STYLES, PAPER, ProjectFigure, in_style, state

__all__ = [
    "plot_equal_latency",
    "plot_growth",
    "plot_inference",
    "plot_latency_trade",
    "plot_layer_gains",
    "plot_projection_speed",
    "plot_runtimes",
]

RUNTIMES = {
    "eager": "eager PyTorch",
    "compile": "compiled PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


@in_style()
def plot_projection_speed(results: Sequence[Mapping]) -> ProjectFigure:
    """Draw how many times as fast as one thin SVD per layer each way to project a network is.

    Args:
        results: JSON of ``python -m lrpet.bench projection``, one a network and device.

    Returns:
        One panel with a bar a network and way; at each bar stands the median time of one projection of all
        layers.

    >>> slow, fast = ({"median_seconds": seconds, "ratio_to_first": seconds} for seconds in (1.0, 0.1))
    >>> timings = {"svd_thin": slow, "fast": fast}
    >>> result = {"model": "resnet20", "device": "CPU", "threads": 2, "timings": timings}
    >>> figure = plot_projection_speed([result])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['1,000 ms', '100 ms']
    """
    labels = {
        "svd_thin": "thin SVD per layer",
        "torchao": "torchao SVDGrouper",
        "exact": "ours, exact",
        "fast": "ours, followed",
    }
    colors = dict(zip(labels, ("#888888", "#E69F00", "#56B4E9", "#0072B2"), strict=True))
    figure = ProjectFigure(1.2 + 1.15 * max(1, len(results)))
    ax = figure.subplots()
    ax.grid(axis="x"), ax.grid(visible=False, axis="y")
    y, ticks = 0.0, {}
    for result in results:
        ways = [way for way in labels if way in result["timings"]]
        for way in ways:
            timing = result["timings"][way]
            ax.barh(y, _times_thin(result, way), 0.8, color=colors[way], label=labels[way])
            ms = 1e3 * timing["median_seconds"]
            ax.annotate(
                f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms",
                (_times_thin(result, way), y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
            y += 1
        ticks[y - (len(ways) + 1) / 2] = f"{result['model']}\n{result['device']}, {result['threads']} threads"
        y += 0.8
    ax.set(
        xlabel="times as fast as one thin SVD per layer\nat a bar: median time to project all layers",
        yticks=list(ticks),
        yticklabels=list(ticks.values()),
    )
    ax.invert_yaxis()
    ax.margins(x=0.12, y=0.02)
    gains = [_times_thin(result, "fast") for result in results if "fast" in result["timings"]]
    finding = "Projections have not been measured"
    if gains:
        spread = f"{min(gains):.1f} to {max(gains):.1f}" if len(gains) > 1 else f"{gains[0]:.1f}"
        finding = f"Following the last basis is {spread} times as fast as a thin SVD per layer"
    state(figure, finding, ax)
    return figure


def _times_thin(result: Mapping, way: str) -> float:
    timings = result["timings"]
    return timings["svd_thin"]["ratio_to_first"] / timings[way]["ratio_to_first"]


@in_style()
def plot_inference(rows: pd.DataFrame, ideal: float) -> ProjectFigure:
    """Draw how many times as fast as the dense network the compact one is, setting by setting.

    Args:
        rows: of ``python -m lrpet.bench inference``: batch, threads, memory, mode, compact_gain,
            selective_gain.
        ideal: dense by compact multiply-adds.

    Returns:
        One panel per batch size, with two bars per setting, a line at 1 and one at the ideal.

    >>> row = {"batch": 1, "threads": 1, "memory": "contiguous", "mode": "eager"}
    >>> row |= {"compact_gain": 0.8, "selective_gain": 1.1}
    >>> len(plot_inference(pd.DataFrame([row]), 2.2).axes)
    1
    """
    batches = sorted(rows["batch"].unique())
    most = max(sum(rows["batch"] == batch) for batch in batches)
    figure = ProjectFigure(1.6 + 0.42 * most)
    panels = figure.subplots(1, len(batches), sharey=False, squeeze=False)[0]
    for ax, batch in zip(panels, batches, strict=True):
        chosen = rows[rows["batch"] == batch]
        place = np.arange(len(chosen))
        ax.barh(place - 0.2, chosen["compact_gain"], 0.38, color="#0072B2", label="compact")
        ax.barh(
            place + 0.2,
            chosen["selective_gain"],
            0.38,
            color="#56B4E9",
            hatch="///",
            edgecolor=PAPER,
            label="layers that lose left dense",
        )
        ax.axvline(1, color=INK, linewidth=0.8)
        ax.axvline(ideal, color="#D55E00", linestyle="--", linewidth=1.2, label="as multiply-adds promise")
        names = [
            f"{r.memory}, {r.mode}\n{r.threads} thread{'s' * (r.threads > 1)}" for r in chosen.itertuples()
        ]
        ax.set(title=f"batch {batch}", xlabel="times as fast as dense", yticks=place, yticklabels=names)
        ax.grid(axis="x"), ax.grid(visible=False, axis="y")
        ax.invert_yaxis()
    gain = rows["compact_gain"]
    spread = f"{gain.min():.2f} to {gain.max():.2f} times as fast as dense"
    state(figure, f"Compact is {spread}; multiply-adds promise {ideal:.2f}", *panels)
    return figure


@in_style()
def plot_layer_gains(layers: pd.DataFrame) -> ProjectFigure:
    """Draw how many times as fast as a layer its two factors are, measured and by multiply-adds.

    Args:
        layers: of ``python -m lrpet.bench inference``: batch, layer, N, D, rank, gain, ideal.

    Returns:
        One panel with a group of points per distinct layer and a line at 1: to its left a layer loses by
        being factorized.

    >>> row = {"batch": 1, "layer": "conv1", "N": 16, "D": 27, "rank": 6, "gain": 0.5, "ideal": 1.7}
    >>> plot_layer_gains(pd.DataFrame([row])).axes[0].get_yticklabels()[0].get_text()
    'conv1 (16×27, $R = 6$)'
    """
    names = list(dict.fromkeys(layers["layer"]))
    figure = ProjectFigure(1.5 + 0.24 * len(names))
    ax = figure.subplots()
    first = layers.drop_duplicates("layer").set_index("layer").loc[names]
    ax.plot(
        first["ideal"],
        range(len(names)),
        "|",
        color="#D55E00",
        markersize=12,
        markeredgewidth=2,
        label="multiply-adds",
    )
    for batch, marker, color in zip(
        sorted(layers["batch"].unique()), "os^D", ("#0072B2", "#222222", "#009E73", "#CC79A7"), strict=False
    ):
        chosen = layers[layers["batch"] == batch].set_index("layer")["gain"].reindex(names)
        ax.plot(chosen, range(len(names)), marker, color=color, label=f"measured, batch {batch}")
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set(xlabel="times as fast as the dense layer", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    ax.set_yticklabels(
        [
            f"{name} ({row.N}×{row.D}, $R = {row.rank}$)"
            for name, row in zip(names, first.itertuples(), strict=True)
        ]
    )
    ax.grid(axis="x")
    slower = (layers["gain"] < 1).groupby(layers["batch"]).sum()
    told = ", ".join(f"{n} of {len(names)} at batch {batch}" for batch, n in slower.items())
    state(figure, f"Slower as two factors, of the kinds of layers: {told}", ax)
    return figure


@in_style()
def plot_runtimes(table: pd.DataFrame) -> ProjectFigure:
    """Draw how many times as fast as dense a network is in each runtime, beside what multiply-adds promise.

    Args:
        table: of :func:`lrpet.bench.runtimes_table`: network, runtime, precision, compact, aligned, columns,
            ideal.

    Returns:
        One panel with a line for each network, runtime and precision, and a point for each way to choose
        ranks.

    >>> row = {"network": "vgg16", "runtime": "openvino", "precision": "fp32", "compact": 1.5}
    >>> row |= {"aligned": 1.9, "columns": np.nan, "ideal": 2.0}
    >>> plot_runtimes(pd.DataFrame([row])).axes[0].get_yticklabels()[0].get_text()
    'vgg16, OpenVINO'
    """
    table = table[table.precision == "fp32"].reset_index(drop=True)
    figure = ProjectFigure(1.6 + 0.24 * len(table))
    ax = figure.subplots()
    names = [f"{row.network}, {RUNTIMES[row.runtime]}" for row in table.itertuples()]
    bars = {"color": "#D55E00", "markersize": 11, "markeredgewidth": 2}
    ax.plot(table["ideal"], table.index, "|", label="promised, aligned", **bars)
    looks = {
        "compact": ("one ratio", "o", "#888888"),
        "aligned": ("aligned to 16", "s", "#0072B2"),
        "columns": ("other unfolding", "^", "#009E73"),
    }
    for column, (label, marker, color) in looks.items():
        ax.plot(table[column], table.index, marker, color=color, label=label)
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set(
        xlabel="times as fast as the dense network in the same runtime", yticks=table.index, yticklabels=names
    )
    ax.invert_yaxis()
    ax.grid(axis="x")
    finding = "Runtimes have not been measured"
    if len(table):
        share = 100 * table["aligned"] / table["ideal"]
        spread = f"{share.min():.0f} to {share.max():.0f} %"
        finding = f"At aligned ranks {spread} of what multiply-adds promise arrives as time"
    state(figure, finding, ax)
    return figure


@in_style()
def plot_latency_trade(trade: pd.DataFrame, runtime: str) -> ProjectFigure:
    """Draw which share of energy is kept at which speed-up, ranks allocated by latency beside uniform ones.

    Args:
        trade: of :class:`lrpet.deploy.LatencyPlan`, as a DataFrame: speedup, allocated, uniform.
        runtime: in which the times were measured.

    Returns:
        One panel with a line for each.

    >>> rows = pd.DataFrame({"speedup": [1.5, 2.0], "allocated": [0.9, 0.8], "uniform": [0.8, np.nan]})
    >>> [line.get_label() for line in plot_latency_trade(rows, "openvino").axes[0].lines]
    ['ranks by latency', 'one ratio for all layers']
    """
    figure = ProjectFigure(3.4)
    ax = figure.subplots()
    looks = {"allocated": ("ranks by latency", "lrpet"), "uniform": ("one ratio for all layers", "narrow")}
    for column, (label, look) in looks.items():
        style = METHOD_STYLES[look]
        line = {"color": style.color, "marker": style.marker, "linestyle": style.linestyle}
        ax.plot(trade["speedup"], trade[column], label=label, **line)
    ax.set(
        xlabel=f"times as fast as dense, predicted ({RUNTIMES[runtime]})",
        ylabel="energy kept, mean over layers",
    )
    both = trade.dropna(subset=["allocated", "uniform"])
    finding = "No speed-up is reached by both ways to choose ranks"
    if len(both):
        at = both.loc[(both["speedup"] - 2).abs().idxmin()]
        kept = f"ranks by latency keep {100 * at.allocated:.0f} % of the energy"
        finding = f"At {at.speedup:.1f} times the speed {kept}, one ratio {100 * at.uniform:.0f} %"
    state(figure, finding, ax)
    return figure


@in_style()
def plot_equal_latency(table: pd.DataFrame) -> ProjectFigure:
    """Draw accuracy against measured time, of networks made to be equally fast and of the dense one.

    Args:
        table: of :func:`lrpet.tables.equal_latency_table`: way, milliseconds, seed, top1_pct.

    Returns:
        One panel with a point per seed and a bar at each mean.

    >>> row = {"way": "dense", "milliseconds": 4.0, "seed": 1, "top1_pct": 69.0}
    >>> len(plot_equal_latency(pd.DataFrame([row])).axes[0].collections)
    1
    """
    looks = {"dense": "dense", "by latency": "lrpet", "uniform": "lrp", "narrow": "narrow"}
    labels = {
        "by latency": "LRPET, ranks by latency",
        "uniform": "LRPET, one ratio",
        "narrow": "narrow network",
    }
    figure = ProjectFigure(3.4)
    ax, means = figure.subplots(), {}
    for way, rows in table.dropna(subset=["top1_pct"]).groupby("way", sort=False):
        style, means[way] = METHOD_STYLES[looks[way]], rows.top1_pct.mean()
        point = {"color": style.color, "marker": style.marker, "label": labels.get(way, way)}
        ax.scatter(rows.milliseconds, rows.top1_pct, **point, facecolors="none")
        ax.plot(rows.milliseconds.iloc[0], means[way], "_", color=style.color, markersize=18)
    ax.set(xlabel="milliseconds for one image, measured", ylabel="top-1 accuracy, %")
    ax.margins(x=0.08)
    finding = "Networks of equal latency have not been trained"
    fast = {way: mean for way, mean in means.items() if way != "dense"}
    if fast:
        best_first = sorted(fast, key=fast.get, reverse=True)
        finding = "In equal time: " + "; ".join(f"{labels[way]} {fast[way]:.1f} %" for way in best_first)
    state(figure, finding, ax)
    return figure


@in_style()
def plot_growth(rows: pd.DataFrame) -> ProjectFigure:
    """Draw how time and memory grow with each size of a network, and write the fitted slope at each line.

    Args:
        rows: of ``python -m lrpet.bench scaling``: axis, value, what, median_seconds, peak_bytes.

    Returns:
        Time above, memory below, a column per size; both axes logarithmic. A slope of 2 means four times the
        cost at twice the size; it is fitted to the upper half of the values, where fixed costs matter least.

    >>> rows = pd.DataFrame({"axis": "width", "value": [8, 16, 32], "what": "x"})
    >>> rows = rows.assign(median_seconds=rows.value**3, peak_bytes=rows.value**2)
    >>> [text.get_text() for ax in plot_growth(rows).axes for text in ax.texts]
    ['3.0', '2.0']
    """
    columns = list(dict.fromkeys(rows["axis"]))
    figure = ProjectFigure(5.0)
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    looks, slopes = [METHOD_STYLES[name] for name in ("dense", "narrow", "lrpet")], {}
    for (axis, part), column in zip(rows.groupby("axis", sort=False), range(len(columns)), strict=True):
        for row, (quantity, unit) in enumerate({"median_seconds": 1e3, "peak_bytes": 2**-20}.items()):
            ax, ends = panels[row][column], []
            for (what, line), style in zip(part.groupby("what", sort=False), cycle(looks), strict=False):
                values, cost = line["value"].to_numpy(float), unit * line[quantity].to_numpy(float)
                ax.plot(
                    values,
                    cost,
                    label=what,
                    color=style.color,
                    marker=style.marker,
                    linestyle=style.linestyle,
                    markersize=3.5,
                )
                upper = slice(len(values) // 2 - (len(values) < 4), None)
                slope = np.polyfit(np.log(values[upper]), np.log(cost[upper]), 1)[0]
                ends.append((cost[-1], f"{slope:.1f}".replace("-0.0", "0.0"), style.color))
                slopes.setdefault(what, ends[-1][1])
            for place, (cost, slope, color) in enumerate(
                sorted(ends, reverse=True)
            ):  # the highest line's number highest, none on another
                shift = 6 * (len(ends) - 1 - 2 * place) / 2
                ax.annotate(
                    slope,
                    (values[-1], cost),
                    (4, shift),
                    textcoords="offset points",
                    color=color,
                    va="center",
                )
            ax.set(xscale="log", yscale="log")
            shown = values if len(values) < 5 else values[::2]
            ax.set_xticks(shown, [f"{value:g}" for value in shown])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.margins(x=0.22)
        panels[1][column].set_xlabel(axis)
    panels[0][0].set_ylabel("time, ms")
    panels[1][0].set_ylabel("peak memory, MiB")
    key = "number at a line: its slope; 1: cost in proportion to the size, 2: four times at twice the size"
    figure.supxlabel(key, fontsize=9)
    powers = ", ".join(f"{slope} ({what})" for what, slope in slopes.items())
    state(figure, f"Time grows with {columns[0]} to the power of {powers}", panels[0][0])
    return figure
