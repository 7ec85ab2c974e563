"""Every table, from the store: DataFrames in, DataFrames out, written as Markdown and CSV."""

from lrpet.tables.accuracy import accuracy_table, imagenet_table
from lrpet.tables.claims import ablation_table, claims_table, differences, summary_of_ablations
from lrpet.tables.costs import cost_table
from lrpet.tables.gradient_projection import answers_table, choice_table, projection_table, way_of
from lrpet.tables.latency import equal_latency_differences, equal_latency_table
from lrpet.tables.names import label_of
from lrpet.tables.objects import object_tables, objects_against_paper, objects_table
from lrpet.tables.one_run import comparison, verdict
from lrpet.tables.pages import headline, summary_of, write_pages, write_tables
from lrpet.tables.recorded import (
    choose_runs,
    energy_shares,
    gradient_ratios,
    read_recorded,
)
from lrpet.tables.rows import profile_runs, published
from lrpet.tables.shown import show
from lrpet.tables.time_spent import projection_share, provenance, replication_cost

__all__ = [
    "ablation_table",
    "accuracy_table",
    "answers_table",
    "choice_table",
    "choose_runs",
    "claims_table",
    "comparison",
    "cost_table",
    "differences",
    "energy_shares",
    "equal_latency_differences",
    "equal_latency_table",
    "gradient_ratios",
    "headline",
    "imagenet_table",
    "label_of",
    "object_tables",
    "objects_against_paper",
    "objects_table",
    "profile_runs",
    "projection_share",
    "projection_table",
    "provenance",
    "published",
    "read_recorded",
    "replication_cost",
    "show",
    "summary_of",
    "summary_of_ablations",
    "verdict",
    "way_of",
    "write_pages",
    "write_tables",
]
