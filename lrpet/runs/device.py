"""Which device a name means, and what is asked of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrpet.config import RunConfig


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Refuse algorithms whose result varies, or let cuDNN measure the fastest; then all is as before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def device_of(name: str, config: RunConfig, several: bool = False) -> torch.device:
    """Return the device that a name means; refuse one that is not there or cannot do what is asked of it.

    With ``several``, for processes that train together.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees no CUDA GPU; "
            "use 'cpu' or 'auto'"
        )
    if config.sync_batchnorm and device.type != "cuda" and several:
        raise ValueError(
            "sync_batchnorm needs CUDA GPUs where several processes train together: "
            "PyTorch has it for no other device; got 'cpu'"
        )
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError("precision 'tf32' exists on CUDA GPUs only; use 'fp32' or 'bf16' on a CPU")
    return device
