"""Column scale: a weight projected as the norm before it scales its inputs. Ours, not the paper's."""

import pytest
import torch
from torch import nn

from lrpet.lowrank.norms import find_norms_before
from lrpet.lowrank.projection import project
from lrpet.lowrank.projector import LowRankProjector
from lrpet.models import build_model


def gains(D):
    return torch.linspace(-2.0, 3.0, D, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (2, 5, 9)])
@pytest.mark.parametrize("settings", [{}, {"energy_transfer": False}, {"keep_share": 0.3}, {"row_eps": 0.0}])
def test_column_scale_is_the_row_scale_of_the_transposed(shape, settings):
    M, g = torch.randn(shape, dtype=torch.float64), gains(shape[-1]).expand(*shape[:-2], shape[-1])
    expected = project(M.mT, 2, row_scale=g, **settings).mT
    assert torch.allclose(project(M, 2, column_scale=g, **settings), expected, atol=1e-12)


def test_with_an_exact_inverse_the_scaled_weight_is_what_is_projected():
    M, g = torch.randn(5, 9, dtype=torch.float64), gains(9)
    assert torch.allclose(project(M, 2, column_scale=g, row_eps=0.0) * g, project(M * g, 2), atol=1e-12)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"column_scale": torch.ones(5)}, r"column_scale must have one value per column, \(9,\); got \(5,\)"),
        ({"column_scale": torch.full((9,), torch.nan)}, "column_scale holds NaN.*the norm it was taken from"),
        ({"column_scale": torch.ones(9), "row_scale": torch.ones(5)}, "row_scale or column_scale"),
    ],
)
def test_what_cannot_be_a_column_scale_is_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        project(torch.eye(5, 9), 2, **scales)


class Norms(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.one, self.two, self.twice = norm(6), nn.Linear(6, 4), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.norm(x)
        return self.one(y).sum() + self.twice(self.two(y).relu()) + self.twice(y)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_layers_right_after_a_norm_are_found(norm):
    names = ("one", "two", "twice")  # the last runs on something else, too
    assert find_norms_before(Norms(norm), names, torch.ones(2, 6)) == {"one": "norm", "two": "norm"}
    assert find_norms_before(Norms(norm), ("one",), torch.ones(2, 6)) == {"one": "norm"}


def test_norms_without_a_gain_scale_nothing():
    assert (
        find_norms_before(
            nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)), ["1"], torch.ones(1, 4)
        )
        == {}
    )


@pytest.mark.parametrize("fast", [False, True])
def test_the_projector_projects_as_the_norm_scales(fast):
    model = build_model("byte_transformer", 256)
    for norm in (model.blocks[0].norm1, model.blocks[0].norm2):
        nn.init.uniform_(norm.weight, 0.2, 3.0)
    block, x = model.blocks[0], torch.zeros(1, 8, dtype=torch.int64)
    ranks = {f"blocks.0.{name}": 9 for name in ("qkv", "proj", "mlp.0", "mlp.2")}
    before = {name: model.get_submodule(name).weight.detach().clone() for name in ranks}
    projector = LowRankProjector(model, ranks, column_scale=True, example_inputs=x, fast=fast)
    assert [row.action for row in projector.step()][:4] == ["projected"] * 4
    scales = {"blocks.0.qkv": block.norm1.weight, "blocks.0.mlp.0": block.norm2.weight}
    for name, M in before.items():
        expected = project(M, 9, column_scale=scales.get(name))
        assert torch.allclose(model.get_submodule(name).weight, expected, atol=1e-6), name


def test_rectified_inputs_that_a_norm_scales_to_nothing_are_undone_exactly():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8))
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[:4] = 1.0
    row = LowRankProjector(model, {"1": 2}, column_scale=True, example_inputs=torch.ones(1, 6)).step()[0]
    assert row.reason.startswith("2 inputs that the norm scales by")
    assert torch.isfinite(model[1].weight).all()


def test_without_a_norm_or_an_example_it_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="column_scale needs example_inputs"):
        LowRankProjector(model, {"0": 2}, column_scale=True)
    with pytest.raises(ValueError, match="column_scale finds no LayerNorm or RMSNorm"):
        LowRankProjector(model, {"0": 2}, column_scale=True, example_inputs=torch.ones(1, 4))
