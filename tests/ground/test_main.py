import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import yaml
from helpers import TINY, put
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lrpet.__main__
import lrpet.experiments
from lrpet.__main__ import BROKEN_PIPE, DAMAGED, PAUSED, main
from lrpet.config import RunConfig, read_fields
from lrpet.experiments import Profile, load_profile
from lrpet.paths import results_root

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


@pytest.mark.parametrize(
    "damage",
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"run_id": "x"}'),
        ("environment.json", "{}"),
        ("config.json", '{"method": "of another version"}'),
        ("history.csv", ""),
        ("SHA256SUMS", "0"),
    ],
    ids=" ".join,
)
def test_a_damaged_run_is_named_and_the_others_go_on(own_experiments, capsys, damage):
    for experiment in load_profile("smoke").experiments:
        put(results_root(), experiment.config, 90.0)
    folder = next(e.config.folder() for e in load_profile("smoke").experiments if e.name == NAMES[1])
    (folder / damage[0]).write_text(damage[1])
    for verb, status in (("list", DAMAGED), ("check", 1)):
        assert main([verb]) == status
        shown = capsys.readouterr()
        assert [states(shown.out)[name].split()[0] for name in NAMES] == [
            "complete",
            "damaged",
            "complete",
            "complete",
        ]
        assert "3 of 4 complete" in shown.out
        assert shown.err.startswith(f"warning: {folder} is left out: {folder}/")
        assert shown.err.count("\n") == 1
    for asked, counted in (
        (["run"], "3 of 4 complete after"),
        (["run", NAMES[1]], "1 runs asked for, 0 complete"),
    ):
        assert main([*asked, "--device", "cpu"]) == DAMAGED  # and nothing is trained
        shown = capsys.readouterr()
        assert counted in shown.out and shown.err.startswith(f"warning: {folder} is left out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as PYTHONWARNINGS=ignore does
        assert main(["list"]) == DAMAGED


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
    assert " % (test) at " in out
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
        (
            ["train", "epochs"],
            "a field must be typed as FIELD=VALUE, as epochs=20 or crops=null; got 'epochs'",
        ),
        (["train", "epochs="], "got 'epochs='"),
        (["train", "=3"], "got '=3'"),
        (["train", "seed=3", "seed=4"], "seed must be given once; got 3 and '4'"),
        (["train", "epochs=1.5"], "epochs must be a whole number; got '1.5'"),
        (["train", "epochs=0x10"], "epochs must be a whole number; got '0x10'"),
        (["train", "epochs=1_0"], "epochs must be a whole number; got '1_0'"),
        (["train", "epochs=null"], "epochs must be a whole number; got 'null'"),
        (["train", "learning_rate=0,5"], "learning_rate must be a number, as 0.1 or 1e-4; got '0,5'"),
        (["train", "learning_rate=nan"], "learning_rate must be a number"),
        (["train", "learning_rate=1e999"], "learning_rate must be finite"),
        (["train", "sync_batchnorm=yes"], "sync_batchnorm must be true or false; got 'yes'"),
        (["train", "ranks=[1, 2"], "ranks must be a list, as [1, 2], or a map, as {conv1: 3}; got '[1, 2'"),
        (["train", "ranks={a: 1, a: 2}"], "ranks must name each layer once; got 'a' twice"),
        (["train", "ranks={a: b}"], "ranks of 'a' must be a whole number; got 'b'"),
        (["train", "milestones={a: 1}"], "milestones must be a list, as [1, 2]; got"),
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
    [
        *([], ["walk"], ["list", "--profile", "big"], ["run", "--jobs", "two"], ["train", "--epochs", "3"]),
        ["train", "--device", "cpu", "--device", "cuda"],  # the last would win without a word
        ["train", "--dev", "cpu"],
        *(["run", f"--time-budget={seconds}"] for seconds in ("nan", "-1", "inf", "soon")),
    ],
)
def test_arguments_that_mean_nothing_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: python -m lrpet" in capsys.readouterr().err


# ---------------------------------------------------------------- what is typed is what is read

TYPED = {
    "seed=010": 10,
    "seed=+7": 7,
    "epochs=1e2": 100,
    "learning_rate=1e-4": 0.0001,
    "learning_rate=.5": 0.5,
    "learning_rate=1": 1.0,
    "layers=*.conv1": "*.conv1",
    "layers=yes": "yes",
    "layers=a=b": "a=b",
    "layers=null": None,
    "milestones=[010, 12]": (10, 12),
    "milestones=[]": (),
    "ranks={layer1.0.conv1: 08, fc:3}": {"layer1.0.conv1": 8, "fc": 3},
    "sync_batchnorm=True": True,
}


@pytest.mark.parametrize(("text", "value"), TYPED.items(), ids=TYPED)
def test_a_field_is_read_as_it_is_typed(text, value):
    ((_, read),) = read_fields([text]).items()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("profile", ["smoke", "short", "paper", "imagenet"])
def test_every_configuration_can_be_typed(profile):
    for config in {e.config for e in load_profile(profile).experiments}:
        typed = [
            f"{name}={value if isinstance(value, str) else json.dumps(value).replace(chr(34), '')}"
            for name, value in config.to_dict().items()
        ]
        assert RunConfig.from_dict(read_fields(typed)) == config


@pytest.mark.parametrize("number", ["010", "0x10", "1:30", "1_000", "0b11", "1:30.5"])
def test_yaml_does_not_read_a_number_as_another(own_experiments, tmp_path, capsys, number):
    path = tmp_path / "experiments.yaml"
    path.write_text(path.read_text().replace("batch_size: 256", f"batch_size: {number}"))
    assert main(["list"]) == 1
    assert f"YAML reads {number} as another number" in capsys.readouterr().err


FIELD_NAMES = st.sampled_from(
    [*RunConfig.__dataclass_fields__, "sede", "", "--data", "--device", "-x", "data"]
)
VALUES = st.text(max_size=6) | st.sampled_from(
    [
        "010",
        "1e2",
        "[1,]",
        "[[1]]",
        "{a:1}",
        "{:}",
        "*.conv1",
        "null",
        "nan",
        "\udcff",
        "1" * 5000,
        "٣",
        "true",
    ]
)
WORDS = st.lists(st.builds("{}={}".format, FIELD_NAMES, VALUES) | FIELD_NAMES | VALUES, max_size=4)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["train", "train", "run", "list", "export", "walk"]), WORDS)
@example("train", [])
def test_any_command_line_is_carried_out_or_refused_in_words(verb, words):
    asked = []

    def stop(config, **_):
        asked.append(config)
        raise ValueError("trained")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(lrpet.__main__, "run", stop)
        patch.setattr(lrpet.__main__, "_run_apart", lambda *_: PAUSED)
        try:
            assert main([verb, *words]) in (0, 1, PAUSED)
        except SystemExit as end:  # of argparse: words that mean nothing, or --help
            assert end.code in (0, 2)
    if verb == "train" and asked:
        for name, value in read_fields([word for word in words if "=" in word and word[0] != "-"]).items():
            read = getattr(asked[0], name)
            assert read == value or read is None or value is None or name in ("milestones", "crops")


# ---------------------------------------------------------------- terminals


def test_a_terminal_that_knows_ascii_alone_shows_everything(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(lrpet.__main__, "load_profile", lambda name: Profile(name, "25 × 3", "a bit", ()))
    assert main(["list"]) == 0
    assert b"25 \\xd7 3" in shown.getvalue()


@pytest.mark.parametrize(("name", "value"), [("COLUMNS", "40"), ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_help_is_whole_on_any_terminal(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "FIELD=VALUE" in shown and "prune_ratio" in shown and "\x1b" not in shown


def test_a_reader_that_leaves_ends_a_command_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lrpet", "list", "--profile", "smoke"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(lrpet.__main__, "load_profile", lambda _: warnings.warn("look here", stacklevel=1))
    with warnings.catch_warnings(), pytest.raises(AttributeError):
        warnings.simplefilter("always")
        main(["list"])
    assert capsys.readouterr().err == "warning: look here\n"
