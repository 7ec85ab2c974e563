"""Numbers that must not move: same seed, same bits; projections leave nothing behind; memory stays flat."""

import dataclasses
import gc
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, outcome, randomize_batchnorms
from torch import nn

from lrpet import LowRankProjector, RunConfig, build_model, project, ranks_from_ratio, run
from lrpet.data.batches import Batches
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.methods import make_method
from lrpet.training.loop import Session, train

SMOKE = {
    e.name.removesuffix(f"-s{e.config.seed}"): e.config for e in reversed(load_profile("smoke").experiments)
}  # one of each kind
smoke = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=[pytest.mark.slow] if config.task != "classification" else [], id=name)
        for name, config in SMOKE.items()
    ],
)


def shortened(config):
    """The same run in two epochs, or as few as it can be."""
    changed = {"pretrain_epochs": 1} if config.pretrain_epochs else {}
    changed |= {"batch_size": 256} if config.task == "classification" else {}
    changed |= {"steps_per_epoch": 10} if config.task == "language" else {}
    return dataclasses.replace(config, epochs=2, milestones=(1,) if config.recipe == "sgd" else (), **changed)


# ---------------------------------------------------------------- determinism


@smoke
def test_every_method_and_network_of_the_smoke_profile_gives_the_same_bits_twice(config, tmp_path):
    config = shortened(config)
    first = run(config, results=tmp_path / "first", device="cpu", progress="off")
    torch.rand(7)  # whatever a process did before counts for nothing
    second = run(config, results=tmp_path / "second", device="cpu", progress="off")
    assert outcome(first.folder) == outcome(second.folder)


@smoke
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_bits_twice_where_it_is_told_to(config, tmp_path):
    folders = [
        run(shortened(config), results=tmp_path / i, device="cuda", progress="off", deterministic=True).folder
        for i in "ab"
    ]
    assert outcome(folders[0]) == outcome(folders[1])


def test_deterministic_changes_nothing_on_a_cpu_and_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config, seen = RunConfig(**TINY), []
    plain = run(config, results=tmp_path / "plain", device="cpu", progress="off")
    told = run(
        config,
        results=tmp_path / "told",
        device="cpu",
        progress="off",
        deterministic=True,
        on_epoch=lambda _: seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
        ),
    )
    assert seen == [(True, False)] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert (plain.environment["deterministic"], told.environment["deterministic"]) == (False, True)
    assert outcome(plain.folder) == outcome(told.folder)


# ---------------------------------------------------------------- what a projection leaves behind


def small():
    return randomize_batchnorms(build_model("resnet8"))


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_know_nothing_of_projections():
    torch.manual_seed(1)
    projected, x, y = small(), torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    projector = LowRankProjector(projected, ranks_from_ratio(projected, 0.57))
    for _ in range(3):
        gradients(projected, x, y)
        projector.step()
    plain = build_model("resnet8")
    plain.load_state_dict(projected.state_dict())
    expected = gradients(plain, x, y)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(projected, x, y).items())
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in projected.parameters())
    weight = projected.conv.weight
    assert not project(weight.flatten(1), 3).requires_grad


@pytest.mark.parametrize(
    "kind",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.001)],
    ids=["SGD", "AdamW"],
)
def test_a_projection_in_place_keeps_the_state_of_the_optimizer(kind):
    model, x, y = small(), torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    optimizer = kind(model.parameters())
    gradients(model, x, y)
    optimizer.step()
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = [
        {name: torch.as_tensor(value).clone() for name, value in optimizer.state[p].items()}
        for p in model.parameters()
    ]
    assert sum(len(state) for state in before) > 0
    LowRankProjector(model, ranks_from_ratio(model, 0.57)).step()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where
    for p, state in zip(model.parameters(), before, strict=True):
        assert all(
            torch.equal(torch.as_tensor(optimizer.state[p][name]), value) for name, value in state.items()
        )


def storages():
    """Of all storages that are alive, by address: a tensor that keeps it so, and its size in bytes."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return {t.untyped_storage().data_ptr(): (t, t.untyped_storage().nbytes()) for t in alive}


def test_the_projector_keeps_no_copy_of_any_weight():
    model = small()
    ranks = ranks_from_ratio(model, 0.57)
    before = storages()  # held, so that what another test left behind is not freed meanwhile
    projector = LowRankProjector(model, ranks)
    for _ in range(3):
        projector.step()
    bases = sum(basis.numel() * basis.element_size() for basis in projector._bases.values())
    assert sum(size for address, (_, size) in storages().items() if address not in before) == bases


def layer(a):
    """A convolution of 16×72 and a BatchNorm that scales each row by a."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16, eps=0.0))
    nn.init.constant_(model[1].weight, a)
    return model


def energy(model):
    return model[0].weight.detach().double().square().sum().item()


def test_ten_thousand_projections_do_not_drift_in_energy():
    M = torch.randn(16, 72)
    before = M.double().square().sum().item()
    for _ in range(10_000):
        M = project(M, 5)
    assert M.double().square().sum().item() == pytest.approx(before, rel=1e-4)
    assert torch.linalg.matrix_rank(M.double(), rtol=1e-5) == 5


def test_a_thousand_rectified_projections_do_not_drift_in_energy_where_the_scale_is_undone_exactly():
    model = layer(0.5)
    projector = LowRankProjector(model, {"0": 5}, row_eps=0.0)
    before = energy(model)
    for _ in range(1000):
        projector.step()
    assert energy(model) == pytest.approx(before, rel=1e-5)


def test_what_the_authors_constant_costs_is_what_its_formula_says():
    """A projection shrinks a row by a² / (a² + 1e-5): 10,000 of them at a = 0.33 leave 0.40 of the weight."""
    a, times = 0.33, 1000
    model = layer(a)
    projector = LowRankProjector(model, {"0": 5})
    before = energy(model)
    for _ in range(times):
        projector.step()
    assert (energy(model) / before) ** 0.5 == pytest.approx((a**2 / (a**2 + 1e-5)) ** times, rel=1e-4)


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.slow
def test_memory_stays_flat_over_two_hundred_epochs(tmp_path):
    """The smoke configuration on 64 of its images, so that 200 epochs take seconds."""
    config = RunConfig(epochs=200, milestones=(100, 150), batch_size=32)
    data = load_data(config)
    data = dataclasses.replace(
        data,
        **{
            f"{part}_{what}": getattr(data, f"{part}_{what}")[:64]
            for part in ("train", "test")
            for what in ("images", "labels")
        },
    )
    torch.manual_seed(1)
    method = make_method(build_model("resnet8"), config)
    sizes = {}

    def measure(row):
        if row["epoch"] % 50 == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                sizes[row["epoch"]] = (
                    len(gc.get_objects()),
                    int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                )

    train(
        config,
        method,
        Batches(data, 32, "cpu", 1),
        Session(tmp_path / "checkpoint.pt", checkpoint_epochs=5, progress="off", on_epoch=measure),
    )
    objects, resident = ({epoch: size[i] for epoch, size in sizes.items()} for i in (0, 1))
    assert objects[200] - objects[50] < 150 * 10  # the history has a row an epoch; nothing else may grow
    assert resident[200] - resident[50] < 20e6
