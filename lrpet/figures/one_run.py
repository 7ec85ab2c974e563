"""Figures of one run: its history, its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lrpet.figures.style import (
    METHOD_STYLES,
    OTHER,
    MethodStyle,
    ProjectFigure,
    add_legend,
    in_style,
    method_style,
    say_in_panel,
    whole_number_ticks,
)
from lrpet.registry import metric_of

__all__ = ["plot_history", "plot_layers"]


@in_style()
def plot_history(
    histories: pd.DataFrame | Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]],
) -> ProjectFigure:
    """Draw loss and accuracy over the epochs of one run or of several.

    Args:
        histories: the ``history`` of a run, or name → history or list of histories. A list is one run in
            several seeds: its mean is drawn, and a band from the lowest to the highest. Names are those of
            methods or hold one ("lrpet", "lrpet, seed 1") and take its colour; others get a colour of their
            own.

    Returns:
        Two panels against the epoch: loss on a log scale, of images and text cross-entropy in nats, and the
        metric of the task, of classification top-1 accuracy in %. Pale lines
        are the training images, with augmentation; full lines the images that ``scored_on`` names. Dotted
        vertical lines are where the learning rate falls.

    >>> table = {"epoch": [1, 2], "learning_rate": 0.1, "train_loss": [2, 1], "loss": [2, 1]}
    >>> table |= {"train_top1_pct": [30, 60], "top1_pct": [30, 60]}
    >>> plot_history(pd.DataFrame(table)).axes[1].get_ylabel()
    'top-1 accuracy, %'
    """
    runs = {"": histories} if isinstance(histories, pd.DataFrame) else histories
    runs = {
        name: [run] if isinstance(run, pd.DataFrame) else list(run) for name, run in runs.items() if len(run)
    }
    figure = ProjectFigure(3.4)
    panels = figure.subplots(1, 2)
    metric = metric_of(pd.concat([t for seeds in runs.values() for t in seeds]) if runs else {})
    for (name, seeds), style in zip(runs.items(), _line_styles(runs), strict=True):
        table = pd.concat(seeds, ignore_index=True)
        label = style.label + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        for ax, column in zip(panels, ("loss", metric.column), strict=True):
            for source, look in (
                (f"train_{column}", {"linewidth": 0.9, "alpha": 0.6}),
                (column, {"label": label if name else None}),
            ):
                if source not in table:  # no task but classification needs a score of its training batches
                    continue
                values = table.groupby("epoch")[source].agg(["mean", "min", "max"])
                marker = style.marker if len(values) == 1 else None  # a line of one point would not show
                ax.plot(
                    values.index,
                    values["mean"],
                    color=style.color,
                    linestyle=style.linestyle,
                    marker=marker,
                    **look,
                )
                if len(seeds) > 1 and source == column:
                    ax.fill_between(
                        values.index, values["min"], values["max"], color=style.color, alpha=0.15, linewidth=0
                    )
    falls = sorted(
        {
            epoch - 0.5
            for seeds in runs.values()
            for t in seeds
            for epoch in t["epoch"][t["learning_rate"].diff() < 0]
        }
    )
    for ax in panels:
        ax.set_xlabel("epoch")
        whole_number_ticks(ax)
        for epoch in falls:
            ax.axvline(epoch, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        if not runs:
            say_in_panel(ax, "no run has finished")
    panels[0].set_ylabel("loss (cross-entropy), nats")
    panels[1].set_ylabel(metric.label)
    if runs:
        where = sorted(
            {images for seeds in runs.values() for t in seeds for images in t.get("scored_on", ["test"])}
        )
        panels[0].set(yscale="log")
        panels[0].set_title(f"full: {' and '.join(where)} images, pale: training images", color="#555555")
    if falls:
        panels[1].set_title("dotted: the learning rate falls", color="#555555")
    add_legend(figure, panels[0])
    return figure


def _line_styles(names) -> list[MethodStyle]:
    """Return a style per name; one without a method, or with one that came before, gets its own."""
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


@in_style()
def plot_layers(layers: pd.DataFrame) -> ProjectFigure:
    """Draw the cost of every layer, dense and compact, and the share of energy that is kept.

    Args:
        layers: the ``layers`` of a run, or any table with the columns ``name``, ``macs`` and ``dense_macs``
            (multiply-adds for one image), and if there are any ``energy_kept`` (0 to 1, before energy
            transfer) and ``action`` ("constant" marks a dead layer).

    Returns:
        Two panels against the layer, in the order of execution: MACs in millions, energy kept in %.

    Raises:
        ValueError: a column is missing.

    >>> plot_layers(pd.DataFrame({"name": ["conv"], "macs": [5e5], "dense_macs": [1e6]})).axes[0].get_ylabel()
    'MACs, millions'
    """
    missing = [name for name in ("name", "macs", "dense_macs") if name not in layers]
    if missing:
        raise ValueError(
            f"layers must have a column {missing[0]!r}; got {', '.join(map(str, layers.columns))}"
        )
    x = np.arange(len(layers))
    figure = ProjectFigure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    total, dense = (f"{layers[column].sum() / 1e6:#.3g}".rstrip(".") for column in ("macs", "dense_macs"))
    edge = 0.6 if len(x) <= 60 else 0
    top.bar(
        x,
        layers["dense_macs"] / 1e6,
        color="#E4E4E4",
        edgecolor="#777777",
        linewidth=edge,
        width=0.8,
        label=f"dense, {dense} M in all",
    )
    compact = METHOD_STYLES["lrpet"].color
    top.bar(x, layers["macs"] / 1e6, color=compact, width=0.5, label=f"compact, {total} M in all")
    if "action" in layers and (layers["action"] == "constant").any():
        dead = x[layers["action"] == "constant"]
        top.plot(
            dead,
            np.zeros(len(dead)),
            "x",
            color=METHOD_STYLES["lrp"].color,
            clip_on=False,
            label="dead layer, no MACs",
        )
    top.set_ylabel("MACs, millions")

    energy = (
        100 * layers["energy_kept"].astype(float)
        if "energy_kept" in layers
        else pd.Series(np.nan, layers.index)
    )
    if energy.notna().any():
        bottom.plot(x, energy, "o", color=compact, markersize=4 if len(x) <= 60 else 3)
        low = energy.min()
        bottom.set_ylim(0 if low < 90 else 89, 100 + (4 if low < 90 else 0.5))
    else:
        say_in_panel(bottom, "no layer was projected")
    bottom.set_ylabel("energy kept, %")
    every = -(-len(x) // 28)  # more names than this would run into each other
    bottom.set_xticks(x[::every], layers["name"].iloc[::every], rotation=90, fontsize=8)
    bottom.set(xlabel="layer, in the order of execution", xlim=(-0.7, len(x) - 0.3))
    add_legend(figure, top)
    return figure
