"""Gradient projection beside LRPET: what each way to train holds, costs and reaches, and what they decide."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrpet.config import RunConfig
from lrpet.registry import GRADIENT_PROJECTIONS, metric_of
from lrpet.tables.rows import NOT_RUN, counted_cost, profile_runs, spread
from lrpet.tables.statistics import Words, decide

__all__ = ["answers_table", "choice_table", "gradient_tables", "projection_table", "way_of"]
OPTIMIZERS = {"adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD with momentum"}
# question → the two experiments, without the name of the network, whose difference answers it
QUESTIONS = {
    "does projecting cost anything": ("galore", "adamw"),
    "does the SVD matter": ("galore", "random"),
    "does a randomized SVD cost anything": ("galore2", "galore"),
    "does Lotus's test matter, at its mean interval": ("lotus", "galore2-lotus-interval"),
    "does rotating the moments help": ("galore-rotate", "galore"),
    "does resetting the moments help": ("galore-reset", "galore"),
    "Lotus at GaLore's bytes": ("lotus-bytes", "galore"),
    "VLoRP at GaLore's bytes": ("vlorp-bytes", "galore"),
    "do finer grains help VLoRP": ("vlorp-fine", "vlorp-coarse"),
    "Adafactor, which projects nothing": ("adafactor", "galore"),
    "does GaLore cost LRPET anything": ("lrpet-galore", "lrpet"),
    "do new bases after a projection help": ("lrpet-galore-refresh", "lrpet-galore"),
    "does the column scale help LRPET": ("lrpet-column-scale", "lrpet"),
    "is a GaLore-trained network more compressible": ("galore-cut", "adamw-cut"),
    "LRPET or cutting at the end": ("lrpet", "adamw-cut"),
}


def way_of(config: RunConfig) -> str:
    """Return how a run was trained, in the words of tables and figures.

    >>> shared = {"task": "language", "dataset": "topics", "model": "byte_transformer", "recipe": "cosine"}
    >>> way_of(RunConfig(**shared, method="dense", gradient_projection="galore", gradient_rank=32))
    'GaLore, r = 32, T = 200'
    """
    words = [OPTIMIZERS[config.optimizer or "adamw"]]
    if config.gradient_projection is not None:
        words = [GRADIENT_PROJECTIONS[config.gradient_projection].label]
        words += [f"c = {config.grain:g}"] if config.grain is not None else []
        words += [f"r = {config.gradient_rank}"]
        words += [f"T = {config.gradient_interval}"] if config.gradient_interval is not None else []
        words += [f"γ = {config.switch_threshold:g}"] if config.switch_threshold is not None else []
        words += [config.carry] if config.carry in ("rotate", "reset") else []
    if config.method == "lrp":
        words.append("then cut")
    if config.method == "lrpet":
        words[0] = f"LRPET + {words[0]}"
    words += ["column scale"] if config.column_scale else []
    words += ["new bases after each projection"] if config.refresh_after_projection else []
    return ", ".join(words)


def projection_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what each way to train reaches, holds and takes; "not run" where no seed has finished.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for one task of profile language.

    Returns:
        A row per experiment: the metric of the last epoch, of LRPET rows that of the projected network, mean
        and 95 % interval over seeds; MB (10⁶ bytes) of optimizer state, and of the block matrices' share of
        it against AdamW's; MB of all gradients and of the largest; peak MB of a plain step and of a refresh;
        milliseconds of the optimizer's step, plain, at a refresh, and averaged over the run; size of the
        result. All but the metric are those of the first finished seed; peaks and times of a row that ran on
        another device than AdamW's are left out.
    """
    metric = metric_of(runs)
    adam = _first(runs[[_stem(name) == "adamw" for name in runs.experiment]], metric.column)
    rows = []
    for _, seeds in runs.groupby("experiment", sort=False):
        config, done = seeds.iloc[0].config, _first(seeds, metric.column)
        macs, params, _ = counted_cost(seeds.iloc[0] if done is None else done)
        row = {
            "way": way_of(config),
            metric.column: spread(seeds[metric.column], metric.digits),
            **dict.fromkeys(MEASURED, NOT_RUN),
            "params_m": f"{params / 1e6:.3f}",
            "macs_m": f"{macs / 1e6:.2f}",
            "seeds": f"{seeds[metric.column].notna().sum()} of {len(seeds)}",
        }
        rows.append(row if done is None else row | _measured(done, adam))
    return pd.DataFrame(rows)


OF_A_DEVICE = ("peak_mb", "refresh_peak_mb", "update_ms", "refresh_ms", "averaged_ms")
MEASURED = ("state_mb", "block_state_share", "gradients_mb", "largest_gradient_mb", *OF_A_DEVICE)


def _first(runs: pd.DataFrame, column: str) -> pd.Series | None:
    """Return the first finished run; None where there is none."""
    done = runs[runs[column].notna()]
    return done.iloc[0] if len(done) else None


def _measured(run: pd.Series, adam: pd.Series | None) -> dict[str, str]:
    """Return the cells of one run that :func:`lrpet.training.step_cost.step_cost` filled."""
    megabytes = {
        "state_mb": run.optimizer_state_bytes,
        "gradients_mb": run.gradient_bytes,
        "largest_gradient_mb": run.largest_gradient_bytes,
        "peak_mb": run.peak_bytes,
        "refresh_peak_mb": run.refresh_peak_bytes,
    }
    cells = {name: "" if pd.isna(value) else f"{value / 1e6:.2f}" for name, value in megabytes.items()}
    share = "" if adam is None else f"{run.block_state_bytes / adam.block_state_bytes:.2f}"
    plain, refresh, averaged = run.update_seconds, run.refresh_update_seconds, run.update_seconds
    if not pd.isna(refresh):
        averaged = plain + (refresh - plain) * run.refreshes / run.steps
    seconds = {"update_ms": plain, "refresh_ms": refresh, "averaged_ms": averaged}
    cells |= {name: "" if pd.isna(value) else f"{1e3 * value:.1f}" for name, value in seconds.items()}
    if adam is not None and run.device != adam.device:
        cells |= dict.fromkeys(OF_A_DEVICE, "other device")
    return cells | {"block_state_share": share}


def answers_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the differences that answer the questions, paired by seed, decided as all tables decide.

    Args:
        runs: as of :func:`projection_table`.

    Returns:
        A row per question: the two ways, their difference in the metric, and the columns of
        :func:`lrpet.tables.statistics.decide`; its verdicts are "better", "worse" and "undecided" for the
        first of the two.
    """
    metric = metric_of(runs)
    scores, ways = {}, {}
    for name, seeds in runs.groupby("experiment", sort=False):
        seed = [config.seed for config in seeds.config]
        scores[_stem(name)] = pd.Series(seeds[metric.column].values, index=seed, dtype=float)
        ways[_stem(name)] = way_of(seeds.iloc[0].config)
    asked = {q: pair for q, pair in QUESTIONS.items() if set(pair) <= scores.keys()}
    samples = [(scores[one] - scores[other]).dropna() for one, other in asked.values()]
    words = Words(*("better", "worse")[:: metric.sign])
    rows = [
        {"question": question, "way": ways[one], "compared_with": ways[other], **decision}
        for (question, (one, other)), decision in zip(
            asked.items(), decide(samples, words, metric.digits), strict=True
        )
    ]
    return pd.DataFrame(rows)


def choice_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the held-out score of each step size that was tried; nothing is chosen before all three are run.

    A step size at an end of its grid is called so: a better one may lie beyond.

    Args:
        runs: of :func:`lrpet.tables.rows.profile_runs`, for profile language-choice.
    """
    metric, rows = metric_of(runs), []
    stems = [name.rpartition("-")[0] for name in runs.experiment]
    for _, tried in runs.groupby(stems, sort=False):
        scores = tried[metric.column].astype(float)
        best = (metric.sign * scores).idxmax() if scores.notna().all() else None
        chosen = "chosen, at an end" if best in (tried.index[0], tried.index[-1]) else "chosen"
        for k, row in tried.iterrows():
            config, score = row.config, scores[k]
            scale = 1.0 if config.gradient_scale is None else config.gradient_scale
            rows.append(
                {
                    "way": way_of(config),
                    "learning_rate": f"{config.learning_rate:g}",
                    "learning_rate_of_projected": f"{config.learning_rate * scale:g}",
                    metric.column: NOT_RUN if pd.isna(score) else f"{score:.{metric.digits}f}",
                    "chosen": chosen if k == best else "",
                }
            )
    return pd.DataFrame(rows)


def gradient_tables(profile: str, results: Path | None = None) -> dict[str, pd.DataFrame]:
    """Return the tables of profile language, or of language-choice, by name."""
    text = profile_runs(profile, results, "language")
    if profile == "language-choice":
        return {"choice": choice_table(text)}
    images = profile_runs(profile, results)
    tables = {"language": projection_table(text), "answers": answers_table(text)}
    return tables | {"vit": projection_table(images), "vit_answers": answers_table(images)}


def _stem(experiment: str) -> str:
    """Return the name of an experiment without that of its network: lm-galore is galore."""
    return experiment.partition("-")[2]
