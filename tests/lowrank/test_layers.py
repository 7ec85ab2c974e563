"""What counts as a layer and as a weight: other kinds, subclasses, computed, shared, frozen ones."""

import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ZOO_RANKS, Zoo, randomize_batchnorms
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from lrpet import (
    LowRankProjector,
    RunConfig,
    build_model,
    cost,
    factorize,
    fold_batchnorm,
    load_compact,
    ranks_for_budget,
    ranks_from_ratio,
    save_compact,
    select,
)
from lrpet.lowrank import LowRankConv2d, LowRankLinear, compressible_layers, resolve_ranks
from lrpet.lowrank.layers import matrix_of
from lrpet.paths import PROJECT


class Conv1D(nn.Module):
    """Stands for the layer of GPT-2 in transformers.pytorch_utils, whose weight is (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Standardized(nn.Conv2d):
    """A convolution with a forward of its own, as timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def difference(model, other, x):
    with torch.no_grad():
        reference = model(x)
        return ((other(x) - reference).abs().max() / reference.abs().max()).item()


def rank_of(layer):
    return int(torch.linalg.matrix_rank(matrix_of(layer).detach().double(), rtol=1e-4))


def reasons(model, include=None):
    """Why each layer is left out; of a plan that covers little."""
    with pytest.warns(UserWarning, match="of the model's parameters"):
        return {row.name: row.reason for row in select(model, include).layers}


KINDS = {
    "Conv1d": (nn.Conv1d(8, 12, 3, 2, 1), nn.BatchNorm1d(12), (8, 9), 12 * 8 * 3),
    "Conv3d": (nn.Conv3d(6, 8, 3, padding=1), nn.BatchNorm3d(8), (6, 4, 5, 3), 8 * 6 * 27),
    "ConvTranspose1d": (nn.ConvTranspose1d(8, 6, 4, 2, 1), nn.BatchNorm1d(6), (8, 9), 8 * 6 * 4),
    "ConvTranspose2d": (
        nn.ConvTranspose2d(10, 7, 3, 2, 1, output_padding=1, dilation=1),
        nn.BatchNorm2d(7),
        (10, 5, 6),
        10 * 7 * 9,
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(6, 5, 2, 2), nn.BatchNorm3d(5), (6, 3, 2, 4), 6 * 5 * 8),
    "Conv1D": (Conv1D(16, 12), None, (3, 12), 16 * 12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_other_kinds_are_projected_factorized_folded_and_counted_exactly(kind, tmp_path):
    layer, bn, shape, weights = KINDS[kind]
    model = nn.Sequential(layer) if bn is None else nn.Sequential(layer, randomize_batchnorms(bn))
    model, x = model.eval(), torch.randn(2, *shape)
    assert compressible_layers(model, "*")["0"][0] * compressible_layers(model, "*")["0"][1] == weights
    report = LowRankProjector(model, {"0": 3}).step()[0]
    assert (report.action, rank_of(layer)) == ("projected", 3)
    compact = factorize(model, {"0": 3})
    assert difference(model, compact, x) < 1e-5
    assert compact[0].weight.shape == (layer.weight.shape if kind != "Conv1D" else (16, 12))
    assert difference(model, fold_batchnorm(compact), x) < 1e-5
    assert difference(model, fold_batchnorm(model), x) < 1e-5
    assert bn is None or isinstance(fold_batchnorm(model)[1], nn.Identity)
    promised, real = cost(model, shape, {"0": 3}), cost(compact, shape)
    assert (promised.macs, promised.params) == (real.macs, real.params)
    save_compact(compact, tmp_path / "net")
    assert difference(compact, load_compact(tmp_path / "net", model), x) == 0


def test_the_energy_that_energy_transfer_keeps_is_that_of_the_matrix_of_a_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(10, 7, 3))
    before = model[0].weight.square().sum().item()
    LowRankProjector(model, {"0": 2}).step()
    assert model[0].weight.square().sum().item() == pytest.approx(before, rel=1e-5)


def test_a_subclass_with_a_forward_of_its_own_is_left_out_by_name_and_reason():
    model = nn.Sequential(Standardized(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert ranks_from_ratio(model, 0.5) == {"1": 4}
    report = LowRankProjector(model, {"1": 4}).step()
    assert "Standardized is a subclass of Conv2d" in report[1].reason
    for use in (LowRankProjector, factorize):
        with pytest.raises(ValueError, match="layer '0' .*Standardized is a subclass of Conv2d"):
            use(model, {"0": 3})
    row = cost(model, (3, 8, 8)).layers[0]
    assert (row.kind, row.macs) == ("Standardized", 8 * 27 * 36)


def test_a_lazy_layer_counts_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 8, 3))
    assert list(compressible_layers(model)) == ["1"]
    with pytest.raises(ValueError, match="layer '0' .*run the model once"):
        resolve_ranks(model, {"0": 3})
    model(torch.rand(1, 3, 8, 8))
    assert list(compressible_layers(model)) == ["0", "1"]


COMPUTED = {
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_the_layer_and_what_to_do(kind):
    model = nn.Sequential(COMPUTED[kind](nn.Conv2d(8, 16, 3)), nn.BatchNorm2d(16)).eval()
    for use in (LowRankProjector, factorize):
        with pytest.raises(ValueError, match="layer '0' .*weight is computed.*remove"):
            use(model, {"0": 3})
    assert "weight is computed" in reasons(model)["0"]
    folded = fold_batchnorm(model)  # left as it is, and right
    assert difference(model, folded, torch.rand(1, 8, 6, 6)) == 0


def test_a_bias_that_is_computed_is_refused():
    class Half(nn.Module):
        def forward(self, bias):
            return bias / 2

    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    parametrize.register_parametrization(model[0], "bias", Half())
    with pytest.raises(ValueError, match="layer '0' .*bias is computed"):
        factorize(model, {"0": 3})


class TwoNames(nn.Module):
    """Layers kept as attributes and strung together, as in temporal convolutional networks."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.net = nn.Sequential(self.conv, self.bn, nn.ReLU())

    def forward(self, x):
        return self.net(x)


def test_a_layer_under_two_names_is_one_layer(tmp_path):
    model, x = randomize_batchnorms(TwoNames()).eval(), torch.randn(2, 8, 6, 6)
    assert resolve_ranks(model, {"net.0": 2}) == {"conv": 2}
    with pytest.raises(ValueError, match="two ranks, by two names"):
        resolve_ranks(model, {"conv": 3, "net.0": 2})
    assert difference(model, fold_batchnorm(model), x) < 1e-6
    compact = factorize(model, {"conv": 2})
    assert compact.net[0] is compact.conv and isinstance(compact.conv, LowRankConv2d)
    assert difference(model, compact, x) > 0.1
    promised, real = cost(model, (8, 6, 6), {"conv": 2}), cost(compact, (8, 6, 6))
    assert (promised.macs, promised.params) == (real.macs, real.params)
    for network in (compact, fold_batchnorm(compact)):
        save_compact(network, tmp_path / "net")
        assert difference(network, load_compact(tmp_path / "net", model), x) == 0


class Tied(nn.Module):
    """Two layers that share a weight, each with a bias, and an embedding that shares one with the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(self.embed(x)))))


def test_a_shared_weight_is_projected_once_factorized_together_and_saved(tmp_path):
    model, x = Tied(), torch.arange(10)
    energy = model.a.weight.square().sum().item()
    assert list(compressible_layers(model, "*")) == ["a", "b"]
    reports = LowRankProjector(model, {"a": 3, "b": 3}).step()
    assert model.a.weight.square().sum().item() == pytest.approx(energy, rel=1e-5)
    assert [r.action for r in reports] == ["projected"] * 2
    assert "shares its weight with 'a'" in reports[1].reason
    compact = factorize(model, {"a": 3, "b": 3})
    assert compact.a[0].weight is compact.b[0].weight and compact.a[1].weight is compact.b[1].weight
    assert difference(model, compact, x) < 1e-5
    promised = cost(model, ranks={"a": 3, "b": 3}, example_inputs=x)
    real = sum(p.numel() for p in compact.parameters())
    assert promised.params == cost(compact, example_inputs=x).params == real
    save_compact(compact, tmp_path / "net")
    again = load_compact(tmp_path / "net", Tied())
    assert difference(compact, again, x) == 0 and again.a[0].weight is again.b[0].weight


def test_a_weight_shared_with_an_embedding_or_by_layers_of_other_ranks_is_refused():
    with pytest.raises(ValueError, match="layer 'head' .*also that of 'embed'"):
        resolve_ranks(Tied(), {"head": 3})
    with pytest.raises(ValueError, match="'a' and 'b' share one weight"):
        resolve_ranks(Tied(), {"a": 3})
    assert "embed" in reasons(Tied(), "*")["head"]


def test_a_shared_weight_is_not_rectified_by_either_batchnorm_and_folded_apart():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    randomize_batchnorms(model).eval()
    assert difference(model, fold_batchnorm(model), torch.rand(2, 4, 9, 9)) < 1e-5
    plain = nn.Conv2d(4, 4, 3)
    plain.load_state_dict(model[0].state_dict())
    LowRankProjector(plain, {"": 2}).step()
    LowRankProjector(model, {"0": 2, "2": 2}).step()
    torch.testing.assert_close(model[0].weight, plain.weight)


def test_a_frozen_layer_is_left_alone_and_said_to_be():
    model = randomize_batchnorms(Zoo())
    model.tall.weight.requires_grad_(False)
    before = model.tall.weight.clone()
    projector = LowRankProjector(model, ZOO_RANKS)
    report = {layer.name: layer for layer in projector.step()}
    assert (report["tall"].action, "frozen" in report["tall"].reason) == ("left alone", True)
    assert torch.equal(model.tall.weight, before) and report["square"].action == "projected"
    assert "frozen" in {row.name: row.reason for row in select(model).layers}["tall"]
    model.tall.weight.requires_grad_(True)
    assert {layer.name: layer.action for layer in projector.step()}["tall"] == "projected"


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(16, 8, 3, 3))


def new_layer(model):
    model[0] = nn.Conv2d(8, 16, 3)


def other_type(model):
    model.double()


@pytest.mark.parametrize("change", [assign, new_parameter, new_layer, other_type])
@pytest.mark.parametrize("fast", [False, True])
def test_what_replaces_a_weight_is_projected(change, fast):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    projector = LowRankProjector(model, {"0": 3}, fast=fast)
    projector.step()
    change(model)
    assert projector.step()[0].action == "projected"
    assert rank_of(model[0]) == 3


def mask(model):
    prune.l1_unstructured(model[0], "weight", 0.3)


def factors(model):
    model[0] = factorize(model, {"0": 2})[0]


def smaller(model):
    model[0] = nn.Conv2d(8, 2, 3)


def gone(model):
    del model[0]


def quantized(model):
    class Shards(nn.Parameter):
        pass

    model[0].weight = Shards(model[0].weight.detach())


def without_values(model):
    model[0] = nn.Conv2d(8, 16, 3, device="meta")


@pytest.mark.parametrize("change", [mask, factors, smaller, gone, quantized, without_values])
def test_what_can_no_longer_be_projected_is_an_error_that_names_it(change):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU())
    projector = LowRankProjector(model, {"0": 3})
    projector.step()
    change(model)
    with pytest.raises(ValueError, match="layer '0'|a layer that was to be projected is gone"):
        projector.step()


def test_layers_of_two_dtypes_are_projected_together():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, dtype=torch.float64))
    assert [r.action for r in LowRankProjector(model, {"0": 3, "1": 3}).step()] == ["projected"] * 2
    assert [rank_of(layer) for layer in model] == [3, 3]


def test_a_bare_layer_is_factorized_saved_and_loaded(tmp_path):
    layer, x = nn.Conv2d(8, 16, 3), torch.rand(1, 8, 6, 6)
    LowRankProjector(layer, {"": 3}).step()
    compact = factorize(layer, {"": 3})
    assert isinstance(compact, LowRankConv2d) and difference(layer, compact, x) < 1e-5
    save_compact(compact, tmp_path / "net")
    assert difference(compact, load_compact(tmp_path / "net", layer), x) == 0


class KeepsActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 16, 3)

    def forward(self, x):
        self.features = self.c(x)
        return self.features


def test_a_network_that_keeps_an_activation_or_a_lock_is_copied():
    keeps, locked = KeepsActivations(), nn.Sequential(nn.Conv2d(8, 16, 3))
    keeps(torch.randn(1, 8, 6, 6))
    locked.lock = threading.Lock()
    assert cost(keeps, (8, 6, 6)).macs == cost(locked, (8, 6, 6)).macs == 16 * 72 * 16
    assert factorize(keeps, {"c": 3}).factorization[0].action == "factorized"
    assert fold_batchnorm(factorize(locked, {"0": 3})).lock is locked.lock
    assert keeps.features.grad_fn is not None


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_wrapped_models_are_unwrapped(wrap):
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    model = wrap(net)
    inside = model.module if hasattr(model, "module") else net
    ranks = ranks_from_ratio(model, 0.5)
    assert ranks == {"0": 8} == resolve_ranks(model, {"module.0": 8})
    LowRankProjector(model, ranks).step()
    assert rank_of(inside[0]) == 8
    x = torch.rand(1, 8, 6, 6)
    assert difference(inside, factorize(model, ranks), x) < 1e-5
    assert difference(inside, fold_batchnorm(model), x) < 1e-5
    assert cost(model, (8, 6, 6), ranks).macs == cost(inside, (8, 6, 6), ranks).macs
    assert dict(ranks_for_budget(model, (8, 6, 6), 0.5)).keys() == {"0"}


def test_factors_answer_what_the_dense_layer_was_asked():
    conv, linear = nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(12, 20)
    compact = factorize(nn.ModuleList([conv, linear]), {"0": 3, "1": 4})
    assert isinstance(compact[1], LowRankLinear)
    assert list(compact.state_dict())[:2] == ["0.0.weight", "0.1.weight"]
    for setting in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(compact[0], setting) == getattr(conv, setting)
    assert (compact[1].in_features, compact[1].out_features, compact[1].rank) == (12, 20, 4)
    assert torch.equal(compact[0].bias, conv.bias) and torch.equal(compact[1].bias, linear.bias)
    x = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(F.conv2d(x, compact[0].weight, compact[0].bias, 2, 1), compact[0](x))
    x = torch.rand(2, 12)
    torch.testing.assert_close(F.linear(x, compact[1].weight, compact[1].bias), compact[1](x))
    with pytest.raises(AttributeError):
        compact[0].nothing  # noqa: B018


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_that_reads_the_weights_of_its_layers_runs_on_factors(training):
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    ranks = ranks_from_ratio(model, 0.5, include="linear*")
    LowRankProjector(model, ranks).step()
    assert list(ranks) == ["linear1", "linear2"]
    assert difference(model, factorize(model, ranks), torch.rand(2, 5, 16)) < 1e-4


def test_hooks_memory_format_and_modes_are_kept():
    model, calls = nn.Sequential(nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    compact = factorize(model, {"0": 3})
    compact(torch.rand(1, 8, 6, 6))
    assert calls == [1]
    assert compact[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_ranks_may_be_integers_of_numpy():
    ranks = resolve_ranks(Zoo(), {"tall": np.int64(3)})
    assert ranks == {"tall": 3} and type(ranks["tall"]) is int


@pytest.mark.parametrize(
    "path",
    sorted(PROJECT.glob("results/*/runs/*/compact-half.safetensors")),
    ids=lambda path: path.parent.name,
)
def test_committed_networks_still_load(path):
    config = RunConfig(**json.loads((path.parent / "config.json").read_text()))
    compact = load_compact(path, build_model(config.model))
    low_rank = any(isinstance(module, LowRankConv2d) for module in compact.modules())
    assert low_rank == (config.method != "dense")
