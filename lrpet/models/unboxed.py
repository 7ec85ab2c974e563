"""The layers of a detector without what chooses boxes: what an image costs, and what can be compared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["unboxed"]


class Unboxed(nn.Module):
    """Runs every layer of a detector on images, the second stage on as many windows as it takes proposals.

    Which proposals a detector takes, and how many boxes it returns, depends on the values in the image and on
    rounding; what its layers compute does not. The layers are the detector's own, under the same names.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self._modules, self.training = detector._modules, detector.training

    def forward(self, x: Tensor):
        """Map images (B, 3, H, W) to what the heads give, a nest of tensors."""
        features = self.backbone(x)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(self, "rpn"):
            return self.head(features)
        windows = F.adaptive_avg_pool2d(features[0], self.roi_heads.box_roi_pool.output_size)
        windows = windows.repeat_interleave(self.rpn.post_nms_top_n(), 0)
        return self.rpn.head(features), self.roi_heads.box_predictor(self.roi_heads.box_head(windows))


def unboxed(model: nn.Module) -> nn.Module:
    """Return a view of a detector that runs its layers alone; any other network as it is.

    >>> unboxed(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    # by name, so that torchvision's detectors are loaded only by those who build one
    return Unboxed(model) if type(model).__module__.startswith("torchvision.models.detection") else model
