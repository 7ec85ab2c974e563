import math

import pytest
import torch
import torch.nn.functional as F

from lrpet import RunConfig, build_model, run
from lrpet.lowrank.batchnorm import find_batchnorms
from lrpet.training.recipes import learning_rate, make_mixer, make_optimizer, training_loss

ADAMW = RunConfig(recipe="adamw", learning_rate=0.001, weight_decay=0.05, epochs=40)


def test_sgd_falls_to_a_tenth_after_each_milestone():
    config = RunConfig(epochs=400, milestones=[200, 300])
    assert [learning_rate(config, e) for e in (0, 199, 200, 299, 300, 399)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_adamw_warms_up_over_a_twentieth_and_ends_near_zero():
    rates = [learning_rate(ADAMW, epoch) for epoch in range(40)]
    assert rates[0] == pytest.approx(0.0005)
    assert max(rates) == rates[1] == rates[2] == pytest.approx(0.001)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
    assert rates[-1] == pytest.approx(0.0005 * (1 + math.cos(math.pi * 37 / 38)))


def test_milestones_mean_nothing_to_adamw():
    assert RunConfig(recipe="adamw", milestones=[3]).run_id == RunConfig(recipe="adamw").run_id


def test_only_matrices_decay_under_adamw_and_everything_under_sgd():
    model = build_model("vit")
    groups = make_optimizer(ADAMW, model, torch.device("cpu")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(make_optimizer(RunConfig(), model, torch.device("cpu")).param_groups) == 1


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


def test_mixed_labels_are_shares_of_the_two_classes():
    torch.manual_seed(0)
    mixer = make_mixer(ADAMW, 10)
    x, y = mixer(torch.rand(16, 3, 32, 32), torch.arange(16) % 10)
    assert x.shape == (16, 3, 32, 32) and y.shape == (16, 10)
    assert torch.allclose(y.sum(1), torch.ones(16))
    assert (y > 0).sum(1).max() <= 2


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
