"""The library on other people's networks: what it takes, what it leaves out, and whether it is right."""

from __future__ import annotations

import fnmatch
import json
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from lrpet.bench.models_page import PRUNE_RATIO, page
from lrpet.bench.zoo import Network, networks, versions
from lrpet.deploy.export import export
from lrpet.files import write_file
from lrpet.lowrank.batchnorm import find_batchnorms, fold_batchnorm, is_batchnorm
from lrpet.lowrank.compact_file import load_compact, save_compact
from lrpet.lowrank.cost import UNCOUNTED, cost
from lrpet.lowrank.factorize import factorize
from lrpet.lowrank.observe import call
from lrpet.lowrank.plan import Plan, select
from lrpet.lowrank.projector import LowRankProjector
from lrpet.paths import project_file

__all__ = ["bench_models", "count_run", "examine"]


def bench_models(device: str = "cpu", names: str = "*", onnx: int = 1) -> dict:
    """Try the library on networks of five libraries, with random weights, and write docs/models.md.

    Args:
        device: "cpu" or "cuda".
        names: a pattern of networks, as ``timm:*``; the page is written for all of them only.
        onnx: 0 leaves out the export, which takes most of the time.

    Returns:
        ``versions`` of the libraries, None where one is not installed; ``rows``, see :func:`examine`.
    """
    place = project_file("docs/models.md") if names == "*" else None  # refused now, not at the end
    found, rows = versions(), []
    for network in networks():
        if found[network.library] and fnmatch.fnmatchcase(f"{network.library}:{network.name}", names):
            rows.append(examine(network, torch.device(device), onnx=bool(onnx)))
            print(json.dumps(rows[-1]), flush=True)
    if place:
        write_file(place, page(found, rows))
    return {"prune_ratio": PRUNE_RATIO, "versions": found, "rows": rows}


def examine(network: Network, device: torch.device, *, onnx: bool = True) -> dict:
    """Project, factorize, count, fold, save, load and export one network, all in float64 but the last.

    Args:
        network: one of :func:`networks`.
        device: where it runs.
        onnx: export it too.

    Returns:
        ``layers``, ``taken`` and ``left_out`` (reason → number of layers); ``params_share`` of the parameters
        in the layers taken; ``batchnorms`` and how many are ``paired``; ``dense_macs``, ``told_macs`` and
        ``real_macs`` for the inputs; ``moved``, ``error``, ``fold_error``, ``load_error`` and ``onnx_error``,
        differences of outputs by their largest number: of the projected network from the dense one, of the
        factorized from the projected, and so on; ``onnx_skipped``, ``failed``, why something is missing.
    """
    began = time.monotonic()
    row: dict[str, Any] = {"library": network.library, "network": network.name}
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model = _stirred(network.build()).double().to(device).eval()
            inputs = tree_map(lambda x: _float(x, torch.float64).to(device), network.inputs())
            plan = select(model, "*", prune_ratio=PRUNE_RATIO, example_inputs=inputs)
            row |= _coverage(model, plan, inputs)
            folded = _compare(network, model, plan, inputs, row)
        except Exception as error:  # whatever a network of somebody else raises is what the table is for
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            onnx = False
        if onnx:
            row |= _exported(folded.float().cpu(), tree_map(lambda x: _float(x, torch.float32).cpu(), inputs))
    row["warnings"] = sorted({str(warning.message) for warning in told if warning.category is UserWarning})
    return row | {"seconds": round(time.monotonic() - began, 1)}


def _float(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if x.is_floating_point() else x


def _coverage(model: nn.Module, plan: Plan, inputs: Any) -> dict:
    batchnorms = sum(is_batchnorm(module) for module in model.modules())
    pairs = find_batchnorms(model, inputs).values() if batchnorms else ()
    return {
        "layers": len(plan.layers),
        "taken": len(plan),
        "left_out": Counter(layer.reason for layer in plan.layers if not layer.taken),
        "params_share": plan.params_share,
        "batchnorms": batchnorms,
        "paired": len({bn for bn in pairs if bn is not None}),
    }


def _compare(network: Network, model: nn.Module, plan: Plan, inputs: Any, row: dict) -> nn.Module:
    """Fill in what was counted and how far outputs are apart; return the factorized and folded network."""
    dense = _outputs(model, inputs)
    LowRankProjector(model, plan, example_inputs=inputs).step()
    projected = _outputs(model, inputs)
    counted = cost(model, ranks=plan, example_inputs=inputs)
    compact = factorize(model, plan)
    row["moved"] = _difference(projected, dense)
    row["error"] = _difference(_outputs(compact, inputs), projected)
    others = sum(counted.other_macs.values())
    row["dense_macs"], row["told_macs"] = counted.dense_macs + others, counted.macs + others
    row["real_macs"] = count_run(compact, inputs)
    folded = fold_batchnorm(compact, example_inputs=inputs)
    row["folded"] = len(folded.folded_batchnorms)
    row["fold_error"] = _difference(_outputs(folded, inputs), projected)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.safetensors"
        save_compact(compact, file)
        again = load_compact(file, network.build().double().to(projected[0].device)).eval()
    row["load_error"] = _difference(_outputs(again, inputs), _outputs(compact, inputs))
    return folded


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return [x.clone() for x in tree_leaves(call(model, inputs)) if isinstance(x, Tensor)]


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    if [x.shape for x in some] != [x.shape for x in others] or not any(x.numel() for x in others):
        return float("inf")
    apart = [0.0]
    for x, y in zip(some, others, strict=True):
        if y.numel():
            x, y = x.double(), y.double()
            apart.append(float((x - y).abs().max() / y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)))
    return max(apart) if all(value == value for value in apart) else float("nan")


def count_run(model: nn.Module, inputs: Any) -> int:
    """Return the multiply-adds of one run as it is, with attention taken apart into its products.

    >>> count_run(nn.Linear(8, 4), torch.ones(3, 8))
    96
    """
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _exported(network: nn.Module, inputs: Any) -> dict:
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            return {"onnx_error": export(network, file, example_inputs=inputs, dynamic_batch=False)}
    except Exception as error:  # the exporter's
        return {"onnx_skipped": f"{type(error).__name__}: {error}"[:300]}


@torch.no_grad()
def _stirred(model: nn.Module) -> nn.Module:
    """Let no BatchNorm, bias or scale be zero or one, where a fault would not show."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        if is_batchnorm(module):
            for name in ("weight", "running_var"):
                if own.get(name) is not None:
                    own[name].uniform_(0.75, 1.25, generator=draw)
            for name in ("bias", "running_mean"):
                if own.get(name) is not None:
                    own[name].normal_(std=0.1, generator=draw)
            continue
        for parameter in module._parameters.values():
            if parameter is not None and (parameter.ndim < 2 or not parameter.any()):
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=draw))
    return model
