"""The library: low-rank projection with energy transfer for any network. It knows no run and no data set."""

from lrpet.lowrank.batchnorm import (
    batchnorm_scale,
    find_batchnorms,
    fold_batchnorm,
    normalized_weights,
    resolve_batchnorms,
)
from lrpet.lowrank.budget import closest_share, ranks_for_budget
from lrpet.lowrank.compact_file import compact_header, load_compact, save_compact
from lrpet.lowrank.compressor import Compressor
from lrpet.lowrank.cost import Cost, LayerCost, cost
from lrpet.lowrank.factorize import DEAD_AT_FACTORIZATION, factorize
from lrpet.lowrank.factors import ConstantOutput, LowRankConv, LowRankConv2d, LowRankLinear, rebuild
from lrpet.lowrank.follow import follow_basis
from lrpet.lowrank.gains import measure_gains
from lrpet.lowrank.gradient_projection import GradientProjection, projection_groups
from lrpet.lowrank.plan import Plan, PlannedLayer, select
from lrpet.lowrank.projection import (
    Basis,
    gram_matrices,
    leading_basis,
    project,
    project_and_measure,
    project_on_basis_,
    truncated_svd,
)
from lrpet.lowrank.projector import DEAD_IN_TRAINING, LowRankProjector
from lrpet.lowrank.ranks import (
    LayerReport,
    Report,
    compressible_layers,
    rank_from_ratio,
    ranks_from_ratio,
    resolve_ranks,
)
from lrpet.lowrank.timing import side_by_side

__all__ = [
    "DEAD_AT_FACTORIZATION",
    "DEAD_IN_TRAINING",
    "Basis",
    "Compressor",
    "ConstantOutput",
    "Cost",
    "GradientProjection",
    "LayerCost",
    "LayerReport",
    "LowRankConv",
    "LowRankConv2d",
    "LowRankLinear",
    "LowRankProjector",
    "Plan",
    "PlannedLayer",
    "Report",
    "batchnorm_scale",
    "closest_share",
    "compact_header",
    "compressible_layers",
    "cost",
    "factorize",
    "find_batchnorms",
    "fold_batchnorm",
    "follow_basis",
    "gram_matrices",
    "leading_basis",
    "load_compact",
    "measure_gains",
    "normalized_weights",
    "project",
    "project_and_measure",
    "project_on_basis_",
    "projection_groups",
    "rank_from_ratio",
    "ranks_for_budget",
    "ranks_from_ratio",
    "rebuild",
    "resolve_batchnorms",
    "resolve_ranks",
    "save_compact",
    "select",
    "side_by_side",
    "truncated_svd",
]
