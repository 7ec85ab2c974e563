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


@pytest.mark.parametrize(
    ("cell", "values", "words"),
    [
        ("milestones: list = [10]", {"milestones": 2}, ("must be a list; got 2", "-y 'milestones: [2]'")),
        ("milestones: list = [10]", {"milestones": "[2, 3]"}, ("-y 'milestones: [2, 3]'",)),
        ("row_eps: float = 0.1", {"row_eps": "1e-5"}, ("row_eps must be float", "write 0.00001")),
        ("per_layer: bool = False", {"per_layer": "no"}, ("per_layer must be bool", "write true or false")),
        ("N: int = 64", {"N": 2.5}, ("N must be int; got float 2.5",)),
        ("seed: int = 1", {"seed": -1}, ("seed must be between 0 and",)),
        ("profile: str = 'smoke'", {"profile": "smoky"}, ("profile must be one of smoke, short",)),
    ],
)
def test_values_that_the_cell_does_not_declare_are_refused(cell, values, words):
    allowed = ("milestones", "row_eps", "per_layer", "N", "seed", "profile")
    refused(lambda: check_parameters({"In": [cell]} | values, allowed), *words)


def test_half_and_three_quarters_of_any_number_of_epochs_are_milestones():
    found = {epochs: config_from_parameters({"epochs": epochs}).milestones for epochs in (1, 2, 5, 20, 400)}
    assert found == {1: (), 2: (1,), 5: (2, 3), 20: (10, 15), 400: (200, 300)}
