import pytest
import torch
import torch.fx
from torch import nn

from lrpet import build_model
from lrpet.models import DETECTORS, MODELS, SEGMENTERS, TORCHVISION
from lrpet.models.resnet_cifar import Block, CifarResNet
from lrpet.models.vit import Block as VitBlock
from lrpet.models.vit import StochasticDepth
from lrpet.registry import IMAGE_MODELS, TASKS


def test_the_registry_names_the_networks_that_can_be_built():
    named = {"classification": IMAGE_MODELS, "language": ["byte_transformer"]}
    named |= {"detection": DETECTORS, "segmentation": SEGMENTERS}
    assert {*IMAGE_MODELS, "byte_transformer"} == set(MODELS)
    assert {task: set(TASKS[task].models) for task in named} == {task: set(n) for task, n in named.items()}


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("classes", [10, 7])
def test_images_become_logits(name, classes):
    edges = (64,) if name in TORCHVISION else (32, 8) if name.startswith("resnet") else (32,)
    model = build_model(name, classes).eval()
    with torch.no_grad():
        for edge in edges:
            logits = model(torch.rand(2, 3, edge, edge))
            assert logits.shape == (2, classes)
            assert torch.isfinite(logits).all()


COUNTS = {"resnet8": 75_290, "resnet20": 269_722, "resnet56": 853_018, "resnet110": 1_727_962}
COUNTS |= {
    "plain20": 269_034,
    "vgg16": 14_724_042,
    "googlenet": 6_166_250,
    "ghost_resnet56": 438_154,
    "vit": 2_692_426,
}


@pytest.mark.parametrize(("name", "params"), COUNTS.items())
def test_parameter_counts(name, params):
    assert sum(p.numel() for p in build_model(name).parameters()) == params


@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "vgg16", "vit"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "ghost_resnet56")),
    ],
)
def test_compiled_network_is_one_graph_and_computes_the_same(name):
    torch._dynamo.reset()
    model = build_model(name).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_networks_are_traceable_and_the_graph_computes_the_same(name):
    model = build_model(name).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.rand(1, 3, 64, 64) if name in TORCHVISION else torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(name):
    def weights(seed):
        torch.manual_seed(seed)
        return [tensor.clone() for tensor in build_model(name).parameters()]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["resnet21", "ResNet20", "", "__class__"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"model must be one of .*resnet20.*; got {name!r}"):
        build_model(name)


@pytest.mark.parametrize("depth", [2, 9, 21, 0, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2 .*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(16, 16, 1), (16, 32, 2), (32, 64, 2)])
def test_shortcut_of_type_a_by_hand(inputs, outputs, stride):
    block = Block(inputs, outputs, stride).eval()
    nn.init.zeros_(block.bn2.weight)  # silences the convolutions, so that the shortcut remains
    x = torch.rand(2, inputs, 6, 6)
    expected = torch.zeros(2, outputs, 6 // stride, 6 // stride)
    before = (outputs - inputs) // 2
    for channel in range(inputs):
        for row in range(6 // stride):
            for column in range(6 // stride):
                expected[:, before + channel, row, column] = x[:, channel, row * stride, column * stride]
    with torch.no_grad():
        assert torch.equal(block(x), expected)


def test_stages_of_a_cifar_resnet():
    model = build_model("resnet20")
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.rand(2, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    assert not any(module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d))


def test_convolutions_of_vgg_begin_kaiming_normal_by_fan_out():
    weight = next(m.weight for m in build_model("vgg16").modules() if getattr(m, "out_channels", 0) == 512)
    assert weight.shape[1] == 256  # so that fan-in would be another number
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def test_weights_of_googlenet_begin_as_those_of_pytorch_do():
    for conv in (m for m in build_model("googlenet").modules() if isinstance(m, nn.Conv2d)):
        bound = conv.weight[0].numel() ** -0.5  # uniform up to 1/√D
        assert 0.9 * bound < conv.weight.abs().max().item() <= bound


def test_stochastic_depth_leaves_out_a_share_of_the_images_and_nothing_in_evaluation():
    drop, x = StochasticDepth(0.1), torch.ones(4000, 3, 2)
    assert torch.equal(drop.eval()(x), x)
    kept = drop.train()(x)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))  # an image as a whole
    assert 0.08 < (kept[:, 0, 0] == 0).float().mean().item() < 0.12


def test_stochastic_depth_covers_both_branches_of_every_block():
    assert {block.drop.share for block in build_model("vit").blocks} == {0.1}
    x = torch.rand(2, 5, 8)
    assert torch.equal(VitBlock(8, 2, 2, stochastic_depth=1.0)(x), x)
    assert not torch.equal(VitBlock(8, 2, 2, stochastic_depth=0.0)(x), x)


def test_convolutions_begin_kaiming_normal():
    weight = CifarResNet(20).blocks[8].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert abs(weight.mean().item()) < 0.001
