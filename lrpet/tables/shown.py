"""How a notebook shows a table: headers for people, units, no row numbers."""

from __future__ import annotations

import pandas as pd
from pandas.io.formats.style import Styler

__all__ = ["ShownTable", "show"]
HEADERS = {
    "again_on": "again on",
    "again_top1_pct": "again top-1, %",
    "again": "measured once more",
    "aligned": "aligned: times dense",
    "averaged_ms": "update with refreshes averaged in, ms",
    "best_epoch_top1_pct": "best epoch's top-1, %",
    "best_of_last_difference_pct": "that − published, points",
    "best_of_last_then_svd_top1_pct": "best of the last epochs, then SVD: top-1, %",
    "bits_per_byte": "bits per byte",
    "block_state_share": "state / AdamW's, block matrices",
    "ci95": "95 % interval, points",
    "columns": "other unfolding: times dense",
    "compact": "ratio's ranks: times dense",
    "compared_with": "compared with",
    "dense_layers": "layers left dense",
    "dense_macs": "dense MACs",
    "dense_ms": "dense, ms",
    "dense_params": "dense parameters",
    "detectable": "detectable, points",
    "device_hours": "device, h",
    "difference": "difference, points",
    "difference_pct": "ours − published, points",
    "digits_top1_pct": "top-1 on digits, %",
    "energy_kept": "energy kept",
    "epoch_seconds": "epoch, s",
    "evaluation_seconds": "evaluation, s",
    "exact_ms": "exact, ms",
    "fast_ms": "followed, ms",
    "gain": "times the plain loop",
    "gradients_mb": "gradients, MB",
    "hours_of_a_run": "a run, h",
    "ideal": "ideal, aligned",
    "images_per_second": "images / s",
    "input": "counted on",
    "largest_gradient_mb": "largest gradient, MB",
    "macs": "MACs",
    "macs_against_lrpet": "MACs against LRPET's",
    "macs_m": "MACs, M",
    "macs_reduction_pct": "fewer MACs, %",
    "map_pct": "mAP at IoU 0.5, %",
    "memory_exact": "memory, exact / model",
    "memory_fast": "memory, followed / model",
    "milliseconds": "measured, ms",
    "miou_pct": "mIoU, %",
    "n": "n",
    "name": "layer",
    "ours_pct": "ours, %",
    "over_fp32": "aligned: times dense fp32",
    "p_holm": "p, Holm",
    "paper_macs_m": "published MACs, M",
    "paper_macs_reduction_pct": "published: fewer MACs, %",
    "paper_params_m": "published parameters, M",
    "paper_pct": "published, %",
    "paper_source": "source of the published",
    "paper_top1_pct": "published top-1, %",
    "paper_top5_pct": "published top-5, %",
    "params": "parameters",
    "params_m": "parameters, M",
    "params_without_bn_m": "parameters without BatchNorm, M",
    "peak_mb": "peak, MB",
    "projection_seconds": "projection, s",
    "prune_ratio": "ratio ρ",
    "recording_seconds": "recording, s",
    "refresh_ms": "refresh, ms",
    "refresh_peak_mb": "peak at a refresh, MB",
    "share": "aligned / ideal",
    "share_pct": "share, %",
    "speedup": "followed: times a thin SVD",
    "speedup_exact": "exact: times a thin SVD",
    "speedup_torchao": "followed: times torchao",
    "state_mb": "optimizer state, MB",
    "svd_thin_ms": "one thin SVD per layer, ms",
    "times_adamw": "times AdamW",
    "times_dense": "times dense",
    "top1_difference_pct": "ours − published top-1, points",
    "top1_pct": "top-1, %",
    "top5_difference_pct": "ours − published top-5, points",
    "top5_pct": "top-5, %",
    "train_minutes": "training, min",
    "train_seconds": "training, s",
    "update_ms": "update, ms",
}
NAMES = ("question", "claim", "network", "matrix", "on", "method", "way", "metric", "pair", "setting")
NAMES += ("quantity", "allocation", "trial")
MEASURED = (  # after what names the row; each with the published value and the difference beside it
    ("top1_pct", "paper_top1_pct", "difference_pct", "top1_difference_pct"),
    ("top5_pct", "paper_top5_pct", "top5_difference_pct"),
    ("published", "ours", "ours − published"),
    ("map_pct", "miou_pct", "paper_pct", "ours_pct"),
    ("bits_per_byte",),
    ("difference", "ci95", "verdict"),
    ("macs_m", "paper_macs_m"),
    ("params_without_bn_m", "paper_params_m"),
    ("macs_reduction_pct", "paper_macs_reduction_pct"),
)
CSS = [
    {"selector": "", "props": "max-width: 960px; font-size: 12px; font-variant-numeric: tabular-nums"},
    {"selector": "caption", "props": "caption-side: bottom; text-align: left"},
    {
        "selector": "th, td",
        "props": "text-align: left; vertical-align: top; white-space: normal; padding: 0.2em 0.35em",
    },
]


class ShownTable(Styler):
    """A table as HTML where a notebook is read, and as Markdown where only text is shown."""

    def __repr__(self) -> str:
        return self.data.to_markdown(index=False, disable_numparse=True)


def show(table: pd.DataFrame, *, index: bool = False) -> ShownTable:
    """Return a table as people read it.

    What names a row comes first, then accuracy, published value and difference beside each other. A column
    that is the same in all rows is told below the table instead; a verdict always stays.

    Args:
        table: as of any function of :mod:`lrpet.tables`; it stays as it is.
        index: whether its index names the rows, and becomes the first column.

    Returns:
        The table with headers that have units, no row numbers, and "–" where there is no value.

    >>> print(show(pd.DataFrame({"n": [3, 3], "method": ["LRP", "LRPET"], "top1_pct": [84.4, None]})))
    | method   | top-1, %   |
    |:---------|:-----------|
    | LRP      | 84.40      |
    | LRPET    | –          |
    """
    table = table.reset_index() if index else table
    if "published" in table:
        table = table.rename(columns={"difference": "ours − published"})
    text = table.map(_written)
    for place, column in enumerate(text.columns):
        if str(column).endswith("_pct"):
            text.isetitem(place, table.iloc[:, place].map(_percent))
    same = [c for c in text.columns if len(text) > 1 and text[c].nunique() == 1]
    kept = (*MEASURED[0], "published", "verdict")
    same = [c for c in same if c not in kept or text[c].iloc[0] == "–"]
    said = [f"{header(c)}: {text[c].iloc[0]}" for c in same if text[c].iloc[0] != "–"]
    order = [c for c in (*NAMES, *(c for group in MEASURED for c in group)) if c in text.columns]
    order += [c for c in text.columns if c not in order]
    text = text[[c for c in order if c not in same]]
    text.columns = [header(c) for c in text.columns]
    shown = ShownTable(text, uuid="lrpet", cell_ids=False).hide(axis="index").set_table_styles(CSS)
    return shown.set_caption("In all rows, " + "; ".join(said) + ".") if said else shown


def header(column: object) -> str:
    words = " ".join(map(str, column)) if isinstance(column, tuple) else str(column).replace("_", " ")
    return HEADERS.get(column, words)


def _percent(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) and not pd.isna(value) else _written(value)


def _written(value: object) -> str:
    """Write one value: nothing as –, whole numbers with separators, others with four digits."""
    if isinstance(value, str):
        return value or "–"
    if pd.isna(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"
