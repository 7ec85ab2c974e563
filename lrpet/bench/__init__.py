"""Speed and its growth, measured side by side in one run (``python -m lrpet.bench``), and its tables."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lrpet.bench.deployed import judged, latency_table, optimizers_table, runtimes_table
from lrpet.paths import results_root
from lrpet.runs.store import or_leave_out, read_map

__all__ = [
    "TARGETS",
    "describe",
    "find",
    "latency_table",
    "load_results",
    "optimizers_table",
    "projection_table",
    "runtimes_table",
    "training_table",
    "verdicts",
]
TARGETS = {
    "cpu": {"resnet56": 6, "resnet18": 10, "resnet50": 8},
    "cuda": {"resnet56": 20, "resnet18": 20, "resnet50": 20},
}  # times one thin SVD per layer, which is what the authors' code computes
TRAINING_TARGETS = {"cpu": 1.5, "cuda": 10}  # times the throughput of a plain loop, ResNet-56 at batch 128
EPOCH_SECONDS_TARGET = 1.5  # of ResNet-56 on one H200
SHARES = {
    "after every epoch": (391, "exact", 1),
    "every 16 iterations": (16, "fast", 1),
}  # steps between two, path, target in % of the time
MEMORY_TARGET = 2.2  # model, bases and what a projection takes for a while, by the model


def load_results() -> list[dict]:
    """Return each kept benchmark of speed; its file's name is ``file``, ``kind`` is "cpu" or "cuda".

    Warns:
        Damaged: a file that cannot be read, which is left out.
    """
    files = sorted((results_root() / "bench").glob("*.json"))
    files = [file for file in files if not file.stem.startswith("models-")]
    read = [or_leave_out(lambda file: read_map(file, ("benchmark",)), file) for file in files]
    return [
        {**result, "file": file.name, "kind": file.stem.rpartition("-")[2]}
        for file, result in zip(files, read, strict=True)
        if result
    ]


def find(results: Sequence[dict], benchmark: str, model: str | None = None, kind: str = "cpu") -> dict:
    """Return the result of one benchmark.

    Raises:
        ValueError: it was not run; says how to.
    """
    for result in results:
        if (result["benchmark"], result.get("model"), result["kind"]) == (benchmark, model, kind):
            return result
    raise ValueError(
        f"not run: python -m lrpet.bench {benchmark}{f' --model {model}' if model else ''} --device {kind}"
    )


def describe(results: Sequence[dict]) -> pd.DataFrame:
    """Return where and when each benchmark was measured, one row each."""
    names = ("file", "device", "threads", "torch", "python", "commit", "started")
    rows = [
        {name: result[name] for name in names}
        | {"commit": result["commit"][:9] + " (changed)" * bool(result["dirty"])}
        for result in results
    ]
    return pd.DataFrame(rows, columns=names)


def projection_table(results: Sequence[dict]) -> pd.DataFrame:
    """Return a row per network and device that has a target: times, speedups, memory, or "not run"."""
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
            row |= {"n": t["svd_thin"]["n"], "threads": result["threads"]}
            row |= {f"{way}_ms": 1e3 * t[way]["median_seconds"] for way in ("svd_thin", "exact", "fast")}
            thin = t["svd_thin"]["ratio_to_first"]
            row |= {
                "speedup_exact": thin / t["exact"]["ratio_to_first"],
                "speedup": thin / t["fast"]["ratio_to_first"],
                "target": target,
            }
            torchao = t["torchao"]["ratio_to_first"] / t["fast"]["ratio_to_first"] if "torchao" in t else None
            row |= {"speedup_torchao": torchao}
            row |= {"followed": f"{result['followed']} of {result['layers']}"}
            for way in ("exact", "fast"):
                row[f"memory_{way}"] = (
                    memory[f"{way}_step_bytes"] + (way == "fast") * memory["bases_bytes"]
                ) / memory["model_bytes"]
            rows.append(row)
    columns = [
        "network",
        "on",
        "n",
        "threads",
        "svd_thin_ms",
        "exact_ms",
        "fast_ms",
        "speedup_exact",
        "speedup",
        "target",
        "speedup_torchao",
        "followed",
        "memory_exact",
        "memory_fast",
    ]
    return pd.DataFrame(rows, columns=columns).astype(object).fillna("")


def training_table(results: Sequence[dict]) -> pd.DataFrame:
    """Return a row per device and way of training: images per second, seconds per epoch, gain."""
    rows = []
    for kind in TRAINING_TARGETS:
        try:
            result = find(results, "training", "resnet56", kind)
        except ValueError:
            rows.append({"on": kind, "way": "not run"})
            continue
        for way, t in result["timings"].items():
            row = {
                "on": kind,
                "way": way,
                "n": t["n"],
                "threads": result["threads"],
                "images_per_second": result["images_per_second"][way],
            }
            row |= {"epoch_seconds": result["epoch_seconds"][way], "gain": 1 / t["ratio_to_first"]}
            rows.append(
                row
                | {
                    "digits_top1_pct": ", ".join(
                        f"{value:.1f}" for value in result.get("top1_pct", {}).get(way, [])
                    )
                }
            )
    columns = ["on", "way", "n", "threads", "images_per_second", "epoch_seconds", "gain", "digits_top1_pct"]
    return pd.DataFrame(rows, columns=columns).astype(object).fillna("")


def verdicts(results: Sequence[dict]) -> pd.DataFrame:
    """Return each target of this project, what was measured, and whether it is met."""
    rows = []

    def judge(what: str, measured: float | None, sign: str, target: float) -> None:
        met = measured is not None and (measured >= target if sign == "≥" else measured <= target)
        shown, verdict = (
            ("not run", "not run") if measured is None else (f"{measured:.2f}", "met" if met else "not met")
        )
        rows.append({"what": what, "measured": shown, "target": f"{sign} {target}", "verdict": verdict})

    for row in projection_table(results).to_dict("records"):
        name, run = f"projection of {row['network']} on {row['on']}", row["n"] != "not run"
        judge(
            f"{name}, times as fast as one thin SVD each", row["speedup"] if run else None, "≥", row["target"]
        )
        memory = 1 + max(row["memory_exact"], row["memory_fast"]) if run else None
        judge(f"{name}, memory by that of the model, model included", memory, "≤", MEMORY_TARGET)
    for kind, target in TRAINING_TARGETS.items():
        try:
            training = find(results, "training", "resnet56", kind)
        except ValueError:
            training = None
        gain = 1 / training["timings"]["ours_bf16"]["ratio_to_first"] if training else None
        judge(f"training of resnet56 on {kind}, times the throughput of a plain loop", gain, "≥", target)
        if kind == "cuda":
            judge(
                "training of resnet56 on cuda, seconds per epoch",
                training and training["epoch_seconds"]["ours_bf16"],
                "≤",
                EPOCH_SECONDS_TARGET,
            )
        try:
            timings = find(results, "projection", "resnet56", kind)["timings"]
        except ValueError:
            timings = None
        for when, (steps, path, share) in SHARES.items():
            measured = None
            if training and timings:
                took = timings[path]["median_seconds"]
                measured = (
                    100
                    * took
                    / (took + steps * training["timings"]["ours_bf16"]["median_seconds"] / training["steps"])
                )
            judge(
                f"projection of resnet56 on {kind} {when} ({path}), % of the training time",
                measured,
                "≤",
                share,
            )
    for what in judged(results):
        judge(*what)
    return pd.DataFrame(rows)
