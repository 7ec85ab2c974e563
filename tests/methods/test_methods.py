import json
import sys

import pytest
import torch
from helpers import Zoo, randomize_batchnorms
from torch import nn

from lrpet import RunConfig, build_model, cost, factorize, project, ranks_from_ratio
from lrpet.config import METHODS
from lrpet.lowrank.batchnorm import batchnorm_scale
from lrpet.methods import make_method
from lrpet.methods.base import build_network, target_macs
from lrpet.methods.filter_pruning import keep_filters, weakest_last
from lrpet.training.recipes import make_optimizer
from lrpet.training.recording import weight_matrices


def projected_at(steps, last, **fields):
    method = make_method(build_model("resnet8"), RunConfig(method="lrpet", **fields))
    return [step for step in range(1, last + 1) if method.after_step(step, steps, step == last) is not None]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, [5, 10, 15, 20]),
        ({"projection_interval": 2}, [10, 20]),
        ({"projection_interval": 3}, [15, 20]),  # the last step always
        ({"projection_unit": "iteration", "projection_interval": 7}, [7, 14, 20]),
        ({"projection_unit": "iteration", "projection_interval": 100}, [20]),
    ],
)
def test_projections_follow_the_schedule_and_end_the_training(fields, steps):
    assert projected_at(steps=5, last=20, **fields) == steps


def test_dense_never_acts_and_deploys_the_model_itself():
    model = build_model("resnet8")
    method = make_method(model, RunConfig(method="dense"))
    assert method.after_step(20, 20, True) is None
    assert method.compact() is model
    assert method.ranks == {}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"method": "lrpet"}, {}),
        ({"method": "lrp"}, {"energy_transfer": False}),
        ({"method": "lrpet", "residual": 0.3, "row_eps": 1e-3}, {"keep_share": 0.3, "row_eps": 1e-3}),
    ],
)
@pytest.mark.parametrize("rectified", [True, False])
def test_configured_settings_reach_the_projection(fields, options, rectified):
    model = randomize_batchnorms(build_model("resnet8"))
    M = model.conv.weight.detach().clone().flatten(1)
    make_method(model, RunConfig(prune_ratio=0.57, bn_rectification=rectified, **fields)).after_step(
        1, 1, True
    )
    a = batchnorm_scale(model.bn).flatten() if rectified else None
    assert torch.allclose(model.conv.weight.flatten(1), project(M, 6, row_scale=a, **options), atol=1e-5)


def test_given_ranks_are_used_as_list_and_as_map():
    model = Zoo()
    assert make_method(model, RunConfig(ranks=[1, 2, 3, 4, 5])).ranks == {
        "square": 1,
        "pointwise": 2,
        "tall": 3,
        "column": 4,
        "dilated": 5,
    }
    assert make_method(model, RunConfig(ranks={"tall": 3})).ranks == {"tall": 3}
    with pytest.raises(ValueError, match="rank of layer 'tall' .* got 99"):
        make_method(model, RunConfig(ranks={"tall": 99}))


def test_the_compact_network_is_the_factorized_one():
    model = build_model("resnet8").eval()
    method = make_method(model, RunConfig(prune_ratio=0.57))
    method.after_step(1, 1, True)
    compact = method.compact()
    assert [tuple(p.shape) for p in compact.parameters()] == [
        tuple(p.shape) for p in factorize(model, method.ranks).parameters()
    ]


# ---------------------------------------------------------------- what LRPET is compared with

COMPETITORS = [name for name in METHODS if name not in ("dense", "lrp", "lrpet")]
SHAPE = (3, 8, 8)


def logits(model, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.eval()(torch.randn(4, *SHAPE))


@pytest.mark.parametrize("method", [name for name in COMPETITORS if name != "trp"])
@pytest.mark.parametrize("model", ["resnet20", "vgg16"])
def test_multiply_adds_are_those_of_the_low_rank_network_within_two_percent(method, model):
    config = RunConfig(dataset="cifar10", model=model, method=method, prune_ratio=0.57)
    target = target_macs(build_model(model), config)
    trained = make_method(build_network(config), config)
    trained.begin_epoch(config.pretrain_epochs or 0)
    assert abs(cost(trained.compact(), (3, 32, 32)).macs / target - 1) < 0.02


@pytest.mark.parametrize("method", ["svd_finetune", "factorized", "warmup_switch", "svd_training"])
def test_the_network_becomes_its_truncated_self_when_the_dense_epochs_are_over(method):
    config = RunConfig(method=method, prune_ratio=0.57)
    model = randomize_batchnorms(build_model("resnet8"))
    expected = logits(
        factorize(
            model,
            {
                name: 6 if K == 16 else 13 if K == 32 else 27
                for name, K in ranks_from_ratio(model, 0.0).items()
            },
        )
    )
    trained = make_method(model, config)
    first = config.pretrain_epochs or 0
    assert not any(trained.begin_epoch(epoch) for epoch in range(first))
    assert trained.begin_epoch(first)
    assert not trained.begin_epoch(first + 1)
    assert torch.allclose(logits(trained.model), expected, atol=1e-4)
    assert trained.compact() is trained.model


@pytest.mark.parametrize("method", [name for name in METHODS if name != "trp"])  # whose tensors are no JSON
def test_a_structure_is_rebuilt_from_what_json_keeps(method):
    config = RunConfig(method=method, prune_ratio=0.57)
    trained = make_method(build_network(config), config)
    trained.begin_epoch(config.pretrain_epochs or 0)
    again = make_method(build_network(config), config)
    again.restore(json.loads(json.dumps(trained.structure)))
    again.model.load_state_dict(trained.model.state_dict())
    assert torch.equal(logits(again.model), logits(trained.model))
    assert again.structure == trained.structure
    assert not again.begin_epoch(config.pretrain_epochs or 0) or trained.structure is None


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def zero_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def test_decay_on_the_product_is_the_gradient_of_its_norm():
    config = RunConfig(method="factorized", prune_ratio=0.57, weight_decay=0.01)
    trained = make_method(build_model("resnet8"), config)
    trained.begin_epoch(0)
    zero_gradients(trained.model)
    trained.regularize()
    added = gradients(trained.model)
    zero_gradients(trained.model)
    pairs = {name: trained.model.get_submodule(name) for name in trained.ranks}
    sum(
        0.005 * (pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)).square().sum()
        for pair in pairs.values()
    ).backward()
    expected = gradients(trained.model)
    assert max(v.abs().max() for v in expected.values()) > 1e-3
    assert all(torch.allclose(added[name], expected[name], atol=1e-7) for name in expected)
    optimizer = make_optimizer(config, trained.model, torch.device("cpu"), trained.undecayed)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(factor.weight)] for pair in pairs.values() for factor in pair} == {0.0}
    assert decay[id(trained.model.fc.weight)] == 0.01


@pytest.mark.parametrize("product_decay", [True, False])
def test_both_factors_of_a_layer_take_the_decay_of_weights_that_a_batchnorm_follows(product_decay):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    config = RunConfig(
        method="factorized",
        ranks=[2, 2],
        weight_decay=0.1,
        normalized_weight_decay=0.5,
        product_decay=product_decay,
    )
    trained = make_method(model, config)
    trained.begin_epoch(0)
    optimizer = make_optimizer(config, trained.model, torch.device("cpu"), trained.undecayed)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    followed, alone = ({decay[id(factor.weight)] for factor in trained.model[i]} for i in (0, 2))
    assert (followed, alone) == (({0.0}, {0.0}) if product_decay else ({0.5}, {0.1}))
    assert {
        decay[id(p)] for p in (trained.model[0][1].bias, trained.model[1].weight, trained.model[4].weight)
    } == {0.1}
    if product_decay:
        zero_gradients(trained.model)
        trained.regularize()
        for i, strength in ((0, 0.5), (2, 0.1)):
            V, U = (factor.weight.detach().flatten(1) for factor in trained.model[i])
            assert torch.allclose(
                trained.model[i][1].weight.grad.flatten(1), strength * U @ V @ V.mT, atol=1e-7
            )


def test_decay_on_each_factor_leaves_the_optimizer_as_it_is():
    trained = make_method(
        build_model("resnet8"), RunConfig(method="factorized", prune_ratio=0.57, product_decay=False)
    )
    trained.begin_epoch(0)
    zero_gradients(trained.model)
    trained.regularize()
    assert trained.undecayed == ()
    assert not any(g.any() for g in gradients(trained.model).values())


@pytest.mark.parametrize("threshold", [0.02, 0.3, 0.9])
def test_trp_cuts_to_the_smallest_rank_that_keeps_the_energy(threshold):
    model = build_model("resnet8")
    before = {name: torch.linalg.svdvals(M.detach().double()) for name, M in weight_matrices(model).items()}
    trained = make_method(model, RunConfig(method="trp", energy_threshold=threshold))
    assert trained.after_step(19, 100, False) is None
    reports = trained.after_step(20, 100, False)
    for report in reports:
        s = before[report.name]
        share = s.square().cumsum(0) / s.square().sum()
        assert share[report.rank - 1] >= 1 - threshold - 1e-9
        assert report.rank == 1 or share[report.rank - 2] < 1 - threshold + 1e-9
        assert report.energy_kept == pytest.approx(float(share[report.rank - 1]), abs=1e-6)
        after = torch.linalg.svdvals(model.get_submodule(report.name).weight.detach().flatten(1).double())
        assert torch.allclose(after[: report.rank], s[: report.rank], atol=1e-4)
        assert report.rank == len(s) or after[report.rank] < 1e-5
    compact = trained.compact()
    assert torch.allclose(logits(compact), logits(model), atol=1e-4)
    assert all(
        layer.note == "" for layer in cost(model, SHAPE, trained.ranks).layers
    )  # no factors that cost more than the layer


def test_trp_adds_the_subgradient_of_the_nuclear_norm():
    model = build_model("resnet8")
    trained = make_method(model, RunConfig(method="trp", nuclear_norm=0.5))
    zero_gradients(model)
    trained.regularize()
    assert not model.conv.weight.grad.any()  # before the first cut there is none
    trained.after_step(20, 100, False)
    trained.regularize()
    M = model.conv.weight.detach().flatten(1).double().requires_grad_()
    R = int(torch.linalg.matrix_rank(M, rtol=1e-5))
    U, _, Vh = torch.linalg.svd(M.detach(), full_matrices=False)
    assert torch.allclose(model.conv.weight.grad.flatten(1).double(), 0.5 * U[:, :R] @ Vh[:R], atol=1e-5)
    plain = make_method(build_model("resnet8"), RunConfig(method="trp", nuclear_norm=0.0))
    plain.after_step(20, 100, False)
    assert plain.subgradients == {}


def test_the_stable_rank_decides_against_its_value_at_the_start():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False))
    config = RunConfig(method="warmup_switch", rank_rule="stable_rank", pretrain_epochs=1)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16, 144).view(16, 16, 3, 3))  # stable rank 16 of 16
    trained = make_method(model, config)
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([2.0] + [1.0] * 15).view(16, 1, 1, 1))  # (4 + 15) / 4 = 4.75
    trained.begin_epoch(1)
    assert trained.ranks == {"0": 5}


def test_svd_training_starts_as_the_network_it_replaces_and_its_penalties_are_the_stated_ones():
    model = randomize_batchnorms(build_model("resnet8"))
    expected = logits(model)
    config = RunConfig(method="svd_training", prune_ratio=0.57, orthogonality=2.0, sparsity=0.5)
    trained = make_method(model, config)
    assert torch.allclose(logits(trained.model), expected, atol=1e-4)
    assert trained.model.conv.parametrizations.weight.original1.requires_grad
    triplet = trained.model.conv.parametrizations.weight
    with torch.no_grad():
        triplet.original0.mul_(1.1)  # no longer orthogonal
    zero_gradients(trained.model)
    trained.regularize()
    U, s = (p.detach().clone().requires_grad_() for p in (triplet.original0, triplet.original1))
    (
        2.0 * (U.mT @ U - torch.eye(16)).square().sum() / 256 + 0.5 * s.abs().sum() ** 2 / s.square().sum()
    ).backward()
    assert torch.allclose(triplet.original0.grad, U.grad, atol=1e-6)
    assert torch.allclose(triplet.original1.grad, s.grad, atol=1e-6)
    assert U.grad.abs().max() > 1e-3
    trained.begin_epoch(config.pretrain_epochs)
    trained.regularize()  # nothing is left to penalize


def test_the_filters_of_smallest_norm_go_and_only_where_no_shortcut_shares_them():
    model = build_model("resnet8")
    with torch.no_grad():
        for block in model.blocks:
            block.conv1.weight[::2] *= 1e-3
    norms = {
        name: model.get_submodule(name).weight.detach().abs().sum(dim=(1, 2, 3))
        for name in weakest_last(model, SHAPE)
    }
    assert set(norms) == {f"blocks.{i}.conv1" for i in range(3)}
    config = RunConfig(method="filter_pruning", prune_ratio=0.57)
    trained = make_method(model, config)
    weights = model.blocks[0].conv1.weight.detach().clone()
    assert trained.begin_epoch(config.pretrain_epochs)
    for name, kept in trained.structure.items():
        gone = sorted(set(range(len(norms[name]))) - set(kept))
        assert norms[name][kept].min() >= norms[name][gone].max()
    assert torch.equal(trained.model.blocks[0].conv1.weight, weights[trained.structure["blocks.0.conv1"]])
    assert trained.model.blocks[0].conv2.in_channels == len(trained.structure["blocks.0.conv1"])
    assert trained.model.blocks[0].conv2.out_channels == 16


def test_pruned_filters_that_did_nothing_are_not_missed():
    model = randomize_batchnorms(build_model("resnet8"))
    with torch.no_grad():
        model.blocks[1].conv1.weight[5:9] = 0
        model.blocks[1].bn1.weight[5:9] = 0
        model.blocks[1].bn1.bias[5:9] = 0
    kept = {"blocks.1.conv1": [i for i in range(32) if not 5 <= i < 9]}
    assert torch.allclose(logits(keep_filters(model, kept, SHAPE)), logits(model), atol=1e-5)


def test_a_missing_package_is_an_import_error_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="Torch-Pruning, which is not installed; run: pip install"):
        weakest_last(build_model("resnet8"), SHAPE)


def test_a_network_without_filters_to_prune_is_refused():
    with pytest.raises(ValueError, match="no convolution whose filters can go alone"):
        weakest_last(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)), SHAPE)


def test_projections_of_a_trained_network_begin_after_its_dense_epochs():
    assert projected_at(steps=1, last=20, pretrain_epochs=15) == [15, 16, 17, 18, 19, 20]


def test_the_other_unfolding_and_aligned_ranks_reach_projection_and_deployment():
    torch.manual_seed(0)
    model = build_model("resnet8").eval()
    config = RunConfig(prune_ratio=0.57, multiple_of=8, unfolding={"blocks.*": "columns"})
    method = make_method(model, config)
    assert (
        set(method.ranks.values()) <= {8, 16, 24, 32, 40, 48, 56, 64} and method.ranks["blocks.1.conv1"] == 8
    )
    reports = method.after_step(20, 20, last=True)
    assert {report.action for report in reports} == {"projected"}
    compact = method.compact()
    assert compact.blocks[1].conv1[0].kernel_size == (1, 1)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compact(x), model(x), rtol=1e-4, atol=1e-5)
    counted = cost(build_model("resnet8"), (3, 8, 8), method.ranks, unfolding=config.unfolding)
    assert counted.macs == cost(compact, (3, 8, 8)).macs
