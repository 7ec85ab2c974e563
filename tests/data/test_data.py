import hashlib
import os
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import lrpet.data.sets
from lrpet import RunConfig
from lrpet.data.batches import Batches
from lrpet.data.cache import DataError
from lrpet.data.policy import BatchPolicy
from lrpet.data.sets import ImageData, load_data

FOLDER = RunConfig(dataset="imagefolder", image_size=16)  # stored with a shorter side of 18 pixels
RED, GREY, BLUE = (200, 10, 30), (100, 100, 100), (20, 40, 220)


def save(path, color, size=(24, 24), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """A tree of images of one color each, in the formats that ImageNet is known for."""
    root = tmp_path / "images"
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            save(root / split / "cat" / f"{i}.jpg", RED, (40 + i, 30))
            save(root / split / "cat" / f"tall{i}.png", RED, (33, 61), "RGBA")
            save(root / split / "dog" / f"grey{i}.jpg", GREY, (25, 60 + i), "L")
            save(root / split / "dog" / f"cmyk{i}.jpeg", BLUE, (17, 18), "CMYK", quality=95)
    return root


def colors(images):
    """The color of each image, which must be of one color."""
    images = images.float()
    assert images.std(dim=(1, 2)).max() < 2
    return images.mean(dim=(1, 2))


def assert_colors(images, *expected):
    assert (colors(images) - torch.tensor(expected)).abs().max() < 6


# ---------------------------------------------------------------- digits


def test_digits():
    data = load_data(RunConfig())
    assert data.train_images.shape == (1297, 8, 8, 3)
    assert data.test_images.shape == (500, 8, 8, 3)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))
    assert data.fingerprint == load_data(RunConfig(seed=5)).fingerprint
    pixels = data.train_images / 255.0
    assert abs(pixels.mean().item() - data.mean[0]) < 0.005
    assert abs(pixels.std().item() - data.std[0]) < 0.005


def test_a_fingerprint_reads_the_images_in_place_and_once(monkeypatch):
    pixels, labels = torch.randint(0, 256, (2000, 32, 32, 3), dtype=torch.uint8), torch.arange(2000)
    data = replace(load_data(RunConfig()), train_images=pixels, train_labels=labels)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        told = data.fingerprint
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 0.1 * pixels.nbytes
    whole = pixels.numpy().tobytes() + labels.numpy().tobytes()
    assert told["data_train_sha256"] == hashlib.sha256(whole).hexdigest()
    monkeypatch.setattr(lrpet.data.sets, "_digest", lambda *_: pytest.fail("hashed again"))
    assert data.fingerprint == told


def test_fingerprints_tell_pixels_and_labels_apart():
    data = load_data(RunConfig())
    images, labels = data.train_images.clone(), data.test_labels.clone()
    images[3, 2, 1, 0] += 1
    labels[7] = (labels[7] + 1) % 10
    other = replace(data, train_images=images, test_labels=labels).fingerprint
    assert set(other.values()).isdisjoint(data.fingerprint.values())


# ---------------------------------------------------------------- ImageFolder trees


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_tree_of_mixed_formats_loads(tree, held_out):
    (tree / "val").rename(tree / held_out)
    data = load_data(FOLDER, tree)
    assert data.classes == ("cat", "dog")
    assert data.train_images.shape == (12, 18, 18, 3)
    assert data.test_images.shape == (4, 16, 16, 3)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert_colors(data.train_images, *[RED] * 6, *[BLUE] * 3, *[GREY] * 3)  # files in alphabetical order
    assert_colors(data.test_images, RED, RED, BLUE, GREY)


def test_the_folder_may_come_from_the_environment(tree, monkeypatch):
    monkeypatch.setenv("LRPET_DATA", str(tree))
    assert len(load_data(FOLDER).train_images) == 12
    assert len(load_data(FOLDER, str(tree)).train_images) == 12


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_the_middle_of_an_image_is_kept(tree, size):
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = RED
    image = Image.fromarray(pixels if size[0] > size[1] else pixels.transpose(1, 0, 2))
    image.save(tree / "val" / "cat" / "0.jpg", quality=100, subsampling=0)
    image.save(tree / "val" / "cat" / "tall0.png")
    images = load_data(FOLDER, tree).test_images[:2].float()
    inner = images[:, 1:-1, 1:-1]  # the outermost pixels mix with their neighbors in resizing
    assert (inner - torch.tensor(RED)).abs().max() < 12


def test_the_second_time_comes_from_the_cache(tree, monkeypatch):
    first = load_data(FOLDER, tree)

    def fail(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(PIL.Image, "open", fail)
    second = load_data(FOLDER, tree)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="decoded"):
        load_data(replace(FOLDER, image_size=24), tree)


def test_a_changed_file_is_decoded_again(tree):
    load_data(FOLDER, tree)
    changed = tree / "train" / "cat" / "0.a.png"  # stands first
    for moment, color in enumerate((BLUE, GREY)):  # files of one size in bytes
        save(changed, color, compress_level=0)
        os.utime(changed, ns=(moment, moment))
        assert_colors(load_data(FOLDER, tree).train_images[:2], color, RED)


def test_an_added_file_is_seen(tree):
    load_data(FOLDER, tree)
    save(tree / "train" / "dog" / "zzz.png", RED)
    assert_colors(load_data(FOLDER, tree).train_images[-2:], GREY, RED)


def overwrite(path, content):
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


BROKEN = {
    "not an image": (
        lambda r: overwrite(r / "train/cat/1.jpg", b"not an image"),
        ["train/cat/1.jpg", "cannot be decoded", "replace it or move it away"],
    ),
    "empty file": (
        lambda r: overwrite(r / "val/dog/grey0.jpg", b""),
        ["val/dog/grey0.jpg", "cannot be decoded", "replace it or move it away"],
    ),
    "truncated JPEG": (
        lambda r: truncate(r / "train/cat/0.jpg"),
        ["train/cat/0.jpg", "cannot be decoded", "replace it or move it away"],
    ),
    "truncated PNG": (
        lambda r: truncate(r / "train/cat/tall2.png"),
        ["train/cat/tall2.png", "cannot be decoded", "replace it or move it away"],
    ),
    "empty class": (
        lambda r: [f.unlink() for f in (r / "train/cat").iterdir()],
        ["class without images", "cat", "remove the empty folder"],
    ),
    "one class": (
        lambda r: [shutil.rmtree(r / s / "dog") for s in ("train", "val")],
        ["one class, 'cat'", "at least two"],
    ),
    "other classes": (
        lambda r: (r / "val/dog").rename(r / "val/emu"),
        ["train/ and val/", "different classes", "'dog'", "unpack it again"],
    ),
    "no held-out part": (
        lambda r: shutil.rmtree(r / "val"),
        ["must hold train/ and test/ (or val/)", "--data"],
    ),
    "no training part": (
        lambda r: shutil.rmtree(r / "train"),
        ["must hold train/ and test/ (or val/)", "--data"],
    ),
    "no classes": (lambda r: [shutil.rmtree(r / "train" / c) for c in ("cat", "dog")], ["class"]),
    "missing": (shutil.rmtree, ["must hold train/", "--data"]),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_damaged_trees_are_refused_with_the_place_and_what_to_do(tree, damage, words):
    damage(tree)
    with pytest.raises(DataError) as caught:
        load_data(FOLDER, tree)
    assert str(tree) in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_no_byte_of_an_image_can_end_in_another_error(tree):
    path = tree / "val" / "cat" / "tall0.png"
    whole = path.read_bytes()
    for place in range(8, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            assert load_data(FOLDER, tree).test_images.shape == (4, 16, 16, 3)
        except DataError as error:
            assert str(path) in str(error)


def test_imagefolder_without_a_folder_says_how_to_give_one():
    with pytest.raises(DataError, match="needs a folder with train/ and val/ .*--data or LRPET_DATA"):
        load_data(FOLDER)


# ---------------------------------------------------------------- CIFAR-10

CIFAR10 = RunConfig(dataset="cifar10")


def test_a_tree_of_other_counts_is_not_cifar10(tree):
    for path in tree.rglob("*.*"):
        path.unlink()
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            save(tree / split / name / "0.png", RED, (32, 32))
    with pytest.raises(
        DataError,
        match=r"images holds 2 training and 2 test images of 2 classes; .* Unpack it again",
    ):
        load_data(CIFAR10, tree)


def test_images_of_another_size_are_not_cifar10(tree):
    with pytest.raises(
        DataError, match=r"images/train/cat/0\.jpg is 40×30 pixels, not 32×32; use dataset='imagefolder'"
    ):
        load_data(CIFAR10, tree)


def test_a_folder_without_cifar10_is_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(
        DataError,
        match=r"holds neither train/ nor cifar-10-batches-py .*, but cats; give the folder of CIFAR-10",
    ):
        load_data(CIFAR10, tmp_path)
    with pytest.raises(DataError, match="nowhere is no folder"):
        load_data(CIFAR10, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("holds", "place"),
    [
        ("", "."),  # empty: downloaded there
        ("cifar-10-python.tar.gz", "."),  # which torchvision unpacks
        ("cifar-10-batches-py/x", "."),
        ("cifar-10-python/cifar-10-batches-py/x", "cifar-10-python"),
        ("copies/cifar-10-python.tar.gz", "copies"),
    ],
)
def test_cifar10_is_found_in_a_folder_or_one_level_deeper(tmp_path, monkeypatch, holds, place):
    import torchvision.datasets

    if holds:
        (tmp_path / holds).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / holds).touch()
    asked = []

    def fake(root, *, train, download):
        asked.append((root, train, download))
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(DataError, match="could not be downloaded"):
        load_data(CIFAR10, tmp_path)
    assert asked == [(tmp_path / place, True, True)]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    monkeypatch.setattr(lrpet.data.sets, "project_file", lambda *_: tmp_path)
    with pytest.raises(
        DataError, match=r"could not be downloaded \(OSError: no network\).*--data or LRPET_DATA"
    ):
        load_data(CIFAR10)


@pytest.mark.slow
def test_real_cifar10(cifar10, monkeypatch):
    monkeypatch.setenv("LRPET_CACHE", str(cifar10 / "cache"))
    data = load_data(CIFAR10, cifar10)
    assert data.train_images.shape == (50_000, 32, 32, 3)
    assert data.test_images.shape == (10_000, 32, 32, 3)
    assert data.classes == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert torch.bincount(data.train_labels).tolist() == [5000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    for label, name in enumerate(data.classes):
        first = min((cifar10 / "test" / name).iterdir())
        assert np.array_equal(np.asarray(Image.open(first)), data.test_images[1000 * label].numpy())
        assert (data.test_labels[1000 * label : 1000 * (label + 1)] == label).all()
    pixels = data.train_images.float().div_(255)
    assert torch.allclose(pixels.mean(dim=(0, 1, 2)), torch.tensor(data.mean), atol=0.002)
    held_out = load_data(replace(CIFAR10, validation_fraction=0.1), cifar10)
    assert (len(held_out.train_images), len(held_out.test_images)) == (45_000, 5_000)


# ---------------------------------------------------------------- CIFAR-100


class Downloaded:
    """In the place of torchvision's class: two images."""

    def __init__(self, root, train, download):
        assert download
        self.data = np.full((2, 32, 32, 3), 9 if train else 7, np.uint8)
        self.targets, self.classes = [0, 99], [f"class {i}" for i in range(100)]


@pytest.mark.parametrize("beside", [False, True])
def test_cifar100_is_read_from_its_own_files_also_beside_a_tree_of_cifar10(tmp_path, monkeypatch, beside):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Downloaded)
    (tmp_path / "cifar-100-python").mkdir()
    if beside:
        (tmp_path / "train").mkdir()
    data = load_data(RunConfig(dataset="cifar100"), tmp_path)
    assert len(data.classes) == 100 and data.train_labels.tolist() == [0, 99]
    assert (data.train_images == 9).all() and (data.test_images == 7).all()
    assert (data.mean, data.pad, data.flip) == ((0.5070, 0.4865, 0.4409), 4, True)


def test_a_folder_without_cifar100_is_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(
        DataError, match=r"neither train/ nor cifar-100-python .*, but cats; give the folder of CIFAR-100"
    ):
        load_data(RunConfig(dataset="cifar100"), tmp_path)


# ---------------------------------------------------------------- held-out images


def rows(images):
    return Counter(image.numpy().tobytes() for image in images)


def test_held_out_images_come_from_the_training_images_and_are_gone_there():
    data, split = load_data(RunConfig()), load_data(RunConfig(validation_fraction=0.2))
    assert (len(split.test_images), len(split.train_images)) == (259, 1038)
    assert rows(split.train_images) + rows(split.test_images) == rows(data.train_images)
    assert rows(split.test_images) != rows(data.test_images)
    assert torch.equal(
        torch.bincount(split.train_labels) + torch.bincount(split.test_labels),
        torch.bincount(data.train_labels),
    )


def test_held_out_images_are_the_same_for_every_seed():
    a, b = (load_data(RunConfig(validation_fraction=0.2, seed=seed)) for seed in (1, 2))
    assert a.fingerprint == b.fingerprint


def test_held_out_images_of_a_tree_have_the_size_of_test_images(tree):
    data = load_data(replace(FOLDER, validation_fraction=0.25), tree)
    assert data.train_images.shape == (9, 18, 18, 3)
    assert data.test_images.shape == (3, 16, 16, 3)


def test_a_held_out_part_without_images_is_refused():
    with pytest.raises(
        DataError, match="validation_fraction 0.0001 of 1297 training images leaves one side empty"
    ):
        load_data(RunConfig(validation_fraction=0.0001))


# ---------------------------------------------------------------- batches


def some_images(n=200, edge=8, stored=None, **geometry):
    """Random images, each with its number as label."""
    draw = torch.Generator().manual_seed(1)
    train, test = (
        torch.randint(0, 256, (n, size, size, 3), generator=draw, dtype=torch.uint8)
        for size in (stored or edge, edge)
    )
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return ImageData(
        train, torch.arange(n), test, torch.arange(n), tuple(map(str, range(n))), mean, std, edge, **geometry
    )


KINDS = {
    "cifar": {"pad": 4, "flip": True},
    "digits": {"pad": 1, "flip": False},
    "resized crops": {"pad": None, "flip": True, "stored": 10},
}


def pixels_of(x, data):
    """Undo the normalization: (B, 3, H, W) → (B, H, W, 3) in 0 … 255."""
    return (x.permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)) * 255


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 7, 50, 200, 1000])
def test_every_image_comes_exactly_once_an_epoch(kind, batch_size):
    batches = Batches(some_images(**KINDS[kind]), batch_size, "cpu", seed=3)
    served = list(batches.epoch(2))
    assert len(served) == batches.steps == -(-200 // batch_size)
    assert [len(y) for _, y in served[:-1]] == [batch_size] * (len(served) - 1)
    assert sorted(torch.cat([y for _, y in served]).tolist()) == list(range(200))
    assert all(x.shape == (len(y), 3, 8, 8) and x.dtype == torch.float32 for x, y in served)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in served)


def assert_same_batches(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others)
    assert all(
        torch.equal(a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("batch_size", "steps", "last"), [(50, 12, 50), (64, 9, 64), (1000, 1, 600)])
def test_an_epoch_of_three_passes_serves_every_image_once_a_pass_and_drops_a_batch_that_is_not_full(
    batch_size, steps, last
):
    batches = Batches(some_images(**KINDS["cifar"]), batch_size, "cpu", seed=3, passes=3)
    served = list(batches.epoch(2))
    assert len(served) == batches.steps == steps and batches.size(steps - 1) == len(served[-1][1]) == last
    order, images = (torch.cat(part) for part in zip(*[(y, x) for x, y in served], strict=True))
    for one in order[:200], order[200:400]:
        assert sorted(one.tolist()) == list(range(200))
    assert len(set(order[400:].tolist())) == len(order) - 400
    assert not torch.equal(order[:200], order[200:400])
    again = images[200:400][order[200:400].argsort()]
    alike = (images[:200][order[:200].argsort()] == again).flatten(1).all(1)
    assert alike.sum() < 20  # each pass crops anew; 162 crops are possible


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 5, 12])
def test_varied_passes_can_be_entered_at_any_step_and_by_any_number_of_processes(kind, step):
    data, recipe = some_images(**KINDS[kind]), {"passes": 2, "autoaugment": True}
    whole = list(Batches(data, 30, "cpu", seed=3, **recipe).epoch(4))
    assert len(whole) == 13
    torch.manual_seed(99)  # the global state plays no part
    assert_same_batches(Batches(data, 30, "cpu", seed=3, **recipe).epoch(4, step), whole[step:])
    for rank in range(3):
        part = Batches(data, 30, "cpu", seed=3, rank=rank, world=3, **recipe).epoch(4, step)
        assert_same_batches(part, [(x[rank::3], y[rank::3]) for x, y in whole[step:]])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in whole)
    plain = Batches(data, 30, "cpu", seed=3, passes=2).epoch(4)
    changed = [(x != z).flatten(1).any(1) for (x, _), (z, _) in zip(whole, plain, strict=True)]
    assert 0.5 < torch.cat(changed).float().mean() < 1


@pytest.mark.parametrize("drawn", [0.001, 0.55])  # below 0.5 mirrored; done where the policy's share is above
def test_the_policy_does_to_each_image_of_a_batch_what_torchvision_does_to_it_alone(monkeypatch, drawn):
    images = some_images(n=25, edge=32, **KINDS["cifar"]).train_images
    pairs = torch.arange(25)
    draws = torch.cat([(pairs[:, None] + 0.5) / 25, torch.full((25, 4), drawn)], dim=1)
    varied = BatchPolicy().vary(images, draws)
    alone = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(drawn))
    for pair, image, ours in zip(pairs, images, varied, strict=True):
        monkeypatch.setattr(torch, "randint", lambda *_, pair=pair: pair)
        assert torch.equal(alone(image.permute(2, 0, 1)).permute(1, 2, 0), ours), int(pair)
    assert (varied != images).flatten(1).any(1).sum() >= (24 if drawn < 0.5 else 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 5, 6, 7])
def test_an_epoch_can_be_entered_at_any_step_and_is_the_same_each_time(kind, step):
    data = some_images(**KINDS[kind])
    whole = list(Batches(data, 30, "cpu", seed=3).epoch(4))
    assert len(whole) == 7
    torch.manual_seed(99)  # the global state plays no part
    assert_same_batches(Batches(data, 30, "cpu", seed=3).epoch(4, step), whole[step:])


def test_epochs_and_seeds_differ():
    data = some_images(**KINDS["cifar"])

    def order(seed, epoch):
        return tuple(torch.cat([y for _, y in Batches(data, 64, "cpu", seed).epoch(epoch)]).tolist())

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("kind", ["cifar", "digits"])
def test_augmented_images_are_crops_of_the_padded_image_or_of_its_mirror(kind):
    data = some_images(**KINDS[kind])
    pad = data.pad
    padded = torch.zeros(200, 8 + 2 * pad, 8 + 2 * pad, 3)
    padded[:, pad : 8 + pad, pad : 8 + pad] = data.train_images.float()
    candidates = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[:, row : row + 8, column : column + 8]
            candidates[row, column, False] = crop
            candidates[row, column, True] = crop.flip(2)
    found = Counter()
    for x, y in Batches(data, 64, "cpu", seed=3).epoch(0):
        images = pixels_of(x, data)
        matches = torch.stack(
            [
                ((images - crop[y]).abs() < 0.01).all(dim=3).all(dim=2).all(dim=1)
                for crop in candidates.values()
            ]
        )
        assert (matches.sum(dim=0) == 1).all()
        found.update(list(candidates)[i] for i in matches.int().argmax(dim=0).tolist())
    flips = sum(count for (_, _, flip), count in found.items() if flip)
    assert 70 < flips < 130 if data.flip else flips == 0
    for axis in (0, 1):
        assert {place[axis] for place in found} == set(range(2 * pad + 1))


def test_resized_crops_of_a_plain_image_are_that_image():
    data = some_images(**KINDS["resized crops"])
    data.train_images[:] = torch.arange(200, dtype=torch.uint8)[
        :, None, None, None
    ]  # also shows that labels belong to images
    for epoch in range(5):
        for x, y in Batches(data, 64, "cpu", seed=3).epoch(epoch):
            assert (pixels_of(x, data) - y[:, None, None, None]).abs().max() < 0.01


def test_resized_crops_show_a_part_and_are_mirrored_in_half_the_cases():
    data = some_images(n=400, edge=32, stored=36, pad=None, flip=True)
    data.train_images[:] = torch.linspace(0, 255, 36).to(torch.uint8)[
        None, None, :, None
    ]  # brighter to the right
    x = pixels_of(torch.cat([x for x, _ in Batches(data, 64, "cpu", seed=3).epoch(0)]), data)
    spans = x[:, 16, -1, 0] - x[:, 16, 0, 0]
    assert 150 < (spans < 0).sum() < 250
    widths = spans.abs() / 255
    assert widths.min() > 0.2  # 8 % of the area and an aspect of 3/4 are 0.245 of the width
    assert widths.max() > 0.9
    assert 0.5 < widths.mean() < 0.85


@pytest.mark.parametrize("batch_size", [7, 200, 1000])
def test_held_out_images_are_served_in_order_and_normalized(batch_size):
    data = some_images(**KINDS["cifar"])
    served = list(Batches(data, 64, "cpu", seed=3).test(batch_size))
    x, y = (torch.cat(parts) for parts in zip(*served, strict=True))
    assert torch.equal(y, data.test_labels)
    expected = (data.test_images.float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.allclose(x, expected.permute(0, 3, 1, 2), atol=1e-5)


def test_a_tree_without_splits_holds_every_fifth_image_out(tmp_path):
    tree = tmp_path / "tree"
    for label in ("a", "b"):
        (tree / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 30), (20 * i, 0, 0)).save(tree / label / f"{i:02d}.jpeg")
    data = load_data(RunConfig(dataset="imagefolder", image_size=16), tree)
    assert (len(data.train_labels), len(data.test_labels)) == (20, 4)
    assert sorted(data.test_images[:, 0, 0, 0].tolist()) == pytest.approx([80, 80, 180, 180], abs=4)
    shutil.rmtree(tree / "b")
    (tree / "b").mkdir()
    Image.new("RGB", (20, 30)).save(tree / "b" / "0.png")
    with pytest.raises(DataError, match="fewer than five"):
        load_data(RunConfig(dataset="imagefolder", image_size=16), tree)
