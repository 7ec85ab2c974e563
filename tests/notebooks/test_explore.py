"""The slider moves what it shows, here and in a live kernel; without a reader it is a picture."""

import base64

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

import lrpet
from lrpet.explore import RankExplorer, describe_projection, measure_by_depth

WIDGET = "application/vnd.jupyter.widget-view+json"


def matrix():
    return torch.randn(12, 30, generator=torch.Generator().manual_seed(1))


def test_description_agrees_with_project():
    M = matrix()
    P = lrpet.project(M, 4, energy_transfer=False)
    text = describe_projection(M, 4)
    assert f"LRP {100 * (P.norm() / M.norm()) ** 2:.1f} %, LRPET 100.0 %" in text
    assert f"LRP {(P - M).norm() / M.norm():.3f}" in text
    assert text.endswith("MACs: 47 % of dense")  # 4·(12 + 30) of 12·30


def test_slider_redraws():
    explorer = RankExplorer(matrix(), 4)
    before = explorer.picture.value
    explorer.slider.value = 9
    assert explorer.text.value == describe_projection(matrix(), 9)
    assert explorer.picture.value != before
    explorer.slider.value = 4
    assert explorer.picture.value == before
    assert (explorer.slider.min, explorer.slider.max) == (1, 12)


def test_slider_starts_inside_its_range():
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 12"):
        RankExplorer(matrix(), 13)


def run_cells(*cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    return [cell.outputs for cell in notebook.cells]


def test_slider_in_a_live_kernel(monkeypatch):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    _, live, still, moved = run_cells(
        "import torch; from lrpet.explore import RankExplorer; e = RankExplorer(torch.diag(torch.arange(1., 9.)), 2, live=True)",
        "e",
        "e.live = False; e",
        "before = e.picture.value, e.text.value; e.slider.value = 5; [a != b for a, b in zip(before, (e.picture.value, e.text.value))]",
    )
    assert WIDGET in live[0].data
    assert WIDGET not in still[0].data
    assert base64.b64decode(still[0].data["image/png"]).startswith(b"\x89PNG")
    assert still[0].data["text/plain"].startswith("R = 2 of 8")
    assert moved[0].data["text/plain"] == "[True, True]"


def test_measure_by_depth():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 2, 1),
    )
    model[1].weight.data.fill_(3.0)
    images = torch.randn(8, 3, 9, 9)
    table = measure_by_depth(model.train(), images)
    assert table["name"].tolist() == ["0", "3"]  # the last one has no BatchNorm behind it
    assert model.training
    assert model[1].num_batches_tracked == 0  # evaluation mode
    a = 3 / (1 + model[1].eps) ** 0.5
    assert table["norm"][0] == pytest.approx(a * model[0].weight.norm().item(), rel=1e-6)
    assert table["output"][1] == pytest.approx(model.eval()[:5](images).std().item(), rel=1e-6)
    assert not model[1]._forward_hooks


def test_measure_by_depth_leaves_no_hook_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.raises(RuntimeError):
        measure_by_depth(model, torch.randn(2, 5, 9, 9))
    assert model.training
    assert not model[1]._forward_hooks
