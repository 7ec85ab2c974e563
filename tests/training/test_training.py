import contextlib
import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY
from torch import nn

from lrpet import LowRankProjector, RunConfig, build_model, ranks_from_ratio, run
from lrpet.data.batches import Batches
from lrpet.data.sets import load_data
from lrpet.methods import make_method
from lrpet.processes import Processes
from lrpet.training.checkpoint import load_checkpoint, save_checkpoint
from lrpet.training.clock import Clock
from lrpet.training.evaluate import evaluate
from lrpet.training.loop import Paused, Session, train
from lrpet.training.recipes import learning_rate


def batches(config, data=None):
    return Batches(data or load_data(config), config.batch_size, "cpu", config.seed)


def start(config):
    torch.manual_seed(config.seed)
    return make_method(build_model(config.model), config)


# ---------------------------------------------------------------- schedule and evaluation


@pytest.mark.parametrize(
    ("milestones", "rates"),
    [([], [0.1] * 6), ([3], [0.1] * 3 + [0.01] * 3), ([1, 3, 5], [0.1, 0.01, 0.01, 0.001, 0.001, 0.0001])],
)
def test_the_learning_rate_falls_to_a_tenth_at_each_milestone(milestones, rates):
    config = RunConfig(epochs=6, milestones=milestones)
    assert [learning_rate(config, epoch) for epoch in range(6)] == pytest.approx(rates)


class Always(nn.Module):
    """Says the same for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_by_hand(training):
    data = load_data(RunConfig())
    logits = [0.0] * 10
    logits[3] = 2.0
    model = Always(logits).train(training)
    scores = evaluate(model, batches(RunConfig(), data))
    threes = (data.test_labels == 3).float().mean().item()
    assert scores["top1_pct"] == pytest.approx(100 * threes)
    assert scores["top5_pct"] == pytest.approx(
        100 * torch.isin(data.test_labels, Always(logits).logits.topk(5).indices).float().mean().item()
    )
    assert scores["loss"] == pytest.approx(
        torch.logsumexp(torch.tensor(logits), 0).item() - 2 * threes, rel=1e-5
    )
    assert model.training == training


def test_evaluation_leaves_running_statistics_alone():
    model = build_model("resnet8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, batches(RunConfig()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("method", ["dense", "lrp", "lrpet"])
def test_training_is_the_loop_of_the_paper_written_out(method, tmp_path):
    config = RunConfig(method=method, **TINY)
    data = load_data(config)
    trained = start(config)
    state = train(config, trained, batches(config, data), Session(tmp_path / "checkpoint.pt", progress="off"))

    torch.manual_seed(config.seed)
    model = build_model(config.model).train()
    projector = (
        LowRankProjector(model, ranks_from_ratio(model, 0.57), energy_transfer=method == "lrpet")
        if method != "dense"
        else None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0001)
    for epoch, rate in enumerate((0.1, 0.01)):
        optimizer.param_groups[0]["lr"] = rate
        losses = []
        for x, y in batches(config, data).epoch(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(y)
        if projector is not None:
            projector.step()
        row = state.history[epoch]
        assert row["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert {name: row[name] for name in ("loss", "top1_pct", "top5_pct")} == pytest.approx(
            evaluate(model, batches(config, data)), rel=1e-5
        )
        assert (row["epoch"], row["learning_rate"], row["projected"]) == (
            epoch + 1,
            rate,
            projector is not None,
        )
    expected = model.state_dict()
    assert all(
        torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-6)
        for name, tensor in trained.model.state_dict().items()
    )
    assert state.projections == (0 if projector is None else 2)


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_the_trained_network_is_exactly_low_rank(unit, tmp_path):
    config = RunConfig(projection_unit=unit, projection_interval=5, **TINY)
    method = start(config)
    state = train(config, method, batches(config), Session(tmp_path / "checkpoint.pt", progress="off"))
    for name, rank in method.ranks.items():
        s = torch.linalg.svdvals(method.model.get_submodule(name).weight.detach().flatten(1).double())
        assert s[rank] < 1e-5 * s[0]
    assert state.projections == {"epoch": 1, "iteration": 3}[unit]  # 12 steps: 5, 10 and the last


def test_mixed_precision_keeps_weights_in_float32(tmp_path):
    config = RunConfig(precision="bf16", **TINY)
    method = start(config)
    state = train(config, method, batches(config), Session(tmp_path / "checkpoint.pt", progress="off"))
    assert {tensor.dtype for tensor in method.model.parameters()} == {torch.float32}
    session = Session(tmp_path / "full.pt", progress="off")
    full = train(RunConfig(**TINY), start(RunConfig(**TINY)), batches(config), session)
    assert state.history[-1]["train_loss"] != full.history[-1]["train_loss"]
    assert state.history[-1]["train_loss"] == pytest.approx(full.history[-1]["train_loss"], rel=0.1)


def test_a_loss_that_is_lost_names_epoch_step_and_norms_and_the_checkpoint_stays_whole(monkeypatch, tmp_path):
    config = RunConfig(**TINY)
    checkpoint, calls = tmp_path / "checkpoint.pt", []
    cross_entropy = F.cross_entropy

    def lose_the_ninth(logits, y, **options):
        calls.append(torch.is_grad_enabled())
        return cross_entropy(logits, y, **options) * (float("nan") if calls.count(True) == 9 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(F, "cross_entropy", lose_the_ninth)
        with pytest.raises(
            FloatingPointError,
            match=r"epoch 2, step 3\. Norms of the weights: conv\.weight \d.*fc\.weight \d.*learning_rate",
        ):
            train(config, start(config), batches(config), Session(checkpoint, progress="off"))
    assert load_checkpoint(checkpoint)["step"] == 6
    resumed = train(config, start(config), batches(config), Session(checkpoint, progress="off"))
    session = Session(tmp_path / "other.pt", progress="off")
    undisturbed = train(config, start(config), batches(config), session)
    assert resumed.history[-1]["loss"] == undisturbed.history[-1]["loss"]


def test_a_learning_rate_far_too_high_ends_in_an_error(tmp_path):
    config = RunConfig(
        method="dense", epochs=8, milestones=[], batch_size=32, learning_rate=100, momentum=0.9999
    )
    with pytest.raises(
        FloatingPointError,
        match=r"is no longer finite: epoch \d, step \d+\. Norms of the weights: .*(inf|nan|e\+)",
    ):
        train(config, start(config), batches(config), Session(tmp_path / "checkpoint.pt", progress="off"))


def test_weights_lost_in_the_last_step_of_an_epoch_are_an_error_too(tmp_path):
    config = RunConfig(method="dense", **TINY)
    method = start(config)

    def lose_everything_at_last(step, steps, last):
        if last:
            nn.init.constant_(method.model.conv.weight, float("nan"))

    method.after_step = lose_everything_at_last
    with pytest.raises(FloatingPointError, match="epoch 2, step 6"):
        train(config, method, batches(config), Session(tmp_path / "checkpoint.pt", progress="off"))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


@pytest.mark.parametrize(("every", "kept"), [(1, [6, 12, 18]), (2, [12, 18]), (5, [18])])
def test_checkpoints_come_every_so_many_epochs_and_at_the_end(monkeypatch, tmp_path, every, kept):
    steps = []
    monkeypatch.setattr(
        "lrpet.training.state.save_checkpoint", lambda path, state: steps.append(state["step"])
    )
    config = RunConfig(**TINY | {"epochs": 3})
    session = Session(tmp_path / "checkpoint.pt", checkpoint_epochs=every, progress="off")
    train(config, start(config), batches(config), session)
    assert steps == kept


def test_a_deadline_that_has_passed_pauses_after_one_step_and_a_checkpoint(tmp_path):
    config = RunConfig(**TINY)
    with pytest.raises(Paused, match="paused at step 1 of 12"):
        session = Session(tmp_path / "checkpoint.pt", deadline=0.0, progress="off")
        train(config, start(config), batches(config), session)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


def test_the_clock_counts_nested_seconds_once_and_none_of_what_failed(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 10.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = Clock()
    with clock("train"), clock("projection"):
        pass
    with contextlib.suppress(KeyboardInterrupt), clock("evaluation"):
        raise KeyboardInterrupt
    assert dict(clock.seconds) == {"projection": 2.0, "train": 8.0}


# ---------------------------------------------------------------- the authors' score


def top1(model):
    return evaluate(model, batches(RunConfig()))["top1_pct"]


def watch(method):
    """Let a method note, before each epoch's projection, its accuracy and weights."""
    noted, project = [], method.after_step

    def after_step(step, steps, last):
        if step % steps == 0:
            weights = {name: tensor.clone() for name, tensor in method.model.state_dict().items()}
            noted.append((top1(method.model), weights))
        return project(step, steps, last)

    method.after_step = after_step
    return noted


@pytest.mark.parametrize("stop", [False, True])
def test_the_best_of_the_last_epochs_is_scored_and_kept_as_it_is_before_its_projection(tmp_path, stop):
    config = RunConfig(**TINY | {"epochs": 5, "milestones": (3,), "best_of_last": 3})
    plain, noted, state = start(dataclasses.replace(config, best_of_last=None)), [], None
    expected = watch(plain)
    train(plain.config, plain, batches(config), Session(tmp_path / "plain.pt", progress="off"))
    while state is None:  # stopped after every step, the best so far comes from the checkpoint
        method = start(config)
        noted = watch(method)
        with contextlib.suppress(Paused):
            session = Session(tmp_path / "c.pt", deadline=0.0 if stop else None, progress="off")
            state = train(config, method, batches(config), session)
    assert noted[-1][0] == expected[-1][0]  # scoring changes nothing
    assert torch.equal(method.model.conv.weight, plain.model.conv.weight)
    best = state.best.state
    assert best["top1_pct"] == [score for score, _ in expected[2:]]
    assert [row.get("unprojected_top1_pct") for row in state.history] == [None, None, *best["top1_pct"]]
    place = 2 + best["top1_pct"].index(max(best["top1_pct"]))
    assert best["epoch"] == place + 1
    assert all(torch.equal(tensor, best["weights"][name]) for name, tensor in expected[place][1].items())
    rank = method.ranks["conv"]
    assert torch.linalg.matrix_rank(best["weights"]["conv.weight"].flatten(1)) > rank  # not projected
    cut = start(config).model
    cut.load_state_dict(expected[place][1])
    for name, R in method.ranks.items():
        weight = cut.get_submodule(name).weight
        U, s, Vh = torch.linalg.svd(weight.detach().flatten(1).double(), full_matrices=False)
        weight.data = ((U[:, :R] * s[:R]) @ Vh[:R]).view_as(weight).float()
    told = state.best.summary(config, method, state.history, batches(config), Processes())
    assert told == {
        "best_of_last_epoch": place + 1,
        "best_of_last_uncut_top1_pct": max(best["top1_pct"]),
        "best_of_last_top1_pct": pytest.approx(top1(cut.eval()), abs=0.3),
    }
    assert told["best_of_last_top1_pct"] != max(best["top1_pct"])


def test_of_a_method_that_does_not_project_the_score_is_the_best_of_the_last_rows(tmp_path):
    config = RunConfig(**TINY | {"epochs": 4, "method": "dense", "best_of_last": 2})
    done = run(config, results=tmp_path, device="cpu", progress="off")
    last = done.history.tail(2)
    assert done.summary["best_of_last_top1_pct"] == last.top1_pct.max()
    assert done.summary["best_of_last_epoch"] == last.epoch[last.top1_pct.idxmax()]
    assert "unprojected_top1_pct" not in done.history


def test_without_the_rule_nothing_more_is_scored_or_told(tmp_path):
    done = run(RunConfig(**TINY), results=tmp_path, device="cpu", progress="off")
    assert not any("best_of_last" in name for name in done.summary)
    assert "unprojected_top1_pct" not in done.history


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def path(tmp_path):
    """Two checkpoints: the current one of step 2 and the one before of step 1."""
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step, "weights": torch.full((100,), float(step))})
    return path


def truncate(length):
    return lambda content: content[:length]


def flip(place):
    def flip(content):
        content = bytearray(content)
        content[place] ^= 1
        return bytes(content)

    return flip


DAMAGE = {f"cut to {n}": truncate(n) for n in (0, 10, 1000, -1)} | {
    f"byte {n}": flip(n) for n in (0, 500, -100, -1)
}


def test_checkpoints_come_back_as_they_were_and_leave_no_other_files(path):
    state = load_checkpoint(path)
    assert state["step"] == 2
    assert torch.equal(state["weights"], torch.full((100,), 2.0))
    assert {file.name for file in path.parent.iterdir()} == {"checkpoint.pt", "checkpoint.previous"}
    assert load_checkpoint(path.with_suffix(".previous").rename(path))["step"] == 1


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoint.pt") is None


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named(path, damage, capsys):
    path.write_bytes(damage(path.read_bytes()))
    assert load_checkpoint(path)["step"] == 1
    assert f"{path} is damaged; resuming from checkpoint.previous" in capsys.readouterr().out


def test_a_checkpoint_lost_between_two_renames_gives_way_too(path):
    path.unlink()
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_two_damaged_checkpoints_are_an_error_that_says_what_to_do(path, damage):
    for file in (path, path.with_suffix(".previous")):
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt is damaged and there is no whole one before it; move it away"
    ):
        load_checkpoint(path)


def test_a_write_that_fails_leaves_the_checkpoint_before(path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path)["step"] == 2


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "code has run"
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1, "model": Malicious(str(marker))})
    with pytest.raises(ValueError, match=r"checkpoint\.pt holds more than data .* refused"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not marker.exists()


def test_checkpoints_of_training_hold_data_only(tmp_path):
    config = RunConfig(**TINY)
    train(config, start(config), batches(config), Session(tmp_path / "checkpoint.pt", progress="off"))
    state = load_checkpoint(tmp_path / "checkpoint.pt")  # weights_only
    assert (state["step"], len(state["history"]), len(state["layers"])) == (12, 2, 7)
