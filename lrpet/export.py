"""The compact network for other programs: ONNX, torch.export or safetensors, checked against the network it was made from."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from lrpet.config import results_root
from lrpet.factorize import compact_header, fold_batchnorm, save_compact
from lrpet.runs import is_complete, load_network, load_run, weights_file

__all__ = ["FORMATS", "TOLERANCE", "export", "export_run", "find_run"]

FORMATS = ("onnx", "pt2", "safetensors")
TOLERANCE = 1e-4  # largest difference of an output, relative to the largest output


def export(network: nn.Module, path: str | Path, to: str, image_shape: tuple[int, int, int]) -> float:
    """Write a network as a program with a batch of any size, and run that program to see that it computes the same.

    Args:
        network: in eval mode, such as :func:`lrpet.fold_batchnorm` returns.
        path: the file to write; it appears only once it has been checked.
        to: "onnx" (by the dynamo exporter; needs ``pip install lrpet[export]``) or "pt2" (torch.export).
        image_shape: (C, H, W).

    Returns:
        The largest difference of an output on random images, relative to the largest output.

    Raises:
        ValueError: an unknown format, a package that is missing, or a program that differs by more than 1e-4.

    Source: https://docs.pytorch.org/docs/stable/onnx_export.html and https://docs.pytorch.org/docs/stable/export.html.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), folder + "/net.pt2", "pt2", (3, 8, 8)) < 1e-4
    True
    """
    if to not in ("onnx", "pt2"):
        raise ValueError(f"to must be onnx or pt2; got {to!r}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" and not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"ONNX needs the package {missing[0]}, which is not installed: pip install lrpet[export]")
    network = network.to("cpu")
    draw = torch.Generator().manual_seed(0)
    images, other = (torch.randn(count, *image_shape, generator=draw) for count in (2, 5))  # a batch of 1 would be taken for a constant
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = Path(path)
    part = path.with_name(f"part{os.getpid()}-{path.name}")
    try:
        if to == "pt2":
            torch.export.save(program, part)
            with torch.no_grad():
                outputs = torch.export.load(part).module()(other)
        else:
            import onnxruntime

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporter's own making
                onnx_program = torch.onnx.export(program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
                onnx_program.save(part, external_data=False)
            session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
            outputs = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
        with torch.no_grad():
            reference = network(other)
        difference = float((outputs - reference).abs().max() / reference.abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(f"the {to} program differs from the network by {difference:.1e}, more than {TOLERANCE:.0e}; nothing was written")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return difference


def find_run(name: str) -> Path:
    """Return the folder of a finished run, given that folder or its run id.

    Raises:
        ValueError: there is none, or several profiles have it.
    """
    folders = [folder for folder in [Path(name), *sorted(results_root().glob(f"*/runs/{name}"))] if is_complete(folder)]
    if not folders:
        raise ValueError(f"{name!r} is neither the folder of a finished run nor the id of one below {results_root()}; 'list' shows ids")
    if len(folders) > 1:
        raise ValueError(f"{name!r} is a run of {len(folders)} profiles; give its folder: {', '.join(map(str, folders))}")
    return folders[0]


def export_run(name: str, to: str, out: str | Path | None = None, half: bool = False) -> tuple[Path, float]:
    """Export the compact network of a finished run, with its BatchNorm folded.

    Args:
        name: run id or folder.
        to: "onnx", "pt2" or "safetensors" (the factors as the run kept them, BatchNorm not folded; :func:`lrpet.load_compact` reads it).
        out: the file to write; None is ``<run id>.<to>`` here.
        half: for safetensors, round the weights to half precision; :func:`lrpet.load_compact` gives float32 again.

    Returns:
        The path, and the largest difference of an output on random images, relative to the largest output (0 for a copy).

    Raises:
        ValueError: the run is not there, has no weights, or cannot be exported.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}; got {to!r}")
    if half and to != "safetensors":
        raise ValueError(f"half is for safetensors; got to={to!r}, whose programs compute in float32")
    done = load_run(find_run(name))
    path = Path(out or f"{done.config.run_id}.{to}")
    file, network = weights_file(done.folder), load_network(done)
    shape = (3, done.config.image_size, done.config.image_size)
    if half:
        return path, _save_half(network, path, compact_header(file), shape)
    if to == "safetensors":
        shutil.copyfile(file, path)
        return path, 0.0
    return path, export(fold_batchnorm(network), path, to, shape)


@torch.no_grad()
def _save_half(network: nn.Module, path: Path, header: dict, shape: tuple[int, int, int]) -> float:
    """Write a network in half precision, as :func:`lrpet.load_compact` reads it; return the largest relative difference of an output."""
    rounded = copy.deepcopy(network).half()
    save_compact(rounded, path, **{name: header[name] for name in ("model", "num_classes", "filters") if name in header})
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    reference = network.eval()(images)
    return float((rounded.float().eval()(images) - reference).abs().max() / reference.abs().max())
