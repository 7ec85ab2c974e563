"""Several processes train one network: over gloo on this machine, started by the tests or by torchrun."""

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY, outcome, randomize_batchnorms
from torch import nn

from lrpet import RunConfig, build_model, run
from lrpet.config import METHODS
from lrpet.data.batches import Batches
from lrpet.data.sets import ImageData, load_data
from lrpet.methods import make_method
from lrpet.paths import PROJECT
from lrpet.processes import Processes, join_processes
from lrpet.runs.store import is_complete, load_network, load_run
from lrpet.training.evaluate import evaluate
from lrpet.training.loop import Paused
from lrpet.training.step import Step

FORK = multiprocessing.get_context(
    "forkserver"
)  # imports everything once, so that a process starts in no time
FORK.set_forkserver_preload(
    ["lrpet.__main__", "sklearn.datasets", "torch._dynamo"]
)  # the last is what an optimizer imports


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def be(environment, file, function, arguments):
    """Be one of several processes, and leave what the function returns in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.save(function(join_processes(), *arguments), file)


def together(folder, world, function, *arguments):
    """Call a function in ``world`` processes that know of each other; return what it returns in each."""
    folder.mkdir(exist_ok=True)
    common = {name: value for name, value in os.environ.items() if name.startswith("LRPET_")}
    common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    files = [folder / f"{rank}.pt" for rank in range(world)]
    started = [
        FORK.Process(
            target=be, args=(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, file, function, arguments)
        )
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
    rank = processes.rank
    mixed = [torch.full((3,), rank), torch.tensor(1.5 * rank), torch.ones(2, 2).mT.bfloat16() * rank]
    processes.copy_from(1, mixed)
    return {
        "now": processes,
        "share": processes.share(lambda: f"made by {rank}"),
        "sum": processes.sum(torch.tensor([rank, 1])).tolist(),
        "any": processes.any(rank == 1, False),
        "same": [
            processes.same([torch.tensor(float("nan"))]),
            processes.same([torch.tensor(1), torch.tensor(float(rank))]),
        ],
        "mixed": [t.float().mean().item() for t in mixed],
    }


def test_what_processes_tell_each_other(tmp_path):
    heard = together(tmp_path, 3, converse)
    assert [h.pop("now") for h in heard] == [Processes(rank, 3, rank) for rank in range(3)]
    assert (
        heard
        == [
            {
                "share": "made by 0",
                "sum": [3, 3],
                "any": [True, False],
                "same": [True, False],
                "mixed": [1.0, 1.5, 1.0],
            }
        ]
        * 3
    )


def fail_to_share(processes):
    with pytest.raises(ValueError, match="made by 0") as refused:
        processes.share(lambda: int(f"made by {processes.rank}"))
    return type(refused.value).__name__


def test_an_error_of_the_first_is_raised_in_all(tmp_path):
    assert together(tmp_path, 2, fail_to_share) == ["ValueError"] * 2


def take_turns(processes, folder):
    with processes.in_turn():
        found = (folder / "cache").exists()
        (folder / "cache").touch()
    return found


def test_one_process_of_a_machine_fills_the_cache_and_the_others_find_it(tmp_path):
    assert together(tmp_path, 3, take_turns, tmp_path) == [False, True, True]


# ---------------------------------------------------------------- the projection


def project_together(processes, name, spoil, steps):
    """Project several times as training does, with other BatchNorm statistics in each process."""
    torch.manual_seed(5)
    config = RunConfig(model=name, prune_ratio=0.57)
    method = make_method(randomize_batchnorms(build_model(name)), config)
    torch.manual_seed(processes.rank)
    for module in method.model.modules():
        if isinstance(module, nn.BatchNorm2d) and processes.rank:
            module.running_var.uniform_(0.5, 2)
    if spoil and processes.first:
        method.model.bn.running_var.fill_(float("nan"))
    before = copy.deepcopy(method.model.state_dict())
    noise, reports = torch.Generator().manual_seed(7), []
    for step in range(1, steps + 1):
        for p in method.model.parameters():
            p.data += 1e-3 * torch.randn(p.shape, generator=noise) * (not spoil)
        try:
            reports.append(method.after_step(step, 1, last=step == steps))
        except ValueError as error:
            assert all(torch.equal(p, before[name]) for name, p in method.model.named_parameters())
            return str(error)
    return {"state": {name: p.detach() for name, p in method.model.named_parameters()}, "reports": reports}


@pytest.mark.parametrize("world", [2, 4])
def test_weights_and_reports_of_a_projection_are_those_of_one_process_bit_for_bit(tmp_path, world):
    alone = project_together(Processes(), "resnet8", False, 3)
    several = together(tmp_path, world, project_together, "resnet8", False, 3)
    assert_same([alone["state"], *(process["state"] for process in several)])
    assert {str(process["reports"]) for process in several} == {str(alone["reports"])}


def test_statistics_that_are_lost_are_an_error_in_every_process_and_nothing_is_projected(tmp_path):
    errors = together(tmp_path, 3, project_together, "resnet8", True, 1)
    words = "NaN, infinity or overflow in the BatchNorm after layer 'conv'; nothing was projected"
    assert errors == [words] * 3


# ---------------------------------------------------------------- data


def numbered(n, test):
    """A data set whose images hold their own number."""

    def images(n):
        return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 4, 4, 3).contiguous()

    return ImageData(
        images(n),
        torch.arange(n),
        images(test),
        torch.arange(test),
        ("a", "b"),
        (0.0,) * 3,
        (1 / 255,) * 3,
        4,
        pad=0,
        flip=False,
    )


@pytest.mark.parametrize("pad", [1, None])
@pytest.mark.parametrize(
    ("n", "batch", "world"), [(50, 16, 2), (50, 16, 4), (33, 16, 4), (30, 3, 4), (7, 16, 3)]
)
def test_every_image_is_served_once_an_epoch_whatever_the_number_of_processes(n, batch, world, pad):
    data = ImageData(**vars(numbered(n, 11)) | {"pad": pad, "image_size": 4 if pad else 3})
    parts = [Batches(data, batch, "cpu", seed=3, rank=rank, world=world) for rank in range(world)]
    whole = Batches(data, batch, "cpu", seed=3)
    for step, (batch_of_all, *of_each) in enumerate(
        zip(whole.epoch(2), *(part.epoch(2) for part in parts), strict=True)
    ):
        x, y = batch_of_all
        assert len(y) == whole.size(step) == sum(len(labels) for _, labels in of_each)
        for rank, (images, labels) in enumerate(of_each):
            assert torch.equal(labels, y[rank::world]) and images.shape[1:] == x.shape[1:]
            torch.testing.assert_close(images, x[rank::world])  # the same crops
    served = [labels for part in parts for _, labels in part.test(4)]
    assert Counter(torch.cat(served).tolist()) == Counter(range(11)) and all(
        len(labels) <= 4 for labels in served
    )


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 1), (1, 3), (4, 2)])
def test_an_epoch_that_another_number_of_processes_resumes_serves_every_image_once(before, after):
    seen, data = Counter(), numbered(50, 4)
    for world, steps in ((before, slice(0, 2)), (after, slice(2, None))):
        for rank in range(world):
            part = Batches(data, 16, "cpu", seed=3, rank=rank, world=world)
            for _, y in list(part.epoch(1, steps.start))[: 2 if steps.stop else None]:
                seen.update(y.tolist())
    assert seen == Counter(range(50))


# ---------------------------------------------------------------- training


def gradients(processes, batch, device_batch):
    """The gradients of a network without BatchNorm for one batch, and the totals."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y, totals = torch.randn(batch, 3, 4, 4), torch.arange(batch) % 3, torch.zeros(3, dtype=torch.float64)
    optimizer, part = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        slice(processes.rank, None, processes.world),
    )
    step = Step(
        RunConfig(),
        processes.parallel(model),
        optimizer,
        totals,
        world=processes.world,
        device_batch=device_batch,
    )
    for _ in range(2):
        step.backward(x[part], y[part], y[part], batch)
    return {name: p.grad for name, p in model.named_parameters()}, processes.sum(totals)


@pytest.mark.parametrize("device_batch", [None, 2])
@pytest.mark.parametrize("batch", [9, 7, 2])  # even, uneven, and one process without an image
def test_the_loss_is_the_mean_over_the_whole_batch_however_it_is_divided(tmp_path, batch, device_batch):
    expected, totals = gradients(Processes(), batch, None)
    for divided, sums in (
        gradients(Processes(), batch, device_batch),
        *together(tmp_path, 3, gradients, batch, device_batch),
    ):
        for name, gradient in divided.items():
            torch.testing.assert_close(gradient, expected[name])
        torch.testing.assert_close(sums, totals)


def start_run(processes, results, fields, options, spy=False):
    """Do a run, each process with its own results folder; return what came of it and the labels it saw."""
    seen, backward = [], Step.backward
    if spy:
        torch.manual_seed(0)
        data = dataclasses.replace(
            load_data(RunConfig()), train_images=torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8)
        )
        data = dataclasses.replace(data, train_labels=torch.arange(50), classes=tuple(map(str, range(50))))
        import_module("lrpet.runs.run").load_images = lambda *_, **__: data
        Step.backward = lambda self, x, target, y, images: (
            seen.append(y.tolist()),
            backward(self, x, target, y, images),
        )[1]
    rows = []
    try:
        done = run(
            RunConfig(**fields),
            results=results / str(processes.rank),
            device="cpu",
            progress="off",
            on_epoch=rows.append,
            **options,
        )
    except Paused as pause:
        return str(pause), rows, seen
    finally:
        Step.backward = backward
    return done.folder, rows, seen


def forget_seconds(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_do_a_run_together_and_the_first_alone_writes_it(tmp_path, world):
    fields = TINY | {"best_of_last": 1}
    told = together(tmp_path, world, start_run, tmp_path / "results", fields, {"device_batch": 40})
    folder = RunConfig(**fields).folder(tmp_path / "results" / "0")
    assert [place.name for place in (tmp_path / "results").iterdir()] == ["0"]
    assert [place for place, *_ in told] == [folder] * world
    assert [forget_seconds(rows) for _, rows, _ in told] == [forget_seconds(told[0][1])] * world
    finished = load_run(folder)
    assert finished.environment["processes"] == world
    assert not list(folder.glob("checkpoint.*"))
    data = load_data(finished.config)
    alone = evaluate(load_network(finished), Batches(data, 1, "cpu", 0))
    assert alone["top1_pct"] == finished.summary["compact_top1_pct"]  # all images, once
    assert finished.summary["top1_pct"] > 20  # chance is 10
    unprojected = finished.history.unprojected_top1_pct.iloc[-1]
    assert finished.summary["best_of_last_uncut_top1_pct"] == unprojected != finished.summary["top1_pct"]
    again = together(tmp_path, world, start_run, tmp_path / "results", fields, {})
    assert again == [(folder, [], [])] * world  # loaded, also where the folder is not to be seen


@pytest.mark.slow
def test_a_run_that_other_numbers_of_processes_resume_sees_every_image_once_per_epoch(tmp_path):
    fields, seen, worlds = (
        {"epochs": 2, "milestones": (1,), "batch_size": 16, "method": "lrpet"},
        [],
        [2, 4, 1, 3, 2, 1, 4, 2],
    )
    for step, world in enumerate(worlds, start=1):
        told = together(
            tmp_path / str(step), world, start_run, tmp_path / "results", fields, {"time_budget": 0.0}, True
        )
        seen += [sum((label for _, _, steps in told for label in steps), [])]
        if step % 4:  # the end of an epoch, in which four processes had a part of two images, is over
            assert [words for words, *_ in told] == [
                f"{RunConfig(**fields).run_id} paused at step {step} of 8"
            ] * world
    assert [len(labels) for labels in seen] == [16, 16, 16, 2] * 2
    for epoch in (seen[:4], seen[4:]):
        assert Counter(sum(epoch, [])) == Counter(range(50))
    folder = RunConfig(**fields).folder(tmp_path / "results" / "0")
    assert {place for place, *_ in told} == {folder} and is_complete(folder)


def do_all(processes, results, methods):
    """Train with several methods; train() itself compares the processes' weights after each epoch."""
    fields = {"epochs": 2, "milestones": (1,), "batch_size": 256}
    return {
        name: start_run(processes, results, fields | {"method": name}, {})[1][-1]["loss"] for name in methods
    }


@pytest.mark.slow
def test_every_method_keeps_the_processes_alike(tmp_path):
    losses = together(tmp_path, 2, do_all, tmp_path / "results", list(METHODS))
    assert losses[0] == losses[1] and losses[0].keys() == METHODS.keys()


def test_data_that_differ_between_processes_are_refused(tmp_path):
    assert (
        together(tmp_path, 2, with_other_data, tmp_path / "results")
        == ["data must hold the same images for every process; got others"] * 2
    )


def with_other_data(processes, results):
    data = load_data(RunConfig())
    import_module("lrpet.runs.run").load_images = lambda *_, **__: dataclasses.replace(
        data, train_labels=data.train_labels.roll(processes.rank)
    )
    with pytest.raises(ValueError) as refused:
        run(RunConfig(**TINY), results=results, device="cpu", progress="off")
    return str(refused.value).partition(" on another")[0]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (
            "cuda:0",
            "where several processes train together, each on its own GPU; got 'cuda:0'",
        )
    ],
)
def test_a_gpu_for_all_processes_is_refused(device, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Processes(1, 2, 1).own_device(torch.device(device))


def test_synchronized_batchnorm_is_refused_on_cpus(tmp_path):
    assert (
        together(tmp_path, 2, with_sync_batchnorm, tmp_path / "results")
        == ["sync_batchnorm needs CUDA GPUs"] * 2
    )


def with_sync_batchnorm(_, results):
    with pytest.raises(ValueError) as refused:
        run(RunConfig(sync_batchnorm=True, **TINY), results=results, device="cpu", progress="off")
    return str(refused.value).partition(" where")[0]


# ---------------------------------------------------------------- torchrun

LONG = {"epochs": 8, "milestones": (5,), "batch_size": 64}


def torchrun(results, fields, *options, world=2):
    arguments = [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for name, value in RunConfig(**fields).to_dict().items()
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        *options,
    ]
    return subprocess.Popen(
        [*launch, "-m", "lrpet", "train", *arguments, "--device", "cpu"],
        env={**os.environ, "LRPET_RESULTS": str(results), "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def until_checkpoint(folder, process):
    while not (folder / "checkpoint.pt").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What comes of the run where nothing happens."""
    place = tmp_path_factory.mktemp("undisturbed")
    return together(place, 2, start_run, place, LONG, {})[0][0]


def assert_resumes(results, undisturbed):
    """Started again, the job resumes from the checkpoint and ends as where nothing happens."""
    folder = RunConfig(**LONG).folder(results / "0")
    assert (folder / "checkpoint.pt").is_file() and not is_complete(folder)
    _, rows, _ = together(results, 2, start_run, results, LONG, {})[0]
    assert 0 < len(rows) < 8
    assert outcome(folder) == outcome(undisturbed)


@pytest.mark.slow
def test_where_a_process_dies_the_job_fails_after_a_checkpoint(tmp_path, undisturbed):
    process = torchrun(tmp_path / "0", LONG)
    until_checkpoint(RunConfig(**LONG).folder(tmp_path / "0"), process)
    os.kill(workers(process)[0], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode != 0, said
    assert_resumes(tmp_path, undisturbed)


@pytest.mark.slow
def test_torchrun_starts_anew_what_died(tmp_path, undisturbed):
    folder = RunConfig(**LONG).folder(tmp_path)
    process = torchrun(tmp_path, LONG, "--max-restarts", "1")
    until_checkpoint(folder, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    for once in (
        "training 8 epochs of 21 steps on 2 × CPU",
        "resuming 8 epochs",
        " % (test) at ",
        "epoch   8/8",
    ):  # not by each
        assert said.count(once) == 1, said
    assert outcome(folder) == outcome(undisturbed)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_one_checkpoint(tmp_path, undisturbed):
    process = torchrun(tmp_path / "0", LONG)
    until_checkpoint(RunConfig(**LONG).folder(tmp_path / "0"), process)
    for worker in workers(process):  # as Slurm does it; torchrun then does it again
        os.kill(worker, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode != 0
    assert said.count("a checkpoint is written, from which the same call resumes") == 1, said
    assert_resumes(tmp_path, undisturbed)
