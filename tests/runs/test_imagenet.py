"""ImageNet's settings, its table, top-5 accuracy, and the notebook that goes through the whole path."""

import dataclasses
import json
import shutil

import nbformat
import pandas as pd
import pytest
import torch
from helpers import execute, experiment, parameters, put
from torch import nn

from lrpet import RunConfig, figures, load_runs, run, tables
from lrpet.data.batches import Batches
from lrpet.data.digits_tree import make_digits_tree
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT, results_root
from lrpet.training.evaluate import evaluate
from lrpet.training.recipes import learning_rate

SMALL = {
    "dataset": "imagefolder",
    "image_size": 16,
    "model": "resnet8",
    "epochs": 1,
    "milestones": (),
    "batch_size": 16,
    "learning_rate": 0.05,
}

# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("e", load_profile("imagenet").experiments, ids=lambda e: e.name)
def test_settings_are_those_of_the_paper(e):
    c = e.config
    assert (c.epochs, c.batch_size, c.learning_rate, c.milestones) == (120, 256, 0.1, (30, 60, 90))
    assert (c.momentum, c.weight_decay, c.image_size, c.crops) == (0.9, 0.0001, 224, "whole")
    assert [learning_rate(c, epoch) for epoch in (29, 30, 60, 90)] == [0.1, 0.01, 0.001, 0.0001]
    if c.method != "dense":
        assert (c.projection_interval, c.projection_unit, c.bn_rectification) == (250, "iteration", True)
    if c.method != "dense" and e.feeds == "imagenet":  # others try the authors' further ratios and ranks
        row = tables.published().query(f"table == 'imagenet' and model == '{c.model}'")
        assert c.prune_ratio == row.prune_ratio.item()


def test_every_network_of_the_paper_is_run_dense_by_lrp_and_by_lrpet():
    runs = {(e.config.model, e.config.method) for e in load_profile("imagenet").experiments}
    assert runs == {
        (model, method)
        for model in ("resnet18", "resnet34", "resnet50")
        for method in ("dense", "lrp", "lrpet")
    }


def test_names_of_runs_are_those_from_before_crops_came():
    assert experiment("imagenette", "resnet18-lrpet-s1").run_id == "imagefolder-resnet18-lrpet-0.58-s1-0b7f29"
    assert RunConfig(dataset="imagefolder", crops="square") == RunConfig(dataset="imagefolder")
    with pytest.raises(ValueError, match="crops must be one of square, whole; got 'middle'"):
        RunConfig(dataset="imagefolder", crops="middle")
    with pytest.raises(ValueError, match="crops must be left out .*dataset='imagefolder'.*got 'whole'"):
        RunConfig(crops="whole")


# ---------------------------------------------------------------- top-5


class Rising(nn.Module):
    """Gives class k the logit k for every image."""

    def __init__(self, classes):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(float(classes)))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_top5_counts_the_images_whose_class_is_among_the_first_five():
    data = load_data(RunConfig())
    scores = evaluate(Rising(10), Batches(data, 64, "cpu", 1))
    assert scores["top5_pct"] == pytest.approx(100 * (data.test_labels >= 5).float().mean().item())
    assert scores["top1_pct"] == pytest.approx(100 * (data.test_labels == 9).float().mean().item())


def test_of_five_classes_there_is_no_top5(tmp_path):
    done = run(
        RunConfig(**SMALL, method="dense"),
        data=make_digits_tree(tmp_path / "five", classes=5, train=4, val=2),
        device="cpu",
        progress="off",
    )
    assert "top5_pct" not in done.summary and "top5_pct" not in done.history
    assert done.summary["num_classes"] == 5


def test_runs_from_before_top5_are_loaded_beside_those_with_it(tmp_path):
    put(tmp_path, experiment("short", "resnet20-dense-s1"), 85.0)
    put(tmp_path, experiment("short", "resnet20-lrp-s1"), 83.0, top5_pct=99.0)
    store = load_runs(tmp_path).set_index("method")
    assert pd.isna(store.top5_pct["dense"]) and store.top5_pct["lrp"] == 99.0
    assert len(load_runs(PROJECT / "results" / "short")) >= 7  # committed, without


def test_the_last_epochs_top5_is_the_summarys(tmp_path):
    done = run(
        RunConfig(**SMALL),
        data=make_digits_tree(tmp_path / "six", train=4, val=2),
        device="cpu",
        progress="off",
    )
    assert done.summary["top5_pct"] == done.history.top5_pct.iloc[-1]
    quantities = tables.comparison(done).set_index("quantity")
    assert (
        quantities.ours["top-5, %"] == f"{done.summary['top5_pct']:.2f}"
        and quantities.published["top-5, %"] == "none"
    )


# ---------------------------------------------------------------- one store, several trees


@pytest.mark.parametrize("crops", ["square", "whole"])
def test_a_finished_run_is_not_shown_for_other_images_of_the_same_classes(tmp_path, crops):
    config = RunConfig(**SMALL | {"crops": crops})
    root = make_digits_tree(tmp_path / "six", train=4, val=2)
    done = run(config, data=root, device="cpu", progress="off")
    assert run(config, data=root, device="cpu", progress="off").summary == done.summary
    shutil.copyfile(root / "train" / "1" / "0.jpg", root / "train" / "0" / "0.jpg")
    with pytest.raises(ValueError, match=r"is a finished run on other images than .*six holds"):
        run(config, data=root, device="cpu", progress="off")
    assert run(config, data=tmp_path / "gone", device="cpu", progress="off").summary == done.summary


def test_a_finished_run_is_not_shown_for_other_classes(tmp_path):
    six, seven = (make_digits_tree(tmp_path / str(n), classes=n, train=4, val=2) for n in (6, 7))
    done = run(RunConfig(**SMALL), data=six, device="cpu", progress="off")
    assert run(RunConfig(**SMALL), data=six, device="cpu", progress="off").summary == done.summary
    assert run(RunConfig(**SMALL), device="cpu", progress="off").summary == done.summary  # needs no images
    with pytest.raises(
        ValueError,
        match=r"is a finished run on other images than .*7 holds \(data_train_sha256 differs\); give",
    ):
        run(RunConfig(**SMALL), data=seven, device="cpu", progress="off")


# ---------------------------------------------------------------- tables


def of_imagenet(tmp_path):
    return tables.imagenet_table(tables.profile_runs("imagenet", tmp_path), tables.published(), tmp_path)


def test_what_was_not_run_on_imagenet_says_so_beside_exact_costs_and_published_numbers(tmp_path):
    table = of_imagenet(tmp_path)
    assert (
        (table.top1_pct == "not run").all()
        and (table.top5_pct == "not run").all()
        and (table.hours_of_a_run == "not measured").all()
    )
    assert (table.top1_difference_pct == "").all() and (table.top5_difference_pct == "").all()
    names = ["network", "method"]
    rows = table.drop_duplicates(names).set_index(names)  # the main ratio comes first
    for model, macs, top1, top5 in (
        ("resnet18", 860, "67.87", "88.04"),
        ("resnet34", 1710, "72.95", "90.98"),
        ("resnet50", 1900, "74.25", "91.93"),
    ):
        row = rows.loc[model, "LRPET"]
        assert float(row.macs_m) == pytest.approx(macs, rel=0.0033)
        assert (row.paper_top1_pct, row.paper_top5_pct) == (top1, top5)
        assert row.command == f"python -m lrpet run '{model}-lrpet-s*' --profile imagenet --data DIR"
    assert rows.params_m["resnet18", "dense"] == "11.690"  # with a classifier of 1000 classes


@pytest.mark.parametrize(("classes", "difference"), [(1000, "+0.13"), (10, "")])
def test_a_run_of_imagenet_is_compared_and_one_of_other_images_is_not(tmp_path, classes, difference):
    counted = {"macs": 860_880_000, "params": 5_823_000, "dense_macs": 1_814_073_344}
    put(
        tmp_path,
        experiment("imagenet", "resnet18-lrpet-s1"),
        68.0,
        top5_pct=88.0,
        epochs=120,
        num_classes=classes,
        **counted,
    )
    row = of_imagenet(tmp_path).set_index(["network", "method"]).loc["resnet18", "LRPET"]
    assert (row.top1_pct, row.top5_pct, row.seeds) == ("68.00 (n=1)", "88.00 (n=1)", "1 of 1")
    assert (row.top1_difference_pct, row.top5_difference_pct) == (difference, "-0.04" if difference else "")
    accuracy = tables.accuracy_table(tables.profile_runs("imagenet", tmp_path), tables.published()).set_index(
        ["network", "method"]
    )
    assert accuracy.difference_pct["resnet18", "LRPET"] == difference


def test_hours_are_estimated_from_what_was_measured_on_a_gpu_and_labelled_so(tmp_path):
    (tmp_path / "bench").mkdir()
    for device, speed in (("CPU of a laptop", 90_000.0), ("a GPU", 1000.0), ("another GPU", 2135.0)):
        result = {"device": device, "both_images_per_second": speed}
        (tmp_path / "bench" / f"throughput-resnet50-lrp-224-{device}.json").write_text(json.dumps(result))
    hours = of_imagenet(tmp_path).set_index(["network", "method"]).hours_of_a_run
    assert (
        hours["resnet50", "LRP"]
        == "20, estimated from 2135 images/s measured on one another GPU, training alone counted"
    )
    assert hours.drop(("resnet50", "LRP")).eq("not measured").all()


def test_the_ten_classes_are_compared_with_no_published_number(tmp_path):
    counted = {"macs": 70_240_000, "params": 5_315_000, "dense_macs": 148_050_000}
    for seed, top1, more in (
        (1, 70.0, {}),
        (2, 71.0, {"top5_pct": 95.0}),
    ):  # the first is from before top-5 was recorded
        put(tmp_path, experiment("imagenette", f"resnet18-lrpet-s{seed}"), top1, **counted, **more)
    put(tmp_path, experiment("imagenette", "resnet18-dense-s1"), 75.0, **counted)
    table = tables.imagenet_table(tables.profile_runs("imagenette", tmp_path), tables.published(), tmp_path)
    assert not [
        column for column in table if "paper" in column or "difference" in column or column == "command"
    ]
    rows = table.set_index("method")
    assert (rows.top1_pct["LRPET"], rows.top5_pct["LRPET"]) == ("70.50 [64.15, 76.85] (n=2)", "95.00 (n=1)")
    assert (rows.top5_pct["dense"], rows.top5_pct["LRP"]) == ("not recorded", "not run")
    claims = tables.claims_table(tables.profile_runs("imagenette", tmp_path)).set_index("claim")
    assert claims.verdict["energy transfer helps"] == "not tested"
    difference = tables.differences(tables.profile_runs("imagenette", tmp_path)).set_index("pair").difference
    assert difference["LRPET − dense"].startswith("-5.00")


@pytest.mark.slow
def test_pages_and_folders_of_tables_have_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: imagenette imagenet -->\n<!-- end -->\n")
    (text,) = tables.write_pages([page])
    assert text.count("| resnet18") == len(
        {e.name.rpartition("-s")[0] for e in load_profile("imagenette").experiments}
    )
    for name in ("imagenet", "imagenette"):
        assert (results_root() / name / "tables" / "imagenet.md").read_text().startswith("| network")


def test_a_profile_without_ablations_says_so(tmp_path):
    runs = tables.profile_runs("imagenette", tmp_path)
    table = tables.ablation_table(runs)
    assert [text.get_text() for text in figures.plot_ablations(table, runs).texts] == [
        "no ablation of this profile has two settings that were run"
    ]
    assert "0 of 0 changed settings have" in tables.summary_of_ablations(table)


# ---------------------------------------------------------------- the notebook


def test_the_notebooks_parameters_are_fields_and_a_valid_run():
    _, values = parameters(PROJECT / "notebooks" / "02_imagenet.ipynb")
    assert (values.pop("data"), values.pop("device")) == (None, "auto")
    of_every_method = {field.name for field in dataclasses.fields(RunConfig) if field.default is not None} - {
        "sync_batchnorm",  # one process
        *("task", "pretrained_backbone"),  # of other tasks
    }
    assert of_every_method <= set(values)
    config = RunConfig.from_dict(values)
    assert (config.profile, config.model, config.dataset, config.crops) == (
        "smoke",
        "resnet18",
        "imagefolder",
        "whole",
    )


@pytest.mark.slow
def test_the_notebook_takes_another_tree_and_leaves_a_run(tmp_path):
    tree = make_digits_tree(tmp_path / "tree", classes=5, train=4, val=2)
    small = "image_size: 16, model: resnet8, epochs: 1, milestones: [], batch_size: 16"
    done, out = execute("02_imagenet", tmp_path, f"{{data: '{tree}', {small}}}")
    assert done.returncode == 0, done.stdout + done.stderr
    text = "".join(o.text for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if "text" in o)
    assert "5 classes" in text and "top-1" in text
    assert len(list(results_root().glob("smoke/runs/imagefolder-resnet8-lrpet-*/summary.json"))) == 1


@pytest.mark.slow
def test_a_mistyped_parameter_is_refused_before_anything_runs(tmp_path):
    done, _ = execute("02_imagenet", tmp_path, "devise: cpu")
    assert done.returncode == 1 and "did you mean 'device'" in done.stdout
    assert not list(results_root().glob("**/config.json"))
