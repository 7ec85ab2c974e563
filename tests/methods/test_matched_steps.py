import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY
from torch import nn

from lrpet import LowRankProjector, RunConfig, run
from lrpet.methods.matched_steps import match_steps
from lrpet.training import Paused

RANKS = {"0": 3, "3": 3}


def network(normalized):
    torch.manual_seed(1)
    norm = (lambda: nn.BatchNorm1d(12, eps=1e-14)) if normalized else nn.Identity
    layers = [
        nn.Linear(8, 12, bias=False),
        norm(),
        nn.ReLU(),
        nn.Linear(12, 12, bias=False),
        norm(),
        nn.ReLU(),
        nn.Linear(12, 4),
    ]
    return nn.Sequential(*layers).double()


def losses_of(model, energy_transfer, matched=False, projections=4, steps=6):
    """Train with a projection every few steps; return the loss of each step."""
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01)
    projector = LowRankProjector(model, RANKS, energy_transfer, bn_rectification=False)
    draw, losses = torch.Generator().manual_seed(2), []
    for _ in range(projections):
        for _ in range(steps):
            x, y = torch.randn(32, 8, generator=draw).double(), torch.randint(4, (32,), generator=draw)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        reports = projector.step()
        if matched:
            weights = {report.name: model.get_submodule(report.name).weight for report in reports}
            match_steps(optimizer, {weights[report.name]: report.energy_kept**-0.5 for report in reports})
    return torch.tensor(losses)


def test_lrp_with_matched_steps_makes_the_run_of_lrpet_where_a_batchnorm_follows():
    model = network(normalized=True)
    lrpet, lrp, matched = (copy.deepcopy(model) for _ in range(3))
    reference = losses_of(lrpet, energy_transfer=True)
    assert (losses_of(lrp, False) - reference).abs().max() > 0.01
    assert (losses_of(matched, False, matched=True) - reference).abs().max() < 1e-9
    for name in RANKS:
        a, b = (net.get_submodule(name).weight.detach() for net in (lrpet, matched))
        assert torch.allclose(a / a.norm(), b / b.norm(), atol=1e-9)
        assert a.norm() > 1.1 * b.norm()  # the factors have multiplied up


def test_without_a_batchnorm_matched_steps_do_not_help():
    model = network(normalized=False)
    reference = losses_of(copy.deepcopy(model), energy_transfer=True)
    plain = (losses_of(copy.deepcopy(model), False) - reference).abs().mean()
    matched = (losses_of(copy.deepcopy(model), False, matched=True) - reference).abs().mean()
    assert plain > 0.001
    assert matched > 0.5 * plain


def test_a_run_of_lrp_takes_them_and_resumes_with_them(tmp_path, monkeypatch):
    config = RunConfig(method="lrp", matched_steps=True, prune_ratio=0.57, **TINY)
    whole = run(config, results=tmp_path / "whole", device="cpu", progress="off")
    with pytest.raises(Paused):
        run(config, results=tmp_path / "parts", device="cpu", progress="off", time_budget=0)
    parts = run(config, results=tmp_path / "parts", device="cpu", progress="off")
    plain = RunConfig(method="lrp", prune_ratio=0.57, **TINY)
    other = run(plain, results=tmp_path / "plain", device="cpu", progress="off")
    columns = ["train_loss", "loss"]
    assert whole.history[columns].equals(parts.history[columns])
    assert whole.history[columns].iloc[0].equals(other.history[columns].iloc[0])  # until the first projection
    assert not whole.history[columns].iloc[1].equals(other.history[columns].iloc[1])


def test_what_has_another_step_is_refused():
    assert RunConfig(method="lrp", matched_steps=False).run_id == RunConfig(method="lrp").run_id
    for fields in (
        {"method": "lrpet"},
        {"method": "lrp", "residual": 0.3},
        {"method": "lrp", "recipe": "adamw"},
    ):
        with pytest.raises(ValueError, match="matched_steps must be"):
            RunConfig(matched_steps=True, **fields)


def test_a_weight_that_shares_its_group_is_refused():
    model = network(normalized=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="one of its own"):
        match_steps(optimizer, {model[0].weight: 2.0})
