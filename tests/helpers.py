"""What several test files need: networks, refusals, runs as processes and in the store, notebooks."""

import ast
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrpet import RunConfig, run
from lrpet.__main__ import main
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT
from lrpet.training.checkpoint import save_checkpoint

TINY = {"epochs": 2, "milestones": (1,), "batch_size": 256}  # a run of 12 steps on the digits


PROFILE_YAML = """
smoke:
  note: a note
  cost: nothing
  settings: {epochs: 2, milestones: [1]}
  seeds: [1, 2]
  experiments:
    a: {feeds: x, method: dense}
    b: {feeds: x, method: lrp, seeds: [2]}
"""


def refused(call, *words, kind=ValueError):
    """Assert that a call is refused in such words: argument, what came, what to do; of a set, one."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    text = str(error)
    assert type(error) is kind or type(error).__module__.startswith("lrpet")  # no UnicodeError by chance
    for word in words:
        assert any(choice in text for choice in word) if isinstance(word, set) else word in text, (word, text)


def relative_error(value, reference):
    """Largest relative Frobenius error over a batch of matrices; 0 where both are zero."""
    difference = torch.linalg.vector_norm((value.double() - reference.double()).flatten(-2), dim=-1)
    size = torch.linalg.vector_norm(reference.double().flatten(-2), dim=-1)
    assert not difference[size == 0].any()
    return (difference / size.where(size > 0, 1.0)).max().item()


@torch.no_grad()
def randomize_batchnorms(model):
    """Give every BatchNorm statistics and parameters that folding and rectification must not ignore."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


class Zoo(nn.Module):
    """Convolutions of all kinds: 3×3, 1×1, 5×1, strided, dilated, bias, N > D, N < D, grouped, depthwise."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)  # registered first, runs last
        self.square = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.tall = nn.Conv2d(16, 40, 1, stride=2)
        self.depthwise = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.column = nn.Conv2d(40, 8, (5, 1), padding=(2, 0))
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.dilated = nn.Conv2d(8, 12, 3, dilation=2, padding=2)

    def forward(self, x):
        x = torch.relu(self.bn(self.square(x)))
        x = torch.relu(self.bn2(self.pointwise(x)))
        x = torch.relu(self.depthwise(self.tall(x)))
        x = self.dilated(self.grouped(self.column(x)))
        return self.head(x.mean(dim=(2, 3)))


ZOO_RANKS = {"square": 5, "pointwise": 4, "tall": 6, "column": 3, "dilated": 7}


def outcome(folder):
    """Everything that a run has to say, without the seconds it took."""
    summary = {
        name: value
        for name, value in json.loads((folder / "summary.json").read_text()).items()
        if not name.endswith("_seconds")
    }
    history = pd.read_csv(folder / "history.csv")
    history = history[[name for name in history.columns if not name.endswith("_seconds")]]
    binary = ("layers.csv", "compact.safetensors", "spectra.npz", "gradients.csv")
    return summary, history.to_csv(), *((folder / name).read_bytes() for name in binary)


def run_and_report(fields, results, pipe):
    """Do a run, sending the row of each trained epoch, then its summary; for a process that a test starts."""
    done = run(RunConfig.from_dict(fields), results=results, device="cpu", progress="off", on_epoch=pipe.send)
    pipe.send(done.summary)


def die_at_change(number):
    """Let this process be killed at the n-th moment from now at which a file is about to change."""
    left = itertools.count(1)

    def deadly(function):
        def wrapped(*given, **options):
            if next(left) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **options)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def command(arguments, die_at=None):
    """Be ``python -m lrpet``, for a process that a test starts."""
    if die_at is not None:
        die_at_change(die_at)
    sys.exit(main(arguments))


def save_and_die(path, state, die_at):
    """Write a checkpoint, and be killed at the n-th moment at which a file is about to change."""
    die_at_change(die_at)
    save_checkpoint(path, state)


def in_folders(places, function, *arguments):
    """Call a function with the environment variables of a test, for a process that it starts."""
    os.environ.update(places)
    function(*arguments)


def read_notebook(path):
    """Return a notebook and its code cells."""
    import nbformat  # here, because a machine that only tests networks has no Jupyter

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(path):
    """Return the source of a notebook's cell tagged parameters, and its names with their default values."""
    cells = [cell for cell in read_notebook(path)[1] if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    values = {
        statement.target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(cells[0].source).body
    }
    return cells[0].source, values


def execute(name, folder, parameters):
    """Execute a notebook as the Snakefile does, with parameters in YAML; return process and result."""
    out = folder / f"{name}.ipynb"
    done = subprocess.run(
        [PROJECT / "scripts" / "execute.sh", f"notebooks/{name}.ipynb", out, "-y", parameters],
        cwd=PROJECT,
        env={**os.environ, "PYTHON": sys.executable, "JUPYTER_PREFER_ENV_PATH": "1"},
        capture_output=True,
        text=True,
    )
    return done, out


def put(results, config, top1_pct, **more):
    """Write a finished run as the store keeps it."""
    folder = config.folder(results)
    folder.mkdir(parents=True)
    summary = {
        "run_id": config.run_id,
        "scored_on": "test",
        config.metric.column: top1_pct,
        f"best_{config.metric.column}": top1_pct + 0.5,
        "macs": 56_058_496,
    }
    summary |= {
        "params": 398_524,
        "dense_macs": 125_485_696,
        "train_seconds": 60.0,
        "compact_max_relative_error": 1e-6,
    } | more
    environment = {"device": "d", "commit": "c", "finished": "f", "data_train_sha256": "s"}
    for name, content in (("config", config.to_dict()), ("summary", summary), ("environment", environment)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name in ("history", "layers"):
        (folder / f"{name}.csv").write_text("epoch\n1\n")


def experiment(profile, name):
    """Return the configuration of one experiment."""
    return next(e.config for e in load_profile(profile).experiments if e.name == name)


def drawn_texts(figure):
    """Draw a figure; return what is written on its canvas with the box of each text, in pixels."""
    from matplotlib.text import Text

    found, draw = {}, Text.draw

    def draw_and_note(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found[id(text)] = (text.get_text(), text.get_window_extent(renderer))

    with mock.patch.object(Text, "draw", draw_and_note):
        figure.png()
    return list(found.values())


def check_layout(figure, name=""):
    """Assert that no text is cut off or on another, legends hide nothing, panels have half the height."""
    texts = drawn_texts(figure)
    page, panels = figure.bbox, [ax.get_window_extent() for ax in figure.axes]
    for text, box in texts:
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < page.x1 + 1 and box.y1 < page.y1 + 1
        assert inside, f"{name}: {text!r} leaves the canvas"
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        apart = (min(a.x1, b.x1) - max(a.x0, b.x0) < -2) or (min(a.y1, b.y1) - max(a.y0, b.y0) < 1)
        assert apart, f"{name}: {one!r} overlaps {other!r}"
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(box) for box in panels), (
            f"{name}: legend on panels"
        )
    rows = sorted((box.y0, box.y1) for box in panels)
    covered = sum(
        max(0, top - max([bottom, *(t for _, t in rows[:k])])) for k, (bottom, top) in enumerate(rows)
    )
    assert covered >= page.height / 2 or not panels, (
        f"{name}: panels have {covered / page.height:.0%} of the height"
    )


# Machado, Oliveira and Fernandes 2009: normal sight, then no red, no green, no blue cones, on linear RGB
COLOUR_BLINDNESS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


def linear_rgb(color):
    """Return a colour of Matplotlib as light, without the gamma of a screen."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab_of(rgb):
    """Return linear RGB in CIELAB, in which equal distances look equal."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ rgb / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def in_two_processes(target, store):
    """Call ``target(rank, store, pipe)`` in two processes that start anew; return what each sends."""
    context, heard, started = multiprocessing.get_context("spawn"), [], []
    for rank in range(2):
        here, there = context.Pipe()
        started.append(context.Process(target=target, args=(rank, store, there)))
        started[-1].start()
        heard.append(here)
    results = [pipe.recv() if pipe.poll(120) else None for pipe in heard]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    return results
