"""LRPET-S: a rank for each group of layers by Bayesian optimization, with Optuna.

A candidate is a prune ratio for each group, drawn log-uniformly between 0.5 and 0.999. It trains briefly,
from the same initialization as all others, and is scored on images held out from the training set: the test
set takes no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import pandas as pd

from lrpet.config import RunConfig
from lrpet.lowrank.budget import ranks_for_budget
from lrpet.lowrank.cost import cost
from lrpet.lowrank.ranks import align_rank, compressible_layers, rank_from_ratio
from lrpet.models import build_model
from lrpet.runs.run import run
from lrpet.runs.store import load_network
from lrpet.runs.study import open_study, optimize, side_by_side

__all__ = [
    "NOTEBOOK_PARAMETERS",
    "brief_config",
    "compare_final",
    "fitness",
    "group_layers",
    "groups_of",
    "importance",
    "ranks_from_group_ratios",
    "search",
    "trials_table",
    "uniform_trials",
    "verdict",
]
LOWEST, HIGHEST = 0.5, 0.999  # prune ratios that are tried; arXiv 2204.05566


def group_layers(model, per_layer: bool = False) -> dict[str, list[str]]:
    """Group the compressible convolutions that share a ratio: by width and kernel size, or one by one.

    Returns:
        Group name → layer names, in module order.

    >>> {group: len(layers) for group, layers in group_layers(build_model("resnet20")).items()}
    {'16-3x3': 7, '32-3x3': 6, '64-3x3': 6}
    """
    groups: dict[str, list[str]] = {}
    for name, (N, _) in compressible_layers(model).items():
        kernel = "x".join(map(str, model.get_submodule(name).kernel_size))
        groups.setdefault(name if per_layer else f"{N}-{kernel}", []).append(name)
    return groups


def ranks_from_group_ratios(
    model, ratios: Mapping[str, float], per_layer: bool = False, multiple_of: int = 1
) -> dict[str, int]:
    """Turn a ratio for each group into a rank for each layer, rounded up to a multiple.

    >>> ranks_from_group_ratios(build_model("resnet8"), {"16-3x3": 0.5, "32-3x3": 0.5, "64-3x3": 0.5})["conv"]
    8
    """
    shapes = compressible_layers(model)
    return {
        name: align_rank(rank_from_ratio(min(shapes[name]), ratios[group]), shapes[name], multiple_of)
        for group, names in group_layers(model, per_layer).items()
        for name in names
    }


def fitness(summary: Mapping, weight: float = 1.0) -> float:
    """Return what the search minimizes: −(accuracy + accuracy after factorization) + λ · MACs / dense MACs.

    Args:
        summary: of a finished run.
        weight: λ.

    Source: arXiv 2204.05566, LRPET-S. Both accuracies are equal up to rounding here, because a run ends with
    a projection.

    >>> fitness({"top1_pct": 90.0, "compact_top1_pct": 90.0, "macs": 45, "dense_macs": 100})
    -1.35
    """
    accuracy = (summary["top1_pct"] + summary["compact_top1_pct"]) / 100
    return -accuracy + weight * summary["macs"] / summary["dense_macs"]


def search(
    config: RunConfig,
    trials: int,
    *,
    objectives: int = 1,
    per_layer: bool = False,
    sampler: str = "tpe",
    weight: float = 1.0,
    data: str | None = None,
    device: str = "auto",
    results: str | Path | None = None,
    workers: int = 1,
    do_run: Callable = run,
) -> optuna.Study:
    """Search ranks until a study holds the given number of finished trials; started again, it resumes.

    Several processes, on one machine or more, may work on one study: all write to one journal. Each trial is
    an ordinary run of the store, so that a trial which was interrupted, or asked for twice, is resumed or
    loaded.

    Args:
        config: of one brief training; its ``validation_fraction`` must be above 0, its ratio and ranks are
            replaced, and its ``multiple_of`` is that of all ranks.
        trials: finished or pruned trials the study shall hold.
        objectives: 1 minimizes the paper's fitness and prunes bad trials early; 2 seeks the Pareto front of
            accuracy (percent, up) and MACs (share of dense, down).
        per_layer: a ratio for each layer instead of one for each stage and kernel size.
        sampler: "tpe" or "gp" (Gaussian process).
        weight: λ of the fitness.
        data, device, results: as in :func:`lrpet.run`.
        workers: processes that work on the study side by side; their samplers see each other's trials.
        do_run: what trains a candidate.

    Returns:
        The study; its journal lies in ``<results>/<profile>/search/``.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv 2204.05566, LRPET-S; Akiba et al. 2019 for Optuna.
    """
    if not config.validation_fraction:
        raise ValueError(
            "validation_fraction must be above 0: ranks are chosen on images held out from the training set, "
            "never on the test set"
        )
    if config.unfolding is not None:
        raise ValueError(f"unfolding must be null, the paper's, in a search; got {config.unfolding!r}")
    if objectives not in (1, 2) or sampler not in ("tpe", "gp") or trials < 1:
        raise ValueError(
            "objectives must be 1 or 2, sampler tpe or gp, trials at least 1; "
            f"got {objectives!r}, {sampler!r}, {trials!r}"
        )
    where = {"data": data, "device": device, "results": results}
    study = open_study(config, sampler, objectives, per_layer, results, alone=workers == 1)
    if workers > 1:
        same = {"objectives": objectives, "per_layer": per_layer, "sampler": sampler, "weight": weight}
        side_by_side(workers, search, config, trials, do_run=do_run, **same, **where)
    candidates = _Candidates(config, objectives == 1, per_layer, weight, do_run, where)
    optimize(study, candidates, trials)
    return study


@dataclass(frozen=True)
class _Candidates:
    """What a study asks for: ranks are drawn, a network is trained briefly with them and scored.

    Args:
        config, per_layer, weight, do_run: as in :func:`search`.
        by_fitness: return the fitness, else accuracy in percent and share of MACs.
        where: ``data``, ``device`` and ``results`` of a run.
    """

    config: RunConfig
    by_fitness: bool
    per_layer: bool
    weight: float
    do_run: Callable
    where: Mapping

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        model = build_model(self.config.model)
        groups = group_layers(model, self.per_layer)
        ratios = {group: trial.suggest_float(group, LOWEST, HIGHEST, log=True) for group in groups}
        ranks = ranks_from_group_ratios(model, ratios, self.per_layer, self.config.multiple_of or 1)
        size = self.config.image_size
        counted = cost(model, (3, size, size), ranks)
        share = counted.macs / counted.dense_macs

        def watch(row: dict) -> None:
            """Give a hopeless candidate up: its fitness so far is worse than the median at this epoch."""
            trial.report(-2 * row["top1_pct"] / 100 + self.weight * share, row["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        candidate = dataclasses.replace(self.config, prune_ratio=None, multiple_of=None, ranks=ranks)
        watching = watch if self.by_fitness else None
        summary = self.do_run(candidate, progress="off", on_epoch=watching, **self.where).summary
        trial.set_user_attr("ranks", ranks)
        trial.set_user_attr("top1_pct", summary["top1_pct"])
        trial.set_user_attr("macs", summary["macs"])
        return fitness(summary, self.weight) if self.by_fitness else (summary["top1_pct"], share)


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """Return one row per finished trial: ratios, held-out accuracy in percent, MACs, Pareto-optimal or not.

    A trial is Pareto-optimal when no other is at least as good in both and better in one.
    """
    rows = [
        {"trial": t.number, **t.params, "top1_pct": t.user_attrs["top1_pct"], "macs": t.user_attrs["macs"]}
        for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ]
    table = pd.DataFrame(rows)
    table["pareto"] = [
        not ((table.top1_pct >= a) & (table.macs <= m) & ((table.top1_pct > a) | (table.macs < m))).any()
        for a, m in zip(table.top1_pct, table.macs, strict=True)
    ]
    return table


NOTEBOOK_PARAMETERS = (
    "dataset",
    "model",
    "search_epochs",
    "final_epochs",
    "trials",
    "workers",
    "sampler",
    "per_layer",
    "weight",
    "validation_fraction",
    "batch_size",
    "seed",
    "precision",
    "profile",
    "data",
    "device",
)


def brief_config(parameters: Mapping) -> RunConfig:
    """Return the configuration of a candidate's brief training from the parameters of ``06_rank_search``."""
    shared = ("dataset", "model", "validation_fraction", "batch_size", "seed", "precision", "profile")
    return RunConfig(
        epochs=parameters["search_epochs"], milestones=(), **{name: parameters[name] for name in shared}
    )


def groups_of(config: RunConfig, per_layer: bool = False) -> dict[str, list[str]]:
    """Return the groups of layers that share a ratio, for the network of a configuration."""
    return group_layers(build_model(config.model), per_layer)


def uniform_trials(config: RunConfig, ratios=(0.5, 0.6, 0.7, 0.8, 0.9), **where) -> pd.DataFrame:
    """Train one ratio for all layers, as briefly as a candidate; return rows as :func:`trials_table`."""
    rows = []
    for ratio in ratios:
        summary = run(dataclasses.replace(config, prune_ratio=ratio), progress="off", **where).summary
        rows.append({"prune_ratio": ratio, "top1_pct": summary["top1_pct"], "macs": summary["macs"]})
    return pd.DataFrame(rows)


def importance(study: optuna.Study) -> pd.Series:
    """Return how much each group's ratio matters for the accuracy, in shares of 1; needs two objectives."""
    shares = optuna.importance.get_param_importances(
        study,
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        target=lambda trial: trial.values[0],
    )
    return pd.Series(shares, name="importance").sort_index()


def compare_final(study: optuna.Study, config: RunConfig, epochs: int, **where) -> pd.DataFrame:
    """Train a study's best ranks in full, and at equal MACs one ratio for all and greedy ranks by spectra.

    Args:
        study: of :func:`search` with one objective.
        config: of the brief training; its held-out images return to the training set.
        epochs: of the full training, with milestones at half and three quarters as in the paper.
        where: ``data``, ``device`` and ``results`` of :func:`lrpet.run`.

    Returns:
        One row per allocation: MACs in millions and accuracy on the test images in percent, one seed.
    """
    full = dataclasses.replace(
        config,
        epochs=epochs,
        milestones=None,
        validation_fraction=0.0,
        multiple_of=None,
    )
    searched = study.best_trial.user_attrs["ranks"]
    model = build_model(config.model)
    shape = (3, config.image_size, config.image_size)
    saved = cost(model, shape, searched)
    reduction, aligned = 1 - saved.macs / saved.dense_macs, {"multiple_of": config.multiple_of or 1}
    dense = run(dataclasses.replace(config, method="dense", prune_ratio=None), progress="off", **where)
    allocations = {
        "searched": searched,
        "one ratio": ranks_for_budget(model, shape, reduction, **aligned),
        "by spectra": ranks_for_budget(load_network(dense), shape, reduction, allocation="energy", **aligned),
    }
    rows = []
    for name, ranks in allocations.items():
        summary = run(
            dataclasses.replace(full, prune_ratio=None, ranks=ranks), progress="off", **where
        ).summary
        rows.append({"allocation": name, "macs_m": summary["macs"] / 1e6, "top1_pct": summary["top1_pct"]})
    return pd.DataFrame(rows)


def verdict(final: pd.DataFrame) -> str:
    """Return in words what the comparison shows, which rests on one seed."""
    top = final.set_index("allocation").top1_pct
    return "\n".join(
        f"- searched ranks against {other}: {top['searched'] - top[other]:+.2f} points; "
        "one seed, so nothing is decided"
        for other in ("one ratio", "by spectra")
    )
