"""Networks for other programs; loaded when asked for."""

from lrpet.deploy.export import FORMATS, TOLERANCES, export
from lrpet.deploy.latency import LatencyPlan, ranks_for_latency

__all__ = ["FORMATS", "TOLERANCES", "LatencyPlan", "export", "ranks_for_latency"]
