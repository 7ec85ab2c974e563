"""Other people's networks: nothing is wrong without a word, in the table that is committed and here."""

import json

import pytest
import torch

from lrpet.bench.models import examine
from lrpet.bench.models_page import _line, faults
from lrpet.bench.zoo import LIBRARIES, networks
from lrpet.paths import PROJECT

KINDS = (  # one or two of each kind of difficulty
    "mnasnet0_5",
    "edgenext_xx_small",
    "tf_efficientnet_lite0",
    "T5ForConditionalGeneration",
    "MixtralForCausalLM",
    "Wav2Vec2Model",
    "ResNetForImageClassification",
    "PSPNet, resnet18",
    "yolo11n",
)
NETWORKS = {network.name: network for network in networks() if network.name in KINDS}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what the libraries warn of in each other is not ours to mend
@pytest.mark.parametrize("name", KINDS)
def test_the_compact_network_is_the_projected_one(name):
    pytest.importorskip(LIBRARIES[NETWORKS[name].library])
    row = examine(NETWORKS[name], torch.device("cpu"), onnx=False)
    assert "failed" not in row, row["failed"]
    assert faults(row) == []
    assert row["moved"] > 1e-3 and row["taken"] and row["told_macs"] != row["dense_macs"]


def test_the_committed_table_has_no_fault_and_is_the_page():
    rows = json.loads((PROJECT / "results" / "bench" / "models-cpu.json").read_text())["rows"]
    page = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    assert len(rows) >= 40 and {row["library"] for row in rows} == set(LIBRARIES)
    assert [row["network"] for row in rows if faults(row) or row["moved"] < 1e-3] == []
    assert all(_line(row) in page for row in rows)
    assert [row["network"] for row in rows] == [network.name for network in networks()]


@pytest.mark.parametrize("name", ["error", "fold_error", "load_error", "onnx_error", "real_macs"])
def test_a_fault_is_found(name):
    right = dict.fromkeys(("error", "fold_error", "load_error", "onnx_error"), 0.0)
    right |= {"told_macs": 5, "real_macs": 5}
    assert faults(right) == [] and len(faults(right | {name: 1.0})) == 1
    assert len(faults(right | {name: float("nan")})) == 1
