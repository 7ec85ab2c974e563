"""Runs of detection and segmentation: trained, resumed, loaded, tabled and exported as those of labels."""

import pytest
import torch
from helpers import in_two_processes, outcome, refused

from lrpet import RunConfig, run
from lrpet.data import object_sets
from lrpet.experiments import load_profile
from lrpet.processes import join_processes
from lrpet.runs import load_network
from lrpet.runs.export import export_run
from lrpet.tables import profile_runs
from lrpet.training.loop import Paused

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
QUICK = {"epochs": 2, "milestones": (1,), "batch_size": 8, "prune_ratio": 0.5, "dataset": "digit_scenes"}
TASKS = {
    "detection": {"model": "fasterrcnn_resnet8_fpn", "learning_rate": 0.02},
    "segmentation": {"model": "fcn_resnet8", "learning_rate": 0.1},
}
tasks = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setitem(object_sets.SCENES, "digit_scenes", ("digits", 32, 10))


def config_of(task, **more):
    return RunConfig(**QUICK | TASKS[task] | {"task": task} | more)


@tasks
def test_a_run_leaves_what_its_metric_and_tables_ask_for(task):
    config = config_of(task)
    done = run(config, progress="off")
    column, s = config.metric.column, done.summary
    assert list(done.history[column].notna()) == [True, True]
    assert s[column] == pytest.approx(s[f"compact_{column}"], abs=1)
    assert s["compact_max_relative_error"] < 1e-4
    assert s["macs"] == s["macs_by_rank"] < s["dense_macs"]
    assert s["num_classes"] == 10 + (task == "segmentation")
    assert {"factorized", "dense"} >= set(done.layers.action)
    assert run(config, progress="off").summary == s  # loaded
    network = load_network(done)
    assert sum(p.numel() for p in network.parameters()) == s["params"]


@tasks
def test_a_run_that_was_paused_ends_at_the_same_bits(task, tmp_path):
    config = config_of(task, bn_rectification=False)
    whole = run(config, results=tmp_path / "whole", progress="off")
    stopped = False
    while True:
        try:
            done = run(config, results=tmp_path / "parts", progress="off", time_budget=0)
            break
        except Paused:
            stopped = True
    assert stopped and outcome(whole.folder) == outcome(done.folder)


def _in_two(rank, store, pipe):
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store["port"]}
    torch.set_num_threads(1)
    object_sets.SCENES["digit_scenes"] = ("digits", 32, 10)
    join_processes()
    done = run(config_of(store["task"]), results=store["results"], device="cpu", progress="off")
    pipe.send(done.summary)


@pytest.mark.slow
@tasks
def test_two_processes_score_the_same_images(task, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    store = {"port": port, "task": task, "results": str(tmp_path / "results")}
    one, other = in_two_processes(_in_two, store)
    assert one == other and one[config_of(task).metric.column] >= 0


def test_a_segmenter_is_exported(tmp_path):
    done = run(config_of("segmentation", epochs=1, milestones=()), progress="off")
    path, difference = export_run(str(done.folder), "pt2", tmp_path / "net.pt2")
    assert path.is_file() and difference < 1e-4
    path, difference = export_run(str(done.folder), "safetensors", tmp_path / "half.safetensors", half=True)
    assert path.is_file() and 0 < difference < 0.05


def test_a_detector_is_exported_with_its_boxes(tmp_path):
    done = run(config_of("detection", epochs=1, milestones=()), progress="off")
    path, _ = export_run(str(done.folder), "safetensors", tmp_path / "net.safetensors")
    assert path.is_file()
    refused(lambda: export_run(str(done.folder), "onnx", tmp_path / "net.onnx"), "detect")


@tasks
@pytest.mark.parametrize("profile", ["smoke", "voc", "scenes"])
def test_profiles_have_their_tasks(profile, task):
    runs = profile_runs(profile, task=task)
    wanted = {"LRPET"} if profile == "smoke" else {"dense", "LRP", "LRPET"}
    assert {label.partition(" without")[0] for label in runs.label} == wanted
    configs = [e.config for e in load_profile(profile).experiments if e.config.task == task]
    assert len({(config.epochs, config.batch_size) for config in configs}) == 1
