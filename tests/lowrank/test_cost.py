import pytest
import torch
from helpers import ZOO_RANKS, Zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lrpet import build_model, cost, factorize, fold_batchnorm, ranks_from_ratio
from lrpet.models import TORCHVISION
from lrpet.registry import IMAGE_MODELS


def shape_for(name):
    return (3, 64, 64) if name in TORCHVISION else (3, 32, 32)


def counted_by_pytorch(model, input_shape):
    """MACs of one image in convolutions and Linear layers, by PyTorch's counter: two for each multiply-add.

    The products of attention have no weights (they are ``bmm``) and do not count.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.to("meta").eval()(torch.empty(1, *input_shape, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    flops = sum(
        counts.get(op, 0) for op in (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
    )
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("resnet20", 269_722, 40_551_040),
        ("resnet56", 853_018, 125_485_696),
        ("resnet110", 1_727_962, 252_887_680),
    ],
)
def test_cifar_resnets_cost_what_the_literature_says(name, params, macs):
    total = cost(build_model(name), (3, 32, 32))
    assert (total.params, total.dense_params) == (params, params)
    assert (total.macs, total.dense_macs) == (macs, macs)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("resnet18", 11_689_512, 1.81), ("resnet34", 21_797_672, 3.66), ("resnet50", 25_557_032, 4.09)],
)
def test_torchvision_resnets_cost_what_their_documentation_says(name, params, gmacs):
    total = cost(build_model(name, 1000), (3, 224, 224))
    assert total.params == params
    assert round(total.macs / 1e9, 2) == gmacs


@pytest.mark.parametrize(
    ("name", "ratio", "macs", "dense_macs"),
    [("resnet56", 0.57, 56.06, 125.49), ("resnet110", 0.65, 93.78, 252.89)],
)
def test_compressed_cost_is_the_one_of_the_authors(name, ratio, macs, dense_macs):
    model = build_model(name)
    total = cost(model, (3, 32, 32), ranks_from_ratio(model, ratio))
    assert (round(total.macs / 1e6, 2), round(total.dense_macs / 1e6, 2)) == (macs, dense_macs)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_arithmetic_agrees_with_pytorch_dense_and_compact(name):
    model = build_model(name)
    ranks = ranks_from_ratio(model, 0.9, include="*.mlp.*" if name.startswith("vit") else None)
    shape = shape_for(name)
    by_rank = cost(model, shape, ranks)
    compact = factorize(model, ranks)
    assert cost(compact, shape).macs == by_rank.macs
    assert cost(compact, shape).params == by_rank.params == sum(p.numel() for p in compact.parameters())
    assert by_rank.dense_params == sum(p.numel() for p in model.parameters())
    assert by_rank.macs == counted_by_pytorch(compact, shape)
    assert by_rank.dense_macs == counted_by_pytorch(model, shape)


@pytest.mark.parametrize(
    "ranks",
    [None, ZOO_RANKS, list(ZOO_RANKS.values()), ZOO_RANKS | {"head": 2}, {"square": 16, "tall": 3}],
    ids=str,
)
def test_layers_of_every_kind_agree_with_pytorch(ranks):
    model, shape = Zoo(), (3, 21, 18)
    total = cost(model, shape, ranks)
    compact = model if ranks is None else factorize(model, ranks)
    assert total.params == sum(p.numel() for p in compact.parameters())
    assert total.dense_macs == counted_by_pytorch(model, shape)
    assert total.macs == counted_by_pytorch(compact, shape)


def test_grouped_and_strided_convolutions_by_hand():
    layers = nn.Sequential(
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.Conv2d(12, 12, 3, groups=12, bias=False),
        nn.Conv2d(12, 5, 1),
    )
    rows = cost(layers, (8, 9, 7)).layers
    assert [(row.N, row.D, row.macs, row.params) for row in rows] == [
        (12, 2 * 9, 12 * 18 * 5 * 4, 12 * 18 + 12),
        (12, 9, 12 * 9 * 3 * 2, 12 * 9),
        (5, 12, 5 * 12 * 3 * 2, 5 * 12 + 5),
    ]


def test_compressed_layer_by_hand():
    row = cost(nn.Conv2d(4, 10, 3, padding=1), (4, 6, 6), {"": 3}).layers[0]
    assert (row.kind, row.rank) == ("Conv2d", 3)
    assert (row.macs, row.dense_macs) == (3 * (10 + 36) * 36, 10 * 36 * 36)
    assert (row.params, row.dense_params) == (3 * (10 + 36) + 10, 10 * 36 + 10)


@pytest.mark.parametrize("ranks", [None, ZOO_RANKS])
def test_rows_are_in_order_of_execution_and_sum_to_the_totals(ranks):
    model = Zoo()
    total = cost(model, (3, 21, 18), ranks)
    assert [row.name for row in total.layers] == [
        "square",
        "pointwise",
        "tall",
        "depthwise",
        "column",
        "grouped",
        "dilated",
        "head",
    ]
    assert total.macs == sum(row.macs for row in total.layers)
    assert total.dense_macs == sum(row.dense_macs for row in total.layers)
    batchnorms = sum(p.numel() for bn in (model.bn, model.bn2) for p in bn.parameters())
    assert total.params == sum(row.params for row in total.layers) + batchnorms
    assert total.dense_params == sum(row.dense_params for row in total.layers) + batchnorms


@pytest.mark.parametrize(("rank", "noted"), [(7, False), (8, True), (9, True), (16, False)])
def test_factors_that_cost_no_less_are_noted(rank, noted):
    row = cost(nn.Conv2d(16, 16, 1), (16, 4, 4), {"": rank}).layers[
        0
    ]  # 8·(16 + 16) = 16·16; rank 16 is dense
    assert bool(row.note) == noted
    assert (row.macs >= row.dense_macs) == (noted or rank == 16)


def test_dead_layers_cost_no_macs_and_folded_batchnorms_no_parameters():
    model = build_model("resnet8").eval()
    nn.init.zeros_(model.blocks[1].conv1.weight)
    ranks = ranks_from_ratio(model, 0.57)
    compact = factorize(model, ranks)
    by_rank = {row.name: row.macs for row in cost(model, (3, 32, 32), ranks).layers}
    assert cost(compact, (3, 32, 32)).macs == sum(by_rank.values()) - by_rank["blocks.1.conv1"]
    folded = fold_batchnorm(compact)
    batchnorms = [module for module in compact.modules() if isinstance(module, nn.BatchNorm2d)]
    added_biases = sum(bn.num_features for bn in batchnorms) - 32  # the dead layer has its bias already
    assert (
        cost(folded, (3, 32, 32)).params
        == cost(compact, (3, 32, 32)).params - sum(2 * bn.num_features for bn in batchnorms) + added_biases
    )


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    total = cost(nn.Sequential(layer, nn.ReLU(), layer), (4, 5, 5))
    assert (total.macs, total.params) == (2 * 144 * 25, 144)


def test_the_model_is_left_as_it_was():
    model = Zoo().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, (3, 21, 18), ZOO_RANKS)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ranks", [{"square": 17}, {"nothing": 1}, [1, 2], {"depthwise": 1}])
def test_ranks_that_do_not_fit_are_refused(ranks):
    with pytest.raises(ValueError, match="rank"):
        cost(Zoo(), (3, 21, 18), ranks)
