"""Exports compute what the network computes, for a batch of any size."""

import json
import sys
from importlib import import_module

import pytest
import torch
from helpers import TINY, randomize_batchnorms, refused
from torch import nn

from lrpet import (
    LowRankProjector,
    RunConfig,
    build_model,
    factorize,
    fold_batchnorm,
    load_compact,
    ranks_from_ratio,
    run,
)
from lrpet.__main__ import main
from lrpet.deploy.export import export
from lrpet.runs.export import export_run, find_run
from lrpet.runs.store import load_network


def compact():
    model = randomize_batchnorms(build_model("resnet8")).eval()
    ranks = ranks_from_ratio(model, 0.57)
    LowRankProjector(model, ranks).step()
    return fold_batchnorm(factorize(model, ranks))


@pytest.fixture
def finished(tmp_path):
    return run(RunConfig(method="lrpet", **TINY), device="cpu", progress="off")


def test_pt2_holds_the_network_with_a_batch_of_any_size(tmp_path):
    network = compact()
    assert export(network, tmp_path / "net.pt2", "pt2", (3, 32, 32)) <= 1e-4
    program = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        assert (program(x) - network(x)).abs().max() <= 1e-4 * network(x).abs().max()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["net.pt2"]


def test_onnx_holds_the_network_with_a_batch_of_any_size(tmp_path):
    pytest.importorskip("onnxscript", reason="pip install lrpet[export]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install lrpet[export]")
    network = compact()
    assert export(network, tmp_path / "net.onnx", "onnx", (3, 32, 32)) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        output = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        assert (output - network(x)).abs().max() <= 1e-4 * network(x).abs().max()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["net.onnx"]


def test_a_program_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.export, "load", lambda _: type("Program", (), {"module": lambda self: nn.Conv2d(3, 4, 3)})()
    )
    wrong = nn.Conv2d(3, 4, 3).eval(), tmp_path / "net.pt2", "pt2", (3, 8, 8)
    refused(lambda: export(*wrong), "pt2", "differs from the network", "nothing was written")
    assert not list(tmp_path.glob("*.pt2"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        import_module("lrpet.deploy.export").importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else sys,
    )
    given = nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", "onnx", (3, 8, 8)
    refused(lambda: export(*given), "ONNX", "onnxscript", "pip install lrpet[export]")


def test_a_run_is_exported_by_its_id_and_by_its_folder(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    id = finished.config.run_id
    assert main(["export", id, "--to", "pt2"]) == 0
    assert f"{id}.pt2: largest difference of an output" in capsys.readouterr().out
    assert main(["export", str(finished.folder), "--to", "safetensors", "--out", "net.safetensors"]) == 0
    size = finished.config.image_size
    x = torch.randn(2, 3, size, size)
    network = load_compact("net.safetensors", build_model(finished.config.model)).eval()
    reference = network(x)
    output = torch.export.load(f"{id}.pt2").module()(x)
    assert (output - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("method", ["dense", "lrpet", "filter_pruning"])
def test_weights_in_half_precision_stand_in_for_those_that_were_trained(tmp_path, capsys, method):
    done = run(RunConfig(method=method, **TINY), device="cpu", progress="off")
    trained, kept = load_network(done).eval(), done.folder / "compact-half.safetensors"
    assert main(["export", done.config.run_id, "--to", "safetensors", "--half", "--out", str(kept)]) == 0
    told = float(capsys.readouterr().out.split()[-1])
    whole = done.folder / "compact.safetensors"
    assert kept.stat().st_size < 0.6 * whole.stat().st_size
    whole.unlink()
    rounded = load_network(done).eval()
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    x = torch.randn(16, 3, 8, 8)
    difference = (rounded(x) - trained(x)).abs().max() / trained(x).abs().max()
    assert 0 < difference < 0.01 and 0 < told < 0.01
    assert main(["export", done.config.run_id, "--to", "safetensors", "--out", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == kept.read_bytes()


def test_mistakes_are_named(finished, tmp_path, capsys):
    assert main(["export", "nothing", "--to", "pt2"]) == 1
    assert "'nothing'" in (told := capsys.readouterr().err) and "'list' shows ids" in told
    folder, net = str(finished.folder), nn.Conv2d(3, 4, 3)
    refused(lambda: export_run(folder, "tflite"), "to ", "onnx, pt2, safetensors", "'tflite'")
    refused(lambda: export_run(folder, "onnx", half=True), "half", "safetensors", "'onnx'")
    refused(lambda: export(net, tmp_path / "x", "safetensors", (3, 8, 8)), "to ", "onnx", "'safetensors'")
    other = finished.folder.parents[2] / "short" / "runs" / finished.config.run_id
    other.mkdir(parents=True)
    (other / "summary.json").write_text(json.dumps({}))
    refused(lambda: find_run(finished.config.run_id), finished.config.run_id, "2 profiles; give its folder")
    (finished.folder / "compact.safetensors").unlink()
    refused(lambda: export_run(folder, "pt2", tmp_path / "x.pt2"), "compact.safetensors", "few runs")
