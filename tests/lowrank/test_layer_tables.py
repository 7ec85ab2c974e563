"""Reports, plans and costs as text, as HTML, as a DataFrame, and as numbers for a logger."""

import json
import pickle

import pandas as pd
import pytest
import torch
from torch import nn

import lrpet
from lrpet.lowrank import LayerReport, Report

MODEL = nn.Sequential(
    nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(64, 4)
).eval()


def tables():
    return {
        "plan": lrpet.select(MODEL, prune_ratio=0.5),
        "cost": lrpet.cost(MODEL, (8, 6, 6), [8]),
        "report": lrpet.LowRankProjector(MODEL, [8]).step(),
        "factorization": lrpet.factorize(MODEL, [8]).factorization,
    }


@pytest.mark.parametrize("what", tables())
def test_text_html_and_frame_tell_the_same(what):
    table = tables()[what]
    lines, html, frame = str(table).splitlines(), table._repr_html_(), table.to_pandas()
    assert len(lines) == len(frame) + 2 == len(table.layers) + 2
    assert html.count("<tr>") == len(frame) + 1
    for cells in table.cells():
        for cell in cells:
            assert f">{cell}<" in html and cell in str(table)
    assert lines[-1] == table.footer() and table.footer() in html
    assert list(frame["name"]) == [layer.name for layer in table.layers]
    ranks = [None if pd.isna(rank) else rank for rank in frame["rank"]]
    assert ranks == [layer.rank for layer in table.layers]


def test_names_and_reasons_are_escaped_in_html():
    html = Report([LayerReport("<b>", 2, 0.5, "left alone", "1e-9 < 1e-4 & dead")])._repr_html_()
    assert "<td>&lt;b&gt;</td>" in html and "1e-9 &lt; 1e-4 &amp; dead" in html


def test_a_cost_names_what_else_multiplies():
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.rand(1, 5, 8)
    counted = lrpet.cost(model, example_inputs=(x, x, x))
    assert counted.other_macs and "not in these totals: MultiheadAttention: bmm" in str(counted)


def test_a_report_is_a_list_and_survives_copying():
    report = tables()["report"]
    assert isinstance(report, list) and report[0].name == "0" and len(report) == 2
    again = pickle.loads(pickle.dumps(report))
    assert type(again) is Report and str(again) == str(report)


def test_metrics_are_numbers_that_any_logger_takes():
    report = tables()["report"]
    metrics = report.metrics()
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics == {
        "layers_projected": 1,
        "layers_dense": 1,
        "energy_kept_mean": report[0].energy_kept,
        "energy_kept_min": report[0].energy_kept,
        "energy_kept/0": report[0].energy_kept,
        "rank/0": 8,
    }
    assert Report([LayerReport("0", 8, float("nan"), "left alone", "dead")]).metrics() == {
        "layers_left_alone": 1,
        "rank/0": 8,
    }
