import pytest
import torch

from lrpet import build_model, cost
from lrpet.lowrank.batchnorm import batchnorm_scale
from lrpet.lowrank.budget import ranks_for_budget

SHAPE = (3, 32, 32)


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet56", pytest.param("vgg16", marks=pytest.mark.slow), "ghost_resnet56"]
)
@pytest.mark.parametrize("allocation", ["uniform", "energy"])
@pytest.mark.parametrize("reduction", [0.3, 0.55, 0.8])
def test_budget_is_met_within_one_percent_and_never_exceeded(name, allocation, reduction):
    model = build_model(name)
    counted = cost(model, SHAPE, ranks_for_budget(model, SHAPE, reduction, allocation=allocation))
    budget = (1 - reduction) * counted.dense_macs
    assert 0.99 * budget <= counted.macs <= budget


def test_uniform_ranks_differ_by_rounding_alone_within_a_width():
    model = build_model("resnet56")
    ranks = ranks_for_budget(model, SHAPE, 0.55)
    for width in (16, 32, 64):
        same = [
            rank
            for name, rank in ranks.items()
            if model.get_submodule(name).weight.shape[0] == width and name != "conv"
        ]
        assert max(same) - min(same) <= 1


def test_energy_gives_more_rank_to_the_layer_with_the_flatter_spectrum():
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1))
    U, _, Vh = torch.linalg.svd(torch.randn(16, 144), full_matrices=False)
    with torch.no_grad():
        model[0].weight.copy_((U * torch.logspace(0, -3, 16) @ Vh).reshape(16, 16, 3, 3))
        model[1].weight.copy_((U @ Vh).reshape(16, 16, 3, 3))
    ranks = ranks_for_budget(model, (16, 8, 8), 0.5, allocation="energy")
    assert ranks["1"] > ranks["0"]


def test_energy_keeps_at_least_as_much_as_uniform_by_its_own_measure():
    torch.manual_seed(0)
    model = build_model("resnet20")
    modules = dict(model.named_modules())
    pairs = {"conv": "bn"} | {f"blocks.{i}.conv{j}": f"blocks.{i}.bn{j}" for i in range(9) for j in (1, 2)}

    def kept(ranks):
        total = 0.0
        for name, rank in ranks.items():
            M = batchnorm_scale(modules[pairs[name]])[0].unsqueeze(1) * modules[name].weight.detach().flatten(
                1
            )
            energies = torch.linalg.svdvals(M).square()
            total += float(energies[:rank].sum() / energies.sum())
        return total

    uniform, greedy = (ranks_for_budget(model, SHAPE, 0.6, allocation=how) for how in ("uniform", "energy"))
    assert kept(greedy) >= kept(uniform)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"macs_reduction": 0.0}, "macs_reduction"),
        ({"macs_reduction": 1.0}, "macs_reduction"),
        ({"macs_reduction": 0.999}, "rank 1"),
        ({"allocation": "best"}, "allocation"),
    ],
)
def test_refusals_name_the_argument(arguments, word):
    with pytest.raises(ValueError, match=word):
        ranks_for_budget(build_model("resnet20"), SHAPE, **arguments)


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_a_convolution_of_one_output_has_rank_one(allocation):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.Conv2d(16, 1, 3, padding=1))
    ranks = ranks_for_budget(model, (8, 8, 8), 0.5, allocation=allocation)
    assert ranks["1"] == 1 and ranks["0"] > 1
    cost(model, (8, 8, 8), ranks)


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_aligned_ranks_are_multiples_or_dense_and_within_the_budget(allocation):
    model = build_model("resnet20")
    ranks = ranks_for_budget(model, SHAPE, 0.3, allocation=allocation, multiple_of=16)
    counted = cost(model, SHAPE, ranks)
    assert counted.macs <= 0.7 * counted.dense_macs
    full = {name: min(model.get_submodule(name).weight.flatten(1).shape) for name in ranks}
    assert all(rank % 16 == 0 or rank == full[name] for name, rank in ranks.items())
    assert any(rank < full[name] for name, rank in ranks.items())


def test_a_budget_below_the_lowest_multiples_is_refused_with_what_they_save():
    with pytest.raises(ValueError, match="the lowest multiple of 16 saves 0.3"):
        ranks_for_budget(build_model("resnet20"), SHAPE, 0.55, multiple_of=16)
    with pytest.raises(ValueError, match="multiple_of"):
        ranks_for_budget(build_model("resnet20"), SHAPE, 0.3, multiple_of=0)
