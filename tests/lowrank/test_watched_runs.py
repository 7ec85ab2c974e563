"""What is read off one run of a network: which BatchNorm follows which layer, what multiplies; and plans."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ZOO_RANKS, Zoo, randomize_batchnorms, relative_error
from torch import nn

from lrpet import (
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
from lrpet.lowrank.batchnorm import batchnorm_scale, find_batchnorms, resolve_batchnorms
from lrpet.models import TORCHVISION
from lrpet.registry import IMAGE_MODELS


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2: four buffers."""

    def __init__(self, features):
        super().__init__()
        self.eps = 1e-5
        for name, value in {"weight": 0.7, "bias": 0.1, "running_mean": 0.2, "running_var": 1.9}.items():
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x):
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: an activation inside."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Untraceable(nn.Module):
    """Looks at values, which torch.fx cannot follow."""

    def __init__(self, bn=nn.BatchNorm2d, **layers):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3, padding=1), bn(8), nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = bn(8)

    def forward(self, x):
        x = x + 1 if x.sum() > 0 else x
        return self.bn2(self.b(self.bn(self.a(x))))


class Forward(Untraceable):
    def __init__(self, forward):
        super().__init__()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def difference(model, other, x):
    with torch.no_grad():
        reference = model(x)
        return ((other(x) - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("name", sorted(IMAGE_MODELS))
def test_a_run_shows_the_pairs_that_the_graph_shows(name):
    model = build_model(name)
    x = torch.rand(1, 3, *((64, 64) if name in TORCHVISION else (32, 32)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert find_batchnorms(model, x) == find_batchnorms(model)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def used_twice(m, x):
    y = m.a(x)
    return m.bn(y) + y


def in_place_between(m, x):
    return m.bn(F.relu_(m.a(x)))


def handed_out(m, x):
    y = m.a(x)
    return m.bn(y), y


def layer_twice(m, x):
    return m.bn2(m.b(m.bn(m.b(m.a(x)))))


def norm_twice(m, x):
    return m.bn(m.b(m.bn(m.a(x))))


@pytest.mark.parametrize("forward", [used_twice, in_place_between, handed_out, layer_twice, norm_twice])
def test_what_cannot_be_merged_is_no_pair_of_a_run(forward):
    assert set(find_batchnorms(Forward(forward), torch.rand(1, 3, 6, 6)).values()) == {None}


def test_an_error_of_the_network_leaves_no_hooks_and_no_eval_mode():
    model = Untraceable().train()
    with pytest.raises(RuntimeError):
        find_batchnorms(model, torch.rand(1, 5, 6, 6))
    assert model.training and model.bn.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_untraceable_network_is_rectified_folded_and_loaded_by_one_run(tmp_path):
    model, x = randomize_batchnorms(Untraceable()).eval(), torch.rand(2, 3, 6, 6)
    before = model.a.weight.detach().clone().flatten(1)
    with pytest.raises(ValueError, match="example_inputs="):
        LowRankProjector(model, {"a": 3})
    LowRankProjector(model, {"a": 3}, example_inputs=(x,)).step()
    expected = project(before, 3, row_scale=batchnorm_scale(model.bn).flatten())
    assert relative_error(model.a.weight.flatten(1), expected) < 1e-5
    folded = fold_batchnorm(factorize(model, {"a": 3}), example_inputs=x)
    assert isinstance(folded.bn, nn.Identity) and isinstance(folded.bn2, nn.Identity)
    assert difference(model, folded, x) < 1e-5
    stated = fold_batchnorm(factorize(model, {"a": 3}), {"a.0": None, "a.1": "bn", "b": None})
    for network in (folded, stated):
        save_compact(network, tmp_path / "net")
        assert difference(network, load_compact(tmp_path / "net", Untraceable()), x) == 0


@pytest.mark.parametrize("run", [True, False])
def test_a_frozen_batchnorm_counts_as_one_and_is_folded(run):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8)).eval(), torch.rand(1, 3, 6, 6)
    assert find_batchnorms(model, x if run else None) == {"0": "1"}
    folded = fold_batchnorm(model, example_inputs=x if run else None)
    assert isinstance(folded[1], nn.Identity) and difference(model, folded, x) < 1e-5
    before = model[0].weight.detach().flatten(1).clone()
    LowRankProjector(model, {"0": 3}).step()
    expected = project(before, 3, row_scale=batchnorm_scale(model[1]).flatten())
    assert relative_error(model[0].weight.flatten(1), expected) < 1e-5


@pytest.mark.parametrize("run", [True, False])
def test_a_batchnorm_with_an_activation_rectifies_and_is_never_folded(run):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)), torch.rand(1, 3, 6, 6)
    randomize_batchnorms(model).eval()
    assert find_batchnorms(model, x if run else None) == {"0": "1"}
    folded = fold_batchnorm(model, example_inputs=x if run else None)
    assert isinstance(folded[1], BatchNormAct2d) and difference(model, folded, x) == 0
    before = model[0].weight.detach().flatten(1).clone()
    LowRankProjector(model, {"0": 3}).step()
    expected = project(before, 3, row_scale=batchnorm_scale(model[1]).flatten())
    assert relative_error(model[0].weight.flatten(1), expected) < 1e-5


def test_batchnorm_after_a_linear_layer_over_tokens_is_no_pair():
    model = randomize_batchnorms(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))).eval()
    tokens, rows = torch.randn(4, 16, 8), torch.randn(4, 8)
    assert difference(model, fold_batchnorm(model), tokens) == 0
    assert find_batchnorms(model) == find_batchnorms(model, tokens) == {"0": None}
    assert find_batchnorms(model, rows) == {"0": "1"}
    assert resolve_batchnorms(model, ["0"], {"0": "1"}) == {"0": "1"}  # stated, and can be right
    assert difference(model, fold_batchnorm(model, {"0": "1"}), rows) < 1e-5
    with pytest.raises(ValueError, match="'0' is paired with BatchNorm '1'"):
        resolve_batchnorms(model, ["0"], {"0": "1"}, tokens)


def test_batchnorms_of_which_none_is_paired_are_counted_in_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="Sequential has 2 BatchNorms, and none"):
        LowRankProjector(model, {"0": 3})
    LowRankProjector(model, {"0": 3}, batchnorms={"0": None})
    LowRankProjector(model, {"0": 3}, bn_rectification=False)


# ---------------------------------------------------------------- scales of zero


@pytest.mark.parametrize("shape", [(8, 3), (40, 3)])
@pytest.mark.parametrize(
    "options", [{}, {"energy_transfer": False}, {"keep_share": 0.3}, {"row_eps": 0.0}], ids=str
)
@pytest.mark.parametrize("fast", [False, True])
def test_rows_that_a_batchnorm_scales_to_nothing_are_projected_and_not_destroyed(shape, options, fast):
    outputs, inputs = shape
    model = nn.Sequential(nn.Conv2d(inputs, outputs, 3), randomize_batchnorms(nn.BatchNorm2d(outputs)))
    with torch.no_grad():
        model[1].weight[:2] = 0.0
    before = model[0].weight.detach().double().flatten(1)
    report = LowRankProjector(model, {"0": 3}, fast=fast, **options).step()[0]
    assert "2 rows that BatchNorm scales by" in report.reason
    after = model[0].weight.detach().double().flatten(1)
    a = batchnorm_scale(model[1]).flatten().clone()
    if not options.get("keep_share"):
        assert int(torch.linalg.matrix_rank(after, rtol=1e-5)) == 3
    plain = project(before, 3, row_scale=a, **options)
    torch.testing.assert_close(after[2:], plain[2:], rtol=1e-4, atol=1e-6)
    a[:2] = 1e-9  # the limit of a scale that is undone exactly
    limit = project(before, 3, row_scale=a, **(options | {"row_eps": 0.0}))
    torch.testing.assert_close(after[:2], limit[:2], rtol=1e-3, atol=1e-5)
    assert after[:2].norm() > 0.1 * before[:2].norm()


def test_scales_above_the_limit_are_the_authors_and_bit_for_bit_as_in_project():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.0033, 1, 8))
    before = model[0].weight.detach().flatten(1).clone()
    report = LowRankProjector(model, {"0": 3}).step()[0]
    assert report.reason == ""
    expected = project(before, 3, row_scale=batchnorm_scale(model[1]).flatten())
    assert torch.equal(model[0].weight.flatten(1), expected)


def test_a_block_that_starts_at_zero_is_left_alone_until_its_scale_has_moved():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nn.init.zeros_(model[1].weight)
    before, projector = model[0].weight.detach().clone(), LowRankProjector(model, {"0": 3})
    report = projector.step()[0]
    assert report.action == "left alone" and "as its BatchNorm scales it" in report.reason
    assert torch.equal(model[0].weight, before)
    nn.init.constant_(model[1].weight, 0.001)  # after a few steps
    assert projector.step()[0].action == "projected"
    assert model[0].weight.norm() > 0.99 * before.norm()


# ---------------------------------------------------------------- costs


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 16)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.a(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.r = kind(8, 16, batch_first=True)

    def forward(self, x):
        return self.r(x + torch.zeros(8) if self.on_cpu else x)[0]


@pytest.mark.parametrize(
    ("model", "shape", "macs", "other"),
    [
        (nn.ConvTranspose2d(16, 16, 2, 2), (16, 8, 8), 16 * 16 * 4 * 64, 0),
        (nn.Conv1d(3, 16, 3, padding=1), (3, 8), 16 * 9 * 8, 0),
        (nn.Conv3d(3, 16, 3, padding=1), (3, 4, 4, 4), 16 * 81 * 64, 0),
        (Functional(), (8,), 128, 0),
        (Attention(), (10, 32), 4 * 10 * 32 * 32, 2 * 10 * 10 * 32),
    ],
    ids=["ConvTranspose2d", "Conv1d", "Conv3d", "functional", "attention"],
)
def test_everything_that_multiplies_counts(model, shape, macs, other):
    total = cost(model, shape)
    assert (total.macs, sum(total.other_macs.values())) == (macs, other)
    assert total.macs == sum(row.macs for row in total.layers)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_recurrent_cells_and_attention_stand_apart_by_name(on_cpu):
    model = Recurrent()
    model.on_cpu = on_cpu  # a tensor of its own, which "meta" cannot mix with
    total = cost(model, (5, 8))
    assert total.macs == 0 and sum(total.other_macs.values()) == 5 * 64 * 24
    assert all(name.startswith("r: ") for name in total.other_macs)
    assert list(cost(Attention(), (10, 32)).other_macs) == ["a: bmm"]
    assert torch.backends.mkldnn.enabled and torch.backends.mha.get_fastpath_enabled()


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.c = torch.full((1, 3, 1, 1), 0.5), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.c(x - self.mean)


class Branch(Mean):
    def forward(self, x):
        return self.c(x if x.sum() > 0 else -x)


class Mask(Mean):
    def forward(self, x, mask):
        return self.c(x) * mask


@pytest.mark.parametrize("model", [Mean(), Branch()], ids=["tensor of its own", "looks at values"])
def test_a_network_that_meta_cannot_run_is_counted_where_it_is(model):
    model.train()
    assert cost(model, (3, 8, 8), {"c": 2}).dense_macs == 8 * 27 * 36
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_inputs_of_any_kind_and_networks_that_do_not_run_on_them():
    x = torch.rand(1, 3, 8, 8)
    for given in ((x, 2.0), {"x": x, "mask": 2.0}):
        assert cost(Mask(), example_inputs=given).macs == 8 * 27 * 36
    words = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    assert cost(words, example_inputs=torch.zeros(1, 5, dtype=torch.long)).macs == 5 * 32
    for model in (Mask(), words):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"{name} does not run on .*give example_inputs="):
            cost(model, (3, 8, 8))
    with pytest.raises(ValueError, match="either input_shape"):
        cost(words)


def test_layers_that_never_run_have_parameters_and_no_multiply_adds():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.aux(self.main(x)) if self.training else self.main(x)

    model = Auxiliary()
    ranks = ranks_from_ratio(model, 0.5)
    total = cost(model, (3, 8, 8), ranks)
    assert [row.name for row in total.layers] == ["main"]
    assert total.params == sum(p.numel() for p in factorize(model, ranks).parameters())


# ---------------------------------------------------------------- plans


def test_a_plan_says_what_is_taken_why_not_and_how_much_that_is():
    plan = select(Zoo(), exclude="dil*", prune_ratio=0.5, example_inputs=torch.rand(1, 3, 21, 18))
    assert dict(plan) == {"square": 8, "pointwise": 8, "tall": 8, "column": 4}
    text = str(plan)
    assert "16×27" in text and "grouped" in text and "excluded" in text and "not included" in text
    assert f"{plan.params_share:.1%} of the parameters" in text and 0.5 < plan.macs_share < 1
    assert {layer.name: layer.note for layer in plan.layers}["head"] == "not included"
    model = Zoo()
    LowRankProjector(model, plan).step()
    compact = factorize(model, plan)
    assert cost(model, (3, 21, 18), plan).params == sum(p.numel() for p in compact.parameters())


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_ranks_for_a_budget_take_a_plan_and_any_layers(allocation):
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    plan, x = select(model, include=["linear1", "linear2"]), torch.rand(1, 5, 16)
    assert dict(plan) == {"linear1": None, "linear2": None}
    with pytest.raises(TypeError, match="rank of layer 'linear1' must be an integer .* as include="):
        LowRankProjector(model, plan)
    chosen = ranks_for_budget(model, None, 0.2, include=plan, allocation=allocation, example_inputs=x)
    assert isinstance(chosen, type(plan)) and set(chosen) == set(plan)
    counted = cost(model, ranks=chosen, example_inputs=x)
    assert 0.75 * counted.dense_macs < counted.macs <= 0.8 * counted.dense_macs
    assert isinstance(ranks_from_ratio(model, 0.6, include=plan), type(plan))
    assert ranks_from_ratio(model, 0.6, include=lambda name, module: name == "linear2") == {"linear2": 6}


def test_small_coverage_and_factors_that_grow_are_warned_of_before():
    vit = build_model("vit")
    with pytest.warns(UserWarning, match="only 0.3% of the model's parameters"):
        ranks_from_ratio(vit, 0.5)
    with pytest.warns(UserWarning, match="factors of 2 of 2 layers cost more"):
        ranks_from_ratio(nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)), 0.2)
    with pytest.warns(UserWarning, match="factors of 1 of 1 layers cost more"):
        plan = select(nn.Sequential(nn.Conv2d(16, 16, 1)), prune_ratio=0.2)
    assert plan.layers[0].note == "factors cost 1.50 of the layer"


@pytest.mark.parametrize("include", [3, [1], {"a": 1}.values()])
def test_a_bad_choice_of_layers_is_refused(include):
    with pytest.raises(TypeError, match="include must be"):
        select(Zoo(), include)
    with pytest.raises(TypeError, match="include must be"):
        ranks_from_ratio(Zoo(), 0.5, include=include)


def test_the_report_of_a_projector_and_a_list_of_ranks_go_on_working():
    report = LowRankProjector(randomize_batchnorms(Zoo()), list(ZOO_RANKS.values())).step()
    assert [layer.action for layer in report] == ["projected"] * 5 + ["dense"] * 2
