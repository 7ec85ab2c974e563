import contextlib
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from lrpet import RunConfig, build_model, run
from lrpet.data.load import make_batches
from lrpet.data.sets import ImageData
from lrpet.lowrank.batchnorm import find_batchnorms
from lrpet.methods import make_method
from lrpet.runs.device import deterministic_algorithms
from lrpet.training.loop import Paused, Session, train
from lrpet.training.recipes import (
    augmentation,
    learning_rate,
    make_mixer,
    make_optimizer,
    seed_step,
    training_loss,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ADAMW = RunConfig(recipe="adamw", learning_rate=0.001, weight_decay=0.05, epochs=40)


def test_sgd_falls_to_a_tenth_after_each_milestone():
    config = RunConfig(epochs=400, milestones=[200, 300])
    assert [learning_rate(config, e) for e in (0, 199, 200, 299, 300, 399)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_adamw_warms_up_step_by_step_over_a_tenth_and_ends_near_zero():
    steps = 10
    rates = [learning_rate(ADAMW, e, (i + 0.5) / steps) for e in range(40) for i in range(steps)]
    assert rates[0] == pytest.approx(0.001 * 0.05 / 4)
    assert all(a < b for a, b in zip(rates[:40], rates[1:40], strict=False))
    assert rates[39] == pytest.approx(0.001 * 3.95 / 4)
    assert all(a > b for a, b in zip(rates[40:], rates[41:], strict=False))
    assert rates[219] == pytest.approx(0.0005 * (1 + math.cos(math.pi * 17.95 / 36)))
    assert 0 < rates[-1] < 1e-8


def test_milestones_mean_nothing_to_adamw():
    assert RunConfig(recipe="adamw", milestones=[3]).run_id == RunConfig(recipe="adamw").run_id


@pytest.mark.parametrize(("config", "kind"), [(ADAMW, "AdamW"), (RunConfig(weight_decay=0.05), "SGD")])
def test_everything_decays_under_both_recipes(config, kind):
    model = build_model("vit")
    optimizer = make_optimizer(config, model, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert (type(optimizer).__name__, group["weight_decay"]) == (kind, 0.05)
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("model", ["resnet8", "vgg16", "googlenet", "plain20", "vit"])
def test_weights_that_a_batchnorm_follows_have_a_decay_of_their_own(model):
    network = build_model(model)
    config = RunConfig(weight_decay=0.1, normalized_weight_decay=0.2)
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(config, network, torch.device("cpu")).param_groups
        for p in group["params"]
    }
    followed = (
        {name for name, bn in find_batchnorms(network).items() if bn is not None} if model != "vit" else set()
    )
    assert bool(followed) == (model not in ("plain20", "vit"))
    for name, p in network.named_parameters():
        assert decay[id(p)] == (0.2 if name.removesuffix(".weight") in followed else 0.1), name


def mixed(batches, classes=10, **options):
    """Batches of images that each hold their own number, mixed: a list of (x, y, labels before)."""
    mixer, told = make_mixer(ADAMW, classes, **options), []
    x, labels = torch.arange(1.0, 65).expand(3, 8, 8, 64).permute(3, 0, 1, 2), torch.arange(64) % classes
    for step in range(batches):
        seed_step(ADAMW, step)
        told.append((*mixer(x, labels), labels))
    return told


def test_half_of_the_batches_are_mixed_half_of_those_by_each_way_and_labels_are_shares_always():
    ways = Counter()
    for x, y, labels in mixed(200):
        assert x.shape == (64, 3, 8, 8) and y.shape == (64, 10) and x.dtype == y.dtype == torch.float32
        assert torch.allclose(y.sum(1), torch.ones(64))
        whole = (x == x.round()).all()  # numbers of images, also where a part of one was cut in
        plain = torch.equal(y, F.one_hot(labels, 10).float())
        ways["plain" if plain else "cutmix" if whole else "mixup"] += 1
    assert 80 < ways["plain"] < 120 and 30 < ways["cutmix"] < 70 and 30 < ways["mixup"] < 70


def test_a_quarter_of_the_images_have_a_rectangle_of_their_own_erased():
    erased, shapes, images = 0, set(), 0
    for x, y, labels in mixed(100, fill=(-1.0, -2.0, -3.0)):
        if not torch.equal(y, F.one_hot(labels, 10).float()):
            continue  # mixed afterwards
        gone = x < 0  # (B, 3, 8, 8)
        assert torch.equal(gone, gone[:, :1].expand_as(gone))
        assert all((x[:, c][gone[:, c]] == -1.0 - c).all() for c in range(3))
        images += len(x)
        for place in gone[:, 0][gone[:, 0].flatten(1).any(1)]:
            rows, columns = place.any(1).nonzero().flatten(), place.any(0).nonzero().flatten()
            area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert place.sum() == area <= 0.5 * 64  # one rectangle, 40 % and rounding of its sides
            shapes.add((rows[0].item(), columns[0].item(), len(rows), len(columns)))
            erased += 1
    assert 0.2 < erased / images < 0.3 and len(shapes) > 50


def test_a_step_is_drawn_from_seed_step_and_process_alone():
    def draw(seed, step, rank):
        seed_step(RunConfig(seed=seed), step, rank)
        return torch.rand(()).item()

    places = list(itertools.product((1, 2), (0, 1, 2), (0, 1)))
    first = [draw(*place) for place in places]
    torch.manual_seed(99)
    assert [draw(*place) for place in reversed(places)] == first[::-1]
    assert len(set(first)) == len(places)


def images_of_two_classes():
    """Twelve images of 32×32 pixels, dark ones and bright ones."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 2
    x = torch.randint(0, 128, (12, 32, 32, 3), generator=draw) + 128 * labels[:, None, None, None]
    shape = (tuple("01"), (0.5,) * 3, (0.25,) * 3, 32)
    return ImageData(x.byte(), labels, x.byte(), labels, *shape, pad=4, flip=True)


VIT = RunConfig(
    dataset="cifar10",
    model="vit",
    layers="*.mlp.*",
    prune_ratio=0.7,
    recipe="adamw",
    learning_rate=0.001,
    weight_decay=0.05,
    epochs=2,
    batch_size=8,
    best_of_last=2,
)


def train_vit(folder, stopping, device="cpu"):
    """Train; return weights, rows, the best of the last epochs, and how often it was stopped."""
    deadline = 0.0 if stopping else None
    session = Session(folder / "checkpoint.pt", deadline=deadline, progress="off")
    for sitting in range(20):
        torch.manual_seed(VIT.seed)
        method = make_method(build_model("vit", 2).to(device), VIT)
        images = make_batches(images_of_two_classes(), 8, device, VIT.seed, **augmentation(VIT))
        torch.manual_seed(1000 + sitting)  # what another sitting left behind
        with contextlib.suppress(Paused), deterministic_algorithms(wanted=True):
            state = train(VIT, method, images, session)
            rows = [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in state.history]
            return method.model.state_dict(), rows, state.best.state, sitting
    raise AssertionError("never finished")


@pytest.mark.parametrize("device", DEVICES)
def test_the_recipe_of_the_vision_transformer_resumes_bit_for_bit_at_any_step(tmp_path, device):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    weights, rows, best, _ = train_vit(one, stopping=False, device=device)
    again, rows_again, best_again, sittings = train_vit(many, stopping=True, device=device)
    assert sittings == 7  # twelve images, three passes, batches of eight: four steps an epoch
    assert rows == rows_again
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    assert (best["epoch"], best["top1_pct"]) == (best_again["epoch"], best_again["top1_pct"])
    assert all(torch.equal(tensor, best_again["weights"][name]) for name, tensor in best["weights"].items())


def test_training_sets_the_rate_of_each_step(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr("lrpet.training.loop.set_learning_rate", lambda _, rate, __: rates.append(rate))
    train_vit(tmp_path, stopping=False)
    assert rates == [learning_rate(VIT, epoch, (i + 0.5) / 4) for epoch in range(2) for i in range(4)]
    assert len(set(rates)) == 8


def test_loss_is_plain_cross_entropy_for_sgd_and_smoothed_for_adamw():
    logits, y = torch.randn(8, 10), torch.arange(8)
    assert torch.equal(training_loss(RunConfig(), logits, y), F.cross_entropy(logits, y))
    assert torch.equal(training_loss(ADAMW, logits, y), F.cross_entropy(logits, y, label_smoothing=0.1))


def test_vit_with_low_rank_mlp_trains_and_factorizes(tmp_path):
    root = tmp_path / "tree"
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (i * 60, 200 if label == "a" else 20, 9)).save(
                    root / split / label / f"{i}.png"
                )
    config = RunConfig(
        dataset="imagefolder",
        image_size=32,
        model="vit",
        recipe="adamw",
        layers="*.mlp.*",
        prune_ratio=0.7,
        epochs=1,
        learning_rate=0.001,
    )
    done = run(config, data=root, results=tmp_path / "results", progress="off")
    assert done.summary["compact_max_relative_error"] < 1e-4
    assert set(done.layers.query("action == 'factorized'")["rank"]) == {57}
    assert done.layers.query("action == 'factorized'")["name"].str.contains(".mlp.", regex=False).all()
    dense = (
        64 * 48 * 192 + 9 * 65 * (4 * 192 * 192 + 2 * 2 * 192 * 192) + 192 * 2
    )  # patches, nine blocks, two classes
    assert done.summary["dense_macs"] == dense
    assert done.summary["macs"] == dense - 18 * 65 * (2 * 192 * 192 - 57 * 3 * 192)
