import subprocess

import pytest
import yaml
from helpers import TINY

import lrpet.experiments
from lrpet.__main__ import PAUSED, main
from lrpet.experiments import load_profile

TRAIN = ["train", "method=lrpet", "epochs=2", "milestones=[1]", "batch_size=256", "--device", "cpu"]
NAMES = ["plain-s1", "plain-s2", "low-rank-s1", "low-rank-s2"]


@pytest.fixture
def own_experiments(monkeypatch, tmp_path):
    """Two short experiments in place of those of the project."""
    experiments = {"plain": {"feeds": "x", "method": "dense"}, "low-rank": {"feeds": "x", "method": "lrpet"}}
    profile = {
        "note": "a note",
        "cost": "a second",
        "settings": TINY | {"milestones": [1]},
        "seeds": [1, 2],
        "experiments": experiments,
    }
    (tmp_path / "experiments.yaml").write_text(
        yaml.safe_dump({"smoke": profile}, sort_keys=False), encoding="utf-8"
    )
    monkeypatch.setattr(lrpet.experiments, "project_file", lambda name: tmp_path / name)


def states(out):
    """The state of each experiment, as list and check print it."""
    return {line.split()[0]: " ".join(line.split()[2:]) for line in out.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize(("verb", "status"), [("list", 0), ("check", 1)])
def test_list_and_check_show_every_run_of_the_project(capsys, verb, status):
    assert main([verb]) == status
    out = capsys.readouterr().out
    names = [e.name for e in load_profile("smoke").experiments]
    assert states(out) == dict.fromkeys(names, "not run")
    assert f"0 of {len(names)} complete" in out


def test_list_and_check_tell_complete_started_and_missing_runs_apart(own_experiments, capsys):
    assert main(["run", "low-rank-s1", "--device", "cpu"]) == 0
    assert main(["run", "plain-s2", "--device", "cpu", "--time-budget", "0"]) == PAUSED
    assert "paused at step 1 of 12" in capsys.readouterr().out
    assert main(["check"]) == 1
    seen = states(capsys.readouterr().out)
    assert seen["low-rank-s1"].startswith("complete ")
    assert " % test, " in seen["low-rank-s1"]
    assert [seen[name] for name in ("plain-s1", "plain-s2", "low-rank-s2")] == [
        "not run",
        "started",
        "not run",
    ]
    for name in NAMES:
        assert main(["run", name, "--device", "cpu"]) == 0
    assert main(["check"]) == main(["list"]) == 0
    assert "4 of 4 complete" in capsys.readouterr().out


def test_a_time_budget_that_is_spent_starts_nothing_more(own_experiments, capsys):
    assert main(["run", "--time-budget", "0"]) == PAUSED
    out = capsys.readouterr().out
    assert [f"not complete: {name} (paused)" in out for name in ("plain-s1", "low-rank-s2")] == [True, True]
    assert "0 of 4 complete" in out


def test_several_runs_are_processes_of_their_own_whose_failure_is_named(own_experiments, capfd):
    assert (
        main(["run", "plain-*", "--jobs", "2", "--device", "cpu"]) == 1
    )  # they read the project's experiments, which have no such names
    captured = capfd.readouterr()
    for name in ("plain-s1", "plain-s2"):
        assert f"not complete: {name} (failed with status 1)" in captured.out
        assert f"error: no experiment of profile 'smoke' is called '{name}'" in captured.err


def test_nothing_is_started_where_all_are_complete(own_experiments, monkeypatch, capsys):
    for name in NAMES[:2]:
        assert main(["run", name, "--device", "cpu"]) == 0
    monkeypatch.setattr(subprocess, "run", None)
    assert main(["run", "plain-*"]) == 0
    assert "2 runs asked for, 2 complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0, 0, 0, 0], 0),
        ([0, PAUSED, 0, 0], PAUSED),
        ([PAUSED] * 4, PAUSED),
        ([0, 0, 1, 0], 1),
        ([0, PAUSED, 1, 0], 1),
        ([-9, 0, 0, 0], 1),
    ],
)
def test_the_statuses_of_processes_become_one(own_experiments, monkeypatch, capsys, statuses, status):
    experiments = {e.name: (e, s) for e, s in zip(load_profile("smoke").experiments, statuses, strict=True)}
    commands = []

    def fake(command, **_):
        commands.append(command)
        experiment, returned = experiments[command[command.index("run") + 1]]
        if returned == 0:
            experiment.config.folder().mkdir(parents=True)
            (experiment.config.folder() / "summary.json").write_text("{}")
        return subprocess.CompletedProcess(command, returned)

    monkeypatch.setattr(subprocess, "run", fake)
    assert (
        main(["run", "--jobs", "2", "--device", "cpu", "--data", "here", "--checkpoint-epochs", "3"])
        == status
    )
    assert sorted(command[4] for command in commands) == sorted(experiments)
    options = ["--profile", "smoke", "--device", "cpu", "--checkpoint-epochs", "3", "--data", "here"]
    assert all(command[5:] == options for command in commands)
    out = capsys.readouterr().out
    assert f"{statuses.count(0)} of 4 complete" in out
    for name, (_, returned) in experiments.items():
        words = "paused" if returned == PAUSED else f"failed with status {returned}"
        assert (f"not complete: {name} ({words})" in out) == (returned != 0)


def test_train_does_one_run_pauses_and_loads(capsys):
    assert main([*TRAIN, "--time-budget", "0"]) == PAUSED
    assert main(TRAIN) == 0
    out = capsys.readouterr().out
    assert "resuming 2 epochs" in out
    assert " % test accuracy at " in out
    assert main(TRAIN) == 0
    assert "loaded, trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "resnet9"], "no experiment of profile 'smoke' is called 'resnet9'; it has resnet8-dense-s1"),
        (["run", "--jobs", "0"], "--jobs must be at least 1; got 0"),
        (
            ["train", "prune_ration=0.7"],
            "'prune_ration' is not a field of RunConfig; did you mean 'prune_ratio'?",
        ),
        (["train", "learning_rate=1e-4"], "YAML reads 1e-4 as text: write 0.0001"),
        (["train", "epochs"], "epochs must be int; got NoneType None"),
        (["train", "ranks=[1, 2"], "while parsing a flow sequence"),
        (["train", "dataset=imagefolder"], "give it by --data or LRPET_DATA"),
        (
            ["train", "dataset=imagefolder", "--data", "no such folder"],
            "no such folder is no folder; it must hold train/",
        ),
        (["train", "--device", "gpu"], "device must be auto, cpu, cuda or cuda:1; got 'gpu'"),
        (
            ["train", "--checkpoint-epochs", "0"],
            "checkpoint_epochs must be a whole number of at least 1; got 0",
        ),
        (
            [
                "train",
                "method=dense",
                "epochs=8",
                "milestones=[]",
                "learning_rate=100",
                "momentum=0.9999",
                "batch_size=32",
            ],
            "no longer finite: epoch",
        ),
    ],
)
def test_mistakes_are_one_line_on_standard_error_and_status_1(arguments, words, capsys):
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["walk"], ["list", "--profile", "big"], ["run", "--jobs", "two"], ["train", "--epochs", "3"]],
)
def test_arguments_that_mean_nothing_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: python -m lrpet" in capsys.readouterr().err
