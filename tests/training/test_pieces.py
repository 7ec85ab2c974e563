"""Pieces of one image: seen before the first step where a BatchNorm cannot use them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from torch import nn

from lrpet import RunConfig, build_model, run
from lrpet.data.digits_tree import make_digits_tree
from lrpet.training.pieces import check_pieces, count_pieces


def served(images, batch_size, size=8):
    """Stand for batches."""
    return SimpleNamespace(
        served=images,
        batch_size=batch_size,
        data=SimpleNamespace(image_size=size),
        device=torch.device("cpu"),
    )


NET = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))  # 1×1 pixels of images of 8
ALONE = {  # images, batch_size, world, device_batch: what is said
    "the last batch": (19, 6, 1, None, "batch_size 6 of 19 images", "give batch_size 7 or"),
    "every batch": (19, 1, 1, None, "batch_size 1 of 19 images", "give batch_size 4 or"),
    "one image": (1, 64, 1, None, "batch_size 64 of 1 images", "give a larger image_size"),
    "pieces of one": (18, 6, 1, 1, "batch_size 6 of 18", "another device_batch (--device-batch)"),
    "odd pieces": (18, 3, 1, 2, "batch_size 3", "give batch_size 4 or"),
    "the fourth process": (24, 6, 4, None, "one of 4 processes", "another number of processes"),
    "the last batch of processes": (14, 8, 4, None, "one of 4 processes", "give batch_size 14 or"),
}


@pytest.mark.parametrize("row", ALONE.values(), ids=ALONE)
def test_one_image_alone_is_refused_where_a_batchnorm_sees_one_pixel(row):
    images, batch_size, world, device_batch, *words = row
    asked = served(images, batch_size), world, device_batch
    refused(lambda: check_pieces(NET, *asked), "the BatchNorm '1' sees 1×1 pixels", *words)
    check_pieces(NET[:1], *asked)  # without a BatchNorm
    check_pieces(NET, served(images, batch_size, size=9), world, device_batch)  # of 2×2 pixels


@pytest.mark.parametrize(
    "row", [(18, 6, 1, None), (19, 7, 1, None), (18, 6, 2, 3), (16, 8, 4, 2), (16, 8, 4, None)]
)
def test_two_images_are_enough(row):
    images, batch_size, *others = row
    check_pieces(NET, served(images, batch_size), *others)


def test_the_advice_holds_and_the_parts_are_those_of_a_step():
    for images in range(1, 30):
        for batch_size in range(1, 12):
            for world, device_batch in ((1, None), (1, 3), (2, None), (3, 2)):
                parts = [
                    len(range(images)[start : start + batch_size][rank::world])
                    for start in range(0, images, batch_size)
                    for rank in range(world)
                ]
                pieces = [
                    len(piece)
                    for part in parts
                    for piece in torch.zeros(part).tensor_split(
                        count_pieces(part, device_batch or batch_size)
                    )
                ]
                try:
                    check_pieces(NET, served(images, batch_size), world, device_batch)
                    assert 1 not in pieces
                except ValueError as error:
                    assert 1 in pieces
                    if "give batch_size" in str(error):
                        other = int(str(error).split("give batch_size ")[1].split()[0])
                        check_pieces(NET, served(images, other), world, device_batch)


def test_looking_changes_nothing():
    model = build_model("resnet8").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_pieces(model, served(19, 6))
    assert model.training and all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"batch_size": 6}, {"batch_size": 1}])
def test_a_run_is_refused_before_its_first_step(tmp_path, options):
    root = make_digits_tree(tmp_path / "tree", classes=1 + 1, train=9, val=2)
    (root / "train" / "0" / "more.jpg").write_bytes((root / "train" / "0" / "0.jpg").read_bytes())
    config = RunConfig(
        dataset="imagefolder", image_size=32, model="resnet18", epochs=1, milestones=[], **options
    )
    words = f"batch_size {options['batch_size']} of 19 images", "layer4.0.bn1", "give batch_size"
    refused(lambda: run(config, data=root, device="cpu", progress="off"), *words)
