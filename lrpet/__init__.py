"""Train compact networks by low-rank projection with energy transfer (LRPET, arXiv 2204.05566).

This loads the library alone. ``export``, ``ranks_for_latency`` and what runs experiments (``run``,
``load_runs``, ``RunConfig``) are loaded when they are first asked for.
"""

from lrpet.lowrank import (
    Compressor,
    LowRankProjector,
    cost,
    factorize,
    fold_batchnorm,
    load_compact,
    project,
    ranks_for_budget,
    ranks_from_ratio,
    save_compact,
    select,
)
from lrpet.models import build_model

LATER = {
    "RunConfig": "lrpet.config",
    "export": "lrpet.deploy",
    "load_runs": "lrpet.runs",
    "ranks_for_latency": "lrpet.deploy",
    "run": "lrpet.runs",
}  # name → the module that has it

__all__ = [
    "Compressor",
    "LowRankProjector",
    "RunConfig",
    "build_model",
    "cost",
    "export",
    "factorize",
    "fold_batchnorm",
    "load_compact",
    "load_runs",
    "project",
    "ranks_for_budget",
    "ranks_for_latency",
    "ranks_from_ratio",
    "run",
    "save_compact",
    "select",
]


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module 'lrpet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *LATER])
