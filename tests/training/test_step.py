import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import lrpet.training.step
from lrpet import RunConfig, build_model
from lrpet.training.recipes import make_optimizer, set_learning_rate
from lrpet.training.step import WARM_UP, Step

SIZES = [16] * 5 + [5] + [16] * 4 + [5] + [16] * 2  # images a step, as with two ends of epochs
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pretend(monkeypatch, model):
    """Let recording and replaying happen on a CPU, with their rules and none of their speed.

    A capture runs nothing and leaves its own gradients; a replay knows these tensors only, not ``p.grad``.
    """
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    parameters, recorded = list(model.parameters()), []

    def capture(work, stream, pool=None):
        if pool is None:
            recorded[:] = [torch.zeros_like(p) for p in parameters]
            attach(recorded)

        def replay():
            outside = [p.grad for p in parameters]
            attach(recorded)
            if pool is None:
                torch._foreach_zero_(recorded)
            work()
            attach(outside)

        return SimpleNamespace(replay=replay, pool=lambda: "pool")

    def attach(grads):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad

    monkeypatch.setattr("lrpet.training.step._capture", capture)


def make_steps(config, model, device, graphs):
    """Make steps, each with its own learning rate and a penalty; return totals and how many were replayed."""
    optimizer, draw = make_optimizer(config, model, device), torch.Generator().manual_seed(0)
    totals, replayed = torch.zeros(3, dtype=torch.float64, device=device), 0
    step = Step(config, model.train(), optimizer, totals, graphs=graphs)
    for i, size in enumerate(SIZES):
        x, y = (
            torch.randn(size, 3, 8, 8, generator=draw).to(device),
            torch.randint(10, (size,), generator=draw).to(device),
        )
        set_learning_rate(optimizer, 0.01 / (1 + i), device)
        step.backward(x, y, y)
        replayed += step._replaying
        with torch.no_grad():
            for p in model.parameters():
                p.grad.add_(p, alpha=0.01)
        step.update()
    return totals.tolist(), replayed


@pytest.mark.parametrize("recipe", ["sgd", "adamw"])
@pytest.mark.parametrize("device", DEVICES)
def test_replayed_steps_are_plain_steps(device, recipe, monkeypatch):
    config, device = RunConfig(batch_size=16, recipe=recipe), torch.device(device)
    torch.manual_seed(0)
    plain = build_model("resnet8").to(device)
    other = copy.deepcopy(plain)
    expected, none = make_steps(config, plain, device, graphs=False)
    if device.type == "cpu":
        pretend(monkeypatch, other)
    totals, replayed = make_steps(config, other, device, graphs=True)
    assert (none, replayed) == (0, 8)  # of 13; the first three plain ones (WARM_UP), and each smaller batch
    assert WARM_UP == 3
    assert totals == pytest.approx(expected, rel=1e-6)
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- graphs that do something else


def double_a_gradient(model, totals):
    next(model.parameters()).grad.mul_(2)


def forget_a_gradient(model, totals):
    list(model.parameters())[-1].grad.zero_()


def lose_the_gradients_sign(model, totals):
    for p in model.parameters():
        p.grad.neg_()


def count_wrong(model, totals):
    totals[0] *= 1.5


def leave_nan(model, totals):
    next(model.parameters()).grad.fill_(torch.nan)


def forget_statistics(model, totals):
    next(module for module in model.modules() if hasattr(module, "running_var")).running_var.fill_(1)


def move_a_weight(model, totals):
    with torch.no_grad():
        next(model.parameters()).add_(0.1)


def fail(model, totals):
    raise RuntimeError("operation not permitted when stream is capturing")


LIES = {
    "backward": [double_a_gradient, forget_a_gradient, lose_the_gradients_sign, count_wrong, leave_nan],
    "update": [move_a_weight],
}
LIES["backward"] += [forget_statistics, fail]


@pytest.mark.parametrize(("graph", "lie"), [(graph, lie) for graph in LIES for lie in LIES[graph]])
def test_graphs_that_do_something_else_are_given_up_after_a_warning(monkeypatch, graph, lie):
    config, device = RunConfig(batch_size=16), torch.device("cpu")
    plain = build_model("resnet8")
    other = copy.deepcopy(plain)
    expected, _ = make_steps(config, plain, device, graphs=False)
    pretend(monkeypatch, other)
    honest, real, made = lrpet.training.step._capture, Step, []

    def lying(work, stream, pool=None):
        name = "backward" if pool is None else "update"
        if lie is fail:
            fail(other, None)
        recorded = honest(work, stream, pool)

        def replay():
            recorded.replay()
            if name == graph:
                lie(other, made[0].totals)

        return SimpleNamespace(replay=replay, pool=recorded.pool)

    def make(*given, **options):
        made.append(real(*given, **options))
        return made[-1]

    monkeypatch.setattr("lrpet.training.step._capture", lying)
    monkeypatch.setitem(globals(), "Step", make)
    with pytest.warns(UserWarning, match="CUDA graphs are not used: .*; steps are plain") as told:
        totals, replayed = make_steps(config, other, device, graphs=True)
    assert len(told) == 1 and replayed == 0
    assert totals == expected
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_look_at_a_gpu_waits_for_nothing():
    model, totals = build_model("resnet8").cuda(), torch.zeros(3, dtype=torch.float64, device="cuda")
    step = Step(
        RunConfig(batch_size=16),
        model,
        make_optimizer(RunConfig(), model, torch.device("cuda")),
        totals,
        graphs=True,
    )
    x, y = torch.randn(16, 3, 8, 8, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")
    for _ in range(WARM_UP + 1):
        step.backward(x, y, y), step.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            step.backward(x, y, y), step.look(), step.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    step.look(), torch.cuda.synchronize()
    assert step.look() == totals.tolist()


def test_a_learning_rate_from_a_checkpoint_of_a_cpu_becomes_a_tensor_on_a_gpu():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    set_learning_rate(optimizer, 0.5, torch.device("meta"))  # any device but the CPU
    (group,) = optimizer.param_groups
    kept = group["lr"]
    set_learning_rate(optimizer, 0.25, torch.device("meta"))
    assert group["lr"] is kept and kept.is_meta
    set_learning_rate(optimizer, 0.25, torch.device("cpu"))
    assert group["lr"] == 0.25
