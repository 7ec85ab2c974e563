"""Networks for other programs; loaded when asked for."""

from lrpet.deploy.export import FORMATS, TOLERANCES, export

__all__ = ["FORMATS", "TOLERANCES", "export"]
