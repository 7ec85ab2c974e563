"""The optimizer's part of a training step: AdamW against projected gradients, refreshes averaged in."""

from __future__ import annotations

import torch
from torch import nn

from lrpet.lowrank.gradient_projection import GradientProjection, projection_groups
from lrpet.lowrank.timing import side_by_side

__all__ = ["bench_optimizers"]
SIZES = ((768, 3072), (128, 512))  # of a ViT-Base's MLP, and of the small transformers here
STRATEGIES = ("galore", "galore2", "lotus", "vlorp", "random")
EVERY = 200  # steps between two bases, as published for GaLore


def bench_optimizers(device: str = "cpu", layers: int = 4, rounds: int = 15, seconds: float = 60) -> dict:
    """Compare one update of AdamW with those of each strategy, at a plain step and with new bases.

    A few Linear layers of one size have random gradients; the rank is a quarter of the short side. Lotus
    decides by itself when it refreshes; it is counted with the others' 200 steps, so that rows compare.

    Args:
        device: "cpu" or "cuda".
        layers: how many of each size.
        rounds: timed repetitions of each; fewer, but two at least, where they take longer than ``seconds``.
        seconds: see ``rounds``; for one size.

    Returns:
        ``rows``: one per size and way, with the seconds of an update, ``update_seconds``, of one in which
        every layer has a new basis, ``refresh_seconds``, both averaged over ``every`` steps,
        ``averaged_seconds``, and the latter by AdamW's, ``times_adamw``; ``n`` repetitions each.
    """
    where, rows = torch.device(device), []
    for short, long in SIZES:
        ways = {"adamw": _updates(None, (short, long), layers, where)}
        ways |= {name: _updates(name, (short, long), layers, where) for name in STRATEGIES}
        tasks = {(way, when): task for way, tasks in ways.items() for when, task in tasks.items()}
        timings = side_by_side(tasks, rounds, where, seconds=seconds)
        for way in ways:
            plain, refresh = timings[way, "plain"], timings.get((way, "refresh"))
            update = plain["median_seconds"]
            new = refresh["median_seconds"] if refresh else None
            averaged = update if new is None else ((EVERY - 1) * update + new) / EVERY
            row = {
                "size": f"{short}×{long}",
                "layers": layers,
                "rank": short // 4,
                "every": EVERY,
                "way": way,
            }
            row |= {"n": plain["n"], "update_seconds": update, "refresh_seconds": new}
            rows.append(row | {"averaged_seconds": averaged})
        adamw = next(row["averaged_seconds"] for row in rows if row["size"] == f"{short}×{long}")
        for row in rows[-len(ways) :]:
            row["times_adamw"] = row["averaged_seconds"] / adamw
    return {"rows": rows}


def _updates(strategy: str | None, size: tuple[int, int], layers: int, where: torch.device) -> dict:
    """Return the updates of one optimizer as functions of no argument: plain, and with new bases."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(*size, bias=False) for _ in range(layers))).to(where)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    if strategy is None:
        optimizer = torch.optim.AdamW(network.parameters())
        return {"plain": optimizer.step}
    settings = {"rank": size[0] // 4}
    settings |= {"check" if strategy == "lotus" else "every": EVERY}  # more steps than are timed
    if strategy == "vlorp":
        settings |= {"grain": 1}
    optimizer = GradientProjection(projection_groups(network, strategy, include="*", **settings))

    def refresh() -> None:
        optimizer.refresh_next()
        optimizer.step()

    return {"plain": optimizer.step, "refresh": refresh}
