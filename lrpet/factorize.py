"""From a low-rank network to a compact one: two thin layers for each weight, BatchNorm folded, saved and rebuilt."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.utils import skip_init

from lrpet.files import write_whole
from lrpet.pairing import LAYERS as PAIRABLE
from lrpet.pairing import ConstantOutput, batchnorm_scale, resolve_batchnorms
from lrpet.projection import truncated_svd
from lrpet.projector import LayerReport
from lrpet.ranks import resolve_ranks
from lrpet.timing import side_by_side

__all__ = ["DEAD_AT_FACTORIZATION", "compact_header", "factorize", "fold_batchnorm", "load_compact", "measure_gains", "rebuild", "save_compact"]

DEAD_AT_FACTORIZATION = 1e-5  # largest singular value under which a layer computes nothing (authors' code)


@torch.no_grad()
def factorize(
    model: nn.Module,
    ranks: Mapping[str, int] | Sequence[int],
    *,
    min_gain: float | None = None,
    example: torch.Tensor | None = None,
) -> nn.Module:
    """Return a compact copy of a network: each chosen layer becomes two thinner ones.

    M = U·diag(s)·Vᵀ cut to R columns; a convolution turns into a k×k one from C to R channels with the
    weight diag(√s)·Vᵀ and the original stride, padding and dilation, and a 1×1 one from R to N with U·diag(√s)
    and the bias. Exact but for rounding where the weight has rank R, the best approximation elsewhere.

    Args:
        model: the trained network; it is not changed.
        ranks: layer name → R, or one R for each compressible convolution in module order. A layer with
            R = min(N, D) stays dense; one whose largest singular value is under 1e-5 becomes its bias.
        min_gain: leave a layer dense where its factors are not at least so many times as fast, as :func:`measure_gains` finds
            on this machine: 1 for "not slower". None factorizes every layer, whatever it costs.
        example: a batch of inputs as in use, for ``min_gain``.

    Returns:
        A new module of the same dtype, device and mode; its attribute ``factorization`` is a list of
        :class:`LayerReport`, which says for each layer what was done and where the factors cost more.

    Raises:
        ValueError: ranks that do not fit the model, or NaN or infinity in a weight, with the layer's name.

    Source: arXiv 2204.05566.

    >>> compact = factorize(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), {"0": 2})
    >>> [tuple(p.shape) for p in compact.parameters()]
    [(2, 8, 3, 3), (16, 2, 1, 1), (16,)]
    """
    if (min_gain is None) != (example is None):
        raise ValueError("min_gain and example go together: gains are measured on a batch of inputs; give both or neither")
    ranks = resolve_ranks(model, ranks)
    gains = {} if min_gain is None else measure_gains(model, ranks, example)
    compact = copy.deepcopy(model)
    compact.factorization = []
    for name, rank in ranks.items():
        layer = compact.get_submodule(name)
        M = layer.weight.reshape(layer.weight.shape[0], -1)  # (N, D)
        if not torch.isfinite(M).all():
            raise ValueError(f"NaN or infinity in the weight of layer {name!r}; it cannot be factorized")
        N, D = M.shape
        U, s, Vh = truncated_svd(M, rank)
        energy = M.double().square().sum().item()
        kept = s.square().sum().item() / energy if energy else 1.0
        if s[0] < DEAD_AT_FACTORIZATION and isinstance(layer, nn.Conv2d) and _padding(layer) is not None:
            reason = f"dead: largest singular value {s[0]:.1e} < {DEAD_AT_FACTORIZATION:.0e}; replaced by its bias"
            compact.factorization.append(LayerReport(name, 0, kept, "constant", reason))
        elif rank == min(N, D):
            compact.factorization.append(LayerReport(name, rank, 1.0, "dense", "full rank"))
        elif name in gains and gains[name] < min_gain:
            reason = f"measured: factors {gains[name]:.2f} times as fast, less than {min_gain:g}"
            compact.factorization.append(LayerReport(name, rank, kept, "dense", reason))
        else:
            costly = f"factors cost {rank * (N + D) / (N * D):.2f} of the dense layer" if rank * (N + D) >= N * D else ""
            compact.factorization.append(LayerReport(name, rank, kept, "factorized", costly))
        _replace(compact, compact.factorization[-1])
        new = compact.get_submodule(name)
        if isinstance(new, nn.Sequential):
            new[0].weight.copy_((s.sqrt().unsqueeze(-1) * Vh).reshape(new[0].weight.shape))
            new[1].weight.copy_((U * s.sqrt()).reshape(new[1].weight.shape))
    return compact


def rebuild(model: nn.Module, reports: Sequence[LayerReport]) -> nn.Module:
    """Return a copy with the structure of a factorized network and weights that are yet to be loaded.

    Args:
        model: the dense architecture with any weights; it is not changed.
        reports: those of the factorized network, its ``factorization``.

    >>> reports = [LayerReport("0", 2, 0.9, "factorized")]
    >>> [tuple(p.shape) for p in rebuild(nn.Sequential(nn.Conv2d(8, 16, 3)), reports).parameters()]
    [(2, 8, 3, 3), (16, 2, 1, 1), (16,)]
    """
    compact = copy.deepcopy(model)
    compact.factorization = list(reports)
    for report in reports:
        _replace(compact, report)
    return compact


@torch.no_grad()
def measure_gains(model: nn.Module, ranks: Mapping[str, int] | Sequence[int], example: torch.Tensor, rounds: int = 15) -> dict[str, float]:
    """Measure how many times as fast the two factors of each layer are as the layer itself, on its own inputs.

    Layers of one shape with inputs of one shape are measured once, eagerly, with the threads that PyTorch has.

    Args:
        model: the network, on its device and in its memory format.
        ranks: layer name → R, or a list in module order.
        example: a batch of inputs, as in use.
        rounds: timed repetitions; the gain is the median of their ratios.

    Returns:
        Layer name → time of the layer by time of its factors, for the layers that run and have R < min(N, D).

    Raises:
        ValueError: ranks that do not fit the model.

    >>> list(measure_gains(nn.Sequential(nn.Conv2d(8, 16, 3)), {"0": 2}, torch.randn(1, 8, 6, 6), rounds=2))
    ['0']
    """
    ranks = resolve_ranks(model, ranks)
    inputs, hooks = {}, []

    def record(layer, given, _output):
        inputs.setdefault(names[layer], given[0])

    names = {model.get_submodule(name): name for name in ranks}
    for layer, name in names.items():
        if ranks[name] < min(layer.weight.flatten(1).shape):
            hooks.append(layer.register_forward_hook(record))
    modes = {module: module.training for module in model.modules()}
    model.eval()(example)
    for module, training in modes.items():
        module.training = training
    for hook in hooks:
        hook.remove()
    gains, measured = {}, {}
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        window = [getattr(layer, setting, None) for setting in ("stride", "padding", "dilation")]
        kind = (type(layer), layer.weight.shape, layer.weight.stride(), *window, ranks[name], x.shape, x.stride(), x.dtype)
        if kind not in measured:
            factors = _factors(layer, ranks[name])
            for factor in factors:
                factor.weight.normal_(0, factor.weight[0].numel() ** -0.5)
            factors = factors.to(memory_format=torch.channels_last) if layer.weight.is_contiguous(memory_format=torch.channels_last) else factors
            timings = side_by_side({"factors": lambda: factors(x), "dense": lambda: layer(x)}, rounds, x.device)  # noqa: B023 (called at once)
            measured[kind] = timings["dense"]["ratio_to_first"]
        gains[name] = measured[kind]
    return gains


def _replace(model: nn.Module, report: LayerReport) -> None:
    """Put the layer that a report describes in the place of the dense one; factors come uninitialized and draw no random numbers."""
    old = model.get_submodule(report.name)
    if report.action == "dense":
        return
    if report.action == "constant":
        bias = old.bias if old.bias is not None else old.weight.new_zeros(old.weight.shape[0])
        new = ConstantOutput(bias, old.kernel_size, old.stride, _padding(old), old.dilation)
    else:
        new = _factors(old, report.rank)
    model.set_submodule(report.name, new.train(old.training))


def _factors(old: nn.Conv2d | nn.Linear, rank: int) -> nn.Sequential:
    """Return the two layers that take the place of a dense one, uninitialized but for the bias."""
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        first = skip_init(nn.Linear, old.in_features, rank, bias=False, **like)
        second = skip_init(nn.Linear, rank, old.out_features, bias=old.bias is not None, **like)
    else:
        window = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "padding_mode": old.padding_mode}
        first = skip_init(nn.Conv2d, old.in_channels, rank, old.kernel_size, bias=False, **window, **like)
        second = skip_init(nn.Conv2d, rank, old.out_channels, 1, bias=old.bias is not None, **like)
    if old.bias is not None:
        second.bias = copy.deepcopy(old.bias)
    for factor in (first, second):
        factor.weight.requires_grad_(old.weight.requires_grad)
    return nn.Sequential(first, second)


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return the padding as (vertical, horizontal), or None where it is uneven ("same" with an even window)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return (total[0] // 2, total[1] // 2) if not any(t % 2 for t in total) else None


@torch.no_grad()
def fold_batchnorm(model: nn.Module, batchnorms: Mapping[str, str | None] | None = None) -> nn.Module:
    """Return a copy for inference in which each BatchNorm is merged into the layer before it.

    With a = γ / sqrt(running_var + eps) the layer's weight becomes diag(a)·M and its bias
    a·(bias − running_mean) + β; in a factorized layer the second factor takes both.

    Args:
        model: dense or compact network; it is not changed.
        batchnorms: layer name → BatchNorm name or None, for models that torch.fx cannot trace.

    Returns:
        A new module in eval mode, with ``nn.Identity`` where a BatchNorm was.

    Raises:
        ValueError: the model cannot be traced and no pairs are given, or a pair is wrong.

    Source: arXiv 2204.05566, BN rectification rests on this identity.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> x = torch.rand(1, 3, 8, 8)
    >>> torch.allclose(fold_batchnorm(model)(x), model(x), atol=1e-5)
    True
    """
    folded = copy.deepcopy(model).eval()
    layers = [name for name, module in folded.named_modules() if isinstance(module, PAIRABLE)]
    for name, bn_name in resolve_batchnorms(folded, batchnorms if batchnorms is not None else layers, batchnorms).items():
        if bn_name is None:
            continue
        layer, bn = folded.get_submodule(name), folded.get_submodule(bn_name)
        a = batchnorm_scale(bn)[0]  # (N,)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        bias = a * (bias - bn.running_mean.double()) + (0.0 if bn.bias is None else bn.bias.double())
        if not isinstance(layer, ConstantOutput):
            weight = layer.weight.double() * a.reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_(weight)
        layer.bias = nn.Parameter(bias.to(bn.running_mean.dtype))
        folded.set_submodule(bn_name, nn.Identity())
    folded.batchnorm_folded = True
    return folded


def save_compact(compact: nn.Module, path: str | Path, **description: str | int) -> None:
    """Write a compact network to a safetensors file: its factors, and in the header what was factorized how.

    Args:
        compact: result of :func:`factorize`, BatchNorm folded or not.
        path: the file to write; it appears whole or not at all.
        description: further entries for the header, such as ``model="resnet20"``.

    Raises:
        ValueError: the module did not come from :func:`factorize`.

    Source: https://github.com/huggingface/safetensors for the format.

    >>> import tempfile
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(factorize(model, {"0": 2}), folder + "/net.safetensors")
    ...     again = load_compact(folder + "/net.safetensors", model)
    >>> again[0][0].weight.shape
    torch.Size([2, 8, 3, 3])
    """
    if not hasattr(compact, "factorization"):
        raise ValueError(f"{type(compact).__name__} was not made by factorize(); save_compact needs its record of ranks")
    layers = {layer.name: [layer.rank, layer.action] for layer in compact.factorization}
    header = {"layers": layers, "batchnorm_folded": getattr(compact, "batchnorm_folded", False), **description}
    tensors = {name: tensor.detach().contiguous() for name, tensor in compact.state_dict().items()}
    with write_whole(Path(path)) as file:
        file.write(save(tensors, metadata={"lrpet": json.dumps(header | {"sha256": _digest(tensors)})}))


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, which safetensors itself does not check."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compact_header(path: str | Path) -> dict:
    """Return what :func:`save_compact` wrote about a file: its layers, whether BatchNorm is folded, and the description.

    Raises:
        ValueError: the file is not a whole safetensors file of ours.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("lrpet")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the compact network again") from error
    if header is None:
        raise ValueError(f"{path} has no lrpet header; only files of save_compact can be rebuilt")
    try:
        header = json.loads(header)
    except ValueError as error:
        raise ValueError(f"the header of {path} is damaged ({error}); save the compact network again") from error
    if not isinstance(header, dict) or header.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were saved; save the compact network again")
    return header, tensors


def load_compact(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a compact network from a file and an instance of its architecture.

    Args:
        path: file of :func:`save_compact`.
        model: a network of the same architecture with any weights, as ``build_model`` returns it; not changed.

    Returns:
        The compact network, as it was saved.

    Raises:
        ValueError: the file is not a whole safetensors file of ours, or belongs to another architecture.

    Source: https://github.com/huggingface/safetensors for the format.

    The example of :func:`save_compact` shows both directions.
    """
    header, tensors = _read(path)
    try:
        reports = [LayerReport(name, rank, math.nan, action) for name, (rank, action) in header["layers"].items()]
        folded = header["batchnorm_folded"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}); save the compact network again") from error
    try:
        compact = rebuild(model, reports)
        if folded:
            compact = fold_batchnorm(compact)
        compact.load_state_dict(tensors)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit a {type(model).__name__}: {error}") from error
    return compact
