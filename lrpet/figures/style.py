"""One style for all figures."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrpet.config import PROFILES
from lrpet.files import write_file
from lrpet.paths import figures_root, project_file
from lrpet.registry import METHODS

__all__ = [
    "METHOD_STYLES",
    "STYLE",
    "MethodStyle",
    "ProjectFigure",
    "method_style",
    "save_figure",
    "saved_figures",
]


class MethodStyle(NamedTuple):
    """How one method looks in every figure; the marker and the line tell it apart in grayscale too."""

    label: str
    color: str
    marker: str
    linestyle: str | tuple


METHOD_STYLES = {
    name: MethodStyle(row.label, row.color, row.marker, row.linestyle) for name, row in METHODS.items()
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


def in_style():
    """Return the style as a context manager or decorator; what the caller has set stays out."""
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
        with in_style():
            super().draw(renderer)

    def png(self, dpi: int | str = "figure") -> bytes:
        """Return the figure as a PNG file in memory."""
        with in_style():
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
            return file.getvalue()

    def svg(self) -> bytes:
        """Return the figure as an SVG file in memory."""
        with in_style():
            file = io.BytesIO()
            self.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            return file.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def method_style(name: str) -> MethodStyle:
    """Return the style of a method by its name, or by the name of a run, experiment or published row.

    Args:
        name: a method of RunConfig, or a text with one in it ("resnet20-lrpet-s1", "TRP+nuclear (channel)").
            "baseline" means dense. Any other ("EViT") gets a style of its own.

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


def add_legend(figure: Figure, *axes) -> None:
    """Put one legend above the panels, where it hides no data: equal labels once, as many columns as fit."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries)
    widths = {
        n: sum(11 + max(map(len, column)) for column in np.array_split(labels, n))
        for n in range(1, len(labels) + 1)
    }
    fitting = [
        n for n, letters in widths.items() if letters <= 118
    ]  # 118 letters of 9 points fill 7.5 inches
    if labels:
        figure.legend(entries.values(), labels, loc="outside upper left", ncols=max(fitting, default=1))


def whole_number_ticks(ax) -> None:
    """Tick the x axis at whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def mark_rank(ax, x: float, text: str, *, at_top: bool = False) -> None:
    """Draw a dotted vertical line with a text next to it, on the side that has room."""
    ax.axvline(x, color=INK, linewidth=0.8, linestyle=":")
    low, high = ax.get_xlim()
    side, align = (-3, "right") if x > low + 0.7 * (high - low) else (3, "left")
    offset, vertical = (-1, "top") if at_top else (3, "bottom")
    place = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "ha": align,
        "va": vertical,
    }
    ax.annotate(text, (x, float(at_top)), (side, offset), **place)


def say_in_panel(ax, text: str) -> None:
    """Write a line in the middle of a panel that has nothing to show."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#666666")
    ax.set(xticks=[], yticks=[])


def saved_figures(profile: str) -> list[tuple[str, Path]]:
    """Return the PNG files of a profile with captions: which notebook, which runs; see figures/README.md."""
    rows = re.findall(
        r"\| `<profile>/([^`]+)` \| `([^`]+)` \| (.+) \|",
        project_file("figures/README.md").read_text(encoding="utf-8"),
    )
    found = []
    for path in sorted((figures_root() / profile).glob("*.png")):
        origin = next(
            (
                f"made by `{notebook}` from {source}"
                for name, notebook, source in rows
                if path.match(f"{name}.png") or path.match(name)
            ),
            "",
        )
        found.append((f"**{path.stem}**, {origin}", path))
    return found


def save_figure(figure: ProjectFigure, name: str, profile: str) -> tuple[Path, Path]:
    """Write a figure as PNG (150 dots per inch) and as SVG; the same figure gives the same bytes.

    Args:
        figure: of a function of this module.
        name: file name without its ending; letters, digits, "-", "_" and ".".
        profile: one of ``lrpet.config.PROFILES``; the folder below ``figures_root()``.

    Returns:
        The paths of the PNG and of the SVG file.

    Raises:
        ValueError: the name or the profile is not allowed.

    >>> import torch
    >>> from lrpet.figures import plot_rank_sweep
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
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    for path, content in zip(paths, (figure.png(STYLE["savefig.dpi"]), figure.svg()), strict=True):
        write_file(path, content)
    return paths
