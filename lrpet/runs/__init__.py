"""One configuration to one folder: trained, resumed or loaded; and the search for ranks, many of them."""

from lrpet.runs.environment import environment
from lrpet.runs.export import export_run, find_run
from lrpet.runs.run import run
from lrpet.runs.store import Run, is_complete, load_network, load_run, load_runs, weights_file

__all__ = [
    "Run",
    "environment",
    "export_run",
    "find_run",
    "is_complete",
    "load_network",
    "load_run",
    "load_runs",
    "run",
    "weights_file",
]
