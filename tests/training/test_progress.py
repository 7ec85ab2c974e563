import io
import itertools
import re
import sys

import pytest

from lrpet.config import RunConfig
from lrpet.training.progress import Progress, bar_is_possible

ROW = {"epoch": 1, "train_loss": 0.5, "train_top1_pct": 80.0, "scored_on": "test", "top1_pct": 75.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environ", "stream", "kernel", "possible"),
    [
        ({}, Terminal(), False, True),
        ({}, io.StringIO(), False, False),
        (
            {"TERM": "xterm", "PYTHONPATH": "x"},
            io.StringIO(),
            True,
            False,
        ),  # papermill and nbconvert start such kernels
        ({"JPY_SESSION_NAME": "a.ipynb"}, io.StringIO(), True, True),
        ({"VSCODE_PID": "1"}, io.StringIO(), True, True),
        ({"VSCODE_PID": "1"}, io.StringIO(), False, False),  # the terminal of VS Code, piped into a file
    ],
)
def test_a_bar_is_drawn_where_somebody_watches(monkeypatch, environ, stream, kernel, possible):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert bar_is_possible(environ, stream) == possible


def test_standard_error_is_the_stream_that_counts(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bar_is_possible({})
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not bar_is_possible({})


def show(mode, epochs=3, steps=4):
    progress = Progress(RunConfig(epochs=epochs, milestones=()), steps, mode=mode)
    for done in range(1, epochs * steps + 1):
        epoch = (done - 1) // steps
        progress.step(epoch, ROW, done)
        if done % steps == 0:
            progress.epoch(ROW | {"epoch": epoch + 1}, done)
    progress.close()


def test_a_clock_that_is_set_back_changes_no_bar_and_no_time_left(monkeypatch, capsys):
    steady, daily = itertools.count(0.0), itertools.count(0.0, -86_400.0)
    monkeypatch.setattr("time.monotonic", lambda: next(steady))
    monkeypatch.setattr("tqdm.std.time", lambda: next(daily))  # what tqdm itself would go by
    show("bar")
    drawn = capsys.readouterr().err.split("\r")
    assert len(drawn) > 6  # it did not stand still
    assert not any(re.search(r"[\[<, ]-\d", line) for line in drawn), drawn  # no time is negative
    show("lines")
    assert not re.search(r"-[\d.]+ min left", capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["lines", "auto"])
def test_lines_are_one_an_epoch(monkeypatch, capsys, mode):
    monkeypatch.setattr("lrpet.training.progress.bar_is_possible", lambda: False)
    show(mode)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [
        f"-s1-{RunConfig(epochs=3, milestones=()).run_id[-6:]}  epoch   {epoch}/3" in line
        for epoch, line in zip((1, 2, 3), lines, strict=True)
    ] == [True] * 3
    assert all(
        "loss 0.500" in line
        and "train 80.00 %" in line
        and "test 75.25 %" in line
        and line.endswith("min left")
        for line in lines
    )
    assert lines[-1].endswith(" 0.0 min left")
    assert err == ""


@pytest.mark.parametrize("mode", ["bar", "auto"])
def test_a_bar_shows_title_epoch_loss_and_accuracy(monkeypatch, capsys, mode):
    monkeypatch.setattr("lrpet.training.progress.bar_is_possible", lambda: True)
    show(mode)
    out, err = capsys.readouterr()
    assert out == ""
    assert "digits-resnet8-lrpet-0.57-s1-" in err
    assert "12/12" in err
    assert "epoch 3/3, loss 0.500, train 80.00 %" in err


def test_off_shows_nothing(capsys):
    show("off")
    assert capsys.readouterr() == ("", "")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="progress must be auto, bar, lines or off; got 'line'"):
        Progress(RunConfig(), 4, mode="line")
