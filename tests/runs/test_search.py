import dataclasses
from importlib import import_module
from types import SimpleNamespace

import optuna
import pytest

from lrpet import RunConfig, build_model, cost
from lrpet.runs.search import (
    compare_final,
    fitness,
    group_layers,
    ranks_from_group_ratios,
    search,
    trials_table,
)
from lrpet.runs.store import Run

BRIEF = RunConfig(epochs=2, milestones=[], validation_fraction=0.2)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def pretend(log):
    """Return a stand-in for a run: accuracy falls with the ranks, and is reported epoch by epoch."""

    def do_run(config, *, on_epoch=None, **_):
        log.append(config)
        model = build_model(config.model)
        share = sum(config.ranks.values()) / sum(
            min(m.weight.shape[0], m.weight[0].numel()) for m in map(model.get_submodule, config.ranks)
        )
        for epoch in (1, 2):
            if on_epoch is not None:
                on_epoch({"epoch": epoch, "top1_pct": 50 + 40 * share})
        summary = {
            "top1_pct": 50 + 40 * share,
            "compact_top1_pct": 50 + 40 * share,
            "macs": int(1e6 * share),
            "dense_macs": 10**6,
        }
        return Run(config, summary, None, None, {}, None)

    return do_run


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_study_resumes_where_it_stopped_and_never_scores_on_the_test_set(tmp_path, sampler):
    log = []
    search(BRIEF, 3, sampler=sampler, results=tmp_path, do_run=pretend(log))
    study = search(BRIEF, 5, sampler=sampler, results=tmp_path, do_run=pretend(log))
    assert len(study.trials) == len(log) == 5
    assert all(config.validation_fraction == 0.2 for config in log)
    assert len({config.seed for config in log}) == 1
    assert (
        search(BRIEF, 5, sampler=sampler, results=tmp_path, do_run=pretend(log)).trials[4].number == 4
        and len(log) == 5
    )


def test_the_best_trial_has_the_least_fitness_and_keeps_its_ranks(tmp_path):
    study = search(BRIEF, 6, results=tmp_path, do_run=pretend([]))
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert study.best_value == min(t.value for t in done)
    assert study.best_trial.user_attrs["ranks"] == ranks_from_group_ratios(
        build_model("resnet8"), study.best_params
    )


def test_pareto_front_by_brute_force(tmp_path):
    table = trials_table(search(BRIEF, 6, objectives=2, results=tmp_path, do_run=pretend([])))
    for row in table.itertuples():
        others = table.drop(row.Index)
        beaten = (
            (others.top1_pct >= row.top1_pct)
            & (others.macs <= row.macs)
            & ((others.top1_pct > row.top1_pct) | (others.macs < row.macs))
        ).any()
        assert row.pareto == (not beaten)
    assert table.pareto.any()


def test_bad_trials_are_given_up_early(tmp_path):
    log = []
    study = search(BRIEF, 16, results=tmp_path, do_run=pretend(log))
    assert any(t.state == optuna.trial.TrialState.PRUNED for t in study.trials)


def test_multiply_adds_are_counted_at_the_size_of_the_images(monkeypatch, tmp_path):
    small = dataclasses.replace(BRIEF, dataset="imagefolder", image_size=64, model="resnet18")
    study = search(small, 1, objectives=2, results=tmp_path, do_run=pretend([]))
    ranks = study.trials[0].user_attrs["ranks"]
    counted = cost(build_model("resnet18"), (3, 64, 64), ranks)
    assert study.trials[0].values[1] == counted.macs / counted.dense_macs
    budgets = []
    module = import_module("lrpet.runs.search")
    summary = {"macs": 1, "top1_pct": 2}
    monkeypatch.setattr(module, "run", lambda config, **_: Run(config, summary, *[None] * 4))
    monkeypatch.setattr(module, "load_network", lambda _: None)
    monkeypatch.setattr(module, "ranks_for_budget", lambda _, *given, **__: budgets.append(given) or ranks)
    best = SimpleNamespace(best_trial=study.trials[0])
    assert len(compare_final(best, small, epochs=1)) == 3
    assert budgets == [((3, 64, 64), 1 - counted.macs / counted.dense_macs)] * 2


def test_a_study_that_is_only_read_stays_as_it_is(tmp_path):
    search(BRIEF, 2, results=tmp_path, do_run=pretend([]))
    (journal,) = (tmp_path / BRIEF.profile / "search").glob("*.journal")
    before = journal.read_bytes()
    assert len(search(BRIEF, 2, results=tmp_path).trials) == 2
    assert journal.read_bytes() == before


@pytest.mark.slow
def test_workers_share_one_study(tmp_path):
    study = search(BRIEF, 4, results=tmp_path, workers=2)
    done = [t for t in study.trials if t.state.is_finished()]
    assert 4 <= len(done) <= 5  # a worker may have begun its last trial when the other finished the fourth
    assert len({tuple(t.params.values()) for t in done}) == len(done)


def test_groups_cover_each_layer_once():
    model = build_model("resnet20")
    for per_layer in (False, True):
        names = [name for group in group_layers(model, per_layer).values() for name in group]
        assert len(names) == len(set(names)) == 19


def test_fitness_by_hand():
    assert fitness(
        {"top1_pct": 80, "compact_top1_pct": 79, "macs": 1, "dense_macs": 4}, weight=2.0
    ) == pytest.approx(-1.59 + 0.5)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="validation_fraction"):
        search(dataclasses.replace(BRIEF, validation_fraction=0.0), 1, results=tmp_path)
    with pytest.raises(ValueError, match="sampler"):
        search(BRIEF, 1, sampler="grid", results=tmp_path)
