"""The method in one object: its schedule, its warnings, that it resumes bit for bit, several processes."""

import io

import pytest
import torch
import torch.distributed as dist
from helpers import in_two_processes, refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lrpet
from lrpet import Compressor, LowRankProjector, RunConfig, factorize, ranks_for_budget, ranks_from_ratio
from lrpet.methods.base import is_due

X = torch.linspace(-1, 1, 4 * 3 * 12 * 12).reshape(4, 3, 12, 12)


def network():
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def start(seed=0, **settings):
    torch.manual_seed(seed)
    model = network()
    settings = settings or {"prune_ratio": 0.5}
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), Compressor(model, **settings)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def rank_of(layer):
    return int(torch.linalg.matrix_rank(layer.weight.flatten(1).double(), rtol=1e-5))


def test_it_does_bit_for_bit_what_its_parts_do():
    (model, optimizer, compressor), other = start(), start()[:2]
    projector = LowRankProjector(other[0], ranks_from_ratio(other[0], 0.5))
    for _ in range(3):
        train(model, optimizer, steps=2)
        train(*other, steps=2)
        assert str(compressor.step()) == str(projector.step()) == str(compressor.report())
    compact, twin = compressor.finish(), factorize(other[0], projector.ranks)
    assert all(map(torch.equal, compact.state_dict().values(), twin.state_dict().values()))
    torch.testing.assert_close(compact.eval()(X), model.eval()(X))
    assert [rank_of(model[i]) for i in (0, 3)] == [4, 8] == list(compressor.ranks.values())


@pytest.mark.parametrize("every, warmup", [(1, 0), (3, 0), (2, 5), (4, 8)])
def test_the_schedule_is_that_of_the_runs(every, warmup):
    model, _, compressor = start(prune_ratio=0.5, every=every, warmup=warmup, unit="iteration")
    config = RunConfig(projection_interval=every, projection_unit="iteration")
    due = [step for step in range(1, 13) if step >= warmup and is_due(config, step, 100)]
    assert [step for step in range(1, 13) if compressor.step() is not None] == due


def test_ranks_fall_along_a_cubic_curve_where_the_schedule_is_gradual():
    model, optimizer, compressor = start(ranks=[8, 4], warmup=1, gradual=4)
    ranks = []
    for _ in range(6):
        train(model, optimizer)
        ranks.append(compressor.step()[1].rank)
        assert rank_of(model[3]) == ranks[-1]
    # 12 of 16 go: after 0, ¼, ½, ¾ and all of the way 0, 6.9, 10.5, 11.8 and 12 of them
    assert ranks == [16, 10, 6, 5, 4, 4]
    assert factorize(model, [8, 4])[3].rank == compressor.finish()[3].rank == 4


@pytest.mark.parametrize("way", ["ratio", "budget", "list", "plan"])
def test_ranks_come_from_a_ratio_a_budget_a_list_or_a_plan(way):
    model, x = network(), X[:1]
    if way == "ratio":
        compressor = Compressor(model, prune_ratio=0.5, include="*", exclude="7")
        assert compressor.ranks == ranks_from_ratio(model, 0.5)
    elif way == "budget":
        compressor = Compressor(model, macs_reduction=0.4, example_inputs=x)
        assert compressor.ranks == ranks_for_budget(model, macs_reduction=0.4, example_inputs=x)
        assert compressor.plan.macs_share > 0.9
    elif way == "list":
        assert Compressor(model, [3, 5]).ranks == {"0": 3, "3": 5}
        return
    else:
        plan = lrpet.select(model, exclude="0", prune_ratio=0.25)
        compressor = Compressor(model, plan)
        assert compressor.ranks == {"3": 12}
    assert dict(compressor.plan) == compressor.ranks


def test_training_after_the_last_projection_is_warned_of_and_projected():
    model, optimizer, compressor = start(prune_ratio=0.5, every=2)
    for _ in range(3):
        train(model, optimizer)
        compressor.step()
    assert rank_of(model[3]) > 8
    with pytest.warns(UserWarning, match="have changed since the last projection, after 2 epochs: finish"):
        compact = compressor.finish()
    assert rank_of(model[3]) == 8
    torch.testing.assert_close(compact.eval()(X), model.eval()(X))
    compressor.finish()  # nothing to warn of any more


def test_weights_that_came_back_are_not_taken_for_changed():
    model, _, compressor = start()
    compressor.step()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nn.init.zeros_(model[0].weight)
    model.load_state_dict(kept, assign=True)
    compressor.finish()


def test_no_projection_at_all_is_warned_of():
    _, _, compressor = start(prune_ratio=0.5, warmup=5)
    assert compressor.step() is None and len(compressor.report()) == 0
    assert "nothing so far" in str(compressor.report()) and compressor.report().metrics() == {}
    with pytest.warns(UserWarning, match="nothing was projected in 1 epochs"):
        compressor.finish()


def test_ranks_that_had_not_come_down_are_warned_of():
    model, _, compressor = start(prune_ratio=0.5, gradual=10)
    compressor.step()
    with pytest.warns(UserWarning, match="ranks had not come down to those of the plan after 1 epochs"):
        compressor.finish()
    assert rank_of(model[3]) == 8


def test_a_projection_that_took_no_layer_is_warned_of():
    model, _, compressor = start()
    for layer in (model[0], model[3]):
        layer.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="no layer was projected: frozen"):
        compressor.step()


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(stop):
    settings = {"macs_reduction": 0.4, "example_inputs": X, "every": 2, "warmup": 1, "gradual": 3}
    whole = start(**settings)
    for step in range(6):
        if step == stop:
            states = saved(*whole)
        train(*whole[:2])
        whole[2].step()
    states = saved(*whole) if stop == 6 else states
    again = start(1, **settings)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for _ in range(stop, 6):
        train(*again[:2])
        again[2].step()
    assert all(map(torch.equal, whole[0].state_dict().values(), again[0].state_dict().values()))
    assert str(whole[2].report()) == str(again[2].report())
    assert whole[2].state_dict()["projected"] == again[2].state_dict()["projected"]
    a, b = whole[2].finish(), again[2].finish()
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_the_ranks_of_a_state_are_taken_and_another_state_is_refused():
    first, state = start(ranks=[2, 3])[2], start(ranks=[4, 5])[2].state_dict()
    first.load_state_dict(state)
    assert first.ranks == dict(first.plan) == {"0": 4, "3": 5}
    first.step()
    assert [rank_of(first.model[i]) for i in (0, 3)] == [4, 5]
    before = first.state_dict()
    for wrong, *words in (
        (start(ranks=[4, 5], every=2)[2].state_dict(), "every=2", "every=1"),
        (start(ranks=[4, 5], keep_share=0.5)[2].state_dict(), "keep_share=0.5", "keep_share=0.0"),
        (start(ranks={"3": 4})[2].state_dict(), "layer '0'"),
        ({}, "state_dict() of a Compressor", "{}"),
    ):
        refused(lambda wrong=wrong: first.load_state_dict(wrong), *words)
    assert str(first.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({}, ValueError, ["give one of", "none"]),
        ({"prune_ratio": 0.5, "ranks": [2, 3]}, ValueError, ["give one of", "ranks and prune_ratio"]),
        ({"macs_reduction": 0.5}, ValueError, ["example_inputs"]),
        ({"ranks": [2, 3], "include": "*"}, ValueError, ["ranks names the layers"]),
        ({"prune_ratio": 0.5, "include": "x*"}, ValueError, ["no layer takes part"]),
        ({"prune_ratio": 0.5, "every": 0}, ValueError, ["every", "1 or more", "got 0"]),
        ({"prune_ratio": 0.5, "warmup": -1}, ValueError, ["warmup", "0 or more"]),
        ({"prune_ratio": 0.5, "gradual": 2.0}, TypeError, ["gradual", "whole number", "2.0"]),
        ({"prune_ratio": 0.5, "unit": "step"}, ValueError, ["unit", "'epoch' or 'iteration'", "'step'"]),
        ({"prune_ratio": "0.5"}, TypeError, ["prune_ratio", "'0.5'"]),
    ],
)
@pytest.mark.filterwarnings("ignore:only 0.0%")
def test_bad_settings_are_refused(settings, kind, words):
    refused(lambda: Compressor(network(), **settings), *words, kind=kind)


def test_a_frozen_layer_cannot_be_given_a_rank():
    model = network()
    model[0].weight.requires_grad_(False)
    refused(lambda: Compressor(model, [2, 3]), "layer '0'", "frozen")
    assert Compressor(model, prune_ratio=0.5).ranks == {"3": 8}


def train_together(rank, store, pipe):
    """Be one of two processes that train one network, each with BatchNorm statistics of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(network)
    with torch.no_grad():
        network[1].running_var.fill_(1 + 3 * rank)
        network[1].running_var[rank] = 20
    compressor = Compressor(model, {"module.0": 2})
    compressor.step()
    pipe.send((network[0].weight.tolist(), compressor.finish()[0].weight.tolist()))
    dist.destroy_process_group()


def test_all_processes_have_the_weights_that_the_first_projected(tmp_path):
    results = in_two_processes(train_together, tmp_path / "store")
    assert results[0] == results[1] is not None
