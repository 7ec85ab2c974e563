"""Eigenvalues of Gram matrices, by three ways in turn where one does not converge."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch
from torch import Tensor

__all__ = ["eigh"]
logger = logging.getLogger("lrpet")


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of symmetric matrices.

    Args:
        gram: (B, K, K), float64.

    Returns:
        (B, K) and (B, K, K), as ``torch.linalg.eigh``; a way that fails is logged, and the next one taken.

    Raises:
        torch.linalg.LinAlgError: none of the ways converged.

    >>> eigh(torch.diag(torch.tensor([9.0, 4.0])))[0]
    tensor([4., 9.])
    """

    def by_svd():
        U, s, _ = torch.linalg.svd(gram, driver="gesvd" if gram.is_cuda else None)
        return s.flip(-1), U.flip(-1)

    def on_cpu():
        try:
            values, vectors = np.linalg.eigh(gram.cpu().numpy())
        except np.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(str(error)) from error
        return torch.from_numpy(values).to(gram.device), torch.from_numpy(vectors).to(gram.device)

    ways = {
        "torch.linalg.eigh": partial(torch.linalg.eigh, gram),
        "torch.linalg.svd": by_svd,
        "numpy.linalg.eigh on the CPU": on_cpu,
    }
    for name, way in ways.items():
        try:
            return way()
        except torch.linalg.LinAlgError as error:
            logger.warning("%s failed on %s matrices %s: %s", name, gram.device, tuple(gram.shape), error)
    raise torch.linalg.LinAlgError(
        f"none of {', '.join(ways)} converged on Gram matrices {tuple(gram.shape)}; look for extreme weights"
    )
