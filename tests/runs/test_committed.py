"""What the repository carries of its runs is what it says it is."""

import re

import pytest

from lrpet.data.batches import Batches
from lrpet.data.sets import load_data
from lrpet.paths import PROJECT
from lrpet.runs.store import HALF_WEIGHTS, is_complete, load_network, load_run
from lrpet.training.evaluate import evaluate

WEIGHTS = sorted(PROJECT.glob(f"results/*/runs/*/{HALF_WEIGHTS}"))
RUNS = sorted(
    path.parent for path in PROJECT.glob("results/**/runs/*/config.json") if path.parts[-4] != "smoke"
)


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_every_run_is_whole_and_called_after_its_configuration(folder):
    assert is_complete(folder)
    run = load_run(folder)  # checks its sums
    assert folder.name == run.config.run_id and folder.parts[-3] == run.config.profile
    assert len(run.history) == run.config.epochs
    metric, column = run.config.metric, run.config.metric.column
    scores = run.history[column]
    assert (
        run.summary[column] == scores.iloc[-1]
        and run.summary[f"best_{column}"] == (metric.sign * scores).max() * metric.sign
    )
    assert run.summary["scored_on"] == ("held out" if run.config.validation_fraction else "test")
    # results/README.md says what differed from the commit on the GPU
    there = run.environment["device"] == "NVIDIA H100 80GB HBM3"
    profiles = ("scaled", "imagenette", "language", "language-choice")
    assert not run.environment["dirty"] or (there and run.config.profile in profiles)
    assert re.fullmatch("[0-9a-f]{40}", run.environment["commit"])


@pytest.mark.parametrize(
    ("dataset", "held_out"), [("cifar10", 0.0), ("cifar10", 0.1), ("cifar10", 0.5), ("imagefolder", 0.0)]
)
def test_all_runs_saw_the_same_images(dataset, held_out):
    runs = [run for run in map(load_run, RUNS) if run.config.dataset == dataset]
    origins = [run.environment for run in runs if run.config.validation_fraction == held_out]
    assert len({(origin["data_train_sha256"], origin["data_test_sha256"]) for origin in origins}) == 1


def test_only_runs_that_are_older_than_the_sums_lack_them():
    assert {folder.parts[-3] for folder in RUNS if not (folder / "SHA256SUMS").is_file()} == {"short"}
    assert sum((folder / "SHA256SUMS").is_file() for folder in RUNS) >= 75


def test_weights_stay_small():
    assert 0 < sum(path.stat().st_size for path in WEIGHTS) < 4_000_000


@pytest.mark.slow
def test_weights_reach_the_accuracy_of_their_run_on_the_real_images(cifar10):
    for path in WEIGHTS:
        run = load_run(path.parent)
        batches = Batches(load_data(run.config, cifar10), 128, "cpu", 0)  # the held-out ones, of a search
        assert evaluate(load_network(run), batches)["top1_pct"] == pytest.approx(
            run.summary["top1_pct"], abs=0.1
        ), path.parent.name
