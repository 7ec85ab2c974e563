import dataclasses
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from helpers import experiment, put

from lrpet import RunConfig, load_runs, tables
from lrpet.__main__ import DAMAGED, main
from lrpet.bench import load_results
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT
from lrpet.runs.store import Damaged
from lrpet.tables import choice, claims, costs, pages, statistics
from lrpet.tables.names import label_of


def test_what_was_not_run_says_so_and_nothing_is_filled_in(tmp_path):
    table = tables.accuracy_table(tables.profile_runs("paper", tmp_path), tables.published())
    assert (table.top1_pct == "not run").all() and (table.difference_pct == "").all()
    row = table.query("method == 'LRPET' and prune_ratio == '0.57'").iloc[0]
    assert (row.macs_m, row.paper_top1_pct, row.seeds) == ("56.06", "93.27", "0 of 3")


def test_mean_and_spread_over_seeds_and_difference_to_the_paper(tmp_path):
    for seed, value in ((1, 93.0), (2, 93.4), (3, 93.5)):
        put(tmp_path, experiment("paper", f"resnet56-lrpet-s{seed}"), value)
    row = tables.accuracy_table(tables.profile_runs("paper", tmp_path), tables.published()).iloc[2]
    assert row.top1_pct == "93.30 [92.64, 93.96] (n=3)"  # sd 0.2646, half width 4.303 · 0.2646 / √3 = 0.657
    assert row.best_epoch_top1_pct == "93.80 [93.14, 94.46] (n=3)"
    assert row.difference_pct == "+0.03"


def test_the_authors_way_to_score_has_a_column_of_its_own_where_the_profile_asks_for_it(tmp_path):
    for seed, value in ((1, 93.1), (2, 93.2)):
        put(tmp_path, experiment("paper", f"resnet56-lrpet-s{seed}"), 92.0, best_of_last_top1_pct=value)
    put(tmp_path, experiment("paper", "vit-cifar100-lrpet-s1"), 71.0, macs=125_280_000)
    table = tables.accuracy_table(tables.profile_runs("paper", tmp_path), tables.published())
    row = table.iloc[2]
    assert row.best_of_last_then_svd_top1_pct == "93.15 [92.51, 93.79] (n=2)"
    assert (row.difference_pct, row.best_of_last_difference_pct) == ("-1.27", "-0.12")  # to 93.27
    old = table[table.network == "vit, cifar100"].iloc[0]
    assert (old.difference_pct, old.paper_top1_pct) == ("-1.08", "72.08")  # to CIFAR-100's own number
    assert (old.best_of_last_then_svd_top1_pct, old.best_of_last_difference_pct) == ("not run", "")
    short = tables.accuracy_table(tables.profile_runs("short", tmp_path), tables.published())
    assert not any("best_of_last" in name for name in short)


@pytest.mark.parametrize("profile", ["paper", "imagenet"])
def test_the_cost_table_covers_every_lrpet_network_of_the_published_profiles(profile):
    covered = {(row.network, row.dataset, row.macs_m) for row in tables.cost_table().itertuples()}
    runs = tables.profile_runs(profile)
    for row in runs[(runs.label == "LRPET") & (runs.feeds != "ablations")].itertuples():
        dataset = "imagenet" if profile == "imagenet" else row.config.dataset
        counted = tables.rows.counted_cost(pd.Series(row._asdict()))
        assert (row.config.model, dataset, f"{counted[0] / 1e6:.2f}") in covered, row.experiment


def test_one_seed_has_no_interval_and_short_runs_no_difference_to_the_paper(tmp_path):
    put(tmp_path, experiment("short", "resnet20-lrpet-s1"), 88.0)
    row = tables.accuracy_table(tables.profile_runs("short", tmp_path), tables.published()).iloc[2]
    assert row.top1_pct == "88.00 (n=1)" and row.difference_pct == "" and row.seeds == "1 of 3"


@pytest.mark.parametrize(
    ("lrp", "verdict"),
    [
        ((87.0, 87.1, 87.2), "higher"),
        ((89.0, 89.1, 89.2), "lower"),
        ((87.7, 88.0, 87.7), "undecided"),  # 3.5 times the standard error, but p = 0.074
        ((88.0, 87.0, 89.2), "undecided"),
        ((87.0, 87.1), "too few seeds"),
        ((), "not tested"),
    ],
)
def test_verdicts_follow_the_stated_rule(tmp_path, lrp, verdict):
    for seed in (1, 2, 3):
        put(tmp_path, experiment("short", f"resnet20-lrpet-s{seed}"), 88.0 + 0.1 * seed)
    for seed, value in enumerate(lrp, start=1):
        put(tmp_path, experiment("short", f"resnet20-lrp-s{seed}"), value)
    row = tables.differences(tables.profile_runs("short", tmp_path)).query("pair == 'LRPET − LRP'").iloc[0]
    assert row.verdict == verdict and row.n == len(lrp)


def test_statistics_by_hand():
    d = pd.Series([0.2, 0.4, 0.9])  # mean 0.5, sd √0.13, standard error √(0.13 / 3) = 0.2082, t = 2.402
    assert statistics.half_width(d) == pytest.approx(4.3027 * 0.2082, abs=1e-3)
    p = 1 - 2.402 / (2 + 2.402**2) ** 0.5  # of Student's t with two degrees of freedom
    assert statistics.p_value(d) == pytest.approx(p, abs=1e-4)
    assert statistics.p_value([1.0, 1.0, 1.0]) == 0 and statistics.p_value([0.0, 0.0, 0.0]) == 1
    assert statistics.detectable(d) == pytest.approx(3.264 * 0.13**0.5, abs=1e-3)
    ten = pd.Series([-1.0, 1.0] * 5)
    assert statistics.detectable(ten) == pytest.approx(0.996 * ten.std(), abs=1e-3)  # as in tables of power


def test_holm_adjusts_over_rows_of_three_seeds_alone():
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []
    clear, weak = pd.Series([1.0, 1.1, 1.2]), pd.Series([1.0, 1.2, 1.5])
    words = statistics.Words("above", "below")
    few, none = pd.Series([1.0, 1.1]), pd.Series(dtype=float)
    rows = statistics.decide([clear, weak, -clear, few, none, None], words)
    assert [row["verdict"] for row in rows] == ["above", "above", "below", "too few seeds", "not tested", ""]
    p = [statistics.p_value(d) for d in (clear, weak)]
    assert [row["p_holm"] for row in rows[:2]] == [f"{3 * p[0]:.2g}", f"{p[1]:.2g}"]
    assert [(row["p"], row["n"]) for row in rows[3:]] == [("", 2), ("", 0), ("", "")]
    assert rows[3]["ci95"] == "[+0.41, +1.69]"  # 12.706 · 0.05 on both sides of 1.05
    crowd = statistics.decide([weak] * 5, words)
    assert {row["verdict"] for row in crowd} == {"undecided"}


def test_runs_of_another_configuration_do_not_enter_a_table(tmp_path):
    put(tmp_path, dataclasses.replace(experiment("short", "resnet20-dense-s1"), epochs=17), 99.0)
    assert (
        tables.accuracy_table(tables.profile_runs("short", tmp_path), tables.published()).top1_pct
        == "not run"
    ).all()


COUNTED = [
    r
    for r in tables.cost_table().to_dict("records")
    if r["paper_macs_m"] and r["macs_m"] not in (costs.NOT_HERE, costs.NO_RANKS)
]


@pytest.mark.parametrize("row", COUNTED, ids=lambda r: f"{r['network']}-{r['dataset']}-{r['method']}")
def test_multiply_adds_agree_with_the_published_ones(row):
    bound = (
        0.0095 if row["network"] == "vit" else 0.0033
    )  # the ViT's 174.25 M count something more than Linear layers
    assert float(row["macs_m"]) == pytest.approx(float(row["paper_macs_m"]), rel=bound)


def test_reductions_of_the_searched_ranks_agree_to_the_digit_given():
    table = tables.cost_table()
    searched = table[table.method.str.contains("ranks") & (table.paper_macs_reduction_pct != "")]
    assert len(searched) == 3
    for row in searched.itertuples():
        assert float(row.macs_reduction_pct) == float(row.paper_macs_reduction_pct)


def test_further_rank_lists_and_ratios_of_which_nothing_was_published_save_what_their_names_say():
    further = tables.cost_table().query("paper_source == ''").set_index("method")
    assert len(further) == 9
    for name in ("61.0", "66.2", "79.2"):
        assert further.macs_reduction_pct[f"LRPET, ranks of vgg16-lrpet-{name}"] == name
    assert further[further.network == "resnet50"].macs_reduction_pct.tolist() == ["75.8"]


def test_parameters_agree_when_batchnorm_is_left_out():
    for row in tables.cost_table().itertuples():
        if row.paper_params_m and row.macs_m not in (costs.NOT_HERE, costs.NO_RANKS) and row.network != "vit":
            assert abs(float(row.params_without_bn_m) - float(row.paper_params_m)) <= 0.0051


# ---------------------------------------------------------------- competitors, ablations, claims


def test_total_epochs_and_multiply_adds_stand_beside_every_competitor(tmp_path):
    put(tmp_path, experiment("short", "resnet20-svd-finetune-s1"), 80.0, macs=18_211_456 * 1.019)
    put(tmp_path, experiment("short", "resnet20-narrow-s1"), 80.0, macs=18_211_456 * 0.9)
    table = tables.accuracy_table(tables.profile_runs("short", tmp_path), tables.published()).set_index(
        "method"
    )
    assert table.epochs["dense"] == "16" and table.epochs["SVD, then fine-tuned"] == "16 (8 dense first)"
    assert table.macs_against_lrpet["SVD, then fine-tuned"] == "equal"  # within 2 %
    assert table.macs_against_lrpet["narrow network"] == "-10 %"
    assert table.macs_m["filter pruning"] == "not run"  # which filters go, only training tells


def test_every_experiment_of_a_profile_has_a_name_of_its_own_in_the_tables():
    for profile in ("smoke", "short", "paper"):
        names = [
            (e.config.dataset, e.config.model, label_of(e.config), e.config.prune_ratio, e.config.ranks)
            for e in load_profile(profile).experiments
        ]
        names = [
            name
            for name, e in zip(map(str, names), load_profile(profile).experiments, strict=True)
            if e.config.seed == 1
        ]
        assert len(names) == len(set(names))


CLAIM = {
    "energy transfer helps": "lrp",
    "BN rectification helps": "lrpet-no-bn",
    "beats pruning": "filter-pruning",
}
CLAIM |= {
    "from scratch beats from a trained network": "lrpet-from-trained",
    "beats SVD and re-training": "svd-finetune",
}


@pytest.mark.parametrize(("claim", "other"), CLAIM.items())
@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((87.0, 87.1, 87.2), "holds"),
        ((89.0, 89.1, 89.2), "does not hold"),
        ((88.0, 87.0, 89.2), "undecided"),
        ((87.0, 87.1), "too few seeds"),
        ((), "not tested"),
    ],
)
def test_claims_are_decided_by_the_stated_rule(tmp_path, claim, other, values, verdict):
    for seed in (1, 2, 3):
        put(tmp_path, experiment("short", f"resnet20-lrpet-s{seed}"), 88.0 + 0.1 * seed)
    for seed, value in enumerate(values, start=1):
        config = dataclasses.replace(experiment("short", f"resnet20-{other}-s1"), seed=seed)
        put(tmp_path, config, value)
    table = tables.claims_table(tables.profile_runs("short", tmp_path)).set_index("claim")
    wanted = sum(e.name.startswith(f"resnet20-{other}-s") for e in load_profile("short").experiments)
    if wanted < 3 and len(values) == 3:
        assert (table.verdict[claim], table.n[claim]) == (
            "too few seeds",
            wanted,
        )  # seeds that the profile does not ask for do not count
    else:
        assert (table.verdict[claim], table.n[claim]) == (verdict, len(values))
    assert table.verdict.drop([claim]).isin(["not tested"]).all()


def test_gradients_are_compared_in_the_first_layer_over_recorded_epochs(tmp_path):
    for name, norms in (("lrpet", (1.0, 100.0)), ("lrp", (0.1, 1.0))):
        for seed in (1, 2, 3):
            config = experiment("short", f"resnet20-{name}-s{seed}")
            put(tmp_path, config, 88.0)
            rows = [
                f"{epoch},{layer},{norm * seed * scale},1"
                for epoch, norm in enumerate(norms, 1)
                for layer, scale in (("conv", 1), ("deep", 7))
            ]
            (config.folder(tmp_path) / "gradients.csv").write_text(
                "epoch,layer,gradient_norm,weight_norm\n" + "\n".join(rows)
            )
    row = (
        tables.claims_table(tables.profile_runs("short", tmp_path))
        .set_index("claim")
        .loc["gradients fade less"]
    )
    assert (row.difference, row.n) == ("+1.50", 3)  # (log 10 + log 100) / 2
    assert row.verdict == "holds"


def test_ablations_differ_from_lrpet_in_what_their_question_names_and_nothing_else(tmp_path):
    put(tmp_path, experiment("smoke", "resnet8-lrpet-s1"), 90.0)
    put(tmp_path, experiment("smoke", "resnet8-lrpet-5-epochs-s1"), 88.5)
    table = tables.ablation_table(tables.profile_runs("smoke", tmp_path))
    assert set(table.question) == {question for question in claims.ABLATED if ", LRP" not in question}
    assert (table.groupby("question").verdict.agg(lambda v: (v == "LRPET as it is").sum()) == 1).all()
    assert table.groupby("question").size().to_dict() == {
        "energy transfer × BN rectification": 4,
        "projection interval": 6,
        "prune ratio": 4,
        "from scratch or from a trained network": 2,
        "constant in undoing the BN scale": 3,
        "residual factor": 3,
        "unfolding of k×k weights": 2,
    }
    row = table.set_index("setting").loc["every 5 epochs"]
    assert (row.top1_pct, row.difference, row.n, row.verdict) == ("88.50 (n=1)", "-1.50", 1, "too few seeds")
    assert list(table[table.question == "prune ratio"].setting) == ["0.3", "0.57", "0.7", "0.8"]
    assert "0 of 17 changed settings have three seeds" in tables.summary_of_ablations(table)


def test_a_summary_says_that_others_were_not_run_only_where_some_were_not(tmp_path):
    made = tables.write_tables("short", tmp_path)
    assert "the others say “not run”" in tables.summary_of(made)
    made["accuracy"]["top1_pct"] = "90.00 (n=1)"
    told = tables.summary_of(made).splitlines()[0]
    assert re.fullmatch(r"- (\d+) of \1 experiments have at least one finished run\.", told)


def test_share_of_projections(tmp_path):
    assert tables.projection_share(tables.profile_runs("smoke", tmp_path)).empty
    put(tmp_path, experiment("smoke", "resnet8-lrpet-s1"), 90.0, projections=20, projection_seconds=20.0)
    put(tmp_path, experiment("smoke", "resnet8-dense-s1"), 90.0, projections=0, projection_seconds=0.0)
    table = tables.projection_share(tables.profile_runs("smoke", tmp_path))
    assert (table.method.tolist(), table.share_pct.tolist()) == (["LRPET"], [25.0])


def test_cost_and_origin_of_every_run(tmp_path):
    seconds = {
        "train_seconds": 3000.0,
        "projection_seconds": 300.0,
        "evaluation_seconds": 200.0,
        "recording_seconds": 100.0,
    }
    put(tmp_path, experiment("short", "resnet20-lrpet-s1"), 88.0, **seconds)
    put(
        tmp_path, experiment("short", "resnet20-lrpet-s2"), 88.0, **seconds | {"recording_seconds": None}
    )  # of a run before recording
    runs = tables.profile_runs("short", tmp_path)
    row = tables.replication_cost(runs).set_index("experiment").loc["resnet20-lrpet"]
    assert (row.runs, row.device_hours, row.train_seconds, row.recording_seconds, row.device) == (
        "2 of 3",
        "1.97",
        "3000.0",
        "100.0",
        "d",
    )
    assert tables.replication_cost(runs).set_index("experiment").device_hours["resnet20-lrp"] == "not run"
    origin = tables.provenance(runs)
    assert origin.run_id.tolist() == [
        experiment("short", f"resnet20-lrpet-s{seed}").run_id for seed in (1, 2)
    ]
    assert set(origin.columns) == {"run_id", "commit", "device", "finished", "data_train_sha256"}


def test_headline_has_the_main_rows_and_counts_verdicts(tmp_path, monkeypatch):
    monkeypatch.setenv("LRPET_RESULTS", str(tmp_path))
    put(tmp_path, experiment("short", "resnet20-lrpet-s1"), 88.0)
    text = tables.headline("short")
    assert "LRPET " in text and "88.00 (n=1)" in text and "7 not tested" in text
    assert "narrow" not in text


def test_tables_are_written_as_markdown_and_csv(tmp_path):
    made = tables.write_tables("smoke", tmp_path)
    for name, table in made.items():
        kept = pd.read_csv(tmp_path / "smoke" / "tables" / f"{name}.csv", dtype=str, keep_default_na=False)
        assert kept.columns.tolist() == table.columns.tolist() and len(kept) == len(table)
        assert (tmp_path / "smoke" / "tables" / f"{name}.md").read_text().count("\n") == len(table) + 2


def test_readme_gets_the_tables_it_asks_for(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: smoke accuracy -->\noutdated\n<!-- end -->\nafter\n")
    (text,) = tables.write_pages([readme])
    assert (
        "outdated" not in text
        and "| resnet8" in text
        and text.startswith("before\n")
        and text.endswith("<!-- end -->\nafter\n")
    )
    assert tables.write_pages([readme]) == [text]


def test_readme_may_ask_for_some_columns(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: smoke accuracy: method top1_pct -->\n<!-- end -->\n")
    (text,) = tables.write_pages([readme])
    assert text.splitlines()[1].replace(" ", "") == "|method|top1_pct|"
    assert tables.write_pages([readme]) == [text]


def test_committed_tables_are_up_to_date(tmp_path, monkeypatch):
    monkeypatch.delenv("LRPET_RESULTS")
    copies = [tmp_path / Path(page).name for page in pages.PAGES]
    for copy, page in zip(copies, pages.PAGES, strict=True):
        copy.write_text((PROJECT / page).read_text())
    before = {p: p.read_bytes() for p in (PROJECT / "results").glob("*/tables/*")}
    fresh = tables.write_pages(copies)
    changed = [str(path) for path, content in before.items() if path.read_bytes() != content]
    for path, content in before.items():
        path.write_bytes(content)
    advice = "stale tables: run python -m lrpet tables"
    assert fresh == [(PROJECT / page).read_text() for page in pages.PAGES], advice
    assert not changed, advice


# ---------------------------------------------------------------- the schedule and its control


def test_the_schedule_is_chosen_by_the_mean_of_four_methods_once_all_have_run(tmp_path):
    names = [e.name for e in load_profile("selection").experiments]
    for name in names[:-1]:
        put(tmp_path, experiment("selection", name), 70.0 + 10 * ("0.001-all" in name) * ("dense" in name))
    runs = tables.profile_runs("selection", tmp_path)
    assert (choice.selection_table(runs).chosen == "").all()
    put(tmp_path, experiment("selection", names[-1]), 69.0)
    table = choice.selection_table(tables.profile_runs("selection", tmp_path))
    assert len(table) == 6 and list(table.chosen) == ["chosen", *[""] * 5]
    first, last = table.iloc[0], table.iloc[-1]
    assert (first.weight_decay, first.projection, first["mean"]) == ("0.001 on all", "every epoch", "72.50")
    assert (first.dense, first.narrow, first.lrp, first.lrpet) == ("80.00", "70.00", "70.00", "70.00")
    assert (last.projection, last["mean"]) == ("every 16 iterations", "69.75")


def test_the_profile_scaled_has_the_schedule_that_the_committed_selection_chose():
    table = choice.selection_table(tables.profile_runs("selection", PROJECT / "results"))
    chosen = table[table.chosen == "chosen"].iloc[0]
    config = experiment("scaled", "resnet20-lrpet-s1")
    assert chosen.weight_decay == choice._decay(config)
    assert chosen.projection == "every epoch"
    assert (config.projection_interval, config.projection_unit) == (1, "epoch")


def test_runs_done_twice_are_compared(tmp_path):
    config = experiment("selection", "dense-0.001-all-s1")
    put(tmp_path, config, 80.0)
    put(tmp_path / "repeats", config, 80.5)
    row = choice.repeats_table(tmp_path).iloc[0]
    assert (row.top1_pct, row.again_top1_pct, row.difference) == ("80.00", "80.50", "+0.50")
    assert len(choice.repeats_table(tmp_path / "none")) == 0


def test_energy_transfer_has_a_row_with_its_control_and_one_without_batchnorm(tmp_path):
    for seed in (1, 2, 3):
        put(tmp_path, experiment("scaled", f"resnet20-lrpet-s{seed}"), 85.0 + 0.1 * seed)
        put(tmp_path, experiment("scaled", f"resnet20-lrp-s{seed}"), 84.0 + 0.11 * seed)
        put(tmp_path, experiment("scaled", f"resnet20-lrp-matched-steps-s{seed}"), 85.0 + 0.2 * seed)
    for seed in (1, 2):
        put(tmp_path, experiment("scaled", f"plain20-lrpet-s{seed}"), 54.0)
        put(tmp_path, experiment("scaled", f"plain20-lrp-s{seed}"), 50.0 - seed)
    table = tables.claims_table(tables.profile_runs("scaled", tmp_path)).set_index(["claim", "network"])
    assert table.loc[("energy transfer helps", "resnet20"), "verdict"] == "holds"
    matched = table.loc[("energy transfer helps at equal effective learning rates", "resnet20")]
    assert (matched.difference, matched.verdict) == ("-0.20", "undecided")
    plain = table.loc[("energy transfer helps without BatchNorm", "plain20")]
    assert (plain.difference, plain.n, plain.p, plain.verdict) == ("+5.50", 2, "", "too few seeds")


def test_of_two_ways_from_a_trained_network_the_better_one_is_the_competitor(tmp_path):
    for seed in (1, 2, 3):
        put(tmp_path, experiment("scaled", f"resnet20-lrpet-s{seed}"), 85.0)
        put(tmp_path, experiment("scaled", f"resnet20-lrpet-from-trained-s{seed}"), 80.0 + seed)
        put(tmp_path, experiment("scaled", f"resnet20-lrpet-from-trained-full-rate-s{seed}"), 84.0)
    table = tables.claims_table(tables.profile_runs("scaled", tmp_path)).set_index("claim")
    assert table.loc["from scratch beats from a trained network", "difference"] == "+1.00"


def test_sweeps_of_lrp_are_compared_with_lrp(tmp_path):
    for seed in (1, 2):
        put(tmp_path, experiment("scaled", f"resnet20-lrpet-s{seed}"), 85.0)
        put(tmp_path, experiment("scaled", f"resnet20-lrp-s{seed}"), 84.0)
        put(tmp_path, experiment("scaled", f"resnet20-lrp-16-iterations-s{seed}"), 84.5)
    table = tables.ablation_table(tables.profile_runs("scaled", tmp_path)).set_index("experiment")
    assert table.loc["resnet20-lrp-16-iterations", "difference"] == "+0.50"
    base = table[table.question == "projection interval, LRP"].loc["resnet20-lrp"]
    assert base.verdict == "LRP as it is"


# ---------------------------------------------------------------- what is no run of its own


def test_a_copied_run_is_no_seed(tmp_path):
    root = tmp_path / "results"
    shutil.copytree(PROJECT / "results" / "short" / "runs", root / "short" / "runs")
    before = tables.accuracy_table(tables.profile_runs("short", root), tables.published())
    for part in ("*narrow*", "*lrpet-0.57-s1-1190cc*"):
        folder = next((root / "short" / "runs").glob(part))
        shutil.copytree(folder, f"{folder} (copy)")
        shutil.copytree(folder, root / "short" / "before" / folder.name)
    with pytest.warns(UserWarning, match="is left out") as told:
        runs = tables.profile_runs("short", root)
    assert tables.accuracy_table(runs, tables.published()).equals(before)
    texts = sorted(str(warning.message) for warning in told)
    assert len(texts) == 4
    (root / "repeats").mkdir()
    shutil.copytree(root / "short" / "runs", root / "repeats" / "short" / "runs")
    with pytest.warns(UserWarning, match="is left out") as told:
        assert len(load_runs(root)) == len(runs.folder.dropna())
    assert sorted(str(warning.message) for warning in told) == texts
    assert set(runs.folder.dropna().str.contains("/short/runs/")) == {True}
    assert sum("(copy) is left out: it is a copy of the run" in text for text in texts) == 2
    assert sum(f"the same run is in {root / 'short' / 'runs'}" in text for text in texts) == 2


@pytest.mark.parametrize("config", [None, "{}x", '{"model_type": "bert"}', "[]"])
def test_a_summary_of_something_else_is_left_out_and_named(tmp_path, config):
    put(tmp_path, RunConfig(), 97.0)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "summary.json").write_text('{"loss": 1}')
    if config is not None:
        (tmp_path / "theirs" / "config.json").write_text(config)
    with pytest.warns(UserWarning, match="theirs is left out: its summary.json is of no run of this project"):
        assert load_runs(tmp_path).run_id.tolist() == [RunConfig().run_id]


def test_tables_are_made_without_what_is_damaged_which_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "PAGES", ())
    root, chosen = tmp_path / "results", [e.config for e in load_profile("selection").experiments[:2]]
    for config in chosen:
        put(root, config, 90.0)
        put(root / "repeats", config, 91.0)
    places = [chosen[0].folder(root), chosen[1].folder(root / "repeats"), root / "bench"]
    names = ["summary.json", "config.json", "throughput-resnet18-lrpet-224-gpu.json"]
    places[2].mkdir()
    for place, name in zip(places, names, strict=True):
        (place / name).write_text("{")
    monkeypatch.setenv("LRPET_RESULTS", str(root))
    assert main(["tables"]) == DAMAGED
    told = capsys.readouterr().err
    assert [
        f"{place}{'' if k < 2 else '/' + names[k]} is left out" in told for k, place in enumerate(places)
    ] == [
        True,
        True,
        True,
    ]
    with pytest.warns(Damaged, match="gpu.json is left out"):
        assert load_results() == []
    table = pd.read_csv(root / "selection" / "tables" / "selection.csv")
    assert "90.0" in table.to_string()  # of the other run


def test_links_to_runs_are_followed_once(tmp_path):
    put(tmp_path / "disk", RunConfig(), 97.0)
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    (tmp_path / "results" / "smoke" / "runs").symlink_to(tmp_path / "disk" / "smoke" / "runs")
    (tmp_path / "disk" / "smoke" / "runs" / "loop").symlink_to(tmp_path / "results")
    assert load_runs(tmp_path / "results").run_id.tolist() == [RunConfig().run_id]


def test_pages_are_written_from_the_projects_own_store_alone(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- table: smoke accuracy: method top1_pct -->\n<!-- end -->\n")
    monkeypatch.setattr(pages, "PAGES", (page.name,))
    monkeypatch.setattr(pages, "project_file", lambda name: tmp_path / name)
    before = page.read_text()
    assert main(["tables"]) == 0
    assert "pages are written from results/ only" in capsys.readouterr().out
    assert page.read_text() == before
    assert (tmp_path / "results" / "smoke" / "tables" / "accuracy.md").is_file()
    monkeypatch.setattr(pages, "has_own_results", lambda: True)
    assert main(["tables"]) == 0
    assert "| method" in page.read_text()


def test_a_table_is_shown_for_people():
    """Headers with units, accuracy after the name of the row, nothing twice, no row numbers, – for none."""
    table = pd.DataFrame(
        {
            "network": ["resnet20", "resnet20"],
            "macs_m": [40.55, None],
            "method": ["dense", "LRPET"],
            "paper_top1_pct": ["", "92.1"],
            "top1_pct": [86.82, 86.82],
            "remark": ["", ""],
        }
    )
    shown = tables.show(table)
    assert list(shown.data) == ["method", "top-1, %", "published top-1, %", "MACs, M"]
    assert shown.data.to_numpy().tolist() == [
        ["dense", "86.82", "–", "40.55"],
        ["LRPET", "86.82", "92.1", "–"],
    ]
    html = shown._repr_html_()
    assert "In all rows, network: resnet20." in html
    assert "row_heading" not in html and "<th" in html
    assert "max-width: 960px" in html
    assert repr(shown) == repr(tables.show(table))  # nbval compares it: no address in it


def test_every_column_of_every_table_has_a_header_for_people():
    for file in (PROJECT / "results").glob("*/tables/*.csv"):
        for header in tables.show(pd.read_csv(file, dtype=str).head(1)).data:
            assert not re.search(r"_|[^,] (pct|m|ms|seconds|hours|minutes)$", header), (file, header)


def test_a_task_of_which_nothing_has_finished_is_shown_beside_one_that_has(tmp_path):
    put(tmp_path, experiment("smoke", "resnet8-lrpet-s1"), 90.0)
    assert tables.profile_runs("smoke", tmp_path, "detection").map_pct.isna().all()
    assert {"detection", "segmentation"} <= tables.write_tables("smoke", tmp_path).keys()
