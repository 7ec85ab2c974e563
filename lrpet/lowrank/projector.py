"""The method on a model: which layers, which BatchNorm after each, weights of one shape in one batch."""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lrpet.lowrank.arguments import check, renamed
from lrpet.lowrank.batchnorm import batchnorm_scale, find_batchnorms, is_batchnorm, resolve_batchnorms
from lrpet.lowrank.follow import RESIDUAL_TOLERANCE, follow_basis
from lrpet.lowrank.layers import (
    layer_type,
    left_out,
    matrix_of,
    resolve_unfolding,
    rows_first,
    unwrap,
    unwritable,
)
from lrpet.lowrank.norms import find_norms_before, norm_scale
from lrpet.lowrank.projection import (
    Basis,
    gram_matrices,
    leading_basis,
    project_and_measure,
    project_on_basis_,
)
from lrpet.lowrank.ranks import LayerReport, Report, resolve_ranks

__all__ = ["DEAD_IN_TRAINING", "LowRankProjector"]
logger = logging.getLogger("lrpet")
DEAD_IN_TRAINING = 1e-4  # largest singular value under which a layer is left alone (authors' code)
BATCH = 2**18  # entries; weights of one shape are copied together, up to so many, and multiplied at once
PER_OUTPUT = 6  # place in the name of a group: rows of the matrix for an output, 1 or k²
SMALL = 128  # rows of a Gram matrix up to which those of several shapes are decomposed at once
EXACT_EVERY = 10  # with fast=True, every so many projections are exact and compared with the fast one


class LowRankProjector:
    """Projects the chosen layers of a model in place: the paper's method in an object with one verb.

    It knows of this process alone. Where several train one network, call ``step`` in one and broadcast the
    weights. Layers, weights and BatchNorms are looked up by name at each step. A weight that layers share is
    projected once, and without rectification; a frozen one (``requires_grad=False``) is left alone.

    Args:
        model: any ``nn.Module``; its convolutions of one group and Linear layers can take part.
        ranks: layer name → R, or one R for each compressible convolution in module order.
        energy_transfer: hand the removed energy to the kept singular values; False is "LRP".
        bn_rectification: project the weight as the BatchNorm after it scales it.
        unfolding: "rows", the paper's, for a k×k weight as a matrix N × C·k²; "columns" for N·k² × C, which
            ends as a 1×1 layer and a k×k one after it, faster where channels are few. For all layers, or a
            map of names or patterns to them; 1×1 and Linear layers have one matrix. In N·k² × C each of the
            k² rows (n, i, j) of output n is scaled by the a_n of its BatchNorm. Ours, not the paper's.
        keep_share: q in [0, 1], the share of each removed singular value that stays.
        row_eps: constant in undoing the BatchNorm scale, see :func:`lrpet.project`. Rows with a² ≤ row_eps,
            of which the undoing would lose half or more, and a BatchNorm that starts at zero all, are undone
            exactly; reports count them.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.
        example_inputs: a tensor, tuple or dict to run the model on once, to read BatchNorms off that run.
        column_scale: project a Linear layer that no BatchNorm follows as the gain of the LayerNorm or RMSNorm
            right before it scales its inputs; needs ``example_inputs``. Ours, not the paper's.
        fast: start from the directions of the previous projection, see
            :func:`lrpet.lowrank.follow.follow_basis`; a layer whose result is not certain to be within 1e-5
            of the exact one takes the exact path, and so do the first, every tenth and any ``exact`` step. A
            training that is resumed with :meth:`state_dict` repeats the uninterrupted one bit for bit.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ranks or pairs that do not fit the model, with the names.

    Warns:
        UserWarning: the model has BatchNorms, and none was found to follow a layer.

    Source: arXiv 2204.05566.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> projector = LowRankProjector(model, {"0": 2})
    >>> [(layer.name, layer.rank, layer.action) for layer in projector.step()]
    [('0', 2, 'projected')]
    >>> int(torch.linalg.matrix_rank(model[0].weight.flatten(1), rtol=1e-5))
    2
    """

    @renamed(residual="keep_share")
    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int] | Sequence[int],
        energy_transfer: bool = True,
        bn_rectification: bool = True,
        *,
        keep_share: float = 0.0,
        row_eps: float = 1e-5,
        batchnorms: Mapping[str, str | None] | None = None,
        example_inputs: Any = None,
        column_scale: bool = False,
        unfolding: str | Mapping[str, str] = "rows",
        fast: bool = True,
    ):
        self.model = unwrap(model)
        self.unfolding = resolve_unfolding(model, unfolding)
        self.ranks = resolve_ranks(model, ranks, self.unfolding)
        check("bn_rectification must be True or False", bn_rectification, isinstance(bn_rectification, bool))
        self.settings = {"energy_transfer": energy_transfer, "keep_share": keep_share, "row_eps": row_eps}
        project_and_measure(torch.eye(2), 1, **self.settings)  # refuses bad settings here, not an epoch later
        self._pairs = {}
        if bn_rectification:
            pairs = resolve_batchnorms(self.model, self.ranks, batchnorms, example_inputs)
            self._pairs = {name: bn for name, bn in pairs.items() if bn is not None}
            if batchnorms is None:
                _warn_where_none_is_paired(self, example_inputs)
        before = _norms_before(self, example_inputs) if column_scale else {}
        self._columns = frozenset(before.keys() - self._pairs.keys())  # whose inputs a norm scales
        self._pairs = before | self._pairs
        self.fast, self._bases, self._steps = fast, {}, 0
        self._links: list[tuple[dict, str, nn.Module]] | None = None  # to each layer and BatchNorm
        self._look_up()
        self._dense = [
            LayerReport(name, None, math.nan, "dense", left_out(module) or "no rank given")
            for name, module in self.model.named_modules()
            if isinstance(module, _ConvNd) and name not in self.ranks
        ]

    def _look_up(self) -> None:
        """Find the layers as they are now; where anything was replaced, check and group them anew."""
        if self._links is not None:
            same = all(children.get(key) is child for children, key, child in self._links)
            if same and self._states == [_state(layer) for layer in self._layers.values()]:
                return
        self._links, self._bases = None, {}
        unwrap(self.model)  # refuses a network that has been sharded since
        try:
            layers = {name: self.model.get_submodule(name) for name in self.ranks}
            batchnorms = {name: self.model.get_submodule(bn) for name, bn in self._pairs.items()}
        except AttributeError as error:
            raise ValueError(f"a layer that was to be projected is gone from the model: {error}") from None
        weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
        self._layers, self._weights, self._batchnorms = layers, weights, batchnorms
        self._states = [_state(layer) for layer in layers.values()]
        self._twins, first = {}, {}  # name → name of the layer whose weight it shares
        for name, layer in layers.items():
            _check(self, name, layer)
            if (twin := first.setdefault(id(weights[name]), name)) != name:
                self._twins[name] = twin
                self._batchnorms.pop(name, None), self._batchnorms.pop(twin, None)
        self._rows = {n: _rows(layer, weights[n], self.unfolding[n]) for n, layer in layers.items()}
        self._rows |= {name: self._rows[name].mT for name in self._columns}  # whose columns are scaled
        self._groups, self._decomposed = _groups(self), defaultdict(list)
        for group in self._groups:  # small Gram matrices of one size go together, large ones by themselves
            K, rank, device = min(group[:2]), *group[2:4]
            self._decomposed[K, rank, device, *(group if K > SMALL else ())].append(group)
        self._links = _links(self.model, (*layers, *self._pairs.values()))

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Project the same layers to other ranks from the next step on.

        Args:
            ranks: layer name → R, for each of the layers.

        Raises:
            TypeError, ValueError: ranks that do not fit the model, or other layers.
        """
        ranks = resolve_ranks(self.model, ranks, self.unfolding)
        if other := sorted(ranks.keys() ^ self.ranks.keys()):
            raise ValueError(f"ranks must be for the layers that are projected; not so {other[0]!r}")
        if ranks != self.ranks:
            self.ranks, self._links = ranks, None  # which has the layers grouped anew

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the directions that the next one starts from, layer by layer.

        >>> projector = LowRankProjector(nn.Linear(4, 4), {"": 2})
        >>> _ = projector.step()
        >>> projector.state_dict()["bases"][""].shape
        torch.Size([4, 2])
        """
        bases = {
            name: vectors
            for key, stacked in self._bases.items()
            for name, vectors in zip(self._names_of(key), stacked, strict=True)
        }
        return {"steps": self._steps, "fast": self.fast, "bases": bases}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another projector of the same layers was; the model's weights are loaded by themselves.

        Args:
            state: of :meth:`state_dict`. A layer of which it has no directions begins with an exact step.

        Raises:
            ValueError: the state is of something else.
        """
        if not isinstance(state, Mapping) or self.state_dict().keys() != state.keys():
            raise ValueError(f"state must be what state_dict() of a projector returned; got {state!r:.80}")
        self._look_up()
        self._steps, self.fast = state["steps"], state["fast"]
        self._bases = {}
        for key in self._decomposed:
            names = self._names_of(key)
            if all(name in state["bases"] for name in names):
                stacked = torch.stack([state["bases"][name] for name in names])
                self._bases[key] = stacked.to(self._rows[names[0]].device)

    def _names_of(self, key: tuple) -> list[str]:
        """Return the layers that are decomposed at once, in their order."""
        return [name for group in self._decomposed[key] for name in self._groups[group]]

    @torch.no_grad()
    def step(self, *, exact: bool = False) -> Report:
        """Project every layer in place; the optimizer's state is not touched.

        Args:
            exact: take the exact path in spite of ``fast``: to be used for the last projection of all.

        Returns:
            A list of what happened to each layer, in the order of ``ranks``, then of the convolutions that
            stay dense; it prints as a table.

        Raises:
            ValueError: a weight or a BatchNorm holds NaN or infinity, or a weight cannot be written any more;
                nothing has been changed then.
        """
        self._look_up()
        scales = {
            group: _scale(group, [self._batchnorms[name] for name in names])
            for group, names in self._groups.items()
            if names[0] in self._batchnorms
        }
        small = _refuse_lost_values(self, scales)
        check = exact or self._steps % EXACT_EVERY == 0
        self._steps += 1
        own = {}  # name → share of energy kept, whether followed, largest singular value where dead
        for key, groups in self._decomposed.items():
            named = [(self._groups[group], group) for group in groups]
            together = [
                _Weights(group[PER_OUTPUT], names, [self._rows[name] for name in names], scales.get(group))
                for names, group in named
            ]
            basis, followed = self._find_basis(key, together, check)
            for weights, here in _places(together):
                here_basis = Basis(*(values[here] for values in basis))
                own |= _project_group(weights, here_basis, followed[here], small, self.settings)
        return Report([_report(self, name, own, small) for name in self.ranks] + self._dense)

    def _find_basis(self, key: tuple, together: list[_Weights], check: bool) -> tuple[Basis, list[bool]]:
        """Return the directions that some layers keep, in their order, and which were followed."""
        rank, start = key[1], self._bases.get(key) if self.fast else None
        if start is None:
            basis = leading_basis(_grams(together), rank)
            followed = [False] * len(basis.kept)
        else:
            basis, certain = follow_basis(_grams(together, rounded=True), start)
            if check:
                G = _grams(together)
                exact = leading_basis(G, rank)
                kept = ((G @ basis.vectors) * basis.vectors).sum(dim=(1, 2))  # tr QᵀGQ
                allowed = 3 * RESIDUAL_TOLERANCE * (exact.energy - exact.kept) + 1e-11 * exact.energy
                if (certain & (exact.kept - kept > allowed)).any():
                    # The bound of follow_basis forbids it, so this is an error of ours, of the hardware or of
                    # a library.
                    logger.warning(
                        "the fast projection kept too little energy (%s); all are exact from here on",
                        [name for weights in together for name in weights.names],
                    )
                    self.fast = False
                basis, certain = exact, torch.zeros_like(certain)
            followed = certain.tolist()
            if not check and not all(followed):
                left = [
                    weights.only([not done for done in followed[at]]) for weights, at in _places(together)
                ]
                for values, exact in zip(basis, leading_basis(_grams(left), rank), strict=True):
                    values[~certain] = exact
        if self.fast:
            # contiguous, as load_state_dict has them: the bits of a product depend on that
            self._bases[key] = basis.vectors.to(torch.float32).contiguous()
        return basis, followed


class _Weights(NamedTuple):
    """Layers of one shape, rank and place."""

    per_output: int  # rows of a matrix for an output, 1 or k²
    names: list[str]
    rows: list[Tensor]  # each weight, as _rows returns it
    scale: Tensor | None  # of each row of the matrices, (B, N)

    def only(self, chosen: list[bool]) -> _Weights:
        """Return some of them."""
        places = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        scale = None if self.scale is None else self.scale[places]
        return _Weights(
            self.per_output, [self.names[i] for i in places], [self.rows[i] for i in places], scale
        )


def _places(together: list[_Weights]) -> list[tuple[_Weights, slice]]:
    """Return where in what is decomposed at once each group of layers has its matrices."""
    ends = list(accumulate(len(weights.names) for weights in together))
    return [(w, slice(end - len(w.names), end)) for w, end in zip(together, ends, strict=True)]


def _refuse_lost_values(projector: LowRankProjector, scales: Mapping[tuple, Tensor]) -> dict[str, int]:
    """Raise where a weight or a BatchNorm is not finite; return how many rows are scaled to nothing.

    All numbers are fetched at once, in one wait for a GPU.
    """
    weights, wide = list(projector._rows.values()), torch.float32
    for weight in weights:
        wide = torch.promote_types(wide, weight.dtype)
    norms = torch._foreach_norm(weights, 2, wide)
    scaled = [name for group in scales for name in projector._groups[group]]
    numbers = [torch.stack([n.to(norms[0].device) for n in norms]).double()]
    numbers += [a.sum(dim=1).to(numbers[0]) for a in scales.values()]
    eps = projector.settings["row_eps"]
    numbers += [(a.square() <= eps).sum(dim=1).to(numbers[0]) for a in scales.values()]
    numbers = torch.cat(numbers).tolist()
    few = dict(zip(scaled, numbers[len(weights) + len(scaled) :], strict=True))
    sums = dict(zip(scaled, numbers[len(weights) :], strict=False))
    for name, norm in zip(projector._rows, numbers, strict=False):
        if not math.isfinite(norm + sums.get(name, 0.0)):
            norm_there = "norm before" if name in projector._columns else "BatchNorm after"
            what = f"the {norm_there} layer" if math.isfinite(norm) else "the weight of layer"
            raise ValueError(f"NaN, infinity or overflow in {what} {name!r}; nothing was projected")
    return {name: int(count) for name, count in few.items() if count}


def _project_group(
    weights: _Weights,
    basis: Basis,
    followed: list[bool],
    small: Mapping[str, int],
    settings: Mapping[str, Any],
) -> dict[str, tuple]:
    """Project layers of one shape, and return of each what :func:`_report` tells."""
    kept = torch.where(basis.energy > 0, basis.kept / basis.energy, 1.0).tolist()
    dead = _dead_matrices(weights, basis.energy)
    own = {name: (kept[i], followed[i], dead.get(i)) for i, name in enumerate(weights.names)}
    if dead:
        alive = [i not in dead for i in range(len(kept))]
        weights, basis = weights.only(alive), Basis(*(values[alive] for values in basis))
    for part in _parts(weights.rows):
        rows, a = weights.rows[part], None if weights.scale is None else weights.scale[part]
        few = a.square() <= settings["row_eps"] if any(map(small.get, weights.names[part])) else None
        matrices = _as_batch(rows, weights.per_output)
        own_basis = Basis(*(values[part] for values in basis))
        project_on_basis_(matrices, own_basis, **settings, row_scale=a, undo_exactly=few)
        if matrices.data_ptr() != rows[0].data_ptr():
            torch._foreach_copy_(rows, [M.view(row.shape) for M, row in zip(matrices, rows, strict=True)])
    return own


def _groups(projector: LowRankProjector) -> dict[tuple, list[str]]:
    """Return the layers that are multiplied at once: those of one shape, rank and place."""
    groups = defaultdict(list)
    for name, layer in projector._layers.items():
        weight, M = projector._weights[name], matrix_of(layer, projector.unfolding[name])
        by_column, scaled = name in projector._columns, name in projector._batchnorms
        (N, D), per_output = (
            M.shape[:: -1 if by_column else 1],
            len(M) // len(matrix_of(layer)),
        )  # rows: 1 or k²
        rank = projector.ranks[name]
        if rank < min(N, D) and weight.requires_grad and name not in projector._twins:
            where = (weight.device, weight.dtype)
            groups[N, D, rank, *where, scaled, per_output, scaled and by_column].append(name)
    return groups


def _links(model: nn.Module, paths: Sequence[str]) -> list[tuple[dict, str, nn.Module]]:
    """Return each step on the way to some modules: the children there, the name of one, and what it is."""
    links = []
    for path in paths:
        module = model
        for key in path.split(".") if path else ():
            links.append((module._modules, key, module := module._modules[key]))
    return links


def _warn_where_none_is_paired(projector: LowRankProjector, example_inputs: Any) -> None:
    count = sum(is_batchnorm(module) for module in projector.model.modules())
    if count and not projector._pairs and not any(find_batchnorms(projector.model, example_inputs).values()):
        warnings.warn(
            f"{type(projector.model).__name__} has {count} BatchNorms, and none was found right after a "
            "layer: nothing is rectified; pass example_inputs= to look at a run, or batchnorms= to state "
            "the pairs",
            stacklevel=3,
        )


def _norms_before(projector: LowRankProjector, example_inputs: Any) -> dict[str, str]:
    if example_inputs is None:
        raise ValueError("column_scale needs example_inputs, to see which norm makes the inputs of a layer")
    before = find_norms_before(projector.model, projector.ranks, example_inputs)
    if not before:
        raise ValueError(
            "column_scale finds no LayerNorm or RMSNorm right before a Linear layer that is projected; leave "
            "it out, or choose other layers"
        )
    return before


def _check(projector: LowRankProjector, name: str, layer: nn.Module) -> None:
    reason = left_out(layer) or (unwritable(layer) if layer_type(layer) else "it is no layer to project")
    if reason:
        raise ValueError(f"layer {name!r} ({type(layer).__name__}) cannot be projected: {reason}")
    scales_rows = name in projector._batchnorms and name not in projector._columns
    if scales_rows and not is_batchnorm(projector._batchnorms[name]):
        raise ValueError(f"{projector._pairs[name]!r} after layer {name!r} is no BatchNorm any more")
    N, D = matrix_of(layer, projector.unfolding[name]).shape
    if projector.ranks[name] > min(N, D):
        raise ValueError(f"rank of layer {name!r} is {projector.ranks[name]}, but its weight is {N}×{D} now")


def _report(
    projector: LowRankProjector, name: str, own: dict[str, tuple], small: dict[str, int]
) -> LayerReport:
    twin, rank = projector._twins.get(name, name), projector.ranks[name]
    if not projector._weights[name].requires_grad:
        return LayerReport(name, rank, math.nan, "left alone", "frozen (requires_grad=False)")
    energy_kept, followed, dead = own.get(twin, (1.0, False, None))
    if dead is not None:
        scaled = " as its BatchNorm scales it" if name in projector._batchnorms else ""
        reason = f"dead: largest singular value{scaled} {dead:.1e} < {DEAD_IN_TRAINING:.0e}"
        return LayerReport(name, rank, math.nan, "left alone", reason)
    reasons = ["followed"] if followed else []
    if small.get(name):
        limit = projector.settings["row_eps"] ** 0.5
        scaled = "inputs that the norm" if name in projector._columns else "rows that BatchNorm"
        reasons.append(f"{small[name]} {scaled} scales by {limit:.1e} or less, undone exactly")
    if name in projector._twins:
        reasons.append(f"shares its weight with {twin!r}, projected once and without rectification")
    return LayerReport(name, rank, energy_kept, "projected", "; ".join(reasons))


def _state(layer: nn.Module) -> tuple:
    w = layer._parameters.get("weight")
    if w is None:
        return ()
    pointer = w.data_ptr() if type(w) is nn.Parameter else None  # a shard of FSDP has none
    return (id(w), pointer, w.shape, w.stride(), w.device, w.dtype, w.requires_grad)


def _scale(group: tuple, norms: list[nn.Module]) -> Tensor:
    """Return what scales each row of the matrices of a group, (B, N): a_n for all rows of output n."""
    scale = (norm_scale if group[-1] else batchnorm_scale)(*norms)
    return scale.repeat_interleave(group[PER_OUTPUT], dim=1)


def _rows(layer: nn.Module, weight: Tensor, unfolding: str) -> Tensor:
    """Return a view of a weight, outputs first, the rest as it lies in memory: no result changes."""
    rows = rows_first(layer, weight.detach())
    in_memory = rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last)
    return rows.movedim(1, -1) if in_memory or unfolding == "columns" else rows


def _as_matrix(row: Tensor, per_output: int) -> Tensor:
    """Return what ``_rows`` returned as a matrix: N × C·k², or N·k² × C where an output has k² rows."""
    return row.flatten(1) if per_output == 1 else row.flatten(0, -2)


def _as_batch(rows: list[Tensor], per_output: int) -> Tensor:
    """Return weights as matrices, (B, N, D): several copied together, a single one as it lies in memory."""
    matrices = [_as_matrix(row, per_output) for row in rows]
    return torch.stack(matrices) if len(rows) > 1 else matrices[0].unsqueeze(0)


def _parts(rows: list[Tensor]) -> list[slice]:
    """Return which weights of one shape are multiplied at once: small ones many, large ones one by one."""
    at_once = max(1, BATCH // rows[0].numel()) if rows else 1
    return [slice(i, i + at_once) for i in range(0, len(rows), at_once)]


def _grams(together: list[_Weights], *, rounded: bool = False) -> Tensor:
    """Return the smaller Gram matrices of layers that may differ in their larger dimension, (B, K, K)."""
    grams = []
    for weights in together:
        for part in _parts(weights.rows):
            a = None if weights.scale is None else weights.scale[part]
            matrices = _as_batch(weights.rows[part], weights.per_output)
            grams.append(gram_matrices(matrices, a, rounded=rounded))
    return torch.cat(grams)


def _dead_matrices(weights: _Weights, energy: Tensor) -> dict[int, float]:
    """Return which of the matrices diag(a)·M are dead, with their largest singular value.

    s_1 ≥ ‖diag(a)·M‖_F / sqrt(K), so the energies, which are there already, decide for all healthy layers.
    """
    rows, per_output = weights.rows, weights.per_output
    dead, K = {}, min(_as_matrix(rows[0], per_output).shape)
    for i in (energy < DEAD_IN_TRAINING**2 * K).nonzero().flatten().tolist():
        A = _as_matrix(rows[i], per_output).double()
        A = A if weights.scale is None else weights.scale[i].unsqueeze(1) * A
        largest = float(torch.linalg.matrix_norm(A, 2))
        if largest < DEAD_IN_TRAINING:
            dead[i] = largest
    return dead
