"""Every table, from the store: DataFrames in, DataFrames out, written as Markdown and CSV."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lrpet.config import METHODS, PROJECT, RunConfig, results_root
from lrpet.cost import cost
from lrpet.experiments import MAIN, load_profile
from lrpet.methods import build_network, ranks_of, target_macs
from lrpet.models import MODELS, build_model
from lrpet.ranks import compressible_layers, ranks_from_ratio
from lrpet.recording import load_gradients
from lrpet.runs import load_runs

__all__ = [
    "ablation_table",
    "accuracy_table",
    "claims_table",
    "comparison",
    "cost_table",
    "differences",
    "headline",
    "imagenet_table",
    "profile_runs",
    "projection_share",
    "provenance",
    "published",
    "replication_cost",
    "summary_of",
    "summary_of_ablations",
    "verdict",
    "write_pages",
    "write_tables",
]

NOT_RUN = "not run"
NOT_HERE, NO_RANKS = "not here", "ranks not published"  # a network or method of others; a network whose ranks nobody can know
COST_COLUMNS = ("network", "dataset", "method", "prune_ratio", "macs_m", "paper_macs_m", "params_m", "params_without_bn_m", "paper_params_m")
COST_COLUMNS += ("macs_reduction_pct", "paper_macs_reduction_pct", "paper_source")
METHOD_NAMES = {
    "dense": "dense",
    "lrp": "LRP",
    "lrpet": "LRPET",
    "svd_finetune": "SVD, then fine-tuned",
    "factorized": "trained as factors",
    "trp": "TRP",
    "warmup_switch": "dense, then factors",
    "svd_training": "SVD training",
    "filter_pruning": "filter pruning",
    "narrow": "narrow network",
}
COMPETITORS, ABLATIONS = "competitors", "ablations"  # what experiments beside the main table feed
MACS_TOLERANCE = 0.02  # two networks whose multiply-adds differ by less are compared as equal
USUAL_INTERVALS = {"imagenet": (250, "iteration"), "imagenette": (50, "iteration")}  # between projections, where it is not the methods' own
PUBLISHED_NAMES = {"dense": "baseline"}  # where the published tables use another word


def published() -> pd.DataFrame:
    """Return the published numbers, ``paper/reported.csv``.

    >>> published().query("model == 'resnet56' and prune_ratio == 0.57").top1_pct.item()
    93.27
    """
    return pd.read_csv(PROJECT / "paper" / "reported.csv")


def _label(config: RunConfig) -> str:
    """Return the method as tables name it, with every setting of it that is not the default."""
    return ", ".join([METHOD_NAMES[config.method], *_variant(config)]).replace(", without BN", " without BN")


def _variant(config: RunConfig) -> list[str]:
    defaults = METHODS[config.method]
    differs = lambda name: name in defaults and getattr(config, name) != defaults[name]
    words = []
    if config.bn_rectification is False:
        words.append("without BN rectification")
    if config.method in ("lrp", "lrpet") and config.pretrain_epochs:
        words.append("from a trained network")
    usual = USUAL_INTERVALS.get(config.profile, (defaults.get("projection_interval"), defaults.get("projection_unit")))
    if config.projection_unit is not None and (config.projection_interval, config.projection_unit) != usual:
        words.append(f"every {config.projection_interval} {config.projection_unit}s".replace("every 1 epochs", "every epoch"))
    if differs("residual"):
        words.append(f"residual {config.residual:g}")
    if differs("row_eps"):
        words.append(f"row_eps {config.row_eps:g}" if config.row_eps else "exact inverse of the scale")
    if config.product_decay is False:
        words.append("decay on each factor")
    if config.rank_rule == "stable_rank":
        words.append("stable rank")
    if differs("nuclear_norm"):
        words.append(f"nuclear norm {config.nuclear_norm:g}" if config.nuclear_norm else "no nuclear norm")
    return words


def profile_runs(profile: str, results: Path | None = None) -> pd.DataFrame:
    """Return a row for every run a profile asks for, finished or not, in the order of ``experiments.yaml``.

    Args:
        profile: smoke, short, paper, imagenette or imagenet.
        results: root of the store.

    Returns:
        ``experiment``, ``feeds``, ``network``, ``label``, ``run_id`` and, where the run is finished, every column of
        :func:`lrpet.load_runs`; missing values elsewhere.
    """
    store = load_runs((results or results_root()) / profile)
    wanted = pd.DataFrame(
        [
            {
                "experiment": e.name.rsplit("-s", 1)[0],
                "feeds": e.feeds,
                "network": e.config.model,
                "label": _label(e.config),
                "run_id": e.config.run_id,
                "ratio": e.config.prune_ratio,
                "config": e.config,
            }
            for e in load_profile(profile).experiments
        ]
    )
    columns = store if len(store) else pd.DataFrame(columns=["run_id", "top1_pct", "best_top1_pct", "macs", "params", "dense_macs", "train_seconds"])
    return wanted.merge(columns, on="run_id", how="left")


def _spread(values: pd.Series) -> str:
    """Format seeds as "mean ± sample standard deviation (n)"; one seed has no deviation."""
    values = values.dropna()
    if values.empty:
        return NOT_RUN
    return f"{values.mean():.2f} (n=1)" if len(values) == 1 else f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (n={len(values)})"


def accuracy_table(runs: pd.DataFrame, reported: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and cost of each experiment of a profile beside the published row of the same network, method and ratio.

    Args:
        runs: of :func:`profile_runs`, for one profile.
        reported: of :func:`published`.

    Returns:
        A row an experiment. ``top1_pct`` is the last epoch's, mean ± sample standard deviation over seeds. What was not
        run says so. The difference to the paper is given for the paper's own schedule only.
    """
    rows = []
    target = _targets(runs)
    for _, seeds in runs[runs.feeds != ABLATIONS].groupby("experiment", sort=False):
        first, done = seeds.iloc[0], seeds["top1_pct"].dropna()
        macs, params, dense = _counted(seeds.loc[seeds.top1_pct.first_valid_index()] if len(done) else first)
        config = first.config
        paper = _published_row(reported, first.config, macs).top1_pct.dropna()
        comparable = len(paper) and len(done) and _as_published(seeds)
        rows.append(
            {
                "network": first.network,
                "method": first.label,
                "prune_ratio": "ranks given" if config.ranks else "" if pd.isna(first.ratio) else f"{first.ratio:g}",
                "epochs": f"{config.epochs}" + (f" ({config.pretrain_epochs} dense first)" if config.pretrain_epochs else ""),
                "macs_m": f"{macs / 1e6:.2f}" if macs else NOT_RUN,
                "params_m": f"{params / 1e6:.3f}" if macs else NOT_RUN,
                "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}" if macs else NOT_RUN,
                "macs_against_lrpet": _off_target(first.feeds, macs, target.get(first.network)),
                "top1_pct": _spread(seeds.top1_pct),
                "best_epoch_top1_pct": _spread(seeds.best_top1_pct),
                "seeds": f"{len(done)} of {len(seeds)}",
                "train_minutes": NOT_RUN if done.empty else f"{seeds.train_seconds.mean() / 60:.1f}",
                "paper_top1_pct": f"{paper.iloc[0]:.2f}" if len(paper) else "",
                "difference_pct": f"{done.mean() - paper.iloc[0]:+.2f}" if comparable else "",
            }
        )
    return pd.DataFrame(rows)


def _counted(row: pd.Series) -> tuple[int | None, int | None, int]:
    """Return MACs, parameters and dense MACs: measured on the finished network, else by rank; None where only training tells."""
    if not pd.isna(row.macs):
        return row.macs, row.params, row.dense_macs
    return _expected(row.config)


@cache
def _expected(config: RunConfig) -> tuple[int | None, int | None, int]:
    shape, classes = (3, config.image_size, config.image_size), _num_classes(config)
    model = build_model(config.model, classes)
    counted = cost(build_network(config, classes), shape, ranks_of(model, config) if config.method != "narrow" else None)
    dense = cost(model, shape).macs
    known = config.method in ("dense", "narrow") or config.ranks is not None or (config.prune_ratio is not None and config.method != "filter_pruning")
    return (counted.macs, counted.params, dense) if known else (None, None, dense)


def _targets(runs: pd.DataFrame) -> dict[str, int]:
    """Return the multiply-adds of each network's LRPET at the ratio of the main table, which competitors aim at."""
    mains = runs[runs.feeds.isin(MAIN) & (runs.label == "LRPET")].drop_duplicates("network")
    return {row.network: target_macs(build_model(row.network, _num_classes(row.config)), row.config) for row in mains.itertuples()}


def _off_target(feeds: str, macs: int | None, target: int | None) -> str:
    if feeds != COMPETITORS or not target or not macs:
        return ""
    return "equal" if abs(macs / target - 1) <= MACS_TOLERANCE else f"{100 * (macs / target - 1):+.0f} %"


def _of_imagenet(config: RunConfig) -> bool:
    """Tell whether a run is meant to be of ImageNet; any other tree of images has no published numbers."""
    return config.profile == "imagenet"


def _num_classes(config: RunConfig) -> int:
    return 1000 if _of_imagenet(config) else 10


def _as_published(done: pd.DataFrame) -> bool:
    """Tell whether finished runs followed the paper's schedule, on data of as many classes."""
    done = done.dropna(subset="top1_pct")
    imagenet = _of_imagenet(done.iloc[0].config)
    return (done.epochs == (120 if imagenet else 400)).all() and (not imagenet or (done.num_classes == 1000).all())


def _published_row(reported: pd.DataFrame, config: RunConfig, macs: float) -> pd.DataFrame:
    """Return the published rows of the same data, network and method whose multiply-adds are within 1 % of ours."""
    if not macs:
        return reported.iloc[:0]
    dataset, label = "imagenet" if _of_imagenet(config) else config.dataset, _label(config)
    same = reported[(reported.dataset == dataset) & (reported.model == config.model) & (reported.method == PUBLISHED_NAMES.get(label, label))]
    return same[(same.macs_m * 1e6 / macs - 1).abs() < 0.01]


def _paired(left: pd.DataFrame, right: pd.DataFrame) -> pd.Series:
    """Return the differences in last-epoch accuracy of two experiments, one for each seed that both have finished."""
    by_seed = lambda side: pd.Series(side.top1_pct.values, index=[config.seed for config in side.config], dtype=float)
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
                alone = (b == "dense") | (group.ratio.isna() & main.eq(ratio).any())  # what has no ratio stands beside the main one
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
    columns = ["question", "experiment", "setting", "prune_ratio", "macs_m", "top1_pct", "difference_pct", "standard_error_pct", "n", "verdict"]
    rows = []
    for network in dict.fromkeys(runs[runs.feeds == ABLATIONS].network):
        group = runs[runs.network == network]
        base = group[(group.label == "LRPET") & group.feeds.isin(MAIN)]
        if base.empty:
            continue
        for question, free in ABLATED.items():
            fits = [config.method in ("lrp", "lrpet") and _same_but(free, config, base.iloc[0].config) for config in group.config]
            by_value = lambda seeds, free=free: [getattr(seeds.iloc[0].config, name) or 0 for name in reversed(free)]
            for seeds in sorted((seeds for _, seeds in group[fits].groupby("experiment", sort=False)), key=by_value):
                config = seeds.iloc[0].config
                macs = _counted(seeds.iloc[0])[0]
                is_base = seeds.iloc[0].label == "LRPET" and config.prune_ratio == base.iloc[0].config.prune_ratio
                result = _decide(_paired(seeds, base), ("higher", "lower", "undecided", "not tested"))
                rows.append(
                    {
                        "question": question,
                        "experiment": seeds.iloc[0].experiment,
                        "setting": _setting(config, free),
                        "prune_ratio": f"{config.prune_ratio:g}",
                        "macs_m": f"{macs / 1e6:.2f}",
                        "top1_pct": _spread(seeds.top1_pct),
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


def _setting(config: RunConfig, free: tuple[str, ...]) -> str:
    """Write the value that an ablation varies."""
    if "method" in free:
        words = {True: "with", False: "without"}
        return f"{words[config.method == 'lrpet']} energy transfer, {words[config.bn_rectification]} BN rectification"
    if "projection_unit" in free:
        every = f"every {config.projection_interval} {config.projection_unit}s"
        return every.replace("every 1 epochs", "every epoch")
    if "pretrain_epochs" in free:
        if not config.pretrain_epochs:
            return "from scratch"
        return f"after {config.pretrain_epochs} dense epochs, learning rate {config.finetune_learning_rate:g} again"
    if "row_eps" in free:
        return f"{config.row_eps:g}" if config.row_eps else "0, the exact inverse"
    return f"{getattr(config, free[0]):g}"


def projection_share(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the seconds of each finished run that went into projections, and their share of training and projecting, in percent."""
    done = runs.dropna(subset=["top1_pct"])
    done = done[done.projections > 0] if len(done) else done
    if done.empty:
        return pd.DataFrame(columns=["network", "method", "projections", "projection_seconds", "share_pct"])
    share = 100 * done.projection_seconds / (done.projection_seconds + done.train_seconds)
    table = pd.DataFrame({"network": done.network, "method": done.label, "projections": done.projections.astype(int)})
    table = table.assign(projection_seconds=done.projection_seconds.round(2), share_pct=share.round(2), name=done.experiment)
    return table.drop_duplicates("name").drop(columns="name").reset_index(drop=True)


def summary_of_ablations(table: pd.DataFrame) -> str:
    """Return in words what the ablations of a profile decide, computed from :func:`ablation_table`."""
    changed = table[table.verdict != "LRPET as it is"]
    lines = []
    for row in changed.itertuples():
        if row.verdict in ("higher", "lower"):
            how = f"{row.difference_pct} points, standard error {row.standard_error_pct}, n={row.n}"
            lines.append(f"- {row.question}, {row.setting}: {row.verdict} than LRPET as it is ({how}).")
    tested = (changed.verdict != "not tested").sum()
    lines.append(f"- {len(lines)} of {len(changed)} changed settings differ from LRPET by more than chance; {tested} of them were run.")
    if len(lines) == 1:
        lines.append("- The paper reports that energy transfer and BN rectification help: neither shown nor refuted by these runs.")
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
                rows.append({"claim": claim, "network": network, "evidence": f"top-1, points: LRPET − {label}", **result})
    for network in dict.fromkeys(runs.network):
        both = [runs[(runs.network == network) & (runs.label == label)] for label in ("LRPET", "LRP")]
        if all(map(len, both)) and both[0].iloc[0].feeds in (*MAIN, "gradients"):
            result = _decide(_gradient_ratios(*both), words)
            rows.append({"claim": "gradients fade less", "network": network, "evidence": "log10 of ‖M‖·‖∂L/∂M‖, first layer: LRPET − LRP", **result})
    return pd.DataFrame(rows, columns=["claim", "network", "evidence", "difference", "standard_error", "n", "verdict"])


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


def replication_cost(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what each experiment cost on the machine that ran it: device hours of all its seeds, and what one run spent them on.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row an experiment with ``device_hours`` (training, projections, evaluation, recording; all finished seeds) and the
        mean seconds of one run's parts; "not run" where nothing has finished.
    """
    rows = []
    parts = ["train_seconds", "projection_seconds", "evaluation_seconds", "recording_seconds"]
    for name, seeds in runs.groupby("experiment", sort=False):
        done = seeds.dropna(subset=["top1_pct"]).reindex(columns=[*seeds.columns, *(p for p in parts if p not in seeds)])
        hours = done[parts].fillna(0).to_numpy(float).sum() / 3600
        rows.append(
            {
                "experiment": name,
                "runs": f"{len(done)} of {len(seeds)}",
                "device_hours": (f"{hours:.2f}" if hours >= 0.1 else f"{hours:.2g}") if len(done) else NOT_RUN,
                **{part: f"{done[part].astype(float).mean():.1f}".replace("nan", "") if len(done) else "" for part in parts},
                "device": ", ".join(dict.fromkeys(done.device)) if len(done) else "",
            }
        )
    return pd.DataFrame(rows)


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """Return where each finished run came from: its name, the commit of the code, the device, when it ended, the images it saw."""
    done = runs.dropna(subset=["top1_pct"])
    columns = ["run_id", "commit", "device", "finished", "data_train_sha256"]
    return done.reindex(columns=columns).assign(**{c: done[c].str[:12] for c in ("commit", "data_train_sha256") if c in done}).reset_index(drop=True)


def headline(profile: str) -> str:
    """Return the numbers of a profile that matter most, for a terminal: accuracy and cost of each main row, and the claims' verdicts."""
    runs = profile_runs(profile)
    table = accuracy_table(runs[runs.feeds.isin(MAIN)], published())
    lines = [f"  {r.network:10s} {r.method:32s} {r.macs_m:>8s} M MACs  {r.top1_pct}" for r in table.itertuples()]
    claims = claims_table(runs)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in claims.verdict.value_counts().items())
    return "\n".join([f"top-1 accuracy of profile {profile}, last epoch, %:", *lines, f"claims of the paper: {counts}"])


def cost_table() -> pd.DataFrame:
    """Return our multiply-adds and parameters beside the published ones, for every published network that we have.

    Nothing is trained: ranks come from the published ratio or list, costs from layer shapes.

    >>> cost_table().query("network == 'resnet56' and prune_ratio == '0.57'").macs_m.item()
    '56.06'
    """
    return pd.DataFrame(_cost_rows())


@cache
def _cost_rows() -> list[dict]:
    rows = []
    for row in published().itertuples():
        if row.table != "related":  # other authors' networks stand in their own table
            rows.append(_cost_row(row.model, row.dataset, row.method, row.prune_ratio, None, row))
    for name, entry in json.loads((PROJECT / "paper" / "searched_ranks.json").read_text()).items():
        if isinstance(entry, dict):
            reported = SimpleNamespace(macs_m=np.nan, params_m=np.nan, macs_reduction_pct=entry["macs_reduction_pct"], source="authors' rank list")
            rows.append(_cost_row(name.split("_")[0], entry["dataset"], f"LRPET, {name} ranks", np.nan, entry["ranks"], reported))
    return rows


def _cost_row(network: str, dataset: str, method: str, ratio: float, ranks, reported) -> dict:
    imagenet = dataset == "imagenet"
    paper = lambda value: "" if pd.isna(value) else f"{value:g}"
    published_cost = {
        "paper_macs_m": paper(reported.macs_m),
        "paper_params_m": paper(reported.params_m),
        "paper_macs_reduction_pct": paper(reported.macs_reduction_pct),
        "paper_source": reported.source,
    }
    names = {"network": network, "dataset": dataset, "method": method, "prune_ratio": paper(ratio)}
    row_of = lambda ours: {column: (names | ours | published_cost)[column] for column in COST_COLUMNS}
    if network not in MODELS or method.split(",")[0] not in ("LRPET", "baseline"):
        return row_of(dict.fromkeys(("macs_m", "params_m", "params_without_bn_m", "macs_reduction_pct"), NOT_HERE))
    model = build_model(network, {"imagenet": 1000, "cifar100": 100}.get(dataset, 10))
    fixed = json.loads((PROJECT / "paper" / "fixed_ranks.json").read_text()).get(network)
    known = True
    if ranks is None and method != "baseline":
        if ratio > 0:
            ranks = ranks_from_ratio(model, ratio)
        elif fixed is not None:
            ranks = _ranks_by_pattern(model, fixed["ranks"])
        else:
            known = False  # neither ratio nor list is published
    counted = cost(model, (3, 224, 224) if imagenet else (3, 32, 32), ranks)
    text = lambda value, form: form.format(value) if known else NO_RANKS
    ours = {
        "macs_m": text(counted.macs / 1e6, "{:.2f}"),
        "params_m": text(counted.params / 1e6, "{:.3f}"),
        "params_without_bn_m": text(sum(layer.params for layer in counted.layers) / 1e6, "{:.3f}"),  # what the authors count
        "macs_reduction_pct": text(100 * (1 - counted.macs / counted.dense_macs), "{:.1f}"),
    }
    return row_of(ours)


def _ranks_by_pattern(model, patterns: dict[str, int]) -> dict[str, int]:
    """Return the rank of the first pattern that matches, for each layer that one matches."""
    layers = compressible_layers(model, "*")
    matches = {name: [rank for pattern, rank in patterns.items() if fnmatch.fnmatch(name, pattern)] for name in layers}
    classifier = list(layers)[-1]
    return {name: ranks[0] for name, ranks in matches.items() if ranks and name != classifier}


IMAGENET_IMAGES = 1_281_167  # training images of ILSVRC 2012


def imagenet_table(runs: pd.DataFrame, reported: pd.DataFrame, results: Path | None = None) -> pd.DataFrame:
    """Return top-1 and top-5 accuracy and cost of each experiment on larger images; for ImageNet beside the published numbers.

    Args:
        runs: of :func:`profile_runs`, for profile imagenet or imagenette.
        reported: of :func:`published`.
        results: root of the store, in whose ``bench`` measured throughputs are.

    Returns:
        A row an experiment: exact multiply-adds and parameters, accuracy of the last epoch as mean ± sample standard deviation (n).
        For profile imagenet also the published accuracies with the difference, and the command of the row with the hours it takes,
        estimated from the throughput that was measured on a GPU; "not measured" where none was.
    """
    rows = []
    for name, seeds in runs.groupby("experiment", sort=False):
        seeds = seeds.reindex(columns=[*seeds.columns, *({"top5_pct", "num_classes", "epochs"} - set(seeds.columns))])
        first, done = seeds.iloc[0], seeds.dropna(subset=["top1_pct"])
        config = first.config
        macs, params, dense = _counted(done.iloc[0] if len(done) else first)
        row = {
            "network": first.network,
            "method": first.label,
            "prune_ratio": "" if pd.isna(first.ratio) else f"{first.ratio:g}",
            "epochs": f"{config.epochs}",
            "macs_m": f"{macs / 1e6:.2f}",
            "params_m": f"{params / 1e6:.3f}",
            "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}",
            "top1_pct": _spread(seeds.top1_pct),
            "top5_pct": _spread(seeds.top5_pct) if done.top5_pct.notna().any() or done.empty else "not recorded",
            "seeds": f"{len(done)} of {len(seeds)}",
        }
        if _of_imagenet(config):
            paper = _published_row(reported, config, macs)
            for top in ("top1", "top5"):
                value = paper[f"{top}_pct"].dropna()
                comparable = len(value) and len(done) and _as_published(done)
                row[f"paper_{top}_pct"] = f"{value.iloc[0]:.2f}" if len(value) else ""
                row[f"{top}_difference_pct"] = f"{done[f'{top}_pct'].mean() - value.iloc[0]:+.2f}" if comparable else ""
            row["hardware"], row["hours_of_a_run"] = "one CUDA GPU or more", _estimated_hours(config, results)
            row["command"] = f"python -m lrpet run '{name}-s*' --profile imagenet --data DIR"
        rows.append(row)
    return pd.DataFrame(rows)


def _estimated_hours(config: RunConfig, results: Path | None) -> str:
    """Return how long a run would train on ImageNet at the highest throughput that was measured for it on a GPU."""
    kept = ((results or results_root()) / "bench").glob(f"throughput-{config.model}-{config.method}-{config.image_size}-*.json")
    measured = [result for result in map(json.loads, (file.read_text() for file in sorted(kept))) if not result["device"].startswith("CPU")]
    if not measured:
        return "not measured"
    best = max(measured, key=lambda result: result["both_images_per_second"])
    hours = config.epochs * IMAGENET_IMAGES / best["both_images_per_second"] / 3600
    return f"{hours:.0f}, estimated from {best['both_images_per_second']:.0f} images/s measured on one {best['device']}, training alone counted"


def related_table() -> pd.DataFrame:
    """Return the published CIFAR-10 rows of Trained Rank Pruning; other schedule, other authors, for orientation only."""
    rows = published().query("table == 'related' and dataset == 'cifar10'")
    rows = rows[["model", "method", "params_m", "macs_reduction_pct", "top1_pct", "source"]].rename(columns={"model": "network"})
    return rows.astype(object).where(rows.notna(), "").reset_index(drop=True)


def comparison(run) -> pd.DataFrame:
    """Return one run's numbers beside the published ones of the same network, method and ratio, with the difference.

    Args:
        run: a finished :class:`lrpet.runs.Run`.

    Returns:
        A row a quantity: ours, published ("none" where the paper has no such row), difference.
    """
    config, summary = run.config, run.summary
    reported = published()
    other = _of_imagenet(config) and summary["num_classes"] != 1000  # a tree of other images
    match = _published_row(reported, config, None if other else summary["macs"])
    ours = {"macs_m": summary["macs"] / 1e6, "params_m": summary["params"] / 1e6, "top1_pct": summary["top1_pct"]}
    if config.dataset == "imagefolder" and "top5_pct" in summary:
        ours["top5_pct"] = summary["top5_pct"]
    rows = []
    for name, value in ours.items():
        paper = match[name].dropna()
        known = len(paper) > 0
        rows.append(
            {
                "quantity": name,
                "ours": f"{value:.2f}",
                "published": f"{paper.iloc[0]:.2f}" if known else "none",
                "difference": f"{value - paper.iloc[0]:+.2f}" if known else "",
            }
        )
    return pd.DataFrame(rows)


def verdict(run) -> str:
    """Return in words what of one run agrees with the paper and what cannot be compared, computed from its numbers."""
    s, config = run.summary, run.config
    same = s["compact_max_relative_error"] < 1e-4
    agrees = "agrees" if same else "**does not agree**"
    lines = [f"- The compact network {agrees} with the projected one (bound 1e-4, measured {s['compact_max_relative_error']:.1e})."]
    for row in comparison(run).itertuples():
        if row.published == "none":
            continue
        schedule = 120 if _of_imagenet(config) else 400
        if row.quantity in ("top1_pct", "top5_pct") and (config.epochs, config.validation_fraction) != (schedule, 0.0):
            schedules = f"{config.epochs} epochs here, {schedule} in the paper"
            lines.append(f"- {row.quantity} is not comparable with the published {row.published} %: {schedules}.")
        else:
            lines.append(f"- {row.quantity}: {row.ours} here, {row.published} published, difference {row.difference}.")
    if len(lines) == 1:
        lines.append(f"- The paper has no row for {config.model} by {_label(config)} on {config.dataset} at this ratio: nothing to compare.")
    return "\n".join(lines)


def summary_of(tables: dict[str, pd.DataFrame]) -> str:
    """Return in words what the tables of a profile show, computed from them."""
    accuracy, decided = tables["accuracy"], tables["differences"]
    done = (accuracy.top1_pct != NOT_RUN).sum()
    lines = [f"- {done} of {len(accuracy)} experiments have at least one finished run; the others say “{NOT_RUN}”."]
    for row in decided.itertuples():
        if row.n:
            error = f", standard error {row.standard_error_pct}" if row.standard_error_pct else ""
            pair = f"{row.network}, {row.difference}, ratio {row.prune_ratio}"
            lines.append(f"- {pair}: {row.top1_difference_pct} points (n={row.n}{error}): {row.verdict}.")
    cost = tables["cost"]
    known = cost[(cost.paper_macs_m != "") & ~cost.macs_m.isin((NOT_HERE, NO_RANKS))]
    off = [(float(r.macs_m) / float(r.paper_macs_m) - 1) * 100 for r in known.itertuples()]
    lines.append(f"- Multiply-adds of {len(known)} published networks are within {max(map(abs, off)):.2f} % of ours.")
    return "\n".join(lines)


def write_tables(profile: str, results: Path | None = None) -> dict[str, pd.DataFrame]:
    """Write every table of a profile as Markdown and CSV to ``results/<profile>/tables`` and return them by name."""
    runs, reported = profile_runs(profile, results), published()
    tables = {
        "accuracy": accuracy_table(runs, reported),
        "claims": claims_table(runs),
        "differences": differences(runs),
        "ablations": ablation_table(runs),
        "replication": replication_cost(runs),
        "cost": cost_table(),
    }
    if profile == "short":
        tables["related"] = related_table()
    if profile in ("imagenet", "imagenette"):
        tables["imagenet"] = imagenet_table(runs, reported, results)
    folder = (results or results_root()) / profile / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.csv").write_text(table.to_csv(index=False), encoding="utf-8")
        (folder / f"{name}.md").write_text(_markdown(table), encoding="utf-8")
    return tables


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


PAGES = (PROJECT / "README.md", PROJECT / "REPRODUCING.md")  # whose tables come from the store


def write_pages(pages: Sequence[Path] = PAGES) -> list[str]:
    """Put the tables of the store where README.md and REPRODUCING.md have a marker for them; return the new texts.

    A marker is ``<!-- table: short accuracy -->``, closed by ``<!-- end -->``; ``<!-- table: short accuracy: method top1_pct -->`` shows
    only these columns.
    """
    tables: dict[str, dict[str, pd.DataFrame]] = {}

    def fill(match: re.Match) -> str:
        marker, profile, name, columns = match.groups()
        if profile not in tables:
            tables[profile] = write_tables(profile)
        table = tables[profile][name]
        return f"{marker}\n{_markdown(table[columns.split()] if columns else table)}<!-- end -->"

    marked = re.compile(r"(<!-- table: (\w+) (\w+)(?:: ([\w ]+))? -->).*?<!-- end -->", re.DOTALL)
    texts = [marked.sub(fill, path.read_text(encoding="utf-8")) for path in pages]
    for path, text in zip(pages, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    for profile in {"paper", "imagenet", "imagenette"} - set(tables):
        write_tables(profile)
    return texts
