"""The network of a finished run as a file for other programs."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.deploy.export import ENDINGS, FORMATS, export
from lrpet.files import write_file
from lrpet.lowrank.batchnorm import fold_batchnorm
from lrpet.lowrank.compact_file import compact_header, save_compact
from lrpet.paths import results_root
from lrpet.runs.finish import largest_difference
from lrpet.runs.store import is_complete, load_network, load_run, read_network, weights_file

__all__ = ["export_run", "find_run"]


def find_run(name: str) -> Path:
    """Return the folder of a finished run, given that folder or its run id.

    Raises:
        ValueError: there is none, or several profiles have it.
    """
    if is_complete(Path(name)):
        return Path(name)
    folders = [folder for folder in sorted(results_root().glob(f"*/runs/{name}")) if is_complete(folder)]
    if not folders:
        raise ValueError(
            f"{name!r} is neither the folder of a finished run nor the id of one below {results_root()}; "
            "'list' shows ids"
        )
    if len(folders) > 1:
        raise ValueError(
            f"{name!r} is a run of {len(folders)} profiles; give its folder: {', '.join(map(str, folders))}"
        )
    return folders[0]


def export_run(name: str, to: str, out: str | Path | None = None, half: bool = False) -> tuple[Path, float]:
    """Export the compact network of a finished run, with its BatchNorm folded.

    Args:
        name: run id or folder.
        to: "onnx", "openvino", "pt2" or "safetensors" (the factors as the run kept them, BatchNorm not
            folded; :func:`lrpet.load_compact` reads it).
        out: the file to write; None is ``<run id>.<to>`` here, ``.xml`` for OpenVINO.
        half: for safetensors, round the weights to half precision; :func:`lrpet.load_compact` gives float32
            again.

    Returns:
        The path, and the largest difference of an output on random images, relative to the largest output (0
        for a copy).

    Raises:
        ValueError: the run is not there, has no weights, or cannot be exported, as a detector.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}; got {to!r}")
    if half and to != "safetensors":
        raise ValueError(f"half is for safetensors; got to={to!r}, whose programs compute in float32")
    done = load_run(find_run(name))
    path = Path(out or f"{done.config.run_id}{ENDINGS[to]}")
    file, network = weights_file(done.folder), load_network(done)
    shape = (3, done.config.image_size, done.config.image_size)
    if half:
        return path, _save_half(done.config, network, path, compact_header(file))
    if to == "safetensors":
        write_file(path, file.read_bytes())
        return path, 0.0
    if done.config.task == "detection":
        raise ValueError(
            "to must be safetensors for a detector, which PyTorch's exporter cannot follow where it chooses "
            f"boxes by their values; got {to!r}. Its layers alone: lrpet.export(network.backbone, …)"
        )
    images = None if done.config.task == "classification" else torch.zeros(1, *shape)
    return path, export(fold_batchnorm(network, example_inputs=images), path, to, shape)


def _save_half(config: RunConfig, network: nn.Module, path: Path, header: dict) -> float:
    """Write a network in half precision; return the largest relative difference of an output, read back."""
    kept = {name: header[name] for name in ("model", "num_classes", "filters") if name in header}
    save_compact(copy.deepcopy(network).half(), path, **kept)
    rounded, size = read_network(config, path), config.image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return largest_difference(rounded, network, images)
