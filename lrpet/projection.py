"""The paper as functions on matrices: keep the R largest singular values and hand on the energy.

Nothing here knows of models or files. Letters: ``M`` is a weight as an N×D matrix, ``K = min(N, D)``,
``R`` the rank that is kept, ``s_1 ≥ s_2 ≥ …`` its singular values, ``E = Σ s_i²`` its energy and ``a``
the factor by which a BatchNorm behind the layer scales each row. All arithmetic is in float64: a
projection is small next to the training steps between two of them, and the Gram matrix, which
squares the condition number, then costs no accuracy that float32 weights could show.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["project", "project_and_measure", "truncated_svd"]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the R leading singular triplets of each matrix.

    They come from the eigenvectors Q of the smaller Gram matrix, K×K, which takes a fraction of the
    time of a full SVD: for N ≤ D the left vectors are Q and QᵀM holds the rows s_i·v_iᵀ.

    Args:
        matrix: (..., N, D), any floating dtype.
        rank: R, 1 ≤ R ≤ min(N, D).

    Returns:
        ``U`` (..., N, R), ``s`` (..., R) descending, ``Vh`` (..., R, D), all float64. The vector that
        belongs to an exactly zero singular value is zero on the side that is not an eigenvector.

    Raises:
        ValueError: the matrix is not floating point or the rank is out of range.

    Source: Golub and Van Loan, Matrix Computations, section 8.6.

    >>> M = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> truncated_svd(M, 1)[1]
    tensor([4.], dtype=torch.float64)
    """
    _check(matrix, rank)
    A = matrix.to(torch.float64)
    tall = A.shape[-2] > A.shape[-1]
    if tall:
        A = A.mT
    Q = torch.linalg.eigh(A @ A.mT).eigenvectors[..., -rank:].flip(-1)  # (..., K, R)
    B = Q.mT @ A  # (..., R, max(N, D)), row i is s_i times the other singular vector
    s = torch.linalg.vector_norm(B, dim=-1)  # (..., R)
    B = B / torch.where(s > 0, s, 1.0).unsqueeze(-1)
    return (B.mT, s, Q.mT) if tall else (Q, s, B)


def project(
    matrix: Tensor,
    rank: int,
    *,
    energy_transfer: bool = True,
    row_scale: Tensor | None = None,
    residual: float = 0.0,
    row_eps: float = 1e-5,
) -> Tensor:
    """Project each matrix onto rank R and hand the energy of the removed singular values to the kept ones.

    With A = diag(a)·M and A_R its best approximation of rank R::

        f = sqrt((E − q²·Σ_{i>R} s_i²) / Σ_{i≤R} s_i²)        (1 without energy transfer)
        result = diag(a / (a² + row_eps)) · (f·A_R + q·(A − A_R))

    With R = K nothing is removed and the matrix is returned as it came.

    Args:
        matrix: (..., N, D), floating point; float16 and bfloat16 are computed in float64 like all others.
        rank: R, 1 ≤ R ≤ min(N, D).
        energy_transfer: False is the paper's ablation "LRP".
        row_scale: ``a``, (..., N), from the BatchNorm behind the layer; None for no rectification.
        residual: q in [0, 1], the share of each removed singular value that stays.
        row_eps: the constant of the authors' way to undo ``a``; 0 is the exact inverse (a row with a = 0
            then becomes 0, the limit for row_eps → 0).

    Returns:
        (..., N, D), same dtype and device; not connected to the autograd graph.

    Raises:
        ValueError: rank, residual, row_eps or a shape is out of range, or a value is NaN or infinite.

    Source: arXiv 2204.05566, on projection, energy transfer and BN rectification.

    >>> M = torch.diag(torch.tensor([4.0, 3.0]))
    >>> project(M, 1)  # 4 becomes 5: the energy 16 + 9 stays
    tensor([[5., 0.],
            [0., 0.]])
    """
    return project_and_measure(
        matrix,
        rank,
        energy_transfer=energy_transfer,
        row_scale=row_scale,
        residual=residual,
        row_eps=row_eps,
    )[0]


@torch.no_grad()
def project_and_measure(
    matrix: Tensor,
    rank: int,
    *,
    energy_transfer: bool = True,
    row_scale: Tensor | None = None,
    residual: float = 0.0,
    row_eps: float = 1e-5,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`project` does and also return which share of the energy the R kept values had.

    Args:
        matrix, rank, energy_transfer, row_scale, residual, row_eps: as in :func:`project`.
        check_finite: False where the caller has already looked for NaN and infinity.

    Returns:
        The projected matrices (..., N, D) and Σ_{i≤R} s_i² / E of A = diag(a)·M, (...,), float64, in
        [0, 1]; 1 for a zero matrix.

    Raises:
        ValueError: as :func:`project`.

    Source: arXiv 2204.05566.

    >>> project_and_measure(torch.diag(torch.tensor([4.0, 3.0])), 1)[1]
    tensor(0.6400, dtype=torch.float64)
    """
    _check(matrix, rank)
    if not isinstance(energy_transfer, bool):
        raise ValueError(f"energy_transfer must be True or False; got {energy_transfer!r}")
    if isinstance(residual, bool) or not isinstance(residual, (int, float)) or not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual is the kept share of removed values, 0 to 1; got {residual!r}")
    if isinstance(row_eps, bool) or not isinstance(row_eps, (int, float)) or not 0.0 <= row_eps < math.inf:
        raise ValueError(f"row_eps must be 0 (exact inverse) or positive; got {row_eps!r}")
    if check_finite and not torch.isfinite(matrix.double().square().sum()):
        raise ValueError("matrix holds NaN or infinite values, or overflows when squared; the weights were lost before this projection")
    if row_scale is not None and not (isinstance(row_scale, Tensor) and row_scale.is_floating_point()):
        raise ValueError(f"row_scale must be a floating-point tensor or None; got {type(row_scale).__name__}")
    if row_scale is not None and row_scale.shape != matrix.shape[:-1]:
        raise ValueError(f"row_scale must have a value a row, {tuple(matrix.shape[:-1])}; got {tuple(row_scale.shape)}")
    if check_finite and row_scale is not None and not torch.isfinite(row_scale).all():
        raise ValueError("row_scale holds NaN or infinite values; look at the BatchNorm it was taken from")

    if rank == min(matrix.shape[-2:]):
        return matrix.clone(), torch.ones(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    with torch.autocast(matrix.device.type, enabled=False):  # which would round the float32 product to bfloat16
        N, D = matrix.shape[-2:]
        M = matrix.to(torch.float64)
        if row_scale is not None:
            a = row_scale.to(torch.float64).unsqueeze(-1)  # (..., N, 1)
            square = a.square() + row_eps
            undo = torch.where(square > 0, a / torch.where(square > 0, square, 1.0), 0.0)  # (..., N, 1)
        if N <= D:
            gram = M @ M.mT  # AAᵀ is this, scaled from both sides, (..., N, N)
            gram = gram if row_scale is None else a * gram * a.mT
        else:
            A = M if row_scale is None else a * M
            gram = A.mT @ A  # (..., D, D)
        eigenvalues, Q = torch.linalg.eigh(gram)  # s_i², ascending, (..., K); (..., K, K)
        Q = Q[..., -rank:]  # (..., K, R)
        E = eigenvalues.clamp(min=0).sum(dim=-1)  # (...,)
        kept = eigenvalues[..., -rank:].clamp(min=0).sum(dim=-1)  # (...,)
        factor = torch.ones_like(E)
        if energy_transfer:
            factor = ((E - residual**2 * (E - kept)) / torch.where(kept > 0, kept, 1.0)).sqrt()
        # What remains is M times two thin factors. They are exact to float64, so float32 suffices from here on; but not
        # on a GPU, which may be set to round float32 products to TF32.
        exact = torch.promote_types(matrix.dtype, torch.float64 if matrix.is_cuda else torch.float32)
        M, scaled = matrix.to(exact), Q * (factor - residual)[..., None, None]  # (..., K, R)
        if N <= D:
            left, right = (scaled, Q) if row_scale is None else (undo * scaled, a * Q)
            result = left.to(exact) @ (right.mT.to(exact) @ M)  # (..., N, D)
        else:
            result = (M @ scaled.to(exact)) @ Q.mT.to(exact)  # (..., N, D)
            result = result if row_scale is None else (undo * a).to(exact) * result
        if residual:  # f on the kept directions is f − q on them and q on all
            result = result + residual * (M if row_scale is None else (undo * a).to(exact) * M)
        return result.to(matrix.dtype), torch.where(E > 0, kept / torch.where(E > 0, E, 1.0), 1.0)


def _check(matrix: Tensor, rank: int) -> None:
    if not isinstance(matrix, Tensor):
        raise ValueError(f"matrix must be a floating-point tensor, (..., N, D); got {type(matrix).__name__}; torch.as_tensor makes one")
    if not matrix.is_floating_point() or matrix.ndim < 2:
        raise ValueError(f"matrix must be floating point, (..., N, D); got {matrix.dtype}, {tuple(matrix.shape)}")
    K = min(matrix.shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= K:
        raise ValueError(f"rank must be an integer from 1 to {K} for a {matrix.shape[-2]}×{matrix.shape[-1]} matrix; got {rank!r}")
