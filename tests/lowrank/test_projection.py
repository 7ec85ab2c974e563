"""project() against the singular value decomposition in float64, written out here."""

import numpy as np
import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpet import project
from lrpet.lowrank.follow import follow_basis
from lrpet.lowrank.projection import (
    gram_matrices,
    leading_basis,
    project_and_measure,
    project_on_basis_,
    truncated_svd,
)

SHAPES = {
    "wide": (8, 27),
    "tall": (40, 9),
    "square": (12, 12),
    "row": (1, 9),
    "batch": (3, 16, 36),
    "batches": (2, 3, 20, 7),
}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def oracle(matrix, rank, *, energy_transfer=True, row_scale=None, keep_share=0.0, row_eps=1e-5):
    M = matrix.double()
    if rank == min(M.shape[-2:]):
        return M
    a = torch.ones(M.shape[:-1]).to(M) if row_scale is None else row_scale.double()
    U, s, Vh = torch.linalg.svd(a[..., None] * M, full_matrices=False)
    kept, removed = s[..., :rank].square().sum(-1), s[..., rank:].square().sum(-1)
    f = (
        ((kept + (1 - keep_share**2) * removed) / kept).sqrt().nan_to_num(1.0)
        if energy_transfer
        else torch.ones_like(kept)
    )
    new = torch.cat([f[..., None] * s[..., :rank], keep_share * s[..., rank:]], dim=-1)
    projected = (U * new[..., None, :]) @ Vh
    return projected if row_scale is None else (a / (a**2 + row_eps)).nan_to_num(0.0)[..., None] * projected


def scales(shape):
    """Row scales from 0.001 to 10, some negative."""
    return 10 ** torch.empty(shape[:-1]).uniform_(-3, 1) * torch.randn(shape[:-1]).sign()


def middle_rank(shape):
    return max(1, min(shape[-2:]) // 2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("energy_transfer", [True, False])
@pytest.mark.parametrize("keep_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("row_eps", [None, 1e-5, 1e-8, 0.0])
def test_project_agrees_with_the_full_svd(shape, energy_transfer, keep_share, row_eps):
    M = torch.randn(shape)
    options = {"energy_transfer": energy_transfer, "keep_share": keep_share}
    if row_eps is not None:
        options |= {"row_scale": scales(shape), "row_eps": row_eps}
    for rank in {1, middle_rank(shape), min(shape[-2:])}:
        result = project(M, rank, **options)
        assert result.shape == M.shape
        assert relative_error(result, oracle(M, rank, **options)) < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), N=st.integers(1, 24), D=st.integers(1, 24), batch=st.lists(st.integers(1, 3), max_size=2)
)
def test_project_agrees_with_the_full_svd_for_any_shape(data, N, D, batch):
    shape = (*batch, N, D)
    rank = data.draw(st.integers(1, min(N, D)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    M = torch.randn(shape)
    options = {"energy_transfer": data.draw(st.booleans()), "keep_share": data.draw(st.floats(0, 1))}
    if data.draw(st.booleans()):
        options |= {"row_scale": scales(shape), "row_eps": data.draw(st.floats(0, 1e-3))}
    assert relative_error(project(M, rank, **options), oracle(M, rank, **options)) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dtype_and_device_are_kept_and_the_result_is_as_close_as_the_dtype_allows(
    device, dtype, scaled, shape
):
    M = torch.randn(shape, device=device).to(dtype)
    row_scale = scales(shape).to(device) if scaled else None
    result = project(M, middle_rank(shape), row_scale=row_scale)
    assert (result.dtype, result.device) == (M.dtype, M.device)
    tolerance = 1e-9 if dtype == torch.float64 else max(1e-5, torch.finfo(dtype).eps)
    assert relative_error(result, oracle(M, middle_rank(shape), row_scale=row_scale)) < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 exists on CUDA GPUs only")
def test_tf32_does_not_reach_into_the_projection(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    M = torch.randn(4, 64, 576, device="cuda")
    assert relative_error(project(M, 27), oracle(M, 27)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_autocast_does_not_reach_into_the_projection(shape):
    M, a = torch.randn(shape), scales(shape)
    expected = project(M, middle_rank(shape), row_scale=a)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project(M, middle_rank(shape), row_scale=a), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"energy_transfer": False}, {"keep_share": 0.3}, {"row_scale": True}], ids=str
)
def test_full_rank_returns_a_copy_bit_for_bit(shape, options):
    M = torch.randn(shape)
    if "row_scale" in options:
        options = {"row_scale": scales(shape)}
    result = project(M, min(shape[-2:]), **options)
    assert torch.equal(result, M)
    assert result.data_ptr() != M.data_ptr()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_result_has_rank_r(shape):
    rank = middle_rank(shape)
    s = torch.linalg.svdvals(project(torch.randn(shape), rank, row_scale=scales(shape)).double())
    assert (s[..., rank:] < 1e-5 * s[..., :1]).all()
    assert (s[..., rank - 1] > 0).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("keep_share", [0.0, 0.3])
def test_energy_transfer_keeps_the_energy(shape, keep_share):
    M = torch.randn(shape)
    before, after = (
        M.square().sum((-2, -1)),
        project(M, middle_rank(shape), keep_share=keep_share).square().sum((-2, -1)),
    )
    assert torch.allclose(after, before, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_energy_transfer_keeps_the_energy_behind_batchnorm(shape):
    M, a = torch.randn(shape), scales(shape)
    projected = project(M, middle_rank(shape), row_scale=a, row_eps=0.0)
    before, after = ((a[..., None] * matrix).double().square().sum((-2, -1)) for matrix in (M, projected))
    assert torch.allclose(after, before, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("energy_transfer", [True, False])
def test_a_second_projection_changes_nothing(shape, energy_transfer):
    once = project(torch.randn(shape), middle_rank(shape), energy_transfer=energy_transfer)
    assert relative_error(project(once, middle_rank(shape), energy_transfer=energy_transfer), once) < 1e-5


@pytest.mark.parametrize("shape", [(30, 10), (10, 30)])
@pytest.mark.parametrize("rank", [2, 5])
def test_a_matrix_of_lower_rank_comes_back_unchanged(shape, rank):
    M = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    assert relative_error(project(M, rank), M) < 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("row_scale", [False, True])
def test_zero_stays_zero(shape, row_scale):
    zero = torch.zeros(shape)
    assert torch.equal(
        project(zero, middle_rank(shape), row_scale=scales(shape) if row_scale else None), zero
    )


def test_a_zero_matrix_does_not_disturb_the_rest_of_its_batch():
    M = torch.randn(3, 8, 20)
    M[1] = 0
    assert relative_error(project(M, 3), oracle(M, 3)) < 1e-5


@pytest.mark.parametrize("shape", [(8, 27), (40, 9)])
@pytest.mark.parametrize("row_eps", [1e-5, 0.0])
def test_rows_that_batchnorm_scales_to_zero_become_zero(shape, row_eps):
    M, a = torch.randn(shape), scales(shape)
    a[::3] = 0
    result = project(M, 3, row_scale=a, row_eps=row_eps)
    assert not result[::3].any()
    assert relative_error(result, oracle(M, 3, row_scale=a, row_eps=row_eps)) < 1e-5


@pytest.mark.parametrize(("scale", "shrinks_to"), [(0.01, 0.909), (0.001, 0.0909)])
def test_the_authors_constant_shrinks_rows_of_small_scale_as_documented(scale, shrinks_to):
    M = torch.randn(8, 1) @ torch.randn(1, 27)  # rank 1, so that nothing but the scale changes it
    a = torch.full((8,), scale)
    ratio = project(M, 1, row_scale=a, row_eps=1e-5) / M
    assert torch.allclose(ratio, torch.full_like(M, shrinks_to), rtol=1e-3)


def test_result_is_not_connected_to_autograd_and_the_input_is_untouched():
    M, a = torch.randn(8, 27, requires_grad=True), torch.rand(8, requires_grad=True)
    before = M.detach().clone()
    for rank in (3, 8):
        result = project(M, rank, row_scale=a)
        assert not result.requires_grad
        assert result.grad_fn is None
    assert torch.equal(M, before)
    assert M.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True, "2", None])
def test_bad_rank_is_refused(rank):
    with pytest.raises(
        ValueError if type(rank) is int else TypeError, match="rank must be an integer from 1 to 8"
    ):
        project(torch.randn(8, 27), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", [3, 8])
def test_values_that_are_not_finite_are_refused(value, rank):
    M, a = torch.randn(2, 8, 27), torch.ones(2, 8)
    M[1, 2, 3] = value
    with pytest.raises(ValueError, match="matrix holds NaN or infinite values"):
        project(M, rank)
    a[0, 5] = value
    with pytest.raises(ValueError, match="row_scale holds NaN or infinite values"):
        project(torch.randn(2, 8, 27), rank, row_scale=a)


@pytest.mark.parametrize("shape", [(27,), (8, 1), (1, 8), (2, 8), ()])
def test_row_scale_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"row_scale must have one value per row, \(8,\)"):
        project(torch.randn(8, 27), 3, row_scale=torch.ones(shape))


@pytest.mark.parametrize("name", ["keep_share", "row_eps"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_bad_keep_share_and_row_eps_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} .*got {value}"):
        project(torch.randn(8, 27), 3, **{name: value})


def test_a_keep_share_above_one_is_refused():
    with pytest.raises(ValueError, match="keep_share .* 0 to 1"):
        project(torch.randn(8, 27), 3, keep_share=1.1)


@pytest.mark.parametrize(
    "matrix", [torch.ones(8, 27, dtype=torch.int32), torch.randn(8), torch.randn(8, 27).to(torch.complex64)]
)
def test_anything_but_floating_point_matrices_is_refused(matrix):
    with pytest.raises(
        ValueError if matrix.is_floating_point() else TypeError, match="matrix must be floating"
    ):
        project(matrix, 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_measured_share_is_that_of_the_kept_singular_values(shape):
    M, a = torch.randn(shape), scales(shape)
    rank = middle_rank(shape)
    energies = torch.linalg.svdvals(a[..., None].double() * M).square()
    share = project_and_measure(M, rank, row_scale=a)[1]
    assert torch.allclose(share, energies[..., :rank].sum(-1) / energies.sum(-1), rtol=1e-9)
    assert torch.equal(
        project_and_measure(torch.zeros(shape), rank)[1], torch.ones(shape[:-2], dtype=torch.float64)
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_truncated_svd_gives_the_leading_triplets(shape):
    M, rank = torch.randn(shape), middle_rank(shape)
    U, s, Vh = truncated_svd(M, rank)
    assert (U.shape, s.shape, Vh.shape) == (
        (*shape[:-1], rank),
        (*shape[:-2], rank),
        (*shape[:-2], rank, shape[-1]),
    )
    assert torch.allclose(s, torch.linalg.svdvals(M.double())[..., :rank])
    eye = torch.eye(rank, dtype=torch.float64).expand(*shape[:-2], rank, rank)
    assert torch.allclose(U.mT @ U, eye)
    assert torch.allclose(Vh @ Vh.mT, eye)
    assert (
        relative_error(
            (U * s[..., None, :]) @ Vh,
            oracle(M, rank, energy_transfer=False) if rank < min(shape[-2:]) else M,
        )
        < 1e-9
    )


def failing(count, calls, real):
    """Fail ``count`` times, then do what ``real`` does."""

    def call(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) <= count:
            raise torch.linalg.LinAlgError("did not converge")
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 12, 12)])
@pytest.mark.parametrize("failures", [["eigh"], ["eigh", "svd"]], ids=["svd", "numpy"])
def test_where_eigh_does_not_converge_the_next_way_gives_the_same_and_it_is_logged(
    shape, failures, monkeypatch, caplog
):
    M, a = torch.randn(shape), scales(shape)
    expected, triplets = oracle(M, 4, row_scale=a), truncated_svd(M, 4)
    for name in failures:
        monkeypatch.setattr(torch.linalg, name, failing(99, [], None))
    result = project(M, 4, row_scale=a)
    assert [record.name for record in caplog.records] == ["lrpet"] * len(failures)
    assert [record.getMessage().split(" failed")[0] for record in caplog.records] == [
        f"torch.linalg.{name}" for name in failures
    ]
    assert "cpu matrices" in caplog.text and "12, 12): did not converge" in caplog.text
    assert torch.allclose(truncated_svd(M, 4)[1], triplets[1])
    monkeypatch.undo()
    assert relative_error(result, expected) < 1e-5


def test_where_nothing_converges_the_error_says_what_was_tried(monkeypatch):
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, failing(99, [], None))
    monkeypatch.setattr(np.linalg, "eigh", lambda _: (_ for _ in ()).throw(np.linalg.LinAlgError("nor here")))
    with pytest.raises(
        torch.linalg.LinAlgError,
        match="none of torch.linalg.eigh, torch.linalg.svd, numpy.linalg.eigh on the CPU converged",
    ):
        project(torch.randn(8, 20), 3)


def with_spectrum(shape, s):
    """A matrix of each shape with the singular values s, and its singular vectors on the shorter side."""
    N, D = shape
    U, V = (
        torch.linalg.qr(torch.randn(N, len(s)).double()).Q,
        torch.linalg.qr(torch.randn(D, len(s)).double()).Q,
    )
    return (U * s) @ V.mT, U if N <= D else V


def held_and_removed(A, Q, rank):
    """Norm of what Q removes from A, and the smallest that any Q of R columns can leave."""
    A = A.double() if A.shape[0] <= A.shape[1] else A.double().mT
    return torch.linalg.vector_norm(A - Q @ (Q.mT @ A)), torch.linalg.vector_norm(
        torch.linalg.svdvals(A)[rank:]
    )


def on_basis(M, basis):
    project_on_basis_(M[None], basis)
    return M


SPECTRA = {
    "after a projection and a few steps": torch.cat(
        [torch.linspace(5, 1, 10), torch.linspace(0.2, 0.01, 14)]
    ),
    "removed nearly nothing": torch.cat([torch.linspace(5, 1, 10), torch.linspace(1e-4, 1e-5, 14)]),
    "no gap": torch.linspace(5, 0.1, 24),
    "all equal": torch.ones(24),
    "a cluster across the cut": torch.cat([torch.linspace(5, 2, 8), torch.ones(4), torch.full((12,), 0.1)]),
    "rank below R": torch.cat([torch.linspace(5, 1, 6), torch.zeros(18)]),
    "rank R": torch.cat([torch.linspace(5, 1, 10), torch.zeros(14)]),
    "one large": torch.cat([torch.tensor([1e3]), torch.full((9,), 0.3), torch.full((14,), 0.01)]),
    "zero": torch.zeros(24),
}


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=str)
@pytest.mark.parametrize("start", ["near", "far", "wrong", "zero"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_followed_basis_is_optimal_wherever_it_says_so(shape, start, spectrum):
    s = SPECTRA[spectrum].double()
    M, vectors = with_spectrum(shape, s)
    near = vectors[:, :10] + {"near": 0.01, "far": 0.1}.get(start, 0) * torch.randn(24, 10)
    begin = {"wrong": vectors[:, 10:20], "zero": torch.zeros(24, 10)}.get(start, near)
    basis, certain = follow_basis(gram_matrices(M.float()[None], rounded=True), begin.double()[None])
    well_posed = spectrum in ("after a projection and a few steps", "removed nearly nothing", "rank R")
    if (
        start in ("near", "far") or not well_posed
    ):  # from a wrong start, what is rounded may lead to the right end, or not
        assert bool(certain) == well_posed
    if certain:
        removed, smallest = held_and_removed(M.float(), basis.vectors[0], 10)
        assert removed <= smallest * (1 + 1e-5) + 1e-6 * torch.linalg.vector_norm(M)
        exact = leading_basis(gram_matrices(M.float()[None]), 10)
        assert torch.allclose(basis.kept, exact.kept, rtol=1e-6)
        assert torch.allclose(basis.energy, exact.energy, rtol=1e-6)
        assert relative_error(on_basis(M.float(), basis), project(M.float(), 10)) < 1e-5


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    K=st.integers(2, 20),
    seed=st.integers(0, 999),
    decay=st.floats(0.01, 3),
    noise=st.floats(0, 1),
    gap=st.floats(0.001, 1),
)
def test_certainty_is_never_misplaced(data, K, seed, decay, noise, gap):
    torch.manual_seed(seed)
    rank = data.draw(st.integers(1, K - 1))
    s = torch.exp(-decay * torch.arange(K)).double()
    s[rank:] *= gap
    M, vectors = with_spectrum((K, 2 * K), s)
    start = vectors[
        :, torch.randperm(K)[:rank] if data.draw(st.booleans()) else slice(rank)
    ] + noise * torch.randn(K, rank)
    basis, certain = follow_basis(gram_matrices(M.float()[None], rounded=True), start[None])
    if certain:
        removed, smallest = held_and_removed(M.float(), basis.vectors[0], rank)
        assert removed <= smallest * (1 + 1e-5) + 1e-6 * torch.linalg.vector_norm(M)
        assert relative_error(on_basis(M.float(), basis), project(M.float(), rank)) < 1e-5


def test_each_matrix_of_a_batch_is_judged_alone():
    good, vectors = with_spectrum((24, 60), SPECTRA["after a projection and a few steps"].double())
    M = torch.stack([good, torch.zeros(24, 60), torch.randn(24, 60).double(), good])
    assert follow_basis(gram_matrices(M), vectors[:, :10].expand(4, -1, -1))[1].tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_autocast_around_it_does_not_change_a_followed_basis():
    M, vectors = with_spectrum((24, 60), SPECTRA["after a projection and a few steps"].double())
    gram, start = (
        gram_matrices(M.float()[None], rounded=True),
        (vectors[:, :10] + 0.1 * torch.randn(24, 10)).float()[None],
    )
    alone = follow_basis(gram, start)[0].vectors
    with torch.autocast("cpu", torch.bfloat16):
        inside = follow_basis(gram, start)[0].vectors
    assert torch.equal(alone, inside)
