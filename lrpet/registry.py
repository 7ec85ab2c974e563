"""Methods, tasks and networks as plain data: a new method is one row here and one file in ``methods/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "BLOCKS",
    "GRADIENT_PROJECTIONS",
    "METHODS",
    "MODELS",
    "SMALLEST",
    "TASKS",
    "GradientRow",
    "MethodRow",
    "Metric",
    "TaskRow",
    "metric_of",
]


class MethodRow(NamedTuple):
    """What the rest of the package knows of a method."""

    code: str  # module:class
    label: str  # in tables and figures
    color: str
    marker: str
    linestyle: str | tuple
    reads: dict  # fields of RunConfig that it reads besides those of training → their defaults
    pretrained_share: int | None = (
        None  # dense epochs first: epochs divided by this, unless given; None: none
    )


SIZE = {"prune_ratio": 0.57, "ranks": None, "layers": None}  # how compact the result is
SIZE |= {"dense_layers": None, "multiple_of": None}
PROJECTION = {
    "unfolding": None,
    "bn_rectification": True,
    "residual": 0.0,
    "row_eps": 1e-5,
    "column_scale": None,
    "fast_projection": None,
    "projection_interval": 1,
    "projection_unit": "epoch",
}
PRETRAINING = {"pretrain_epochs": None, "finetune_learning_rate": None}
TRP = {"layers": None, "dense_layers": None, "energy_threshold": 0.02, "nuclear_norm": 0.0003}
TRP |= {"projection_interval": 20, "projection_unit": "iteration"}

# Colours: Okabe and Ito's, then three that are as far from them and from each other as possible for each kind
# of colour blindness. Marker and line tell the methods apart in grayscale too.
METHODS = {
    "dense": MethodRow("lrpet.methods.base:Method", "dense", "#222222", "s", "-", {}),
    "lrp": MethodRow(
        "lrpet.methods.lrpet:LowRankProjection",
        *("LRP", "#D55E00", "^", "--"),
        SIZE | PROJECTION | PRETRAINING | {"matched_steps": None},
    ),
    "lrpet": MethodRow(
        "lrpet.methods.lrpet:LowRankProjection", "LRPET", "#0072B2", "o", "-", SIZE | PROJECTION | PRETRAINING
    ),
    "svd_finetune": MethodRow(
        "lrpet.methods.factors:Factorized",
        *("SVD, then fine-tuned", "#009E73", "D", "-."),
        SIZE | PRETRAINING,
        pretrained_share=2,
    ),
    "factorized": MethodRow(
        "lrpet.methods.factors:Factorized",
        *("trained as factors", "#CC79A7", "v", ":"),
        SIZE | {"product_decay": True},
    ),
    "trp": MethodRow("lrpet.methods.trp:TrainedRankPruning", "TRP", "#E69F00", "P", (0, (5, 1)), TRP),
    "warmup_switch": MethodRow(
        "lrpet.methods.factors:Factorized",
        *("dense, then factors", "#56B4E9", "X", (0, (3, 1, 1, 1))),
        SIZE | {"pretrain_epochs": None, "rank_rule": "given"},
        pretrained_share=4,
    ),
    "svd_training": MethodRow(
        "lrpet.methods.factors:SVDTraining",
        *("SVD training", "#AA55FF", "<", (0, (1, 1))),
        SIZE | PRETRAINING | {"orthogonality": 1.0, "sparsity": 0.01},
        pretrained_share=2,
    ),
    "filter_pruning": MethodRow(
        "lrpet.methods.filter_pruning:FilterPruning",
        *("filter pruning", "#1515AA", ">", (0, (5, 1, 1, 1, 1, 1))),
        SIZE | PRETRAINING,
        pretrained_share=2,
    ),
    "narrow": MethodRow("lrpet.methods.base:Method", "narrow network", "#6A2A00", "d", (0, (8, 2)), SIZE),
}

IMAGE_MODELS = (
    *("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("vgg16", "googlenet", "plain20", "ghost_resnet56", "vit", "vit_small"),
    *("resnet18", "resnet34", "resnet50"),
)
DETECTORS = (  # two small ones, then torchvision's without masks and keypoints
    *("fasterrcnn_resnet8_fpn", "fasterrcnn_resnet20_fpn"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
SEGMENTERS = ("fcn_resnet8", "fcn_resnet20", "pspnet_resnet18", "pspnet_resnet50")


class Metric(NamedTuple):
    """The number that a run of a task is scored by."""

    column: str  # in histories, summaries and tables; ``best_``, ``compact_`` … stand before it
    title: str  # on axes and in sentences
    unit: str  # "%", or empty where the title says it
    higher_is_better: bool
    digits: int = 2  # after the point

    @property
    def sign(self) -> int:
        """1 where a higher value is better, −1 where a lower one is: the best row has the largest product."""
        return 1 if self.higher_is_better else -1

    def text(self, value: float) -> str:
        """Write a value with its unit.

        >>> TASKS["classification"].metric.text(92.5)
        '92.50 %'
        """
        return f"{value:.{self.digits}f} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """What an axis says: the title and the unit."""
        return ", ".join(filter(None, [self.title, self.unit]))


class TaskRow(NamedTuple):
    """What the rest of the package knows of a task."""

    metric: Metric
    code: (
        str  # module:class of its losses and its evaluation, as :class:`lrpet.training.tasks.Classification`
    )
    datasets: tuple[str, ...]  # none: not to be run yet
    models: tuple[str, ...]


TASKS = {
    "classification": TaskRow(
        Metric("top1_pct", "top-1 accuracy", "%", higher_is_better=True),
        "lrpet.training.tasks:Classification",
        ("digits", "cifar10", "cifar100", "imagefolder"),
        IMAGE_MODELS,
    ),
    "language": TaskRow(
        Metric("bits_per_byte", "bits per byte", "", higher_is_better=False, digits=3),
        *("lrpet.training.language:Language", ("topics", "text"), ("byte_transformer",)),
    ),
    "detection": TaskRow(
        Metric("map_pct", "mAP at IoU 0.5", "%", higher_is_better=True),
        "lrpet.training.detection:Detection",
        ("voc", "coco", "digit_scenes", "cifar_scenes"),
        DETECTORS,
    ),
    "segmentation": TaskRow(
        Metric("miou_pct", "mIoU", "%", higher_is_better=True),
        "lrpet.training.segmentation:Segmentation",
        ("voc", "digit_scenes", "cifar_scenes"),
        SEGMENTERS,
    ),
}
MODELS = tuple(model for row in TASKS.values() for model in row.models)


def metric_of(table: Mapping) -> Metric:
    """Return the metric of a table of runs or epochs: of its ``task``, else the one it has a column of.

    Raises:
        ValueError: the runs are of several tasks.

    >>> metric_of({"epoch": [1], "bits_per_byte": [2.5]}).higher_is_better
    False
    """
    if "task" in table:
        named = dict.fromkeys(task for task in table["task"] if isinstance(task, str))
    else:
        named = [task for task, row in TASKS.items() if row.metric.column in table]
    if len(named) > 1:
        got = ", ".join(sorted(named))
        raise ValueError(f"runs must be of one task, else their numbers do not compare; got {got}")
    return TASKS[next(iter(named), "classification")].metric


SMALLEST = {"vgg16": 32, "vit": 32, "vit_small": 32}  # pixels that a network needs
SMALLEST |= {"pspnet_resnet18": 64, "pspnet_resnet50": 64, "ssd300_vgg16": 300}
# network → its block matrices: attention and MLP, never embeddings, norms, head or patches
BLOCKS = dict.fromkeys(("vit", "vit_small", "byte_transformer"), "blocks.*")


class GradientRow(NamedTuple):
    """What the rest of the package knows of a way to project gradients."""

    label: str  # in tables and figures
    reads: dict  # fields of RunConfig that it reads → their defaults; None: to be given


SUBSPACE = {"gradient_rank": None, "gradient_scale": 0.25, "carry": "keep"}
GRADIENT_PROJECTIONS = {
    "galore": GradientRow("GaLore", SUBSPACE | {"gradient_interval": 200}),
    "galore2": GradientRow("GaLore 2", SUBSPACE | {"gradient_interval": 200}),
    "lotus": GradientRow("Lotus", SUBSPACE | {"switch_threshold": 0.01, "check_interval": 50}),
    "vlorp": GradientRow(
        "VLoRP", {"gradient_rank": None, "gradient_scale": 1.0, "gradient_interval": 100, "grain": None}
    ),
    "random": GradientRow("random basis", SUBSPACE | {"gradient_interval": 200}),
}
