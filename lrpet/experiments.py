"""The experiments of ``experiments.yaml`` as validated configurations with names."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import yaml

from lrpet.config import PROFILES, RunConfig
from lrpet.paths import project_file

__all__ = ["GRADIENT", "MAIN", "OBJECTS", "Experiment", "Profile", "load_profile", "select"]
MAIN = {"cifar10": "01_cifar10", "imagenet": "02_imagenet"}  # a main table → the notebook that shows one run
# profiles that ask something else than the paper: tables of their own, read by 10_gradient_projection
GRADIENT = ("language", "language-choice")
OBJECTS = (
    "voc",
    "scenes",
)  # profiles of boxes and masks alone: tables of their own, 11_detection_segmentation
ENTRIES = {  # of a profile → type, and how the type is told
    "note": (str, "a text"),
    "cost": (str, "a text"),
    "settings": (dict, "a map, as {epochs: 2}"),
    "seeds": (object, ""),  # checked with each experiment, which may have its own
    "experiments": (dict, "a map of names to settings"),
}


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


class _UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # in C ten times as fast
    """A safe loader that refuses a key that stands twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            name = min(map(str, twice))
            raise ValueError(f"the name {name!r} stands twice{node.start_mark}; rename one")
        return super().construct_mapping(node, deep)

    def construct_as_typed(self, node):
        """Refuse a number that YAML reads as another than it looks: 010 as 8, 1:30 as 90, 0x10, 1_0."""
        if re.search(r"[_:xob]|^[-+]?0\d", node.value, re.IGNORECASE):
            raise ValueError(
                f"YAML reads {node.value} as another number{node.start_mark}; write it in decimal digits"
            )
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _number in ("int", "float"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_number}", _UniqueKeys.construct_as_typed)


def load_profile(name: str, path: Path | None = None) -> Profile:
    """Read one profile and validate every configuration in it.

    Args:
        name: of a profile of ``experiments.yaml``.
        path: another file than the project's ``experiments.yaml``.

    Raises:
        ValueError: unknown profile, broken YAML, or a setting that RunConfig refuses; names the experiment.

    >>> load_profile("smoke").experiments[0].name
    'resnet8-dense-s1'
    """
    profile = _read_profile(name, path or project_file("experiments.yaml"))
    by_seed: dict[tuple, list[Experiment]] = {}
    block, seeds_before = 0, None
    for stem, given in profile["experiments"].items():
        settings = _check_experiment(stem, given, profile["settings"], name)
        feeds, seeds = settings.pop("feeds"), settings.pop("seeds", profile["seeds"])
        if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
            raise ValueError(
                f"seeds of experiment {stem!r} of profile {name!r} must be a list of different whole numbers,"
                f" as [1, 2]; got {seeds!r}"
            )
        block += seeds != seeds_before  # neighbours with the same seeds are done together, seed by seed
        seeds_before = seeds
        for seed in seeds:
            try:
                config = RunConfig.from_dict({**settings, "seed": seed, "profile": name})
            except ValueError as error:
                raise ValueError(f"experiment {stem!r} of profile {name!r}: {error}") from error
            by_seed.setdefault((block, seed), []).append(Experiment(f"{stem}-s{seed}", config, feeds))
    experiments = tuple(e for place in sorted(by_seed) for e in by_seed[place])
    return Profile(name, profile["note"], profile["cost"], experiments)


def _read_profile(name: str, path: Path) -> dict:
    """Return the entries of a profile as they stand in the file, each of its type."""
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
    profile = {} if profiles[name] is None else profiles[name]
    if not isinstance(profile, dict):
        raise ValueError(f"profile {name!r} must be a map of {', '.join(ENTRIES)}; got {profile!r}")
    unknown, missing = sorted(profile.keys() - ENTRIES, key=str), sorted(ENTRIES.keys() - profile)
    if unknown:
        raise ValueError(
            f"profile {name!r} has an unknown entry {unknown[0]!r}; allowed are {', '.join(ENTRIES)}"
        )
    if missing:
        raise ValueError(f"profile {name!r} lacks the entry {missing[0]!r}; needed are {', '.join(ENTRIES)}")
    for entry, (kind, wanted) in ENTRIES.items():
        empty = not profile[entry] and entry not in ("settings", "seeds")
        if empty or not isinstance(profile[entry], kind):
            raise ValueError(f"{entry} of profile {name!r} must be {wanted}; got {profile[entry]!r}")
    return profile


def _check_experiment(stem: str, given: dict, settings: dict, name: str) -> dict:
    """Return the settings of one experiment with its profile's, after checking what RunConfig does not."""
    if not isinstance(stem, str) or not re.fullmatch(r"\w[\w.-]*", stem):
        raise ValueError(
            f"the name of an experiment of profile {name!r} must be letters, digits, '-', '_' and '.';"
            f" got {stem!r}; rename it"
        )
    of = f"experiment {stem!r} of profile {name!r}"
    if not isinstance(given, dict):
        raise ValueError(f"{of} must be a map, as {{feeds: cifar10, method: dense}}; got {given!r}")
    settings = {"feeds": None, **settings, **given}
    if not isinstance(settings["feeds"], str):
        raise ValueError(f"feeds of {of} must be the name of the table it is for; got {settings['feeds']!r}")
    for field in {"seed", "profile"} & set(settings):
        raise ValueError(f"{of} must not set {field}; got {settings[field]!r}; seeds and the profile do")
    return settings


def select(profile: Profile, patterns: list[str]) -> list[Experiment]:
    """Return the experiments whose names match a pattern (``*`` and ``?`` as in a shell); no pattern is all.

    Raises:
        ValueError: a pattern that matches nothing.

    >>> [e.name for e in select(load_profile("smoke"), ["resnet8-lrp-s*"])]
    ['resnet8-lrp-s1', 'resnet8-lrp-s2']
    """
    names = [e.name for e in profile.experiments]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            known = ", ".join(names)
            raise ValueError(
                f"no experiment of profile {profile.name!r} is called {pattern!r}; it has {known}"
            )
    chosen = [not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in names]
    return list(compress(profile.experiments, chosen))
