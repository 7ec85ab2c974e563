"""Networks that find objects: torchvision's by name, and two small ones for scenes of a hundred pixels."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from lrpet.models.resnet_cifar import CifarResNet

__all__ = ["build_detector"]
# the small networks
DEPTHS = {"fasterrcnn_resnet8_fpn": 8, "fasterrcnn_resnet20_fpn": 20}
CHANNELS = 64  # of their pyramids
ANCHORS = ((12, 16), (22, 30))  # pixels, squares at each of two levels
WINDOW, HIDDEN = 5, 128  # cells of a proposal's features; width of the second stage
PROPOSALS = {  # of an image, before and after the choice among overlapping ones, and those that a loss sees
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 50,
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 20,
}


class AsServed(GeneralizedRCNNTransform):
    """Takes images as they are served: normalized, and of the size that the run asks for."""

    def __init__(self, size_divisible: int = 32):
        super().__init__(1, 1, [0.0] * 3, [1.0] * 3, size_divisible)

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """Return both as they are."""
        return image, target


class SmallBackbone(nn.Module):
    """A CIFAR ResNet of twice the channels, begun with stride 2, and a pyramid of its last two stages."""

    def __init__(self, depth: int):
        super().__init__()
        self.body = CifarResNet(depth, width=2.0)
        self.body.conv.stride = (2, 2)
        del self.body.fc
        self.fpn = FeaturePyramidNetwork([64, 128], CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Map (B, 3, H, W) to (B, 64, H/4, W/4) and (B, 64, H/8, W/8)."""
        x = F.relu(self.body.bn(self.body.conv(x)))
        blocks, ends = list(self.body.blocks), []
        for number, block in enumerate(blocks, 1):
            x = block(x)
            if number % (len(blocks) // 3) == 0:
                ends.append(x)
        return self.fpn(OrderedDict(zip(("0", "1"), ends[1:], strict=True)))


def build_detector(name: str, num_classes: int) -> nn.Module:
    """Return a detector with fresh random weights for objects of ``num_classes`` kinds.

    Args:
        name: ``fasterrcnn_resnet8_fpn``, ``fasterrcnn_resnet20_fpn``, or a detector of torchvision without
            masks and keypoints, as ``fasterrcnn_resnet50_fpn``.
        num_classes: kinds of objects; the ground, which the network tells apart as class 0, not counted.

    Returns:
        A torchvision detector that takes normalized images of any size as they are: in training it maps
        images and targets to a dict of losses, else images to boxes, labels (from 1) and scores.

    Source: Ren et al., arXiv 1506.01497; Lin et al., arXiv 1612.03144; torchvision.models.detection.

    >>> build_detector("fasterrcnn_resnet8_fpn", 10).roi_heads.box_predictor.cls_score.out_features
    11
    """
    if name not in DEPTHS:
        detector = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=num_classes + 1
        )
    else:
        backbone = SmallBackbone(DEPTHS[name])
        detector = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(ANCHORS, ((1.0,),) * len(ANCHORS)),
            box_roi_pool=MultiScaleRoIAlign(["0", "1"], WINDOW, sampling_ratio=2),
            box_head=TwoMLPHead(CHANNELS * WINDOW**2, HIDDEN),
            box_predictor=FastRCNNPredictor(HIDDEN, num_classes + 1),
            **PROPOSALS,
        )
    detector.transform = AsServed(detector.transform.size_divisible)
    return detector
