"""Accuracy against measured time: runs are found by the settings that the benchmark chose."""

import pandas as pd
import pytest
import torch

from lrpet import RunConfig, build_model, figures, tables
from lrpet.lowrank.cost import cost

RANKS = {"conv1": 16, "layer1.0.conv1": 32}
SETTINGS = {
    "dense": {"method": "dense"},
    "by latency": {"ranks": RANKS, "unfolding": {"conv1": "rows", "layer1.0.conv1": "columns"}},
    "uniform": {"prune_ratio": 0.6, "multiple_of": 16},
    "narrow": {"method": "narrow", "prune_ratio": 0.5},
}


def run(accuracy, **settings):
    base = {"dataset": "imagefolder", "image_size": 64, "model": "resnet18", "epochs": 2, "milestones": (1,)}
    config = RunConfig(**(base | {"method": "lrpet", "prune_ratio": None} | settings))
    return {"config": config, "seed": config.seed, "top1_pct": accuracy}


def test_each_way_has_its_own_runs():
    runs = pd.DataFrame(
        [
            run(69.0, **SETTINGS["dense"]),
            run(66.0, **SETTINGS["by latency"]),
            run(67.0, seed=2, **SETTINGS["by latency"]),
            run(65.0, **SETTINGS["uniform"]),
            run(64.0, prune_ratio=0.6),  # not at multiples of 16
            run(None, **SETTINGS["narrow"]),
        ]
    )
    timed = {"dense": 4.0, "by latency": 2.0, "uniform": 2.1, "narrow": 1.9}
    rows = [
        {"way": way, "settings": SETTINGS[way], "milliseconds": ms, "speedup": 4 / ms}
        for way, ms in timed.items()
    ]
    table = tables.equal_latency_table({"rows": rows}, runs)
    found = table.groupby("way", sort=False).top1_pct.agg(list)
    assert found["dense"] == [69.0]
    assert found["by latency"] == [66.0, 67.0]
    assert found["uniform"] == [65.0]
    assert table[table.way == "narrow"].top1_pct.isna().all()
    told = "In equal time: LRPET, ranks by latency 66.5 %; LRPET, one ratio 65.0 %"
    assert figures.plot_equal_latency(table).finding == told
    decided = tables.equal_latency_differences(table).set_index("pair")
    assert decided.loc["by latency − uniform", ["difference", "n", "verdict"]].tolist() == [
        "+1.00",
        1,
        "too few seeds",
    ]
    assert decided.loc["by latency − narrow", "difference"] == "not run"
    untrained = table.assign(top1_pct=None)
    assert figures.plot_equal_latency(untrained).finding == "Networks of equal latency have not been trained"


def test_ranks_by_latency_are_judged_by_the_rule_of_all_tables():
    ways = {"by latency": [66.0, 66.1, 66.2], "uniform": [65.0, 65.1, 65.3], "narrow": [66.0, 65.9, 66.4]}
    rows = [
        {"way": way, "seed": seed, "top1_pct": accuracy}
        for way, accuracies in ways.items()
        for seed, accuracy in enumerate(accuracies, 1)
    ]
    decided = tables.equal_latency_differences(pd.DataFrame(rows)).set_index("pair")
    assert decided.verdict.to_dict() == {"by latency − uniform": "higher", "by latency − narrow": "undecided"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_narrow_resnet_has_fewer_channels_and_runs(name):
    network = build_model(name, num_classes=10, width=0.5).eval()
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    share = cost(network, (3, 64, 64)).macs / cost(build_model(name, num_classes=10), (3, 64, 64)).macs
    assert 0.25 < share < 0.3  # a quarter, and the first layer's half
    assert network.layer1[0].conv1.weight.std() > 0.02  # torchvision's own initialization
