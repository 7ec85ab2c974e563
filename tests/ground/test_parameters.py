import dataclasses

import pytest
from helpers import refused

from lrpet import RunConfig
from lrpet.parameters import check_parameters, config_from_parameters


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda field: field.name)
def test_any_field_can_be_overridden(field):
    values = (
        {"prune_ratio": None, "ranks": [6, 6, 6, 6, 6, 6, 6]}
        if field.name == "ranks"
        else {field.name: getattr(RunConfig(), field.name)}
    )
    assert getattr(config_from_parameters(values), field.name) == getattr(RunConfig(**values), field.name)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("# Parameters\nprune_ration = 0.7", ("'prune_ration'", "did you mean 'prune_ratio'?")),
        ("# Parameters\nxyz = 1", ("'xyz'", "it has prune_ratio, seed")),
        ("seed: int = 1\nprune_ration: float = 0.7", ("'prune_ration'", "did you mean 'prune_ratio'?")),
    ],
)
def test_unknown_names_are_refused(cell, words):
    refused(lambda: check_parameters({"In": ["", cell]}, ("prune_ratio", "seed")), *words)


@pytest.mark.parametrize(
    "cell",
    [
        "# Parameters\nseed = 2",
        "x = 1",
        "import lrpet",
        "seed = 1\nrun = f(seed)",
        "!ls",
        "%matplotlib inline\nxyz = 1",
        "",
    ],
)
def test_other_cells_are_left_alone(cell):
    check_parameters({"In": [cell]}, ("prune_ratio", "seed"))


def test_values_are_checked_too():
    refused(
        lambda: config_from_parameters({"learning_rate": "1e-4"}), "learning_rate", "float", "write 0.0001"
    )
