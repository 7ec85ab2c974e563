"""Compact networks on the disk, as safetensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lrpet.files import write_whole
from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.factors import rebuild
from lrpet.lowrank.layers import unwrap
from lrpet.lowrank.ranks import LayerReport

__all__ = ["compact_header", "load_compact", "save_compact"]


def save_compact(compact: nn.Module, path: str | Path, **description: str | int) -> None:
    """Write a compact network to a safetensors file: its factors, and in the header what was factorized how.

    Args:
        compact: result of :func:`factorize`, BatchNorm folded or not; tensors that are shared are written
            once.
        path: the file to write; it appears whole or not at all.
        description: further entries for the header, such as ``model="resnet20"``.

    Raises:
        ValueError: the module did not come from :func:`factorize`.

    Source: https://github.com/huggingface/safetensors for the format.

    >>> import tempfile
    >>> from lrpet import factorize
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(factorize(model, {"0": 2}), folder + "/net.safetensors")
    ...     again = load_compact(folder + "/net.safetensors", model)
    >>> again[0][0].weight.shape
    torch.Size([2, 8, 3, 3])
    """
    compact = unwrap(compact)
    if not hasattr(compact, "factorization"):
        raise ValueError(
            f"{type(compact).__name__} was not made by factorize(); save_compact needs its record of ranks"
        )
    layers = {layer.name: [layer.rank, layer.action] for layer in compact.factorization}
    folded = getattr(compact, "batchnorm_folded", False)
    header = {"layers": layers, "batchnorm_folded": folded, **description}
    if folded:
        header["batchnorms"] = compact.folded_batchnorms
    tensors, first, shared = {}, {}, {}
    for name, tensor in compact.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            shared[name] = first[place]  # written once
        else:
            tensors[name] = tensor.detach().contiguous()
    if shared:
        header["shared"] = shared
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
    """Return what :func:`save_compact` wrote about a file: layers, whether BatchNorm is folded, description.

    Raises:
        ValueError: the file is not a whole safetensors file of ours.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("lrpet")
            names = file.keys()  # safe_open is no mapping
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); save the compact network again"
        ) from error
    if header is None:
        raise ValueError(f"{path} has no lrpet header; only files of save_compact can be rebuilt")
    try:
        header = json.loads(header)
    except ValueError as error:
        raise ValueError(
            f"the header of {path} is damaged ({error}); save the compact network again"
        ) from error
    if not isinstance(header, dict) or header.get("sha256") != _digest(tensors):
        raise ValueError(
            f"{path} is damaged: its tensors are not those that were saved; save the compact network again"
        )
    return header, tensors


def load_compact(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a compact network from a file and an instance of its architecture.

    Args:
        path: file of :func:`save_compact`.
        model: a network of the same architecture with any weights, as ``build_model`` returns it; not
            changed.

    Returns:
        The compact network, as it was saved.

    Raises:
        ValueError: the file is not a whole safetensors file of ours, or belongs to another architecture.

    Source: https://github.com/huggingface/safetensors for the format.

    The example of :func:`save_compact` shows both directions.
    """
    header, tensors = _read(path)
    try:
        reports = [
            LayerReport(name, rank, math.nan, action) for name, (rank, action) in header["layers"].items()
        ]
        folded, pairs = header["batchnorm_folded"], header.get("batchnorms")
        tensors |= {name: tensors[other] for name, other in header.get("shared", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the header of {path} is damaged ({error!r}); save the compact network again"
        ) from error
    try:
        compact = rebuild(model, reports)
        if folded:
            compact = fold_batchnorm(compact, pairs)
        compact.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit a {type(model).__name__}: {error}") from error
    return compact
