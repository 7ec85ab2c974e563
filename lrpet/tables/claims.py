"""Differences between methods, ablations, and the paper's claims with their verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lrpet.config import RunConfig
from lrpet.experiments import MAIN
from lrpet.registry import metric_of
from lrpet.tables.names import setting_of
from lrpet.tables.rows import ABLATIONS, counted_cost, spread
from lrpet.tables.statistics import Words, decide
from lrpet.training.recording import load_gradients

__all__ = ["ablation_table", "claims_table", "differences", "summary_of_ablations"]
HIGHER = Words("higher", "lower")
HOLDS = Words("holds", "does not hold")
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}
AS_IT_IS = ("LRPET as it is", "LRP as it is")
DECIDED = ("difference", "ci95", "p", "p_holm", "n", "detectable", "verdict", "remark")


def _paired(left: pd.DataFrame, right: pd.DataFrame) -> pd.Series:
    """Return the differences in the last epoch's score of two experiments, per seed that both finished."""
    left, right = (
        pd.Series(
            side[metric_of(side).column].values, index=[config.seed for config in side.config], dtype=float
        )
        for side in (left, right)
    )
    return (left - right).dropna()


def _remark(d: pd.Series, runs: pd.DataFrame) -> str:
    """Say so where a mean difference is below the sampling error of one accuracy, √(p(1 − p)/images)."""
    images = TEST_IMAGES.get(runs.iloc[0].config.dataset)
    if not images or d.empty:
        return ""
    p = runs.top1_pct.mean() / 100
    error = 100 * math.sqrt(p * (1 - p) / images)
    if abs(d.mean()) >= error:
        return ""
    return f"below the sampling error of {images:,} test images, {error:.2f}"


def _decided(names: list[dict], samples: list[pd.Series | None], words: Words) -> pd.DataFrame:
    """Return a table of rows with the columns of :func:`lrpet.tables.statistics.decide`, ``remark`` last."""
    rows = [name | decision for name, decision in zip(names, decide(samples, words), strict=True)]
    table = pd.DataFrame(rows)
    return table[[*(c for c in table.columns if c != "remark"), "remark"]] if rows else table


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the difference in last-epoch accuracy between pairs of experiments, in points, paired by seed.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row per pair that shares a network and, between low-rank methods, a ratio: mean difference, 95 %
        interval, p, p adjusted by Holm over the table, n, the difference that n seeds could have shown (80 %
        power), and the verdict "higher", "lower", "undecided" or "too few seeds" of
        :mod:`lrpet.tables.statistics`.
    """
    names, samples = [], []
    for network, group in runs.groupby("network", sort=False):
        labels = list(dict.fromkeys(group[group.feeds != ABLATIONS].label))
        main = group[(group.label == "LRPET") & group.feeds.isin(MAIN)].ratio.dropna()
        for a, b in [("LRPET", label) for label in labels if label != "LRPET"] + [("LRP", "dense")]:
            for ratio, left in group[group.label == a].groupby("ratio"):
                # what has no ratio is compared with the main one
                alone = (b == "dense") | (group.ratio.isna() & main.eq(ratio).any())
                right = group[(group.label == b) & ((group.ratio == ratio) | alone)]
                if len(right):
                    d = _paired(left, right)
                    row = {"network": network, "pair": f"{a} − {b}", "prune_ratio": f"{ratio:g}"}
                    names.append(row | {"remark": _remark(d, left)})
                    samples.append(d)
    return _decided(names, samples, HIGHER)


# What each ablation varies, as fields of RunConfig; all else is as in LRPET, or in LRP where its name says
# so, at the ratio of the main table.
ABLATED = {
    "energy transfer × BN rectification": ("method", "bn_rectification"),
    "projection interval": ("projection_interval", "projection_unit"),
    "projection interval, LRP": ("projection_interval", "projection_unit"),
    "prune ratio": ("prune_ratio",),
    "prune ratio, LRP": ("prune_ratio",),
    "from scratch or from a trained network": ("pretrain_epochs", "finetune_learning_rate"),
    "constant in undoing the BN scale": ("row_eps",),
    "residual factor": ("residual",),
    "unfolding of k×k weights": ("unfolding",),
}


def ablation_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return each ablation: LRPET as it is and with one thing changed, on the network that has ablations.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row per setting, grouped by question: ``setting``, cost, accuracy as mean and 95 % interval (n), and
        the difference to LRPET as it is, decided as in :func:`differences`.
    """
    names, samples, column = [], [], metric_of(runs).column
    for network in dict.fromkeys(runs[runs.feeds == ABLATIONS].network):
        group = runs[runs.network == network]
        for question, free in ABLATED.items():
            method = "LRP" if question.endswith(", LRP") else "LRPET"
            base = group[(group.label == method) & group.feeds.isin(MAIN)]
            for seeds in _settings(group, free, base.iloc[0].config) if len(base) else ():
                first = seeds.iloc[0]
                same = first.label == method and first.ratio == base.iloc[0].ratio
                samples.append(None if same else _paired(seeds, base))
                names.append(
                    {
                        "question": question,
                        "experiment": first.experiment,
                        "setting": setting_of(first.config, free),
                        "prune_ratio": f"{first.ratio:g}",
                        "macs_m": f"{counted_cost(first)[0] / 1e6:.2f}",
                        column: spread(seeds[column]),
                        "remark": "" if same else _remark(samples[-1], base),
                    }
                )
    columns = ["question", "experiment", "setting", "prune_ratio", "macs_m", column, *DECIDED]
    table = _decided(names, samples, HIGHER).reindex(columns=columns)
    as_it_is = [d is None for d in samples]
    table.loc[as_it_is, "verdict"] = [AS_IT_IS[q.endswith(", LRP")] for q in table.question[as_it_is]]
    return table[table.groupby("question").question.transform("size") > 1]  # no question of one setting


def _settings(group: pd.DataFrame, free: tuple[str, ...], base: RunConfig) -> list[pd.DataFrame]:
    """Return the runs of each experiment that differs from LRPET in some fields only, ordered by these."""

    def values(seeds: pd.DataFrame) -> list:
        found = [getattr(seeds.iloc[0].config, name) or 0 for name in reversed(free)]
        return [bool(value) if "unfolding" in free else value for value in found]  # which may be a map

    fits = [config.method in ("lrp", "lrpet") and _same_but(free, config, base) for config in group.config]
    return sorted((seeds for _, seeds in group[fits].groupby("experiment", sort=False)), key=values)


def _same_but(free: tuple[str, ...], a: RunConfig, b: RunConfig) -> bool:
    """Tell whether two configurations agree in all but some fields and the seed."""
    a, b = a.to_dict(), b.to_dict()
    return all(a[name] == b[name] for name in a if name not in (*free, "seed"))


def ablations_with_verdict(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of an :func:`ablation_table` that were tested, and those of them that differ."""
    tested = table[table.verdict.isin(HIGHER.tested)]
    return tested, tested[tested.verdict != HIGHER.undecided]


def summary_of_ablations(table: pd.DataFrame) -> str:
    """Return in words what the ablations of a profile decide, computed from :func:`ablation_table`."""
    tested, decided = ablations_with_verdict(table)
    changed = (~table.verdict.isin(AS_IT_IS)).sum()
    lines = [
        f"- {row.question}, {row.setting}: {row.verdict} than LRPET as it is"
        f" ({row.difference} points, 95 % interval {row.ci95}, p = {row.p_holm} after Holm, n={row.n})."
        for row in decided.itertuples()
    ]
    lines.append(
        f"- {len(tested)} of {changed} changed settings have three seeds or more, which a verdict needs;"
        f" {len(decided)} of these differ from LRPET by more than chance."
    )
    if decided.empty:
        lines.append(
            "- The paper reports that energy transfer and BN rectification help: neither shown nor refuted by"
            " these runs."
        )
    return "\n".join(lines)


# The paper's claims about accuracy: LRPET is better than this at the same network, ratio and epochs.
CLAIMS = {
    "energy transfer helps": "LRP",
    "energy transfer helps at equal effective learning rates": "LRP, with LRPET's steps",
    "BN rectification helps": "LRPET without BN rectification",
    "from scratch beats from a trained network": "LRPET, from a trained network",
    "beats SVD and re-training": "SVD, then fine-tuned",
    "beats pruning": "filter pruning",
}
WITHOUT_BATCHNORM = "energy transfer helps without BatchNorm"
PLAIN = "gradients"  # what experiments on plain networks feed


def claims_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the claims of the paper with evidence and verdict, computed from the store by one rule.

    A claim holds, or does not hold, where the p of the mean difference over three seeds or more, adjusted by
    Holm over the claims of the table, is below 0.05; otherwise it is undecided. One seed or two are too few
    for a verdict, and without a run a claim is not tested. Accuracy is compared in points of the last epoch,
    gradients in the decimal logarithm of the ratio LRPET to LRP of the first layer's ‖M‖·‖∂L/∂M‖, averaged
    over the recorded epochs; the gradient alone would grow where a BatchNorm follows a smaller M.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Source: arXiv 2204.05566, the claims; the rule is ours.
    """
    names, samples = [], []

    def add(claim: str, network: str, evidence: str, d: pd.Series, remark: str) -> None:
        samples.append(d)
        names.append({"claim": claim, "network": network, "evidence": evidence, "remark": remark})

    for network in dict.fromkeys(runs[runs.feeds.isin(MAIN)].network):
        group = runs[runs.network == network]
        base = group[(group.label == "LRPET") & group.feeds.isin(MAIN) & group.ratio.notna()]
        if base.empty:
            continue
        base = base[base.ratio == base.iloc[0].ratio]
        for claim, label in CLAIMS.items():
            other = _strongest(group[(group.label == label) & (group.ratio == base.iloc[0].ratio)])
            if len(other) or network == runs.iloc[0].network:
                d = _paired(base, other)
                add(claim, network, f"top-1, points: LRPET − {label}", d, _remark(d, base))
    for network in dict.fromkeys(runs.network):
        both = [runs[(runs.network == network) & (runs.label == label)] for label in ("LRPET", "LRP")]
        both = [seeds[seeds.feeds.isin((*MAIN, PLAIN))] for seeds in both]
        if any(seeds.empty for seeds in both):
            continue
        if both[0].iloc[0].feeds == PLAIN:
            d = _paired(*both)
            add(WITHOUT_BATCHNORM, network, "top-1, points: LRPET − LRP", d, _remark(d, both[0]))
        evidence = "log10 of ‖M‖·‖∂L/∂M‖, first layer: LRPET − LRP"
        add("gradients fade less", network, evidence, _gradient_ratios(*both), "")
    return _decided(names, samples, HOLDS).reindex(columns=["claim", "network", "evidence", *DECIDED])


def _strongest(seeds: pd.DataFrame) -> pd.DataFrame:
    """Return, of several experiments that a table names alike, the one with the best mean."""
    metric = metric_of(seeds)
    if seeds[metric.column].isna().all():
        return seeds[seeds.experiment == seeds.experiment.iloc[0]] if len(seeds) else seeds
    means = metric.sign * seeds.groupby("experiment")[metric.column].mean()
    return seeds[seeds.experiment == means.idxmax()]


def _gradient_ratios(left: pd.DataFrame, right: pd.DataFrame) -> pd.Series:
    """Return the mean difference of log10 of the first layer's ‖M‖·‖∂L/∂M‖ per seed recorded for both."""

    def logarithms(side: pd.DataFrame) -> dict[int, float]:
        values = {}
        for row in side.dropna(subset=metric_of(side).column).itertuples():
            if (Path(row.folder) / "gradients.csv").is_file():
                table = load_gradients(row.folder)
                first = table[table.layer == table.layer.iloc[0]]
                norms = first.gradient_norm * first.weight_norm
                values[row.config.seed] = float(np.log10(norms.clip(lower=1e-30)).mean())
        return values

    left, right = logarithms(left), logarithms(right)
    return pd.Series({seed: left[seed] - right[seed] for seed in left if seed in right}, dtype=float)
