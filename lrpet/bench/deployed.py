"""Tables of what a compact network brings where it runs, and of what an optimizer's step takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

__all__ = ["judged", "latency_table", "optimizers_table", "runtimes_table"]
COMPILED = ("onnxruntime", "openvino")  # a network is judged by the better of the two
LEAST_SHARE = {"resnet18": 0.9, "resnet50": 0.9, "vgg16": 0.9, "vit": 0.8}  # of the ideal gain, aligned ranks
LEAST_GAIN = {"resnet18": ("aligned", 1.9), "resnet50": ("aligned", 1.9), "vgg16": ("aligned", 1.9)}
LEAST_GAIN |= {"resnet56": ("columns", 1.5)}
FURTHEST = 5  # % that a measured speed-up may be off


def _rows(results: Sequence[dict], benchmark: str, kind: str = "cpu") -> pd.DataFrame:
    found = [result for result in results if (result["benchmark"], result["kind"]) == (benchmark, kind)]
    return pd.DataFrame(found[0]["rows"] if found else [])


def runtimes_table(results: Sequence[dict], batch: int = 1, threads: int = 1) -> pd.DataFrame:
    """Return a row per network, runtime and precision: dense milliseconds, and each variant's gain.

    Gains are over the dense network in the same runtime and precision; ``ideal`` is that of aligned ranks by
    multiply-adds, ``share`` the aligned gain by it, and ``over_fp32`` the gain of aligned ranks in this
    precision over the dense network in fp32. Empty where the benchmark was not run.
    """
    rows = _rows(results, "runtimes")
    if rows.empty:
        return rows
    rows = rows[(rows.batch == batch) & (rows.threads == threads)]
    where, made = ["network", "runtime", "precision"], []
    fp32 = (
        rows[(rows.precision == "fp32") & (rows.variant == "dense")].set_index(["network", "runtime"]).seconds
    )
    for names, group in rows.groupby(where, sort=False):
        of = group.set_index("variant")
        row = dict(zip(where, names, strict=True)) | {"n": int(of.n.min())}
        row["dense_ms"] = 1e3 * of.seconds["dense"]
        row |= {variant: of.gain.get(variant) for variant in ("compact", "aligned", "columns")}
        row |= {"ideal": of.ideal["aligned"], "share": of.share["aligned"]}
        made.append(row | {"over_fp32": fp32[names[:2]] / of.seconds["aligned"]})
    return pd.DataFrame(made)


def latency_table(results: Sequence[dict]) -> pd.DataFrame:
    """Return a row per device, runtime and speed-up asked for; empty where the benchmark was not run."""
    found = {kind: _rows(results, "latency", kind) for kind in ("cpu", "cuda")}
    tables = [rows.assign(on=kind, batch=rows.get("batch", 1)) for kind, rows in found.items() if len(rows)]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    if "refused" in table:  # what to do about it is for callers
        table["refused"] = table.refused.str.partition(";")[0]
    return table[["on", *(name for name in table if name not in ("on", "trade"))]]


def optimizers_table(results: Sequence[dict]) -> pd.DataFrame:
    """Return a row per size of layers and optimizer, in milliseconds; empty where it was not run."""
    rows = _rows(results, "optimizers")
    for name in ("update", "refresh", "averaged") if len(rows) else ():
        rows[f"{name}_ms"] = 1e3 * rows.pop(f"{name}_seconds")
    return rows


def judged(results: Sequence[dict]) -> Iterator[tuple[str, float | None, str, float]]:
    """Yield what is judged, what was measured (None: not run), "≥" or "≤", and the target."""
    table, latency = runtimes_table(results), _rows(results, "latency")
    where = "ONNX Runtime or OpenVINO, fp32, batch 1, one thread"

    def best(network: str, column: str) -> float | None:
        if table.empty:
            return None
        chosen = table[
            (table.network == network) & table.runtime.isin(COMPILED) & (table.precision == "fp32")
        ]
        return None if chosen.empty else float(chosen[column].max())

    for network, share in LEAST_SHARE.items():
        yield (
            f"{network}, aligned, share of the ideal gain ({where})",
            best(network, "share"),
            "≥",
            share,
        )
    for network, (variant, gain) in LEAST_GAIN.items():
        yield f"{network}, {variant}, times as fast as dense ({where})", best(network, variant), "≥", gain
    for runtime in ("openvino", "onnxruntime", "eager"):
        rows = latency[latency.runtime == runtime] if len(latency) else latency
        off = None
        if len(rows):
            rows = rows.reindex(columns=["asked", "measured"])  # what was refused has not been measured
            off = float(100 * (rows["measured"] / rows.asked - 1).abs().fillna(math.inf).max())
        yield (
            f"resnet18 in {runtime}, % by which ranks for 1.5 and 2.0 miss",
            off,
            "≤",
            FURTHEST,
        )
