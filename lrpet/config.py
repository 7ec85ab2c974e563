"""What is run: one frozen, validated, hashed configuration, and every path that follows from it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from lrpet.paths import results_root
from lrpet.registry import BLOCKS, GRADIENT_PROJECTIONS, METHODS, MODELS, SMALLEST, TASKS, Metric

__all__ = [
    "DATASETS",
    "METHODS",
    "PROFILES",
    "RunConfig",
    "check_field",
    "check_type",
    "describe_fields",
    "read_fields",
]
DATASETS = {  # name → image size in pixels; None: text
    "digits": 8,
    "cifar10": 32,
    "cifar100": 32,
    "imagefolder": 224,
    "topics": None,
    "text": None,
    "voc": 600,
    "coco": 600,
    "digit_scenes": 64,
    "cifar_scenes": 96,
}
BUNDLED = ("digits", "topics", "digit_scenes")  # in packages that are installed anyway: no folder is needed
OF_ANY_SIZE = ("imagefolder", "voc", "coco", "digit_scenes", "cifar_scenes")
WITH_BACKBONE = r"\w+_(resnet50_fpn(_v2)?|resnet18|resnet50)"  # a ResNet of torchvision in a larger network
WITH_BOXES_OR_MASKS = ("detection", "segmentation")
CONTEXT = 128  # bytes that the language model reads at most
PROFILES = (
    *("smoke", "short", "scaled", "selection", "paper", "imagenette", "imagenet"),
    *("language", "language-choice", "voc", "scenes"),
)
SIZE = ("prune_ratio", "ranks", "layers", "dense_layers", "multiple_of")  # how compact; read by some methods
UNFOLDINGS = ("rows", "columns")  # of a k×k weight: N × C·k², the paper's, or N·k² × C
METHOD_DEFAULTS = {  # field that only some methods read → method → its default
    field: {name: row.reads[field] for name, row in METHODS.items() if field in row.reads}
    for row in METHODS.values()
    for field in row.reads
}


def _field(default, help: str, **limits):
    """Return a field with its help text and limits.

    Args:
        default: its value where none is given; None: what the method or another field says.
        help: meaning, unit, source.
        limits: ``choices``; ``low`` and ``high``, both allowed; ``below`` for ``high``, itself not allowed;
            ``absent``, the value that describes runs from before the field came: they keep their names while
            it holds it.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class _Network:
    """What is run on what, and how the network becomes compact."""

    dataset: str = _field("digits", "the images, or the text", choices=DATASETS)
    image_size: int | None = _field(
        None, "pixels; null: the data set's own, and none of text", low=4, high=1024
    )
    model: str = _field("resnet8", "the network, a name of build_model", choices=MODELS)
    method: str = _field("lrpet", "how the network becomes compact", choices=METHODS)
    prune_ratio: float | None = _field(
        None, "share of singular values removed; null where ranks are given", low=0.0, below=1.0
    )
    ranks: tuple[int, ...] | Mapping[str, int] | None = _field(
        None, "one rank per convolution, or layer name → rank; null: from prune_ratio"
    )
    layers: str | None = _field(
        None, "names of layers, with *, Linear too; null: all convolutions", absent=None
    )
    multiple_of: int | None = _field(
        None, "round ranks from prune_ratio up to multiples of this; null: no", low=1, high=1024, absent=None
    )
    unfolding: str | Mapping[str, str] | None = _field(
        None, "of k×k weights, or name with * → it; rows, null: N × C·k²", choices=UNFOLDINGS, absent=None
    )
    dense_layers: str | None = _field(
        None, "names of layers, with *, that prune_ratio leaves dense; null: none", absent=None
    )
    bn_rectification: bool | None = _field(None, "project the weight as BatchNorm scales it, as in the paper")
    residual: float | None = _field(
        None, "q, share of each removed singular value that stays; the paper's tables: 0", low=0.0, high=1.0
    )
    row_eps: float | None = _field(
        None, "constant in undoing the BatchNorm scale; the authors' code: 0.00001", low=0.0, high=1.0
    )
    column_scale: bool | None = _field(
        None,
        "project the weight as the LayerNorm or RMSNorm before it scales its inputs; ours, not the paper's",
        absent=None,
    )
    fast_projection: bool | None = _field(
        None,
        "project from the directions of the last projection, certified to 1e-5 of the exact one",
        absent=None,
    )
    projection_interval: int | None = _field(
        None, "between projections, in projection_unit", low=1, high=1_000_000
    )
    projection_unit: str | None = _field(None, "of projection_interval", choices=("epoch", "iteration"))
    pretrain_epochs: int | None = _field(
        None, "dense epochs first, of the total; null: none, or the method's share", absent=None
    )
    finetune_learning_rate: float | None = _field(
        None,
        "start of the schedule after them; null: a tenth of learning_rate",
        low=0.0,
        high=100.0,
        absent=None,
    )
    matched_steps: bool | None = _field(
        None,
        "the steps that LRPET's larger weights would make: the control of LRP against LRPET",
        absent=None,
    )
    product_decay: bool | None = _field(
        None, "weight decay acts on the product of the factors, not on each factor", absent=None
    )
    rank_rule: str | None = _field(
        None, "where the ranks come from", choices=("given", "stable_rank"), absent=None
    )
    energy_threshold: float | None = _field(
        None, "share of the energy that may be cut off", low=0.0, high=0.99, absent=None
    )
    nuclear_norm: float | None = _field(
        None, "weight of the nuclear norm's subgradient; 0: none", low=0.0, high=1.0, absent=None
    )
    orthogonality: float | None = _field(
        None, "weight of the orthogonality penalty", low=0.0, high=1000.0, absent=None
    )
    sparsity: float | None = _field(
        None, "weight of the singular values' penalty", low=0.0, high=1000.0, absent=None
    )


@dataclass(frozen=True)
class _Training(_Network):
    """How it is trained and scored."""

    epochs: int = _field(20, "in total, dense ones first included", low=1, high=100_000)
    batch_size: int = _field(64, "images per step, of all processes together", low=1, high=1_000_000)
    learning_rate: float = _field(0.1, "at the start", low=0.0, high=100.0)
    momentum: float = _field(0.9, "of SGD", low=0.0, high=0.9999)
    nesterov: bool = _field(False, "Nesterov's momentum", absent=False)
    weight_decay: float = _field(0.0001, "of all weights", low=0.0, high=1.0)
    normalized_weight_decay: float | None = _field(
        None,
        "of weights that a BatchNorm follows, both factors too; null: weight_decay",
        low=0.0,
        high=1.0,
        absent=None,
    )
    milestones: tuple[int, ...] | None = _field(
        None,
        "epochs at which the learning rate falls to a tenth; null: half and three quarters, as in the paper",
    )
    validation_fraction: float = _field(
        0.0,
        "share of training images held out; above 0 they, not the test images, are scored",
        low=0.0,
        high=0.9,
    )
    crops: str | None = _field(
        None,
        "imagefolder, training: of the central square, kept at 8/7 of image_size (square, null), or of the"
        " whole image, as in the paper",
        choices=("square", "whole"),
        absent=None,
    )
    recipe: str = _field(
        "sgd",
        "adamw: as the paper's vision transformer was trained, with epochs of three passes; cosine: its"
        " warm-up and cosine, an optimizer of your choice, images as for sgd",
        choices=("sgd", "adamw", "cosine"),
        absent="sgd",
    )
    optimizer: str | None = _field(
        None, "of recipe cosine; null: adamw", choices=("adamw", "adafactor", "sgd"), absent=None
    )
    context: int | None = _field(
        None, "text: bytes that are read to say the next one; null: 128", low=2, high=CONTEXT, absent=None
    )
    steps_per_epoch: int | None = _field(
        None, "text: steps called an epoch; null: one pass in length", low=1, high=1_000_000, absent=None
    )
    gradient_projection: str | None = _field(
        None,
        "of the block matrices, so that AdamW's state is small",
        choices=GRADIENT_PROJECTIONS,
        absent=None,
    )
    gradient_rank: int | None = _field(None, "r, of the gradients' subspace", low=1, high=65_536, absent=None)
    gradient_interval: int | None = _field(
        None, "T, steps between two bases", low=1, high=1_000_000, absent=None
    )
    gradient_scale: float | None = _field(
        None, "α, factor on the learning rate of the projected weights", low=0.0, high=1000.0, absent=None
    )
    grain: float | None = _field(
        None, "c, VLoRP's pieces of a row; below 1: rows joined", low=1e-5, high=65_536, absent=None
    )
    switch_threshold: float | None = _field(None, "γ of Lotus's test", low=0.0, high=2.0, absent=None)
    check_interval: int | None = _field(
        None, "steps between two of Lotus's tests", low=1, high=1_000_000, absent=None
    )
    carry: str | None = _field(
        None, "the moments at a new basis", choices=("keep", "rotate", "reset"), absent=None
    )
    refresh_after_projection: bool | None = _field(
        None, "new bases at the step after a projection of the weights", absent=None
    )
    best_of_last: int | None = _field(
        None,
        "the authors' score too: of so many epochs at the end the best before its projection, then cut by a"
        " plain SVD; null: no",
        low=1,
        high=100_000,
        absent=None,
    )
    task: str = _field(
        "classification",
        "what the network does, by which it is trained and scored",
        choices=TASKS,
        absent="classification",
    )
    pretrained_backbone: bool = _field(
        False,
        "begin with the backbone in the folder of the data, resnet50.pth or the like; a detector's BatchNorms"
        " stay as they are there",
        absent=False,
    )
    seed: int = _field(1, "of all random numbers", low=0, high=2**31 - 1)
    sync_batchnorm: bool = _field(
        False, "BatchNorm statistics over the batches of all processes, not of each one's part", absent=False
    )
    precision: str = _field("fp32", "tf32 on CUDA only; bf16 is autocast", choices=("fp32", "tf32", "bf16"))
    profile: str = _field("smoke", "whose table the run is for", choices=PROFILES)


@dataclass(frozen=True)
class RunConfig(_Training):
    """Everything that decides the outcome of a run, with the defaults of the smoke profile.

    Fields that a method does not read are stored as null, so that two configurations that mean the
    same run have the same name; a setting of another method that is not at its default is refused.
    Device, number of threads and place of the data are no part of it: they are recorded with the run.
    A field that came later carries, as ``absent``, the value that describes the runs before it, and
    stays out of the hash while it holds it: old runs keep their names.

    Raises:
        ValueError: a field of the wrong type or out of range, or fields that contradict each other; the
            text names the field, what was received, what is allowed and what to do.

    Source of the defaults that are the paper's: arXiv 2204.05566, experimental settings.

    >>> RunConfig(method="lrpet", prune_ratio=0.57, seed=1).run_id
    'digits-resnet8-lrpet-0.57-s1-0aa7fc'
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        _check_task(self)
        self._normalize()
        _check_data(self)
        _check_schedule(self)
        _check_gradient_projection(self)
        given = self.ranks.values() if isinstance(self.ranks, dict) else self.ranks
        if given is not None and min(given, default=0) < 1:
            self._refuse("ranks", "one or more ranks of at least 1")

    def _put(self, name: str, value) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _normalize(self) -> None:
        """Fill in what follows from other fields; null what the method does not read."""
        for field in dataclasses.fields(self):
            if "float" in field.type and getattr(self, field.name) is not None:
                self._put(field.name, float(getattr(self, field.name)))
        given = self.milestones
        if given is None:
            given = sorted({self.epochs // 2, self.epochs * 3 // 4} - {0})
        self._put("milestones", tuple(given) if self.recipe == "sgd" else ())
        if self.crops == "square":
            self._put("crops", None)
        if self.image_size is None:
            self._put("image_size", DATASETS[self.dataset])
        if self.task == "language" and self.context is None:
            self._put("context", CONTEXT)
        if self.recipe == "cosine" and self.optimizer is None:
            self._put("optimizer", "adamw")
        for name in ("column_scale", "fast_projection", "refresh_after_projection"):
            self._put(name, getattr(self, name) or None)  # false is what runs were before
        _fill_in_gradient_projection(self)
        _drop_what_is_not_read(self)
        _normalize_size(self)
        _fill_in_defaults(self)

    def _refuse(self, name: str, allowed: str):
        raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

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
        if not isinstance(values, Mapping):
            allowed = "a map of fields to values, as {'seed': 1}"
            raise ValueError(f"a configuration must be {allowed}; got {values!r}")
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
        name = [self.dataset, self.model, self.method]
        if self.ranks is not None:
            name.append("ranks")
        elif self.prune_ratio is not None:
            name.append(f"{self.prune_ratio:g}")
        return "-".join([*name, f"s{self.seed}", digest])

    @property
    def metric(self) -> Metric:
        """The number that the run is scored by."""
        return TASKS[self.task].metric

    def folder(self, results: Path | None = None) -> Path:
        """Return where the run lives: ``<results>/<profile>/runs/<run_id>``."""
        return (results or results_root()) / self.profile / "runs" / self.run_id


def _check_task(config: RunConfig) -> None:
    row = TASKS[config.task]
    for name, fitting in (("dataset", row.datasets), ("model", row.models)):
        if getattr(config, name) not in fitting:
            config._refuse(name, f"one of {', '.join(fitting)} with task={config.task!r}")
    if config.task in WITH_BOXES_OR_MASKS:
        if config.method in ("narrow", "filter_pruning"):
            config._refuse("method", f"another one with task={config.task!r}: its networks have one width")
        for name in ("normalized_weight_decay", "matched_steps"):
            if getattr(config, name) not in (None, False):
                config._refuse(name, f"left out with task={config.task!r}")
        if config.recipe != "sgd":
            config._refuse("recipe", f"'sgd' with task={config.task!r}; adamw mixes labels of whole images")
    if config.pretrained_backbone and not re.fullmatch(WITH_BACKBONE, config.model):
        config._refuse(
            "pretrained_backbone", f"false with model={config.model!r}, which has no such backbone"
        )


def _check_data(config: RunConfig) -> None:
    if config.task == "language":
        for name in ("image_size", "crops"):
            if getattr(config, name) is not None:
                config._refuse(name, "left out with task='language'")
        if config.recipe == "adamw":
            config._refuse("recipe", "cosine or sgd with task='language'; adamw mixes images")
        return
    for name in ("context", "steps_per_epoch"):
        if getattr(config, name) is not None:
            config._refuse(name, "left out except with task='language'")
    _check_image_size(config)


def _normalize_size(config: RunConfig) -> None:
    """Check and normalize the fields that decide ranks, and of which matrices."""
    if config.ranks is not None:
        if config.prune_ratio is not None:
            config._refuse("prune_ratio", "null when ranks are given; drop one of the two")
        for name in ("layers", "dense_layers"):
            if getattr(config, name) is not None:
                config._refuse(name, "null when ranks are given, which name their layers themselves")
        is_map = isinstance(config.ranks, Mapping)
        config._put("ranks", dict(config.ranks) if is_map else tuple(config.ranks))
    if config.rank_rule == "stable_rank" and (config.prune_ratio, config.ranks) != (None, None):
        config._refuse("rank_rule", "'given' when prune_ratio or ranks are; the stable rank sets its own")
    if config.multiple_of == 1:
        config._put("multiple_of", None)
    if config.multiple_of is not None and (config.ranks is not None or config.rank_rule == "stable_rank"):
        config._refuse("multiple_of", "null except with prune_ratio, whose ranks it rounds up")
    how = config.unfolding
    if isinstance(how, Mapping):
        how = dict(how) if set(how.values()) - {"rows"} else None
    config._put("unfolding", None if how == "rows" else how)


def _check_image_size(config: RunConfig) -> None:
    own = DATASETS[config.dataset]
    if config.dataset not in OF_ANY_SIZE and config.image_size != own:
        other = "another size needs dataset='imagefolder'"
        config._refuse("image_size", f"{own} for {config.dataset}; {other}")
    if config.dataset != "imagefolder" and config.crops is not None:
        own = "the other data sets have crops of their own"
        config._refuse("crops", f"left out except for dataset='imagefolder'; {own}")
    if config.model.startswith("pspnet") and config.image_size % 32:
        config._refuse("image_size", f"a multiple of 32 for {config.model}")
    if config.image_size < SMALLEST.get(config.model, 0):
        needed = f"{SMALLEST[config.model]} or more for {config.model}"
        config._refuse("image_size", f"{needed}; take another model or dataset")


def _fill_in_gradient_projection(config: RunConfig) -> None:
    strategy = config.gradient_projection
    reads = GRADIENT_PROJECTIONS[strategy].reads if strategy else {}
    for row in GRADIENT_PROJECTIONS.values():
        for name in row.reads:
            value = getattr(config, name)
            if name not in reads and value is not None:
                config._refuse(
                    name, f"left out with gradient_projection={strategy!r}, which does not read it"
                )
            if name in reads and value is None:
                if reads[name] is None:
                    config._refuse(name, f"given with gradient_projection={strategy!r}")
                config._put(name, reads[name])


def _check_gradient_projection(config: RunConfig) -> None:
    if config.optimizer is not None and config.recipe != "cosine":
        config._refuse("optimizer", "left out except with recipe='cosine'")
    if config.gradient_projection is None:
        if config.refresh_after_projection:
            config._refuse("refresh_after_projection", "left out without gradient_projection")
        return
    if config.recipe == "sgd" or config.optimizer not in (None, "adamw"):
        config._refuse("gradient_projection", "left out except with AdamW: recipe='cosine' or 'adamw'")
    if config.model not in BLOCKS:
        config._refuse("gradient_projection", f"left out except with model {', '.join(BLOCKS)}")
    if config.method not in ("dense", "lrp", "lrpet"):
        config._refuse("gradient_projection", "left out except with method dense, lrp or lrpet")


def _check_schedule(config: RunConfig) -> None:
    ends = (0, *config.milestones, config.epochs)
    if config.milestones and any(b <= a for a, b in zip(ends, ends[1:], strict=False)):
        allowed = f"rising epochs between 1 and {config.epochs - 1}"
        config._refuse("milestones", f"{allowed}, or null for half and three quarters of epochs")
    if config.nesterov and not (config.momentum and config.recipe == "sgd"):
        config._refuse("nesterov", "false without a momentum of SGD")
    if config.pretrain_epochs is not None and not 1 <= config.pretrain_epochs < config.epochs:
        allowed = f"between 1 and {config.epochs - 1}, one below epochs, which counts them too"
        config._refuse("pretrain_epochs", allowed)
    if config.best_of_last is not None:
        if config.best_of_last > config.epochs:
            config._refuse("best_of_last", f"between 1 and {config.epochs}, the epochs")
        if config.dataset == "imagefolder":
            config._refuse(
                "best_of_last", "left out with dataset='imagefolder', whose images may be streamed"
            )
    if config.matched_steps and (config.recipe != "sgd" or config.residual):
        config._refuse("matched_steps", "left out except with recipe='sgd' and residual 0")


def _drop_what_is_not_read(config: RunConfig) -> None:
    for name, defaults in METHOD_DEFAULTS.items():
        value = getattr(config, name)
        if config.method in defaults or value is None:
            continue
        meaningless = name in SIZE or value in defaults.values() or (name, value) == ("pretrain_epochs", 0)
        if not meaningless:
            reads = f"which does not read it (those that do: {', '.join(defaults)})"
            config._refuse(name, f"left out with method={config.method!r}, {reads}")
        config._put(name, None)


def _fill_in_defaults(config: RunConfig) -> None:
    row = METHODS[config.method]
    if config.matched_steps is False:
        config._put("matched_steps", None)  # as every run was before this field came
    if config.pretrain_epochs == 0 and row.pretrained_share is None:
        config._put("pretrain_epochs", None)  # from scratch, as every run was before this field came
    for name, value in row.reads.items():
        sized = name == "prune_ratio" and (config.ranks is not None or config.rank_rule == "stable_rank")
        if getattr(config, name) is None and not sized:
            config._put(name, value)
    if config.pretrain_epochs is None and row.pretrained_share is not None:
        config._put("pretrain_epochs", max(1, config.epochs // row.pretrained_share))
    if config.finetune_learning_rate is not None and config.pretrain_epochs is None:
        config._refuse("finetune_learning_rate", "left out without pretrain_epochs, after which it holds")
    if (
        config.finetune_learning_rate is None
        and config.pretrain_epochs is not None
        and "finetune_learning_rate" in row.reads
    ):
        config._put("finetune_learning_rate", config.learning_rate / 10)


def read_fields(typed: Sequence[str]) -> dict:
    """Return what was typed as FIELD=VALUE, each value as the type of its field, read as it looks.

    Numbers are decimal, also with leading zeros; 1e2 is a whole number; text is taken as it stands; null is
    no value.

    Args:
        typed: as ``["epochs=20", "milestones=[10, 15]", "ranks={conv1: 3, conv2: 8}"]``.

    Raises:
        ValueError: no value, a field given twice, or a value that is not of its type; names the field.

    >>> read_fields(["seed=010", "layers=*.conv1", "learning_rate=1e-2", "milestones=[8, 12]", "crops=null"])
    {'seed': 10, 'layers': '*.conv1', 'learning_rate': 0.01, 'milestones': (8, 12), 'crops': None}
    """
    values, kinds = {}, {field.name: field.type for field in dataclasses.fields(RunConfig)}
    for text in typed:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise ValueError(
                f"a field must be typed as FIELD=VALUE, as epochs=20 or crops=null; got {text!r}"
            )
        if name in values:
            raise ValueError(f"{name} must be given once; got {values[name]!r} and {value!r}")
        values[name] = _read_value(name, value, kinds.get(name, "str"))  # an unknown one is refused later
    return values


def _read_value(name: str, text: str, kind: str):
    if text == "null" and "None" in kind:
        return None
    if kind.startswith("tuple"):
        return _read_numbers(name, text, may_be_map="Mapping" in kind)
    if "Mapping" in kind and (text[0], text[-1]) == ("{", "}"):
        return _read_map(name, text)
    if kind.startswith("bool"):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false; got {text!r}")
        return text.lower() == "true"
    if kind.startswith("int"):
        return _read_whole(name, text)
    return _read_number(name, text, "a number, as 0.1 or 1e-4") if kind.startswith("float") else text


def _read_number(name: str, text: str, wanted: str) -> float:
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{name} must be {wanted}; got {text!r}")
    return float(text)


def _read_whole(name: str, text: str) -> int:
    if re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        return int(text)
    number = _read_number(name, text, "a whole number")
    if not number.is_integer():
        raise ValueError(f"{name} must be a whole number; got {text!r}")
    return int(number)


def _read_numbers(name: str, text: str, may_be_map: bool) -> tuple[int, ...] | dict[str, int]:
    brackets, items = text[:1] + text[1:][-1:], [item.strip() for item in text[1:-1].split(",")]
    items = items if items != [""] else []
    if brackets == "[]":
        return tuple(_read_whole(name, item) for item in items)
    if brackets != "{}" or not may_be_map:
        raise ValueError(
            f"{name} must be a list, as [1, 2]{', or a map, as {conv1: 3}' * may_be_map}; got {text!r}"
        )
    return {key: _read_whole(f"{name} of {key!r}", value) for key, value in _read_map(name, text).items()}


def _read_map(name: str, text: str) -> dict[str, str]:
    items = [item.strip() for item in text[1:-1].split(",")]
    pairs = [[part.strip() for part in item.rpartition(":")[::2]] for item in items if item]
    twice = [key for key, _ in pairs if [key for key, _ in pairs].count(key) > 1]
    if twice:
        raise ValueError(f"{name} must name each layer once; got {twice[0]!r} twice")
    return dict(pairs)


def describe_fields() -> str:
    """Return one paragraph per field of RunConfig: type, default, meaning, limits, the methods that read it.

    >>> print(describe_fields().splitlines()[0])
    dataset: str = 'digits'
    """
    lines = []
    for field in dataclasses.fields(RunConfig):
        about, readers = field.metadata, {}
        for method, default in METHOD_DEFAULTS.get(field.name, {}).items():
            readers.setdefault(default, []).append(method)
        allowed = f"one of {', '.join(about['choices'])}" if "choices" in about else _bounds(field)
        lines.append(f"{field.name}: {field.type} = {field.default!r}")
        lines.append("    " + "; ".join(filter(None, [about["help"], allowed])))
        if readers:
            each = "; ".join(f"{', '.join(methods)} ({default!r})" for default, methods in readers.items())
            lines.append(f"    read, with this default, by {each}")
    return "\n".join(lines).replace("None", "null")


def _within(field: dataclasses.Field, value: float) -> bool:
    limits = field.metadata
    if "below" in limits:
        return limits["low"] <= value < limits["below"]
    return limits["low"] <= value <= limits["high"]


def _bounds(field: dataclasses.Field) -> str:
    """Return the range of a field in words; empty where it has none."""
    limits = field.metadata
    if "low" not in limits:
        return ""
    if "below" in limits:
        return f"at least {limits['low']:g} and below {limits['below']:g}"
    return f"between {limits['low']:.10g} and {limits['high']:.10g}"


def check_field(field: dataclasses.Field, value) -> None:
    """Refuse a value that a field of :class:`RunConfig` cannot have, whatever the others hold.

    Raises:
        ValueError: it is of another type, none of the choices or out of range.

    >>> check_field(dataclasses.fields(RunConfig)[0], "digits")
    """
    check_type(field.name, value, field.type)
    choices, bounds = field.metadata.get("choices"), _bounds(field)
    for one in value.values() if isinstance(value, Mapping) else (value,):
        if one is not None and choices and one not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}; got {value!r}")
    if value is not None and bounds and not _within(field, value):
        raise ValueError(f"{field.name} must be {bounds}; got {value!r}")


def check_type(name: str, value, annotation: str) -> None:
    """Refuse a value of the wrong type; no conversion except int → float, which loses nothing.

    Args:
        name: of the field or parameter.
        value: what was given.
        annotation: the type, as a field of :class:`RunConfig` writes it.

    Raises:
        ValueError: another type, or a number that is not finite.

    >>> check_type("seed", 3, "int | None")
    """
    if value is None and "None" in annotation:
        return
    if annotation.startswith("tuple"):
        _check_numbers(name, value, annotation)
        return
    if isinstance(value, Mapping) and "Mapping" in annotation:
        if not all(isinstance(part, str) for pair in value.items() for part in pair):
            raise ValueError(f"{name} must be a text or a map of layer names to texts; got {value!r}")
        return
    wanted = annotation.split(" ")[0]
    kind = {"str": str, "int": int, "float": (int, float), "bool": bool}[wanted]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint = _hint(value, wanted) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be {wanted}; got {type(value).__name__} {value!r}{hint}")
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite; got {value!r}")


def _check_numbers(name: str, value, annotation: str) -> None:
    """Refuse what is no list of whole numbers, nor a map to them where the type allows one."""
    if isinstance(value, Mapping) and "Mapping" in annotation:
        items = value.values()
        good = all(isinstance(key, str) for key in value)
    else:
        good = isinstance(value, (list, tuple))
        items = value if good else ()
    if not good or not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        or_map = " or a map of layer names to them" if "Mapping" in annotation else ""
        raise ValueError(f"{name} must be a list of whole numbers{or_map}; got {value!r}")


def _hint(text: str, wanted: str) -> str:
    """Say how to write a value that came as text: YAML reads 1e-4 and "5" as such."""
    if wanted == "bool":
        return " (write true or false)"
    try:
        return f" (YAML reads it as text: write {Decimal(text):f})"
    except InvalidOperation:
        return ""
