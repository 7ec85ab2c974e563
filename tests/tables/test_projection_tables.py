"""Tables and pictures of gradient projection, from made-up runs."""

import numpy as np
import pandas as pd
import pytest

from lrpet.config import RunConfig
from lrpet.experiments import load_profile
from lrpet.figures import plot_against_memory
from lrpet.registry import TASKS
from lrpet.tables import answers_table, choice_table, profile_runs, projection_table, way_of
from lrpet.tables.gradient_projection import QUESTIONS

MEASURED = {
    "optimizer_state_bytes": 4e6,
    "block_state_bytes": 2e6,
    "gradient_bytes": 3e6,
    "largest_gradient_bytes": 1e5,
    "peak_bytes": 5e7,
    "refresh_peak_bytes": np.nan,
    "update_seconds": 0.004,
    "refresh_update_seconds": np.nan,
    "refreshes": np.nan,
    "steps": 100,
    "macs": 1e6,
    "params": 2e5,
    "dense_macs": 4e6,
}


def made_up(scores, **changes):
    """Rows of profile language with scores by name of experiment; all other runs are not done."""
    runs = profile_runs("language", task="language")
    for name in ("bits_per_byte", *MEASURED):
        runs[name] = np.nan
    runs["device"] = "CPU"
    for stem, values in scores.items():
        which = runs.experiment == f"lm-{stem}"
        runs.loc[which, "bits_per_byte"] = values
        for name, value in (MEASURED | changes.get(stem, {})).items():
            runs.loc[which, name] = value
    return runs


def test_every_question_is_about_rows_that_the_profile_has():
    stems = {e.name.rsplit("-s", 1)[0] for e in load_profile("language").experiments}
    for pair in QUESTIONS.values():
        assert {f"lm-{stem}" for stem in pair} <= stems


def test_rows_have_names_of_their_own_and_three_seeds():
    for task, seeds in (("language", 3), ("classification", 1)):
        runs = profile_runs("language", task=task)
        ways = runs.groupby("experiment").config.agg(lambda configs: way_of(configs.iloc[0]))
        assert ways.is_unique
        assert (runs.groupby("experiment").size() == seeds).all()


def test_at_least_twenty_bases_a_run_and_none_above_the_rank_of_the_result():
    for config in profile_runs("language", task="language").config:
        steps = config.epochs * config.steps_per_epoch
        if config.gradient_interval is not None:
            assert steps / config.gradient_interval >= 20
        if config.method == "lrpet" and config.gradient_rank is not None:
            assert config.gradient_rank <= (1 - config.prune_ratio) * 128


def test_what_is_not_run_says_so():
    table = projection_table(made_up({})).set_index("way")
    assert (table.bits_per_byte == "not run").all() and (table.state_mb == "not run").all()
    assert table.loc["AdamW", "params_m"] == "0.874"  # known without training
    assert (answers_table(made_up({})).verdict == "not tested").all()


def test_a_row_holds_what_was_measured_and_averages_its_refreshes():
    refreshing = {"refresh_peak_bytes": 6e7, "refresh_update_seconds": 0.104, "refreshes": 20.0}
    refreshing |= {"block_state_bytes": 0.5e6}
    runs = made_up({"adamw": [3.0, 3.1, 3.2], "galore": 3.0}, galore=refreshing)
    table = projection_table(runs).set_index("way")
    adam, galore = table.loc["AdamW"], table.loc["GaLore, r = 32, T = 50"]
    assert adam.bits_per_byte.startswith("3.100 [") and adam.seeds == "3 of 3"
    assert (adam.refresh_ms, adam.averaged_ms, adam.block_state_share) == ("", "4.0", "1.00")
    assert (galore.update_ms, galore.refresh_ms, galore.averaged_ms) == ("4.0", "104.0", "24.0")
    assert (galore.block_state_share, galore.refresh_peak_mb) == ("0.25", "60.00")


def test_times_and_peaks_of_two_devices_do_not_share_a_column():
    runs = made_up({"adamw": 3.0, "galore": 3.0}, galore={"device": "a GPU"})
    galore = projection_table(runs).set_index("way").loc["GaLore, r = 32, T = 50"]
    assert (galore.update_ms, galore.peak_mb) == ("other device", "other device")
    assert galore.block_state_share == "1.00"


def test_fewer_bits_are_better():
    runs = made_up({"galore": [3.000, 3.101, 3.202], "random": [3.2, 3.3, 3.4], "adamw": [2.0, 2.1, 2.2]})
    table = answers_table(runs).set_index("question")
    assert table.loc["does the SVD matter", "verdict"] == "better"
    assert table.loc["does the SVD matter", "difference"] == "-0.199"
    assert table.loc["does projecting cost anything", "verdict"] == "worse"


def test_the_smallest_held_out_score_is_chosen_once_all_are_there():
    runs = profile_runs("language-choice", task="language").assign(bits_per_byte=np.nan)
    adam = runs.experiment.str.startswith("adamw")
    runs.loc[adam, "bits_per_byte"] = [3.2, 3.1, 3.3]
    runs.loc[runs.experiment.str.startswith("adafactor"), "bits_per_byte"] = [3.2, 3.1, 3.0]
    runs.loc[runs.experiment == "galore-0.5", "bits_per_byte"] = 3.0
    table = choice_table(runs)
    chosen = table[table.chosen != ""].set_index("way")
    assert chosen.learning_rate.to_dict() == {"AdamW": "0.002", "Adafactor": "0.03"}
    assert chosen.chosen.to_dict() == {"AdamW": "chosen", "Adafactor": "chosen, at an end"}
    assert table.groupby("way", sort=False).size().eq(3).all()


@pytest.mark.parametrize("column", ["optimizer_state_bytes", "params"])
def test_pictures_have_a_point_for_each_way_that_was_run(column):
    figure = plot_against_memory(made_up({"adamw": [3.0, 3.1, 3.2], "lrpet-galore": 3.1}), column)
    (ax,) = figure.axes
    assert {text.get_text() for text in ax.texts} == {"3.100  AdamW", "3.100  LRPET + GaLore"}
    assert ax.get_ylabel() == "bits per byte" and "lower" in ax.get_title(loc="left")
    assert figure.png()
    empty = plot_against_memory(made_up({}), column)
    assert "no run has finished" in [text.get_text() for text in empty.axes[0].texts]


def test_runs_of_two_tasks_are_refused():
    runs = pd.DataFrame({"task": list(TASKS)[:2], "experiment": ["a-b", "a-c"]})
    with pytest.raises(ValueError, match="runs must be of one task"):
        projection_table(runs)


def test_a_cut_row_is_projected_once_and_at_the_end():
    cut = [c for c in profile_runs("language", task="language").config if c.method == "lrp"]
    assert len(cut) == 6
    assert all(c.projection_interval > c.epochs * c.steps_per_epoch for c in cut)
    assert isinstance(cut[0], RunConfig)
