"""A network for other programs: ONNX or torch.export, checked against the network it was made from."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import torch
from torch import nn

__all__ = ["FORMATS", "TOLERANCE", "export"]
FORMATS = ("onnx", "pt2", "safetensors")
TOLERANCE = 1e-4  # largest difference of an output, relative to the largest output


def export(network: nn.Module, path: str | Path, to: str, image_shape: tuple[int, int, int]) -> float:
    """Write a network as a program for batches of any size, and run it to see that it computes the same.

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
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if to == "onnx" and not importlib.util.find_spec(name)
    ]
    if missing:
        raise ValueError(
            f"ONNX needs the package {missing[0]}, which is not installed: pip install lrpet[export]"
        )
    network = network.to("cpu")
    draw = torch.Generator().manual_seed(0)
    images, other = (
        torch.randn(count, *image_shape, generator=draw) for count in (2, 5)
    )  # a batch of 1 would be taken for a constant
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
                onnx_program = torch.onnx.export(
                    program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
                )
                onnx_program.save(part, external_data=False)
            session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
            outputs = torch.from_numpy(session.run(None, {"images": other.numpy()})[0])
        with torch.no_grad():
            reference = network(other)
        difference = float((outputs - reference).abs().max() / reference.abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the {to} program differs from the network by {difference:.1e}, more than {TOLERANCE:.0e}; "
                "nothing was written"
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return difference
