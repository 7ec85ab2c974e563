"""The paper as functions on matrices: keep the R largest singular values and hand on the energy.

Nothing here knows of models or files. Notation: ``M`` is a weight as an N×D matrix, ``K = min(N, D)``,
``R`` the rank that is kept, ``s_1 ≥ s_2 ≥ …`` its singular values, ``E = Σ s_i²`` its energy and ``a``
the factor by which a BatchNorm after the layer scales each row. All arithmetic is in float64: a
projection is small next to the training steps between two of them, and the Gram matrix, which
squares the condition number, then costs no accuracy that float32 weights could show.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lrpet.lowrank.arguments import check, is_number, is_whole, renamed
from lrpet.lowrank.eigen import eigh

__all__ = [
    "Basis",
    "gram_matrices",
    "leading_basis",
    "project",
    "project_and_measure",
    "project_on_basis_",
    "truncated_svd",
]
BLOCK = 128  # rows of a Gram matrix that are multiplied at once on a CPU


class Basis(NamedTuple):
    """What a projection needs to know of B matrices A = diag(a)·M: the kept directions, and energies."""

    vectors: Tensor  # (B, K, R), orthonormal columns: left singular vectors for N ≤ D, right ones for N > D
    kept: Tensor  # Σ_{i≤R} s_i², (B,)
    energy: Tensor  # E, (B,)


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
        TypeError: the matrix is not floating point, or the rank no integer.
        ValueError: the rank is out of range, or the matrix has less than two dimensions.

    Source: Golub and Van Loan, Matrix Computations, section 8.6.

    >>> M = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> truncated_svd(M, 1)[1]
    tensor([4.], dtype=torch.float64)
    """
    rank = _check(matrix, rank)
    A = matrix.to(torch.float64)
    tall = A.shape[-2] > A.shape[-1]
    if tall:
        A = A.mT
    Q = eigh(A @ A.mT)[1][..., -rank:].flip(-1)  # (..., K, R)
    B = Q.mT @ A  # (..., R, max(N, D)), row i is s_i times the other singular vector
    s = torch.linalg.vector_norm(B, dim=-1)  # (..., R)
    B = B / torch.where(s > 0, s, 1.0).unsqueeze(-1)
    return (B.mT, s, Q.mT) if tall else (Q, s, B)


@renamed(residual="keep_share")
def project(
    matrix: Tensor,
    rank: int,
    *,
    energy_transfer: bool = True,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    keep_share: float = 0.0,
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
        row_scale: ``a``, (..., N), from the BatchNorm after the layer; None for no rectification.
        column_scale: g, (..., D), the gain of a LayerNorm or RMSNorm *before* a Linear layer, in the place of
            ``row_scale``: A = M·diag(g), undone as ``a`` is. Ours, not the paper's.
        keep_share: q in [0, 1], the share of each removed singular value that stays.
        row_eps: the constant of the authors' way to undo ``a``; 0 is the exact inverse (a row with a = 0
            then becomes 0, the limit for row_eps → 0).

    Returns:
        (..., N, D), same dtype and device; not connected to the autograd graph.

    Raises:
        TypeError: an argument is of another type.
        ValueError: rank, keep_share, row_eps or a shape is out of range, or a value is NaN or infinite.

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
        column_scale=column_scale,
        keep_share=keep_share,
        row_eps=row_eps,
    )[0]


@renamed(residual="keep_share")
@torch.no_grad()
def project_and_measure(
    matrix: Tensor,
    rank: int,
    *,
    energy_transfer: bool = True,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    keep_share: float = 0.0,
    row_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`project` does and also return which share of the energy the R kept values had.

    Args:
        matrix, rank, energy_transfer, row_scale, column_scale, keep_share, row_eps: as in :func:`project`.

    Returns:
        The projected matrices (..., N, D) and Σ_{i≤R} s_i² / E of A, (...,), float64, in
        [0, 1]; 1 for a zero matrix.

    Raises:
        TypeError, ValueError: as :func:`project`.

    Source: arXiv 2204.05566.

    >>> project_and_measure(torch.diag(torch.tensor([4.0, 3.0])), 1)[1]
    tensor(0.6400, dtype=torch.float64)
    """
    rank = _check(matrix, rank)
    check("energy_transfer must be True or False", energy_transfer, isinstance(energy_transfer, bool))
    wanted = "keep_share is the kept share of removed values, 0 to 1"
    check(wanted, keep_share, is_number(keep_share), lambda share: 0 <= share <= 1)
    wanted = "row_eps must be 0 (exact inverse) or positive"
    check(wanted, row_eps, is_number(row_eps), lambda eps: 0 <= eps < math.inf)
    if not torch.isfinite(matrix.double().square().sum()):
        raise ValueError(
            "matrix holds NaN or infinite values, or overflows when squared; the weights were lost before "
            "this projection"
        )
    if column_scale is not None:
        if row_scale is not None:
            raise ValueError("give row_scale or column_scale: a weight is scaled on one side only")
        settings = {"energy_transfer": energy_transfer, "keep_share": keep_share, "row_eps": row_eps}
        _check_scale("column_scale", column_scale, matrix.mT, "column", "norm")
        turned, kept = project_and_measure(matrix.mT, rank, row_scale=column_scale, **settings)
        return turned.mT.contiguous(), kept
    if row_scale is not None:
        _check_scale("row_scale", row_scale, matrix, "row", "BatchNorm")
    if rank == min(matrix.shape[-2:]):
        return matrix.clone(), torch.ones(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
    result = matrix.clone(memory_format=torch.contiguous_format)
    matrices = result.view(-1, *matrix.shape[-2:])  # (B, N, D)
    row_scale = None if row_scale is None else row_scale.reshape(matrices.shape[:2])
    basis = leading_basis(gram_matrices(matrices, row_scale), rank)
    settings = {"energy_transfer": energy_transfer, "keep_share": keep_share, "row_eps": row_eps}
    project_on_basis_(matrices, basis, row_scale=row_scale, **settings)
    return result, torch.where(basis.energy > 0, basis.kept / basis.energy, 1.0).view(matrix.shape[:-2])


@torch.no_grad()
def gram_matrices(matrices: Tensor, row_scale: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """Return the smaller Gram matrix of each A = diag(a)·M: AAᵀ for N ≤ D, AᵀA for N > D.

    Args:
        matrices: (B, N, D).
        row_scale: ``a``, (B, N), or None.
        rounded: multiply in float32 where the weights are no finer and not on a GPU, which may be set to use
            TF32.

    Returns:
        (B, K, K), float64.

    >>> gram_matrices(torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])).flatten()
    tensor([25.,  2.], dtype=torch.float64)
    """
    N, D = matrices.shape[1:]
    with unrounded(matrices):
        A = matrices.to(thin_dtype(matrices) if rounded else torch.float64)
        if N <= D:
            G = _times_own_transpose(A).to(torch.float64)
            return G if row_scale is None else row_scale.unsqueeze(-1) * G * row_scale.unsqueeze(-2)
        if row_scale is not None:
            A = row_scale.to(A.dtype).unsqueeze(-1) * A
        return _times_own_transpose(A.mT).to(torch.float64)


def _times_own_transpose(A: Tensor) -> Tensor:
    """Return A·Aᵀ, (B, K, K); of a large one on a CPU only the lower triangle is multiplied, in blocks."""
    K = A.shape[1]
    if A.is_cuda or K <= BLOCK:
        return A @ A.mT
    G = A.new_empty(len(A), K, K)
    for i in range(0, K, BLOCK):
        j = min(i + BLOCK, K)
        G[:, i:j, :j] = A[:, i:j] @ A[:, :j].mT
        G[:, :i, i:j] = G[:, i:j, :i].mT
    return G


@torch.no_grad()
def leading_basis(gram: Tensor, rank: int) -> Basis:
    """Return the R leading directions of matrices, from an eigen-decomposition of their Gram matrices.

    Args:
        gram: (B, K, K), from :func:`gram_matrices`.
        rank: R, 1 ≤ R ≤ K.

    Source: Golub and Van Loan, Matrix Computations, section 8.6.

    >>> leading_basis(gram_matrices(torch.diag(torch.tensor([4.0, 3.0]))[None]), 1).kept
    tensor([16.], dtype=torch.float64)
    """
    values, vectors = eigh(gram)
    values = values.clamp(min=0)  # s_i², ascending, (..., K)
    return Basis(vectors[..., -rank:], values[..., -rank:].sum(dim=-1), values.sum(dim=-1))


@renamed(residual="keep_share")
@torch.no_grad()
def project_on_basis_(
    matrices: Tensor,
    basis: Basis,
    *,
    energy_transfer: bool = True,
    row_scale: Tensor | None = None,
    keep_share: float = 0.0,
    row_eps: float = 1e-5,
    undo_exactly: Tensor | None = None,
) -> None:
    """Do what :func:`project` does, in place, once the leading directions are known.

    Args:
        matrices: (B, N, D), any dtype.
        basis: of their diag(a)·M, from :func:`leading_basis` or :func:`follow_basis`.
        energy_transfer, keep_share, row_eps: as in :func:`project`.
        row_scale: ``a``, (B, N), or None.
        undo_exactly: (B, N) bool, the rows for which 1/a undoes a, also where a is 0; None for no row.

    Source: arXiv 2204.05566.

    >>> M = torch.diag(torch.tensor([4.0, 3.0]))
    >>> project_on_basis_(M[None], leading_basis(gram_matrices(M[None]), 1), energy_transfer=False)
    >>> M
    tensor([[4., 0.],
            [0., 0.]])
    """
    Q, kept, E = basis
    N, D = matrices.shape[1:]
    factor = torch.ones_like(E)
    if energy_transfer:
        factor = ((E - keep_share**2 * (E - kept)) / torch.where(kept > 0, kept, 1.0)).sqrt()
    # What remains is M times two thin factors. They are exact to float64, so float32 suffices from here on.
    # f on the kept directions is f − q on them and q on all.
    thin = thin_dtype(matrices)
    left, right, row = Q * (factor - keep_share)[:, None, None], Q, None  # (B, K, R)
    if row_scale is not None:
        a = row_scale.to(torch.float64).unsqueeze(-1)  # (B, N, 1)
        square = a.square() + row_eps
        undo = torch.where(square > 0, a / torch.where(square > 0, square, 1.0), 0.0)
        row = (undo * a).to(thin)  # (B, N, 1)
        if N <= D:
            left, right = undo * left, a * right
        if undo_exactly is not None:
            row.masked_fill_(undo_exactly.unsqueeze(-1), 1.0)
    with unrounded(matrices):
        M, V = matrices.to(thin), right.to(thin).mT
        if N <= D:
            V = V @ M  # (B, R, D)
            if row_scale is not None and undo_exactly is not None:
                _undo_exactly_(left, undo_exactly, factor - keep_share, M, V)
        U = left.to(thin)
        if N > D:
            U = M @ U if row is None else row * (M @ U)  # (B, N, R)
        if keep_share and row is not None:
            M.mul_(row)
        M.baddbmm_(U, V, beta=keep_share)
        if M is not matrices:
            matrices.copy_(M)


def _undo_exactly_(left: Tensor, which: Tensor, factor: Tensor, matrices: Tensor, kept: Tensor) -> None:
    """Set the chosen rows of left so that left·V is ``factor`` times their part in the space of the kept.

    That space is spanned by the rows of V, ``kept``, (R, D), and least squares find C with C·V next to M's
    rows. No row is divided by its scale.
    """
    some = which.any(dim=1).nonzero().flatten()
    which, V = which[some], kept[some].to(torch.float64)
    order = which.int().topk(int(which.sum(dim=1).max())).indices.unsqueeze(-1)  # (b, k, 1)
    M = matrices[some].take_along_dim(order, 1).to(torch.float64)  # (b, k, D)
    G = V @ V.mT
    diagonal = G.diagonal(dim1=-2, dim2=-1)  # its shift: V may have less than R rows
    diagonal.add_(1e-14 * diagonal.sum(dim=-1, keepdim=True) + torch.finfo(G.dtype).tiny)
    C = torch.linalg.solve(G, V @ M.mT).mT * factor[some, None, None]  # (b, k, R)
    old = left[some]
    C = torch.where(which.unsqueeze(-1).take_along_dim(order, 1), C, old.take_along_dim(order, 1))
    left[some] = old.scatter(1, order.expand_as(C), C)


def unrounded(matrices: Tensor) -> AbstractContextManager:
    """Switch autocast off, where it is on: it would round products of float32 to bfloat16."""
    kind = matrices.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def thin_dtype(matrix: Tensor) -> torch.dtype:
    """Return float32 where it suffices; float64 for float64 and on a GPU, where TF32 may be switched on."""
    return torch.promote_types(matrix.dtype, torch.float64 if matrix.is_cuda else torch.float32)


def _check_scale(name: str, scale: Tensor, matrix: Tensor, axis: str, norm: str) -> None:
    """Refuse a scale that does not give each row of a matrix, or column of a transposed one, a number."""
    if not (isinstance(scale, Tensor) and scale.is_floating_point()):
        raise TypeError(f"{name} must be a floating-point tensor or None; got {type(scale).__name__}")
    if scale.shape != matrix.shape[:-1]:
        raise ValueError(
            f"{name} must have one value per {axis}, {tuple(matrix.shape[:-1])}; got {tuple(scale.shape)}"
        )
    if not torch.isfinite(scale).all():
        raise ValueError(f"{name} holds NaN or infinite values; look at the {norm} it was taken from")


def _check(matrix: Tensor, rank: int) -> int:
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"matrix must be a floating-point tensor, (..., N, D); got {type(matrix).__name__}; "
            "torch.as_tensor makes one"
        )
    if not matrix.is_floating_point() or matrix.ndim < 2:
        raise (ValueError if matrix.is_floating_point() else TypeError)(
            f"matrix must be floating point, (..., N, D); got {matrix.dtype}, {tuple(matrix.shape)}"
        )
    K = min(matrix.shape[-2:])
    wanted = f"rank must be an integer from 1 to {K} for a {matrix.shape[-2]}×{matrix.shape[-1]} matrix"
    check(wanted, rank, is_whole(rank), lambda rank: 1 <= rank <= K)
    return int(rank)
