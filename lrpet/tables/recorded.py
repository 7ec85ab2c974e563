"""What can be read off the spectra and gradient norms that runs recorded.

Runs of one network are given as method → table, with the tables of :mod:`lrpet.training.recording`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lrpet.experiments import Experiment, Profile, select

__all__ = [
    "choose_runs",
    "energy_shares",
    "gradient_ratios",
    "read_recorded",
]
TINY = 1e-12  # a gradient norm below this counts as this, so that it has a logarithm


def choose_runs(
    profile: Profile, network: str, methods: Sequence[str], seed: int | None = None
) -> list[Experiment]:
    """Return the experiments ``<network>-<method>-s<seed>`` of one seed, one experiment per method.

    Args:
        profile: of :func:`lrpet.experiments.load_profile`.
        network: a network of the profile.
        methods: names of methods.
        seed: None takes the first seed whose runs have all recorded their spectra, else the first.

    Raises:
        ValueError: the profile has no such experiments.

    >>> from lrpet.experiments import load_profile
    >>> [e.name for e in choose_runs(load_profile("smoke"), "resnet8", ["lrp", "lrpet"], 2)]
    ['resnet8-lrp-s2', 'resnet8-lrpet-s2']
    """
    everything = {e.name for e in profile.experiments}
    seeds = [1] if seed is None else [seed]
    if seed is None:
        known = sorted({e.config.seed for e in profile.experiments})
        complete = [s for s in known if {f"{network}-{method}-s{s}" for method in methods} <= everything]
        seeds = complete or seeds
    candidates = [select(profile, [f"{network}-{method}-s{s}" for method in methods]) for s in seeds]
    for chosen in candidates:
        if all((e.config.folder() / "spectra.npz").is_file() for e in chosen):
            return chosen
    return candidates[0]


def read_recorded(
    load: Callable[[Path], pd.DataFrame], folders: Mapping[str, Path]
) -> dict[str, pd.DataFrame]:
    """Read what the runs recorded, and say in words which of them recorded nothing.

    Args:
        load: ``load_spectra`` or ``load_gradients`` of :mod:`lrpet.training.recording`.
        folders: method → folder of a finished run.

    Returns:
        Method → table, for the runs that have one.

    >>> from lrpet.training.recording import load_gradients
    >>> read_recorded(load_gradients, {"lrp": Path("digits-resnet8-lrp")})
    lrp: not recorded; digits-resnet8-lrp is older than recording, move the folder away to run it anew
    {}
    """
    tables = {}
    for method, folder in folders.items():
        try:
            tables[method] = load(folder)
        except FileNotFoundError:
            advice = f"{folder.name} is older than recording, move the folder away to run it anew"
            print(f"{method}: not recorded; {advice}")
    return tables


def energy_shares(spectra: Mapping[str, pd.DataFrame], ranks: Mapping[str, int]) -> pd.DataFrame:
    """Compute the share of a weight's energy in its first R singular values, and that after the projection.

    Args:
        spectra: method → table of ``load_spectra``.
        ranks: layer → R; layers without a rank are left out.

    Returns:
        A row per method, epoch and layer: ``kept_pct`` = 100·Σ_{i≤R} s_i² / E before the projection,
        ``after_pct`` = 100·E after / E before, NaN where no projection ended the epoch. Both are those of the
        weight itself; with BN rectification the projection looks at the weight as BatchNorm scales it, whose
        shares are others.

    >>> s = pd.DataFrame({"when": ["before", "before", "after"], "i": [1, 2, 1], "s": [4.0, 3.0, 5.0]})
    >>> energy_shares({"lrpet": s.assign(epoch=1, layer="conv")}, {"conv": 1}).round(1).values.tolist()
    [['lrpet', 1, 'conv', 1, 64.0, 100.0]]
    """
    parts = []
    for method, table in spectra.items():
        table = table.assign(
            rank=table["layer"].map(ranks), energy=np.square(table["s"].astype(float))
        ).dropna(subset="rank")
        table["kept"] = table["energy"].where(table["i"] <= table["rank"], 0.0)
        sums = table.groupby(["when", "epoch", "layer"], sort=False)[["energy", "kept"]].sum()
        before = sums.xs("before")
        after = sums["energy"].xs("after") if (table["when"] == "after").any() else pd.Series(dtype=float)
        after = 100 * after.reindex(before.index) / before["energy"]
        shares = pd.DataFrame({"kept_pct": 100 * before["kept"] / before["energy"], "after_pct": after})
        parts.append(shares.reset_index().assign(method=method))
    columns = ["method", "epoch", "layer", "rank", "kept_pct", "after_pct"]
    if not parts:
        return pd.DataFrame(columns=columns)
    everything = pd.concat(parts, ignore_index=True)
    return everything.assign(rank=everything["layer"].map(ranks))[columns]


def gradient_ratios(gradients: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute LRPET's gradient norms divided by LRP's, one row per epoch and layer.

    Returns:
        ``epoch``, ``layer``, ``gradient`` = ratio of ‖∂L/∂M‖, ``scale_free`` = ratio of ‖M‖·‖∂L/∂M‖; empty
        where one of the two is missing.

    >>> table = pd.DataFrame({"epoch": [1], "layer": "conv", "gradient_norm": [2.0], "weight_norm": [3.0]})
    >>> gradient_ratios({"lrp": table, "lrpet": table.assign(gradient_norm=1.0)}).values.tolist()
    [[1, 'conv', 0.5, 0.5]]
    """
    if not {"lrp", "lrpet"} <= set(gradients):
        return pd.DataFrame(columns=["epoch", "layer", "gradient", "scale_free"])
    both = gradients["lrpet"].merge(gradients["lrp"], on=["epoch", "layer"], suffixes=("", "_lrp"))
    ratio = both["gradient_norm"].clip(lower=TINY) / both["gradient_norm_lrp"].clip(lower=TINY)
    return both[["epoch", "layer"]].assign(
        gradient=ratio, scale_free=ratio * both["weight_norm"] / both["weight_norm_lrp"]
    )
