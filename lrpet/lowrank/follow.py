"""Subspace iteration: leading directions of a matrix from those of an earlier one, certified or refused."""

from __future__ import annotations

import torch
from torch import Tensor

from lrpet.lowrank.projection import Basis, thin_dtype, unrounded

__all__ = ["follow_basis"]
RESIDUAL_TOLERANCE = 1e-5  # the removed part is at most this share larger than the smallest possible
RESULT_TOLERANCE = 1e-5  # the result differs from the exact one by at most this share of the weight's norm


@torch.no_grad()
def follow_basis(gram: Tensor, start: Tensor, rounds: int = 4) -> tuple[Basis, Tensor]:
    """Find the leading directions from those of an earlier, similar matrix, and whether to trust them.

    With G the Gram matrix, a round is Q ← orth(G·(G·Q)). In the basis (Q, rest) G is then::

        T = QᵀGQ     W = GQ − QT     c² = ‖G‖² − ‖T‖² − 2‖W‖²     (Frobenius norms)

    If every eigenvalue of T is at least 2c + 1e-5·E (a Cholesky factorization of the difference exists), Q
    spans the *leading* directions except for an angle, and no R directions hold more energy than
    tr T + ‖W‖²/(c + 1e-5·E). That excess is required to be at most 2e-5 of the energy outside Q, so that the
    norm of the removed part is optimal to 1e-5, and so small that the result differs from the exact one by
    less than 1e-5 of the norm of A (1e-6 is taken as rounding).

    Args:
        gram: G, (B, K, K), float64; its entries may be rounded to float32.
        start: (B, K, R), columns that span the earlier leading directions.
        rounds: at most so many for one matrix.

    Returns:
        The basis, and whether it fulfils the two tolerances, (B,) bool. Where it does not (no gap after s_R,
        a rank below R, a matrix unlike the earlier one) call :func:`leading_basis`.

    Source: Golub and Van Loan, Matrix Computations, section 8.2.4, for the iteration; Mathias,
    Quadratic residual bounds for the Hermitian eigenvalue problem (1998), for the bound.

    >>> from lrpet.lowrank import gram_matrices
    >>> A = torch.diag(torch.tensor([4.0, 3.0, 0.1]))
    >>> basis, certain = follow_basis(gram_matrices(A[None]), torch.eye(3)[None, :, :2] + 0.01)
    >>> bool(certain), round(float(basis.kept), 6)
    (True, 25.0)
    """
    G, thin = gram, thin_dtype(start)
    with unrounded(gram):
        Y = (G.to(thin) @ start.to(thin)).to(G.dtype)
    Y = G @ Y  # makes small what the first product rounds
    L = torch.linalg.cholesky_ex(Y.mT @ Y).L
    Q = Y @ torch.linalg.solve_triangular(L, torch.eye(L.shape[-1]).to(L), upper=False).mT
    Y = G @ Q
    T = Q.mT @ Y
    energy, kept = (matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for matrix in (G, T))  # (B,)
    norms = (torch.linalg.vector_norm(matrix, dim=(-2, -1)) for matrix in (G, T, Y - Q @ T))
    size, inside, W = (norm.square() for norm in norms)
    c = (size - inside - 2 * W).clamp(min=0).sqrt()
    floor = 1e-5 * energy  # keeps what float32 rounds off G away from the decision
    shifted = T.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_((2 * c + floor).unsqueeze(-1))
    leading = torch.linalg.cholesky_ex(shifted).info == 0
    allowed = (
        torch.minimum(2 * RESIDUAL_TOLERANCE * (energy - kept), 0.2 * RESULT_TOLERANCE**2 * energy)
        + 1e-12 * energy
    )
    certain = leading & (allowed * (c + floor) >= W)
    again = leading & ~certain  # without a gap more rounds would not help
    if rounds > 1 and again.any():
        (Q[again], kept[again], _), certain[again] = follow_basis(G[again], Q[again], rounds - 1)
    return Basis(Q, kept, energy), certain
