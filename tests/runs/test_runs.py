import contextlib
import copy
import dataclasses
import json
import multiprocessing
import shutil
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import TINY, outcome, run_and_report

from lrpet import RunConfig, build_model, cost, load_runs, ranks_from_ratio, run
from lrpet.config import METHODS
from lrpet.data.batches import Batches
from lrpet.data.sets import load_data
from lrpet.files import write_file
from lrpet.runs.store import is_complete, load_network, load_run
from lrpet.training.evaluate import evaluate
from lrpet.training.loop import Paused

CONFIG = RunConfig(**TINY)
RECORDED = {"spectra.npz", "gradients.csv"}
FILES = {
    "config.json",
    "environment.json",
    "history.csv",
    "layers.csv",
    "summary.json",
    "SHA256SUMS",
    "compact.safetensors",
} | RECORDED


def files(folder):
    return {file.name for file in folder.iterdir()} - {"run.lock"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(CONFIG, results=tmp_path_factory.mktemp("undisturbed"), device="cpu", progress="off")


# ---------------------------------------------------------------- a finished run


def test_a_run_leaves_its_configuration_history_layers_and_summary(undisturbed):
    folder = undisturbed.folder
    assert (folder.name, folder.parent.name, folder.parent.parent.name) == (CONFIG.run_id, "runs", "smoke")
    assert files(folder) == FILES
    assert (
        RunConfig.from_dict(json.loads((folder / "config.json").read_text())) == CONFIG == undisturbed.config
    )
    assert undisturbed.history["epoch"].tolist() == [1, 2]
    assert undisturbed.history["learning_rate"].tolist() == [0.1, 0.01]
    assert json.loads((folder / "summary.json").read_text()) == undisturbed.summary
    assert {
        "commit",
        "dirty",
        "torch",
        "device",
        "threads",
        "started",
        "finished",
        "data_train_sha256",
    } <= set(undisturbed.environment)


def test_the_summary_agrees_with_history_layers_and_cost(undisturbed):
    summary, history = undisturbed.summary, undisturbed.history
    assert summary["run_id"] == CONFIG.run_id
    assert summary["scored_on"] == "test"
    assert summary["top1_pct"] == history["top1_pct"].iloc[-1] > 15  # far above guessing
    assert summary["best_top1_pct"] == history["top1_pct"].max()
    assert summary["projections"] == 2
    model = build_model("resnet8")
    counted = cost(model, (3, 8, 8), ranks_from_ratio(model, 0.57))
    assert (summary["macs"], summary["params"]) == (counted.macs, counted.params)
    assert (summary["dense_macs"], summary["dense_params"]) == (counted.dense_macs, counted.dense_params)
    assert undisturbed.layers["macs"].sum() == counted.macs
    assert undisturbed.layers["rank"].dropna().tolist() == list(ranks_from_ratio(model, 0.57).values())
    assert undisturbed.layers.iloc[-1][["name", "action"]].tolist() == ["fc", "dense"]


def test_the_deployed_network_loses_nothing_and_can_be_loaded(undisturbed):
    assert undisturbed.summary["compact_max_relative_error"] < 1e-4
    assert undisturbed.summary["compact_top1_pct"] == undisturbed.summary["top1_pct"]
    compact = load_network(undisturbed)
    assert sum(p.numel() for p in compact.parameters()) == undisturbed.summary["params"]
    assert (
        evaluate(compact, Batches(load_data(CONFIG), 64, "cpu", 1))["top1_pct"]
        == undisturbed.summary["compact_top1_pct"]
    )


def test_weights_that_did_not_come_with_the_results_are_missed_in_words(undisturbed, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(undisturbed.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        ValueError, match="compact.safetensors is not there: .*weights of few runs.*run it in another"
    ):
        load_network(load_run(folder))


def test_a_dense_run_deploys_the_trained_network(tmp_path):
    done = run(RunConfig(method="dense", **TINY), results=tmp_path, device="cpu", progress="off")
    assert files(done.folder) == FILES
    assert (
        evaluate(load_network(done), Batches(load_data(CONFIG), 64, "cpu", 1))["top1_pct"]
        == done.summary["top1_pct"]
    )
    assert done.summary["macs"] == done.summary["dense_macs"]
    assert done.summary["projections"] == 0
    assert set(done.layers["action"]) == {"dense"}


def test_the_same_configuration_gives_the_same_result_and_another_seed_does_not(undisturbed, tmp_path):
    assert outcome(run(CONFIG, results=tmp_path, device="cpu", progress="off").folder) == outcome(
        undisturbed.folder
    )
    other = run(dataclasses.replace(CONFIG, seed=2), results=tmp_path, device="cpu", progress="off")
    assert other.summary["train_loss"] != undisturbed.summary["train_loss"]


def test_with_a_validation_fraction_the_held_out_images_are_scored(tmp_path):
    done = run(
        dataclasses.replace(CONFIG, validation_fraction=0.2), results=tmp_path, device="cpu", progress="off"
    )
    assert done.summary["scored_on"] == "held out"
    assert (done.summary["top1_pct"] * 259 / 100) == pytest.approx(
        round(done.summary["top1_pct"] * 259 / 100)
    )


def test_a_finished_run_is_loaded_without_data_and_says_so(undisturbed, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("data was loaded")

    monkeypatch.setattr(import_module("lrpet.runs.run"), "load_images", fail)
    again = run(CONFIG, results=undisturbed.folder.parents[2])
    e = undisturbed.environment
    assert (
        capsys.readouterr().out == f"{CONFIG.run_id}: loaded, trained {e['finished'][:16]} "
        f"on {e['device']} at commit {e['commit'][:9]}\n"
    )
    assert again.summary == undisturbed.summary
    assert again.history.equals(undisturbed.history)
    with pytest.raises(AssertionError, match="data was loaded"):
        run(dataclasses.replace(CONFIG, seed=3), results=undisturbed.folder.parents[2], progress="off")


@pytest.mark.parametrize(("progress", "lines"), [("lines", 3), ("off", 0)])
def test_lines_are_one_per_epoch_after_one_that_names_the_run(tmp_path, capsys, progress, lines):
    run(CONFIG, results=tmp_path, device="cpu", progress=progress)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == lines
    assert all(line.startswith(CONFIG.run_id) for line in out)
    assert [f"epoch   {epoch}/2" in line for epoch, line in enumerate(out[1:], 1)] == [True] * max(
        0, lines - 1
    )


@pytest.mark.parametrize("name", ["config.json", "summary.json", "environment.json", "history.csv"])
def test_a_damaged_file_of_a_run_from_before_checksums_is_an_error_that_names_it(undisturbed, tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(undisturbed.folder, folder)
    (folder / "SHA256SUMS").unlink()
    assert load_run(folder).summary == undisturbed.summary
    (folder / name).write_text("" if name.endswith("csv") else "{")
    with pytest.raises(ValueError, match=f"damaged/{name} is damaged .*move the folder away"):
        load_run(folder)


# ---------------------------------------------------------------- pausing, resuming, failing


OTHERS = {name: dataclasses.replace(CONFIG, method=name) for name in METHODS}
OTHERS["trp"] = RunConfig(**TINY, method="trp", projection_interval=2)
OTHERS["followed"] = dataclasses.replace(
    CONFIG, fast_projection=True, projection_interval=1, projection_unit="iteration"
)
OTHERS["adamw"] = dataclasses.replace(CONFIG, recipe="adamw", learning_rate=0.001, batch_size=648)  # 3 passes


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_a_time_budget_pauses_and_the_next_calls_resume_to_the_same_result(tmp_path, capsys, config):
    expected = outcome(run(config, results=tmp_path / "undisturbed", device="cpu", progress="off").folder)
    pauses = []
    while len(pauses) < 100:
        try:
            done = run(config, results=tmp_path, device="cpu", time_budget=0.0, progress="lines")
            break
        except Paused as pause:
            pauses.append(str(pause))
            assert not is_complete(config.folder(tmp_path))
    out = capsys.readouterr().out
    assert len(pauses) == 11  # 12 steps, each call makes one
    assert "paused at step 1 of 12" in pauses[0]
    assert "paused after epoch 1 of 2" in pauses[5]
    assert (out.count("training 2 epochs"), out.count("resuming 2 epochs")) == (1, 11)
    assert outcome(done.folder) == expected
    assert files(done.folder) == FILES


def test_a_run_can_resume_in_the_process_in_which_it_was_paused(tmp_path):
    with pytest.raises(Paused) as pause:
        run(CONFIG, results=tmp_path, device="cpu", time_budget=0.0, progress="off")
    assert pause.tb is not None  # a notebook keeps the traceback, and with it everything in it
    assert run(CONFIG, results=tmp_path, device="cpu", progress="off").summary["projections"] == 2


def put_under_the_name_of(config, folder, results):
    """Rename a run's folder as if the hash of another configuration were the same."""
    place = config.folder(results)
    place.parent.mkdir(parents=True)
    return shutil.copytree(folder, place)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
def test_another_configuration_of_the_same_name_is_refused(undisturbed, tmp_path, finished):
    asked = dataclasses.replace(CONFIG, prune_ratio=0.7)
    folder = undisturbed.folder if finished else pause_twice(tmp_path / "begun")
    place = put_under_the_name_of(asked, folder, tmp_path)
    before = {file: file.read_bytes() for file in place.iterdir()}
    words = r"prune_ratio 0\.57 there, 0\.7 asked for.*LRPET_RESULTS"
    with pytest.raises(ValueError, match=words) as refused:
        run(asked, results=tmp_path, device="cpu", progress="off")
    assert str(place) in str(refused.value)
    assert {file: file.read_bytes() for file in place.iterdir()} == before


@pytest.mark.parametrize("told", [None, "abc123"])
@pytest.mark.parametrize("missing", ["git", ".git"])
def test_without_git_or_its_folder_the_commit_is_unknown_or_told(monkeypatch, tmp_path, missing, told):
    monkeypatch.delenv("LRPET_COMMIT", raising=False)
    if told:
        monkeypatch.setenv("LRPET_COMMIT", told)
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(import_module("lrpet.runs.environment"), "PROJECT", tmp_path)
    done = run(CONFIG, results=tmp_path, device="cpu", progress="off")
    assert (done.environment["commit"], done.environment["dirty"]) == (told or "unknown", None)


def pause_twice(results):
    """Leave a run with a checkpoint and the one before it."""
    for _ in range(2):
        with pytest.raises(Paused):
            run(CONFIG, results=results, device="cpu", time_budget=0.0, progress="off")
    return CONFIG.folder(results)


def test_a_damaged_checkpoint_costs_a_step_and_not_the_result(undisturbed, tmp_path, capsys):
    folder = pause_twice(tmp_path)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:-5000])
    done = run(CONFIG, results=tmp_path, device="cpu", progress="off")
    assert "is damaged; resuming from checkpoint.previous" in capsys.readouterr().out
    assert outcome(done.folder) == outcome(undisturbed.folder)


def test_two_damaged_checkpoints_end_the_run_with_advice(tmp_path):
    folder = pause_twice(tmp_path)
    for name in ("checkpoint.pt", "checkpoint.previous"):
        (folder / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="move it away to start the run anew"):
        run(CONFIG, results=tmp_path, device="cpu", progress="off")


def test_resuming_with_other_images_is_refused(monkeypatch, tmp_path):
    folder = pause_twice(tmp_path)
    images = load_data(CONFIG)
    images.train_images[0, 0, 0, 0] += 1
    monkeypatch.setattr(import_module("lrpet.runs.run"), "load_images", lambda *_, **__: images)
    with pytest.raises(ValueError, match=r"was begun with other images \(data_train_sha256 differs\)"):
        run(CONFIG, results=tmp_path, device="cpu", progress="off")
    assert (folder / "checkpoint.pt").is_file()


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"device": "gpu"}, CONFIG, "device must be auto, cpu, cuda or cuda:1; got 'gpu'"),
        ({"checkpoint_epochs": 0}, CONFIG, "checkpoint_epochs must be a whole number of at least 1; got 0"),
        ({"progress": "line"}, CONFIG, "progress must be auto, bar, lines or off; got 'line'"),
        (
            {"device": "cpu"},
            dataclasses.replace(CONFIG, precision="tf32"),
            "precision 'tf32' exists on CUDA GPUs only",
        ),
        (
            {"device": "cpu"},
            dataclasses.replace(CONFIG, prune_ratio=None, ranks=[1, 2]),
            "ranks has 2 entries, but the model has 7",
        ),
        (
            {"device": "cpu"},
            dataclasses.replace(CONFIG, dataset="imagefolder", image_size=None),
            "give it by --data or LRPET_DATA",
        ),
    ],
)
def test_a_run_that_cannot_be_done_says_why(tmp_path, options, config, words):
    with pytest.raises(ValueError, match=words):
        run(config, results=tmp_path, **options)
    assert not is_complete(config.folder(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="device 'cuda' was asked for, but PyTorch .* sees no CUDA GPU; use 'cpu' or 'auto'"
    ):
        run(CONFIG, results=tmp_path, device="cuda")


# ---------------------------------------------------------------- processes


def start(config, results):
    """Do a run in its own process; return it and a pipe with the rows of its epochs, then its summary."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # imports everything once, so that a process starts in no time
    context.set_forkserver_preload(["lrpet", "sklearn.datasets"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run_and_report, args=(config.to_dict(), results, writer))
    process.start()
    writer.close()
    return process, reader


def received(reader):
    """Everything until the other end is gone, be it in the middle of a word."""
    rows = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            rows.append(reader.recv())
    return rows


def test_two_processes_asked_for_the_same_run_train_it_once(undisturbed, tmp_path):
    started = [start(CONFIG, tmp_path) for _ in range(2)]
    rows = [received(reader) for _, reader in started]
    for process, _ in started:
        process.join()
        assert process.exitcode == 0
    assert sorted(len(r) for r in rows) == [1, 3]  # one reports two epochs, both the summary
    assert rows[0][-1] == rows[1][-1]
    assert outcome(CONFIG.folder(tmp_path)) == outcome(undisturbed.folder)


# ---------------------------------------------------------------- the store


def test_load_runs_has_a_row_a_run_with_every_field_and_value(undisturbed, tmp_path):
    configs = [
        CONFIG,
        RunConfig(method="dense", **TINY),
        dataclasses.replace(CONFIG, profile="short", seed=2),
    ]
    runs = {config.run_id: run(config, results=tmp_path, device="cpu", progress="off") for config in configs}
    with pytest.raises(Paused):
        run(
            dataclasses.replace(CONFIG, seed=9),
            results=tmp_path,
            device="cpu",
            time_budget=0.0,
            progress="off",
        )
    table = load_runs(tmp_path)
    assert set(table["run_id"]) == set(runs)
    for row in table.to_dict("records"):
        done = runs[row["run_id"]]
        fields = {name: value for name, value in done.config.to_dict().items() if value is not None}
        assert {name: row[name] for name in fields} == fields
        assert all(pd.isna(row[name]) for name in set(done.config.to_dict()) - set(fields))
        assert {name: row[name] for name in done.summary} == done.summary
        assert row["folder"] == str(done.folder)
        assert (row["device"], row["commit"]) == (done.environment["device"], done.environment["commit"])
    assert load_runs(tmp_path / "short")["seed"].tolist() == [2]


def test_load_runs_looks_into_the_results_of_the_project(monkeypatch, undisturbed):
    assert load_runs().empty
    monkeypatch.setenv("LRPET_RESULTS", str(undisturbed.folder.parents[2]))
    assert load_runs()["run_id"].tolist() == [CONFIG.run_id]


# ---------------------------------------------------------------- what was written can be read


def test_weights_that_do_not_load_as_they_were_saved_finish_no_run(tmp_path, monkeypatch):
    from lrpet.lowrank import compact_file

    def other(compact, path, **description):
        broken = copy.deepcopy(compact)
        next(broken.parameters()).data[0] += 1
        compact_file.save_compact(broken, path, **description)

    monkeypatch.setattr(import_module("lrpet.runs.finish"), "save_compact", other)
    with pytest.raises(OSError, match=r"compact\.safetensors does not hold the network"):
        run(CONFIG, results=tmp_path, device="cpu", progress="off")
    assert not is_complete(CONFIG.folder(tmp_path))


def test_a_text_that_is_not_read_as_it_was_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"other")
    with pytest.raises(OSError, match=r"a\.txt does not hold what was written to it"):
        write_file(tmp_path / "a.txt", "text")


# ---------------------------------------------------------------- GPUs


def test_a_device_without_memory_is_told_with_the_way_out(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(import_module("lrpet.runs.run"), "train", full)
    words = (
        r"too little memory for batch_size 256.* --device-batch 128 .*smaller batch_size; CUDA out of memory"
    )
    with pytest.raises(MemoryError, match=words) as told:
        run(CONFIG, results=tmp_path, device="cpu", progress="off")
    assert "\n" not in str(told.value)
    with pytest.raises(MemoryError, match="takes 8 images at a time: give --device-batch 4"):
        run(CONFIG, results=tmp_path, device="cpu", progress="off", device_batch=8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("method", "recipe"), [("lrpet", "sgd"), ("trp", "sgd"), ("lrpet", "adamw")])
def test_a_run_paused_and_resumed_on_a_gpu_equals_an_uninterrupted_one(tmp_path, method, recipe):
    config = RunConfig(**TINY, method=method, recipe=recipe)
    options = {"device": "cuda", "progress": "off", "deterministic": True}
    expected = outcome(run(config, results=tmp_path / "undisturbed", **options).folder)
    for _ in range(7):
        with pytest.raises(Paused):
            run(config, results=tmp_path, time_budget=0.0, **options)
    assert outcome(run(config, results=tmp_path, **options).folder) == expected
