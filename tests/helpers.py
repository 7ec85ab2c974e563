"""What several test files need: networks with used BatchNorms, and the difference of two tensors."""

import itertools
import json
import os
import signal
import sys

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lrpet import RunConfig, run
from lrpet.__main__ import main
from lrpet.training.checkpoint import save_checkpoint

TINY = {"epochs": 2, "milestones": (1,), "batch_size": 256}  # a run of 12 steps on the digits


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
    """Convolutions of every kind: 3×3, 1×1, 5×1, strided, dilated, with bias, N > D, N < D, grouped, depthwise."""

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
    """Do a run, sending the row of each epoch it trains and then its summary; for a process that a test starts."""
    done = run(RunConfig.from_dict(fields), results=results, device="cpu", progress="off", on_epoch=pipe.send)
    pipe.send(done.summary)


def die_at_change(number):
    """Let this process be killed at the n-th moment, counted from here, at which a file is about to change."""
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
