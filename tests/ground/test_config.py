import dataclasses
import json
from pathlib import Path

import pytest

from lrpet import RunConfig
from lrpet.config import METHODS, describe_fields, read_fields
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT, data_folder, figures_root, has_own_results, results_root
from lrpet.registry import IMAGE_MODELS, TASKS, metric_of

LRPET = {"method": "lrpet", "prune_ratio": 0.57, "seed": 1}


@pytest.mark.parametrize(
    ("dataset", "size"), [("digits", 8), ("cifar10", 32), ("cifar100", 32), ("imagefolder", 224)]
)
def test_image_size_follows_the_data_set(dataset, size):
    assert RunConfig(dataset=dataset).image_size == size
    assert RunConfig(dataset=dataset).run_id == RunConfig(dataset=dataset, image_size=size).run_id
    assert RunConfig(dataset="imagefolder", image_size=64).image_size == 64


def test_run_ids_are_pinned():  # results and notebooks name runs by them
    assert RunConfig(**LRPET).run_id == "digits-resnet8-lrpet-0.57-s1-0aa7fc"


RUN_IDS = json.loads((Path(__file__).parent / "run_ids.json").read_text())  # "profile/experiment" → run_id


@pytest.mark.parametrize("profile", sorted({name.split("/")[0] for name in RUN_IDS}))
def test_no_run_of_a_profile_changes_its_name(profile):
    now = {f"{profile}/{e.name}": e.config.run_id for e in load_profile(profile).experiments}
    before = {name: run_id for name, run_id in RUN_IDS.items() if name.startswith(f"{profile}/")}
    assert now.items() >= before.items()


def test_committed_runs_keep_their_names():
    folders = [path.parent for path in PROJECT.glob("results/*/runs/*/config.json")]
    assert folders
    for folder in folders:
        config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
        assert (config.profile, config.run_id) == (folder.parts[-3], folder.name)


def test_every_field_is_described_with_type_default_and_limits():
    text = describe_fields()
    for field in dataclasses.fields(RunConfig):
        assert field.metadata["help"] in text
        assert f"{field.name}: " in text
    assert "momentum: float = 0.9\n    of SGD; between 0 and 0.9999\n" in text
    assert "read, with this default, by lrp, lrpet (1); trp (20)" in text


def test_defaults_can_be_spelled_out_in_any_type_that_means_the_same():
    spelled_out = {
        "learning_rate": 0.1,
        "milestones": [10, 15],
        "residual": 0,
        "row_eps": 0.00001,
        "bn_rectification": True,
    }
    assert RunConfig(**LRPET, **spelled_out) == RunConfig(**LRPET)
    assert RunConfig(**LRPET, **spelled_out).run_id == RunConfig(**LRPET).run_id


LANGUAGE = {"task": "language", "dataset": "topics", "model": "byte_transformer", "recipe": "cosine"}
GALORE = LANGUAGE | {"gradient_projection": "galore", "gradient_rank": 4}
LOTUS = GALORE | {"gradient_projection": "lotus"}
BACKBONE = {"task": "detection", "dataset": "voc", "model": "fasterrcnn_resnet50_fpn"}
OTHER = {
    "dense_layers": {"dense_layers": "conv"},
    "nesterov": {"nesterov": True},
    "pretrained_backbone": BACKBONE | {"pretrained_backbone": True},
    "dataset": {"dataset": "cifar10"},
    "image_size": {"dataset": "imagefolder", "image_size": 64},
    "model": {"model": "resnet20"},
    "method": {"method": "lrp"},
    "prune_ratio": {"prune_ratio": 0.7},
    "ranks": {"prune_ratio": None, "ranks": [3, 4]},
    "multiple_of": {"multiple_of": 16},
    "unfolding": {"unfolding": {"blocks.*": "columns"}},
    "layers": {"layers": "*.conv1"},
    "bn_rectification": {"bn_rectification": False},
    "residual": {"residual": 0.1},
    "row_eps": {"row_eps": 0.0},
    "projection_interval": {"projection_interval": 2},
    "projection_unit": {"projection_unit": "iteration"},
    "pretrain_epochs": {"pretrain_epochs": 5},
    "finetune_learning_rate": {"pretrain_epochs": 5, "finetune_learning_rate": 0.05},
    "matched_steps": {"method": "lrp", "matched_steps": True},
    "product_decay": {"method": "factorized", "product_decay": False},
    "rank_rule": {"method": "warmup_switch", "prune_ratio": None, "rank_rule": "stable_rank"},
    "energy_threshold": {"method": "trp", "energy_threshold": 0.1},
    "nuclear_norm": {"method": "trp", "nuclear_norm": 0.0},
    "orthogonality": {"method": "svd_training", "orthogonality": 0.1},
    "sparsity": {"method": "svd_training", "sparsity": 0.1},
    "epochs": {"epochs": 21},
    "batch_size": {"batch_size": 65},
    "learning_rate": {"learning_rate": 0.2},
    "momentum": {"momentum": 0.8},
    "weight_decay": {"weight_decay": 0.0},
    "normalized_weight_decay": {"normalized_weight_decay": 0.0},
    "milestones": {"milestones": [10]},
    "validation_fraction": {"validation_fraction": 0.1},
    "crops": {"dataset": "imagefolder", "crops": "whole"},
    "recipe": {"recipe": "adamw"},
    "optimizer": {"recipe": "cosine", "optimizer": "adafactor"},
    "task": LANGUAGE,
    "context": LANGUAGE | {"context": 64},
    "steps_per_epoch": LANGUAGE | {"steps_per_epoch": 100},
    "gradient_projection": GALORE | {"gradient_projection": "galore2"},
    "gradient_rank": GALORE | {"gradient_rank": 8},
    "gradient_interval": GALORE | {"gradient_interval": 8},
    "gradient_scale": GALORE | {"gradient_scale": 1.0},
    "carry": GALORE | {"carry": "rotate"},
    "refresh_after_projection": GALORE | {"refresh_after_projection": True},
    "grain": GALORE | {"gradient_projection": "vlorp", "grain": 4.0},
    "switch_threshold": LOTUS | {"switch_threshold": 0.02},
    "check_interval": LOTUS | {"check_interval": 25},
    "column_scale": LANGUAGE | {"column_scale": True},
    "fast_projection": {"fast_projection": True},
    "best_of_last": {"best_of_last": 5},
    "seed": {"seed": 2},
    "sync_batchnorm": {"sync_batchnorm": True},
    "precision": {"precision": "bf16"},
    "profile": {"profile": "short"},
}


def test_every_field_is_part_of_the_name():
    assert set(OTHER) == {field.name for field in dataclasses.fields(RunConfig)}
    ids = {RunConfig(**LRPET | change).run_id for change in OTHER.values()} | {RunConfig(**LRPET).run_id}
    assert len(ids) == len(OTHER) + 1


def test_a_table_knows_its_metric_by_its_task_or_its_columns():
    assert metric_of({}).column == metric_of({"task": [None]}).column == "top1_pct"
    for task, row in TASKS.items():
        assert metric_of({"task": [task, None]}) == metric_of({row.metric.column: [1.0]}) == row.metric
    with pytest.raises(ValueError, match="runs must be of one task.*got classification, language"):
        metric_of({"task": ["language", "classification"]})


def test_bits_per_byte_alone_are_better_when_lower():
    lower = {task for task, row in TASKS.items() if row.metric.sign < 0}
    assert lower == {"language"}
    assert TASKS["language"].metric.text(2.5) == "2.500"
    assert TASKS["detection"].metric.label == "mAP at IoU 0.5, %"


def test_ranks_as_a_map_do_not_depend_on_its_order():
    a, b = RunConfig(ranks={"x": 1, "y": 2}), RunConfig(ranks={"y": 2, "x": 1})
    assert a.run_id == b.run_id
    assert a.run_id.startswith("digits-resnet8-lrpet-ranks-s1-")
    assert RunConfig(ranks={"x": 1, "y": 3}).run_id != a.run_id


def test_a_given_map_is_copied():
    ranks = {"x": 1}
    config = RunConfig(ranks=ranks)
    ranks["x"] = 2
    assert config.ranks == {"x": 1}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_dictionaries_go_there_and_back(change):
    config = RunConfig(**LRPET | change)
    values = config.to_dict()
    assert values == json.loads(json.dumps(values))
    assert set(values) == set(OTHER)
    again = RunConfig.from_dict(values)
    assert again == config
    assert again.run_id == config.run_id


def test_how_compact_a_result_is_means_nothing_to_the_dense_network():
    dense = RunConfig(method="dense")
    defaults = {
        "residual": 0.0,
        "row_eps": 0.00001,
        "bn_rectification": True,
        "projection_interval": 1,
        "projection_unit": "epoch",
    }
    same = RunConfig(method="dense", prune_ratio=0.7, layers="*", **defaults)
    assert same == dense
    assert same.run_id == dense.run_id == RunConfig(method="dense", ranks=[1, 2]).run_id
    assert dense.prune_ratio is dense.ranks is dense.residual is dense.projection_interval is None
    assert dense.run_id.startswith("digits-resnet8-dense-s1-")


@pytest.mark.parametrize(
    ("method", "field", "value", "readers"),
    [
        ("dense", "residual", 0.3, "lrp, lrpet"),
        ("dense", "bn_rectification", False, "lrp, lrpet"),
        (
            "dense",
            "pretrain_epochs",
            5,
            "lrp, lrpet, svd_finetune, warmup_switch, svd_training, filter_pruning",
        ),
        ("narrow", "projection_interval", 5, "lrp, lrpet, trp"),
        (
            "factorized",
            "pretrain_epochs",
            5,
            "lrp, lrpet, svd_finetune, warmup_switch, svd_training, filter_pruning",
        ),
        ("lrpet", "energy_threshold", 0.1, "trp"),
        ("lrpet", "product_decay", False, "factorized"),
        ("svd_finetune", "rank_rule", "stable_rank", "warmup_switch"),
        ("trp", "sparsity", 0.5, "svd_training"),
    ],
)
def test_a_setting_of_another_method_is_refused(method, field, value, readers):
    text = rf"{field} must be left out with method='{method}', .*those that do: {readers}\); got {value!r}"
    with pytest.raises(ValueError, match=text):
        RunConfig(method=method, **{field: value})


def test_a_stable_rank_sets_its_own_ranks():
    assert RunConfig(method="warmup_switch", rank_rule="stable_rank").prune_ratio is None
    for given in ({"prune_ratio": 0.5}, {"ranks": [3]}):
        with pytest.raises(ValueError, match="rank_rule must be 'given' when prune_ratio or ranks are"):
            RunConfig(method="warmup_switch", rank_rule="stable_rank", **given)


def test_epochs_before_the_compression_are_part_of_the_total():
    assert RunConfig(method="svd_finetune").pretrain_epochs == 10
    assert RunConfig(method="warmup_switch").pretrain_epochs == 5
    assert RunConfig(method="svd_finetune").finetune_learning_rate == pytest.approx(0.01)
    assert RunConfig(method="lrpet", pretrain_epochs=0).run_id == RunConfig(method="lrpet").run_id
    assert RunConfig(method="lrpet", pretrain_epochs=4).finetune_learning_rate == pytest.approx(0.01)
    with pytest.raises(ValueError, match="pretrain_epochs must be between 1 and 19, one below epochs"):
        RunConfig(method="svd_finetune", pretrain_epochs=20)
    with pytest.raises(ValueError, match="finetune_learning_rate must be left out without pretrain_epochs"):
        RunConfig(method="lrpet", finetune_learning_rate=0.1)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().epochs = 3


def test_folders_follow_the_environment(monkeypatch, tmp_path):
    config = RunConfig(**LRPET, profile="paper")
    monkeypatch.setenv("LRPET_RESULTS", str(tmp_path / "here"))
    monkeypatch.setenv("LRPET_FIGURES", "~/figures")
    assert config.folder() == tmp_path / "here" / "paper" / "runs" / config.run_id
    assert config.folder(Path("there")) == Path("there/paper/runs") / config.run_id
    assert figures_root() == Path.home() / "figures"
    monkeypatch.setenv("LRPET_FIGURES", "")  # with results elsewhere, not among the project's own
    assert figures_root() == tmp_path / "here" / "figures" and not has_own_results()
    monkeypatch.setenv("LRPET_RESULTS", str(PROJECT / "results"))
    assert figures_root() == PROJECT / "figures" and has_own_results()
    monkeypatch.delenv("LRPET_RESULTS")
    assert (results_root(), figures_root()) == (PROJECT / "results", PROJECT / "figures")


def test_a_home_that_is_not_known_is_told(monkeypatch):
    monkeypatch.setenv("LRPET_RESULTS", "~nobody-of-this-name/results")
    for ask in (results_root, lambda: data_folder("~nobody-of-this-name/data")):
        with pytest.raises(
            ValueError, match="the home folder of '~nobody-of-this-name/.*give the folder without"
        ):
            ask()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", IMAGE_MODELS)
def test_every_method_and_network_can_be_configured(method, model):
    task = next(task for task, row in TASKS.items() if model in row.models)
    dataset = "cifar10" if task == "classification" else TASKS[task].datasets[0]
    config = RunConfig(task=task, dataset=dataset, method=method, model=model)
    assert config.run_id.startswith(f"{dataset}-{model}-{method}-")


def test_aligned_ranks_and_unfolding_name_a_run_only_where_they_are_set():
    plain = RunConfig(**LRPET)
    same = RunConfig(**LRPET, multiple_of=1, unfolding={"conv": "rows"})  # the paper's
    assert same.run_id == plain.run_id and (same.multiple_of, same.unfolding) == (None, None)
    mapped = RunConfig(**LRPET, unfolding=read_fields(["unfolding={conv: columns}"])["unfolding"])
    others = [RunConfig(**LRPET, multiple_of=16), RunConfig(**LRPET, unfolding="columns"), mapped]
    assert len({config.run_id for config in (plain, *others)}) == 4
    assert RunConfig.from_dict(mapped.to_dict()) == mapped


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"unfolding": "diagonal"}, "unfolding must be one of rows, columns"),
        ({"unfolding": {"conv": "diagonal"}}, "unfolding must be one of rows, columns"),
        ({"unfolding": {"conv": 1}}, "unfolding must be a text or a map"),
        ({"unfolding": "columns", "method": "trp"}, "unfolding must be left out"),
        ({"multiple_of": 0}, "multiple_of must be between"),
        ({"multiple_of": 16, "prune_ratio": None, "ranks": [3]}, "multiple_of must be null"),
    ],
)
def test_what_is_no_alignment_or_unfolding_is_refused(values, word):
    with pytest.raises(ValueError, match=word):
        RunConfig(**LRPET | values)
