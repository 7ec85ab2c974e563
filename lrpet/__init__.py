"""Train compact networks by low-rank projection with energy transfer (LRPET, arXiv 2204.05566)."""

from lrpet.budget import ranks_for_budget
from lrpet.config import RunConfig
from lrpet.cost import cost
from lrpet.factorize import factorize, fold_batchnorm, load_compact, save_compact
from lrpet.models import build_model
from lrpet.projection import project
from lrpet.projector import LowRankProjector
from lrpet.ranks import ranks_from_ratio
from lrpet.runs import load_runs, run

__all__ = [
    "LowRankProjector",
    "RunConfig",
    "build_model",
    "cost",
    "factorize",
    "fold_batchnorm",
    "load_compact",
    "load_runs",
    "project",
    "ranks_for_budget",
    "ranks_from_ratio",
    "run",
    "save_compact",
]
