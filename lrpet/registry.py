"""The methods and the networks as plain data: a new method is one row here and one file in ``methods/``."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["METHODS", "MODELS", "SMALLEST", "MethodRow"]


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
PROJECTION = {
    "bn_rectification": True,
    "residual": 0.0,
    "row_eps": 1e-5,
    "projection_interval": 1,
    "projection_unit": "epoch",
}
PRETRAINING = {"pretrain_epochs": None, "finetune_learning_rate": None}
TRP = {"layers": None, "energy_threshold": 0.02, "nuclear_norm": 0.0003}
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

MODELS = (
    *("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("vgg16", "googlenet", "plain20", "ghost_resnet56", "vit"),
    *("resnet18", "resnet34", "resnet50"),
)  # the networks that build_model knows
SMALLEST = {"vgg16": 32, "vit": 32}  # pixels that a network needs
