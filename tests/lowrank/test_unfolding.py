"""The other unfolding, N·k² × C: a 1×1 layer, then the k×k one."""

import pytest
import torch
from torch import nn

from lrpet import (
    Compressor,
    LowRankProjector,
    build_model,
    cost,
    factorize,
    fold_batchnorm,
    load_compact,
    project,
    ranks_for_budget,
    ranks_from_ratio,
    save_compact,
    select,
)
from lrpet.lowrank import batchnorm_scale
from lrpet.lowrank.layers import matrix_of, resolve_unfolding

SHAPE = (3, 32, 32)
KINDS = {
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "reflected": nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="reflect", bias=False),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2, padding="same"),
    "1d": nn.Conv1d(6, 8, 3, padding=1),
    "3d": nn.Conv3d(6, 8, 3, padding=1),
    "transposed": nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
}


def trained(model):
    """Return a model whose BatchNorms scale unevenly, as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 2.0, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.running_mean.normal_(generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval()


def apart(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_every_kind_of_convolution_compute_what_was_projected(kind):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind])
    LowRankProjector(model, {"0": 3}, unfolding="columns").step()
    compact = factorize(model, {"0": 3}, unfolding={"0": "columns"})
    x = torch.randn(2, 6, *[9] * len(model[0].kernel_size))
    assert apart(model(x), compact(x)) < 1e-5
    first, second = compact[0]
    assert set(first.kernel_size) == {1} and second.kernel_size == model[0].kernel_size
    assert compact[0].rank == 3 and compact[0].kernel_size == model[0].kernel_size
    assert (compact[0].in_channels, compact[0].out_channels) == (6, 8)
    torch.testing.assert_close(compact[0].weight, model[0].weight, rtol=1e-4, atol=1e-5)
    counted = cost(model, x.shape[1:], {"0": 3}, unfolding="columns")
    real = cost(compact, x.shape[1:])
    assert (counted.macs, counted.params) == (real.macs, real.params)


def test_a_network_is_the_same_projected_factorized_folded_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, x = trained(build_model("resnet20")), torch.randn(4, *SHAPE)
    how = {"unfolding": {"blocks.3.conv1": "columns", "blocks.5.conv2": "columns", "conv": "columns"}}
    ranks = ranks_from_ratio(model, 0.5, **how)
    assert ranks["conv"] == 1  # of the three channels of an image
    LowRankProjector(model, ranks, **how).step()
    compact = factorize(model, ranks, **how)
    assert apart(model(x), compact(x)) < 1e-5
    folded = fold_batchnorm(compact)
    assert len(folded.folded_batchnorms) == 19
    assert apart(model(x), folded(x)) < 1e-4
    counted, real = cost(model, SHAPE, ranks, **how), cost(compact, SHAPE)
    assert (counted.macs, counted.params) == (real.macs, real.params)
    for network in (compact, folded):
        save_compact(network, tmp_path / "net.safetensors")
        again = load_compact(tmp_path / "net.safetensors", build_model("resnet20")).eval()
        assert again.blocks[3].conv1[0].kernel_size == (1, 1)
        assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_projection_is_that_of_the_matrix_with_each_row_scaled_by_its_output(memory_format):
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)))
    model.to(memory_format=memory_format)
    before = matrix_of(model[0], "columns").detach().clone()  # (72, 6): row (n, i, j)
    assert torch.equal(before[9 * 2 + 3 * 1 + 2], model[0].weight[2, :, 1, 2])
    report = LowRankProjector(model, {"0": 2}, unfolding="columns").step()
    a = batchnorm_scale(model[1])[0].repeat_interleave(9)
    expected = project(before, 2, row_scale=a)
    torch.testing.assert_close(matrix_of(model[0], "columns"), expected, rtol=1e-4, atol=1e-6)
    s = torch.linalg.svdvals(a.unsqueeze(1) * before.double()).square()
    assert report[0].energy_kept == pytest.approx(float(s[:2].sum() / s.sum()))
    # energy transfer: that of diag(a)·M stays, except for what row_eps takes
    left = (a.unsqueeze(1) * matrix_of(model[0], "columns").detach().double()).square().sum()
    assert float(left / s.sum()) == pytest.approx(1.0, abs=1e-3)


def test_rows_that_batchnorm_scales_to_nothing_are_undone_exactly():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)))
    with torch.no_grad():
        model[1].weight[3] = 0.0
    report = LowRankProjector(model, {"0": 2}, unfolding="columns").step()
    assert report[0].reason.startswith("9 rows")
    assert int(torch.linalg.matrix_rank(matrix_of(model[0], "columns"), rtol=1e-4)) == 2
    assert model[0].weight[3].abs().max() > 0


def test_layers_without_a_window_are_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2), nn.Flatten(), nn.Linear(32, 10))
    ranks = {"0": 2, "2": 3}
    assert LowRankProjector(model, ranks, unfolding="columns").unfolding == {"0": "rows", "2": "rows"}
    compact = factorize(model, ranks, unfolding="columns")
    assert compact[0][0].stride == (2, 2) and compact.factorization[0].unfolding == "rows"


def test_followed_projections_are_within_tolerance_of_exact_ones():
    torch.manual_seed(0)
    model = trained(build_model("resnet8"))
    twin = trained(build_model("resnet8"))
    twin.load_state_dict(model.state_dict())
    ranks = ranks_from_ratio(model, 0.5, unfolding="columns")
    fast = LowRankProjector(model, ranks, fast=True, unfolding="columns")
    exact = LowRankProjector(twin, ranks, fast=False, unfolding="columns")
    for _ in range(3):
        assert any(layer.action == "projected" for layer in fast.step())
        exact.step()
    for name in ranks:
        a, b = (network.get_submodule(name).weight for network in (model, twin))
        assert ((a - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_budgets_and_plans_know_the_matrix(allocation):
    model = trained(build_model("resnet20"))
    ranks = ranks_for_budget(model, SHAPE, 0.5, allocation=allocation, unfolding="columns")
    counted = cost(model, SHAPE, ranks, unfolding="columns")
    assert 0.49 * counted.dense_macs <= counted.macs <= 0.5 * counted.dense_macs
    plan = select(model, prune_ratio=0.5, unfolding="columns")
    row = next(layer for layer in plan.layers if layer.name == "blocks.3.conv1")
    assert (row.N, row.D, row.rank) == (288, 16, 8)


def test_the_compressor_takes_it_from_projection_to_factors_and_into_its_state():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)))
    x = torch.randn(1, 8, 9, 9)
    compressor = Compressor(model, macs_reduction=0.5, example_inputs=x, unfolding="columns")
    assert compressor.step() is not None
    state = compressor.state_dict()
    Compressor(model, compressor.ranks, unfolding="columns").load_state_dict(state)
    rows = {name: min(rank, 16) for name, rank in compressor.ranks.items()}
    with pytest.raises(ValueError, match="unfolding"):
        Compressor(model, rows).load_state_dict(state)
    compact = compressor.finish()
    assert compact[0][1].kernel_size == (3, 3)
    assert apart(model(x), compact(x)) < 1e-5


def test_a_network_factorized_twice_is_read_through_both():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(6, 8, 3))
    once = factorize(model, {"0": 4}, unfolding="columns")
    twice = factorize(once, {"0.1": 2}, unfolding="columns")
    x = torch.randn(1, 6, 5, 5)
    y = nn.functional.conv_transpose2d(x, twice[0].weight, twice[0].bias)
    torch.testing.assert_close(twice(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("unfolding", "error", "word"),
    [
        ("diagonal", ValueError, "'rows', 'columns'"),
        (1, TypeError, "unfolding must be"),
        ({"0": "diagonal"}, ValueError, "'rows', 'columns'"),
        ({"9": "columns"}, ValueError, "names '9'"),
        ({"*": "columns", "?": "rows"}, ValueError, "two patterns"),
    ],
)
def test_what_is_no_unfolding_is_refused(unfolding, error, word):
    with pytest.raises(error, match=word):
        LowRankProjector(nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": 2}, unfolding=unfolding)


def test_names_count_before_patterns():
    model = build_model("resnet8")
    how = resolve_unfolding(model, {"*": "columns", "conv": "rows"})
    assert how["conv"] == "rows" and how["blocks.0.conv1"] == "columns"


def test_layers_that_share_a_weight_need_one_unfolding():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="same unfolding"):
        factorize(model, {"0": 2, "1": 2}, unfolding={"0": "columns"})
    compact = factorize(model, {"0": 2, "1": 2}, unfolding="columns")
    assert compact[0][1].weight is compact[1][1].weight
