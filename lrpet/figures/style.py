"""One style for all figures."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

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
TITLE_LETTERS = 84  # of 10.5 points, bold, on a line of 7.5 inches
STYLE = {
    "figure.facecolor": PAPER,  # an own light background: on a dark screen nothing shines through
    "figure.dpi": 110,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 150,
    "svg.hashsalt": "lrpet",  # names inside an SVG are hashes; a fixed salt makes them the same every time
    "font.size": 9.5,
    "mathtext.fontset": "cm",  # the letters of LaTeX
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

    Attributes:
        finding: what the figure shows, as :func:`state` wrote it above the panels.

    >>> ProjectFigure(3).get_size_inches().tolist()
    [7.5, 3.0]
    """

    finding = ""

    def __init__(self, height: float = 3.5):
        super().__init__(figsize=(7.5, height), layout="constrained")

    def draw(self, renderer):
        """Draw; ticks and labels come into being only now, so the style has to hold now too."""
        with in_style():
            super().draw(renderer)

    def png(self, dpi: int | str = "figure") -> bytes:
        """Return the figure as a PNG file in memory, of 256 colours, which takes a third of the bytes."""
        written = Image.open(io.BytesIO(self._written(format="png", dpi=dpi, metadata={"Software": None})))
        few, file = written.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE), io.BytesIO()
        few.save(file, "png", optimize=True, dpi=written.info["dpi"])
        return file.getvalue()

    def svg(self) -> bytes:
        """Return the figure as an SVG file in memory."""
        return self._written(format="svg", metadata={"Date": None, "Creator": None})

    def _written(self, **settings) -> bytes:
        for ax in self.axes:  # a layout begins where the last one ended, and would end a rounding apart
            if ax.get_subplotspec() is not None:
                ax.set_subplotspec(ax.get_subplotspec())
        with in_style():
            file = io.BytesIO()
            self.savefig(file, **settings)
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


def state(figure: ProjectFigure, finding: str, *axes) -> None:
    """Write what a figure shows above its panels and, below that, one legend for all of them.

    Args:
        figure: to write on.
        finding: the title; long ones are wrapped.
        axes: whose labelled lines and bars are in the legend, equal labels once.
    """
    figure.finding, entries = finding, {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    title, bold = textwrap.fill(finding, TITLE_LETTERS), {"size": 10.5, "weight": "bold"}
    if not entries:
        figure.suptitle(title, x=0.01, ha="left", fontproperties=bold)
        return
    look = {"title_fontproperties": bold, "alignment": "left", "borderpad": 0, "borderaxespad": 0.3}
    place = {"loc": "outside upper left", "ncols": _columns(list(entries))}
    figure.legend(entries.values(), list(entries), title=title, **place, **look)


def _columns(labels: list[str]) -> int:
    """Return in how many columns a legend fits into 7.5 inches, which 118 letters of 9 points fill."""
    fits = [
        n
        for n in range(1, len(labels) + 1)
        if sum(11 + max(map(len, column)) for column in np.array_split(labels, n)) <= 118
    ]
    return max(fits, default=1)


def draw_band(ax, table: pd.DataFrame, x: str, y: str, style: MethodStyle, **look) -> None:
    """Draw the mean of y at each x as a line, and a band from the lowest value there to the highest.

    Args:
        ax: to draw on.
        table: a row per value: with several seeds, several rows per x.
        x: column.
        y: column.
        style: colour, marker and dashes.
        look: further settings of the line, as ``label``; ``marker=None`` leaves the markers away.
    """
    look = {"marker": style.marker, "markeredgewidth": 0, "linestyle": style.linestyle} | look
    band = {"alpha": 0.18, "linewidth": 0}
    table = table.dropna(subset=y)
    several = len(table) and table[x].duplicated().any()
    spread = ("pi", 100) if several else None  # of all values: by Student's t that of two is 9 times as wide
    settings = {"errorbar": spread, "err_kws": band, "color": style.color, "legend": False, "ax": ax}
    sns.lineplot(table, x=x, y=y, **settings, **look)
    ax.set(xlabel="", ylabel="")  # seaborn writes the names of the columns


def whole_number_ticks(ax, at_most: int = 8) -> None:
    """Tick the x axis at whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=at_most, steps=[1, 2, 5, 10]))


def one_two_five(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from the last one below an interval to the first one above it.

    >>> one_two_five(0.3, 4.0)
    [0.2, 0.5, 1.0, 2.0, 5.0]
    """
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    values = [float(f"{lead}e{power}") for power in powers for lead in (1, 2, 5)]
    below, above = max(v for v in values if v <= low), min(v for v in values if v >= high)
    return [v for v in values if below <= v <= above]


def logarithmic(ax) -> None:
    """Give the y axis a log scale, labelled at 1, 2, 5 times a power of ten where it spans less than two."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        shown = one_two_five(low, high)
        ax.set_ylim(shown[0], shown[-1])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


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
    """Return the PNG files of a profile with their captions, those of figures/README.md.

    Returns:
        Caption and path of each: what it shows, which notebook made it, from which runs.
    """
    rows = re.findall(
        r"^\| `([^`]+)` \| (.+) \| `([^`]+)` \| (.+) \|$",
        project_file("figures/README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    found = []
    for path in sorted((figures_root() / profile).glob("*.png")):
        caption = f"**{path.stem}**"
        for name, shows, notebook, source in rows:
            if path.match(f"{name}.png") or path.match(name):
                caption = f"**{path.stem}.** {shows} Made by `{notebook}` from {source}."
                break
        found.append((caption, path))
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
