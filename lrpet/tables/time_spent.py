"""What the runs cost, and where they came from."""

from __future__ import annotations

import pandas as pd

from lrpet.registry import metric_of
from lrpet.tables.rows import NOT_RUN

__all__ = ["projection_share", "provenance", "replication_cost"]


def projection_share(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the seconds of each finished run that went into projections, and their share in percent."""
    done = runs.dropna(subset=[metric_of(runs).column])
    done = done[done.projections > 0].dropna(subset=["projection_seconds"]) if len(done) else done
    if done.empty:
        columns = ["network", "method", "prune_ratio", "projections", "projection_seconds", "share_pct"]
        return pd.DataFrame(columns=columns)
    share = 100 * done.projection_seconds / (done.projection_seconds + done.train_seconds)
    table = pd.DataFrame(
        {
            "network": done.network,
            "method": done.label,
            "prune_ratio": [f"{ratio:g}" if ratio > 0 else "" for ratio in done.ratio],
            "projections": done.projections.astype(int),
        }
    )
    table = table.assign(
        projection_seconds=done.projection_seconds.round(2), share_pct=share.round(2), name=done.experiment
    )
    return table.drop_duplicates("name").drop(columns="name").reset_index(drop=True)


def replication_cost(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what each experiment cost where it ran: device hours, and what one run spent them on.

    Args:
        runs: of :func:`profile_runs`, for one profile.

    Returns:
        A row per experiment with ``device_hours`` (training, projections, evaluation, recording; all finished
        seeds) and the mean seconds of one run's parts; "not run" where nothing has finished.
    """
    rows = []
    parts = ["train_seconds", "projection_seconds", "evaluation_seconds", "recording_seconds"]
    for name, seeds in runs.groupby("experiment", sort=False):
        done = seeds.dropna(subset=[metric_of(seeds).column]).reindex(
            columns=[*seeds.columns, *(p for p in parts if p not in seeds)]
        )
        hours = done[parts].fillna(0).to_numpy(float).sum() / 3600
        rows.append(
            {
                "experiment": name,
                "runs": f"{len(done)} of {len(seeds)}",
                "device_hours": (f"{hours:.2f}" if hours >= 0.1 else f"{hours:.2g}")
                if len(done)
                else NOT_RUN,
                **{
                    part: f"{done[part].astype(float).mean():.1f}".replace("nan", "") if len(done) else ""
                    for part in parts
                },
                "device": ", ".join(dict.fromkeys(done.device)) if len(done) else "",
            }
        )
    return pd.DataFrame(rows)


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """Return where each finished run came from: name, commit of the code, device, end, the images it saw."""
    done = runs.dropna(subset=[metric_of(runs).column])
    columns = ["run_id", "commit", "device", "finished", "data_train_sha256"]
    return (
        done.reindex(columns=columns)
        .assign(**{c: done[c].str[:12] for c in ("commit", "data_train_sha256") if c in done})
        .reset_index(drop=True)
    )
