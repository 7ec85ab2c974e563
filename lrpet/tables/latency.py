"""Accuracy of trained networks against the time that they were measured to take."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lrpet.config import RunConfig

__all__ = ["equal_latency_table"]


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


def _is_so(config: RunConfig, settings: Mapping) -> bool:
    wanted = dict.fromkeys(("multiple_of", "ranks", "unfolding")) | dict(settings)
    return all(getattr(config, name) == value for name, value in wanted.items())
