"""How tables and figures name methods, variants and settings."""

from __future__ import annotations

from lrpet.config import RunConfig
from lrpet.registry import GRADIENT_PROJECTIONS, METHODS

# between projections, where it is not the methods' own
USUAL_INTERVALS = {"imagenet": (250, "iteration"), "imagenette": (50, "iteration")}
PUBLISHED_NAMES = {"dense": "baseline"}  # where the published tables use another word


SAID_ELSEWHERE = (
    "prune_ratio",
    "ranks",
    "layers",
    "dense_layers",
    "finetune_learning_rate",
)  # in columns of their own
IN_WORDS = {
    ("bn_rectification", False): "without BN rectification",
    ("row_eps", 0.0): "exact inverse of the scale",
    ("matched_steps", True): "with LRPET's steps",
    ("product_decay", False): "decay on each factor",
    ("rank_rule", "stable_rank"): "stable rank",
    ("column_scale", True): "with column scale",
    ("fast_projection", True): "with followed projections",
    ("nuclear_norm", 0.0): "no nuclear norm",
}


def label_of(config: RunConfig) -> str:
    """Return the method as tables name it, with every setting of it that is not the default."""
    label = METHODS[config.method].label
    if config.gradient_projection is not None:
        label = f"{label} + {GRADIENT_PROJECTIONS[config.gradient_projection].label}"
    elif config.optimizer in ("adafactor", "sgd"):
        label = f"{label} + {config.optimizer}"
    return ", ".join([label, *_variant(config)]).replace(", without BN", " without BN")


def _variant(config: RunConfig) -> list[str]:
    row, words = METHODS[config.method], []
    for name, default in row.reads.items():
        value = getattr(config, name)
        if value == default or name in (*SAID_ELSEWHERE, "projection_interval", "projection_unit"):
            continue
        if name == "multiple_of":
            words.append(f"ranks at multiples of {value}")
        elif name == "unfolding":  # a text, or a map of layers
            words.append("1×1 first")
        elif name != "pretrain_epochs":
            words.append(IN_WORDS.get((name, value), f"{name} {value}"))
        elif row.pretrained_share is None:
            words.append("from a trained network")
    if isinstance(config.ranks, dict):
        words.append("a rank for each layer")
    own = (row.reads.get("projection_interval"), row.reads.get("projection_unit"))
    interval = (config.projection_interval, config.projection_unit)
    if config.projection_unit is not None and interval != USUAL_INTERVALS.get(config.profile, own):
        words.append(_every(config))
    return words


def _every(config: RunConfig) -> str:
    if config.projection_interval == 1:
        return f"every {config.projection_unit}"
    return f"every {config.projection_interval} {config.projection_unit}s"


def setting_of(config: RunConfig, free: tuple[str, ...]) -> str:
    """Write the value that an ablation varies."""
    if "method" in free:
        parts = {"energy transfer": config.method == "lrpet", "BN rectification": config.bn_rectification}
        return ", ".join(f"{'with' if has else 'without'} {part}" for part, has in parts.items())
    if "projection_unit" in free:
        return _every(config)
    if "pretrain_epochs" in free:
        if not config.pretrain_epochs:
            return "from scratch"
        rate = config.finetune_learning_rate
        return f"after {config.pretrain_epochs} dense epochs, learning rate {rate:g} again"
    if "row_eps" in free:
        return f"{config.row_eps:g}" if config.row_eps else "0, the exact inverse"
    if "unfolding" in free:
        return "N·k² × C, 1×1 first" if config.unfolding else "N × C·k², as in the paper"
    return f"{getattr(config, free[0]):g}"
