"""What can be read off the spectra and gradient norms that runs recorded: tables, and sentences computed from them.

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
    "describe_energy",
    "describe_gradients",
    "describe_projections",
    "energy_shares",
    "gradient_ratios",
    "read_recorded",
]
COLUMNS = ("gradient", "norm_product", "bound")
TINY = 1e-12  # a gradient norm below this counts as this, so that it has a logarithm


def choose_runs(
    profile: Profile, network: str, methods: Sequence[str], seed: int | None = None
) -> list[Experiment]:
    """Return the experiments ``<network>-<method>-s<seed>`` of one seed, an experiment a method.

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
    has = lambda seed: all(
        any(e.name == f"{network}-{method}-s{seed}" for e in profile.experiments) for method in methods
    )
    seeds = (
        [s for s in sorted({e.config.seed for e in profile.experiments}) if has(s)] if seed is None else []
    )
    candidates = [
        select(profile, [f"{network}-{method}-s{s}" for method in methods]) for s in seeds or [seed or 1]
    ]
    recorded = [
        chosen for chosen in candidates if all((e.config.folder() / "spectra.npz").is_file() for e in chosen)
    ]
    return (recorded or candidates)[0]


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
    lrp: not recorded; digits-resnet8-lrp is older than recording, delete the folder to run it anew
    {}
    """
    tables = {}
    for method, folder in folders.items():
        try:
            tables[method] = load(folder)
        except FileNotFoundError:
            print(
                f"{method}: not recorded; {folder.name} is older than recording, delete the folder to run it anew"
            )
    return tables


def energy_shares(spectra: Mapping[str, pd.DataFrame], ranks: Mapping[str, int]) -> pd.DataFrame:
    """Compute which share of a weight's energy its first R singular values hold, and which is there after the projection.

    Args:
        spectra: method → table of ``load_spectra``.
        ranks: layer → R; layers without a rank are left out.

    Returns:
        A row a method, epoch and layer: ``kept_pct`` = 100·Σ_{i≤R} s_i² / E before the projection, ``after_pct`` = 100·E after /
        E before, NaN where no projection ended the epoch. Both are those of the weight itself; with BN rectification
        the projection looks at the weight as BatchNorm scales it, whose shares are others.

    >>> s = pd.DataFrame({"epoch": 1, "when": ["before", "before", "after"], "layer": "conv", "i": [1, 2, 1], "s": [4.0, 3.0, 5.0]})
    >>> energy_shares({"lrpet": s}, {"conv": 1}).round(1).values.tolist()
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
    """Compute LRPET's gradient norms divided by LRP's, a row an epoch and layer.

    Returns:
        ``epoch``, ``layer``, ``gradient`` = ratio of ‖∂L/∂M‖, ``scale_free`` = ratio of ‖M‖·‖∂L/∂M‖; empty where one of the two is missing.

    >>> table = pd.DataFrame({"epoch": [1], "layer": ["conv"], "gradient_norm": [2.0], "weight_norm": [3.0]})
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


def describe_energy(shares: pd.DataFrame) -> str:
    """Say what :func:`energy_shares` shows at the last epoch, as a Markdown list.

    >>> print(describe_energy(energy_shares({}, {})))
    - Nothing was recorded, so nothing is said.
    """
    if not len(shares):
        return "- Nothing was recorded, so nothing is said."
    begin, end = shares["epoch"].min(), shares["epoch"].max()
    lines, kept = [], {}
    for method, rows in shares.groupby("method", sort=False):
        first, last = (rows[rows["epoch"] == epoch] for epoch in (begin, end))
        kept[method], least = last["kept_pct"].mean(), last.loc[last["kept_pct"].idxmin()]
        lines.append(
            f"- **{method}**: the first R singular values hold {first['kept_pct'].mean():.1f} % of the energy in epoch {begin} and "
            f"{kept[method]:.1f} % in epoch {end}, before the projection, mean of {len(last)} layers; least in `{least['layer']}`, "
            f"{least['kept_pct']:.1f} %."
        )
        if rows["after_pct"].notna().any():
            ends = [
                f"{part['after_pct'].min():.1f} to {part['after_pct'].max():.1f} % in epoch {part['epoch'].max()}"
                for part in (first, last)
            ]
            lines[-1] += (
                f" Of the energy that a weight had before the projection it has after it {' and '.join(ends)}."
            )
    for method in [name for name in ("lrp", "lrpet") if name in kept and "dense" in kept]:
        agrees = "agrees" if kept[method] > kept["dense"] else "does not agree"
        lines.append(
            f"- Training with {method} gathers the energy in the values that are kept: {agrees} "
            f"({kept[method]:.1f} % against {kept['dense']:.1f} % in the dense network)."
        )
    return "\n".join(lines + ["- One seed; a share says nothing about accuracy."])


def describe_gradients(gradients: Mapping[str, pd.DataFrame], network: str) -> str:
    """Say whether LRPET's gradients are larger than LRP's in the first layer and on the whole, as a Markdown list.

    Means are over the recorded epochs; ratios of norms are averaged as logarithms.

    >>> print(describe_gradients({}, "resnet8"))
    - resnet8: LRP and LRPET were not both recorded, so nothing is said.
    """
    ratios = gradient_ratios(gradients)
    if not len(ratios):
        return f"- {network}: LRP and LRPET were not both recorded, so nothing is said."
    first = gradients["lrp"]["layer"].iloc[0]
    lines = []
    for column, name in (("gradient", "‖∂L/∂M‖"), ("scale_free", "‖M‖·‖∂L/∂M‖")):
        log = np.log(ratios[column])
        lowest, everywhere = np.exp(log[ratios["layer"] == first].mean()), np.exp(log.mean())
        cells = 100 * (log > 0).mean()
        agrees = "agrees" if lowest > 1 else "does not agree"
        lines.append(
            f"- {network}, {name}, LRPET / LRP: {lowest:.3g} in the first layer (`{first}`), {everywhere:.3g} over all layers; above 1 in "
            f"{cells:.0f} % of layers and epochs. That gradients fade less with LRPET {agrees} in the first layer; one seed."
        )
    return "\n".join(lines)


def describe_projections(tables: Mapping[str, pd.DataFrame], weights: str) -> str:
    """Say how much of the gradient of the dense network arrives at the first layer after one projection, as a Markdown item.

    Args:
        tables: of :func:`lrpet.gradients.compare_projections`; may be empty.
        weights: whose weights were projected.

    >>> table = pd.DataFrame({"gradient": [1.0, 2.0], "bound": [8.0, 2.0], "norm_product": [3.0, 1.0]})
    >>> print(describe_projections({"dense": table, "lrp": table / 2, "lrpet": table}, "random weights"))
    - random weights: at the first of 2 layers arrives, relative to the dense network, LRP 0.5, LRPET 1. The product of the norms ‖M‖ \
above it says LRP 0.5, LRPET 1: that gradients follow it agrees, within a factor of 1. The bound by operator norms says LRP 0.5, LRPET 1, \
and is 8 times or more what is measured.
    """
    if not tables:
        return f"- {weights}: not in the store, so nothing is said."
    first = {
        column: {
            name: table[column].iloc[0] / tables["dense"][column].iloc[0] for name, table in tables.items()
        }
        for column in COLUMNS
    }
    say = lambda column: f"LRP {first[column]['lrp']:.2g}, LRPET {first[column]['lrpet']:.2g}"
    apart = max(
        np.exp(abs(np.log(first["gradient"][name] / first["norm_product"][name])))
        for name in ("lrp", "lrpet")
    )
    loose = min(table["bound"].iloc[0] / table["gradient"].iloc[0] for table in tables.values())
    return (
        f"- {weights}: at the first of {len(tables['dense'])} layers arrives, relative to the dense network, {say('gradient')}. The product of the "
        f"norms ‖M‖ above it says {say('norm_product')}: that gradients follow it {'agrees' if apart < 3 else 'does not agree'}, within a factor of "
        f"{apart:.2g}. The bound by operator norms says {say('bound')}, and is {loose:.1g} times or more what is measured."
    )
