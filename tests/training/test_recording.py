"""What a run records is what is there: spectra against an SVD, gradient norms against autograd."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY, Zoo
from torch import nn

from lrpet import RunConfig, build_model, factorize, ranks_from_ratio, run
from lrpet.methods import make_method
from lrpet.methods.filter_pruning import keep_filters
from lrpet.training.recording import (
    Recorder,
    load_gradients,
    load_spectra,
    recorded_epochs,
    singular_values,
    weight_matrices,
)


def svd(M):
    return torch.linalg.svdvals(M.detach().double().flatten(1)).float()


# ---------------------------------------------------------------- how much is recorded


@pytest.mark.parametrize("epochs", [1, 2, 15, 16, 17, 20, 120, 400])
def test_few_epochs_are_recorded_the_first_and_the_last_among_them(epochs):
    at = recorded_epochs(epochs)
    assert {0, epochs - 1} <= at <= set(range(epochs))
    assert len(at) == min(16, epochs)
    gaps = np.diff(sorted(at))
    assert epochs == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 15, 16, 23, 391, 10_000])
def test_few_steps_of_an_epoch_are_measured_the_last_among_them(steps, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    calls = []
    norm = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors: calls.append(1) or norm(tensors))
    recorder = Recorder(epochs=1, steps=steps)
    for step in range(steps):
        recorder.record_gradients(model, 0, step, step == steps - 1)
    assert min(steps, 5) <= len(calls) <= 9
    assert len(recorder.state["gradients"]) == 1


def test_epochs_that_are_not_recorded_cost_nothing():
    recorder, model = Recorder(epochs=400, steps=10), nn.Sequential(nn.Conv2d(3, 4, 3))
    recorder.record_gradients(model, 1, 0, True)  # would fail: there is no gradient
    recorder.record_spectra(model, 1, "before")
    assert recorder.state == Recorder(400, 10).state


# ---------------------------------------------------------------- spectra


def test_singular_values_are_those_of_an_svd():
    matrices = {f"{N}x{D}": torch.randn(N, D) for N, D in ((8, 27), (27, 8), (5, 5), (1, 9), (9, 1))}
    matrices |= {
        "twin of 8x27": torch.randn(8, 27),
        "rank 2": torch.randn(8, 2) @ torch.randn(2, 27),
        "zero": torch.zeros(4, 6),
    }
    values = singular_values(matrices)
    assert list(values) == list(matrices)
    for name, M in matrices.items():
        expected = svd(M)
        assert values[name].shape == expected.shape
        assert torch.allclose(values[name], expected, rtol=1e-4, atol=1e-5 * float(expected[0])), name


def check(model, expected):
    """Compare what is recorded of a network with an SVD of the matrices in question, in half precision."""
    assert list(weight_matrices(model)) == list(expected)
    recorder = Recorder(epochs=1, steps=1)
    recorder.record_spectra(model, 0, "before")
    for name, M in expected.items():
        s = svd(M)
        recorded = recorder.state["spectra"][f"1/before/{name}"].float()
        assert torch.allclose(recorded, s, rtol=2e-3, atol=1e-4 * float(s[0])), name


def convolutions(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
    }


@pytest.mark.parametrize(
    "make",
    [lambda: build_model("resnet8"), lambda: build_model("plain20"), Zoo],
    ids=["resnet8", "plain20", "zoo"],
)
def test_spectra_of_a_dense_network(make):
    model = make()
    check(model, convolutions(model))


def test_spectra_of_a_factorized_network_are_those_of_the_products():
    model = build_model("resnet8")
    ranks = ranks_from_ratio(model, 0.57)
    del ranks["blocks.1.conv1"]  # one layer stays dense
    compact = factorize(model, ranks)
    expected = {
        name: compact.get_submodule(name)[1].weight.flatten(1)
        @ compact.get_submodule(name)[0].weight.flatten(1)
        if name in ranks
        else weight
        for name, weight in convolutions(model).items()
    }
    check(compact, expected)
    for name, rank in ranks.items():
        assert torch.allclose(
            svd(expected[name])[:rank], svd(model.get_submodule(name).weight)[:rank], rtol=1e-3
        )


def test_spectra_of_a_network_whose_weights_are_made_of_three_factors():
    config = RunConfig(method="svd_training", prune_ratio=0.57)
    torch.manual_seed(1)
    model = build_model("resnet8")
    expected = {name: weight.detach().clone() for name, weight in convolutions(model).items()}
    check(make_method(model, config).model, expected)


def test_spectra_of_a_network_that_has_lost_filters():
    pytest.importorskip("torch_pruning")
    model = keep_filters(build_model("resnet8"), {"blocks.0.conv1": [0, 3, 5]}, (3, 8, 8))
    assert model.blocks[0].conv1.weight.shape[0] == 3
    check(model, convolutions(model))


@pytest.mark.parametrize("method", ["dense", "lrp", "lrpet", "svd_finetune", "trp"])
def test_a_run_stores_the_spectra_of_the_weights_it_ends_with(method, monkeypatch):
    last = {}
    record = Recorder.record_spectra

    def spy(self, model, epoch, when):
        last[epoch + 1, when] = {name: svd(M) for name, M in weight_matrices(model).items()}
        record(self, model, epoch, when)

    monkeypatch.setattr(Recorder, "record_spectra", spy)
    fields = {"energy_threshold": 0.3} if method == "trp" else {}
    folder = run(RunConfig(method=method, **TINY, **fields), progress="off").folder
    table = load_spectra(folder)
    assert table.columns.tolist() == ["epoch", "when", "layer", "i", "s"]
    assert {(epoch, when) for epoch, when in zip(table.epoch, table.when, strict=True)} == set(last)
    assert ("after" in set(table.when)) == (method in ("lrp", "lrpet", "trp"))
    for (epoch, when, layer), rows in table.groupby(["epoch", "when", "layer"]):
        s = last[epoch, when][layer]
        assert rows.i.tolist() == list(range(1, len(s) + 1))
        assert np.allclose(rows.s, s, rtol=2e-3, atol=1e-4 * float(s[0]))


def test_a_layer_that_becomes_smaller_leaves_no_gaps():
    recorder = Recorder(epochs=2, steps=1)
    for epoch, channels in enumerate((6, 4)):
        recorder.record_spectra(nn.Sequential(nn.Conv2d(3, channels, 3)), epoch, "before")
    table = pd.DataFrame({"epoch": [1] * 6 + [2] * 4})
    assert [len(s) for s in recorder.state["spectra"].values()] == [6, 4]
    assert len(table) == len(read(recorder))


def read(recorder, folder=None):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        for name, content in recorder.files().items():
            (Path(place) / name).write_bytes(content)
        return load_spectra(place)


# ---------------------------------------------------------------- gradients


def test_recorded_norms_are_the_means_of_those_of_grad(monkeypatch):
    seen = []
    record = Recorder.record_gradients

    def spy(self, model, epoch, in_epoch, last):
        for name, weight in convolutions(model).items():
            seen.append((epoch + 1, in_epoch, name, weight.grad.norm().item(), weight.detach().norm().item()))
        record(self, model, epoch, in_epoch, last)

    monkeypatch.setattr(Recorder, "record_gradients", spy)
    done = run(RunConfig(method="lrpet", epochs=2, milestones=(1,), batch_size=64), progress="off")
    everything = pd.DataFrame(seen, columns=["epoch", "step", "layer", "gradient_norm", "weight_norm"])
    steps = everything.step.max() + 1
    every = -(-steps // 8)
    assert every > 1
    sampled = everything[(everything.step % every == 0) | (everything.step == steps - 1)]
    expected = (
        sampled.groupby(["epoch", "layer"], sort=False)[["gradient_norm", "weight_norm"]].mean().reset_index()
    )
    table = load_gradients(done.folder)
    assert table[["epoch", "layer"]].equals(expected[["epoch", "layer"]])
    assert np.allclose(
        table[["gradient_norm", "weight_norm"]], expected[["gradient_norm", "weight_norm"]], rtol=1e-3
    )


def test_the_scale_of_a_weight_before_a_batchnorm_moves_the_norm_but_not_the_scale_free_one():
    model, x, y = build_model("resnet8"), torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    weights, norms = list(convolutions(model).values()), []
    for factor in (1, 3):
        with torch.no_grad():
            for weight in weights:
                weight *= factor
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), weights)
        norms.append(np.array([g.norm().item() for g in gradients]))
    assert np.allclose(3 * norms[1], norms[0], rtol=0.01)  # and so ‖M‖·‖∂L/∂M‖ is the same


def test_weights_made_of_factors_have_no_gradient_of_their_own_and_none_is_recorded():
    done = run(RunConfig(method="svd_training", **TINY), progress="off")
    table = load_gradients(done.folder)
    assert set(table.epoch) == {2}  # the second epoch trains two factors a layer
    assert all(name.endswith((".0", ".1")) for name in table.layer)


@pytest.mark.parametrize("load", [load_spectra, load_gradients])
def test_a_run_without_records_is_an_error_with_a_name(load, tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_records_that_a_resumed_run_has_on_its_gpu_are_written_too():
    class OnGPU:  # as torch.load with map_location gives them back
        def cpu(self):
            return torch.tensor([2.0, 1.0]).half()

    recorder = Recorder(epochs=1, steps=1)
    recorder.state["spectra"] = {"1/before/conv": OnGPU()}
    assert set(recorder.files()) == {"spectra.npz", "gradients.csv"}
