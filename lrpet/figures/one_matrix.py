"""Figures of one matrix or one network: spectrum, ranks, errors, depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from lrpet.figures.style import (
    METHOD_STYLES,
    PAPER,
    ProjectFigure,
    in_style,
    logarithmic,
    mark_rank,
    method_style,
    state,
    whole_number_ticks,
)
from lrpet.lowrank.projection import project

__all__ = ["plot_by_depth", "plot_channel_errors", "plot_rank_sweep", "plot_spectrum"]
ERROR = r"relative error $\|P - M\| / \|M\|$"


@in_style()
def plot_spectrum(matrix: Tensor, rank: int) -> ProjectFigure:
    """Draw the singular values of a matrix before the projection, after LRP, after LRPET, and their energy.

    Args:
        matrix: M, (N, D), floating point.
        rank: R, 1 ≤ R ≤ min(N, D).

    Returns:
        Two panels: s_i against i, the removed ones hatched; Σ_{j≤i} s_j² in % of E against i.

    Raises:
        ValueError: the rank does not fit the matrix.

    Source: arXiv 2204.05566.

    >>> plot_spectrum(torch.diag(torch.tensor([4.0, 3.0])), 1).axes[1].get_ylabel()
    'cumulative energy, % of $E$'
    """
    M = matrix.detach().double().cpu()
    projected = {name: project(M, rank, energy_transfer=name == "lrpet") for name in ("lrp", "lrpet")}
    s = {name: torch.linalg.svdvals(A).numpy() for name, A in {"dense": M, **projected}.items()}  # (K,) each
    E = float(np.square(s["dense"]).sum()) or 1.0
    i = np.arange(1, len(s["dense"]) + 1)
    figure = ProjectFigure()
    left, right = figure.subplots(1, 2)

    first = i <= rank
    bars = {"width": 0.8, "edgecolor": "#777777", "linewidth": 0.5}
    left.bar(i[first], s["dense"][first], color="#D0D0D0", label="before, kept", **bars)
    left.bar(i[~first], s["dense"][~first], color=PAPER, hatch="//////", label="before, removed", **bars)
    for name in ("lrp", "lrpet"):
        style = METHOD_STYLES[name]
        left.plot(i[first], s[name][first], style.marker, color=style.color, markersize=4, label=style.label)
    left.set(
        xlabel="number $i$ of the singular value", ylabel="singular value $s_i$", xlim=(0.2, len(i) + 0.8)
    )
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
    right.set(
        xlabel="number $i$ of the singular value",
        ylabel="cumulative energy, % of $E$",
        xlim=(0, len(i) + 0.8),
        ylim=(0, 106),
    )
    for ax in (left, right):
        whole_number_ticks(ax)
    mark_rank(left, rank + 0.5, f"$R = {rank}$", at_top=True)
    mark_rank(right, rank, f"$R = {rank}$")
    kept = np.square(s["dense"][:rank]).sum() / E
    finding = f"{rank} of {len(i)} singular values hold {100 * kept:.1f} % of the energy"
    if kept:
        finding += f"; LRPET multiplies them by {kept**-0.5:.2f}"
    state(figure, finding, left, right)
    return figure


@in_style()
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

    >>> plot_rank_sweep(torch.eye(4)).axes[1].get_xlabel()
    'rank $R$'
    """
    energy = torch.linalg.svdvals(matrix.detach().double().cpu()).square().numpy()
    kappa = np.minimum(1.0, np.cumsum(energy) / (energy.sum() or 1.0))
    R = np.arange(1, len(kappa) + 1)
    figure = ProjectFigure()
    left, right = figure.subplots(1, 2)
    curves = {
        "lrp": (100 * kappa, np.sqrt(1 - kappa)),
        "lrpet": (np.full(len(R), 100.0), np.sqrt(2 - 2 * np.sqrt(kappa))),
    }
    for name, (percent, error) in curves.items():
        style = METHOD_STYLES[name]
        for ax, values in ((left, percent), (right, error)):
            ax.plot(R, values, color=style.color, linestyle=style.linestyle, label=style.label)
            if rank is not None:
                ax.plot(rank, values[rank - 1], style.marker, color=style.color)
    left.set(
        xlabel="rank $R$",
        ylabel="energy after the projection, % of $E$",
        xlim=(0, len(R) + 0.5),
        ylim=(0, 106),
    )
    right.set(xlabel="rank $R$", ylabel=ERROR, xlim=(0, len(R) + 0.5), ylim=(0, None))
    for ax in (left, right):
        whole_number_ticks(ax)
        if rank is not None:
            mark_rank(ax, rank, f"$R = {rank}$")
    finding = "LRPET keeps all of the energy at every rank"
    if rank is not None:
        lrp, lrpet = (error[rank - 1] for _, error in curves.values())
        finding += f"; at $R = {rank}$ its error is {lrpet:.2f}, the least possible one (LRP) {lrp:.2f}"
    state(figure, finding, left)
    return figure


@in_style()
def plot_by_depth(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> ProjectFigure:
    """Draw quantities of each layer, relative to the dense network, from the first layer to the last.

    Args:
        panels: label of the y axis → method → a value per layer, above 0; 1 means "as in the dense network".

    Returns:
        A panel per quantity, side by side, against the number of the layer; on a log scale if it spans a
        factor of ten.

    >>> plot_by_depth({"norm, relative": {"lrp": [0.8, 0.6]}}).axes[0].get_xlabel()
    'layer, from the input'
    """
    figure = ProjectFigure()
    axes, apart = np.atleast_1d(figure.subplots(1, len(panels))), {}
    for ax, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, values in curves.items():
            style = method_style(name)
            look = {"color": style.color, "linestyle": style.linestyle, "marker": style.marker}
            ax.plot(
                np.arange(1, len(values) + 1),
                values,
                markersize=3.5,
                linewidth=1.2,
                label=style.label,
                **look,
            )
            logs = np.abs(np.log(np.asarray(values, float)))
            apart[style.label] = max(apart.get(style.label, 1.0), float(np.exp(logs.max())))
        ax.axhline(1, color="#888888", linewidth=0.8, zorder=1)
        ax.set(xlabel="layer, from the input", ylabel=label)
        everything = np.concatenate([np.asarray(values, float) for values in curves.values()])
        if everything.max() >= 10 * everything.min() > 0:
            logarithmic(ax)
        else:
            ax.set_ylim(0, None)
        whole_number_ticks(ax)
    named = ", ".join(f"{label} {factor:.3g} times" for label, factor in apart.items())
    state(figure, f"Farthest from the dense network: {named}", *axes)
    return figure


@in_style()
def plot_channel_errors(scales: Sequence[float], errors: Mapping[str, Sequence[float]]) -> ProjectFigure:
    """Draw how wrong each output channel is after a projection, against the scale that BatchNorm gives it.

    Args:
        scales: |a| of each channel, all above 0.
        errors: label → relative error of each channel (1 means 100 %).

    Returns:
        One panel with a logarithmic x axis; the channels of one label are joined by a line.

    Source: what arXiv 2204.05566, is about.

    >>> plot_channel_errors([0.1, 1.0], {"without": [0.5, 0.5], "with": [0.9, 0.1]}).axes[0].get_xlabel()
    'scale $|a|$ that BatchNorm gives the channel'
    """
    figure = ProjectFigure(3.1)
    ax = figure.subplots()
    looks = cycle([METHOD_STYLES["narrow"], METHOD_STYLES["lrpet"], METHOD_STYLES["svd_finetune"]])
    order = np.argsort(scales)
    for (label, values), style in zip(errors.items(), looks, strict=False):
        look = {
            "color": style.color,
            "linestyle": style.linestyle,
            "marker": style.marker,
            "markersize": 4,
            "linewidth": 1,
        }
        ax.plot(np.asarray(scales)[order], 100 * np.asarray(values)[order], label=label, **look)
    ax.set(
        xscale="log",
        xlabel="scale $|a|$ that BatchNorm gives the channel",
        ylabel="error of the channel, %",
        ylim=(0, None),
    )
    ax.xaxis.set_major_formatter("{x:g}")
    largest = ", ".join(
        f"{label} {100 * np.asarray(values)[order[-1]]:.0f} %" for label, values in errors.items()
    )
    state(figure, f"Error of the channel with the largest scale: {largest}", ax)
    return figure
