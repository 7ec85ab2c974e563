"""Speed and its growth, measured side by side in one run (``python -m lrpet.bench``), and what the kept measurements say."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from lrpet.config import results_root

__all__ = ["TARGETS", "describe", "find", "load_results", "projection_table", "verdicts"]

TARGETS = {"cpu": {"resnet56": 8, "resnet18": 10, "resnet50": 8}, "cuda": {"resnet56": 20, "resnet18": 20, "resnet50": 20}}  # times one SVD a layer
MEMORY_TARGET = 2.2  # model, bases and what a projection takes for a while, by the model


def load_results() -> list[dict]:
    """Return the JSON of every benchmark that was kept, each with its file name as ``file``, and "cpu" or "cuda" as ``kind``."""
    files = sorted((results_root() / "bench").glob("*.json"))
    return [{**json.loads(file.read_text(encoding="utf-8")), "file": file.name, "kind": file.stem.rpartition("-")[2]} for file in files]


def find(results: Sequence[dict], benchmark: str, model: str | None = None, kind: str = "cpu") -> dict:
    """Return the result of one benchmark.

    Raises:
        ValueError: it was not run; says how to.
    """
    for result in results:
        if (result["benchmark"], result.get("model"), result["kind"]) == (benchmark, model, kind):
            return result
    raise ValueError(f"not run: python -m lrpet.bench {benchmark}{f' --model {model}' if model else ''} --device {kind}")


def describe(results: Sequence[dict]) -> pd.DataFrame:
    """Return where and when each benchmark was measured, a row each."""
    names = ("file", "device", "threads", "torch", "python", "commit", "started")
    rows = [{name: result[name] for name in names} | {"commit": result["commit"][:9] + " (changed)" * result["dirty"]} for result in results]
    return pd.DataFrame(rows, columns=names)


def projection_table(results: Sequence[dict]) -> pd.DataFrame:
    """Return a row a network and device that has a target: times, speedups, memory; "not run" where nothing was measured."""
    rows = []
    for kind, targets in TARGETS.items():
        for model, target in targets.items():
            row = {"network": model, "on": kind}
            try:
                result = find(results, "projection", model, kind)
            except ValueError:
                rows.append(row | {"n": "not run", "target": target})
                continue
            t, memory = result["timings"], result["memory"]
            row |= {"n": t["svd"]["n"], "threads": result["threads"], "svd_ms": 1e3 * t["svd"]["median_seconds"]}
            row |= {"exact_ms": 1e3 * t["exact"]["median_seconds"], "fast_ms": 1e3 * t["fast"]["median_seconds"]}
            row |= {"speedup_exact": 1 / t["exact"]["ratio_to_first"], "speedup": 1 / t["fast"]["ratio_to_first"], "target": target}
            row |= {"speedup_thin": t["svd_thin"]["ratio_to_first"] / t["fast"]["ratio_to_first"]}
            row |= {"followed": f"{result['followed']} of {result['layers']}"}
            for way in ("exact", "fast"):
                row[f"memory_{way}"] = (memory[f"{way}_step_bytes"] + (way == "fast") * memory["bases_bytes"]) / memory["model_bytes"]
            rows.append(row)
    columns = [
        "network",
        "on",
        "n",
        "threads",
        "svd_ms",
        "exact_ms",
        "fast_ms",
        "speedup_exact",
        "speedup",
        "target",
        "speedup_thin",
        "followed",
        "memory_exact",
        "memory_fast",
    ]
    return pd.DataFrame(rows, columns=columns).astype(object).fillna("")


def verdicts(results: Sequence[dict]) -> pd.DataFrame:
    """Return each target of this project beside what was measured, and whether it is met."""
    rows = []
    for row in projection_table(results).to_dict("records"):
        name = f"projection of {row['network']} on {row['on']}"
        run = row["n"] != "not run"
        for what, measured, target, met in (
            (f"{name}, times as fast as an SVD a layer", row["speedup"], f"≥ {row['target']}", run and row["speedup"] >= row["target"]),
            (
                f"{name}, memory by that of the model, model included",
                run and 1 + max(row["memory_exact"], row["memory_fast"]),
                f"< {MEMORY_TARGET}",
                run and 1 + max(row["memory_exact"], row["memory_fast"]) < MEMORY_TARGET,
            ),
        ):
            shown, verdict = (f"{measured:.2f}", "met" if met else "not met") if run else ("not run", "not run")
            rows.append({"what": what, "measured": shown, "target": target, "verdict": verdict})
    return pd.DataFrame(rows)
