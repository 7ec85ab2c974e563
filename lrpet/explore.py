"""What the method notebook lets a reader try: a slider that moves the rank, and a measurement layer by layer.

Needs ipywidgets and matplotlib (``pip install lrpet[notebooks]``).
"""

from __future__ import annotations

import base64

import ipywidgets
import pandas as pd
import torch
from torch import Tensor, nn

from lrpet.figures.one_matrix import plot_spectrum
from lrpet.lowrank.batchnorm import batchnorm_scale, find_batchnorms
from lrpet.lowrank.projection import project
from lrpet.training.progress import bar_is_possible

__all__ = ["RankExplorer", "describe_projection", "measure_by_depth"]


def describe_projection(matrix: Tensor, rank: int) -> str:
    """Say in one line what a projection does to a matrix: energy and relative error with and without energy transfer, and cost.

    Args:
        matrix: M, (N, D), floating point.
        rank: R, 1 ≤ R ≤ min(N, D).

    Source: arXiv 2204.05566, sections III-B and III-C.

    >>> describe_projection(torch.diag(torch.tensor([4.0, 3.0])), 1)
    'R = 1 of 2 · energy: LRP 64.0 %, LRPET 100.0 % · relative error: LRP 0.600, LRPET 0.632 · MACs: 100 % of dense'
    """
    M = matrix.double()
    N, D = M.shape
    P = {name: project(M, rank, energy_transfer=name == "LRPET") for name in ("LRP", "LRPET")}
    energy = ", ".join(f"{name} {100 * (A.norm() / M.norm()) ** 2:.1f} %" for name, A in P.items())
    error = ", ".join(f"{name} {(A - M).norm() / M.norm():.3f}" for name, A in P.items())
    share = rank * (N + D) / (N * D)
    return f"R = {rank} of {min(N, D)} · energy: {energy} · relative error: {error} · MACs: {100 * share:.0f} % of dense"


class RankExplorer:
    """A slider for the rank R, and below it the spectrum, the energy and the error that belong to it.

    Where a person has the notebook open the last line of a cell shows the slider; where nobody can move it (papermill,
    a page on GitHub) a picture at the first rank.

    Args:
        matrix: M, (N, D), floating point.
        rank: R at the start, 1 ≤ R ≤ min(N, D).
        live: whether to show the slider; None finds out.

    Raises:
        ValueError: the rank does not fit the matrix.

    >>> explorer = RankExplorer(torch.eye(4), 2)
    >>> explorer.slider.value = 3
    >>> explorer.text.value.split(" · ")[0]
    'R = 3 of 4'
    """

    def __init__(self, matrix: Tensor, rank: int, *, live: bool | None = None):
        self.matrix, self.live = matrix.detach().double().cpu(), bar_is_possible() if live is None else live
        self.text, self.picture = (
            ipywidgets.HTML(),
            ipywidgets.Image(format="png", layout={"max_width": "100%", "width": "825px"}),
        )
        self.draw(rank)
        K = min(self.matrix.shape)
        self.slider = ipywidgets.IntSlider(
            rank, 1, K, description="rank R", continuous_update=False, layout={"width": "600px"}
        )
        self.slider.observe(lambda change: self.draw(change["new"]), "value")
        self.widget = ipywidgets.VBox([self.slider, self.text, self.picture])

    def draw(self, rank: int) -> None:
        """Show the projection onto rank R."""
        self.text.value = describe_projection(self.matrix, rank)
        self.picture.value = plot_spectrum(self.matrix, rank).png()

    def _repr_mimebundle_(self, include=None, exclude=None):
        if self.live:
            return self.widget._repr_mimebundle_(include=include, exclude=exclude)
        return {
            "text/plain": f"{self.text.value} (open the notebook to move R)",
            "image/png": base64.b64encode(self.picture.value).decode(),
        }


@torch.no_grad()
def measure_by_depth(model: nn.Module, images: Tensor) -> pd.DataFrame:
    """Measure, for each convolution with a BatchNorm behind it, the norm of the two and the size of what they put out.

    Args:
        model: a network; it runs once in eval mode, its mode is restored.
        images: (B, C, H, W), as the network takes them.

    Returns:
        A row a layer in the order of execution: ``name``, ``norm`` = ‖diag(a)·M‖_F of convolution and BatchNorm merged,
        ``output`` = standard deviation of the BatchNorm's output.

    Raises:
        ValueError: torch.fx cannot trace the model.

    Source: the quantities of arXiv 2204.05566.

    >>> measure_by_depth(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)).columns.tolist()
    ['name', 'norm', 'output']
    """
    modules = dict(model.named_modules())
    pairs = {
        name: bn
        for name, bn in find_batchnorms(model).items()
        if bn is not None and isinstance(modules[name], nn.Conv2d)
    }
    output = {}
    hooks = [
        modules[bn].register_forward_hook(lambda _m, _x, y, bn=bn: output.update({bn: y.std().item()}))
        for bn in pairs.values()
    ]
    was_training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    merged = {
        name: batchnorm_scale(modules[bn]).reshape(-1, 1) * modules[name].weight.flatten(1).double()
        for name, bn in pairs.items()
    }
    return pd.DataFrame(
        [
            {"name": name, "norm": merged[name].norm().item(), "output": output[bn]}
            for name, bn in pairs.items()
        ]
    )
