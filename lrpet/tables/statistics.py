"""The one rule by which tables decide: Student's t over seeds, adjusted by Holm over the rows of a table.

A row is decided where n ≥ 3 and its adjusted p is below 0.05. Rows of fewer seeds are descriptive: they are
not tested and do not count in the adjustment. The interval shown is the unadjusted one of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

__all__ = ["Words", "decide", "detectable", "half_width", "holm", "p_value"]
ALPHA, POWER, FEWEST = 0.05, 0.80, 3
NOT_RUN = "not run"


class Words(NamedTuple):
    """The verdicts of a table."""

    above: str
    below: str
    undecided: str = "undecided"
    too_few: str = "too few seeds"
    not_tested: str = "not tested"

    @property
    def tested(self) -> tuple[str, str, str]:
        """The verdicts of rows with enough seeds for a test."""
        return self.above, self.below, self.undecided


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean by Student's t: t_{0.975, n−1} · sd / √n, n ≥ 2.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    critical = stats.t.ppf(1 - ALPHA / 2, len(values) - 1)
    return float(critical * np.std(values, ddof=1) / math.sqrt(len(values)))


def p_value(values: Sequence[float]) -> float:
    """Return the two-sided p of "the mean is 0" by Student's t; 0 where values without spread are not 0.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    if error == 0:
        return float(np.mean(values) == 0)
    return float(2 * stats.t.sf(abs(np.mean(values)) / error, len(values) - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being several, in the order given. Source: Holm 1979.

    >>> holm([0.03, 0.01, 0.2])
    [0.06, 0.03, 0.2]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for place, k in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - place) * p[k]))
        adjusted[k] = highest
    return adjusted


def detectable(values: Sequence[float]) -> float:
    """Return the true mean that so many values, three or more, of this spread show with a power of 80 %.

    The test is the unadjusted two-sided one at 0.05. The true spread is taken to be that of the values, which
    for few of them is a rough guess.

    >>> round(detectable([1.0, 2.0, 3.0]), 2)
    3.26
    """
    return float(_noncentrality(len(values)) * np.std(values, ddof=1) / math.sqrt(len(values)))


@cache
def _noncentrality(n: int) -> float:
    """Return the mean, in standard errors, at which |t| exceeds its critical value in 80 % of cases."""
    critical = stats.t.ppf(1 - ALPHA / 2, n - 1)

    def missing_power(shift: float) -> float:
        return stats.nct.sf(critical, n - 1, shift) - POWER  # the other tail is below 0.001 here

    return float(optimize.brentq(missing_power, 1.0, 10.0))


def decide(samples: Sequence[pd.Series | None], words: Words, digits: int = 2) -> list[dict]:
    """Return difference, interval, p, adjusted p, n, detectable difference, verdict of each row of a table.

    Args:
        samples: per row the paired differences, one per seed; None where a row is no comparison.
        words: the verdicts.
        digits: after the point of differences.
    """
    tested = [k for k, d in enumerate(samples) if d is not None and len(d) >= FEWEST]
    p = {k: p_value(samples[k]) for k in tested}
    adjusted = dict(zip(tested, holm([p[k] for k in tested]), strict=True))
    rows = []
    for k, d in enumerate(samples):
        row = dict.fromkeys(("difference", "ci95", "p", "p_holm", "n", "detectable", "verdict"), "")
        rows.append(row)
        if d is None:
            continue
        row |= {"n": len(d), "difference": NOT_RUN, "verdict": words.not_tested}
        if len(d):
            row |= {"difference": f"{d.mean():+.{digits}f}", "verdict": words.too_few}
        if len(d) > 1:
            low, high = d.mean() - half_width(d), d.mean() + half_width(d)
            row |= {"ci95": f"[{low:+.{digits}f}, {high:+.{digits}f}]"}
        if k in p:
            row |= {
                "verdict": words.undecided,
                "p": f"{p[k]:.2g}",
                "p_holm": f"{adjusted[k]:.2g}",
                "detectable": f"{detectable(d):.{digits}f}",
            }
            if adjusted[k] < ALPHA:
                row["verdict"] = words.above if d.mean() > 0 else words.below
    return rows
