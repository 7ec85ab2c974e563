"""What a run leaves in its folder when it ends."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrpet.config import RunConfig
from lrpet.data.batches import Batches
from lrpet.files import write_file
from lrpet.lowrank.compact_file import save_compact
from lrpet.lowrank.cost import Cost
from lrpet.lowrank.ranks import LayerReport
from lrpet.methods.base import count_cost, dense_network
from lrpet.models import unboxed
from lrpet.runs.environment import utc_now
from lrpet.runs.store import WEIGHTS, read_network
from lrpet.training.state import State


@dataclass(frozen=True)
class Trained:
    """A run that was trained, and what it is written with.

    Args:
        folder: of the run.
        state: the last of the training.
        batches: the data that it saw.
        compact: the network that is deployed.
        scores: its metric, ``compact_…``, and the authors' score where the run asks for it.
        origin: commit, versions, device and data, see :func:`lrpet.runs.environment.environment`.
    """

    folder: Path
    state: State
    batches: Batches
    compact: nn.Module
    scores: dict
    origin: dict


def finish_run(trained: Trained) -> None:
    """Write what a run leaves, its summary last."""
    folder, state, compact = trained.folder, trained.state, trained.compact
    config, method, classes = state.config, state.method, len(trained.batches.data.classes)
    if not hasattr(compact, "factorization"):
        compact.factorization, compact.compressions = [], []  # a dense network is one with nothing factorized
    deployed = count_cost(compact, config)
    counted = count_cost(dense_network(config, classes), config, method.ranks)
    rows = _layer_rows(counted, deployed, compact.factorization, state.layers)
    summary = _summary(trained, deployed, counted, sum(row["action"] == "constant" for row in rows))
    filters = method.structure if config.method == "filter_pruning" else None
    save_compact(compact, folder / WEIGHTS, model=config.model, num_classes=classes, filters=filters)
    _read_back(compact, config, folder / WEIGHTS)
    for name, content in state.recorder.files().items():
        write_file(folder / name, content)
    texts = {
        "config.json": as_json(config.to_dict()),
        "environment.json": as_json(trained.origin | {"finished": utc_now()}),
        "history.csv": pd.DataFrame(state.history).to_csv(index=False),
        "layers.csv": pd.DataFrame(rows).to_csv(index=False),
        "summary.json": as_json(summary),
    }
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    write_file(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    for name, text in texts.items():  # the summary last: it says that all others are there
        write_file(folder / name, text)
    tidy(folder)


def _read_back(compact: nn.Module, config: RunConfig, file: Path) -> None:
    """Refuse to finish with weights that do not load as what was saved."""
    saved, loaded = compact.state_dict(), read_network(config, file).state_dict()
    if saved.keys() != loaded.keys() or not all(torch.equal(saved[n].cpu(), loaded[n]) for n in saved):
        raise OSError(f"{file} does not hold the network that was written to it; look at its disk")


def _summary(trained: Trained, deployed: Cost, counted: Cost, dead_layers: int) -> dict:
    """Return the numbers of a run; its costs as deployed, and as they follow from its ranks."""
    state, last = trained.state, trained.state.history[-1]
    metric = state.config.metric
    best = max(state.history, key=lambda row: metric.sign * row[metric.column])  # the first of several
    return {
        "run_id": state.config.run_id,
        **{name: last[name] for name in ("scored_on", metric.column, "top5_pct") if name in last},
        f"best_{metric.column}": best[metric.column],
        "best_epoch": best["epoch"],
        **trained.scores,
        "compact_max_relative_error": largest_difference(
            trained.compact, state.method.model, _some_images(trained.batches)
        ),
        "train_loss": last["train_loss"],
        "params": deployed.params,
        "macs": deployed.macs,
        "macs_by_rank": counted.macs if state.method.ranks else deployed.macs,
        "dense_params": counted.dense_params,
        "dense_macs": counted.dense_macs,
        "num_classes": len(trained.batches.data.classes),
        "dead_layers": dead_layers,
        "projections": state.projections,
        **{
            f"{name}_seconds": round(state.clock.seconds[name], 3)
            for name in ("train", "projection", "evaluation", "recording")
        },
    }


def tidy(folder: Path) -> None:
    """Delete what a finished run needs no more: checkpoints, and what it was writing when it was killed."""
    for left in (*folder.glob("checkpoint.*"), *folder.glob("*.part*")):
        left.unlink(missing_ok=True)


def _layer_rows(full, deployed, factorization, projected) -> list[dict]:
    """Return one row per layer of the full network: its cost there, and that of its part when compact."""
    actions = {layer.name: layer for layer in factorization}
    last = {layer["name"]: layer["energy_kept"] for layer in projected}
    rows = []
    for layer in full.layers:
        names = (layer.name, f"{layer.name}.0", f"{layer.name}.1")
        parts = [part for part in deployed.layers if part.name in names]
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


def _some_images(batches: Batches) -> Tensor:
    """Return held-out images, fewer where they are large."""
    return next(batches.test(4 if (getattr(batches.data, "image_size", None) or 0) > 224 else 256))[0]


@torch.no_grad()
def largest_difference(network: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Return the largest difference of an output of two networks, relative to the largest number in it."""
    outputs = [tree_leaves(unboxed(model.eval())(x)) for model in (network, reference)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*outputs, strict=True))


def as_json(values: dict) -> str:
    """Return values as the text of a JSON file."""
    return json.dumps(values, indent=1) + "\n"
