"""The experiments of ``experiments.yaml`` as validated configurations with names."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lrpet.config import PROFILES, RunConfig
from lrpet.paths import PROJECT

__all__ = ["MAIN", "Experiment", "Profile", "load_profile", "select"]
MAIN = {
    "cifar10": "01_cifar10",
    "imagenet": "02_imagenet",
}  # what an experiment of a main table feeds → the notebook that shows one run


@dataclass(frozen=True)
class Experiment:
    """One run that a profile asks for: its name, its configuration and the table it feeds."""

    name: str  # as "resnet20-lrpet-s1"
    config: RunConfig
    feeds: str


@dataclass(frozen=True)
class Profile:
    """A profile: what its numbers mean, what it costs, and its experiments in the order they are run."""

    name: str
    note: str
    cost: str
    experiments: tuple[Experiment, ...]


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(
                f"the name {sorted(map(str, twice))[0]!r} stands twice{node.start_mark}; rename one"
            )
        return super().construct_mapping(node, deep)


def load_profile(name: str, path: Path | None = None) -> Profile:
    """Read one profile and validate every configuration in it.

    Args:
        name: smoke, short, paper, imagenette or imagenet.
        path: another file than the project's ``experiments.yaml``.

    Raises:
        ValueError: unknown profile, broken YAML, or a setting that RunConfig refuses; names the experiment.

    >>> load_profile("smoke").experiments[0].name
    'resnet8-dense-s1'
    """
    path = path or PROJECT / "experiments.yaml"
    try:
        profiles = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ValueError(
            f"experiments must be a file that can be read; got {path}: {error.strerror}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(profiles, dict) or name not in list(profiles) or name not in PROFILES:
        known = ", ".join(map(str, profiles)) if isinstance(profiles, dict) else "none"
        raise ValueError(f"profile must be one of those in {path.name} ({known}); got {name!r}")
    profile = profiles[name]
    if not isinstance(profile or {}, dict):
        raise ValueError(
            f"profile {name!r} must be a map of note, cost, settings, seeds, experiments; got {profile!r}"
        )
    entries = {"note", "cost", "settings", "seeds", "experiments"}
    unknown, missing = set(map(str, profile or ())) - entries, entries - set(profile or ())
    if unknown:
        raise ValueError(
            f"profile {name!r} has an unknown entry {sorted(unknown)[0]!r}; allowed are note, cost, settings, seeds, experiments"
        )
    if missing:
        raise ValueError(
            f"profile {name!r} lacks the entry {sorted(missing)[0]!r}; needed are note, cost, settings, seeds, experiments"
        )
    for entry, kind in (("note", str), ("cost", str), ("settings", dict), ("experiments", dict)):
        if not isinstance(profile[entry], kind) or (not profile[entry] and entry != "settings"):
            wanted = (
                "a text"
                if kind is str
                else "a map, as {epochs: 2}"
                if entry == "settings"
                else "a map of names to settings"
            )
            raise ValueError(f"{entry} of profile {name!r} must be {wanted}; got {profile[entry]!r}")
    by_seed: dict[tuple, list[Experiment]] = {}
    block, seeds_before = 0, None
    for stem, settings in profile["experiments"].items():
        if not isinstance(stem, str) or not re.fullmatch(r"\w[\w.-]*", stem):
            raise ValueError(
                f"the name of an experiment of profile {name!r} must be letters, digits, '-', '_' and '.'; got {stem!r}; rename it"
            )
        if not isinstance(settings, dict):
            raise ValueError(
                f"experiment {stem!r} of profile {name!r} must be a map, as {{feeds: cifar10, method: dense}}; got {settings!r}"
            )
        settings = {**profile["settings"], **settings}
        feeds, seeds = settings.pop("feeds", None), settings.pop("seeds", profile["seeds"])
        if not isinstance(feeds, str):
            raise ValueError(
                f"feeds of experiment {stem!r} of profile {name!r} must be the name of the table it is for; got {feeds!r}"
            )
        if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
            raise ValueError(
                f"seeds of experiment {stem!r} of profile {name!r} must be a list of different whole numbers, as [1, 2]; got {seeds!r}"
            )
        block, seeds_before = (
            block + (seeds != seeds_before),
            seeds,
        )  # neighbours of the same seeds are done seed by seed, together
        for given in {"seed", "profile"} & set(settings):
            raise ValueError(
                f"experiment {stem!r} of profile {name!r} must not set {given}; got {settings[given]!r}; seeds and the profile do"
            )
        for seed in seeds:
            try:
                config = RunConfig.from_dict({**settings, "seed": seed, "profile": name})
            except ValueError as error:
                raise ValueError(f"experiment {stem!r} of profile {name!r}: {error}") from error
            by_seed.setdefault((block, seed), []).append(Experiment(f"{stem}-s{seed}", config, feeds))
    return Profile(
        name, profile["note"], profile["cost"], tuple(e for place in sorted(by_seed) for e in by_seed[place])
    )


def select(profile: Profile, patterns: list[str]) -> list[Experiment]:
    """Return the experiments whose names match any pattern (``*`` and ``?`` as in a shell); no pattern is all.

    Raises:
        ValueError: a pattern that matches nothing.

    >>> [e.name for e in select(load_profile("smoke"), ["resnet8-lrp-s*"])]
    ['resnet8-lrp-s1', 'resnet8-lrp-s2']
    """
    names = [e.name for e in profile.experiments]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no experiment of profile {profile.name!r} is called {pattern!r}; it has {', '.join(names)}"
            )
    return [
        e for e in profile.experiments if not patterns or any(fnmatch.fnmatch(e.name, p) for p in patterns)
    ]
