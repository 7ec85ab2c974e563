"""Which images a tree holds: one policy for splits, classes, links and files; no silent drop."""

import os
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lrpet import RunConfig
from lrpet.data.cache import DataError
from lrpet.data.pixels import open_image
from lrpet.data.sets import load_data
from lrpet.data.tree import IMAGES, list_images

FOLDER = RunConfig(dataset="imagefolder", image_size=16)


def grow(root, *places, n=6):
    """Make n empty image files in each place; a place with a suffix is one file."""
    for place in places:
        files = [place] if Path(place).suffix else [f"{place}/{i}.png" for i in range(n)]
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    return root


def split_tree(root, *splits, classes=("cat", "dog")):
    return grow(root, *(f"{split}/{name}" for split in splits for name in classes))


def read(root):
    """Return classes, and how many images are trained on and scored."""
    train, held, classes = list_images(root)
    for path, label in train + held:  # a label is that of the folder
        assert f"/{classes[label]}/" in path or path.count("/cat/") + path.count("/dog/") != 1
    return classes, len(train), len(held)


CATS = ("cat", "dog"), 12, 12
FIFTH = ("cat", "dog"), 10, 2
SPLITS = {
    "train, val": CATS,
    "train, test": CATS,
    "Train, Test": CATS,
    "TRAIN, VALID": CATS,
    "training, validation": CATS,
    "seg_train, seg_test": CATS,
    "seg_train/seg_train, seg_test/seg_test": CATS,
    "training_set/training_set, test_set/test_set": CATS,
    "train2017, val2017": CATS,
    ".": FIFTH,
}


@pytest.mark.parametrize(("splits", "expected"), SPLITS.items(), ids=SPLITS)
def test_splits_are_known_by_a_word_of_their_names(tmp_path, splits, expected):
    assert read(split_tree(tmp_path, *splits.split(", "))) == expected


def test_a_class_may_be_called_as_a_split(tmp_path):
    assert read(grow(tmp_path, "bus", "car", "train"))[0] == ("bus", "car", "train")
    assert read(grow(tmp_path / "2", "test_tube", "flask"))[0] == ("flask", "test_tube")
    assert read(split_tree(tmp_path / "3", "train", "val", classes=("train", "test")))[0] == ("test", "train")


def test_images_below_a_class_are_of_it(tmp_path):
    assert read(grow(tmp_path, "cat/a", "cat/b/c", "dog")) == (("cat", "dog"), 15, 3)


UNCLEAR = {
    "val and test": (
        lambda r: split_tree(r, "train", "val", "test"),
        "val/ and test/",
        "which is to be scored",
    ),
    "two to train on": (
        lambda r: split_tree(r, "train", "train_small", "val"),
        *("train/ and train_small/", "which is to be trained on", "begin with a dot"),
    ),
    "splits of other names": (lambda r: split_tree(r, "fold1", "fold2"), "fold1, fold2", "look like splits"),
    "splits without classes": (lambda r: grow(r, "train", "test"), "holds images, but no folder per class"),
    "a split among classes": (lambda r: grow(r, "train/steam", "train/diesel", "bus"), "got one of two"),
    "train alone": (lambda r: split_tree(r, "train"), "got one of two"),
    "one level too high": (
        lambda r: split_tree(r / "pets", "train", "val"),
        "one class, 'pets'",
        "did you mean",
    ),
    "classes of one split": (lambda r: split_tree(grow(r, "val/emu"), "train", "val"), "only one has 'emu'"),
    "a class of none that is read": (
        lambda r: grow(grow(r, "train/emu/1.heic", "val/emu"), "train/cat", "val/cat"),
        *("without images", "train/emu"),
    ),
}


@pytest.mark.parametrize(("make", "words"), [(m, w) for m, *w in UNCLEAR.values()], ids=UNCLEAR)
def test_a_tree_that_can_be_read_in_two_ways_is_refused(tmp_path, make, words):
    make(tmp_path)
    refused(lambda: list_images(tmp_path), str(tmp_path), *words, kind=DataError)


def test_one_of_two_scored_splits_is_left_out_by_a_dot(tmp_path):
    split_tree(tmp_path, "train", "val", ".test")
    grow(
        tmp_path,
        "train/.ipynb_checkpoints",
        "val/cat/.thumbnails/1.png",
        "val/dog/._0.png",
        "val/cat/Thumbs.db",
    )
    assert read(tmp_path) == CATS


LEFT_OUT = {
    "other files": (
        ["train/cat/1.heic", "train/cat/2.HEIC", "val/dog/x.txt", "val/dog/README.md"],
        CATS,
        ["4 files (.heic: 2, .md: 1, .txt: 1)"],
    ),
    "images without a class": (["logo.png", "train/stray.png"], CATS, ["2 files (images in no class: 2)"]),
    "folders beside": (["extra/a/1.png", "more/a.jpg"], CATS, ["extra/; more/"]),
    "a flat test": (["test/1.png"], CATS, ["test/ (images without classes)"]),
}


@pytest.mark.parametrize(("more", "expected", "words"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_told(tmp_path, more, expected, words):
    grow(split_tree(tmp_path, "train", "val"), *more)
    with pytest.warns(UserWarning, match="left out are") as told:
        assert read(tmp_path) == expected
    (text,) = {str(warning.message) for warning in told}
    assert str(tmp_path) in text and all(word in text for word in words)


def test_a_flat_test_part_is_no_reason_to_stop(tmp_path):
    grow(split_tree(tmp_path, "train"), "test")
    with pytest.warns(UserWarning, match=r"test/ \(images without classes\)"):
        assert read(tmp_path) == FIFTH


LINKS = {  # place, target, words of the refusal
    "to the parent": ("train/cat/loop", "..", "inside a class"),
    "to itself": ("train/cat/loop", "../cat", "inside a class"),
    "to another tree, in a class": ("train/cat/more", "{elsewhere}", "inside a class"),
    "a class that is another": ("train/cow", "dog", "the same by a link"),
    "a class that is the tree": ("train/cow", "..", "the same by a link"),
    "the training images scored": ("val", "train", "the same by a link"),
    "an image of another class": ("train/cat/9.png", "../dog/1.png", "which is in the tree itself"),
    "a training image scored": ("test/cat/9.png", "../../train/cat/1.png", "which is in the tree itself"),
    "a scored image trained on": ("train/cat/9.png", "../../test/cat/1.png", "which is in the tree itself"),
    "an image to nowhere": ("train/cat/9.png", "nowhere.png", "No such file"),
    "a class twice from elsewhere": ("train/cow", "{elsewhere}", "the same by a link"),
}


@pytest.mark.parametrize(("place", "target", "words"), LINKS.values(), ids=LINKS)
def test_a_link_that_counts_images_twice_is_refused_by_name(tmp_path, place, target, words):
    root, elsewhere = split_tree(tmp_path / "tree", "train", "test"), grow(tmp_path / "elsewhere", "x")
    (root / place).symlink_to(target.format(elsewhere=elsewhere))
    if place == "val":
        os.rename(root / "test", root / ".test")
    if "twice" in words or target == "{elsewhere}":
        (root / "train" / "cub").symlink_to(elsewhere)
    refused(lambda: list_images(root), str(root), place.split("/")[-1], words, kind=DataError)


def test_a_tree_may_be_made_of_links_to_images_and_classes_elsewhere(tmp_path):
    store = grow(tmp_path / "store", "cats", "images")
    root = split_tree(tmp_path / "tree", "train", "val", classes=("dog",))
    for split, kept in (("train", store / "cats"), ("val", store / "images")):
        (root / split / "cat").symlink_to(kept)
    (root / "val" / "dog" / "more.png").symlink_to(grow(tmp_path, "1.png") / "1.png")
    assert read(root) == (("cat", "dog"), 12, 13)


def test_names_that_are_not_utf8_are_read(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in (b"caf\xe9", b"dog"):
            folder = os.fsencode(tmp_path / split) + b"/" + name
            os.makedirs(folder)
            Image.new("RGB", (20, 20)).save(os.fsdecode(folder + b"/\xff.png"))
    data = load_data(FOLDER, tmp_path)
    assert data.classes == ("caf\\xe9", "dog") and len(data.train_labels) == 2
    str(data.classes).encode()


# ---------------------------------------------------------------- pixels


def picture(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return open_image(str(path))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_keep_their_high_ones(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    image = picture(tmp_path / f"a.{suffix}", ramp)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 1], ramp >> 8)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_no_known_range_are_refused_by_name(tmp_path, kind):
    words = ("a.tif", "of no known range", "8 or 16 bits")
    refused(lambda: picture(tmp_path / "a.tif", np.ones((4, 5), kind)), *words, kind=DataError)


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_stand_upright(tmp_path, turn):
    from PIL import ImageOps

    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[10:, 20:] = (250, 0, 0), (0, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = turn
    image = picture(tmp_path / "a.png", pixels, exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(stored)))


def test_damaged_exif_does_not_hide_an_image(tmp_path):
    image = picture(tmp_path / "a.jpg", np.full((20, 20, 3), 100, np.uint8), exif=b"Exif\x00\x00damaged")
    assert abs(int(np.asarray(image)[0, 0, 0]) - 100) < 3


def test_a_replaced_image_of_equal_size_and_time_is_decoded_again(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / split / name / "0.bmp")
    file = tmp_path / "train" / "cat" / "0.bmp"
    assert load_data(FOLDER, tmp_path).train_images[0, 0, 0].tolist() == [200, 0, 0]
    for color in ((0, 200, 0), (0, 0, 200)):
        before = os.stat(file)
        Image.new("RGB", (20, 20), color).save(tmp_path / "new.bmp")
        if color[1]:  # over the file
            file.write_bytes((tmp_path / "new.bmp").read_bytes())
            (tmp_path / "new.bmp").unlink()
        else:  # in its place
            os.replace(tmp_path / "new.bmp", file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(file).st_size == before.st_size
        assert load_data(FOLDER, tmp_path).train_images[0, 0, 0].tolist() == list(color)


# ---------------------------------------------------------------- any tree

NAMES = st.sampled_from(
    ["train", "Val", "test", "seg_train", "cat", "dog", "ümlaut", "a b", ".hidden", "x.png", "{}", "extra"]
)
FILES = st.sampled_from(["0.png", "1.JPG", "b.heic", "c", ".d.png", "Thumbs.db", "n.txt", "0.gif"])
PLACES = st.lists(st.tuples(st.lists(NAMES, max_size=3), FILES), max_size=25)
SYMLINKS = st.lists(
    st.tuples(st.lists(NAMES, max_size=2), NAMES, st.sampled_from(["..", ".", "cat", "0.png"]))
)


def visible(root):
    """Return every image below that no dot hides; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            os.path.join(folder, name) for name in files if name[0] != "." and name.lower().endswith(IMAGES)
        )


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(PLACES, SYMLINKS)
def test_any_tree_is_read_without_a_silent_drop_or_refused(places, links):
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        root = Path(folder)
        for place, name in places:
            with suppress(OSError):  # a file stands where a folder should be
                root.joinpath(*place).mkdir(parents=True, exist_ok=True)
                root.joinpath(*place, name).touch()
        for place, name, target in links:
            with suppress(OSError):
                root.joinpath(*place, name).symlink_to(target)
        try:
            train, held, classes = list_images(root)
        except DataError as error:
            assert folder in str(error)
            return
        paths = [path for path, _ in train + held]
        assert max(Counter(map(os.path.realpath, paths)).values()) == 1  # each image once
        assert {label for _, label in train} == {label for _, label in held} == set(range(len(classes)))
        assert not any(name.startswith(".") for name in classes)
        assert all(path.lower().endswith(IMAGES) for path in paths)
        dropped = set(visible(root)) - set(paths)
        assert bool(dropped) <= bool(told), dropped
