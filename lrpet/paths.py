"""Where things lie: the project, its results and figures, the images and what is made from them once."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PROJECT", "cache_folder", "figures_root", "results_root"]
PROJECT = Path(__file__).resolve().parent.parent


def results_root() -> Path:
    """Return the folder of all results: ``LRPET_RESULTS``, else ``results/`` of the project."""
    return Path(os.environ.get("LRPET_RESULTS") or PROJECT / "results").expanduser().absolute()


def figures_root() -> Path:
    """Return the folder of all figures: ``LRPET_FIGURES``, else ``figures/`` of the project."""
    return Path(os.environ.get("LRPET_FIGURES") or PROJECT / "figures").expanduser().absolute()


def data_folder(root: str | Path | None) -> Path | None:
    """Return the folder of the images: the given one, else ``LRPET_DATA``, else None."""
    root = root or os.environ.get("LRPET_DATA") or None
    return None if root is None else Path(root).expanduser()


def cache_folder() -> Path:
    """Return the folder of what is made from images once: ``LRPET_CACHE``, else ``data/cache`` of the project."""
    return Path(os.environ.get("LRPET_CACHE") or PROJECT / "data" / "cache").expanduser()
