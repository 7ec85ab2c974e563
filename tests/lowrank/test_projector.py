import copy
import math

import pytest
import torch
from helpers import ZOO_RANKS, Zoo, randomize_batchnorms, relative_error
from torch import nn

import lrpet.lowrank.projector
from lrpet import LowRankProjector, build_model, project, ranks_from_ratio
from lrpet.bench.memory import peak_bytes
from lrpet.lowrank.batchnorm import batchnorm_scale

ZOO_BATCHNORMS = {
    "square": "bn",
    "pointwise": "bn2",
    "tall": None,
    "column": None,
    "dilated": None,
    "head": None,
}


def zoo():
    return randomize_batchnorms(Zoo())


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def numerical_rank(weight):
    return int(torch.linalg.matrix_rank(weight.flatten(1).double(), rtol=1e-5))


@pytest.mark.parametrize(
    "ranks",
    [ZOO_RANKS, list(ZOO_RANKS.values()), ZOO_RANKS | {"head": 2}],
    ids=["dict", "list", "with Linear"],
)
def test_step_makes_the_chosen_weights_low_rank_and_changes_nothing_else(ranks):
    model = zoo()
    before = weights(model)
    LowRankProjector(model, ranks).step()
    ranks = ranks if isinstance(ranks, dict) else ZOO_RANKS
    assert {name: numerical_rank(model.get_submodule(name).weight) for name in ranks} == ranks
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in ranks}


@pytest.mark.parametrize(
    "options",
    [{}, {"energy_transfer": False}, {"keep_share": 0.3}, {"row_eps": 1e-8}, {"bn_rectification": False}],
    ids=str,
)
def test_step_does_to_each_layer_what_project_does(options):
    model = zoo()
    before = weights(model)
    ranks = ZOO_RANKS | {"head": 2}
    LowRankProjector(model, ranks, **options).step()
    rectified = options.pop("bn_rectification", True)
    for name, rank in ranks.items():
        bn = ZOO_BATCHNORMS[name] if rectified else None
        M = before[f"{name}.weight"].flatten(1)
        a = None if bn is None else batchnorm_scale(model.get_submodule(bn)).reshape(M.shape[0])
        expected = project(M, rank, row_scale=a, **options)
        assert relative_error(model.get_submodule(name).weight.flatten(1), expected) < 1e-5


def test_layers_of_one_shape_are_not_mixed_up():
    model = randomize_batchnorms(build_model("resnet20"))
    before = weights(model)
    ranks = ranks_from_ratio(model, 0.57)
    LowRankProjector(model, ranks).step()
    for name, rank in ranks.items():
        a = batchnorm_scale(model.get_submodule(name.replace("conv", "bn"))).flatten()
        expected = project(before[f"{name}.weight"].flatten(1), rank, row_scale=a)
        assert relative_error(model.get_submodule(name).weight.flatten(1), expected) < 1e-5


def test_the_order_of_a_weight_in_memory_changes_nothing():
    model = randomize_batchnorms(build_model("resnet20"))
    ranks = ranks_from_ratio(model, 0.57)
    twin, odd = copy.deepcopy(model).to(memory_format=torch.channels_last), copy.deepcopy(model)
    for name in ranks:
        weight = odd.get_submodule(name).weight
        weight.data = (
            weight.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        )  # neither of the two usual orders
    layers = [net.get_submodule(name) for net in (twin, odd) for name in ranks]

    def places():
        return [(layer.weight.data_ptr(), layer.weight.stride()) for layer in layers]

    before = places()
    for net in (model, twin, odd):
        LowRankProjector(net, ranks).step()
    for name in ranks:
        expected = model.get_submodule(name).weight
        for net in (twin, odd):
            assert relative_error(net.get_submodule(name).weight, expected) < 1e-5
            assert numerical_rank(net.get_submodule(name).weight) == ranks[name]
    assert places() == before


def test_a_dead_layer_among_others_of_its_shape_is_left_out():
    model = randomize_batchnorms(build_model("resnet20"))
    ranks = ranks_from_ratio(model, 0.57)
    name, other = list(ranks)[8:10]
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1e-6)
    before = weights(model)
    report = {layer.name: layer.action for layer in LowRankProjector(model, ranks).step()}
    assert (report[name], report[other]) == ("left alone", "projected")
    assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    assert numerical_rank(model.get_submodule(other).weight) == ranks[other]


def test_running_statistics_count_as_they_stand_at_each_step():
    model = zoo()
    projector = LowRankProjector(model, {"square": 5})
    projector.step()
    model.bn.running_var.mul_(torch.linspace(0.1, 5, 16))
    M = model.square.weight.detach().clone().flatten(1) + 0.1 * torch.randn(16, 27)
    with torch.no_grad():
        model.square.weight.copy_(M.view(16, 3, 3, 3))
    projector.step()
    expected = project(M, 5, row_scale=batchnorm_scale(model.bn).flatten())
    assert relative_error(model.square.weight.flatten(1), expected) < 1e-5


def test_report_follows_the_order_of_ranks_and_ends_with_the_dense_convolutions():
    ranks = dict(reversed((ZOO_RANKS | {"square": 16}).items()))
    del ranks["column"]
    model = zoo()
    before = weights(model)
    report = LowRankProjector(model, ranks, bn_rectification=False).step()
    assert [layer.name for layer in report] == [*ranks, "depthwise", "column", "grouped"]
    assert [layer.rank for layer in report] == [*ranks.values(), None, None, None]
    assert [layer.action for layer in report] == ["projected"] * len(ranks) + ["dense"] * 3
    assert [layer.reason for layer in report[-3:]] == ["grouped", "no rank given", "grouped"]
    for layer in report[:-3]:
        energies = torch.linalg.svdvals(before[f"{layer.name}.weight"].flatten(1).double()).square()
        assert layer.energy_kept == pytest.approx(
            (energies[: layer.rank].sum() / energies.sum()).item(), rel=1e-6
        )
    assert all(math.isnan(layer.energy_kept) for layer in report[-3:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [("dilated.weight", "weight of layer 'dilated'"), ("bn2.weight", "BatchNorm after layer 'pointwise'")],
)
def test_lost_values_are_an_error_that_names_the_layer_and_nothing_is_changed(tensor, words, value):
    model = zoo()
    model.state_dict()[tensor].view(-1)[3] = value
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        LowRankProjector(model, ZOO_RANKS).step()
    del before[tensor]
    changed = {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == set()


@pytest.mark.parametrize("scale", [1e-6, 0.0])
def test_a_dead_layer_is_left_alone_and_reported(scale):
    model = zoo()
    with torch.no_grad():
        model.tall.weight.mul_(scale)
    before = weights(model)
    report = {layer.name: layer for layer in LowRankProjector(model, ZOO_RANKS).step()}
    assert torch.equal(model.tall.weight, before["tall.weight"])
    assert report["tall"].action == "left alone"
    assert "dead" in report["tall"].reason
    assert {name for name, layer in report.items() if layer.action == "projected"} == set(ZOO_RANKS) - {
        "tall"
    }


@pytest.mark.parametrize(("largest", "action"), [(0.9e-4, "left alone"), (1.1e-4, "projected")])
def test_dead_means_a_largest_singular_value_under_the_limit(largest, action):
    layer = nn.Conv2d(8, 8, 1)
    Q = torch.linalg.qr(torch.randn(8, 8)).Q
    s = largest * torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    with torch.no_grad():
        layer.weight.copy_((Q * s)[..., None, None])
    assert LowRankProjector(layer, {"": 3}, bn_rectification=False).step()[0].action == action


@pytest.mark.parametrize(("gain", "action"), [(1e-6, "left alone"), (0.0, "left alone"), (1.0, "projected")])
def test_dead_is_a_layer_as_its_batchnorm_scales_it(gain, action):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[1].weight.fill_(gain)
        if action == "projected":  # small by itself, not as it is scaled
            model[0].weight.mul_(1e-6)
            model[1].running_var.fill_(1e-10)
            model[1].eps = 0.0
    before = weights(model)
    report = LowRankProjector(model, {"0": 2}).step()[0]
    assert report.action == action
    assert torch.equal(model[0].weight, before["0.weight"]) == (action == "left alone")
    assert LowRankProjector(model, {"0": 2}, bn_rectification=False).step()[0].action == (
        "left alone" if action == "projected" else "projected"
    )


def test_optimizer_gradients_and_flags_survive():
    model = zoo()
    model.tall.bias.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    optimizer.step()
    momenta = {
        name: optimizer.state[p]["momentum_buffer"].clone()
        for name, p in parameters.items()
        if p.grad is not None
    }
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    LowRankProjector(model, ZOO_RANKS).step()
    assert all(
        torch.equal(optimizer.state[parameters[name]]["momentum_buffer"], m) for name, m in momenta.items()
    )
    assert all(torch.equal(parameters[name].grad, g) for name, g in gradients.items())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_leaf
        assert parameter.grad_fn is None
        assert parameter.requires_grad == (name != "tall.bias")
    model(torch.randn(4, 3, 12, 12)).sum().backward()  # the next training step works


def test_mode_and_memory_format_are_kept():
    model = zoo().to(memory_format=torch.channels_last).train()
    LowRankProjector(model, ZOO_RANKS).step()
    assert model.square.weight.is_contiguous(memory_format=torch.channels_last)
    assert numerical_rank(model.square.weight) == 5
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = zoo().to(dtype)
    before = weights(model)
    LowRankProjector(model, ZOO_RANKS).step()
    a = batchnorm_scale(model.bn).flatten()
    assert model.square.weight.dtype == dtype
    expected = project(before["square.weight"].flatten(1).double(), 5, row_scale=a)
    assert relative_error(model.square.weight.flatten(1), expected) < max(1e-9, torch.finfo(dtype).eps)


def test_a_model_that_is_loaded_anew_after_the_projector_was_built_is_projected():
    model = zoo()
    projector = LowRankProjector(model, ZOO_RANKS)
    model.load_state_dict(zoo().state_dict())
    projector.step()
    assert numerical_rank(model.square.weight) == 5


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"square": 0}, "rank of layer 'square' must be an integer from 1 to 16; got 0"),
        ({"tall": 17}, "rank of layer 'tall' must be an integer from 1 to 16; got 17"),
        ({"tall": 2.0}, "rank of layer 'tall' .* got 2.0"),
        ({"tall": True}, "rank of layer 'tall' .* got True"),
        ({"depthwise": 1}, "layer 'depthwise' .*cannot be made low-rank"),
        ({"bn": 1}, "layer 'bn' .*cannot be made low-rank"),
        ({"nothing": 1}, "'nothing' that the model does not have"),
        ([5, 4, 6, 3], "ranks has 4 entries, but the model has 5"),
        ([5, 4, 6, 3, 99], "rank of layer 'dilated' .* got 99"),
    ],
)
def test_bad_ranks_are_refused_with_the_name_of_the_layer(ranks, words):
    wrong_type = words.endswith(("2.0", "True"))
    with pytest.raises(TypeError if wrong_type else ValueError, match=words):
        LowRankProjector(Zoo(), ranks)


def test_an_untraceable_model_works_with_stated_pairs_or_without_rectification():
    class Branching(Zoo):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = randomize_batchnorms(Branching())
    before = weights(model)
    with pytest.raises(ValueError, match="batchnorms"):
        LowRankProjector(model, {"square": 5})
    with pytest.raises(ValueError, match="'square'.*'bn3'"):
        LowRankProjector(model, {"square": 5}, batchnorms={"square": "bn3"})
    assert_unchanged(model, before)
    LowRankProjector(model, {"square": 5}, batchnorms={"square": "bn"}).step()
    expected = project(before["square.weight"].flatten(1), 5, row_scale=batchnorm_scale(model.bn).flatten())
    assert relative_error(model.square.weight.flatten(1), expected) < 1e-5
    LowRankProjector(model, {"tall": 5}, bn_rectification=False).step()
    assert numerical_rank(model.tall.weight) == 5


def train_a_little(model, scale=0.002):
    """Move every weight by noise of a few thousandths of its size."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                scale * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
            )


def both(model, ranks, **options):
    """A model with a fast projector that has made its first step, and a copy with an exact one."""
    twin = copy.deepcopy(model)
    fast, exact = (
        LowRankProjector(model, ranks, fast=True, **options),
        LowRankProjector(twin, ranks, fast=False, **options),
    )
    fast.step(), exact.step()
    return fast, twin, exact


def assert_agree(model, twin, ranks):
    for name in ranks:
        assert (
            relative_error(
                model.get_submodule(name).weight.flatten(1), twin.get_submodule(name).weight.flatten(1)
            )
            < 1e-5
        )


@pytest.mark.parametrize(
    "options", [{}, {"energy_transfer": False}, {"keep_share": 0.3}, {"bn_rectification": False}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_path_agrees_with_the_exact_one(options, dtype):
    model, ranks = zoo().to(dtype), ZOO_RANKS | {"head": 2}
    fast, twin, exact = both(
        model, ranks, **(options | {"keep_share": 0.0})
    )  # only removed values that are gone leave a gap
    fast.settings["keep_share"] = exact.settings["keep_share"] = options.get("keep_share", 0.0)
    train_a_little(model)
    twin.load_state_dict(model.state_dict())
    report, expected = fast.step(), exact.step()
    assert [layer.reason for layer in report if layer.rank] == ["followed"] * len(ranks)
    assert [layer.reason for layer in expected if layer.rank] == [""] * len(ranks)
    assert_agree(model, twin, ranks)
    for layer, other in zip(report[: len(ranks)], expected, strict=False):
        assert layer.energy_kept == pytest.approx(other.energy_kept, rel=1e-6)


def test_the_fast_path_survives_weights_that_are_suddenly_others():
    model = zoo()
    fast, twin, exact = both(model, ZOO_RANKS)
    train_a_little(model)
    with torch.no_grad():
        model.tall.weight.copy_(torch.randn_like(model.tall.weight))
        model.dilated.weight.zero_()[0] = 1.0  # rank 1, below R
    twin.load_state_dict(model.state_dict())
    report = {layer.name: layer.reason for layer in fast.step() if layer.rank}
    exact.step()
    assert report == {
        "square": "followed",
        "pointwise": "followed",
        "tall": "",
        "column": "followed",
        "dilated": "",
    }
    assert_agree(model, twin, ZOO_RANKS)
    model.load_state_dict(zoo().state_dict())  # all of them, twice
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        fast.step(), exact.step()
        assert_agree(model, twin, ZOO_RANKS)


def test_an_exact_step_and_every_tenth_are_bit_for_bit_those_of_the_exact_path():
    model = zoo()
    fast, twin, exact = both(model, ZOO_RANKS)
    for number in range(1, 22):
        train_a_little(model)
        twin.load_state_dict(model.state_dict())
        report = fast.step(exact=number == 15)
        exact.step()
        same = all(
            torch.equal(model.get_submodule(name).weight, twin.get_submodule(name).weight)
            for name in ZOO_RANKS
        )
        assert same == (number in (10, 15, 20))
        assert all((layer.reason == "") == same for layer in report[: len(ZOO_RANKS)])
        assert_agree(model, twin, ZOO_RANKS)


def test_a_fast_path_that_was_wrong_is_found_out_and_given_up(monkeypatch, caplog):
    model = zoo()
    fast, twin, exact = both(model, ZOO_RANKS)
    real = lrpet.lowrank.follow.follow_basis

    def overconfident(gram, start):
        basis, certain = real(gram, start)
        wrong = torch.linalg.eigh(gram).eigenvectors[..., : start.shape[-1]]
        return basis._replace(vectors=wrong), torch.ones_like(certain)

    monkeypatch.setattr(lrpet.lowrank.projector, "follow_basis", overconfident)
    train_a_little(model)
    twin.load_state_dict(model.state_dict())
    fast.step(exact=True), exact.step()
    assert "kept too little energy" in caplog.text
    assert not fast.fast
    assert all(
        torch.equal(model.get_submodule(name).weight, twin.get_submodule(name).weight) for name in ZOO_RANKS
    )


def test_the_honest_fast_path_is_not_given_up(caplog):
    model = randomize_batchnorms(build_model("resnet20"))
    fast = LowRankProjector(model, ranks_from_ratio(model, 0.57), fast=True)
    for _ in range(21):
        fast.step()
        train_a_little(model, 0.01)
    assert fast.fast
    assert caplog.text == ""


def test_a_step_takes_little_memory_beside_the_model():
    model = randomize_batchnorms(build_model("resnet56"))
    bytes_of_model = sum(p.numel() * p.element_size() for p in model.parameters())
    for fast in (False, True):
        projector = LowRankProjector(model, ranks_from_ratio(model, 0.57), fast=fast)
        projector.step()
        train_a_little(model)
        held = sum(basis.numel() * basis.element_size() for basis in projector._bases.values())
        assert (held > 0) == fast
        assert held + peak_bytes(projector.step, torch.device("cpu")) < 2.2 * bytes_of_model


@pytest.mark.parametrize("shape", [(16, 32), (48, 8)], ids=["wide", "tall"])
@pytest.mark.parametrize("keep_share", [0.0, 0.3])
def test_a_followed_projection_undoes_small_scales_as_the_exact_one_does(shape, keep_share):
    """The basis that is followed spans the leading directions, and no column of it is one."""
    torch.manual_seed(0)
    N, C = shape
    model = nn.Sequential(nn.Conv2d(C, N, 1, bias=False), nn.BatchNorm2d(N))
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.5, 0.02, 0.01, 0.01, 0.01])
    with torch.no_grad():
        U, V = (torch.linalg.qr(torch.randn(n, 8))[0] for n in (N, C))
        model[0].weight.copy_((U * spectrum @ V.T).view(N, C, 1, 1))
        model[1].weight[:3] = torch.tensor([0.0, 1e-3, -2e-3])
    fast = LowRankProjector(model, {"0": 4}, keep_share=keep_share, fast=True)
    fast.step()
    with torch.no_grad():
        model[0].weight.add_(1e-3 * torch.randn(N, C, 1, 1))
    copy = lrpet.lowrank.layers.copy_of(model)
    assert "3 rows" in LowRankProjector(copy, {"0": 4}, keep_share=keep_share).step()[0].reason
    assert fast.step()[0].reason.startswith("followed")
    torch.testing.assert_close(model[0].weight, copy[0].weight, rtol=1e-4, atol=2e-5)
