"""How tables and figures name methods, variants and settings."""

from __future__ import annotations

from lrpet.config import METHODS, RunConfig

METHOD_NAMES = {
    "dense": "dense",
    "lrp": "LRP",
    "lrpet": "LRPET",
    "svd_finetune": "SVD, then fine-tuned",
    "factorized": "trained as factors",
    "trp": "TRP",
    "warmup_switch": "dense, then factors",
    "svd_training": "SVD training",
    "filter_pruning": "filter pruning",
    "narrow": "narrow network",
}
USUAL_INTERVALS = {
    "imagenet": (250, "iteration"),
    "imagenette": (50, "iteration"),
}  # between projections, where it is not the methods' own
PUBLISHED_NAMES = {"dense": "baseline"}  # where the published tables use another word


def label_of(config: RunConfig) -> str:
    """Return the method as tables name it, with every setting of it that is not the default."""
    return ", ".join([METHOD_NAMES[config.method], *_variant(config)]).replace(", without BN", " without BN")


def _variant(config: RunConfig) -> list[str]:
    defaults = METHODS[config.method]
    differs = lambda name: name in defaults and getattr(config, name) != defaults[name]
    words = []
    if config.bn_rectification is False:
        words.append("without BN rectification")
    if config.method in ("lrp", "lrpet") and config.pretrain_epochs:
        words.append("from a trained network")
    usual = USUAL_INTERVALS.get(
        config.profile, (defaults.get("projection_interval"), defaults.get("projection_unit"))
    )
    if config.projection_unit is not None and (config.projection_interval, config.projection_unit) != usual:
        words.append(
            f"every {config.projection_interval} {config.projection_unit}s".replace(
                "every 1 epochs", "every epoch"
            )
        )
    if differs("residual"):
        words.append(f"residual {config.residual:g}")
    if differs("row_eps"):
        words.append(f"row_eps {config.row_eps:g}" if config.row_eps else "exact inverse of the scale")
    if config.product_decay is False:
        words.append("decay on each factor")
    if config.rank_rule == "stable_rank":
        words.append("stable rank")
    if differs("nuclear_norm"):
        words.append(f"nuclear norm {config.nuclear_norm:g}" if config.nuclear_norm else "no nuclear norm")
    return words


def setting_of(config: RunConfig, free: tuple[str, ...]) -> str:
    """Write the value that an ablation varies."""
    if "method" in free:
        words = {True: "with", False: "without"}
        return f"{words[config.method == 'lrpet']} energy transfer, {words[config.bn_rectification]} BN rectification"
    if "projection_unit" in free:
        every = f"every {config.projection_interval} {config.projection_unit}s"
        return every.replace("every 1 epochs", "every epoch")
    if "pretrain_epochs" in free:
        if not config.pretrain_epochs:
            return "from scratch"
        return f"after {config.pretrain_epochs} dense epochs, learning rate {config.finetune_learning_rate:g} again"
    if "row_eps" in free:
        return f"{config.row_eps:g}" if config.row_eps else "0, the exact inverse"
    return f"{getattr(config, free[0]):g}"
