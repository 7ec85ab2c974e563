"""Streamed images: batches as from memory, entered anywhere, divided over processes; damage; throughput."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import outcome
from PIL import Image

import lrpet.data.load
import lrpet.data.stream
from lrpet import RunConfig, run
from lrpet.__main__ import main
from lrpet.data.batches import Batches
from lrpet.data.cache import DataError
from lrpet.data.digits_tree import make_digits_tree
from lrpet.data.load import fits_in_memory, load_images, make_batches
from lrpet.data.sets import ImageData, load_data
from lrpet.data.stream import StreamBatches, StreamData
from lrpet.training.loop import Paused

CONFIG = RunConfig(
    dataset="imagefolder",
    image_size=16,
    model="resnet8",
    method="lrpet",
    epochs=2,
    milestones=[1],
    batch_size=8,
    learning_rate=0.05,
    crops="whole",
)
SQUARE = dataclasses.replace(CONFIG, crops="square")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # Python 3.12 says so of every fork


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """One worker."""
    monkeypatch.setattr(lrpet.data.stream, "worker_count", lambda: 1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_digits_tree(
        tmp_path_factory.mktemp("tree") / "digits", classes=6, train=4, val=2
    )  # 24 and 12 images


@pytest.fixture
def damaged(tmp_path):
    """A tree with a training and a held-out image cut off in the middle."""
    root = make_digits_tree(tmp_path / "damaged", classes=6, train=4, val=2)
    for name in ("train/2/1.jpg", "val/5/0.jpg"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) * 2 // 3])
    return root


def all_of(batches):
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


# ---------------------------------------------------------------- where images are kept


@pytest.mark.parametrize(
    ("crops", "room", "streamed", "kind"),
    [
        ("square", True, None, ImageData),
        ("square", False, None, StreamData),
        ("square", True, True, StreamData),  # as a run was begun
        ("square", False, False, ImageData),
        ("whole", True, None, StreamData),
        ("whole", True, False, StreamData),
    ],
)
def test_what_fits_is_kept_in_memory_and_whole_images_are_streamed(
    tree, monkeypatch, crops, room, streamed, kind
):
    monkeypatch.setattr(lrpet.data.load, "fits_in_memory", lambda *_: room)
    assert isinstance(load_images(dataclasses.replace(CONFIG, crops=crops), tree, streamed=streamed), kind)


def test_the_bytes_that_must_fit_are_those_of_the_decoded_images(tree, monkeypatch):
    asked = []
    monkeypatch.setattr(
        lrpet.data.load, "fits_in_memory", lambda nbytes, device: asked.append(nbytes) or True
    )
    data = load_images(SQUARE, tree)
    assert asked == [data.train_images.nbytes + data.test_images.nbytes]


def test_half_of_the_free_memory_is_the_bound(monkeypatch):
    free = SimpleNamespace(available=102_400)
    monkeypatch.setattr(lrpet.data.load.psutil, "virtual_memory", lambda: free)
    assert fits_in_memory(51_199, CPU) and not fits_in_memory(51_200, CPU)


def test_whole_images_are_not_taken_from_memory(tree):
    with pytest.raises(DataError, match="crops 'whole' cannot be taken from memory"):
        load_data(CONFIG, tree)


def test_a_fingerprint_tells_names_sizes_and_labels(tree, tmp_path):
    data = load_images(CONFIG, tree)
    assert all(re.fullmatch("files:[0-9a-f]{64}", value) for value in data.fingerprint.values())
    assert load_images(CONFIG, tree).fingerprint == data.fingerprint
    labels = data.train_labels.clone()
    labels[0] += 1
    assert (
        dataclasses.replace(data, train_labels=labels).fingerprint["data_train_sha256"]
        != data.fingerprint["data_train_sha256"]
    )
    assert (
        dataclasses.replace(data, train_files=data.train_files[::-1]).fingerprint["data_test_sha256"]
        == data.fingerprint["data_test_sha256"]
    )


# ---------------------------------------------------------------- batches


def test_streamed_squares_are_the_bits_of_those_in_memory(tree):
    memory, streamed = (
        make_batches(load_images(SQUARE, tree, streamed=way), 7, CPU, 1) for way in (False, True)
    )
    assert (type(memory), type(streamed)) == (Batches, StreamBatches)
    assert memory.steps == streamed.steps == 4
    for one, other in (
        (memory.epoch(3), streamed.epoch(3)),
        (memory.epoch(3, 2), streamed.epoch(3, 2)),
        (memory.test(5), streamed.test(5)),
    ):
        for (x, y), (u, v) in zip(one, other, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
            assert u.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_of_whole_crops_is_drawn_from_seed_and_epoch_and_entered_anywhere(tree):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    data = load_images(CONFIG, tree)
    epochs = {
        (seed, epoch): all_of(make_batches(data, 7, CPU, seed).epoch(epoch))
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    }
    x, y = epochs[1, 0]
    assert x.shape == (24, 3, 16, 16) and x.dtype == torch.float32
    assert sorted(y.tolist()) == sorted(data.train_labels.tolist())  # each image once
    assert not torch.equal(x, epochs[1, 1][0]) and not torch.equal(x, epochs[2, 0][0])
    again = make_batches(data, 7, CPU, 1)
    next(again.epoch(0))  # a pass that is given up
    late_x, late_y = all_of(again.epoch(0, 2))
    assert torch.equal(late_x, x[14:]) and torch.equal(late_y, y[14:])
    assert torch.equal(all_of(again.epoch(0))[0], x)
    assert torch.equal(torch.get_rng_state(), before)  # training alone draws from it


def test_processes_are_served_their_parts_of_the_same_batches(tree):
    data = load_images(CONFIG, tree)
    whole = [x for x, _ in make_batches(data, 7, CPU, 1).epoch(0)]
    parts = [list(make_batches(data, 7, CPU, 1, rank, 4).epoch(0)) for rank in range(4)]
    for step, x in enumerate(whole):
        for rank in range(4):
            assert torch.equal(
                parts[rank][step][0], x[rank::4]
            )  # of the last batch's three images the fourth gets none
    test = all_of(make_batches(data, 7, CPU, 1).test())
    for rank in range(2):
        part = all_of(make_batches(data, 7, CPU, 1, rank, 2).test(4))
        assert torch.equal(part[0], test[0][rank::2]) and torch.equal(part[1], test[1][rank::2])


def test_crops_show_a_random_part_of_the_whole_image_and_half_are_mirrored(tmp_path):
    ramp = Image.merge(
        "RGB", [Image.linear_gradient("L").rotate(90).resize((90, 30))] * 3
    )  # bright to dark, from edge to edge
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            ramp.save(tmp_path / split / name / "0.png")
    data = load_images(CONFIG, tmp_path)
    batches = make_batches(data, 2, CPU, 1)
    x = torch.cat([all_of(batches.epoch(epoch))[0] for epoch in range(60)])[:, 0]  # (120, 16, 16)
    rising = x[:, :, -1].mean(1) > x[:, :, 0].mean(1)
    assert 0.3 < rising.float().mean() < 0.7
    pixels = (x * data.std[0] + data.mean[0]) * 255
    assert (
        pixels.min() < 12 and pixels.max() > 243
    )  # the edges, which the central square leaves out, are seen
    spans = (pixels.amax((1, 2)) - pixels.amin((1, 2))) / 255
    assert spans.min() < 0.2 and 0.35 < spans.max() < 0.5  # of three squares side by side
    held = next(batches.test())[0][0, 0] * data.std[0] + data.mean[0]
    assert (
        0.33 < held.min() < 0.4 and 0.6 < held.max() < 0.67
    )  # the middle sixteenth-eighteenths of the middle third


def test_two_passes_at_once_are_refused(tree):
    batches = make_batches(load_images(CONFIG, tree), 7, CPU, 1)
    first = batches.epoch(0)
    next(first), next(batches.test())
    with pytest.raises(RuntimeError, match="take one after the other"):
        next(first)


def test_the_same_images_are_held_out_as_in_memory(tree):
    config = dataclasses.replace(SQUARE, validation_fraction=0.25)
    memory, streamed = (load_images(config, tree, streamed=way) for way in (False, True))
    assert torch.equal(memory.train_labels, streamed.train_labels) and torch.equal(
        memory.test_labels, streamed.test_labels
    )
    assert len(streamed.test_files) == 6
    assert torch.equal(
        all_of(make_batches(memory, 7, CPU, 1).test())[0], all_of(make_batches(streamed, 7, CPU, 1).test())[0]
    )


# ---------------------------------------------------------------- corrupt images


@pytest.mark.parametrize("config", [CONFIG, SQUARE], ids=["streamed", "in memory"])
def test_a_truncated_image_stops_the_run_and_is_named(damaged, config):
    with pytest.raises(
        DataError,
        match=r"train/2/1\.jpg cannot be decoded .*; replace it or move it away",
    ) as stop:
        run(config, data=damaged, device="cpu", progress="off")
    assert "Traceback" not in str(stop.value)
    assert not (config.folder() / "summary.json").exists()


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("config", [CONFIG, SQUARE], ids=["whole", "square"])
def test_an_interrupted_streamed_run_ends_with_the_same_bits(tree, tmp_path, monkeypatch, config):
    monkeypatch.setattr(lrpet.data.load, "fits_in_memory", lambda *_: False)
    through = run(config, data=tree, results=tmp_path / "through", device="cpu", progress="off")
    for _ in range(5):
        with pytest.raises(Paused):
            run(config, data=tree, results=tmp_path / "halting", device="cpu", progress="off", time_budget=0)
        monkeypatch.setattr(
            lrpet.data.load, "fits_in_memory", lambda *_: True
        )  # what is free when it resumes changes nothing
    halting = run(config, data=tree, results=tmp_path / "halting", device="cpu", progress="off")
    assert outcome(halting.folder) == outcome(through.folder)


def test_streaming_and_memory_train_the_same_network(tree, tmp_path, monkeypatch):
    memory = run(SQUARE, data=tree, results=tmp_path / "memory", device="cpu", progress="off")
    monkeypatch.setattr(lrpet.data.load, "fits_in_memory", lambda *_: False)
    streamed = run(SQUARE, data=tree, results=tmp_path / "streamed", device="cpu", progress="off")
    assert memory.history.train_loss.tolist() == streamed.history.train_loss.tolist()
    assert memory.environment["data_train_sha256"] != streamed.environment["data_train_sha256"]


def test_throughput_is_measured_for_named_runs_and_kept(tree, capsys, monkeypatch, tmp_path):
    experiment = next(
        e for e in lrpet.experiments.load_profile("imagenette").experiments if e.name == "resnet18-dense-s1"
    )
    small = dataclasses.replace(
        experiment, config=dataclasses.replace(experiment.config, image_size=16, batch_size=8)
    )
    monkeypatch.setattr("lrpet.__main__.select", lambda *_: [small])
    command = [
        "throughput",
        "resnet18-dense-s1",
        "--profile",
        "imagenette",
        "--data",
        str(tree),
        "--device",
        "cpu",
    ]
    assert main([*command, "--seconds", "0.01", "--keep"]) == 0
    assert "resnet18-dense-s1: loading alone" in capsys.readouterr().out
    (file,) = (tmp_path / "results" / "bench").glob("throughput-resnet18-dense-16-*.json")
    result = json.loads(file.read_text())
    assert (
        result["batch_size"] == 8
        and result["device"].startswith("CPU")
        and 0 < result["both_images_per_second"] < math.inf
    )


# ---------------------------------------------------------------- the tree of digits


def test_the_tree_of_digits_is_made_once_and_always_the_same(tmp_path):
    one, other = make_digits_tree(), make_digits_tree(tmp_path / "other")
    assert one.is_relative_to(tmp_path / "cache")  # beside the decoded images, out of git
    files = sorted(path.relative_to(one) for path in one.rglob("*.jpg"))
    assert len(files) == 252
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    (one / files[0]).unlink()
    assert make_digits_tree() == one and not (one / files[0]).exists()
    sizes = set()
    for file in files[1:20]:
        with Image.open(one / file) as image:
            sizes.add(image.size)
    assert len(sizes) > 10
