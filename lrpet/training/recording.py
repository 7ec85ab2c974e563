"""What a run keeps of its weights and gradients: spectra and gradient norms of each layer, at a few epochs.

The spectra take one eigen-decomposition of a small matrix per layer, the norms a handful of steps per epoch,
so that recording takes a small share of the training time; the run's summary says how much.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lrpet.lowrank.layers import matrix_of, resolve_unfolding
from lrpet.lowrank.ranks import compressible_layers

__all__ = [
    "Recorder",
    "load_gradients",
    "load_spectra",
    "recorded_epochs",
    "singular_values",
    "weight_matrices",
]
POINTS = 16  # epochs at which a run is recorded; all of a shorter one
SAMPLES = 8  # steps of such an epoch whose gradients are measured


def recorded_epochs(epochs: int) -> set[int]:
    """Return the epochs (from 0) that are recorded: first, last and others evenly between, 16 at most.

    >>> sorted(recorded_epochs(400))[:3]
    [0, 27, 53]
    """
    return set(np.linspace(0, epochs - 1, min(POINTS, epochs)).round().astype(int).tolist())


def weight_matrices(
    model: nn.Module, include: str | None = None, unfolding: str | Mapping[str, str] = "rows"
) -> dict[str, Tensor]:
    """Return the weight of each convolution, or layer of those names, as (N, D), factors multiplied out.

    Args:
        model: the network.
        include: names of the layers, with "*"; None: all convolutions.
        unfolding: of the layers that are not factorized, see :class:`lrpet.LowRankProjector`.

    >>> [tuple(M.shape) for M in weight_matrices(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))).values()]
    [(8, 27)]
    """
    pairs = {report.name for report in getattr(model, "factorization", []) if report.action == "factorized"}
    matrices = {
        name: model.get_submodule(name)[1].weight.flatten(1) @ model.get_submodule(name)[0].weight.flatten(1)
        for name in pairs
    }
    layers = compressible_layers(model, include)
    unfolding = resolve_unfolding(model, unfolding)
    matrices |= {
        name: matrix_of(model.get_submodule(name), unfolding[name])
        for name in layers
        if name.rpartition(".")[0] not in pairs
    }
    return {
        name: matrices[name]
        for name in dict.fromkeys(
            n.rpartition(".")[0] if n.rpartition(".")[0] in pairs else n for n in layers
        )
    }


@torch.no_grad()
def singular_values(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the singular values of each matrix (N, D), descending, (K,), float32 on the CPU.

    Matrices of one shape are decomposed together, by the eigenvalues of their smaller Gram matrix in float64.

    >>> singular_values({"a": torch.diag(torch.tensor([3.0, 4.0]))})
    {'a': tensor([4., 3.])}
    """
    alike = defaultdict(list)
    for name, M in matrices.items():
        alike[tuple(M.shape)].append(name)
    values = {}
    for names in alike.values():
        A = torch.stack([matrices[name] for name in names]).double()  # (B, N, D)
        A = A if A.shape[-2] <= A.shape[-1] else A.mT
        squares = torch.linalg.eigvalsh(A @ A.mT).flip(-1).clamp(min=0)  # (B, K)
        values |= dict(zip(names, squares.sqrt().float().cpu(), strict=True))
    return {name: values[name] for name in matrices}


class Recorder:
    """Keeps spectra and gradient norms of a run that is being trained, and writes them to its folder.

    Args:
        epochs: of the run, which decide at which of them it records.
        steps: of an epoch.
        include: names of the layers that are recorded, with "*"; None: all convolutions.
        unfolding: of the weights whose spectra it records.

    >>> recorder, model = Recorder(epochs=1, steps=1), nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> recorder.record_spectra(model, epoch=0, when="before")
    >>> list(recorder.state["spectra"])
    ['1/before/0']
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        include: str | None = None,
        unfolding: str | Mapping[str, str] = "rows",
    ):
        self.include, self.unfolding = include, unfolding
        self.at = recorded_epochs(epochs)
        self.every = -(-steps // SAMPLES)  # rounded up: SAMPLES steps at most, and the last
        # tensors, numbers and names only: it goes into the checkpoint
        self.state: dict = {"spectra": {}, "gradients": [], "sums": {}}

    def record_spectra(self, model: nn.Module, epoch: int, when: str) -> None:
        """Keep all singular values, "before" or "after" the projection that ends an epoch (from 0)."""
        if epoch in self.at:
            values = singular_values(weight_matrices(model, self.include, self.unfolding))
            self.state["spectra"] |= {f"{epoch + 1}/{when}/{name}": s.half() for name, s in values.items()}

    @torch.no_grad()
    def record_gradients(self, model: nn.Module, epoch: int, in_epoch: int, last: bool) -> None:
        """Add the norms of this step's gradients to the means, every few steps; ``last`` ends the epoch."""
        if epoch not in self.at or in_epoch % self.every and not last:
            return
        layers = {name: model.get_submodule(name) for name in compressible_layers(model, self.include)}
        # not one made of U, s and V
        weights = {name: layer.weight for name, layer in layers.items() if "weight" in layer._parameters}
        if not weights:
            return
        tensors = [w.grad for w in weights.values()] + list(weights.values())
        norms = torch.stack(torch._foreach_norm(tensors))  # (2 · layers,)
        sums = self.state["sums"]
        if list(weights) != sums.get("names"):
            sums |= {"names": list(weights), "norms": torch.zeros_like(norms), "count": 0}
        sums["norms"] += norms
        sums["count"] += 1
        if last:
            rows = zip(sums["names"], *(sums["norms"] / sums["count"]).view(2, -1).tolist(), strict=True)
            self.state["gradients"] += [
                {"epoch": epoch + 1, "layer": name, "gradient_norm": gradient, "weight_norm": size}
                for name, gradient, size in rows
            ]
            sums.clear()

    def files(self) -> dict[str, bytes]:
        """Return the files of a run folder that hold the records, by name."""
        tables = defaultdict(dict)
        for key, s in self.state["spectra"].items():
            epoch, when, layer = key.split("/")
            tables[f"{when}/{layer}"][int(epoch)] = s.cpu().numpy()  # on a GPU where a run resumed
        arrays = {}
        # one row per epoch: its number, its singular values, NaN where the layer has become smaller
        for key, rows in tables.items():
            arrays[key] = np.full((len(rows), 1 + max(map(len, rows.values()))), np.nan, np.float32)
            for line, (epoch, s) in zip(arrays[key], rows.items(), strict=True):
                line[0], line[1 : 1 + len(s)] = epoch, s
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        gradients = pd.DataFrame(
            self.state["gradients"], columns=["epoch", "layer", "gradient_norm", "weight_norm"]
        )
        return {
            "spectra.npz": file.getvalue(),
            "gradients.csv": gradients.to_csv(index=False, float_format="%.5g").encode(),
        }


def load_spectra(folder: Path) -> pd.DataFrame:
    """Return the recorded singular values, one per row: ``epoch``, ``when``, ``layer``, ``i``, ``s``.

    Raises:
        FileNotFoundError: the run is not finished, or older than recording.
    """
    rows = []
    with np.load(Path(folder) / "spectra.npz", allow_pickle=False) as file:
        for key in file.files:
            when, layer = key.split("/")
            table = file[key].astype(np.float32)
            i = np.arange(1, table.shape[1])
            rows += [
                pd.DataFrame({"epoch": int(epoch), "when": when, "layer": layer, "i": i, "s": s})
                for epoch, *s in table
            ]
    return pd.concat(rows, ignore_index=True).dropna(ignore_index=True)


def load_gradients(folder: Path) -> pd.DataFrame:
    """Return the recorded gradient norms: one row per epoch and layer, means over some eight steps.

    ``gradient_norm`` is ‖∂L/∂M‖_F, ``weight_norm`` ‖M‖_F. Their product does not change with the scale of a
    weight that a BatchNorm follows, the first alone does.

    Raises:
        FileNotFoundError: the run is not finished, or older than recording.
    """
    return pd.read_csv(Path(folder) / "gradients.csv")
