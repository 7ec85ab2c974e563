"""Several processes train one network: over gloo on this machine, started by the tests or by torchrun."""

import contextlib
import copy
import multiprocessing
import os
import socket
from collections import Counter

import pytest
import torch
from helpers import ZOO_RANKS, Zoo, randomize_batchnorms
from torch import nn

from lrpet import LowRankProjector, RunConfig, build_model, ranks_from_ratio
from lrpet.data import Batches, ImageData
from lrpet.processes import Processes, divide, join_processes

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("forkserver")  # imports everything once, so that a process starts in no time
FORK.set_forkserver_preload(["lrpet.__main__", "sklearn.datasets"])


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def be(environment, file, function, arguments):
    """Be one of several processes, and leave what the function returns in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    processes, _ = join_processes(CPU)
    torch.save(function(processes, *arguments), file)


def together(folder, world, function, *arguments):
    """Call a function in ``world`` processes that know of each other; return what it returns in each."""
    folder.mkdir(exist_ok=True)
    common = {name: value for name, value in os.environ.items() if name.startswith("LRPET_")}
    common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    files = [folder / f"{rank}.pt" for rank in range(world)]
    started = [
        FORK.Process(target=be, args=(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, file, function, arguments))
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * world
    return [torch.load(file, weights_only=False) for file in files]


def assert_same(states):
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


# ---------------------------------------------------------------- conversations


def converse(processes):
    rank, mixed = processes.rank, [torch.full((3,), processes.rank), torch.tensor(1.5 * processes.rank), torch.ones(2, 2).mT.bfloat16() * processes.rank]
    processes.copy_from(1, mixed)
    return {
        "now": processes,
        "share": processes.share(lambda: f"made by {rank}"),
        "sum": processes.sum(torch.tensor([rank, 1])).tolist(),
        "any": [processes.any(rank == 1), processes.any(False)],
        "mixed": [t.float().mean().item() for t in mixed],
    }


def test_what_processes_tell_each_other(tmp_path):
    heard = together(tmp_path, 3, converse)
    assert [h.pop("now") for h in heard] == [Processes(rank, 3, rank) for rank in range(3)]
    assert heard == [{"share": "made by 0", "sum": [3, 3], "any": [True, False], "mixed": [1.0, 1.5, 1.0]}] * 3


def take_turns(processes, folder):
    with processes.in_turn():
        found = (folder / "cache").exists()
        (folder / "cache").touch()
    return found


def test_one_process_of_a_machine_fills_the_cache_and_the_others_find_it(tmp_path):
    assert together(tmp_path, 3, take_turns, tmp_path) == [False, True, True]


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ({}, 2, [[], []]),
        ({"a": 1}, 3, [["a"], [], []]),
        ({"a": 1, "b": 9, "c": 2, "d": 7}, 2, [["a", "b"], ["c", "d"]]),
        (dict.fromkeys("abcd", 1), 1, [["a", "b", "c", "d"]]),
    ],
)
def test_work_is_divided_by_cost(costs, parts, expected):
    assert divide(costs, parts) == expected


# ---------------------------------------------------------------- the projection


def network(name):
    torch.manual_seed(5)
    model = randomize_batchnorms(Zoo() if name == "zoo" else build_model(name))
    return model, ZOO_RANKS | {"head": 2} if name == "zoo" else ranks_from_ratio(model, 0.57)


def project_together(processes, name, options, steps):
    """Project several times, with other BatchNorm statistics in each process."""
    model, ranks = network(name)
    torch.manual_seed(processes.rank)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and processes.rank:
            module.running_var.uniform_(0.5, 2)
    projector, noise, reports = LowRankProjector(model, ranks, **options), torch.Generator().manual_seed(7), []
    for step in range(steps):
        for p in model.parameters():
            p.data += 1e-3 * torch.randn(p.shape, generator=noise)
        reports.append(projector.step(exact=step == steps - 1))
    return {"state": {name: p.detach() for name, p in model.named_parameters()}, "reports": reports, "own": len(projector._shares[processes.rank])}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("name", "options"), [("resnet8", {}), ("zoo", {}), ("zoo", {"bn_rectification": False}), ("resnet20", {"fast": True})])
def test_weights_and_reports_are_the_same_bits_in_every_process_after_a_projection(tmp_path, world, name, options):
    alone = project_together(Processes(), name, options, 3)
    several = together(tmp_path, world, project_together, name, options, 3)
    assert all(process["own"] < alone["own"] for process in several)  # the work was divided
    assert_same([process["state"] for process in several])
    assert {str(process["reports"]) for process in several} == {str(several[0]["reports"])}
    for weight, expected in zip(several[0]["state"].values(), alone["state"].values(), strict=True):  # stacks differ, so bits may
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    for projected, expected in zip(several[0]["reports"][-1], alone["reports"][-1], strict=True):
        assert (projected.name, projected.rank, projected.action) == (expected.name, expected.rank, expected.action)
        assert projected.energy_kept == pytest.approx(expected.energy_kept, rel=1e-6, nan_ok=True)


def project_few(processes, spoil):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    if spoil and processes.first:
        model[1].running_var.fill_(float("nan"))
    model[3].weight.data *= 1e-9  # dead
    before = copy.deepcopy(model.state_dict())
    try:
        return LowRankProjector(model, {"0": 2, "2": 3, "3": 1}).step(), model.state_dict()
    except ValueError as error:
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("0.weight", "2.weight"))
        return str(error)


def test_fewer_layers_than_processes_and_a_dead_one(tmp_path):
    reports, states = zip(*together(tmp_path, 4, project_few, False), strict=True)
    assert_same(states)
    assert [(r.name, r.action) for r in reports[0]] == [("0", "projected"), ("2", "projected"), ("3", "left alone")]
    assert [str(r) for r in reports] == [str(reports[0])] * 4


def test_statistics_that_are_lost_are_an_error_in_every_process_and_nothing_is_projected(tmp_path):
    errors = together(tmp_path, 3, project_few, True)
    assert errors == ["NaN, infinity or overflow in the BatchNorm behind layer '0'; nothing was projected"] * 3


# ---------------------------------------------------------------- data


def numbered(n, test):
    """A data set whose images hold their own number."""
    images = lambda n: torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 4, 4, 3).contiguous()
    return ImageData(images(n), torch.arange(n), images(test), torch.arange(test), ("a", "b"), (0.0,) * 3, (1 / 255,) * 3, 4, pad=0, flip=False)


@pytest.mark.parametrize("pad", [1, None])
@pytest.mark.parametrize(("n", "batch", "world"), [(50, 16, 2), (50, 16, 4), (33, 16, 4), (30, 3, 4), (7, 16, 3)])
def test_every_image_is_served_once_an_epoch_whatever_the_number_of_processes(n, batch, world, pad):
    data = ImageData(**vars(numbered(n, 11)) | {"pad": pad, "image_size": 4 if pad else 3})
    parts = [Batches(data, batch, "cpu", seed=3, rank=rank, world=world) for rank in range(world)]
    whole = Batches(data, batch, "cpu", seed=3)
    for step, (batch_of_all, *of_each) in enumerate(zip(whole.epoch(2), *(part.epoch(2) for part in parts), strict=True)):
        x, y = batch_of_all
        assert len(y) == whole.size(step) == sum(len(labels) for _, labels in of_each)
        for rank, (images, labels) in enumerate(of_each):
            assert torch.equal(labels, y[rank::world]) and images.shape[1:] == x.shape[1:]
            torch.testing.assert_close(images, x[rank::world])  # the same crops
    served = [labels for part in parts for _, labels in part.test(4)]
    assert Counter(torch.cat(served).tolist()) == Counter(range(11)) and all(len(labels) <= 4 for labels in served)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 1), (1, 3), (4, 2)])
def test_an_epoch_that_another_number_of_processes_goes_on_with_serves_every_image_once(before, after):
    seen, data = Counter(), numbered(50, 4)
    for world, steps in ((before, slice(0, 2)), (after, slice(2, None))):
        for rank in range(world):
            part = Batches(data, 16, "cpu", seed=3, rank=rank, world=world)
            for _, y in list(part.epoch(1, steps.start))[: 2 if steps.stop else None]:
                seen.update(y.tolist())
    assert seen == Counter(range(50))
