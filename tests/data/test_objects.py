"""Images with boxes and masks: generated scenes, trees as of VOC, SBD and COCO, and what is refused."""

import json

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from scipy.io import savemat

from lrpet.config import RunConfig
from lrpet.data.object_sets import VOC_CLASSES, load_objects
from lrpet.data.objects import IGNORED, Annotated, ObjectBatches
from lrpet.data.vary import Variations

DETECTION = {"task": "detection", "model": "fasterrcnn_resnet8_fpn"}
SEGMENTATION = {"task": "segmentation", "model": "fcn_resnet8"}
LISTS = {  # of a small VOC tree: year, kind of list, its name → images
    ("2007", "Main", "trainval"): ["000001", "000002"],
    ("2007", "Main", "test"): ["000003"],
    ("2012", "Main", "trainval"): ["2008_000001"],
    ("2012", "Segmentation", "train"): ["2008_000001"],
    ("2012", "Segmentation", "val"): ["2008_000002"],
}
DOG = "<object><name>dog</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def box(*edges):
    return "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))


def voc_image(place, name, objects=""):
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "JPEGImages" / f"{name}.jpg")
    text = f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>"
    (place / "Annotations" / f"{name}.xml").write_text(text)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:10, 5:10], mask[20, 20] = 12, IGNORED
    Image.fromarray(mask).save(place / "SegmentationClass" / f"{name}.png")
    return place


@pytest.fixture
def voc(tmp_path):
    for (year, kind, split), names in LISTS.items():
        place = tmp_path / "VOCdevkit" / f"VOC{year}"
        (place / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
        (place / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            voc_image(place, name, DOG.format(0, box(6, 6, 10, 10)) + DOG.format(1, box(1, 1, 40, 30)))
    sbd = tmp_path / "sbd"
    for folder in ("img", "cls"):
        (sbd / folder).mkdir(parents=True)
    (sbd / "train_noval.txt").write_text("2008_000001\n2008_000009\n")  # the first is VOC's too
    Image.new("RGB", (40, 30)).save(sbd / "img" / "2008_000009.jpg")
    segmentation = np.empty((1, 1), object)
    segmentation[0, 0] = np.full((30, 40), 3, np.uint8)
    truth = np.empty((1, 1), [("Segmentation", object)])
    truth["Segmentation"][0, 0] = np.full((30, 40), 3, np.uint8)
    savemat(sbd / "cls" / "2008_000009.mat", {"GTcls": truth})
    return tmp_path


def load(root, fields, **more):
    return load_objects(RunConfig(**{"dataset": "voc", "image_size": 64} | fields | more), root)


def coco(root, boxes, categories=((7, "cat"), (3, "dog")), size=(40, 30)):
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        Image.new("RGB", size).save(root / split / "a.jpg")
        found = [
            {"id": i, "image_id": 5, "category_id": 3, "bbox": list(one), "iscrowd": i % 2, "area": 1}
            for i, one in enumerate(boxes)
        ]
        content = {
            "images": [{"id": 5, "file_name": "a.jpg", "width": 40, "height": 30}],
            "annotations": found,
            "categories": [{"id": number, "name": name} for number, name in categories],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_have_the_boxes_that_their_masks_span(split):
    data = load_objects(RunConfig(**SEGMENTATION, dataset="digit_scenes"))
    scenes, counts = getattr(data, split), []
    for i in range(20):
        scene = scenes[i]
        counts.append(len(scene.boxes))
        found = torch.zeros_like(scene.mask)
        for (x1, y1, x2, y2), label in zip(scene.boxes.long().tolist(), scene.labels, strict=True):
            inside = scene.mask[y1:y2, x1:x2] == 1 + label
            for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert side.any()
            found[y1:y2, x1:x2] = scene.mask[y1:y2, x1:x2]
        assert torch.equal(found, scene.mask)  # nothing outside of the boxes
    assert min(counts) >= 1 and max(counts) > 2


def test_scenes_are_the_same_each_time_and_no_two_alike():
    data, again = (load_objects(RunConfig(**DETECTION, dataset="digit_scenes")) for _ in range(2))
    assert torch.equal(data.train[7].image, again.train[7].image)
    assert not torch.equal(data.train[7].image, data.train[8].image)
    assert not torch.equal(data.train[7].image, data.test[7].image)
    assert data.fingerprint == again.fingerprint
    assert data.fingerprint["data_train_sha256"] != data.fingerprint["data_test_sha256"]
    with pytest.raises(IndexError):
        data.test[len(data.test)]


def test_held_out_scenes_come_from_the_training_scenes():
    config = RunConfig(**DETECTION, dataset="digit_scenes", validation_fraction=0.25)
    data = load_objects(config)
    assert (len(data.train), len(data.test)) == (300, 100)


def test_voc_for_detection(voc):
    data = load(voc, DETECTION)
    assert (len(data.train), len(data.test), data.classes) == (3, 1, VOC_CLASSES)
    image = data.train[0]
    assert image.boxes.tolist() == [[5, 5, 10, 10], [0, 0, 40, 30]]
    assert image.crowd.tolist() == [False, True] and VOC_CLASSES[image.labels[0]] == "dog"


def test_voc_for_segmentation_with_what_sbd_adds(voc):
    data = load(voc, SEGMENTATION)
    assert (len(data.train), len(data.test), len(data.classes)) == (2, 1, 21)
    assert data.train[0].mask.unique().tolist() == [0, 12, IGNORED]
    assert data.train[1].mask.unique().tolist() == [3]


def test_an_image_without_objects_is_allowed(voc):
    voc_image(voc / "VOCdevkit" / "VOC2007", "000001")
    data = load(voc, DETECTION)
    assert data.train[0].boxes.shape == (0, 4)
    x, y = next(ObjectBatches(data, 3, "cpu", seed=1).epoch(0))
    assert x.shape == (3, 3, 64, 64) and y.shape[::2] == (3, 6)


@pytest.mark.parametrize("edges", [(0, 5, 9, 9), (5, 5, 41, 9), (5, 5, 4, 9), (5, 31, 9, 30)])
def test_boxes_outside_of_their_image_or_empty_are_named_and_refused(voc, edges):
    voc_image(voc / "VOCdevkit" / "VOC2007", "000003", DOG.format(0, box(*edges)))
    refused(lambda: load(voc, DETECTION), "000003.xml", "1 boxes", "40 × 30", "Mend or delete")


def test_a_class_that_the_network_has_no_output_for(voc):
    voc_image(
        voc / "VOCdevkit" / "VOC2007", "000003", DOG.replace("dog", "helmet").format(0, box(1, 1, 9, 9))
    )
    refused(lambda: load(voc, DETECTION), "000003.xml", "'helmet'", "dog", "Rename")


def test_a_tree_of_another_year(voc):
    (voc / "VOCdevkit" / "VOC2012").rename(voc / "VOCdevkit" / "VOC2010")
    for fields in (DETECTION, SEGMENTATION):
        refused(lambda fields=fields: load(voc, fields), "VOC2012", "holds VOC2007, VOC2010", "Unpack")


def test_a_list_that_is_missing_or_sbd(voc):
    (voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
    refused(lambda: load(voc, DETECTION), "'test'", "VOC2007", "both archives")
    (voc / "sbd" / "train_noval.txt").unlink()
    refused(lambda: load(voc, SEGMENTATION), "SBD", "train_noval.txt")


@pytest.mark.parametrize(("value", "shape"), [(21, (30, 40)), (254, (30, 40)), (1, (30, 41))])
def test_masks_with_labels_out_of_range_or_of_another_shape(voc, value, shape):
    file = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2008_000002.png"
    Image.fromarray(np.full(shape, value, np.uint8)).save(file)
    batches = ObjectBatches(load(voc, SEGMENTATION), 2, "cpu", seed=1)
    refused(lambda: list(batches.test()), "2008_000002.png", "0 to 20", "Mend or remove")


def test_no_folder_for_voc():
    refused(lambda: load(None, DETECTION), "voc", "--data")


def test_coco(tmp_path):
    pytest.importorskip("pycocotools")
    data = load(coco(tmp_path, [(5, 5, 10, 10), (0, 0, 40.4, 30)]), DETECTION, dataset="coco")
    assert data.classes == ("dog", "cat")  # by their numbers
    assert data.train[0].boxes[0].tolist() == [5, 5, 15, 15]
    assert data.train[0].crowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("boxes", "categories", "words"),
    [
        ([(5, 5, 0, 10)], ((3, "dog"),), ("1 boxes", "a.jpg", "delete")),
        ([(35, 5, 10, 10)], ((3, "dog"),), ("1 boxes", "a.jpg", "delete")),
        ([(5, 5, 9, 9)], ((4, "dog"),), ("category 3", "does not list it")),
    ],
)
def test_coco_with_wrong_annotations(tmp_path, boxes, categories, words):
    pytest.importorskip("pycocotools")
    refused(lambda: load(coco(tmp_path, boxes, categories), DETECTION, dataset="coco"), *words)


def test_coco_without_its_lists(tmp_path):
    pytest.importorskip("pycocotools")
    refused(lambda: load(tmp_path, DETECTION, dataset="coco"), "instances_train2017.json")


def test_a_backbone_is_asked_for_by_name(voc):
    fields = DETECTION | {"model": "fasterrcnn_resnet50_fpn", "pretrained_backbone": True}
    refused(lambda: load(voc, fields), "resnet50.pth", "holds none")
    (voc / "resnet50-abc.pth").write_bytes(b"weights")
    data = load(voc, fields)
    assert data.backbone == voc / "resnet50-abc.pth" and len(data.fingerprint["backbone_sha256"]) == 64


def annotated(width=50, height=20):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 5:15, 10:30] = 255  # what the box and the mask are around
    mask = torch.zeros(height, width, dtype=torch.int64)
    mask[5:15, 10:30] = 4
    boxes = torch.tensor([[10.0, 5, 30, 15]])
    return Annotated(image, boxes, torch.tensor([3]), torch.tensor([False]), mask)


@pytest.mark.parametrize("training", [False, True])
def test_boxes_and_masks_stay_on_their_object(voc, training):
    for seed in range(8):
        image, y = Variations(load(voc, DETECTION), training=training)(annotated(), seed)
        same, mask = Variations(load(voc, SEGMENTATION), training=training)(annotated(), seed)
        assert image.shape == (3, 64, 64) and y.shape[1] == 6
        for label, x1, y1, x2, y2, crowd in y.tolist():
            assert (label, crowd) == (4, 0)
            inside = image[:, round(y1) : round(y2), round(x1) : round(x2)].float().mean()
            assert inside > 100  # white at the least contrast; the ground is at most 40
        known = mask != IGNORED
        assert set(mask[known].unique().tolist()) <= {0, 4}
        bright = same.float().mean(0) > 128
        if not training:
            assert (bright[known] == (mask[known] == 4)).float().mean() > 0.97
            assert not known[26:].any() and known[:25].all()  # 64 × 26 of 64 × 64


def test_batches_are_drawn_from_seed_and_epoch_alone():
    data = load_objects(RunConfig(**DETECTION, dataset="digit_scenes"))
    batches = ObjectBatches(data, 5, "cpu", seed=1)
    whole = [next(batches.epoch(0)), next(ObjectBatches(data, 5, "cpu", seed=1).epoch(0))]
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))
    first, second = (list(zip(range(2), batches.epoch(1, start), strict=False)) for start in (0, 1))
    assert torch.equal(first[1][1][0], second[0][1][0])
    assert not torch.equal(whole[0][0], first[0][1][0])


def test_two_processes_get_the_halves_of_each_batch():
    data = load_objects(RunConfig(**SEGMENTATION, dataset="digit_scenes"))
    parts = [next(ObjectBatches(data, 6, "cpu", 1, rank, 2).epoch(0))[1] for rank in (0, 1)]
    whole = next(ObjectBatches(data, 6, "cpu", 1).epoch(0))[1]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_an_epoch_has_whole_batches_alone():
    data = load_objects(RunConfig(**DETECTION, dataset="digit_scenes"))
    batches = ObjectBatches(data, 150, "cpu", seed=1)
    assert (batches.steps, batches.served, batches.size(1)) == (2, 300, 150)
    refused(lambda: ObjectBatches(data, 401, "cpu", seed=1), "batch_size", "400", "401")
    refused(lambda: ObjectBatches(data, 1, "cpu", 1, 0, 2), "batch_size", "2, an image for each process")
