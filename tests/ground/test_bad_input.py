"""Bad input: a table of mistakes made by hand, and properties that hold for any input. Each is refused in words before training starts."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lrpet import (
    LowRankProjector,
    RunConfig,
    build_model,
    cost,
    factorize,
    project,
    ranks_for_budget,
    ranks_from_ratio,
    run,
)
from lrpet.data.cache import DataError
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile, select
from lrpet.lowrank.ranks import rank_from_ratio, resolve_ranks
from lrpet.parameters import config_from_parameters

NAN, INF, M = math.nan, math.inf, torch.eye(4)
LIST = "ranks must be a list of whole numbers or a map of layer names to them"
WHOLE = "list of whole numbers"


def net():
    """One convolution of 8×27 with a BatchNorm, and a Linear layer of 2×8, for images of 3×3×3."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))


# ---------------------------------------------------------------- the table: what is done with the input, the input, words of the refusal

CONFIG = [
    # wrong types
    *(
        ({field: value}, f"{field} must be str", repr(value))
        for field in ("dataset", "model", "method", "profile")
        for value in (None, 3, ["x"])
    ),
    *(
        ({field: value}, f"{field} must be str", repr(value))
        for field in ("precision", "recipe")
        for value in (None, 16, {"a": 1})
    ),
    *(
        ({field: value}, f"{field} must be int", repr(value))
        for field in ("epochs", "batch_size", "seed")
        for value in ("1", 1.0, None, True, [1])
    ),
    ({"epochs": np.int64(3)}, "epochs must be int", "int64"),
    *(
        ({field: value}, f"{field} must be float", repr(value))
        for field in ("learning_rate", "momentum", "weight_decay", "validation_fraction")
        for value in ("0.1", None, False, (0.1,))
    ),
    ({"learning_rate": "1e-4"}, "learning_rate must be float; got str '1e-4'", "write 0.0001"),
    ({"learning_rate": torch.tensor(0.1)}, "learning_rate must be float; got Tensor"),
    ({"prune_ratio": "0.57"}, "prune_ratio must be float; got str '0.57'"),
    ({"prune_ratio": [0.5]}, "prune_ratio must be float; got list [0.5]"),
    ({"residual": "0"}, "residual must be float; got str '0'"),
    ({"row_eps": "1e-5"}, "row_eps must be float; got str '1e-5'", "write 0.0001"),
    ({"bn_rectification": 1}, "bn_rectification must be bool; got int 1"),
    ({"bn_rectification": "yes"}, "bn_rectification must be bool; got str 'yes'"),
    ({"projection_interval": 1.0}, "projection_interval must be int; got float 1.0"),
    ({"projection_unit": 1}, "projection_unit must be str; got int 1"),
    ({"image_size": "8"}, "image_size must be int; got str '8'"),
    ({"layers": ["conv"]}, "layers must be str; got list ['conv']"),
    ({"milestones": 10}, f"milestones must be a {WHOLE}; got 10"),
    ({"milestones": [1.5]}, f"milestones must be a {WHOLE}; got [1.5]"),
    ({"milestones": ["10"]}, f"milestones must be a {WHOLE}; got ['10']"),
    ({"ranks": 6}, f"{LIST}; got 6"),
    ({"ranks": "6,6"}, f"{LIST}; got '6,6'"),
    ({"ranks": [[6]]}, f"{LIST}; got [[6]]"),
    ({"ranks": {"conv": 2.0}}, f"{LIST}; got {{'conv': 2.0}}"),
    ({"ranks": {0: 2}}, f"{LIST}; got {{0: 2}}"),
    ({"ranks": np.array([1, 2])}, f"{LIST}; got array([1, 2])"),
    # unknown names
    ({"dataset": "mnist"}, "dataset must be one of digits, cifar10, imagefolder; got 'mnist'"),
    ({"dataset": "CIFAR10"}, "dataset must be one of digits, cifar10, imagefolder; got 'CIFAR10'"),
    ({"model": "resnet21"}, "model must be one of resnet8, ", "got 'resnet21'"),
    ({"model": ""}, "model must be one of resnet8, ", "got ''"),
    ({"method": "LRPET"}, "method must be one of dense, lrp, lrpet", "got 'LRPET'"),
    ({"method": "svd"}, "method must be one of dense, lrp, lrpet", "got 'svd'"),
    ({"recipe": "adam"}, "recipe must be one of sgd, adamw", "got 'adam'"),
    ({"precision": "fp16"}, "precision must be one of fp32, tf32, bf16; got 'fp16'"),
    (
        {"profile": "big"},
        "profile must be one of smoke, short, scaled, selection, paper, imagenette, imagenet; got 'big'",
    ),
    ({"projection_unit": "epochs"}, "projection_unit must be one of epoch, iteration; got 'epochs'"),
    # out of range
    *(
        ({"prune_ratio": value}, "prune_ratio must be at least 0 and below 1", repr(float(value)))
        for value in (-0.01, 1, 1.0, 57)
    ),
    *(({"epochs": value}, "epochs must be between 1 and 100000", repr(value)) for value in (0, -1, 100_001)),
    *(
        ({"batch_size": value}, "batch_size must be between 1 and 1000000", repr(value))
        for value in (0, -64, 10**7)
    ),
    *(
        ({"seed": value}, "seed must be between 0 and 2147483647", repr(value))
        for value in (-1, 2**31, 10**30)
    ),
    *(
        ({"learning_rate": value}, "learning_rate must be between 0 and 100", repr(value))
        for value in (-0.1, 100.5)
    ),
    *(({"momentum": value}, "momentum must be between 0 and 0.9999", repr(value)) for value in (-0.9, 1.0)),
    *(
        ({"weight_decay": value}, "weight_decay must be between 0 and 1", repr(value))
        for value in (-0.0001, 1.5)
    ),
    *(
        ({"validation_fraction": value}, "validation_fraction must be between 0 and 0.9", repr(value))
        for value in (-0.1, 0.95)
    ),
    *(({"residual": value}, "residual must be between 0 and 1", repr(value)) for value in (-0.1, 1.1)),
    *(({"row_eps": value}, "row_eps must be between 0 and 1", repr(value)) for value in (-1e-5, 2.0)),
    *(
        ({"projection_interval": value}, "projection_interval must be between 1 and 1000000", repr(value))
        for value in (0, -250)
    ),
    *(
        ({field: value}, f"{field} must be finite", repr(value))
        for field in ("learning_rate", "prune_ratio", "row_eps")
        for value in (NAN, INF)
    ),
    ({"weight_decay": 10**400}, "weight_decay must be finite"),
    *(
        (
            {"dataset": "imagefolder", "image_size": value},
            "image_size must be between 4 and 1024",
            repr(value),
        )
        for value in (0, 3, 2000)
    ),
    *(
        ({"ranks": value}, "ranks must be one or more ranks of at least 1", repr(value))
        for value in ((), {}, (6, 0), {"conv": -6})
    ),
    # contradictory
    *(
        ({"milestones": value}, "milestones must be rising epochs between 1 and 19", repr(value))
        for value in ((15, 10), (10, 10), (0,), (10, 20))
    ),
    (
        {"epochs": 5},
        "milestones must be rising epochs between 1 and 4",
        "shorten them together with epochs",
        "(10, 15)",
    ),
    (
        {"ranks": [3], "prune_ratio": 0.5},
        "prune_ratio must be null when ranks are given; drop one of the two; got 0.5",
    ),
    ({"ranks": [3], "layers": "*"}, "layers must be null when ranks are given", "got '*'"),
    (
        {"dataset": "digits", "image_size": 32},
        "image_size must be 8 for digits; another size needs dataset='imagefolder'; got 32",
    ),
    ({"dataset": "cifar10", "image_size": 224}, "image_size must be 32 for cifar10", "got 224"),
    ({"model": "vgg16"}, "image_size must be 32 or more for vgg16; take another model or dataset; got 8"),
    (
        {"model": "vit", "dataset": "imagefolder", "image_size": 16},
        "image_size must be 32 or more for vit",
        "got 16",
    ),
]

FROM_DICT = [
    ({"prune_ration": 0.7}, "'prune_ration' is not a field of RunConfig; did you mean 'prune_ratio'?"),
    ({"lr_rate": 0.1}, "'lr_rate' is not a field", "did you mean 'learning_rate'?"),
    ({"xyz": 1}, "'xyz' is not a field", "fields are dataset, "),
    ({3: 1}, "3 is not a field", "fields are dataset, "),
    (["seed"], "a configuration must be a map of fields to values", "got ['seed']"),
    (None, "a configuration must be a map", "got None"),
]

PARAMETERS = [
    ({"seed": "1"}, "seed must be int; got str '1'"),
    (
        {"In": ["# Parameters\nprune_ration = 0.7"]},
        "'prune_ration' is not a parameter of this notebook; did you mean 'prune_ratio'?",
    ),
    ({"In": ["# Parameters\nrank = 3"]}, "'rank' is not a parameter of this notebook; did you mean 'ranks'?"),
]

PROJECT = [  # matrix, rank, options
    (([[1.0]], 1, {}), "matrix must be a floating-point tensor, (..., N, D); got list"),
    ((np.eye(3), 1, {}), "matrix must be a floating-point tensor", "got ndarray", "torch.as_tensor"),
    ((None, 1, {}), "matrix must be a floating-point tensor", "got NoneType"),
    ((torch.eye(3).int(), 1, {}), "matrix must be floating point", "torch.int32, (3, 3)"),
    ((torch.eye(3).bool(), 1, {}), "matrix must be floating point", "torch.bool"),
    ((torch.eye(3).cfloat(), 1, {}), "matrix must be floating point", "torch.complex64"),
    ((torch.ones(3), 1, {}), "(..., N, D)", "(3,)"),
    ((torch.tensor(1.0), 1, {}), "(..., N, D)", "()"),
    ((torch.ones(0, 3), 1, {}), "0×3", "got 1"),
    ((torch.ones(3, 0), 1, {}), "3×0", "got 1"),
    *(
        ((M, rank, {}), "rank must be an integer from 1 to 4", repr(rank))
        for rank in (0, 5, -1, 1.0, True, "1", None, torch.tensor(1), [1])
    ),
    *(((M * value, 1, {}), "matrix holds NaN or infinite values") for value in (NAN, INF, -INF)),
    (
        (torch.full((4, 4), 1e300, dtype=torch.float64), 1, {}),
        "matrix holds NaN or infinite values, or overflows when squared",
    ),
    *(
        ((M, 1, {"residual": value}), "residual", "0 to 1", repr(value))
        for value in (-0.1, 1.1, NAN, "0", None, True, [0.5])
    ),
    *(
        ((M, 1, {"row_eps": value}), "row_eps must be 0 (exact inverse) or positive", repr(value))
        for value in (-1.0, NAN, INF, "1e-5", None)
    ),
    *(
        ((M, 1, {"energy_transfer": value}), "energy_transfer must be True or False", repr(value))
        for value in ("no", None, 1)
    ),
    *(
        ((M, 1, {"row_scale": value}), "row_scale must be a floating-point tensor")
        for value in ([1.0] * 4, 2.0, torch.ones(4).int())
    ),
    *(
        ((M, 1, {"row_scale": torch.ones(shape)}), "row_scale must have a value a row, (4,)", str(shape))
        for shape in ((3,), (4, 1), (1, 4))
    ),
    (
        (M, 1, {"row_scale": torch.full((4,), NAN)}),
        "row_scale holds NaN or infinite values; look at the BatchNorm",
    ),
]

RANKS = [
    *((value, LIST, repr(value)) for value in (None, 5, "8", {2})),
    ([], "ranks has 0 entries, but the model has 1"),
    ([2, 2], "ranks has 2 entries, but the model has 1"),
    *(
        ([value], "rank of layer '0' must be an integer from 1 to 8", repr(value))
        for value in (0, 9, 2.0, True, None, "2", [2])
    ),
    ({"conv": 2}, "'conv' that the model does not have; it has 0, 3"),
    ({0: 2}, "0 that the model does not have; it has 0, 3"),
    ({"1": 2}, "layer '1' (BatchNorm2d) cannot be made low-rank; only Conv2d with one group and Linear"),
    ({"3": 3}, "rank of layer '3' must be an integer from 1 to 2; got 3"),
]

CALLS = {
    "ranks of a name": (
        lambda: resolve_ranks("resnet20", [2]),
        "model must be a torch.nn.Module; got str 'resnet20'",
        "build_model",
    ),
    "ratio of a name": (
        lambda: ranks_from_ratio("resnet20", 0.5),
        "model must be a torch.nn.Module; got str 'resnet20'",
    ),
    "ratio None": (lambda: ranks_from_ratio(net(), None), "prune_ratio", "0 ≤ ratio < 1", "got None"),
    "ratio 1": (lambda: ranks_from_ratio(net(), 1), "prune_ratio", "0 ≤ ratio < 1", "got 1"),
    "ratio NaN": (lambda: rank_from_ratio(16, NAN), "prune_ratio", "got nan"),
    "K 0": (lambda: rank_from_ratio(0, 0.5), "K is the number of singular values", "got 0"),
    "K text": (lambda: rank_from_ratio("16", 0.5), "K is the number of singular values", "got '16'"),
    "layers a number": (
        lambda: ranks_from_ratio(net(), 0.5, layers=3),
        "layers must be null or a pattern",
        "got 3",
    ),
    "layers that are not there": (
        lambda: ranks_from_ratio(net(), 0.5, layers="x*"),
        "no layer to compress",
        "layers='x*'",
    ),
    "no layers": (lambda: ranks_from_ratio(nn.ReLU(), 0.5), "ReLU has no layer to compress"),
    "projector of a name": (
        lambda: LowRankProjector("resnet20", {"0": 2}),
        "model must be a torch.nn.Module",
    ),
    "projector without ranks": (lambda: LowRankProjector(net(), None), LIST, "got None"),
    "projector, energy transfer": (
        lambda: LowRankProjector(net(), [2], energy_transfer="no"),
        "energy_transfer must be True or False; got 'no'",
    ),
    "projector, rectification": (
        lambda: LowRankProjector(net(), [2], bn_rectification="no"),
        "bn_rectification must be True or False; got 'no'",
    ),
    "projector, residual": (lambda: LowRankProjector(net(), [2], residual=2), "residual", "0 to 1", "got 2"),
    "projector, another BatchNorm": (
        lambda: LowRankProjector(net(), [2], batchnorms={"0": "9"}),
        "layer '0' is paired with BatchNorm '9'",
        "feeds '1'",
    ),
    "projector, list of BatchNorms": (
        lambda: LowRankProjector(net(), [2], batchnorms=["1"]),
        "batchnorms says nothing about layer '0'",
    ),
    "factorize nothing": (lambda: factorize(None, [2]), "model must be a torch.nn.Module; got NoneType None"),
    "factorize without ranks": (lambda: factorize(net(), None), LIST, "got None"),
    "factorize a text": (lambda: factorize(net(), "2"), LIST, "got '2'"),
    "cost of a number": (lambda: cost(5, (3, 3, 3)), "model must be a torch.nn.Module; got int 5"),
    "cost, empty list": (lambda: cost(net(), (3, 3, 3), []), "ranks has 0 entries, but the model has 1"),
    "cost, unknown layer": (lambda: cost(net(), (3, 3, 3), {"x": 1}), "'x' that the model does not have"),
    **{
        f"cost of {shape!r}": (
            lambda shape=shape: cost(net(), shape),
            "input_shape must be (C, H, W)",
            f"got {shape!r}",
        )
        for shape in (3, (3, 32), "abc", (3, -1, 3), (4, 3, 3), (3, 1, 1), (3, 9, 9), (3, 3.0, 3))
    },
    **{
        f"network {name!r}": (
            lambda name=name: build_model(name),
            "model must be one of resnet8, ",
            f"got {name!r}",
        )
        for name in ("resnet9", "ResNet20", None, "")
    },
    **{
        f"{number!r} classes": (
            lambda number=number: build_model("resnet8", number),
            "num_classes must be a whole number of 1 or more",
            f"got {number!r}",
        )
        for number in (0, -1, 10.0, "10", True, None)
    },
    **{
        f"budget {value!r}": (
            lambda value=value: ranks_for_budget(net(), (3, 3, 3), value),
            "macs_reduction is the share",
            f"got {value!r}",
        )
        for value in (0.0, 1.0, -0.5, NAN, "0.5", None, True)
    },
    "budget too small": (
        lambda: ranks_for_budget(net(), (3, 3, 3), 0.99),
        "macs_reduction 0.99 cannot be met: rank 1 in every layer saves 0.780",
    ),
    "allocation": (
        lambda: ranks_for_budget(net(), (3, 3, 3), 0.5, allocation="even"),
        "allocation must be 'uniform' or 'energy'; got 'even'",
    ),
    "profile": (lambda: load_profile("big"), "profile must be one of", "smoke, short", "got 'big'"),
    "profile, list": (lambda: load_profile(["smoke"]), "profile must be one of", "got ['smoke']"),
    "no such experiment": (
        lambda: select(load_profile("smoke"), ["x*"]),
        "no experiment of profile 'smoke' is called 'x*'; it has resnet8-dense-s1",
    ),
}

RUN = [  # fields of the configuration, arguments of run()
    (
        ({"ranks": {"nolayer": 3}}, {}),
        "ranks names a layer 'nolayer' that the model does not have; it has conv, ",
    ),
    (({"ranks": {"conv": 300}}, {}), "rank of layer 'conv' must be an integer from 1 to 16; got 300"),
    (({"ranks": [3, 3]}, {}), "ranks has 2 entries, but the model has 7"),
    (({"layers": "nothing*"}, {}), "no layer to compress", "layers='nothing*'"),
    (
        ({"validation_fraction": 1e-9}, {}),
        "validation_fraction 1e-09 of 1297 training images leaves one side empty; choose another",
    ),
    (({"precision": "tf32"}, {}), "precision 'tf32' exists on CUDA GPUs only; use 'fp32' or 'bf16'"),
    (({"dataset": "imagefolder", "model": "resnet18"}, {}), "needs a folder", "--data or LRPET_DATA"),
    (
        ({"dataset": "imagefolder", "model": "resnet18"}, {"data": "no such folder"}),
        "no such folder is no folder",
        "give another --data",
    ),
    (({"dataset": "imagefolder", "model": "resnet18"}, {"data": __file__}), "test_bad_input.py is no folder"),
    (
        ({"dataset": "cifar10"}, {"data": os.path.dirname(__file__)}),
        "holds neither train/ nor cifar-10-batches-py/",
    ),
    *(
        (({}, {name: value}), f"{name} must be", f"got {value!r}")
        for name, values in {
            "data": (5, ["a"]),
            "device": (3, None, "gpu", "meta", "cuda:x"),
            "results": (5, ["a"]),
            "checkpoint_epochs": (0, -1, 1.0, "1", True, None),
            "time_budget": ("60", -1, NAN, True),
            "progress": (None, "line", 1),
            "on_epoch": (3, "print"),
            "deterministic": (1, None, "yes"),
            "device_batch": (0, -1, 2.0, "8", True),
        }.items()
        for value in values
    ),
]

GOOD_YAML = """
smoke:
  note: a note
  cost: nothing
  settings: {epochs: 2, milestones: [1]}
  seeds: [1, 2]
  experiments:
    a: {feeds: x, method: dense}
    b: {feeds: x, method: lrp, seeds: [2]}
"""
BODY = GOOD_YAML[GOOD_YAML.index("  experiments:") :]
A, S, SEEDS, NO_MAP = (
    "a: {feeds: x, method: dense}",
    "settings: {epochs: 2, milestones: [1]}",
    "seeds: [1, 2]",
    "profile 'smoke' must be a map",
)
NOT_YAML, NO_PROFILE, NAME = (
    "is not valid YAML",
    "profile must be one of those in",
    "the name of an experiment of profile 'smoke' must be letters",
)
YAML = [  # what is replaced, by what
    (("smoke:", "smoke: ["), NOT_YAML),
    (("smoke:", "\tsmoke:"), NOT_YAML),
    (("smoke:", "smoke: &a [*a]\ny:"), NO_MAP),
    (("smoke:", "- smoke:"), NO_PROFILE, "(none)", "got 'smoke'"),
    (("smoke:", "3:"), NO_PROFILE, "(3)"),
    (("smoke:", "null:"), NO_PROFILE, "(None)"),
    (("smoke:", "short:"), NO_PROFILE, "(short)", "got 'smoke'"),
    ((GOOD_YAML, ""), NO_PROFILE, "(none)"),
    ((GOOD_YAML, "[1, 2]"), NO_PROFILE, "(none)"),
    ((GOOD_YAML, "[1, 2"), NOT_YAML),
    ((GOOD_YAML, "\x00"), NOT_YAML),
    ((GOOD_YAML, "a: 1\n---\nb: 2"), NOT_YAML, "single document"),
    ((GOOD_YAML, "%YAML 9.9\n---\nsmoke:"), NOT_YAML),
    ((GOOD_YAML, "smoke: 3"), NO_MAP, "got 3"),
    ((GOOD_YAML, "smoke: text"), NO_MAP, "got 'text'"),
    ((GOOD_YAML, "smoke:"), "lacks the entry 'cost'; needed are note, cost"),
    (
        (GOOD_YAML, "smoke: !!python/object/apply:os.system ['true']"),
        NOT_YAML,
        "could not determine a constructor",
    ),
    ((GOOD_YAML, "smoke: !!python/name:os.system"), NOT_YAML, "could not determine a constructor"),
    (("cost: nothing", "cost: nothing\n  cost: much"), "'cost' stands twice", "rename one"),
    (("b: {feeds", "a: {feeds"), "'a' stands twice", "rename one"),
    (("method: lrp,", "method: lrp, method: lrpet,"), "'method' stands twice"),
    (("cost: nothing", "price: nothing"), "unknown entry 'price'; allowed are note, cost"),
    (("  cost: nothing\n", ""), "lacks the entry 'cost'"),
    (("note: a note", "note: 3"), "note of profile 'smoke' must be a text; got 3"),
    (("note: a note", "note:"), "note of profile 'smoke' must be a text; got None"),
    (("cost: nothing", "cost: {}"), "cost of profile 'smoke' must be a text; got {}"),
    *(
        ((S, f"settings: {value}"), "settings of profile 'smoke' must be a map, as {epochs: 2}")
        for value in ("", "[]", "3", "text")
    ),
    *(
        ((SEEDS, f"seeds: {value}"), "seeds of experiment 'a'", "must be a list of different whole")
        for value in ("", "3", "[]", "[1, 1]", "'12'", "{1: 2}")
    ),
    (
        (SEEDS, "seeds: [-1]"),
        "experiment 'a' of profile 'smoke': seed must be between 0 and 2147483647; got -1",
    ),
    ((SEEDS, "seeds: [1.0]"), "experiment 'a' of profile 'smoke': seed must be int; got float 1.0"),
    ((SEEDS, "seeds: [[1]]"), "experiment 'a' of profile 'smoke': seed must be int; got list [1]"),
    *(
        ((A, f"a: {value}"), "experiment 'a' of profile 'smoke' must be a map")
        for value in ("", "3", "[1]", "text")
    ),
    *(
        ((A, f"a: {{method: dense{value}}}"), "feeds of experiment 'a' of profile 'smoke' must be the name")
        for value in ("", ", feeds: 3", ", feeds:")
    ),
    *(((A, f"{name}: {{feeds: x}}"), NAME) for name in ("1", "null", "''", "'a b'", "a/b", "'../a'", "-a")),
    ((A, "? [1]\n    : {feeds: x}"), NOT_YAML),
    (("seeds: [2]", "seed: 2"), "experiment 'b' of profile 'smoke' must not set seed; got 2"),
    (("seeds: [2]", "profile: paper"), "experiment 'b' of profile 'smoke' must not set profile; got 'paper'"),
    *(
        ((BODY, f"  experiments: {value}"), "experiments of profile 'smoke' must be a map of names")
        for value in ("", "[a]", "{}", "a")
    ),
    (("epochs: 2", "epochs: '2'"), "experiment 'a' of profile 'smoke': epochs must be int; got str '2'"),
    (
        ("epochs: 2", "weight_decay: 1e-4"),
        "experiment 'a' of profile 'smoke': weight_decay must be float; got str '1e-4'",
        "write 0.0001",
    ),
    (
        ("epochs: 2", "epoch: 2"),
        "experiment 'a' of profile 'smoke': 'epoch' is not a field of RunConfig; did you mean 'epochs'?",
    ),
    (
        ("epochs: 2", "ranks: {a: 1}, prune_ratio: 0.5"),
        "experiment 'b' of profile 'smoke': prune_ratio must be null when ranks are given",
        "got 0.5",
    ),
]


def _yaml(replaced, folder):
    old, new = replaced
    assert old in GOOD_YAML
    (folder / "experiments.yaml").write_text(GOOD_YAML.replace(old, new), encoding="utf-8")
    return load_profile("smoke", folder / "experiments.yaml")


DO = {
    "RunConfig": (CONFIG, lambda fields, _: RunConfig(**fields)),
    "from_dict": (FROM_DICT, lambda values, _: RunConfig.from_dict(values)),
    "parameters": (PARAMETERS, lambda namespace, _: config_from_parameters(namespace)),
    "project": (PROJECT, lambda given, _: project(given[0], given[1], **given[2])),
    "ranks": (RANKS, lambda ranks, _: resolve_ranks(net(), ranks)),
    "call": (list(CALLS.values()), lambda call, _: call()),
    "run": (
        RUN,
        lambda given, folder: run(
            RunConfig(**{**TINY, **given[0]}),
            **{"results": folder, "device": "cpu", "progress": "off"} | given[1],
        ),
    ),
    "experiments.yaml": (YAML, _yaml),
}
TABLE = [(what, i) for what, (rows, _) in DO.items() for i in range(len(rows))]


def test_the_table_is_long_enough():
    assert len(TABLE) >= 200


@pytest.mark.parametrize(("what", "row"), TABLE, ids=[f"{what}-{row}" for what, row in TABLE])
def test_bad_input_is_refused_in_words_before_any_training(what, row, tmp_path, monkeypatch):
    monkeypatch.setattr(
        import_module("lrpet.runs.run"), "train", lambda *_, **__: pytest.fail("training began")
    )
    rows, do = DO[what]
    given, *words = rows[row]
    with pytest.raises(ValueError) as caught:
        do(given, tmp_path)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert type(caught.value) in (
        ValueError,
        DataError,
    )  # not a UnicodeError or the like that happens to be one
    assert not list(tmp_path.glob("**/checkpoint.*"))


# ---------------------------------------------------------------- images

FOLDER = RunConfig(dataset="imagefolder", image_size=16, model="resnet18")


def picture(path, mode="RGB", size=(20, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 30)).convert(mode).save(path, **options)


def tree(root):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(root / split / name / "0.png")
    return root


def empty_file(path):
    path.write_bytes(b"")


TREES = {
    "empty tree": (
        lambda r: shutil.rmtree(r / "train") or shutil.rmtree(r / "test"),
        "has a class without images, or no class",
    ),
    "empty splits": (
        lambda r: [shutil.rmtree(f) for f in r.glob("*/*")],
        "has a class without images, or no class",
    ),
    "no images in a class": (lambda r: (r / "train/cat/0.png").unlink(), "cat", "remove the empty folder"),
    "one class": (
        lambda r: [shutil.rmtree(f) for f in r.glob("*/dog")],
        "has one class, 'cat'",
        "at least two",
    ),
    "other classes in the test part": (
        lambda r: (r / "test/dog").rename(r / "test/emu"),
        "different classes",
        "'dog'",
        "unpack it again",
    ),
    "train alone": (lambda r: shutil.rmtree(r / "test"), "must hold train/ and test/ (or val/)"),
    "test alone": (lambda r: shutil.rmtree(r / "train"), "must hold train/ and test/ (or val/)"),
    "no image": (
        lambda r: (r / "train/cat/0.png").write_bytes(b"text"),
        "train/cat/0.png cannot be decoded",
        "replace or remove it",
    ),
    "no bytes": (
        lambda r: empty_file(r / "test/dog/0.png"),
        "test/dog/0.png cannot be decoded",
        "replace or remove it",
    ),
    "a folder named as an image": (
        lambda r: (r / "train/cat/1.png").mkdir() or (r / "train/cat/0.png").unlink(),
        "cat",
    ),
    "a link to nowhere": (
        lambda r: (r / "train/cat/1.png").symlink_to("nowhere"),
        "1.png",
        "must be a folder of images that can be read",
    ),
    "a link to itself": (
        lambda r: (r / "train/cat/1.png").symlink_to("1.png"),
        "1.png",
        "must be a folder of images that can be read",
    ),
    "half an image": (
        lambda r: (f := r / "train/cat/0.png").write_bytes(f.read_bytes()[:60]),
        "train/cat/0.png cannot be decoded",
    ),
    "an image of no pixels": (
        lambda r: (r / "train/cat/0.png").write_bytes(png(0, 0)),
        "train/cat/0.png cannot be decoded",
    ),
    "an image of a billion pixels": (
        lambda r: (r / "train/cat/0.png").write_bytes(png(40_000, 40_000)),
        "train/cat/0.png cannot be decoded",
    ),
}


def png(width, height):
    """A PNG file that claims a size."""
    chunk = lambda kind, data: (
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    )
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("damage", "words"), [(damage, words) for damage, *words in TREES.values()], ids=TREES
)
def test_bad_trees_of_images_are_refused_with_the_place(tmp_path, damage, words):
    root = tree(tmp_path / "images")
    damage(root)
    with pytest.raises(DataError) as caught:
        load_data(FOLDER, root)
    assert str(root) in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


ODD = {
    "grayscale": ("L", "png"),
    "RGBA": ("RGBA", "png"),
    "gray with alpha": ("LA", "png"),
    "CMYK": ("CMYK", "jpg"),
    "palette": ("P", "png"),
}
ODD |= {"black and white": ("1", "png"), "16 bits": ("I;16", "png"), "floats": ("F", "tiff")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("mode", "kind"), ODD.values(), ids=ODD)
def test_images_of_any_mode_are_read_as_colors(tmp_path, mode, kind):
    root = tree(tmp_path)
    path = root / "train" / "cat" / f"1.{kind}"
    gray = Image.new("L", (20, 24), 200)
    (gray if mode in ("L", "LA", "1", "I;16", "F") else Image.new("RGB", (20, 24), (200, 10, 30))).convert(
        mode
    ).save(path)
    if mode == "P":  # with a transparent color, of which Pillow warns
        Image.new("P", (20, 24)).save(path, transparency=b"\x00\xff")
    images = load_data(FOLDER, root)
    assert images.train_images.shape == (3, 18, 18, 3)
    if mode in ("L", "LA"):
        assert (images.train_images[1] == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_images_of_one_pixel_are_enlarged(tmp_path, size):
    root = tree(tmp_path)
    picture(root / "train" / "cat" / "1.png", size=size)
    assert (load_data(FOLDER, root).train_images[1] == torch.tensor([200, 10, 30])).all()


AS_NOBODY = """
import os, sys
from lrpet import RunConfig
from lrpet.data.sets import load_data
from lrpet.runs import run
import torchvision.datasets, PIL.Image, sklearn.datasets
os.seteuid(65534)
for folder in sys.argv[2:]:
    try:
        load_data(RunConfig(dataset="imagefolder", image_size=16), folder)
    except ValueError as error:
        print(error)
try:
    run(RunConfig(), results=sys.argv[1], device="cpu", progress="off")
except ValueError as error:
    print(error)
"""
CLOSED = {  # what is closed to others, words of the refusal
    "train": "must be a folder of images that can be read; got: [Errno 13]",
    "": "must be a folder of images that can be read; got: [Errno 13]",
    "train/cat": "has a class without images, or no class: Found no valid file for the classes cat",
    "train/cat/0.png": "train/cat/0.png cannot be decoded ([Errno 13] Permission denied",
}


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0,
    reason="only root can become nobody, whom a closed folder keeps out",
)
def test_folders_that_may_not_be_read_or_written_are_named():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o755)
        roots = [tree(Path(folder) / f"images{i}") for i in range(len(CLOSED))]
        for root, closed in zip(roots, CLOSED, strict=True):
            (root / closed).chmod(0)
        (Path(folder) / "cache").mkdir()
        (Path(folder) / "cache").chmod(0o777)
        environment = {**os.environ, "LRPET_CACHE": f"{folder}/cache"}
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, folder, *roots], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    *read, written = done.stdout.splitlines()
    for line, root, words in zip(read, roots, CLOSED.values(), strict=True):
        assert line.startswith(str(root)) and words in line
    assert (
        written.startswith(f"results must be a folder that can be written; got {folder}")
        and "LRPET_RESULTS" in written
    )


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRPET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        DataError,
        match=r"cache of decoded images must be a folder that can be written; got .*file/cache: .*set LRPET_CACHE",
    ):
        load_data(FOLDER, tree(tmp_path / "images"))


# ---------------------------------------------------------------- any input

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["digits", "lrp", "dense", "epoch", "resnet20"])
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.integers(), SCALARS, max_size=3)
)
FIELDS = list(RunConfig.__dataclass_fields__)
quick = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quick
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_fields_make_a_configuration_that_comes_back_or_are_refused_by_name(fields):
    try:
        config = RunConfig.from_dict(fields)
    except ValueError as error:
        assert type(error) is ValueError
        assert str(error).startswith(tuple(f"{field} must be " for field in FIELDS))
        return
    assert RunConfig.from_dict(config.to_dict()) == config
    assert hash(RunConfig.from_dict(config.to_dict())) == hash(config)
    assert config.folder(Path("x")).name == config.run_id


@quick
@given(
    VALUES
    | st.dictionaries(st.sampled_from(["0", "1", "3"]), st.integers(-1, 9))
    | st.lists(st.integers(-1, 9), max_size=2)
)
def test_any_ranks_fit_the_network_or_are_refused(ranks):
    try:
        resolved = resolve_ranks(net(), ranks)
    except ValueError as error:
        assert "rank" in str(error) or "layer" in str(error)
        return
    assert all(type(rank) is int and 1 <= rank <= {"0": 8, "3": 2}[name] for name, rank in resolved.items())


NUMBERS = st.floats(width=32, allow_subnormal=True) | st.floats(
    -(2.0**50), 2.0**50, width=32, allow_subnormal=True
)


@quick
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_any_matrix_is_projected_to_a_finite_one_of_its_rank_or_refused(N, D, data):
    values = data.draw(st.lists(NUMBERS, min_size=N * D, max_size=N * D))
    scale = data.draw(st.none() | st.lists(st.floats(0, 1e3, width=32), min_size=N, max_size=N))
    rank, residual = data.draw(st.integers(0, 6)), data.draw(st.floats(-0.5, 1.5) | st.just(0.0))
    M = torch.tensor(values).reshape(N, D)
    try:
        result = project(M, rank, residual=residual, row_scale=None if scale is None else torch.tensor(scale))
    except ValueError as error:
        assert not M.isfinite().all() or not 1 <= rank <= min(N, D) or not 0 <= residual <= 1, error
        return
    assert result.shape == M.shape and result.dtype == M.dtype
    if M.abs().max() <= 2.0**50:
        assert result.isfinite().all()
        if scale is None:  # energy stays; a bound in float32 for the parts that vanish beside the largest
            assert math.isclose(result.double().norm(), M.double().norm(), rel_tol=1e-4, abs_tol=1e-40)


PIECES = st.sampled_from(
    [
        "smoke",
        "note",
        "cost",
        "settings",
        "seeds",
        "experiments",
        "a",
        "feeds",
        "method",
        "dense",
        "epochs",
        "milestones",
    ]
)
NODES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PIECES | SCALARS, inner, max_size=4),
    max_leaves=12,
)


@quick
@given(st.sampled_from(["smoke", "note", "cost", "settings", "seeds", "experiments", "a", "feeds"]), NODES)
def test_any_content_of_experiments_yaml_is_a_profile_or_refused(tmp_path, place, content):
    profiles = yaml.safe_load(GOOD_YAML)
    smoke = profiles["smoke"]
    {"smoke": profiles, "a": smoke["experiments"], "feeds": smoke["experiments"]["a"]}.get(place, smoke)[
        place
    ] = content
    path = tmp_path / "experiments.yaml"
    path.write_text(yaml.safe_dump(profiles), encoding="utf-8")
    _profile_or_refusal(path)


@quick
@given(
    st.integers(0, len(GOOD_YAML)),
    st.integers(0, 8),
    st.text(max_size=4)
    | st.sampled_from(["{", "[", ": ", "\n", "- ", "&a ", "*a", "!!python/name:os.system "]),
)
def test_any_change_to_experiments_yaml_is_a_profile_or_refused(tmp_path, place, cut, text):
    path = tmp_path / "experiments.yaml"
    path.write_bytes((GOOD_YAML[:place] + text + GOOD_YAML[place + cut :]).encode("utf-8", "surrogatepass"))
    _profile_or_refusal(path)


def _profile_or_refusal(path):
    try:
        profile = load_profile("smoke", path)
    except ValueError:
        return
    names = [experiment.name for experiment in profile.experiments]
    assert len(set(names)) == len(names) > 0
    assert all(
        isinstance(experiment.feeds, str) and isinstance(experiment.config, RunConfig)
        for experiment in profile.experiments
    )
