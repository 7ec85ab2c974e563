"""Compact networks on the disk, as safetensors."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lrpet.files import write_whole
from lrpet.lowrank.batchnorm import fold_batchnorm, fold_pairs
from lrpet.lowrank.factors import rebuild
from lrpet.lowrank.layers import copy_of, unwrap
from lrpet.lowrank.ranks import LayerReport

__all__ = ["compact_header", "load_compact", "save_compact"]


def save_compact(compact: nn.Module, path: str | Path, **description: str | int) -> None:
    """Write a compact network to a safetensors file: its tensors, and in the header all that was done to it.

    Args:
        compact: made by :func:`factorize` and :func:`fold_batchnorm`, each as often as you like, in any
            order; tensors that are shared are written once.
        path: the file to write; it appears when it is whole and has been read back, or not at all.
        description: further entries for the header, such as ``model="resnet20"``.

    Raises:
        ValueError: the module came from neither, or a description has a name that the header needs.
        OSError: the file could not be written, or what was read back is something else.

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
    if not hasattr(compact, "compressions"):
        raise ValueError(
            f"{type(compact).__name__} was not made by factorize() or fold_batchnorm(); save_compact needs "
            "their record of what was done"
        )
    state = compact.state_dict()
    shared = _shared(state)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items() if name not in shared}
    header = {"compressions": compact.compressions, "shared": shared, "sha256": _digest(tensors)}
    if taken := header.keys() & description:
        raise ValueError(f"the header has its own entry {min(taken)!r}; describe the network by another name")
    header = json.dumps(header | description)
    with write_whole(Path(path)) as file:
        file.write(save(tensors, metadata={"lrpet": header}))
        file.flush()
        try:
            same = _read(file.name)[0] == json.loads(header)  # whose digest is that of the tensors
        except ValueError:
            same = False
        if not same:
            raise OSError(errno.EIO, "what was read back is not what was written")


def _shared(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the name of each tensor that is an earlier one → the name of that one."""
    first, shared = {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            shared[name] = first[place]
    return shared


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, which safetensors itself does not check."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compact_header(path: str | Path) -> dict:
    """Return what :func:`save_compact` wrote about a file: what was done to the network, and the description.

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
        The compact network, as it was saved, with the dtype and on the device of ``model``. What was done to
        it is done again, in the same order, to a copy of ``model``, and what shared a tensor shares it again.

    Raises:
        ValueError: the file is not a whole safetensors file of ours, or belongs to another architecture.

    Source: https://github.com/huggingface/safetensors for the format.

    The example of :func:`save_compact` shows both directions.
    """
    header, tensors = _read(path)
    try:
        done = []
        for kind, layers in _compressions(header):
            if kind == "factorize":
                layers = [
                    LayerReport(name, rank, math.nan, action, "", *unfolding)
                    for name, (rank, action, *unfolding) in layers.items()
                ]
            done.append((kind, layers))
        shared = header.get("shared", {})
        tensors |= {name: tensors[other] for name, other in shared.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the header of {path} is damaged ({error!r}); save the compact network again"
        ) from error
    try:
        compact = copy_of(unwrap(model))
        compact.factorization, compact.compressions = [], []
        if any(parameter.is_meta for parameter in compact.parameters()):
            raise ValueError("it is on the meta device, which keeps no values; build it on the CPU")
        for kind, layers in done:
            if kind == "factorize":
                compact = rebuild(compact, layers)
            else:
                compact = fold_batchnorm(compact) if layers is None else fold_pairs(compact, layers)
        _share(compact, shared)
        state = OrderedDict(tensors)
        state._metadata = compact.state_dict()._metadata  # the versions that some modules ask for
        compact.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit a {type(model).__name__}: {error}") from error
    return compact


def _compressions(header: Mapping) -> list[tuple[str, dict | None]]:
    """Return what was done to a network, in order; older files know one factorization and one fold."""
    if "compressions" in header:
        return header["compressions"]
    fold = [("fold", header.get("batchnorms"))] if header["batchnorm_folded"] else []
    return [("factorize", header["layers"]), *fold]


def _share(compact: nn.Module, shared: Mapping[str, str]) -> None:
    """Let those tensors of a network be one that were one when it was saved, and no others."""
    state = compact.state_dict(keep_vars=True)
    found = _shared(state)
    for name in found.keys() | shared.keys() if found != shared else ():
        path, _, key = name.rpartition(".")
        module = compact.get_submodule(path)
        place = module._parameters if key in module._parameters else module._buffers
        own = state[name]
        place[key] = state[shared[name]] if name in shared else copy.deepcopy(own)
