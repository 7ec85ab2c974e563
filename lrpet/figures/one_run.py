"""Figures of one run: its history, its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lrpet.experiments import MAIN
from lrpet.figures.style import (
    METHOD_STYLES,
    OTHER,
    MethodStyle,
    ProjectFigure,
    draw_band,
    in_style,
    logarithmic,
    method_style,
    say_in_panel,
    state,
    whole_number_ticks,
)
from lrpet.registry import metric_of
from lrpet.runs.store import load_run

__all__ = ["plot_history", "plot_layers", "plot_training"]


def plot_training(runs: pd.DataFrame) -> ProjectFigure:
    """Draw the training curves of the main methods of a profile's first network, over all their seeds.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for one profile.

    Returns:
        What :func:`plot_history` returns for dense, LRP and LRPET, as far as they were run.

    >>> from lrpet.tables.rows import profile_runs
    >>> plot_training(profile_runs("imagenet")).axes[0].texts[0].get_text()
    'no run has finished'
    """
    main = runs[runs.feeds.isin(MAIN) & runs[metric_of(runs).column].notna()]
    main = main[main.network == main.network.iloc[0]] if len(main) else main
    histories = {}
    for method in ("dense", "lrp", "lrpet"):
        label = METHOD_STYLES[method].label
        seeds = main[main.label == label]
        seeds = seeds[seeds.experiment == seeds.experiment.iloc[0]] if len(seeds) else seeds
        histories[label] = [load_run(Path(folder)).history for folder in seeds.get("folder", [])]
    return plot_history(histories)


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
        metric of the task, of classification top-1 accuracy in %. Pale lines are the training images, with
        augmentation; full lines the images that ``scored_on`` names. Dotted vertical lines are where the
        learning rate falls.

    >>> table = {"epoch": [1, 2], "learning_rate": 0.1, "train_loss": [2, 1], "loss": [2, 1]}
    >>> table |= {"train_top1_pct": [30, 60], "top1_pct": [30, 60]}
    >>> plot_history(pd.DataFrame(table)).axes[1].get_ylabel()
    'top-1 accuracy, %'
    """
    runs = {"": histories} if isinstance(histories, pd.DataFrame) else histories
    runs = {
        name: [run] if isinstance(run, pd.DataFrame) else list(run) for name, run in runs.items() if len(run)
    }
    runs = {  # the oldest runs did not record the loss
        name: [table if "loss" in table else table.assign(loss=np.nan) for table in seeds]
        for name, seeds in runs.items()
    }
    figure = ProjectFigure(3.6)
    panels, ends = figure.subplots(1, 2), []
    metric = metric_of(pd.concat([t for seeds in runs.values() for t in seeds]) if runs else {})
    for (name, seeds), style in zip(runs.items(), _line_styles(runs), strict=True):
        table = pd.concat(seeds, ignore_index=True)
        label = style.label + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else "")
        marker = style.marker if table["epoch"].nunique() == 1 else None  # a line of one point would not show
        for ax, column in zip(panels, ("loss", metric.column), strict=True):
            look = {"color": style.color, "linestyle": style.linestyle, "linewidth": 0.9, "alpha": 0.6}
            if f"train_{column}" in table:  # no task but classification needs a score of training batches
                ax.plot(table.groupby("epoch")[f"train_{column}"].mean(), marker=marker, **look)
            draw_band(ax, table, "epoch", column, style, label=label if name else None, marker=marker)
        last = table.loc[table["epoch"] == table["epoch"].max(), metric.column].mean()
        ends.append(f"{style.label} {metric.text(last)}" if name else metric.text(last))
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
        logarithmic(panels[0])
        told = [t["loss"].notna().any() for seeds in runs.values() for t in seeds]
        some = "" if all(told) else f" of {sum(told)} of {len(told)} runs"
        full = f"full: {' and '.join(where)} images{some}"
        panels[0].set_title(f"{full}, pale: training", color="#555555")
        epochs = max(t["epoch"].max() for seeds in runs.values() for t in seeds)
        state(figure, f"{metric.title.capitalize()} after {epochs} epochs: {', '.join(ends)}", panels[1])
    if falls:
        panels[1].set_title("dotted: the learning rate falls", color="#555555")
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
    finding = f"{total} M of the dense network's {dense} M multiply-adds are left"
    if energy.notna().any():
        finding += f", and {energy.min():.0f} % or more of a layer's energy"
    state(figure, finding, top)
    return figure
