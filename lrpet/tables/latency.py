"""Accuracy of trained networks against the time that they were measured to take."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lrpet.config import RunConfig
from lrpet.tables.claims import HIGHER
from lrpet.tables.statistics import decide

__all__ = ["equal_latency_differences", "equal_latency_table"]
ALLOCATED = "by latency"  # the way that is compared with the others


def equal_latency_table(result: Mapping, runs: pd.DataFrame) -> pd.DataFrame:
    """Return each way to be fast with its measured time, and the accuracy of each seed that was trained so.

    Args:
        result: JSON of ``python -m lrpet.bench equal-latency``.
        runs: of :func:`lrpet.tables.rows.profile_runs`, in which those of its settings are looked for.

    Returns:
        A row per way and seed: ``way``, ``milliseconds``, ``times_dense``, ``seed``, ``top1_pct``; a way of
        which no seed is finished has one row without the latter two.
    """
    made = []
    for row in result["rows"]:
        settings = {"method": "lrpet", **row["settings"]}
        if "columns" not in (settings.get("unfolding") or {}).values():
            settings["unfolding"] = None  # rows, the paper's
        found = runs[[_is_so(config, settings) for config in runs.config]]
        found = found[found.top1_pct.notna()]
        told = {"way": row["way"], "milliseconds": row["milliseconds"], "times_dense": row["speedup"]}
        for seed, accuracy in zip(found.seed, found.top1_pct, strict=True):
            made.append(told | {"seed": seed, "top1_pct": accuracy})
        if found.empty:
            made.append(told | {"seed": None, "top1_pct": None})
    return pd.DataFrame(made)


def equal_latency_differences(ways: pd.DataFrame) -> pd.DataFrame:
    """Return how much more accurate ranks by latency are than each other way, in points, paired by seed.

    Args:
        ways: of :func:`equal_latency_table`.

    Returns:
        A row per other way, decided as in :mod:`lrpet.tables.statistics`.
    """
    scores = {
        way: rows.set_index("seed").top1_pct.astype(float) for way, rows in ways.groupby("way", sort=False)
    }
    others = [way for way in scores if way != ALLOCATED]
    decided = decide([(scores[ALLOCATED] - scores[way]).dropna() for way in others], HIGHER)
    return pd.DataFrame(
        [{"pair": f"{ALLOCATED} − {way}"} | row for way, row in zip(others, decided, strict=True)]
    )


def _is_so(config: RunConfig, settings: Mapping) -> bool:
    wanted = dict.fromkeys(("multiple_of", "ranks", "unfolding")) | dict(settings)
    return all(getattr(config, name) == value for name, value in wanted.items())
