import pytest
import torch
from torch import nn

from lrpet import RunConfig
from lrpet.training.bfloat16 import Bfloat16Products
from lrpet.training.step import Step


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.Linear(16, 10),
    )


def gradients(model, x, products):
    model.zero_grad()
    with products:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_products_in_float32_are_those_of_bfloat16_up_to_the_order_of_their_sums():
    model, x = network(), torch.randn(4, 3, 12, 12)
    exact = gradients(model, x, torch.autocast("cpu", enabled=False))
    for ours, native in zip(gradients(model, x, Bfloat16Products()), exact, strict=True):
        assert ours.dtype == native.dtype
        assert torch.linalg.vector_norm((ours - native).float()) < 0.01 * torch.linalg.vector_norm(
            native.float()
        )


def test_factors_are_rounded_and_other_dtypes_left_alone():
    x = torch.tensor([[1 + 2**-7, 2**-9]]).bfloat16()
    with Bfloat16Products():
        assert torch.equal(x @ x.mT, (x.float() @ x.float().mT).bfloat16())
        fine = torch.tensor([[1 + 2**-12]])
        assert torch.equal(fine @ fine, fine * fine)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_step_takes_them_only_where_the_cpu_lacks_its_own(monkeypatch, precision, fast):
    entered = []
    monkeypatch.setattr("lrpet.training.step.has_bfloat16_products", lambda device: fast)
    monkeypatch.setattr(
        "lrpet.training.step.Bfloat16Products", lambda: entered.append(1) or Bfloat16Products()
    )
    model = network()
    step = Step(
        RunConfig(precision=precision),
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.zeros(3, dtype=torch.float64),
    )
    step.backward(torch.randn(4, 3, 12, 12), torch.zeros(4).long(), torch.zeros(4).long())
    assert bool(entered) == (precision == "bf16" and not fast)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
