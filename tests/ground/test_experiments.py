import pytest
import yaml
from helpers import PROFILE_YAML

from lrpet.experiments import load_profile, select
from lrpet.paths import PROJECT

PROFILES = list(yaml.safe_load((PROJECT / "experiments.yaml").read_text(encoding="utf-8")))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "experiments.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", PROFILES)
def test_the_profiles_of_the_project_are_valid(name):
    profile = load_profile(name)
    assert profile.experiments
    names, ids = (
        [get(e) for e in profile.experiments] for get in (lambda e: e.name, lambda e: e.config.run_id)
    )
    assert len(set(names)) == len(names)
    assert len(set(ids)) == len(ids)  # no experiment is another one under a new name
    assert all(e.config.profile == name for e in profile.experiments)
    assert all(isinstance(e.feeds, str) for e in profile.experiments)
    assert all(isinstance(text, str) and text for text in (profile.note, profile.cost))


def test_profiles_share_no_run():
    ids = [e.config.run_id for name in PROFILES for e in load_profile(name).experiments]
    assert len(set(ids)) == len(ids)


def test_settings_and_seeds_of_a_profile_hold_unless_an_experiment_has_its_own(write):
    experiments = load_profile("smoke", write(PROFILE_YAML)).experiments
    assert [e.name for e in experiments] == ["a-s1", "a-s2", "b-s2"]  # seed by seed
    assert [(e.config.method, e.config.seed, e.config.epochs, e.feeds) for e in experiments] == [
        ("dense", 1, 2, "x"),
        ("dense", 2, 2, "x"),
        ("lrp", 2, 2, "x"),
    ]


def test_neighbours_with_the_same_seeds_are_done_seed_by_seed(write):
    text = (
        PROFILE_YAML
        + "    c: {feeds: x, method: lrpet}\n    d: {feeds: y, method: narrow, prune_ratio: 0.5}\n"
    )
    assert [e.name for e in load_profile("smoke", write(text)).experiments] == [
        "a-s1",
        "a-s2",
        "b-s2",
        "c-s1",
        "d-s1",
        "c-s2",
        "d-s2",
    ]


def test_the_paper_runs_begin_with_all_seeds_of_its_main_comparison():
    names = [e.name for e in load_profile("paper").experiments]
    mains = [
        f"resnet56-{method}-s{seed}"
        for seed in (1, 2, 3)
        for method in ("dense", "lrp", "lrpet", "lrpet-no-bn")
    ]
    assert names[:12] == mains
    then = [
        "resnet56-lrpet-0.54",
        "vgg16-lrpet",
        "resnet110-lrpet",
        "resnet56-svd-finetune",
        "resnet56-lrp-no-bn",
        "vit-lrpet",
        "googlenet-lrpet",
    ]
    then = [f"{name}-s1" for name in then]
    assert sorted(then, key=names.index) == then


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], ["a-s1", "a-s2", "b-s2"]),
        (["a-s1"], ["a-s1"]),
        (["*-s2"], ["a-s2", "b-s2"]),
        (["b*", "a-s?"], ["a-s1", "a-s2", "b-s2"]),
        (["b-s2", "b-s2"], ["b-s2"]),
    ],
)
def test_patterns_choose_in_the_order_of_the_profile(write, patterns, names):
    assert [e.name for e in select(load_profile("smoke", write(PROFILE_YAML)), patterns)] == names
