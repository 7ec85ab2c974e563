"""Where things lie: the project, its results and figures, the images and what is made from them once."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "PROJECT",
    "cache_folder",
    "data_folder",
    "expanded",
    "figures_root",
    "has_own_results",
    "project_file",
    "results_root",
]
PROJECT = Path(__file__).resolve().parent.parent


def project_file(name: str, instead: str = "work in a clone of the project") -> Path:
    """Return a file or folder of the project that this package runs from.

    Args:
        name: its path in the project.
        instead: what a reader without the project can do.

    Raises:
        ValueError: the package is installed by itself, without the project around it.

    >>> project_file("experiments.yaml").is_file()
    True
    """
    if not (PROJECT / "experiments.yaml").is_file():
        raise ValueError(
            f"{name} belongs to a checkout of the project, and this lrpet is installed by itself in {PROJECT}"
            f"; {instead}"
        )
    return PROJECT / name


def results_root() -> Path:
    """Return the folder of all results: ``LRPET_RESULTS``, else ``results/`` of the project."""
    return _folder("LRPET_RESULTS", "results", "set LRPET_RESULTS or give results=").absolute()


def has_own_results() -> bool:
    """Tell whether the results are the project's: only from these are its pages and figures made."""
    return results_root().resolve() == PROJECT / "results"


def figures_root() -> Path:
    """Return the folder of all figures: ``LRPET_FIGURES``, else ``figures/`` of the project.

    With results elsewhere it is ``figures/`` among those.
    """
    if not os.environ.get("LRPET_FIGURES") and os.environ.get("LRPET_RESULTS") and not has_own_results():
        return results_root() / "figures"
    return _folder("LRPET_FIGURES", "figures", "set LRPET_FIGURES").absolute()


def cache_folder() -> Path:
    """Return the folder of decoded images: ``LRPET_CACHE``, else ``data/cache`` of the project."""
    return _folder("LRPET_CACHE", "data/cache", "set LRPET_CACHE")


def data_folder(root: str | Path | None) -> Path | None:
    """Return the folder of the images: the given one, else ``LRPET_DATA``, else None."""
    root = root or os.environ.get("LRPET_DATA") or None
    return None if root is None else expanded(root)


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` and ``~user`` as home folders.

    Raises:
        ValueError: that home is not known.

    >>> expanded("data"), expanded("~") == Path.home()
    (PosixPath('data'), True)
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"the home folder of {str(path)!r} is not known; give the folder without ~"
        ) from error


def _folder(variable: str, name: str, instead: str) -> Path:
    return expanded(os.environ.get(variable) or project_file(name, instead))
