"""What a run leaves in its folder when it ends."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pandas as pd
import torch

from lrpet.files import write_whole
from lrpet.lowrank.compact_file import save_compact
from lrpet.lowrank.cost import cost
from lrpet.lowrank.ranks import LayerReport
from lrpet.models import build_model
from lrpet.runs.environment import utc_now
from lrpet.runs.store import WEIGHTS


def finish_run(config, folder, images, batches, method, state, compact, compact_top1_pct, origin) -> None:
    """Write what a run leaves, its summary last."""
    shape = (3, config.image_size, config.image_size)
    full = build_model(config.model, len(images.classes))
    deployed, counted = cost(compact, shape), cost(full, shape, method.ranks)
    history = pd.DataFrame(state["history"])
    rows = _layer_rows(counted, deployed, getattr(compact, "factorization", []), state["layers"])
    best = history["top1_pct"].idxmax()
    summary = {
        "run_id": config.run_id,
        "scored_on": state["history"][-1]["scored_on"],
        "top1_pct": state["history"][-1]["top1_pct"],
        **{
            name: state["history"][-1][name] for name in ("top5_pct",) if name in history
        },  # of more than five classes
        "best_top1_pct": float(history["top1_pct"][best]),
        "best_epoch": int(history["epoch"][best]),
        "compact_top1_pct": compact_top1_pct,
        "compact_max_relative_error": _difference(method.model, compact, batches),
        "train_loss": state["history"][-1]["train_loss"],
        "params": deployed.params,
        "macs": deployed.macs,
        "macs_by_rank": counted.macs if method.ranks else deployed.macs,
        "dense_params": counted.dense_params,
        "dense_macs": counted.dense_macs,
        "num_classes": len(images.classes),
        "corrupt_images": len(images.corrupt),
        "dead_layers": sum(row["action"] == "constant" for row in rows),
        "projections": state["projections"],
        "train_seconds": round(state["train"], 3),
        "projection_seconds": round(state["projection"], 3),
        "evaluation_seconds": round(state["evaluation"], 3),
        "recording_seconds": round(state["recording"], 3),
    }
    compact.factorization = getattr(
        compact, "factorization", []
    )  # a dense network is one with nothing factorized
    filters = method.structure if config.method == "filter_pruning" else None
    save_compact(
        compact, folder / WEIGHTS, model=config.model, num_classes=len(images.classes), filters=filters
    )
    for name, content in state["recorder"].files().items():
        write_file(folder / name, content)
    content = {
        "config.json": as_json(config.to_dict()),
        "environment.json": as_json(origin | {"finished": utc_now()}),
        "history.csv": history.to_csv(index=False),
        "layers.csv": pd.DataFrame(rows).to_csv(index=False),
        "summary.json": as_json(summary),
    }
    content = {
        "SHA256SUMS": "".join(
            f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in content.items()
        )
    } | content
    for name, text in content.items():  # the summary last: it says that all others are there
        write_file(folder / name, text)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Delete what a finished run needs no more: its checkpoints, and what it was writing when it was killed."""
    for left in (*folder.glob("checkpoint.*"), *folder.glob("*.part*")):
        left.unlink(missing_ok=True)


def _layer_rows(full, deployed, factorization, projected) -> list[dict]:
    """Return a row for each layer of the full network: what it cost there, and what its part of the compact one costs."""
    actions = {layer.name: layer for layer in factorization}
    last = {layer["name"]: layer["energy_kept"] for layer in projected}
    rows = []
    for layer in full.layers:
        parts = [
            part
            for part in deployed.layers
            if part.name in (layer.name, f"{layer.name}.0", f"{layer.name}.1")
        ]
        action = actions.get(layer.name, LayerReport(layer.name, None, math.nan, "dense"))
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "N": layer.N,
                "D": layer.D,
                "rank": layer.rank,
                "energy_kept": last.get(layer.name, action.energy_kept),
                "action": action.action,
                "reason": action.reason,
                "macs": sum(part.macs for part in parts),
                "dense_macs": layer.dense_macs,
                "params": sum(part.params for part in parts),
                "dense_params": layer.dense_params,
            }
        )
    return rows


@torch.no_grad()
def _difference(model, compact, batches) -> float:
    """Return the largest difference of the two networks' logits on a batch, relative to the largest logit."""
    x, _ = next(batches.test(256))
    model.eval(), compact.eval()
    reference = model(x)
    return ((compact(x) - reference).abs().max() / reference.abs().max()).item()


def as_json(values: dict) -> str:
    """Return values as the text of a JSON file."""
    return json.dumps(values, indent=1) + "\n"


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all."""
    with write_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
