"""What is run: one frozen, validated, hashed configuration, and every path that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrpet.models import MODELS
from lrpet.paths import results_root

__all__ = ["DATASETS", "METHODS", "RANK_RULES", "RunConfig"]
DATASETS = {"digits": 8, "cifar10": 32, "imagefolder": 224}  # name → image size in pixels
SIZE = {"prune_ratio": 0.57, "ranks": None, "layers": None}  # how compact the result is
PROJECTION = {
    "bn_rectification": True,
    "residual": 0.0,
    "row_eps": 1e-5,
    "projection_interval": 1,
    "projection_unit": "epoch",
}
PRETRAINING = {"pretrain_epochs": None, "finetune_learning_rate": None}
METHODS = {  # which fields of a RunConfig a method reads besides those of training, and their defaults
    "dense": {},
    "lrp": SIZE | PROJECTION | PRETRAINING,
    "lrpet": SIZE | PROJECTION | PRETRAINING,
    "svd_finetune": SIZE | PRETRAINING,
    "factorized": SIZE | {"product_decay": True},
    "trp": {
        "layers": None,
        "energy_threshold": 0.02,
        "nuclear_norm": 0.0003,
        "projection_interval": 20,
        "projection_unit": "iteration",
    },
    "warmup_switch": SIZE | {"pretrain_epochs": None, "rank_rule": "given"},
    "svd_training": SIZE | PRETRAINING | {"orthogonality": 1.0, "sparsity": 0.01},
    "filter_pruning": SIZE | PRETRAINING,
    "narrow": SIZE,
}
METHOD_DEFAULTS = {
    name: [reads[name] for reads in METHODS.values() if name in reads]
    for reads in METHODS.values()
    for name in reads
}
PRETRAINED_SHARE = {
    "svd_finetune": 2,
    "svd_training": 2,
    "filter_pruning": 2,
    "warmup_switch": 4,
}  # epochs divided by this, unless given
RANK_RULES = ("given", "stable_rank")
PROFILES = ("smoke", "short", "scaled", "selection", "paper", "imagenette", "imagenet")
SMALLEST = {"vgg16": 32, "vit": 32}  # pixels that a network needs
RECIPES = ("sgd", "adamw")
PRECISIONS = ("fp32", "tf32", "bf16")
BOUNDS = {  # of the numbers that only some methods read
    "residual": (0.0, 1.0),
    "row_eps": (0.0, 1.0),
    "projection_interval": (1, 1_000_000),
    "finetune_learning_rate": (0.0, 100.0),
    "energy_threshold": (0.0, 0.99),
    "nuclear_norm": (0.0, 1.0),
    "orthogonality": (0.0, 1000.0),
    "sparsity": (0.0, 1000.0),
}


def _later(absent):
    """Return a field that came after the first runs; they had this value, and keep their names while it holds it."""
    return dataclasses.field(default=absent, metadata={"absent": absent})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run, with the defaults of the smoke profile.

    Fields that a method does not read are stored as null, so that two configurations that mean the
    same run have the same name; a setting of another method that is not at its default is refused.
    Device, number of threads and place of the data are no part of it: they are recorded with the run.
    A field that came later carries, as ``absent``, the value that describes the runs before it, and
    stays out of the hash while it holds it: old runs keep their names.

    Raises:
        ValueError: a field of the wrong type or out of range, or fields that contradict each other; the
            text names the field, what came, what is allowed and what to do.

    Source of the defaults that are the paper's: arXiv 2204.05566, experimental settings.

    >>> RunConfig(method="lrpet", prune_ratio=0.57, seed=1).run_id
    'digits-resnet8-lrpet-0.57-s1-0aa7fc'
    """

    dataset: str = "digits"  # digits | cifar10 | imagefolder
    image_size: int | None = None  # pixels; null is the data set's own: 8, 32, 224
    model: str = "resnet8"  # a name of build_model
    method: str = "lrpet"  # dense | lrp | lrpet | svd_finetune | factorized | trp | warmup_switch | svd_training | filter_pruning | narrow
    prune_ratio: float | None = None  # share of singular values removed; null with ranks, else 0.57
    ranks: tuple[int, ...] | Mapping[str, int] | None = None  # one for each convolution, or layer name → rank
    layers: str | None = _later(None)  # null: all convolutions; else names with *, Linear too
    bn_rectification: bool | None = None  # project the weight as BatchNorm scales it; paper: true
    residual: float | None = None  # q, share of each removed singular value that stays; paper's tables: 0
    row_eps: float | None = None  # constant in undoing the BatchNorm scale; authors' code: 0.00001
    projection_interval: int | None = None  # in projection_unit
    projection_unit: str | None = None  # epoch | iteration
    pretrain_epochs: int | None = dataclasses.field(
        default=None, metadata={"absent": None}
    )  # dense epochs first, of the total; null: none, or the method's
    finetune_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"absent": None}
    )  # start of the schedule after them; null: a tenth
    product_decay: bool | None = dataclasses.field(
        default=None, metadata={"absent": None}
    )  # factorized: weight decay on the product, not the factors
    rank_rule: str | None = _later(None)  # warmup_switch: given | stable_rank
    energy_threshold: float | None = _later(None)  # trp: share of energy that may be cut
    nuclear_norm: float | None = _later(None)  # trp: weight of the nuclear norm's subgradient; 0: none
    orthogonality: float | None = _later(None)  # svd_training: weight of that penalty
    sparsity: float | None = _later(None)  # svd_training: weight of the singular values' penalty
    epochs: int = 20
    batch_size: int = 64  # images
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0001
    normalized_weight_decay: float | None = _later(
        None
    )  # of weights that a BatchNorm follows, factors too; null: weight_decay
    milestones: tuple[int, ...] = (10, 15)  # epochs at which the learning rate falls to a tenth
    validation_fraction: float = (
        0.0  # share of training images held out; above 0 they, not the test set, are scored
    )
    crops: str | None = _later(
        None
    )  # imagefolder, training: square (null: of the central one, kept at 8/7 of image_size) | whole (as in the paper)
    recipe: str = _later("sgd")  # sgd | adamw (with cosine, mixup, …; see recipes.py)
    seed: int = 1
    sync_batchnorm: bool = _later(
        False
    )  # BatchNorm statistics over the batches of all processes; false: over each one's part
    precision: str = "fp32"  # fp32 | tf32 (CUDA) | bf16 (autocast)
    profile: str = "smoke"  # smoke | short | scaled | selection | paper | imagenette | imagenet

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        self._choose("dataset", DATASETS)
        self._choose("model", MODELS)
        self._choose("method", METHODS)
        self._choose("recipe", RECIPES)
        self._choose("precision", PRECISIONS)
        self._choose("profile", PROFILES)
        self._normalize()
        self._bound("image_size", 4, 1024)
        self._bound("epochs", 1, 100_000)
        self._bound("batch_size", 1, 1_000_000)
        self._bound("seed", 0, 2**31 - 1)
        self._bound("learning_rate", 0.0, 100.0)
        self._bound("momentum", 0.0, 0.9999)
        self._bound("weight_decay", 0.0, 1.0)
        if self.normalized_weight_decay is not None:
            self._bound("normalized_weight_decay", 0.0, 1.0)
        self._bound("validation_fraction", 0.0, 0.9)
        if self.dataset != "imagefolder" and self.image_size != DATASETS[self.dataset]:
            self._refuse(
                "image_size",
                f"{DATASETS[self.dataset]} for {self.dataset}; another size needs dataset='imagefolder'",
            )
        if self.crops not in (None, "whole"):
            self._refuse("crops", "one of square, whole")
        if self.crops is not None and self.dataset != "imagefolder":
            self._refuse(
                "crops", "left out but for dataset='imagefolder'; the other data sets have crops of their own"
            )
        if self.image_size < SMALLEST.get(self.model, 0):
            self._refuse(
                "image_size",
                f"{SMALLEST[self.model]} or more for {self.model}; take another model or dataset",
            )
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)) or any(
            m >= self.epochs for m in self.milestones
        ):
            self._refuse(
                "milestones",
                f"rising epochs between 1 and {self.epochs - 1}; shorten them together with epochs",
            )
        for name in METHODS[self.method]:
            if getattr(self, name) is not None and name in BOUNDS:
                self._bound(name, *BOUNDS[name])
        if self.prune_ratio is not None and not 0.0 <= self.prune_ratio < 1.0:
            self._refuse("prune_ratio", "at least 0 and below 1")
        if (
            self.ranks is not None
            and min(self.ranks.values() if isinstance(self.ranks, dict) else self.ranks, default=0) < 1
        ):
            self._refuse("ranks", "one or more ranks of at least 1")
        if self.projection_unit is not None:
            self._choose("projection_unit", ("epoch", "iteration"))
        if self.rank_rule is not None:
            self._choose("rank_rule", RANK_RULES)
        if self.pretrain_epochs is not None and not 1 <= self.pretrain_epochs < self.epochs:
            self._refuse(
                "pretrain_epochs", f"between 1 and {self.epochs - 1}, one below epochs, which counts them too"
            )

    def _normalize(self) -> None:
        """Fill in what follows from other fields; null what the method does not read."""
        put = lambda name, value: object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            if "float" in field.type and getattr(self, field.name) is not None:
                put(field.name, float(getattr(self, field.name)))
        put("milestones", tuple(self.milestones) if self.recipe == "sgd" else ())
        if self.crops == "square":
            put("crops", None)
        if self.image_size is None:
            put("image_size", DATASETS[self.dataset])
        reads = METHODS[self.method]
        for name, values in METHOD_DEFAULTS.items():
            value = getattr(self, name)
            if name in reads or value is None:
                continue
            if name not in SIZE and value not in values and not (name == "pretrain_epochs" and value == 0):
                readers = ", ".join(method for method in METHODS if name in METHODS[method])
                self._refuse(
                    name,
                    f"left out with method={self.method!r}, which does not read it (those that do: {readers})",
                )
            put(name, None)
        if self.ranks is not None:
            if self.prune_ratio is not None:
                self._refuse("prune_ratio", "null when ranks are given; drop one of the two")
            if self.layers is not None:
                self._refuse("layers", "null when ranks are given, which name their layers themselves")
            put("ranks", dict(self.ranks) if isinstance(self.ranks, Mapping) else tuple(self.ranks))
        if self.rank_rule == "stable_rank" and (self.prune_ratio, self.ranks) != (None, None):
            self._refuse("rank_rule", "'given' when prune_ratio or ranks are; the stable rank sets its own")
        if self.method in ("lrp", "lrpet") and self.pretrain_epochs == 0:
            put("pretrain_epochs", None)  # from scratch, as every run was before this field came
        for name, value in reads.items():
            if getattr(self, name) is None and not (
                name == "prune_ratio" and (self.ranks is not None or self.rank_rule == "stable_rank")
            ):
                put(name, value)
        if self.pretrain_epochs is None and self.method in PRETRAINED_SHARE:
            put("pretrain_epochs", max(1, self.epochs // PRETRAINED_SHARE[self.method]))
        if (
            self.finetune_learning_rate is None
            and self.pretrain_epochs is not None
            and "finetune_learning_rate" in reads
        ):
            put("finetune_learning_rate", self.learning_rate / 10)
        if self.finetune_learning_rate is not None and self.pretrain_epochs is None:
            self._refuse("finetune_learning_rate", "left out without pretrain_epochs, after which it holds")

    def _refuse(self, name: str, allowed: str):
        raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

    def _choose(self, name: str, allowed) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, f"one of {', '.join(allowed)}")

    def _bound(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            self._refuse(name, f"between {low:.10g} and {high:.10g}")

    def __hash__(self):
        return hash(self.run_id)  # a map of ranks has no hash of its own

    @classmethod
    def from_dict(cls, values: Mapping) -> RunConfig:
        """Build a configuration from a mapping, refusing names that are not fields.

        >>> RunConfig.from_dict({"prune_ration": 0.7})
        Traceback (most recent call last):
        ...
        ValueError: 'prune_ration' is not a field of RunConfig; did you mean 'prune_ratio'?
        """
        import difflib

        if not isinstance(values, Mapping):
            raise ValueError(
                f"a configuration must be a map of fields to values, as {{'seed': 1}}; got {values!r}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"fields are {', '.join(names)}"
                raise ValueError(f"{name!r} is not a field of RunConfig; {hint}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Return all fields as plain JSON values; ``from_dict`` reverses it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def run_id(self) -> str:
        """The name of the run: data, network, method, compression and seed, then a hash over all fields."""
        values = self.to_dict()
        for field in dataclasses.fields(self):
            if "absent" in field.metadata and values[field.name] == field.metadata["absent"]:
                del values[field.name]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
        size = (
            ["ranks"]
            if self.ranks is not None
            else []
            if self.prune_ratio is None
            else [f"{self.prune_ratio:g}"]
        )
        return "-".join([self.dataset, self.model, self.method, *size, f"s{self.seed}", digest])

    def folder(self, results: Path | None = None) -> Path:
        """Return where the run lives: ``<results>/<profile>/runs/<run_id>``."""
        return (results or results_root()) / self.profile / "runs" / self.run_id


def _check_type(name: str, value, annotation: str) -> None:
    """Refuse a value of the wrong type; no conversion but int → float, which loses nothing."""
    if value is None and "None" in annotation:
        return
    if annotation.startswith("tuple"):
        if isinstance(value, Mapping) and "Mapping" in annotation:
            items = value.values()
            good = all(isinstance(key, str) for key in value)
        else:
            good = isinstance(value, (list, tuple))
            items = value if good else ()
        if not good or not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            or_map = " or a map of layer names to them" if "Mapping" in annotation else ""
            raise ValueError(f"{name} must be a list of whole numbers{or_map}; got {value!r}")
        return
    kind = {"str": str, "int": int, "float": (int, float), "bool": bool}[annotation.split(" ")[0]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint = (
            " (YAML reads 1e-4 as text: write 0.0001)" if isinstance(value, str) and kind is not str else ""
        )
        raise ValueError(
            f"{name} must be {annotation.split(' ')[0]}; got {type(value).__name__} {value!r}{hint}"
        )
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite; got {value!r}")
