from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrpet import build_model, factorize
from lrpet.lowrank.batchnorm import batchnorm_scale, find_batchnorms, resolve_batchnorms
from lrpet.lowrank.factors import ConstantOutput


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class OutOfOrder(nn.Module):
    """Registers its modules in another order than it runs them; all widths are equal."""

    def __init__(self):
        super().__init__()
        self.bn_of_last = nn.BatchNorm2d(4)
        self.middle, self.first = conv(), conv()
        self.bn_of_first = nn.BatchNorm2d(4)
        self.last = conv()
        self.bn_of_middle = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(self.bn_of_first(self.first(x)))
        x = F.relu(self.bn_of_middle(self.middle(x)))
        return self.bn_of_last(self.last(x))


class Module(nn.Module):
    """Two convolutions, two BatchNorms and a forward of one's own."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.bn, self.bn2 = conv(), conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def branching(m, x):
    x = m.bn(m.a(x))
    return m.bn2(m.b(x)) if x.sum() > 0 else x  # torch.fx cannot follow


UNTRACEABLE_PAIRS = {"a": "bn", "b": "bn2"}


def test_pairs_follow_the_graph_and_not_the_order_of_registration():
    pairs = find_batchnorms(OutOfOrder())
    assert pairs == {"first": "bn_of_first", "middle": "bn_of_middle", "last": "bn_of_last"}
    assert list(pairs) == ["first", "middle", "last"]  # order of execution
    assert resolve_batchnorms(OutOfOrder(), ["middle"]) == {"middle": "bn_of_middle"}


@pytest.mark.parametrize(
    ("forward", "of_a"),
    [
        (lambda m, x: m.bn(m.a(x)), "bn"),
        (lambda m, x: m.bn(F.relu(m.a(x))), None),
        (lambda m, x: m.bn(m.a(x) + x), None),
        (lambda m, x: m.bn(m.a(x).contiguous()), None),
        (lambda m, x: m.bn(m.b(m.a(x))), None),
        (lambda m, x: m.a(x), None),
    ],
    ids=["direct", "relu between", "sum between", "method between", "convolution between", "output"],
)
def test_only_a_batchnorm_right_after_a_convolution_counts(forward, of_a):
    assert find_batchnorms(Module(forward))["a"] == of_a


def test_identity_between_is_looked_through():
    assert find_batchnorms(nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(4))) == {"0": "2"}


def output_used_twice(m, x):
    y = m.a(x)
    return m.bn(y) + y


def two_batchnorms_on_one_output(m, x):
    y = m.a(x)
    return m.bn(y) + m.bn2(y)


def batchnorm_shared(m, x):
    return m.bn(m.b(m.bn(m.a(x))))


def convolution_shared(m, x):
    return m.bn2(m.a(m.bn(m.a(x))))


@pytest.mark.parametrize(
    "forward", [output_used_twice, two_batchnorms_on_one_output, batchnorm_shared, convolution_shared]
)
def test_what_cannot_be_merged_is_no_pair(forward):
    assert set(find_batchnorms(Module(forward)).values()) == {None}


def test_a_module_under_two_names_is_shared():
    model = nn.Sequential(layer := conv(), nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4))
    assert set(find_batchnorms(model).values()) == {None}


def test_linear_layers_and_constant_outputs_are_paired_too():
    model = nn.Sequential(
        ConstantOutput(torch.zeros(4), (3, 3), (1, 1), (1, 1), (1, 1)),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 6),
    )
    model.append(nn.BatchNorm1d(6))
    assert find_batchnorms(model) == {"0": "1", "3": "4"}


def test_resnet18_with_its_downsampling_branches():
    pairs = find_batchnorms(build_model("resnet18"))
    assert pairs["layer2.0.downsample.0"] == "layer2.0.downsample.1"
    assert pairs.pop("fc") is None
    assert len(pairs) == 20
    for name, bn in pairs.items():
        assert bn == (name[:-1] + "1" if "downsample" in name else name.replace("conv", "bn"))


def test_an_untraceable_model_is_refused_with_advice():
    with pytest.raises(
        ValueError, match=r"torch\.fx cannot trace Module .*Pass batchnorms=.*or switch BN rectification off"
    ):
        find_batchnorms(Module(branching))


def test_stated_pairs_serve_an_untraceable_model():
    assert resolve_batchnorms(Module(branching), ["b", "a"], UNTRACEABLE_PAIRS) == {"b": "bn2", "a": "bn"}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"a": "bn2", "b": "bn2"}, ["'a'", "'bn2'", "'bn'"]),
        ({"a": None, "b": "bn2"}, ["'a'", "None", "'bn'"]),
        ({"b": "bn2"}, ["'a'", "says nothing"]),
    ],
)
def test_a_stated_pair_that_the_graph_contradicts_is_refused_with_both_names(stated, words):
    model = Module(lambda m, x: m.bn2(m.b(m.bn(m.a(x)))))
    with pytest.raises(ValueError) as caught:
        resolve_batchnorms(model, ["a", "b"], stated)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"a": "nothing"}, ["'a'", "'nothing'", "not a BatchNorm"]),
        ({"a": "b"}, ["'a'", "'b'", "not a BatchNorm"]),
        ({"nothing": "bn"}, ["'nothing'", "not a layer"]),
        ({"bn2": "bn"}, ["'bn2'", "not a layer"]),
    ],
)
def test_stated_names_that_mean_nothing_are_refused_without_a_graph_as_well(stated, words):
    with pytest.raises(ValueError) as caught:
        resolve_batchnorms(Module(branching), list(stated), stated)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("stated", [None, {"0": "1"}])
def test_a_batchnorm_of_another_width_is_refused_with_both_names(stated):
    with pytest.raises(ValueError, match=r"layer '0' has 4 outputs, but its BatchNorm '1' has 6 features"):
        resolve_batchnorms(nn.Sequential(conv(), nn.BatchNorm2d(6)), ["0"], stated)


def test_a_batchnorm_without_running_statistics_is_refused_with_both_names():
    with pytest.raises(ValueError, match=r"BatchNorm '1' after layer '0' keeps no running statistics"):
        resolve_batchnorms(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), ["0"])


def test_batchnorm_scale_is_what_eval_mode_multiplies_with():
    plain, affine = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, eps=0.01)
    nn.init.normal_(affine.weight)
    for bn in (plain, affine):
        bn.running_var.uniform_(0.1, 3)
        bn.eval()
        one, zero = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
        assert torch.allclose(
            (bn(one) - bn(zero)).flatten().double(), batchnorm_scale(bn).flatten(), rtol=1e-5
        )


@pytest.mark.parametrize(("stride", "padding"), [*product((1, 2, 3), (0, 2, (0, 2), "valid")), (1, "same")])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), ((5, 1), 1), (3, (2, 1))])
def test_constant_output_has_the_size_and_the_values_of_a_convolution_with_zero_weight(
    stride, padding, kernel, dilation
):
    layer = nn.Conv2d(3, 5, kernel, stride, padding, dilation)
    nn.init.zeros_(layer.weight)
    compact = factorize(nn.Sequential(layer), [1])
    assert isinstance(compact[0], ConstantOutput)
    x = torch.randn(2, 3, 13, 16)
    assert torch.equal(compact(x), layer(x))


def test_constant_output_may_be_written_to():
    layer = ConstantOutput(torch.tensor([-1.0, 2.0]), (1, 1), (1, 1), (0, 0), (1, 1))
    for _ in range(2):
        with torch.no_grad():
            out = layer(torch.zeros(1, 3, 1, 1)).relu_()  # as torchvision's networks do
        assert out.flatten().tolist() == [0.0, 2.0]
    assert layer.bias.tolist() == [-1.0, 2.0]
