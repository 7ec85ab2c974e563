"""Numbers that README, docs and notebooks state, each computed from the run folders that it comes from."""

import json
import re

import nbformat
import pytest

from lrpet.paths import PROJECT

RUNS = PROJECT / "results"
SCALED, SHORT = "scaled/runs/cifar10", "short/runs/cifar10"


def top1(pattern):
    """Return the accuracies of the runs whose folders fit a pattern, by seed; there is one of each seed."""
    found = {}
    for file in sorted(RUNS.glob(f"{pattern}/summary.json")):
        seed = int(re.search(r"-s(\d+)-", file.parent.name)[1])
        config = json.loads((file.parent / "config.json").read_text())
        changed = ("matched_steps", "pretrain_epochs", "unfolding")
        if config.get("bn_rectification") is False or any(config.get(name) for name in changed):
            continue  # of an ablation
        if (config["projection_interval"], config["projection_unit"]) not in ((1, "epoch"), (None, None)):
            continue
        assert seed not in found, file
        found[seed] = json.loads(file.read_text())["top1_pct"]
    assert found, pattern
    return found


def mean(pattern):
    values = top1(pattern)
    return sum(values.values()) / len(values)


def summary(folder):
    return json.loads((RUNS / folder / "summary.json").read_text())


def gain(seed):
    lrpet, lrp = (top1(f"{SCALED}-plain20-{m}-0.57-s*")[seed] for m in ("lrpet", "lrp"))
    return lrpet - lrp


def text_of(name):
    """Return a page, or a notebook with the text of its outputs."""
    path = PROJECT / name
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    told = [o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs]
    return "\n".join([*(cell.source for cell in cells), *told])


HALF = "short/runs/cifar10-resnet20-lrpet-0.57-s1-1190cc"
DENSE, NARROW = f"{SCALED}-resnet20-dense-s*", f"{SCALED}-resnet20-narrow-0.57-s*"
LRP, LRPET = f"{SCALED}-resnet20-lrp-0.57-s*", f"{SCALED}-resnet20-lrpet-0.57-s*"
MACS = summary("scaled/runs/cifar10-resnet20-lrpet-0.57-s5-d61c19")
TRACED = [  # page, the words around the number with # in its place, format, value, where from
    ("README.md", "LRP and LRPET end # and", ".1f", lambda: mean(DENSE) - mean(LRP)),
    ("README.md", "and # points below the dense network", ".1f", lambda: mean(DENSE) - mean(LRPET)),
    (
        "README.md",
        "which has # times as many multiply-adds",
        ".1f",
        lambda: MACS["dense_macs"] / MACS["macs"],
    ),
    ("README.md", "energy transfer gained # and", ".0f", lambda: min(gain(1), gain(2))),
    ("docs/evidence.md", "LRPET is # and", ".1f", lambda: gain(1)),
    ("docs/evidence.md", "LRPET is 4.7 and # points above LRP", ".1f", lambda: gain(2)),
    (
        "docs/evidence.md",
        "| resnet20 | dense | | 16 | 40.55 | 0.270 | #",
        ".2f",
        lambda: mean(DENSE),
    ),
    ("notebooks/08_tables.ipynb", "| # [84.36, 85.12] (n=5)", ".2f", lambda: mean(LRP)),
    ("notebooks/08_tables.ipynb", "| # [83.92, 85.20] (n=5)", ".2f", lambda: mean(LRPET)),
    ("notebooks/08_tables.ipynb", "| # [84.59, 85.08] (n=5)", ".2f", lambda: mean(NARROW)),
    ("notebooks/01_cifar10.ipynb", "compact, loaded: # M MACs", ".2f", lambda: summary(HALF)["macs"] / 1e6),
    (
        "results/README.md",
        "which was decided before its outcome was known: # %",
        ".2f",
        lambda: summary(HALF)["top1_pct"],
    ),
]


@pytest.mark.parametrize(
    ("page", "words", "written", "value"), TRACED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_number_is_that_of_its_runs(page, words, written, value):
    text = " ".join(text_of(page).split())
    expected = " ".join(words.replace("#", format(value(), written)).split())
    assert expected in text
