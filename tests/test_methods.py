import pytest
import torch
from helpers import Zoo, randomize_batchnorms

from lrpet import RunConfig, build_model, factorize, project
from lrpet.methods import make_method
from lrpet.pairing import batchnorm_scale


def projected_at(steps, last, **fields):
    method = make_method(build_model("resnet8"), RunConfig(method="lrpet", **fields))
    return [step for step in range(1, last + 1) if method.after_step(step, steps, step == last) is not None]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, [5, 10, 15, 20]),
        ({"projection_interval": 2}, [10, 20]),
        ({"projection_interval": 3}, [15, 20]),  # the last step always
        ({"projection_unit": "iteration", "projection_interval": 7}, [7, 14, 20]),
        ({"projection_unit": "iteration", "projection_interval": 100}, [20]),
    ],
)
def test_projections_follow_the_schedule_and_end_the_training(fields, steps):
    assert projected_at(steps=5, last=20, **fields) == steps


def test_dense_never_acts_and_deploys_the_model_itself():
    model = build_model("resnet8")
    method = make_method(model, RunConfig(method="dense"))
    assert method.after_step(20, 20, True) is None
    assert method.compact() is model
    assert method.ranks == {}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"method": "lrpet"}, {}),
        ({"method": "lrp"}, {"energy_transfer": False}),
        ({"method": "lrpet", "residual": 0.3, "row_eps": 1e-3}, {"residual": 0.3, "row_eps": 1e-3}),
    ],
)
@pytest.mark.parametrize("rectified", [True, False])
def test_configured_settings_reach_the_projection(fields, options, rectified):
    model = randomize_batchnorms(build_model("resnet8"))
    M = model.conv.weight.detach().clone().flatten(1)
    make_method(model, RunConfig(prune_ratio=0.57, bn_rectification=rectified, **fields)).after_step(1, 1, True)
    a = batchnorm_scale(model.bn).flatten() if rectified else None
    assert torch.allclose(model.conv.weight.flatten(1), project(M, 6, row_scale=a, **options), atol=1e-5)


def test_given_ranks_are_used_as_list_and_as_map():
    model = Zoo()
    assert make_method(model, RunConfig(ranks=[1, 2, 3, 4, 5])).ranks == {"square": 1, "pointwise": 2, "tall": 3, "column": 4, "dilated": 5}
    assert make_method(model, RunConfig(ranks={"tall": 3})).ranks == {"tall": 3}
    with pytest.raises(ValueError, match="rank of layer 'tall' .* got 99"):
        make_method(model, RunConfig(ranks={"tall": 99}))


def test_the_compact_network_is_the_factorized_one():
    model = build_model("resnet8").eval()
    method = make_method(model, RunConfig(prune_ratio=0.57))
    method.after_step(1, 1, True)
    compact = method.compact()
    assert [tuple(p.shape) for p in compact.parameters()] == [tuple(p.shape) for p in factorize(model, method.ranks).parameters()]
