"""Every table, from the store: DataFrames in, DataFrames out, written as Markdown and CSV."""

from __future__ import annotations

import fnmatch
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lrpet.config import PROJECT, RunConfig, results_root
from lrpet.cost import cost
from lrpet.experiments import load_profile
from lrpet.methods import ranks_of
from lrpet.models import MODELS, build_model
from lrpet.ranks import compressible_layers, ranks_from_ratio
from lrpet.runs import load_runs

__all__ = [
    "accuracy_table",
    "comparison",
    "cost_table",
    "differences",
    "profile_runs",
    "published",
    "summary_of",
    "verdict",
    "write_readme",
    "write_tables",
]

NOT_RUN = "not run"
NOT_HERE, NO_RANKS = "not here", "ranks not published"  # a network or method of others; a network whose ranks nobody can know
COST_COLUMNS = ("network", "dataset", "method", "prune_ratio", "macs_m", "paper_macs_m", "params_m", "params_without_bn_m", "paper_params_m")
COST_COLUMNS += ("macs_reduction_pct", "paper_macs_reduction_pct", "paper_source")
METHOD_NAMES = {"dense": "dense", "lrp": "LRP", "lrpet": "LRPET"}
PUBLISHED_NAMES = {"dense": "baseline"}  # where the published tables use another word


def published() -> pd.DataFrame:
    """Return the published numbers, ``paper/reported.csv``.

    >>> published().query("model == 'resnet56' and prune_ratio == 0.57").top1_pct.item()
    93.27
    """
    return pd.read_csv(PROJECT / "paper" / "reported.csv")


def _label(config: RunConfig) -> str:
    """Return the method as tables name it."""
    return METHOD_NAMES[config.method] + (" without BN rectification" if config.bn_rectification is False else "")


def profile_runs(profile: str, results: Path | None = None) -> pd.DataFrame:
    """Return a row for every run a profile asks for, finished or not, in the order of ``experiments.yaml``.

    Args:
        profile: smoke, short, paper or imagenet.
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
    for _, seeds in runs.groupby("experiment", sort=False):
        first, done = seeds.iloc[0], seeds["top1_pct"].dropna()
        macs, params, dense = _counted(first)
        paper = _published_row(reported, first.config.dataset, first.network, first.label, macs).top1_pct.dropna()
        comparable = len(paper) and len(done) and (seeds.epochs.dropna() == 400).all()
        rows.append(
            {
                "network": first.network,
                "method": first.label,
                "prune_ratio": "" if pd.isna(first.ratio) else f"{first.ratio:g}",
                "macs_m": f"{macs / 1e6:.2f}",
                "params_m": f"{params / 1e6:.3f}",
                "macs_reduction_pct": f"{100 * (1 - macs / dense):.1f}",
                "top1_pct": _spread(seeds.top1_pct),
                "best_epoch_top1_pct": _spread(seeds.best_top1_pct),
                "seeds": f"{len(done)} of {len(seeds)}",
                "train_minutes": NOT_RUN if done.empty else f"{seeds.train_seconds.mean() / 60:.1f}",
                "paper_top1_pct": f"{paper.iloc[0]:.2f}" if len(paper) else "",
                "difference_pct": f"{done.mean() - paper.iloc[0]:+.2f}" if comparable else "",
            }
        )
    return pd.DataFrame(rows)


def _counted(row: pd.Series) -> tuple[int, int, int]:
    """Return MACs, parameters and dense MACs: measured on the finished network, else by rank."""
    if not pd.isna(row.macs):
        return row.macs, row.params, row.dense_macs
    model = build_model(row.network)
    counted = cost(model, (3, row.config.image_size, row.config.image_size), ranks_of(model, row.config))
    return counted.macs, counted.params, counted.dense_macs


def _published_row(reported: pd.DataFrame, dataset: str, network: str, label: str, macs: float) -> pd.DataFrame:
    """Return the published rows of the same data, network and method whose multiply-adds are within 1 % of ours."""
    same = reported[(reported.dataset == dataset) & (reported.model == network) & (reported.method == PUBLISHED_NAMES.get(label, label))]
    return same[(same.macs_m * 1e6 / macs - 1).abs() < 0.01]


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the difference in last-epoch accuracy between pairs of experiments, seed by seed, with its standard error.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row for each pair that shares a network and, between low-rank methods, a ratio. The verdict is "higher" or
        "lower" where the difference exceeds twice its standard error over at least three common seeds, "undecided" otherwise.
    """
    pairs = [("LRPET", "LRP"), ("LRPET", "LRPET without BN rectification"), ("LRPET", "dense"), ("LRP", "dense")]
    rows = []
    for network, group in runs.groupby("network", sort=False):
        for a, b in pairs:
            for ratio, left in group[group.label == a].groupby("ratio"):
                right = group[(group.label == b) & ((group.ratio == ratio) | (b == "dense"))]
                if right.empty:
                    continue
                both = left.merge(right, on="seed", suffixes=("_a", "_b")) if "seed" in group else left.iloc[:0]
                d = (both.top1_pct_a - both.top1_pct_b).dropna() if len(both) else pd.Series(dtype=float)
                error = d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
                decided = len(d) >= 3 and abs(d.mean()) > 2 * error
                rows.append(
                    {
                        "network": network,
                        "difference": f"{a} − {b}",
                        "prune_ratio": f"{ratio:g}",
                        "top1_difference_pct": NOT_RUN if d.empty else f"{d.mean():+.2f}",
                        "standard_error_pct": f"{error:.2f}" if len(d) > 1 else "",
                        "n": len(d),
                        "verdict": "not tested" if d.empty else ("higher" if d.mean() > 0 else "lower") if decided else "undecided",
                    }
                )
    return pd.DataFrame(rows)


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
    match = _published_row(reported, config.dataset, config.model, _label(config), summary["macs"])
    ours = {"macs_m": summary["macs"] / 1e6, "params_m": summary["params"] / 1e6, "top1_pct": summary["top1_pct"]}
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
        if row.quantity == "top1_pct" and (config.epochs, config.validation_fraction) != (400, 0.0):
            lines.append(f"- Accuracy is not comparable with the published {row.published} %: {config.epochs} epochs here, 400 in the paper.")
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
            lines.append(f"- {row.network}, {row.difference}: {row.top1_difference_pct} points (n={row.n}{error}): {row.verdict}.")
    cost = tables["cost"]
    known = cost[(cost.paper_macs_m != "") & ~cost.macs_m.isin((NOT_HERE, NO_RANKS))]
    off = [(float(r.macs_m) / float(r.paper_macs_m) - 1) * 100 for r in known.itertuples()]
    lines.append(f"- Multiply-adds of {len(known)} published networks are within {max(map(abs, off)):.2f} % of ours.")
    return "\n".join(lines)


def write_tables(profile: str, results: Path | None = None) -> dict[str, pd.DataFrame]:
    """Write every table of a profile as Markdown and CSV to ``results/<profile>/tables`` and return them by name."""
    runs, reported = profile_runs(profile, results), published()
    tables = {"accuracy": accuracy_table(runs, reported), "differences": differences(runs), "cost": cost_table()}
    if profile == "short":
        tables["related"] = related_table()
    folder = (results or results_root()) / profile / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.csv").write_text(table.to_csv(index=False), encoding="utf-8")
        (folder / f"{name}.md").write_text(_markdown(table), encoding="utf-8")
    return tables


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def write_readme(path: Path = PROJECT / "README.md") -> str:
    """Put the tables of the store where the README has a marker for them; return the new text.

    A marker is ``<!-- table: short accuracy -->``, closed by ``<!-- end -->``.
    """
    tables: dict[str, dict[str, pd.DataFrame]] = {}

    def fill(match: re.Match) -> str:
        profile, name = match[1], match[2]
        tables.setdefault(profile, write_tables(profile))
        return f"<!-- table: {profile} {name} -->\n{_markdown(tables[profile][name])}<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) (\w+) -->.*?<!-- end -->", fill, path.read_text(encoding="utf-8"), flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")
    return text
