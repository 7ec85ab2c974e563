"""Exports compute what the network computes, for any inputs and outputs."""

import importlib.util
import json
import sys
from collections import UserDict

import pytest
import torch
from helpers import TINY, randomize_batchnorms, refused
from torch import nn
from torch.utils._pytree import tree_leaves

import lrpet
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
from lrpet.deploy.export import TOLERANCES, export
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


def run_file(path, *inputs):
    """Return what a program of either format computes, as a list."""
    if path.suffix == ".pt2":
        return tree_leaves(torch.export.load(path).module()(*inputs))
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install lrpet[export]")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, given)]


def names_of(path):
    import onnx

    graph = onnx.load(path).graph
    return [node.name for node in graph.input], [node.name for node in graph.output]


needs_onnx = pytest.mark.skipif(
    not importlib.util.find_spec("onnxscript"), reason="pip install lrpet[export]"
)
both = pytest.mark.parametrize("to", ["pt2", pytest.param("onnx", marks=needs_onnx)])


@both
def test_a_file_holds_the_network_with_a_batch_of_any_size(tmp_path, to):
    network, path = compact(), tmp_path / f"net.{to}"
    assert lrpet.export(network, path, example_inputs=torch.rand(1, 3, 32, 32)) <= 1e-4
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        expected = network(x)
        assert (run_file(path, x)[0] - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    if to == "onnx":
        assert names_of(path) == (["x"], ["output"])


class Nested(nn.Module):
    """Takes several inputs, and returns a nest of outputs, one of them a whole number."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x, scale=None, *, ids=None):
        y = self.bn(self.conv(x))
        y = y if scale is None else y * scale[:, None, None, None]
        y = y if ids is None else y + ids.to(y.dtype).mean()
        logits = self.head(y.mean((2, 3)))
        return {"x": y, "pair": (logits, logits.argmax(1))}


X, SCALE, IDS = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.arange(5)  # IDS have no batch
INPUTS = {
    "tensor": X,
    "tuple": (X, SCALE),
    "dict": {"ids": IDS, "scale": SCALE, "x": X},
    "mapping": UserDict(x=X),
    "nest": [X, (X, {"y": X})],
}


class OfNest(nn.Module):
    def forward(self, given):
        return given[0] + given[1][0] * given[1][1]["y"]


@both
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_inputs_and_outputs_are_exported(tmp_path, to, kind, dynamic):
    net, path = (OfNest() if kind == "nest" else Nested()).train(), tmp_path / f"net.{to}"
    net.eval() if kind == "nest" else net.bn.eval()
    modes = [module.training for module in net.modules()]
    assert export(net, path, example_inputs=INPUTS[kind], dynamic_batch=dynamic) <= 1e-4
    assert [module.training for module in net.modules()] == modes
    if kind == "tuple":
        count = 3 if dynamic else 2
        given = torch.randn(count, 3, 8, 8), torch.rand(count)
        expected = tree_leaves(net.eval()(*given))
        for found, wanted in zip(run_file(path, *given), expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-5
        assert to == "pt2" or names_of(path) == (["x", "scale"], ["x_output", "pair_0", "pair_1"])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_float_type_is_exported_to_pt2(tmp_path, dtype):
    net = Nested().to(dtype)
    assert export(net, tmp_path / "net.pt2", input_shape=(3, 8, 8)) <= TOLERANCES[dtype]
    assert run_file(tmp_path / "net.pt2", X.to(dtype))[0].dtype == dtype


@needs_onnx
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_float_type_is_exported_to_onnx_and_what_cannot_run_here_says_so(tmp_path, dtype):
    net, path = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype), tmp_path / "net.onnx"
    x = torch.rand(2, 6).to(dtype)
    if dtype == torch.bfloat16:
        with pytest.warns(UserWarning, match="onnxruntime cannot run this program on a CPU"):
            assert export(net, path, example_inputs=x) <= 5e-2
        wrong = nn.Conv2d(3, 4, 3).to(dtype), tmp_path / "conv.onnx"
        refused(lambda: export(*wrong, input_shape=(3, 8, 8)), "no valid ONNX", "bfloat16", "float()")
        assert not wrong[1].exists()
    else:
        assert export(net, path, example_inputs=x) <= TOLERANCES[dtype]
        assert (run_file(path, x)[0] - net(x)).abs().max() <= TOLERANCES[dtype]


@both
def test_batchnorm_and_dropout_are_exported_in_evaluation_mode(tmp_path, to):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), randomize_batchnorms(nn.BatchNorm2d(4)), nn.Dropout(0.5)).train()
    export(net, tmp_path / f"net.{to}", input_shape=(3, 8, 8))
    assert net.training and net[1].num_batches_tracked == 0
    found = run_file(tmp_path / f"net.{to}", X)[0]
    torch.testing.assert_close(found, net.eval()(X), atol=1e-5, rtol=1e-4)


def test_infinite_and_zero_outputs_are_compared_too(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0.5, -torch.inf), x * 0

    assert export(Masked(), tmp_path / "net.pt2", example_inputs=torch.rand(2, 9)) == 0


def test_a_compact_network_is_exported_to_safetensors(tmp_path):
    network = compact()
    assert lrpet.export(network, tmp_path / "net.safetensors") == 0
    again = load_compact(tmp_path / "net.safetensors", build_model("resnet8")).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(x), network(x))


def as_program(module):
    return type("Program", (), {"module": lambda self: module})()


@pytest.mark.parametrize("given", [{"input_shape": (3, 8, 8)}, {"example_inputs": X, "dynamic_batch": False}])
def test_a_program_that_computes_something_else_is_not_written(tmp_path, monkeypatch, given):
    net, path = nn.Conv2d(3, 4, 3).eval(), tmp_path / "net.pt2"
    others = {
        "differs from the network": nn.Conv2d(3, 4, 3),
        "differs from the network by nan": nn.Sequential(net, nn.Threshold(1e9, float("nan"))),
        "shapes": nn.Conv2d(3, 5, 3),
    }
    for words, other in others.items():
        monkeypatch.setattr(torch.export, "load", lambda _, other=other: as_program(other))
        refused(lambda: export(net, path, **given), words)
        assert not list(tmp_path.glob("*.pt2"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else sys,
    )
    given = nn.Conv2d(3, 4, 3), tmp_path / "net.onnx", "onnx", (3, 8, 8)
    refused(lambda: export(*given), "onnxscript", "pip install lrpet[export]", kind=ImportError)


class Branching(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


MISTAKES = {
    "no folder": (nn.ReLU(), "no/such/a.pt2", {"input_shape": (3, 8, 8)}, ["path", "no folder", "such"]),
    "ending": (
        nn.ReLU(),
        "a.tflite",
        {"input_shape": (3, 8, 8)},
        ["path", ".onnx, .xml, .pt2, .safetensors", "to="],
    ),
    "no inputs": (nn.ReLU(), "a.pt2", {}, ["input_shape", "example_inputs"]),
    "both": (nn.ReLU(), "a.pt2", {"input_shape": (3, 8, 8), "example_inputs": X}, ["input_shape", "either"]),
    "no tensor": (nn.ReLU(), "a.pt2", {"example_inputs": "x"}, ["example_inputs", "tensor", "str"]),
    "no batch": (nn.ReLU(), "a.pt2", {"example_inputs": torch.tensor(1.0)}, ["dynamic_batch=False"]),
    "fixed batch": (Fixed(), "a.pt2", {"example_inputs": X}, ["Fixed", "dynamic_batch=False"]),
    "branch": (
        Branching(3, 4, 1),
        "a.pt2",
        {"input_shape": (3, 8, 8)},
        ["Branching cannot be exported to pt2"],
    ),
    "channels": (nn.Conv2d(3, 4, 1), "a.pt2", {"input_shape": (5, 8, 8)}, ["Conv2d cannot be", "3 channels"]),
    "dense": (nn.Conv2d(3, 4, 1), "a.safetensors", {}, ["factorize()"]),
    "module": ("net", "a.pt2", {"input_shape": (3, 8, 8)}, ["'net'"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_cannot_be_exported_is_refused_in_words_and_nothing_is_left(tmp_path, kind):
    net, name, given, words = MISTAKES[kind]
    kind = TypeError if kind == "module" else ValueError
    refused(lambda: export(net, tmp_path / name, **given), *words, kind=kind)
    assert not list(tmp_path.iterdir())


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
    refused(lambda: export_run(folder, "tflite"), "to ", "onnx, openvino, pt2, safetensors", "'tflite'")
    refused(lambda: export_run(folder, "onnx", half=True), "half", "safetensors", "'onnx'")
    refused(lambda: export(net, tmp_path / "x", "tflite", (3, 8, 8)), "to ", "onnx", "'tflite'")
    other = finished.folder.parents[2] / "short" / "runs" / finished.config.run_id
    other.mkdir(parents=True)
    (other / "summary.json").write_text(json.dumps({}))
    refused(lambda: find_run(finished.config.run_id), finished.config.run_id, "2 profiles; give its folder")
    (finished.folder / "compact.safetensors").unlink()
    refused(lambda: export_run(folder, "pt2", tmp_path / "x.pt2"), "compact.safetensors", "few runs")


def test_a_program_of_openvino_computes_the_same_and_lies_in_two_files(tmp_path):
    pytest.importorskip("openvino")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    assert export(network, tmp_path / "net.xml", input_shape=(3, 8, 8)) < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    with pytest.raises(ValueError, match="must end in .xml"):
        export(network, tmp_path / "net.ov", "openvino", (3, 8, 8))


def test_a_missing_runtime_is_named_with_its_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(ImportError, match=r"openvino, which is not installed: pip install lrpet\[deploy\]"):
        export(nn.Conv2d(3, 4, 3), tmp_path / "net.xml", input_shape=(3, 8, 8))
