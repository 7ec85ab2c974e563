"""Differences between methods, ablations, and the paper's claims with their verdicts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from lrpet.config import RunConfig
from lrpet.experiments import MAIN
from lrpet.tables.names import setting_of
from lrpet.tables.rows import ABLATIONS, NOT_RUN, counted_cost, spread
from lrpet.training.recording import load_gradients

__all__ = ["ablation_table", "claims_table", "differences", "summary_of_ablations"]


def _paired(left: pd.DataFrame, right: pd.DataFrame) -> pd.Series:
    """Return the differences in last-epoch accuracy of two experiments, one for each seed that both have finished."""
    by_seed = lambda side: pd.Series(
        side.top1_pct.values, index=[config.seed for config in side.config], dtype=float
    )
    return (by_seed(left) - by_seed(right)).dropna()


def _decide(d: pd.Series, words: tuple[str, str, str, str]) -> dict:
    """Apply the rule of all tables to differences over seeds: decided where the mean exceeds twice its standard error, n ≥ 3.

    ``words`` are the verdicts for: above zero, below zero, undecided, nothing to decide on.
    """
    error = d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
    decided = len(d) >= 3 and abs(d.mean()) > 2 * error
    verdict = words[3] if d.empty else words[2] if not decided else words[0] if d.mean() > 0 else words[1]
    return {
        "difference": NOT_RUN if d.empty else f"{d.mean():+.2f}",
        "standard_error": f"{error:.2f}" if len(d) > 1 else "",
        "n": len(d),
        "verdict": verdict,
    }


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the difference in last-epoch accuracy between pairs of experiments, seed by seed, with its standard error.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row for each pair that shares a network and, between low-rank methods, a ratio. The verdict is "higher" or
        "lower" where the difference exceeds twice its standard error over at least three common seeds, "undecided" otherwise.
    """
    rows = []
    for network, group in runs.groupby("network", sort=False):
        names = list(dict.fromkeys(group[group.feeds != ABLATIONS].label))
        main = group[(group.label == "LRPET") & group.feeds.isin(MAIN)].ratio.dropna()
        pairs = [("LRPET", name) for name in names if name != "LRPET"] + [("LRP", "dense")]
        for a, b in pairs:
            for ratio, left in group[group.label == a].groupby("ratio"):
                alone = (b == "dense") | (
                    group.ratio.isna() & main.eq(ratio).any()
                )  # what has no ratio stands beside the main one
                right = group[(group.label == b) & ((group.ratio == ratio) | alone)]
                if right.empty:
                    continue
                result = _decide(_paired(left, right), ("higher", "lower", "undecided", "not tested"))
                rows.append(
                    {
                        "network": network,
                        "difference": f"{a} − {b}",
                        "prune_ratio": f"{ratio:g}",
                        "top1_difference_pct": result["difference"],
                        "standard_error_pct": result["standard_error"],
                        "n": result["n"],
                        "verdict": result["verdict"],
                    }
                )
    return pd.DataFrame(rows)


# What each ablation varies, as fields of RunConfig; all other settings are those of LRPET at the ratio of the main table.
ABLATED = {
    "energy transfer × BN rectification": ("method", "bn_rectification"),
    "projection interval": ("projection_interval", "projection_unit"),
    "prune ratio": ("prune_ratio",),
    "from scratch or from a trained network": ("pretrain_epochs", "finetune_learning_rate"),
    "constant in undoing the BN scale": ("row_eps",),
    "residual factor": ("residual",),
}


def ablation_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return each ablation: LRPET as it is beside LRPET with one thing changed, on the network that has ablations.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row a setting, grouped by question: ``setting``, cost, accuracy as mean ± sample standard deviation (n), and the
        difference to LRPET as it is, over common seeds, with its standard error.
    """
    columns = [
        "question",
        "experiment",
        "setting",
        "prune_ratio",
        "macs_m",
        "top1_pct",
        "difference_pct",
        "standard_error_pct",
        "n",
        "verdict",
    ]
    rows = []
    for network in dict.fromkeys(runs[runs.feeds == ABLATIONS].network):
        group = runs[runs.network == network]
        base = group[(group.label == "LRPET") & group.feeds.isin(MAIN)]
        if base.empty:
            continue
        for question, free in ABLATED.items():
            fits = [
                config.method in ("lrp", "lrpet") and _same_but(free, config, base.iloc[0].config)
                for config in group.config
            ]
            by_value = lambda seeds, free=free: [
                getattr(seeds.iloc[0].config, name) or 0 for name in reversed(free)
            ]
            for seeds in sorted(
                (seeds for _, seeds in group[fits].groupby("experiment", sort=False)), key=by_value
            ):
                config = seeds.iloc[0].config
                macs = counted_cost(seeds.iloc[0])[0]
                is_base = (
                    seeds.iloc[0].label == "LRPET" and config.prune_ratio == base.iloc[0].config.prune_ratio
                )
                result = _decide(_paired(seeds, base), ("higher", "lower", "undecided", "not tested"))
                rows.append(
                    {
                        "question": question,
                        "experiment": seeds.iloc[0].experiment,
                        "setting": setting_of(config, free),
                        "prune_ratio": f"{config.prune_ratio:g}",
                        "macs_m": f"{macs / 1e6:.2f}",
                        "top1_pct": spread(seeds.top1_pct),
                        "difference_pct": "" if is_base else result["difference"],
                        "standard_error_pct": "" if is_base else result["standard_error"],
                        "n": seeds.top1_pct.notna().sum() if is_base else result["n"],
                        "verdict": "LRPET as it is" if is_base else result["verdict"],
                    }
                )
    return pd.DataFrame(rows, columns=columns)


def _same_but(free: tuple[str, ...], a: RunConfig, b: RunConfig) -> bool:
    """Tell whether two configurations agree in all but some fields and the seed."""
    a, b = a.to_dict(), b.to_dict()
    return all(a[name] == b[name] for name in a if name not in (*free, "seed"))


def summary_of_ablations(table: pd.DataFrame) -> str:
    """Return in words what the ablations of a profile decide, computed from :func:`ablation_table`."""
    changed = table[table.verdict != "LRPET as it is"]
    lines = []
    for row in changed.itertuples():
        if row.verdict in ("higher", "lower"):
            how = f"{row.difference_pct} points, standard error {row.standard_error_pct}, n={row.n}"
            lines.append(f"- {row.question}, {row.setting}: {row.verdict} than LRPET as it is ({how}).")
    tested = (changed.verdict != "not tested").sum()
    lines.append(
        f"- {len(lines)} of {len(changed)} changed settings differ from LRPET by more than chance; {tested} of them were run."
    )
    if len(lines) == 1:
        lines.append(
            "- The paper reports that energy transfer and BN rectification help: neither shown nor refuted by these runs."
        )
    return "\n".join(lines)


# The paper's claims about accuracy: LRPET is better than the experiments of this label, at the same network, ratio and epochs.
CLAIMS = {
    "energy transfer helps": "LRP",
    "BN rectification helps": "LRPET without BN rectification",
    "from scratch beats from a trained network": "LRPET, from a trained network",
    "beats SVD and re-training": "SVD, then fine-tuned",
    "beats pruning": "filter pruning",
}


def claims_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the claims of the paper with evidence and verdict, computed from the store by one rule.

    A claim holds where the mean difference over at least three seeds is above twice its standard error, it does not hold here where
    it is below minus that, is undecided between or with fewer seeds, and not tested without a run. Accuracy is compared
    in points of the last epoch, gradients in the decimal logarithm of the ratio LRPET to LRP of the first layer's
    ‖M‖·‖∂L/∂M‖, averaged over the recorded epochs; the gradient alone would grow where a BatchNorm follows a smaller M.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Source: arXiv 2204.05566, the claims; the rule is ours.
    """
    words = ("holds", "does not hold here", "undecided", "not tested")
    rows = []
    for network in dict.fromkeys(runs[runs.feeds.isin(MAIN)].network):
        group = runs[runs.network == network]
        base = group[(group.label == "LRPET") & group.feeds.isin(MAIN) & group.ratio.notna()]
        if base.empty:
            continue
        base = base[base.ratio == base.iloc[0].ratio]
        for claim, label in CLAIMS.items():
            other = group[(group.label == label) & (group.ratio == base.iloc[0].ratio)]
            if len(other) or network == runs.iloc[0].network:
                result = _decide(_paired(base, other) if len(other) else pd.Series(dtype=float), words)
                rows.append(
                    {
                        "claim": claim,
                        "network": network,
                        "evidence": f"top-1, points: LRPET − {label}",
                        **result,
                    }
                )
    for network in dict.fromkeys(runs.network):
        both = [runs[(runs.network == network) & (runs.label == label)] for label in ("LRPET", "LRP")]
        if all(map(len, both)) and both[0].iloc[0].feeds in (*MAIN, "gradients"):
            result = _decide(_gradient_ratios(*both), words)
            rows.append(
                {
                    "claim": "gradients fade less",
                    "network": network,
                    "evidence": "log10 of ‖M‖·‖∂L/∂M‖, first layer: LRPET − LRP",
                    **result,
                }
            )
    return pd.DataFrame(
        rows, columns=["claim", "network", "evidence", "difference", "standard_error", "n", "verdict"]
    )


def _gradient_ratios(left: pd.DataFrame, right: pd.DataFrame) -> pd.Series:
    """Return the mean difference of the logarithm of the first layer's ‖M‖·‖∂L/∂M‖, for each seed that recorded it on both sides."""

    def logarithms(side: pd.DataFrame) -> dict[int, float]:
        values = {}
        for row in side.dropna(subset="top1_pct").itertuples():
            if (Path(row.folder) / "gradients.csv").is_file():
                table = load_gradients(row.folder)
                first = table[table.layer == table.layer.iloc[0]]
                norms = first.gradient_norm * first.weight_norm
                values[row.config.seed] = float(np.log10(norms.clip(lower=1e-30)).mean())
        return values

    left, right = logarithms(left), logarithms(right)
    return pd.Series({seed: left[seed] - right[seed] for seed in left if seed in right}, dtype=float)
