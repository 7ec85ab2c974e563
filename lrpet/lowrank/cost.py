"""Multiply-adds and parameters: counted on one run, and by arithmetic for what factorizing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from lrpet.lowrank.arguments import check, is_whole
from lrpet.lowrank.layers import (
    copy_of,
    count_parameters,
    layer_type,
    left_out,
    matrix_of,
    resolve_unfolding,
    unwrap,
)
from lrpet.lowrank.observe import call, image_like, watching, weight_reads
from lrpet.lowrank.ranks import resolve_ranks
from lrpet.lowrank.table import LayerTable, size

__all__ = ["Cost", "LayerCost", "cost"]
# with a weight; attention multiplies by bmm
LAYER_PRODUCTS = ("mm", "addmm", "mv", "addmv", "convolution", "_convolution")
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
READ_ONLY = "another module reads its weight and does not call it"


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image: as it would be deployed, and dense."""

    name: str
    kind: str  # type of the module, as Conv2d; of a layer called as a function, of the module around it
    N: int  # outputs; 0 where a module calls layers as functions
    D: int  # inputs times kernel area (of one group)
    rank: int | None  # None: dense
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    reads: int = 0  # of its weight by other modules, for each of which factors are multiplied out

    @property
    def note(self) -> str:
        """Say where the factors cost more than the dense layer, R·(N + D) ≥ N·D; empty elsewhere."""
        if self.reads and not self.dense_macs:
            return f"{READ_ONLY}, so factors save no multiply-adds"
        return (
            "factors cost no less than the dense layer"
            if self.rank is not None and self.macs >= self.dense_macs
            else ""
        )


@dataclass(frozen=True)
class Cost(LayerTable):
    """Cost of a network for one image. One MAC is one multiply-add, which the literature calls a FLOP.

    >>> print(cost(nn.Sequential(nn.Conv2d(8, 16, 3)), (8, 6, 6), {"0": 2}))
    layer  type    N×D    rank  multiply-adds  dense  parameters  dense  note
    0      Conv2d  16×72  2     2816           18432  192         1168
    2816 multiply-adds of 18432, 192 parameters of 1168
    """

    macs: int  # of convolutions and Linear layers, as published totals count
    params: int
    dense_macs: int
    dense_params: int
    layers: tuple[LayerCost, ...]
    other_macs: dict[str, int] = field(default_factory=dict)  # of all else, as "attn: bmm"

    def cells(self) -> list[tuple[str, ...]]:
        """Return the header, then what is shown of each layer."""
        header = ("layer", "type", "N×D", "rank", "multiply-adds", "dense", "parameters", "dense", "note")
        table = [header]
        for layer in self.layers:
            numbers = (layer.macs, layer.dense_macs, layer.params, layer.dense_params)
            rank = "" if layer.rank is None else str(layer.rank)
            row = (layer.name, layer.kind, size(layer.N, layer.D), rank, *map(str, numbers), layer.note)
            table.append(row)
        return table

    def footer(self) -> str:
        """Return the totals, and what else multiplies."""
        text = (
            f"{self.macs} multiply-adds of {self.dense_macs}, {self.params} parameters of {self.dense_params}"
        )
        others = "; ".join(f"{name} {macs}" for name, macs in self.other_macs.items())
        return f"{text}; not in these totals: {others}" if others else text


def cost(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    ranks: Mapping[str, int] | Sequence[int] | None = None,
    *,
    example_inputs: Any = None,
    unfolding: str | Mapping[str, str] = "rows",
) -> Cost:
    """Count multiply-adds and parameters of a network, dense or factorized at the given ranks.

    A layer of N outputs and D inputs that runs at P positions costs N·D·P multiply-adds dense and R·(N + D)·P
    factorized; its weights N·D and R·(N + D). With the unfolding "columns" the k×k factor costs R·N·k²·P, and
    the 1×1 one before it R·C at each position of the input. Convolutions and Linear layers count, as often as
    they run; BatchNorm, pooling and activations do not (their parameters do). Attention products and
    recurrent cells stand in ``other_macs``. The rank min(N, D) is dense. A layer that never runs has
    parameters and no multiply-adds. Each time that another module reads the weight of a factorized layer,
    N·R·D are added, to multiply the factors out.

    Args:
        model: any module; it is run once on the "meta" device, which computes shapes only, or where it cannot
            be, in evaluation mode as it is.
        input_shape: (C, H, W) of one image.
        ranks: layer name → R or a list in module order; None counts the model as it is.
        example_inputs: in the place of ``input_shape``: a tensor, a tuple or a dict, counted as it is, for
            one image of batch size 1.
        unfolding: as for :func:`lrpet.factorize`.

    Returns:
        Totals and one row per layer, in the order of execution.

    Raises:
        ValueError: ranks that do not fit the model, or inputs that it does not run on.

    Source: the authors' counts, ResNet-56 at ratio 0.57 is 56.06 M of 125.49 M; torch.utils.flop_counter.

    >>> cost(nn.Conv2d(3, 16, 3, padding=1, bias=False), (3, 32, 32)).macs
    442368
    """
    model = unwrap(model)
    wanted = "input_shape must be (C, H, W), whole numbers of 1 or more"
    if input_shape is not None:
        sizes = isinstance(input_shape, Sequence) and all(map(is_whole, input_shape))
        check(wanted, input_shape, sizes, lambda shape: all(size > 0 for size in shape))
    if (input_shape is None) == (example_inputs is None):
        raise ValueError("give either input_shape, (C, H, W) of one image, or example_inputs=, any inputs")
    return cost_of_run(model, counted_run(model, input_shape, example_inputs), ranks, unfolding)


def cost_of_run(
    model: nn.Module,
    run: dict[str, tuple[Counter, _Places, int]],
    ranks: Mapping[str, int] | Sequence[int] | None = None,
    unfolding: str | Mapping[str, str] = "rows",
) -> Cost:
    """Return the cost of a network that :func:`counted_run` has run, at any ranks: arithmetic alone.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> run = counted_run(model, example_inputs=torch.ones(1, 8))
    >>> [cost_of_run(model, run, {"0": rank}).macs for rank in (1, 2)]
    [16, 32]
    """
    unfolding = resolve_unfolding(model, unfolding)
    ranks = {} if ranks is None else resolve_ranks(model, ranks, unfolding)
    names = {module: name for name, module in model.named_modules()}
    modules = {name: module for module, name in names.items()}
    layers, other_macs = [], {}
    for name, (counts, places, reads) in run.items():
        module = modules[name]
        macs = sum(macs for op, macs in counts.items() if _of_a_layer(module, op))
        other_macs |= {
            f"{name or type(module).__name__}: {op}": macs
            for op, macs in counts.items()
            if not _of_a_layer(module, op)
        }
        if macs or isinstance(module, (_ConvNd, nn.Linear)) or reads:
            how = unfolding.get(name, "rows")
            layers.append(_row(name, module, macs, places, ranks.get(name), reads, how))
    weights = {}  # of a weight that layers share → what factorizing takes from the parameters
    for name, rank in ranks.items():
        N, D = matrix_of(modules[name], unfolding[name]).shape
        if rank < min(N, D):
            weights[id(modules[name].weight)] = N * D - rank * (N + D)
    dense_params, saved = count_parameters(model), sum(weights.values())
    return Cost(
        macs=sum(layer.macs for layer in layers),
        params=dense_params - saved,
        dense_macs=sum(layer.dense_macs for layer in layers),
        dense_params=dense_params,
        layers=tuple(layers),
        other_macs=other_macs,
    )


class _Places(NamedTuple):
    """At how many positions of its input and of its output a layer runs, in all its calls."""

    inputs: int
    outputs: int


def _of_a_layer(module: nn.Module, op: str) -> bool:
    """Tell whether a product counts as that of a convolution or Linear layer."""
    if isinstance(module, (_ConvNd, nn.Linear)) or layer_type(module):
        return True
    return op in LAYER_PRODUCTS and not isinstance(module, RECURRENT)


def _row(
    name: str,
    module: nn.Module,
    dense_macs: int,
    places: _Places,
    rank: int | None,
    reads: int,
    unfolding: str,
) -> LayerCost:
    own = sum(p.numel() for p in module._parameters.values() if p is not None)
    if not isinstance(module, (_ConvNd, nn.Linear)) and not layer_type(module):
        return LayerCost(name, type(module).__name__, 0, 0, None, dense_macs, own, dense_macs, own)
    if layer_type(module):
        N, D = matrix_of(module, unfolding).shape
    else:
        N, D = module.weight.shape[0], module.weight[0].numel()
    rank = None if rank == min(N, D) else rank
    params, macs, factored = N * D + (0 if module.bias is None else N), dense_macs, 0
    if rank is not None:
        factored = N * D - rank * (N + D)
        if unfolding == "rows":
            macs = dense_macs // N * rank + rank * N * places.outputs  # the window to R channels, then N×R
        else:
            macs = rank * D * places.inputs + dense_macs // D * rank  # R×C, then the window on R channels
        macs += reads * N * rank * D
    kind = type(module).__name__
    return LayerCost(name, kind, N, D, rank, macs, params - factored, dense_macs, params, reads)


def counted_run(
    model: nn.Module, input_shape: Sequence[int] | None = None, example_inputs: Any = None
) -> dict[str, tuple[Counter, _Places, int]]:
    """Return of each module that runs its own multiply-adds by operation, its positions, and reads.

    >>> counted_run(nn.Linear(2, 3), example_inputs=torch.ones(1, 2))[""][0]
    Counter({'addmm': 6})
    """
    try:
        given = image_like(model, input_shape) if example_inputs is None else example_inputs
        shadow = copy_of(model, meta=True)
        for module in shadow.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.forward = partial(_shape_alone, module)
        try:
            return _count(shadow, tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given))
        except Exception:  # it looks at values, or keeps tensors of its own on a device
            return _count(model, given)
    except Exception as error:
        on, todo = "example_inputs", "; give what its forward takes"
        if example_inputs is None:
            on = f"one image: input_shape must be (C, H, W) of what it takes; got {input_shape!r}"
            todo = ". Where it takes other inputs, give example_inputs=, a tensor, a tuple or a dict"
        raise ValueError(
            f"{type(model).__name__} does not run on {on}: {type(error).__name__}: {error}{todo}"
        ) from error


def _shape_alone(bn: nn.Module, x: Tensor) -> Tensor:
    """Check what a BatchNorm takes and return it: on "meta" PyTorch needs half of all time for them."""
    bn._check_input_dim(x)
    if x.shape[1] != bn.num_features:
        raise ValueError(f"a BatchNorm of {bn.num_features} channels does not take {x.shape[1]}")
    return x


def _count(model: nn.Module, given: Any) -> dict[str, tuple[Counter, _Places, int]]:
    names = {module: name for name, module in model.named_modules()}
    matrices = {}  # layer → N and C
    for module in names:
        if layer_type(module) and not left_out(module):
            matrices[module] = len(matrix_of(module)), matrix_of(module, "columns").shape[1]
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    done: dict[str, tuple[Counter, _Places]] = {}
    began = [(Counter(), Counter())]  # of running modules: the counts at their start, their children's

    def so_far() -> Counter:
        return Counter({op.__name__: flops for op, flops in counter.flop_counts["Global"].items()})

    def begin(module, _inputs):
        done.setdefault(names[module], (Counter(), _Places(0, 0)))  # in the order of execution
        began.append((so_far(), Counter()))

    def end(module, inputs, named, output):
        start, children = began.pop()
        mine = so_far()
        mine.subtract(start)
        began[-1][1].update(mine)
        mine.subtract(children)
        counts, places = done[names[module]]
        for op, flops in mine.items():
            if flops:
                counts[op] += flops // 2  # two for each multiply-add
        if module in matrices and isinstance(output, Tensor):
            x = next(iter((*inputs, *named.values())))
            N, C = matrices[module]
            places = _Places(places.inputs + x.numel() // C, places.outputs + output.numel() // N)
        done[names[module]] = (counts, places)

    fast_path, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # its recurrent layers are not counted
    try:
        with watching(model) as hooks, sdpa_kernel(SDPBackend.MATH), weight_reads(matrices) as reads:
            for module in names:
                hooks.append(module.register_forward_pre_hook(begin))
                hooks.append(module.register_forward_hook(end, with_kwargs=True))
            with counter:
                call(model, given)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.mkldnn.enabled = onednn
    for module in reads:
        done.setdefault(names[module], (Counter(), _Places(0, 0)))  # read and not called
    modules = {name: module for module, name in names.items()}
    return {name: (*counted, reads[modules[name]]) for name, counted in done.items()}


def _by_vector(matrix, _vector, *_, **__) -> int:
    return 2 * prod(matrix)


def _by_vector_added(_, matrix, *__, **___) -> int:
    return 2 * prod(matrix)


def _bilinear(a, weight, *_, **__) -> int:
    """Return two for each multiply-add of nn.Bilinear: a (P, D), weight (N, D, E)."""
    return 2 * a[0] * prod(weight)


def _grouped(a, b, *_, **__) -> int:
    """Return two for each multiply-add of experts: rows a (T, K) times b (E, K, N), or of its gradients."""
    return 2 * prod(a) * b[-1] // (a[0] if len(a) > len(b) else 1)


# products that PyTorch's counter does not know
UNCOUNTED = {
    torch.ops.aten.mv: _by_vector,
    torch.ops.aten.dot: _by_vector,
    torch.ops.aten.addmv: _by_vector_added,
    torch.ops.aten._trilinear: _bilinear,
    torch.ops.aten._grouped_mm: _grouped,
}
