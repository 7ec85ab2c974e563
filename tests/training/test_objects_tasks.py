"""Losses and scores of boxes and masks, on answers that are known."""

import pytest
import torch
from torch import nn

from lrpet.config import RunConfig
from lrpet.data.object_sets import load_objects
from lrpet.data.objects import IGNORED, ObjectBatches
from lrpet.models import build_model
from lrpet.training.detection import targets_of
from lrpet.training.tasks import task_of

DETECTION = RunConfig(task="detection", dataset="digit_scenes", model="fasterrcnn_resnet8_fpn")
SEGMENTATION = RunConfig(task="segmentation", dataset="digit_scenes", model="fcn_resnet8")


class Served:
    """Batches that are given."""

    device = torch.device("cpu")

    def __init__(self, *batches, classes=("background", "a", "b")):
        self.batches, self.data = batches, type("Data", (), {"classes": classes})

    def test(self):
        return iter(self.batches)


class Knows(nn.Module):
    """A detector that finds what it is told, and has a loss."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, images, targets=None):
        if self.training:
            return {"a": torch.tensor(1.0), "b": torch.tensor(0.5)}
        found = []
        for boxes in self.found:
            n = len(boxes)
            labels, scores = torch.ones(n, dtype=torch.int64), torch.linspace(1, 0.5, n)
            found.append({"boxes": boxes, "labels": labels, "scores": scores})
        return found


def rows(*boxes, crowd=0):
    return torch.tensor([[1.0, *box, crowd] for box in boxes])


BOX, OTHER, SHIFTED = [0.0, 0, 20, 20], [30.0, 30, 50, 50], [4.0, 0, 24, 20]  # the last: an IoU of 2/3


@pytest.mark.parametrize(
    ("truth", "found", "at_half", "over_all"),
    [
        ([rows(BOX)], [[BOX]], 100, 100),
        ([rows(BOX)], [[SHIFTED]], 100, 40),  # right at 0.5, 0.55, 0.6 and 0.65 of ten thresholds
        ([rows(BOX)], [[]], 0, 0),
        ([rows(BOX, OTHER)], [[BOX]], 100 * 51 / 101, 100 * 51 / 101),  # recall of a half, by COCO's points
        ([torch.cat([rows(BOX), rows(OTHER, crowd=1)])], [[OTHER, BOX]], 100, 100),  # a crowd is no mistake
    ],
)
def test_mean_precision_of_known_boxes(truth, found, at_half, over_all):
    pytest.importorskip("pycocotools")
    boxes = [torch.tensor(one).view(-1, 4) for one in found]
    served = Served((torch.zeros(1, 3, 64, 64), truth[0][None]))
    model = Knows(boxes).train()
    scores = task_of(DETECTION).evaluate(model, served)
    assert scores["map_pct"] == pytest.approx(at_half, abs=1e-3)
    assert scores["coco_map_pct"] == pytest.approx(over_all, abs=1e-3)
    assert scores["loss"] == 1.5 and model.training


def test_targets_have_no_padding_and_no_crowd():
    y = torch.stack([torch.cat([rows(BOX), rows(OTHER, crowd=1)]), torch.zeros(2, 6)])
    first, second = targets_of(y)
    assert first["boxes"].tolist() == [BOX] and first["labels"].tolist() == [1]
    assert second["boxes"].shape == (0, 4)
    assert len(targets_of(y, crowd=True)[0]["boxes"]) == 2


def test_a_detectors_loss_has_gradients_and_its_evaluation_changes_nothing():
    pytest.importorskip("pycocotools")
    task, model = task_of(DETECTION), build_model(DETECTION.model)
    batches = ObjectBatches(load_objects(DETECTION), 2, "cpu", seed=1)
    x, y = next(batches.epoch(0))
    output = task.forward(model.train(), x, y)
    loss = task.loss(DETECTION, output, y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss == output.sum() and task.correct(output.detach(), y) == 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    few = Served((x, y), classes=batches.data.classes)
    first, second = (task.evaluate(model, few) for _ in range(2))
    assert first == second and model.training and model.backbone.training
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_without_objects_are_trained_on():
    task, model = task_of(DETECTION), build_model(DETECTION.model).train()
    output = task.forward(model, torch.zeros(2, 3, 64, 64), torch.zeros(2, 0, 6))
    output.sum().backward()
    assert output.isfinite().all()


def test_mean_intersection_over_union_of_known_masks():
    pytest.importorskip("torchmetrics")
    y = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, IGNORED]]])  # (1, 2, 4)
    guess = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 2]]])
    logits = nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).float()
    model = nn.Identity().train()
    scores = task_of(SEGMENTATION).evaluate(model, Served((logits, y)))
    # class 2 is neither there nor, where it counts, found
    assert scores["miou_pct"] == pytest.approx(100 * (3 / 4 + 3 / 4) / 2)
    assert scores["loss"] > 0 and model.training


def test_a_segmenters_loss_leaves_ignored_pixels_out():
    task = task_of(SEGMENTATION)
    logits = torch.randn(2, 3, 4, 4)
    y = torch.randint(0, 3, (2, 4, 4))
    whole = task.loss(SEGMENTATION, logits, y)
    assert torch.isclose(whole, nn.functional.cross_entropy(logits, y))
    y[:, :2] = IGNORED
    part = task.loss(SEGMENTATION, logits, y)
    assert torch.isclose(part, nn.functional.cross_entropy(logits[:, :, 2:], y[:, 2:]))
    assert task.loss(SEGMENTATION, logits, torch.full_like(y, IGNORED)) == 0
