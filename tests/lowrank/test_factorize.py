import copy
import json
import struct
import sys

import pytest
import torch
from helpers import ZOO_RANKS, Zoo, randomize_batchnorms
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lrpet import (
    LowRankProjector,
    build_model,
    factorize,
    fold_batchnorm,
    load_compact,
    ranks_from_ratio,
    save_compact,
)
from lrpet.lowrank.factors import ConstantOutput
from lrpet.lowrank.gains import measure_gains
from lrpet.models import TORCHVISION
from lrpet.registry import IMAGE_MODELS

FACTORIZE = sys.modules["lrpet.lowrank.factorize"]  # the module, not the function of its name


def images(name, count=2):
    edge = 64 if name in TORCHVISION else 32
    return torch.rand(count, 3, edge, edge)


@torch.no_grad()
def assert_same_outputs(model, other, x, tolerance=1e-4):
    reference = model(x)
    assert (other(x) - reference).abs().max() <= tolerance * reference.abs().max()
    assert reference.std() > 0


def low_rank_zoo(ranks=ZOO_RANKS):
    model = randomize_batchnorms(Zoo()).eval()
    LowRankProjector(model, ranks).step()
    return model


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_factorizing_and_folding_keep_the_outputs_of_every_network(name):
    model = randomize_batchnorms(build_model(name)).eval()
    x = images(name)
    assert_same_outputs(model, fold_batchnorm(model), x)
    ranks = ranks_from_ratio(model, 0.57, include="*.mlp.*" if name.startswith("vit") else None)
    LowRankProjector(model, ranks).step()
    compact = factorize(model, ranks)
    assert_same_outputs(model, compact, x)
    folded = fold_batchnorm(compact)
    assert_same_outputs(model, folded, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(isinstance(compact.get_submodule(layer), nn.Sequential) for layer in ranks)


@pytest.mark.parametrize(
    "ranks",
    [ZOO_RANKS, list(ZOO_RANKS.values()), ZOO_RANKS | {"head": 2}],
    ids=["dict", "list", "with Linear"],
)
def test_layers_of_every_kind(ranks):
    model = low_rank_zoo(ranks)
    compact = factorize(model, ranks)
    x = torch.rand(2, 3, 21, 18)
    assert_same_outputs(model, compact, x, 1e-5)
    assert_same_outputs(model, fold_batchnorm(compact), x, 1e-5)
    assert_same_outputs(model, fold_batchnorm(model), x, 1e-5)
    first, second = compact.tall
    assert (first.weight.shape, first.stride, first.bias) == ((6, 16, 1, 1), (2, 2), None)
    assert (second.weight.shape, second.stride) == ((40, 6, 1, 1), (1, 1))
    assert torch.equal(second.bias, model.tall.bias)


def test_factors_of_a_full_rank_weight_are_its_best_approximation():
    layer = nn.Conv2d(4, 10, 3, bias=False)
    first, second = factorize(nn.Sequential(layer), [3])[0]
    M = layer.weight.flatten(1).double()
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    product = second.weight.flatten(1).double() @ first.weight.flatten(1).double()
    assert torch.allclose(product, (U[:, :3] * s[:3]) @ Vh[:3], atol=1e-6)
    assert torch.allclose(
        first.weight.flatten(1).norm(), second.weight.flatten(1).norm()
    )  # √s on either side


def test_the_original_is_untouched():
    model = low_rank_zoo()
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    compact = factorize(model, ZOO_RANKS)
    folded = fold_batchnorm(model)
    for new in (compact, folded):
        for parameter in new.parameters():
            parameter.data.fill_(7)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "factorization")


def test_factorizing_and_folding_draw_no_random_numbers():
    model = low_rank_zoo()
    before = torch.get_rng_state()
    fold_batchnorm(factorize(model, ZOO_RANKS))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_and_flags_are_kept(dtype, training):
    model = Zoo().to(dtype).train(training)
    model.tall.weight.requires_grad_(False)
    model.tall.bias.requires_grad_(False)
    compact = factorize(model, ZOO_RANKS)
    assert all(p.dtype == dtype for p in compact.parameters())
    assert all(module.training == training for module in compact.modules())
    assert {name for name, p in compact.named_parameters() if not p.requires_grad} == {
        "tall.0.weight",
        "tall.1.weight",
        "tall.1.bias",
    }


def test_full_rank_stays_dense_and_costly_factors_are_reported():
    model = Zoo()
    compact = factorize(model, {"square": 16, "pointwise": 8, "tall": 5, "column": 7})
    report = {layer.name: layer for layer in compact.factorization}
    assert isinstance(compact.square, nn.Conv2d)
    assert (report["square"].action, report["square"].reason) == ("dense", "full rank")
    assert report["pointwise"].reason == "factors cost 1.00 of the dense layer"  # 8·(16 + 16) = 16·16
    assert report["tall"].reason == ""  # 5·(40 + 16) < 40·16
    assert "dense layer" not in report["column"].reason  # 7·(8 + 200) < 8·200
    assert [layer.rank for layer in compact.factorization] == [16, 8, 5, 7]
    energies = torch.linalg.svdvals(model.tall.weight.flatten(1).double()).square()
    assert report["tall"].energy_kept == pytest.approx((energies[:5].sum() / energies.sum()).item())


@pytest.mark.parametrize(("scale", "action"), [(0.0, "constant"), (1e-9, "constant"), (1.0, "factorized")])
@pytest.mark.parametrize("folded", [False, True])
def test_a_dead_layer_becomes_its_bias(scale, action, folded):
    model = low_rank_zoo()
    with torch.no_grad():
        for layer in (model.square, model.tall, model.dilated):
            layer.weight.mul_(scale)
    compact = factorize(model, ZOO_RANKS)
    assert [layer.action for layer in compact.factorization] == [
        action,
        "factorized",
        action,
        "factorized",
        action,
    ]
    x = torch.rand(2, 3, 21, 18)
    other = fold_batchnorm(compact) if folded else compact
    with torch.no_grad():
        assert torch.allclose(other(x), model(x), atol=1e-6)


def test_a_dead_layer_in_a_network_that_writes_in_place():
    model = randomize_batchnorms(build_model("resnet18")).eval()
    dead = {"layer1.0.conv1": 3, "layer2.0.conv2": 3, "layer3.0.downsample.0": 3}
    for name in dead:
        nn.init.zeros_(model.get_submodule(name).weight)
    compact = factorize(model, dead)
    assert {type(compact.get_submodule(name)) for name in dead} == {ConstantOutput}
    assert_same_outputs(model, compact, images("resnet18"))
    assert_same_outputs(model, fold_batchnorm(compact), images("resnet18"))


def test_an_even_window_with_same_padding_cannot_become_constant_and_says_so_by_its_action():
    layer = nn.Conv2d(3, 4, 2, padding="same")
    nn.init.zeros_(layer.weight)
    with pytest.warns(UserWarning, match="padding='same'"):
        compact = factorize(nn.Sequential(layer), [2])
        x = torch.rand(1, 3, 5, 5)
        assert torch.equal(compact(x), layer(x))
    assert compact.factorization[0].action == "factorized"


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_padding_modes(padding_mode):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=(1, 2), padding_mode=padding_mode))
    LowRankProjector(model, [3]).step()
    assert_same_outputs(model, factorize(model, [3]), torch.rand(2, 3, 9, 8), 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lost_weights_are_an_error_that_names_the_layer(value):
    model = Zoo()
    model.column.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="weight of layer 'column'"):
        factorize(model, ZOO_RANKS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_by_hand(affine, bias):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 4, bias=bias),
    )
    model.append(nn.BatchNorm1d(4, affine=affine))
    for bn in (model[1], model[5]):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.2, 3)
        if affine:
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
    model.train()
    folded = fold_batchnorm(model)
    assert model.training
    assert not folded.training
    assert_same_outputs(model.eval(), folded, torch.rand(5, 3, 3, 3), 1e-5)
    assert [type(module) for module in folded] == [
        nn.Conv2d,
        nn.Identity,
        nn.ReLU,
        nn.Flatten,
        nn.Linear,
        nn.Identity,
    ]


def test_a_batchnorm_that_cannot_be_folded_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), randomize_batchnorms(nn.BatchNorm2d(8))).eval()
    folded = fold_batchnorm(model)
    assert isinstance(folded[2], nn.BatchNorm2d)
    assert_same_outputs(model, folded, torch.rand(2, 3, 8, 8), 0)


def test_folding_an_untraceable_model_takes_stated_pairs():
    class Branching(Zoo):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = randomize_batchnorms(Branching()).eval()
    with pytest.raises(ValueError, match="batchnorms"):
        fold_batchnorm(model)
    folded = fold_batchnorm(model, {"square": "bn", "pointwise": None})
    assert isinstance(folded.bn, nn.Identity)
    assert isinstance(folded.bn2, nn.BatchNorm2d)
    assert_same_outputs(model, folded, torch.rand(2, 3, 12, 12))


def dead_and_compact():
    """A low-rank zoo with a dead layer, a dense one and factors."""
    model = low_rank_zoo()
    nn.init.zeros_(model.tall.weight)
    return factorize(model, ZOO_RANKS | {"square": 16})


@pytest.mark.parametrize("folded", [False, True])
def test_saving_and_loading_give_the_same_network(tmp_path, folded):
    compact = dead_and_compact()
    compact = fold_batchnorm(compact) if folded else compact
    path = tmp_path / "net.safetensors"
    save_compact(compact, path, model="zoo", seed=3)
    fresh = Zoo().eval()
    before = copy.deepcopy(fresh.state_dict())
    again = load_compact(path, fresh)
    state = again.state_dict()
    assert list(state) == list(compact.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in compact.state_dict().items())
    x = torch.rand(2, 3, 21, 18)
    assert torch.equal(again(x), compact(x))
    assert [(a.name, a.rank, a.action) for a in again.factorization] == [
        (c.name, c.rank, c.action) for c in compact.factorization
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lrpet"])
    assert (header["model"], header["seed"]) == ("zoo", 3)
    save_compact(
        again, tmp_path / "again.safetensors", model="zoo", seed=3
    )  # a loaded network can be saved as well
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_file_holds_the_factors_and_no_dense_weight(tmp_path):
    model = build_model("resnet20")
    ranks = ranks_from_ratio(model, 0.57)
    compact = factorize(model, ranks)
    path = tmp_path / "net.safetensors"
    save_compact(compact, path)
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert not any(f"{name}.weight" in shapes for name in ranks)
    assert shapes["blocks.8.conv2.0.weight"] == (27, 64, 3, 3)
    assert shapes["blocks.8.conv2.1.weight"] == (64, 27, 1, 1)
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in compact.state_dict().values())
    assert numbers < path.stat().st_size < numbers + 20_000
    assert path.stat().st_size < 0.7 * sum(p.numel() * 4 for p in model.parameters())


def test_a_network_that_was_not_factorized_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"Zoo was not made by factorize\(\)"):
        save_compact(Zoo(), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    save_compact(dead_and_compact(), path)
    return path


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(saved, tmp_path, length):
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"net\.safetensors is not a whole safetensors file"):
        load_compact(path, Zoo())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_flipped_bit_of_the_header_goes_unnoticed_or_ends_in_another_error(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 4, 1))
    nn.init.zeros_(model[1].weight)
    compact = factorize(model, {"0": 1, "1": 2})
    path = tmp_path / "net.safetensors"
    save_compact(compact, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(8 + struct.unpack("<Q", whole[:8])[0]):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            state = load_compact(path, model).state_dict()
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert all(torch.equal(tensor, state[name]) for name, tensor in compact.state_dict().items())
    assert refused > 300


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 this is a zip file", b"\x00" * 100, json.dumps({"a": 1}).encode()]
)
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="foreign is not a whole safetensors file"):
        load_compact(path, Zoo())


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no lrpet header"):
        load_compact(path, Zoo())


@pytest.mark.parametrize(
    "other",
    [lambda: build_model("resnet20"), lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), lambda: nn.Linear(2, 2)],
)
def test_another_architecture_is_refused(saved, other):
    with pytest.raises(ValueError, match=r"net\.safetensors does not fit"):
        load_compact(saved, other())


@pytest.mark.parametrize(("name", "classes"), [("resnet20", 10), ("resnet8", 5)])
def test_another_depth_or_number_of_classes_is_refused(tmp_path, name, classes):
    model = build_model("resnet8")
    save_compact(factorize(model, ranks_from_ratio(model, 0.57)), tmp_path / "net")
    with pytest.raises(ValueError, match="does not fit a CifarResNet"):
        load_compact(tmp_path / "net", build_model(name, classes))


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_compact(tmp_path / "nothing", Zoo())


def test_gains_are_measured_once_for_each_distinct_layer_on_its_own_inputs(monkeypatch):
    model, seen = build_model("resnet20").train(), []

    def measure(tasks, rounds, device):
        seen.append([task().shape for task in tasks.values()])
        return {"dense": {"ratio_to_first": float(len(seen))}}

    monkeypatch.setattr("lrpet.lowrank.gains.side_by_side", measure)
    ranks = ranks_from_ratio(model, 0.57)
    before = copy.deepcopy(model.state_dict())
    gains = measure_gains(model, ranks, images("resnet20"))
    assert list(gains) == list(ranks)
    assert len(seen) == 6  # the first, three widths, two strided ones
    assert all(factors == dense for factors, dense in seen)
    assert seen[-1][0] == (2, 64, 8, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model(images("resnet20"))
    assert len(seen) == 6  # no hook is left


def test_layers_that_lose_stay_dense_and_say_by_how_much(monkeypatch, tmp_path):
    model = low_rank_zoo()
    x = torch.rand(2, 3, 21, 18)
    monkeypatch.setattr(
        FACTORIZE,
        "measure_gains",
        lambda *_, **__: {"square": 0.9, "pointwise": 1.0, "tall": 1.2, "column": 1.9, "dilated": 0.5},
    )
    compact = factorize(model, ZOO_RANKS, min_gain=1.0, example_inputs=x)
    report = {layer.name: layer for layer in compact.factorization}
    assert {name for name, layer in report.items() if layer.action == "dense"} == {"square", "dilated"}
    assert report["square"].reason == "measured: factors 0.90 times as fast, less than 1"
    assert report["square"].energy_kept == pytest.approx(1.0)
    assert isinstance(compact.square, nn.Conv2d)
    assert isinstance(compact.tall, nn.Sequential)
    assert_same_outputs(model, compact, x, 1e-5)
    save_compact(compact, tmp_path / "net.safetensors")
    assert_same_outputs(compact, load_compact(tmp_path / "net.safetensors", model), x, 0)


def test_real_gains_are_positive_numbers():
    model = low_rank_zoo(ZOO_RANKS | {"head": 2})
    gains = measure_gains(model, ZOO_RANKS | {"head": 2, "square": 16}, torch.rand(2, 3, 21, 18), rounds=2)
    assert set(gains) == set(ZOO_RANKS) - {"square"} | {"head"}
    assert min(gains.values()) > 0


@pytest.mark.parametrize("options", [{"min_gain": 1.0}, {"example_inputs": torch.ones(1)}], ids=str)
def test_a_gain_without_an_example_is_refused(options):
    with pytest.raises(ValueError, match="min_gain and example_inputs go together"):
        factorize(Zoo(), ZOO_RANKS, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_half_precision_keeps_its_dtype_when_a_float32_batchnorm_is_folded(dtype, bias):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), randomize_batchnorms(nn.BatchNorm2d(8))).eval()
    expected = fold_batchnorm(model)
    model[0].to(dtype)
    folded = fold_batchnorm(model)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    x = torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        error = (folded(x.to(dtype)).float() - expected(x)).abs().max()
    assert error < 0.05 * expected(x).abs().max()


def test_gains_leave_neither_hooks_nor_eval_mode_after_an_error():
    model = low_rank_zoo().train()
    model.bn2.eval()
    with pytest.raises(RuntimeError):
        measure_gains(model, ZOO_RANKS, torch.rand(2, 4, 21, 18))
    assert model.training and not model.bn2.training
    assert not any(module._forward_hooks for module in model.modules())
