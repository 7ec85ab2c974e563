"""Bad input: a table of mistakes, and properties of any input. Each is refused before training starts."""

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
from helpers import PROFILE_YAML, TINY, refused
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

NAN, INF, M = math.nan, math.inf, torch.eye(4)
LIST, MAP = "list of whole numbers", "list of whole numbers or a map"


def net():
    """One convolution of 8×27 with a BatchNorm, and a Linear layer of 2×8, for images of 3×3×3."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))


# ---------------------------------------------------------------- the table: input, words of the refusal

FIELDS = {  # of RunConfig → what is allowed or advised, then values that are not
    "dataset": [("str", None, 3, ["x"]), ("digits, cifar10, cifar100, imagefolder", "mnist", "CIFAR10")],
    "image_size": [
        ("int", "8", 8.0),
        ("between 4 and 1024", 0, 3, 2000),
        ("8 for digits; another size needs dataset='imagefolder'", 16, 32),
    ],
    "model": [("str", None, 20, ["x"]), ("resnet8, ", "resnet21", "")],
    "method": [("str", None, 3, ["x"]), ("dense, lrp, lrpet", "LRPET", "svd")],
    "profile": [("str", None, 3, ["x"]), ("smoke, short", "big")],
    "recipe": [("str", None, 16, {"a": 1}), ("sgd, adamw", "adam")],
    "best_of_last": [
        ("int", "20", 20.0, True),
        ("between 1 and 100000", 0, -1),
        ("between 1 and 20, the epochs", 21),
    ],
    "precision": [("str", None, 32, {"a": 1}), ("fp32, tf32, bf16", "fp16")],
    "prune_ratio": [
        ("float", "0.57", [0.5], True),
        ("at least 0 and below 1", -0.01, 1, 1.0, 57),
        ("finite", NAN, INF),
    ],
    "residual": [("float", "0"), ("between 0 and 1", -0.1, 1.1), ("finite", NAN)],
    "row_eps": [("write 0.00001", "1e-5"), ("between 0 and 1", -1e-5, 2.0), ("finite", NAN, INF)],
    "bn_rectification": [("bool", 1, "yes", "false")],
    "projection_interval": [("int", 1.0, 2.0), ("between 1 and 1000000", 0, -250)],
    "projection_unit": [("str", 1), ("epoch, iteration", "epochs")],
    "layers": [("str", 3, ["conv"])],
    "epochs": [("int", "1", 1.0, None, True, [1], np.int64(3)), ("between 1 and 100000", 0, -1, 100_001)],
    "batch_size": [("int", "1", 1.0, None, True, [1]), ("between 1 and 1000000", 0, -64, 10**7)],
    "seed": [("int", "1", 1.0, None, True, [1]), ("between 0 and 2147483647", -1, 2**31, 10**30)],
    "learning_rate": [
        ("float", "0.1", None, False, (0.1,), [0.1]),
        ("YAML reads it as text: write 0.0001", "1e-4"),
        ("between 0 and 100", -0.1, 100.5, 101),
        ("finite", NAN, INF),
    ],
    "momentum": [("float", "0.1", None, False, (0.1,)), ("between 0 and 0.9999", -0.9, 1.0)],
    "weight_decay": [
        ("float", "0.1", None, False, (0.1,)),
        ("write 0.0001", "1e-4"),
        ("between 0 and 1", -0.0001, 1.5),
    ],
    "validation_fraction": [("float", "0.1", None, False, (0.1,)), ("between 0 and 0.9", -0.1, 0.95, 1.0)],
    "milestones": [
        (LIST, 10, "10", [1.5], ["10"], [True], {"a": 10}),
        ("between 1 and 19, or null for half and three quarters", (15, 10), (10, 10), (0,), [10, 20]),
    ],
    "ranks": [
        (MAP, 6, "6", [[6]], [6, 2.5], [6, True], {"conv": 2.0}, {"conv": "6"}, {0: 2}, np.array([1, 2])),
        ("at least 1", (), [], {}, (6, 0), {"conv": -6}),
    ],
}


def shown(value):
    """Return how a refusal shows a value: as the configuration holds it."""
    normal = {list: tuple, int: float}.get(type(value), lambda value: value)(value)
    return {repr(value), repr(normal)}


CONFIG = [
    *(
        ({field: value}, field, allowed, shown(value))
        for field, rows in FIELDS.items()
        for allowed, *values in rows
        for value in values
    ),
    ({"learning_rate": torch.tensor(0.1)}, "learning_rate", "float", "Tensor"),
    ({"weight_decay": 10**400}, "weight_decay", "finite"),
    ({"epochs": 5, "milestones": [10, 15]}, "milestones", "between 1 and 4, or null", "(10, 15)"),
    ({"ranks": [3], "prune_ratio": 0.5}, "prune_ratio", "ranks", "drop one of the two", "0.5"),
    ({"ranks": [3], "layers": "*"}, "layers", "ranks", "'*'"),
    (
        {"dataset": "imagefolder", "best_of_last": 5},
        "best_of_last",
        "left out with dataset='imagefolder'",
        "5",
    ),
    ({"dataset": "cifar10", "image_size": 224}, "image_size", "32 for cifar10", "224"),
    ({"model": "vgg16"}, "image_size", "32 or more for vgg16; take another model or dataset", "got 8"),
    ({"model": "vit"}, "image_size", "32 or more for vit; take another model or dataset", "got 8"),
]

FROM_DICT = [
    ({"prune_ration": 0.7}, "'prune_ration'", "did you mean 'prune_ratio'?"),
    ({"lr_rate": 0.1}, "'lr_rate'", "did you mean 'learning_rate'?"),
    ({"epoch": 1}, "'epoch'", "did you mean 'epochs'?"),
    ({"xyz": 1}, "'xyz'", "fields are dataset, "),
    ({3: 1}, "3 ", "fields are dataset, "),
    (["seed"], "map of fields to values", "['seed']"),
    (None, "map of fields to values", "None"),
]

FLOATING = "floating-point tensor"
PROJECT = [  # matrix, rank, options
    (([[1.0]], 1, {}), TypeError, "matrix", FLOATING, "(..., N, D)", "list"),
    ((np.eye(3), 1, {}), TypeError, "matrix", FLOATING, "ndarray", "torch.as_tensor"),
    ((None, 1, {}), TypeError, "matrix", FLOATING, "NoneType"),
    ((torch.eye(3).int(), 1, {}), TypeError, "matrix", "floating point", "torch.int32, (3, 3)"),
    ((torch.eye(3).bool(), 1, {}), TypeError, "matrix", "floating point", "torch.bool"),
    ((torch.eye(3).cfloat(), 1, {}), TypeError, "matrix", "floating point", "torch.complex64"),
    ((torch.ones(3), 1, {}), "(..., N, D)", "(3,)"),
    ((torch.tensor(1.0), 1, {}), "(..., N, D)", "()"),
    ((torch.ones(0, 3), 1, {}), "0×3", "got 1"),
    ((torch.ones(3, 0), 1, {}), "3×0", "got 1"),
    *(
        ((M, rank, {}), kind, "rank", "integer from 1 to 4", repr(rank))
        for kind, ranks in (
            (ValueError, (0, 5, -1)),
            (TypeError, (1.0, True, "1", None, torch.tensor(1), [1])),
        )
        for rank in ranks
    ),
    *(((M * value, 1, {}), "matrix", "NaN or infinite") for value in (NAN, INF, -INF)),
    ((torch.full((4, 4), 1e300, dtype=torch.float64), 1, {}), "matrix", "overflows when squared"),
    *(
        ((M, 1, {"keep_share": value}), kind, "keep_share", "0 to 1", repr(value))
        for kind, values in ((ValueError, (-0.1, 1.1, NAN)), (TypeError, ("0", None, True, [0.5])))
        for value in values
    ),
    *(
        ((M, 1, {"row_eps": value}), kind, "row_eps", "0 (exact inverse) or positive", repr(value))
        for kind, values in ((ValueError, (-1.0, NAN, INF)), (TypeError, ("1e-5", None)))
        for value in values
    ),
    *(
        ((M, 1, {"energy_transfer": value}), TypeError, "energy_transfer", "True or False", repr(value))
        for value in ("no", None, 1)
    ),
    *(
        ((M, 1, {"row_scale": value}), TypeError, "row_scale", FLOATING)
        for value in ([1.0] * 4, 2.0, torch.ones(4).int())
    ),
    *(
        ((M, 1, {"row_scale": torch.ones(shape)}), "row_scale", "(4,)", str(shape))
        for shape in ((3,), (4, 1), (1, 4))
    ),
    ((M, 1, {"row_scale": torch.full((4,), NAN)}), "row_scale", "NaN or infinite", "look at the BatchNorm"),
]

RANKS = [
    *((value, TypeError, "ranks", MAP, repr(value)) for value in (None, 5, "8", {2})),
    ([], "ranks", "0 entries", "the model has 1"),
    ([2, 2], "ranks", "2 entries", "the model has 1"),
    *(
        ([value], kind, "rank of layer '0'", "integer from 1 to 8", repr(value))
        for kind, values in ((ValueError, (0, 9)), (TypeError, (2.0, True, None, "2", [2])))
        for value in values
    ),
    ({"conv": 2}, "'conv'", "it has 0, 3"),
    ({0: 2}, "0 ", "it has 0, 3"),
    ({"1": 2}, "layer '1' (BatchNorm2d)", "only convolutions with one group"),
    ({"3": 3}, "rank of layer '3'", "integer from 1 to 2", "got 3"),
]

MODULE = "torch.nn.Module"
CALLS = [
    (lambda: resolve_ranks("resnet20", [2]), TypeError, "model", MODULE, "'resnet20'", "build_model"),
    (lambda: ranks_from_ratio("resnet20", 0.5), TypeError, "model", MODULE, "'resnet20'"),
    (lambda: ranks_from_ratio(net(), None), TypeError, "prune_ratio", "0 ≤ ratio < 1", "got None"),
    (lambda: ranks_from_ratio(net(), 1), "prune_ratio", "0 ≤ ratio < 1", "got 1"),
    (lambda: rank_from_ratio(16, NAN), "prune_ratio", "got nan"),
    (lambda: rank_from_ratio(0, 0.5), "K ", "number of singular values", "got 0"),
    (lambda: rank_from_ratio("16", 0.5), TypeError, "K ", "number of singular values", "got '16'"),
    (lambda: ranks_from_ratio(net(), 0.5, include=3), TypeError, "include", "null or a pattern", "got 3"),
    (lambda: ranks_from_ratio(net(), 0.5, include="x*"), "no layer to compress", "matches 'x*'"),
    (lambda: ranks_from_ratio(nn.ReLU(), 0.5), "ReLU", "no layer to compress"),
    (lambda: LowRankProjector("resnet20", {"0": 2}), TypeError, "model", MODULE),
    (lambda: LowRankProjector(net(), None), TypeError, "ranks", MAP, "got None"),
    (
        lambda: LowRankProjector(net(), [2], energy_transfer="no"),
        *(TypeError, "energy_transfer", "True or False", "'no'"),
    ),
    (
        lambda: LowRankProjector(net(), [2], bn_rectification="no"),
        *(TypeError, "bn_rectification", "True or False", "'no'"),
    ),
    (lambda: LowRankProjector(net(), [2], keep_share=2), "keep_share", "0 to 1", "got 2"),
    (lambda: LowRankProjector(net(), [2], batchnorms={"0": "9"}), "layer '0'", "'9'", "feeds '1'"),
    (lambda: LowRankProjector(net(), [2], batchnorms=["1"]), TypeError, "batchnorms", "map", "['1']"),
    (lambda: factorize(None, [2]), TypeError, "model", MODULE, "NoneType"),
    (lambda: factorize(net(), None), TypeError, "ranks", MAP, "got None"),
    (lambda: factorize(net(), "2"), TypeError, "ranks", MAP, "got '2'"),
    (lambda: cost(5, (3, 3, 3)), TypeError, "model", MODULE, "int 5"),
    (lambda: cost(net(), (3, 3, 3), []), "ranks", "0 entries", "the model has 1"),
    (lambda: cost(net(), (3, 3, 3), {"x": 1}), "'x'", "does not have"),
    *(
        (lambda shape=shape: cost(net(), shape), kind, "input_shape", "(C, H, W)", repr(shape))
        for kind, shapes in (
            (TypeError, (3, "abc", (3, 3.0, 3))),
            (ValueError, ((3, 32), (3, -1, 3), (4, 3, 3), (3, 1, 1), (3, 9, 9))),
        )
        for shape in shapes
    ),
    *(
        (lambda name=name: build_model(name), kind, "model", "resnet8, ", repr(name))
        for kind, names in ((ValueError, ("resnet9", "ResNet20", "")), (TypeError, (None,)))
        for name in names
    ),
    *(
        (lambda number=number: build_model("resnet8", number), kind, "num_classes", "1 or more", repr(number))
        for kind, numbers in ((ValueError, (0, -1)), (TypeError, (10.0, "10", True, None)))
        for number in numbers
    ),
    *(
        (lambda value=value: ranks_for_budget(net(), (3, 3, 3), value), kind, "macs_reduction", repr(value))
        for kind, values in ((ValueError, (0.0, 1.0, -0.5, NAN)), (TypeError, ("0.5", None, True)))
        for value in values
    ),
    (lambda: ranks_for_budget(net(), (3, 3, 3), 0.99), "macs_reduction", "0.99", "0.780"),
    (
        lambda: ranks_for_budget(net(), (3, 3, 3), 0.5, allocation="even"),
        *("allocation", "'uniform' or 'energy'", "'even'"),
    ),
    *(
        (lambda name=name: load_profile(name), "profile", "experiments.yaml", "smoke, short", repr(name))
        for name in ("big", "", None, ["smoke"])
    ),
    (
        lambda: select(load_profile("smoke"), ["resnet8-dense-s1", "x*"]),
        *("profile 'smoke'", "'x*'", "it has resnet8-dense-s1, "),
    ),
]

TREE = {"dataset": "imagefolder", "model": "resnet18"}
RUN = [  # fields of the configuration, arguments of run()
    (({"ranks": {"nolayer": 3}}, {}), "ranks", "'nolayer'", "it has conv, "),
    (({"ranks": {"conv": 300}}, {}), "rank of layer 'conv'", "from 1 to 16", "got 300"),
    (({"ranks": [3, 3]}, {}), "ranks", "2 entries", "the model has 7"),
    (({"layers": "nothing*"}, {}), "no layer to compress", "matches 'nothing*'"),
    (({"validation_fraction": 1e-9}, {}), "validation_fraction", "1e-09", "choose another"),
    (({"precision": "tf32"}, {}), "precision", "'tf32'", "use 'fp32' or 'bf16'"),
    ((TREE, {}), "needs a folder", "--data or LRPET_DATA"),
    ((TREE, {"data": "no such folder"}), "no such folder is no folder", "give another --data"),
    ((TREE, {"data": __file__}), "test_bad_input.py is no folder"),
    (
        ({"dataset": "cifar10"}, {"data": os.path.dirname(__file__)}),
        "neither train/ nor cifar-10-batches-py",
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

BODY = PROFILE_YAML[PROFILE_YAML.index("  experiments:") :]
A, B, OF = "experiment 'a' of profile 'smoke'", "experiment 'b' of profile 'smoke'", " of profile 'smoke'"
ROW, SETTINGS, SEEDS = (
    "a: {feeds: x, method: dense}",
    "settings: {epochs: 2, milestones: [1]}",
    "seeds: [1, 2]",
)
NOT_YAML, KNOWN = "is not valid YAML", "must be one of those in"
YAML = [  # what is replaced, by what
    *(
        (("smoke:", new), "profile", *words)
        for new, *words in (
            ("smoke: &a [*a]\ny:", "must be a map"),
            ("- smoke:", KNOWN, "(none)", "got 'smoke'"),
            ("3:", KNOWN, "(3)"),
            ("null:", KNOWN, "(None)"),
            ("short:", KNOWN, "(short)", "got 'smoke'"),
        )
    ),
    *((("smoke:", new), NOT_YAML) for new in ("smoke: [", "\tsmoke:")),
    ((ROW, "? [1]\n    : {feeds: x}"), NOT_YAML),
    *(
        ((PROFILE_YAML, new), *words)
        for new, *words in (
            ("", "profile", KNOWN, "(none)"),
            ("[1, 2]", "profile", KNOWN, "(none)"),
            ("[1, 2", NOT_YAML),
            ("\x00", NOT_YAML),
            ("a: 1\n---\nb: 2", NOT_YAML, "single document"),
            ("%YAML 9.9\n---\nsmoke:", NOT_YAML),
            ("smoke: 3", "profile 'smoke'", "map", "got 3"),
            ("smoke: text", "profile 'smoke'", "map", "got 'text'"),
            ("smoke:", "profile 'smoke'", "'cost'", "needed are note, cost"),
            (
                "smoke: !!python/object/apply:os.system ['true']",
                NOT_YAML,
                "could not determine a constructor",
            ),
            ("smoke: !!python/name:os.system", NOT_YAML, "could not determine a constructor"),
        )
    ),
    (("cost: nothing", "cost: nothing\n  cost: much"), "'cost' stands twice", "rename one"),
    (("b: {feeds", "a: {feeds"), "'a' stands twice", "rename one"),
    (("method: lrp,", "method: lrp, method: lrpet,"), "'method' stands twice"),
    (("cost: nothing", "price: nothing"), "'price'", "allowed are note, cost"),
    (("  cost: nothing\n", ""), "'cost'", "needed are note, cost"),
    (("note: a note", "note: 3"), "note" + OF, "text", "got 3"),
    (("note: a note", "note:"), "note" + OF, "text", "got None"),
    (("cost: nothing", "cost: {}"), "cost" + OF, "text", "got {}"),
    *(
        ((SETTINGS, f"settings: {value}"), "settings" + OF, "map, as {epochs: 2}")
        for value in ("", "[]", "3", "text")
    ),
    *(
        ((SEEDS, f"seeds: {value}"), "seeds of " + A, "list of different whole numbers, as [1, 2]")
        for value in ("", "3", "[]", "[1, 1]", "'12'", "{1: 2}")
    ),
    ((SEEDS, "seeds: [-1]"), A, "seed", "between 0 and 2147483647", "got -1"),
    ((SEEDS, "seeds: [1.0]"), A, "seed", "int", "float 1.0"),
    ((SEEDS, "seeds: [1, x]"), A, "seed", "int", "str 'x'"),
    ((SEEDS, "seeds: [[1]]"), A, "seed", "int", "list [1]"),
    *(((ROW, f"a: {value}"), A, "map, as {feeds: cifar10") for value in ("", "3", "[1]", "text")),
    *(
        ((ROW, f"a: {{method: dense{value}}}"), "feeds of " + A, "name of the table")
        for value in ("", ", feeds: 3", ", feeds: ")
    ),
    ((ROW, "a: {method: dense, feeds:}"), NOT_YAML),
    *(
        ((ROW, f"{name}: {{feeds: x}}"), "name of an experiment" + OF, "letters, digits", "rename it")
        for name in ("1", "null", "''", "'a b'", "a/b", "'../a'", "-a")
    ),
    (("seeds: [2]", "seed: 2"), B, "seed", "got 2"),
    (("seeds: [2]", "profile: paper"), B, "profile", "got 'paper'"),
    *(
        ((BODY, f"  experiments: {value}"), "experiments" + OF, "map of names")
        for value in ("", "[a]", "{}", "a")
    ),
    (("epochs: 2", "epochs: '2'"), A, "epochs", "int", "str '2'"),
    (("epochs: 2", "weight_decay: 1e-4"), A, "weight_decay", "float", "write 0.0001"),
    (("epochs: 2", "epoch: 2"), A, "'epoch'", "did you mean 'epochs'?"),
    (("method: lrp,", "method: lrq,"), B, "method", "dense, lrp, lrpet", "'lrq'"),
    (("epochs: 2", "ranks: {a: 1}, prune_ratio: 0.5"), B, "prune_ratio", "got 0.5"),
]


def _yaml(replaced, folder):
    old, new = replaced
    assert old in PROFILE_YAML
    (folder / "experiments.yaml").write_text(PROFILE_YAML.replace(old, new), encoding="utf-8")
    return load_profile("smoke", folder / "experiments.yaml")


def _run(given, folder):
    fields, arguments = given
    return run(
        RunConfig(**TINY | fields), **{"results": folder, "device": "cpu", "progress": "off"} | arguments
    )


DO = {
    "RunConfig": (CONFIG, lambda fields, _: RunConfig(**fields)),
    "from_dict": (FROM_DICT, lambda values, _: RunConfig.from_dict(values)),
    "project": (PROJECT, lambda given, _: project(given[0], given[1], **given[2])),
    "ranks": (RANKS, lambda ranks, _: resolve_ranks(net(), ranks)),
    "call": (CALLS, lambda call, _: call()),
    "run": (RUN, _run),
    "experiments.yaml": (YAML, _yaml),
}
TABLE = {f"{what}-{i}": (do, *row) for what, (rows, do) in DO.items() for i, row in enumerate(rows)}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_bad_input_is_refused_in_words_before_any_training(row, tmp_path, monkeypatch):
    monkeypatch.setattr(
        import_module("lrpet.runs.run"), "train", lambda *_, **__: pytest.fail("training began")
    )
    do, given, *words = row
    kind, *words = words if isinstance(words[0], type) else (ValueError, *words)
    refused(lambda: do(given, tmp_path), *words, kind=kind)
    assert not list(tmp_path.glob("**/checkpoint.*"))


# ---------------------------------------------------------------- images

FOLDER = RunConfig(dataset="imagefolder", image_size=16, model="resnet18")


def picture(path, mode="RGB", size=(20, 24), color=(200, 10, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, color[0]) if len(set(color)) == 1 else Image.new("RGB", size, color)
    image.convert(mode).save(path)


def tree(root):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            picture(root / split / name / "0.png")
    return root


def link(place, target):
    """Return what puts a link into a tree of images."""
    return lambda root: (root / place).symlink_to(target)


def content(place, data):
    """Return what overwrites an image."""
    return lambda root: (root / place).write_bytes(data)


def png(width, height):
    """Return a PNG file that claims a size."""
    chunks = [
        (b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )


CAT = "train/cat/0.png"
DECODED = f"{CAT} cannot be decoded"
TREES = {
    "empty tree": (lambda r: [shutil.rmtree(r / name) for name in ("train", "test")], "class without images"),
    "empty splits": (lambda r: [shutil.rmtree(f) for f in r.glob("*/*")], "class without images"),
    "no images in a class": (lambda r: (r / CAT).unlink(), "cat", "remove the empty folder"),
    "one class": (lambda r: [shutil.rmtree(f) for f in r.glob("*/dog")], "'cat'", "at least two"),
    "other classes in the test part": (
        lambda r: (r / "test/dog").rename(r / "test/emu"),
        *("different classes", "'dog'", "unpack it again"),
    ),
    "train alone": (lambda r: shutil.rmtree(r / "test"), "must hold train/ and test/ (or val/)"),
    "test alone": (lambda r: shutil.rmtree(r / "train"), "must hold train/ and test/ (or val/)"),
    "no image": (content(CAT, b"text"), DECODED, "replace it or move it away"),
    "no bytes": (
        content("test/dog/0.png", b""),
        "test/dog/0.png cannot be decoded",
        "replace it or move it away",
    ),
    "a folder named as an image": (
        lambda r: (r / "train/cat/1.png").mkdir() or (r / CAT).unlink(),
        "cat",
    ),
    "a link to nowhere": (link("train/cat/1.png", "nowhere"), "1.png", "images that can be read"),
    "a link to itself": (link("train/cat/1.png", "1.png"), "1.png", "images that can be read"),
    "half an image": (lambda r: (r / CAT).write_bytes((r / CAT).read_bytes()[:60]), DECODED),
    "an image of no pixels": (content(CAT, png(0, 0)), DECODED),
    "an image of a billion pixels": (content(CAT, png(40_000, 40_000)), DECODED),
}


@pytest.mark.parametrize(
    ("damage", "words"), [(damage, words) for damage, *words in TREES.values()], ids=TREES
)
def test_bad_trees_of_images_are_refused_with_the_place(tmp_path, damage, words):
    root = tree(tmp_path / "images")
    damage(root)
    refused(lambda: load_data(FOLDER, root), str(root), *words, kind=DataError)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "CMYK", "P", "1", "I;16"])
def test_images_of_any_mode_are_read_as_colors(tmp_path, mode):
    root = tree(tmp_path)
    path = root / "train" / "cat" / f"1.{'jpg' if mode == 'CMYK' else 'png'}"
    gray = mode in ("L", "LA", "1", "I;16")
    picture(path, mode, color=(200, 200, 200) if gray else (200, 10, 30))
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
    "train/cat": "must be a folder of images that can be read; got: [Errno 13]",
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
    images = tree(tmp_path / "images")
    refused(lambda: load_data(FOLDER, images), "cache", "file/cache", "set LRPET_CACHE", kind=DataError)


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
    except (TypeError, ValueError) as error:
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
    rank, keep_share = data.draw(st.integers(0, 6)), data.draw(st.floats(-0.5, 1.5) | st.just(0.0))
    M = torch.tensor(values).reshape(N, D)
    try:
        result = project(
            M, rank, keep_share=keep_share, row_scale=None if scale is None else torch.tensor(scale)
        )
    except ValueError as error:
        assert not M.isfinite().all() or not 1 <= rank <= min(N, D) or not 0 <= keep_share <= 1, error
        return
    assert result.shape == M.shape and result.dtype == M.dtype
    if M.abs().max() <= 2.0**50:
        assert result.isfinite().all()
        if scale is None:  # energy stays; a bound in float32 for the parts that vanish next to the largest
            assert math.isclose(result.double().norm(), M.double().norm(), rel_tol=1e-4, abs_tol=1e-40)


PLACES = ["smoke", "note", "cost", "settings", "seeds", "experiments", "a", "feeds"]
PIECES = st.sampled_from([*PLACES, "method", "dense", "epochs", "milestones"])
NODES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PIECES | SCALARS, inner, max_size=4),
    max_leaves=12,
)


@quick
@given(st.sampled_from(PLACES), NODES)
def test_any_content_of_experiments_yaml_is_a_profile_or_refused(tmp_path, place, content):
    profiles = yaml.safe_load(PROFILE_YAML)
    smoke = profiles["smoke"]
    above = {"smoke": profiles, "a": smoke["experiments"], "feeds": smoke["experiments"]["a"]}
    above.get(place, smoke)[place] = content
    path = tmp_path / "experiments.yaml"
    path.write_text(yaml.safe_dump(profiles), encoding="utf-8")
    _profile_or_refusal(path)


@quick
@given(
    st.integers(0, len(PROFILE_YAML)),
    st.integers(0, 8),
    st.text(max_size=4)
    | st.sampled_from(["{", "[", ": ", "\n", "- ", "&a ", "*a", "!!python/name:os.system "]),
)
def test_any_change_to_experiments_yaml_is_a_profile_or_refused(tmp_path, place, cut, text):
    path = tmp_path / "experiments.yaml"
    path.write_bytes(
        (PROFILE_YAML[:place] + text + PROFILE_YAML[place + cut :]).encode("utf-8", "surrogatepass")
    )
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
