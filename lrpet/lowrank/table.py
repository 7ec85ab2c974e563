"""Rows on layers as text, as HTML for notebooks, and as a DataFrame."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from typing import Any

__all__ = ["LayerTable"]


class LayerTable(ABC):
    """What has one row per layer: it prints as a table, in a notebook as HTML, and becomes a DataFrame.

    A subclass has ``layers``, a sequence of dataclasses, and says by ``cells`` and ``footer`` what is shown.
    """

    layers: Sequence[Any]

    @abstractmethod
    def cells(self) -> list[tuple[str, ...]]:
        """Return the header, then what is shown of each layer."""

    @abstractmethod
    def footer(self) -> str:
        """Return the line below the table."""

    def __str__(self) -> str:
        table = self.cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([*lines, self.footer()])

    def _repr_html_(self) -> str:
        header, *rows = ([escape(cell) for cell in row] for row in self.cells())
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"{table}<p>{escape(self.footer())}</p>"

    def to_pandas(self):
        """Return a DataFrame with one row per layer: its fields, and the note where there is one.

        >>> from torch import nn
        >>> from lrpet.lowrank import select
        >>> select(nn.Sequential(nn.Conv2d(3, 8, 3)), prune_ratio=0.5).to_pandas()["rank"].tolist()
        [4]
        """
        import pandas

        rows = [
            {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
            | ({"note": layer.note} if hasattr(layer, "note") else {})
            for layer in self.layers
        ]
        frame = pandas.DataFrame(rows)
        # a layer may have no rank or shape, which would make floats of them
        whole = frame.columns.intersection(["N", "D", "rank"])
        return frame.astype(dict.fromkeys(whole, "Int64"))


def size(N: int | None, D: int | None) -> str:
    """Return N×D, or nothing where a layer has no such shape.

    >>> size(8, 27), size(None, None)
    ('8×27', '')
    """
    return f"{N}×{D}" if N else ""
