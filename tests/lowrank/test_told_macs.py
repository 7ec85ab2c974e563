"""Multiply-adds that are told before a compact network is made are those of a run of it."""

import warnings

import pytest
import torch
import torchvision

import lrpet
from lrpet.bench.models import count_run
from lrpet.lowrank.factors import rebuild
from lrpet.lowrank.ranks import LayerReport, compressible_layers


class LooksAtTheType(torch.nn.Module):
    """Reads the weight of a layer for its dtype, as T5 does, which multiplies its factors."""

    def __init__(self):
        super().__init__()
        self.read, self.plain = torch.nn.Linear(32, 24), torch.nn.Linear(24, 200)

    def forward(self, x):
        return self.plain(self.read(x.to(self.read.weight.dtype)))


def test_no_rank_of_a_budget_makes_a_layer_cost_more_than_dense():
    model, x = LooksAtTheType(), torch.ones(30, 32)
    ranks = lrpet.ranks_for_budget(model, macs_reduction=0.01, include="*", example_inputs=x)
    told = lrpet.cost(model, ranks=ranks, example_inputs=x)
    assert [row.name for row in told.layers if row.rank] == ["read", "plain"]
    assert all(row.macs < row.dense_macs for row in told.layers)


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 16, 8))

    def forward(self, x):
        return torch._grouped_mm(
            x, self.weight, offs=torch.tensor([3, 5], dtype=torch.int32, device=x.device)
        )


@pytest.mark.parametrize(
    ("model", "inputs", "macs", "other_macs"),
    [
        (torch.nn.Bilinear(3, 4, 5), (torch.ones(2, 3), torch.ones(2, 4)), 0, 2 * 3 * 4 * 5),
        (Experts(), torch.ones(5, 16), 0, 5 * 16 * 8),
        (torch.nn.Linear(8, 4), torch.ones(8), 8 * 4, 0),
    ],
    ids=["bilinear", "experts", "one vector"],
)
def test_products_that_pytorch_does_not_count(model, inputs, macs, other_macs):
    told = lrpet.cost(model, example_inputs=inputs)
    assert (told.macs, sum(told.other_macs.values())) == (macs, other_macs)


BROUGHT = (
    "resnet18 resnext50_32x4d densenet121 googlenet inception_v3 vgg11_bn alexnet squeezenet1_1 mobilenet_v2 "
    "mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 wide_resnet50_2 convnext_tiny swin_t "
    "swin_v2_t vit_b_16 fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18"
)


@pytest.mark.parametrize("name", BROUGHT.split())
def test_told_multiply_adds_are_those_of_a_run_of_the_compact_network(name):
    segments = {"weights_backbone": None} if "resnet50" in name[:12] or "_large" in name else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, on how long the initialization takes
        model = torchvision.models.get_model(name, weights=None, **segments).eval()
    edge = {"vit_b_16": 224, "inception_v3": 96}.get(name, 64)
    x = torch.zeros(2, 3, *([4] * (name == "r3d_18")), edge, edge, device="meta")
    ranks = {n: max(1, min(shape) // 4) for n, shape in compressible_layers(model, "*").items()}
    told = lrpet.cost(model, ranks=ranks, example_inputs=x)
    compact = rebuild(model, [LayerReport(n, rank, 1.0, "factorized") for n, rank in ranks.items()])
    assert told.macs + sum(told.other_macs.values()) == count_run(compact, x)
    assert told.params == sum(p.numel() for p in compact.parameters())
    assert told.macs != told.dense_macs
