"""Networks for other programs; loaded when asked for."""

from lrpet.deploy.export import FORMATS, TOLERANCE, export

__all__ = ["FORMATS", "TOLERANCE", "export"]
