import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Zoo
from torch import nn

from lrpet import LowRankProjector, build_model, ranks_from_ratio
from lrpet.gradients import gradient_norms, norm_product_bound, operator_norm


def images(n=4, edge=8, classes=10):
    return torch.randn(n, 3, edge, edge), torch.randint(classes, (n,))


def chain(*matrices):
    """A linear network: 1×1 convolutions on images of one pixel."""
    layers = []
    for M in matrices:
        layers.append(nn.Conv2d(M.shape[1], M.shape[0], 1, bias=False))
        layers[-1].weight = nn.Parameter(M[..., None, None])
    return nn.Sequential(*layers, nn.Flatten())


def test_a_linear_chain_by_hand():
    A, B, C = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4, 5), (6, 4)))
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(6, (7,))
    h1, h2 = x @ A.mT, x @ A.mT @ B.mT
    g3 = (torch.softmax(h2 @ C.mT, 1) - F.one_hot(y, 6)) / 7  # ∂L/∂logits of the mean cross-entropy
    g2, g1 = g3 @ C, g3 @ C @ B
    table = gradient_norms(chain(A, B, C), x[..., None, None], y)
    assert table.layer.tolist() == ["0", "1", "2"]
    assert table.output_gradient_norm.tolist() == pytest.approx([g.norm().item() for g in (g1, g2, g3)])
    assert table.gradient_norm.tolist() == pytest.approx(
        [(g.mT @ h).norm().item() for g, h in ((g1, x), (g2, h1), (g3, h2))]
    )
    assert table.weight_norm.tolist() == pytest.approx([M.norm().item() for M in (A, B, C)])


def test_a_relu_in_place_changes_nothing_and_no_trace_is_left():
    x, y = images()
    tables = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 10, 3), nn.ReLU(inplace), nn.Conv2d(10, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        tables.append(gradient_norms(model, x, y))
        assert all(p.grad is None for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
    assert tables[0].equals(tables[1])


def test_weights_gradients_are_those_of_backward():
    model, (x, y) = build_model("resnet8"), images()
    table = gradient_norms(model, x, y).set_index("layer")
    F.cross_entropy(model(x), y).backward()
    assert len(table) == 7
    for name, row in table.iterrows():
        assert row.gradient_norm == pytest.approx(
            model.get_submodule(name).weight.grad.norm().item(), rel=1e-4
        )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("edge", [2, 4, 6])
@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_operator_norm_against_the_matrix_written_out(mode, edge, dilation, stride):
    if dilation > edge:
        pytest.skip("torch pads circularly by no more than the image")
    layer = nn.Conv2d(3, 5, 3, stride, dilation, dilation, bias=False, padding_mode=mode).double()
    basis = torch.eye(3 * edge * edge, dtype=torch.float64).view(-1, 3, edge, edge)
    with torch.no_grad():
        exact = torch.linalg.matrix_norm(layer(basis).flatten(1), 2).item()
    norm = operator_norm(layer, (edge, edge))
    if mode == "circular":
        assert norm == pytest.approx(exact, rel=1e-6)
    else:
        assert exact <= norm * (1 + 1e-9)
        assert norm <= 3 * torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() * (
            1 + 1e-9
        )  # the usual bound sqrt(k·k)·‖M‖₂


def test_an_uneven_kernel_and_image():
    layer = nn.Conv2d(2, 3, (5, 1), padding=(2, 0), bias=False, padding_mode="circular").double()
    with torch.no_grad():
        exact = torch.linalg.matrix_norm(
            layer(torch.eye(48, dtype=torch.float64).view(-1, 2, 6, 4)).flatten(1), 2
        ).item()
    assert operator_norm(layer, (6, 4)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, stride=3, padding=1, padding_mode="circular"),
    ],
)
def test_a_convolution_of_another_kind_is_refused(layer):
    with pytest.raises(
        ValueError, match=r"layer must be padded with zeros, or circularly .*divides \(8, 8\); got Conv2d"
    ):
        operator_norm(layer, (8, 8))


@pytest.mark.parametrize(("seed", "edge"), [(0, 8), (1, 8), (0, 32)])
@pytest.mark.parametrize("method", ["dense", "lrp", "lrpet"])
def test_the_bound_holds_for_the_plain_network(seed, edge, method):
    torch.manual_seed(seed)
    model, (x, y) = build_model("plain20"), images(edge=edge)
    if method != "dense":
        LowRankProjector(model, ranks_from_ratio(model, 0.57), method == "lrpet").step()
    table = gradient_norms(model, x, y)
    bound = norm_product_bound(model, x)
    assert bound.index.tolist() == table.layer.tolist()
    assert (
        table.output_gradient_norm.to_numpy()
        <= bound.to_numpy() * table.output_gradient_norm.iloc[-1] * (1 + 1e-5)
    ).all()


def test_the_bound_is_met_where_nothing_is_lost():
    rotations = [torch.linalg.qr(torch.randn(6, 6))[0] * size for size in (2.0, 3.0, 0.5)]
    model, x, y = chain(*rotations), torch.randn(5, 6, 1, 1), torch.randint(6, (5,))
    table, bound = gradient_norms(model, x, y), norm_product_bound(model, x)
    assert bound.tolist() == pytest.approx([1.5, 0.5, 1.0], rel=1e-5)
    assert table.output_gradient_norm.tolist() == pytest.approx(
        (bound * table.output_gradient_norm.iloc[-1]).tolist(), rel=1e-5
    )


def test_the_plain_network_neither_shrinks_nor_blows_up_what_goes_through():
    x, _ = images(64)
    sizes = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = build_model("plain20")
        with torch.no_grad():
            sizes.append(math.log(model.features(x).square().mean().item()))
    assert (
        abs(sum(sizes) / len(sizes)) < 1.5
    )  # nineteen layers; with zeros around the image it falls by exp(-6)


def test_layers_come_in_the_order_of_execution():
    table = gradient_norms(Zoo(), torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    assert table.layer.tolist() == ["square", "pointwise", "tall", "column", "dilated"]
