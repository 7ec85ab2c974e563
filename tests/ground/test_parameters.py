import dataclasses

import pytest

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
    "cell",
    ["# Parameters\nprune_ration = 0.7", "# Parameters\nxyz = 1", "seed: int = 1\nprune_ration: float = 0.7"],
)
def test_unknown_names_are_refused(cell):
    with pytest.raises(ValueError, match="is not a parameter"):
        check_parameters({"In": ["", cell]}, ("prune_ratio", "seed"))


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
    with pytest.raises(ValueError, match="learning_rate must be float.*0.0001"):
        config_from_parameters({"learning_rate": "1e-4"})
