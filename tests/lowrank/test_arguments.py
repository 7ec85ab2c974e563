"""Arguments of the library: old names, numbers of NumPy, wrapped networks."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import refused
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lrpet
from lrpet.lowrank import (
    compressible_layers,
    find_batchnorms,
    leading_basis,
    measure_gains,
    normalized_weights,
    project_and_measure,
    project_on_basis_,
    projection_groups,
    rank_from_ratio,
    resolve_batchnorms,
    resolve_ranks,
    truncated_svd,
)

X = torch.linspace(-1, 1, 8 * 36).reshape(1, 8, 6, 6)
NUMBERS = [np.int64, np.int8, np.uint8]


def network():
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(256, 4)).eval()


def on_basis(**settings):
    M = torch.eye(3)
    project_on_basis_(M[None], leading_basis(torch.eye(3, dtype=torch.float64)[None], 1), **settings)
    return M


OLD = {  # a call, its old name, its new name, the value
    "project": (lambda **s: lrpet.project(torch.eye(3), 1, **s), "residual", "keep_share", 0.5),
    "project_and_measure": (
        lambda **s: project_and_measure(torch.eye(3), 1, **s)[0],
        *("residual", "keep_share", 0.5),
    ),
    "project_on_basis_": (on_basis, "residual", "keep_share", 0.5),
    "LowRankProjector": (
        lambda **s: lrpet.LowRankProjector(network(), [2], **s).settings["keep_share"],
        *("residual", "keep_share", 0.5),
    ),
    "ranks_from_ratio": (
        lambda **s: lrpet.ranks_from_ratio(network(), 0.5, **s),
        *("layers", "include", "*"),
    ),
    "ranks_for_budget": (
        lambda **s: lrpet.ranks_for_budget(network(), (8, 6, 6), 0.5, **s),
        *("layers", "include", "0"),
    ),
    "compressible_layers": (lambda **s: compressible_layers(network(), **s), "layers", "include", "3"),
    "projection_groups": (
        lambda **s: [name for name, _ in projection_groups(network(), "galore", rank=2, **s)[0]["params"]],
        *("layers", "include", "3"),
    ),
    "measure_gains": (
        lambda **s: list(measure_gains(network(), [2], rounds=1, **s)),
        *("example", "example_inputs", X),
    ),
    "factorize": (
        lambda **s: lrpet.factorize(network(), [2], min_gain=0.0, **s)[0].rank,
        *("example", "example_inputs", X),
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_old_names_go_on_working_with_a_warning(name):
    call, old, new, value = OLD[name]
    with pytest.warns(DeprecationWarning, match=f"{name}.*: {old} is called {new} now") as caught:
        before = call(**{old: value})
    assert caught[0].filename == __file__
    after = call(**{new: value})
    assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    words = (name, f"{new} and its old name, {old}")
    refused(lambda: call(**{old: value, new: value}), *words, kind=TypeError)


@pytest.mark.parametrize("whole", NUMBERS)
def test_whole_numbers_of_numpy_are_taken_wherever_a_rank_is(whole):
    M, two = torch.arange(48.0).reshape(6, 8).sin(), whole(2)
    assert torch.equal(lrpet.project(M, two), lrpet.project(M, 2))
    assert all(map(torch.equal, truncated_svd(M, two), truncated_svd(M, 2)))
    assert rank_from_ratio(whole(16), 0.57) == 6
    for ranks in ([two], {"0": two}, np.array([2], dtype=whole)):
        assert resolve_ranks(network(), ranks) == {"0": 2}
        assert lrpet.LowRankProjector(network(), ranks).step()[0].rank == 2
        assert type(lrpet.factorize(network(), ranks).factorization[0].rank) is int
        assert lrpet.cost(network(), (8, 6, 6), ranks).layers[0].rank == 2
    plan = lrpet.select(network()).with_ranks({"0": two})
    assert type(lrpet.Compressor(network(), plan).state_dict()["ranks"]["0"]) is int
    assert lrpet.cost(network(), tuple(map(whole, (8, 6, 6)))) == lrpet.cost(network(), (8, 6, 6))
    assert lrpet.build_model("resnet8", whole(7)).fc.out_features == 7
    settings = lrpet.Compressor(network(), prune_ratio=0.5, every=two, warmup=two, gradual=two).schedule
    assert {type(value) for value in settings.values()} == {str, int}


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_numbers_of_numpy_are_taken_wherever_a_ratio_is(number):
    half = number(0.5)
    assert rank_from_ratio(16, half) == 8
    assert lrpet.select(network(), prune_ratio=half) == {"0": 8} == lrpet.ranks_from_ratio(network(), half)
    assert lrpet.ranks_for_budget(network(), (8, 6, 6), half) == lrpet.ranks_for_budget(
        network(), (8, 6, 6), 0.5
    )
    compressor = lrpet.Compressor(network(), prune_ratio=half, keep_share=half, row_eps=number(1e-3))
    assert compressor.step()[0].rank == 8


def test_a_plan_is_taken_by_all_that_takes_ranks(tmp_path):
    model, plan = network(), lrpet.select(network(), "*", prune_ratio=0.75)
    assert dict(plan) == resolve_ranks(model, plan) == {"0": 4, "3": 1}
    assert [layer.rank for layer in lrpet.LowRankProjector(model, plan).step()] == [4, 1]
    assert set(measure_gains(model, plan, X, rounds=1)) == {"0", "3"}
    assert lrpet.cost(model, (8, 6, 6), plan).macs < lrpet.cost(model, (8, 6, 6)).macs
    compact = lrpet.factorize(model, plan)
    torch.testing.assert_close(compact(X), model(X), rtol=1e-4, atol=1e-4)
    lrpet.save_compact(compact, tmp_path / "net.safetensors")
    assert lrpet.Compressor(model, plan).ranks == dict(plan)
    for chosen in (
        lrpet.ranks_from_ratio(model, 0.5, include=plan),
        lrpet.ranks_for_budget(model, (8, 6, 6), 0.5, include=plan, exclude="3"),
    ):
        assert isinstance(chosen, type(plan)) and list(chosen)[0] == "0"
    assert lrpet.ranks_from_ratio(model, 0.5, include=plan, exclude=["3"]) == {"0": 8}


class _FabricModule(nn.Module):
    """Like the one of Lightning Fabric, which keeps the network twice."""

    def __init__(self, network):
        super().__init__()
        self._forward_module, self._original_module = nn.DataParallel(network), network

    def forward(self, *inputs):
        return self._forward_module(*inputs)


@pytest.fixture
def alone_in_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "DistributedDataParallel": DistributedDataParallel,
    "Fabric": _FabricModule,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
    "averaged compiled": lambda model: AveragedModel(torch.compile(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_public_function_looks_inside_a_wrapper(wrapper, tmp_path, alone_in_a_group):
    net = network()
    model = WRAPPERS[wrapper](net)
    prefix = next(name for name, _ in model.named_parameters()).removesuffix("0.weight")
    assert prefix
    pairs = {prefix + "0": prefix + "1", "3": None}
    assert dict(lrpet.select(model, "*", prune_ratio=0.5)) == {"0": 8, "3": 2}
    assert lrpet.ranks_from_ratio(model, 0.5) == resolve_ranks(model, {prefix + "0": 8}) == {"0": 8}
    assert set(lrpet.ranks_for_budget(model, (8, 6, 6), 0.5, allocation="energy")) == {"0"}
    assert compressible_layers(model) == {"0": (16, 72)}
    assert find_batchnorms(model) == resolve_batchnorms(model, ["0", "3"], pairs) == {"0": "1", "3": None}
    assert len(normalized_weights(model)) == 1
    assert measure_gains(model, [2], X, rounds=1).keys() == {"0"}
    assert lrpet.cost(model, (8, 6, 6), [8]) == lrpet.cost(net, (8, 6, 6), [8])
    groups = projection_groups(model, "galore", include="3", rank=2)
    assert [name for name, _ in groups[0]["params"]] == ["3.weight"]
    assert lrpet.LowRankProjector(model, [8], batchnorms=pairs).step()[0].action == "projected"
    compressor = lrpet.Compressor(model, prune_ratio=0.5)
    compressor.step()
    compact = compressor.finish()
    inside = compressor.model
    assert type(inside) is type(compact) is nn.Sequential
    for small in (compact, lrpet.factorize(model, [8]), lrpet.fold_batchnorm(model, pairs)):
        torch.testing.assert_close(small.eval()(X), inside.eval()(X), rtol=1e-4, atol=1e-4)
    lrpet.save_compact(WRAPPERS[wrapper](compact), tmp_path / "net.safetensors")
    again = lrpet.load_compact(tmp_path / "net.safetensors", model)
    assert all(map(torch.equal, again.state_dict().values(), compact.state_dict().values()))


def test_a_network_is_not_taken_for_a_wrapper_because_its_only_part_is_called_module():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

        def forward(self, x):
            return 2 * self.module(x)

    model = Doubles().eval()
    ranks = lrpet.ranks_from_ratio(model, 0.5)
    lrpet.LowRankProjector(model, ranks).step()
    assert ranks == {"module.0": 8}
    torch.testing.assert_close(lrpet.factorize(model, ranks)(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_sharded_network_is_refused_by_name_and_the_advice_works(alone_in_a_group):
    model, dense = network(), network()
    projector = lrpet.LowRankProjector(model, [2])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for call in (
        projector.step,
        lambda: lrpet.select(model),
        lambda: lrpet.ranks_from_ratio(model, 0.5),
        lambda: lrpet.cost(model, (8, 6, 6)),
        lambda: lrpet.factorize(model, [2]),
        lambda: lrpet.fold_batchnorm(model),
        lambda: lrpet.Compressor(model, prune_ratio=0.5),
        lambda: lrpet.LowRankProjector(nn.ModuleDict({"net": model}), {"net.0": 2}),
    ):
        refused(call, "FSDP", "full_state_dict=True")
    options = StateDictOptions(full_state_dict=True)
    dense.load_state_dict(get_model_state_dict(model, options=options))
    lrpet.LowRankProjector(dense, [2]).step()
    set_model_state_dict(model, dense.state_dict(), options=options)
    assert torch.equal(model[0].weight.full_tensor(), dense[0].weight)


def test_nothing_warns_of_an_old_name_in_the_library_itself():
    model = copy.deepcopy(network())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        compressor = lrpet.Compressor(model, macs_reduction=0.5, example_inputs=X, keep_share=0.1)
        compressor.step()
        compressor.finish()
