"""GaLore, GaLore 2, Lotus, VLoRP and a random control: against formulas, AdamW and other packages."""

import copy
import io
import math
import multiprocessing
import warnings
import zipfile

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrpet.lowrank import truncated_svd
from lrpet.lowrank.gradient_projection import STRATEGIES, GradientProjection, _Item, _items, projection_groups

FORK = multiprocessing.get_context("forkserver")
# Imported once, not by each process.
FORK.set_forkserver_preload(["torch._dynamo", "lrpet.lowrank", "hypothesis", "pytest"])
SHAPES = {"tall": (12, 8), "wide": (8, 12), "square": (9, 9)}
SMALL = {  # a refresh every few steps, for matrices whose sides are multiples of 4
    "galore": {"rank": 3, "every": 3},
    "galore2": {"rank": 3, "every": 3, "oversample": 2},
    "lotus": {"rank": 3, "check": 2, "threshold": 0.9},
    "vlorp": {"rank": 2, "every": 3, "grain": 2},
    "random": {"rank": 3, "every": 3},
}
SUBSPACE = ["galore", "galore2", "lotus", "random"]


def gradients(shape, steps, *, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


def optimizer_of(weight, strategy="galore", **options):
    """Return a weight of its own and an optimizer of it; what is not given is small or has its default."""
    weight = nn.Parameter(weight.clone())
    general = {name: options.pop(name) for name in ("lr", "betas", "eps", "weight_decay") if name in options}
    seed, group = options.pop("seed", 0), {"params": [("layer", weight)], "strategy": strategy}
    return weight, GradientProjection([group | SMALL[strategy] | options], seed=seed, **general)


def advance(weight, optimizer, grads):
    """Take a step for each gradient; return the basis that each one used."""
    bases = []
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        optimizer.step()
        bases.append(optimizer.state[weight].get("basis", torch.empty(0)).clone())
    return bases


def error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def refreshes(weight, optimizer, grads):
    """Return the numbers, from 0, of the steps that made a new basis."""
    steps = []
    for number, grad in enumerate(grads):
        advance(weight, optimizer, [grad])
        if optimizer.state[weight]["since"] == 1:
            steps.append(number)
    return steps


class Net(nn.Module):
    """A convolution, a wide, a tall and a square weight, norms and biases."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.blocks = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.conv(x).mean(dim=(2, 3)))))


def net_and_optimizer(strategy, *, layers="[bc]*", lr=0.01, group=None, **settings):
    torch.manual_seed(3)
    net = Net()
    groups = projection_groups(net, strategy, include=layers, **(SMALL[strategy] | settings))
    return net, GradientProjection(groups, lr=lr, weight_decay=0.1, seed=7, group=group)


def batch(number, rows=8):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(rows, 4, 6, 6, generator=generator)


def loss_of(net, x):
    return net(x).square().mean()


def backward(net, x):
    net.zero_grad()
    loss_of(net, x).backward()


def train(net, optimizer, numbers):
    for number in numbers:
        backward(net, batch(number))
        optimizer.step()


def assert_same_bits(first, second):
    """Compare parameters, and of the optimizers' states every entry."""
    (net, optimizer), (other, other_optimizer) = first, second
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for name, value in state.items():
            there = states[1][number][name]
            assert type(value) is type(there)
            assert torch.equal(value, there) if isinstance(value, torch.Tensor) else value == there, name
            assert not isinstance(value, torch.Tensor) or value.dtype == there.dtype


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- Adam, and Adam in a subspace


def test_a_plain_group_is_adamw():
    start, options = torch.randn(6, 5), {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer, oracle = GradientProjection([ours], **options), torch.optim.AdamW([theirs], **options)
    for grad in gradients((6, 5), 40):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        oracle.step()
    assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("strategy", SUBSPACE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_rank_with_one_basis_is_adam_on_rotated_coordinates(strategy, shape):
    start, K = torch.randn(shape), min(shape)
    forever = {"threshold": 0.0} if strategy == "lotus" else {"every": 10**9}
    weight, optimizer = optimizer_of(start, strategy, rank=K, scale=1.0, lr=0.01, **forever)
    grads = gradients(shape, 40)
    P = advance(weight, optimizer, grads)[0]
    rotate = (lambda X: X @ P) if shape[0] >= shape[1] else (lambda X: P.T @ X)
    rotated = nn.Parameter(rotate(start))
    oracle = torch.optim.Adam([rotated], lr=0.01)
    for grad in grads:
        rotated.grad = rotate(grad)
        oracle.step()
    assert error(rotate(weight.detach() - start), rotated.detach() - rotate(start)) < 1e-5
    assert optimizer.report()[0]["refreshes"] == 1
    plain = nn.Parameter(start.clone())
    other = torch.optim.Adam([plain], lr=0.01)
    for grad in grads:
        plain.grad = grad
        other.step()
    assert error(weight, plain) > 1e-3  # it is not Adam on the weight itself


def test_scale_is_a_learning_rate():
    grads, start = gradients((12, 8), 7), torch.randn(12, 8)
    results = [optimizer_of(start, lr=lr, scale=scale) for lr, scale in ((0.01, 0.25), (0.0025, 1.0))]
    for weight, optimizer in results:
        advance(weight, optimizer, grads)
    assert error(results[0][0], results[1][0]) < 1e-6


@pytest.mark.parametrize("strategy", SMALL)
def test_a_thousand_times_the_gradient_is_the_same_step(strategy):
    # Shapes on which singular values are far apart; a subspace that rounding may turn proves nothing.
    grads, start = [g * torch.arange(8, 0, -1) for g in gradients((12, 8), 8)], torch.randn(12, 8)
    (one, first), (other, second) = (optimizer_of(start, strategy, eps=1e-12) for _ in range(2))
    advance(one, first, grads)
    advance(other, second, [1000 * g for g in grads])
    assert error(one, other) < 1e-5
    assert first.report()[0]["refreshes"] == second.report()[0]["refreshes"] > 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_rotating_the_short_side_rotates_the_result(N, D, rank, seed):
    grads = gradients((N, D), 5, dtype=torch.float64, seed=seed)
    start, K, tall = torch.ones(N, D, dtype=torch.float64), min(N, D), N >= D
    Q = torch.linalg.qr(gradients((K, K), 1, dtype=torch.float64, seed=seed + 1)[0]).Q
    rotate = (lambda X: X @ Q) if tall else (lambda X: Q @ X)
    weight, optimizer = optimizer_of(start, rank=rank, every=100)
    turned, other = optimizer_of(rotate(start), rank=rank, every=100)
    advance(weight, optimizer, grads)
    advance(turned, other, [rotate(g) for g in grads])
    assert error(turned, rotate(weight.detach())) < 1e-5


# --- the bases


@pytest.mark.parametrize("strategy", SUBSPACE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_change_has_at_most_rank_times_bases_and_bases_are_orthonormal(strategy, shape):
    start = torch.randn(shape, dtype=torch.float64)
    weight, optimizer = optimizer_of(start, strategy, rank=2, lr=0.01)
    for grad in gradients(shape, 11, dtype=torch.float64):
        (P,) = advance(weight, optimizer, [grad])
        assert (P.T @ P - torch.eye(2)).abs().max() < 1e-5
        assert (P.gather(0, P.abs().argmax(dim=0, keepdim=True)) > 0).all()
        bases = optimizer.report()[0]["refreshes"]
        assert torch.linalg.matrix_rank(weight.detach() - start, atol=1e-10) <= 2 * bases
    assert bases > 2


def test_a_weight_of_low_rank_stays_so_up_to_the_bases():
    start = torch.randn(24, 5, dtype=torch.float64) @ torch.randn(5, 20, dtype=torch.float64)
    weight, optimizer = optimizer_of(start, rank=3, every=2, weight_decay=0.5)
    advance(weight, optimizer, gradients((24, 20), 8))
    assert torch.linalg.matrix_rank(weight.detach(), atol=1e-10) == 5 + 4 * 3


@pytest.mark.parametrize("strategy", SUBSPACE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_basis_does_not_depend_on_sign_or_scale_of_the_gradient(strategy, shape):
    (grad,) = gradients(shape, 1)
    bases = []
    for factor in (1.0, -1.0, 1e-20, 1e15):
        weight, optimizer = optimizer_of(torch.zeros(shape), strategy)
        bases += advance(weight, optimizer, [factor * grad])
    assert max((P - bases[0]).abs().max() for P in bases) < 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kept_energy_is_that_of_the_leading_singular_values(shape):
    (grad,) = gradients(shape, 1)
    squares = torch.linalg.svdvals(grad.double()).square()
    for strategy in ("galore", "galore2"):  # with r + oversample = K, the randomized one is exact
        sketch = {"oversample": 8} if strategy == "galore2" else {}
        weight, optimizer = optimizer_of(torch.zeros(shape), strategy, **sketch)
        advance(weight, optimizer, [grad])
        assert abs(optimizer.report()[0]["energy"] - squares[:3].sum() / squares.sum()) < 1e-5


def spectrum(N, D):
    """Return a matrix with singular values i^−½."""
    K = min(N, D)
    U, V = (torch.linalg.qr(torch.randn(side, K)).Q for side in (N, D))
    return U * torch.arange(1, K + 1) ** -0.5 @ V.T


def test_randomized_svd_keeps_nearly_the_best_energy():
    grad, kept = spectrum(288, 96), {}
    for iterations in (0, 1, 2):
        weight, optimizer = optimizer_of(
            torch.zeros_like(grad), "galore2", rank=24, oversample=10, iterations=iterations
        )
        advance(weight, optimizer, [grad])
        kept[iterations] = optimizer.report()[0]["energy"]
    s = truncated_svd(grad, 96)[1].square()
    best = (s[:24].sum() / s.sum()).item()
    assert kept[0] < kept[1] < kept[2] <= best
    assert kept[2] > 0.98 * best
    assert kept[1] > 0.96 * best


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_randomized_svd_is_exact_for_a_gradient_of_that_rank(shape):
    grad = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    weights = [optimizer_of(torch.zeros(shape), strategy) for strategy in ("galore", "galore2", "lotus")]
    projectors = [P @ P.T for weight, optimizer in weights for P in advance(weight, optimizer, [grad])]
    assert max((each - projectors[0]).abs().max() for each in projectors) < 1e-4


@pytest.mark.parametrize("strategy", ["galore2", "lotus", "vlorp", "random"])
def test_random_numbers_come_from_the_seed_alone(strategy):
    grads, before = gradients((12, 8), 5), torch.get_rng_state()
    results = {}
    for seed in (1, 1, 2):
        weight, optimizer = optimizer_of(torch.zeros(12, 8), strategy, seed=seed)
        if seed in results:
            torch.manual_seed(99)
            before = torch.get_rng_state()
        advance(weight, optimizer, grads)
        assert seed not in results or torch.equal(results[seed], weight)
        results[seed] = weight
        assert torch.equal(torch.get_rng_state(), before)
    if strategy != "lotus":
        assert not torch.equal(results[1], results[2])


def test_two_layers_and_two_draws_have_different_random_bases():
    weights = [nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    optimizer = GradientProjection([{"params": weights, "strategy": "random", "rank": 2, "every": 1}])
    seen = []
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones(8, 8)
        optimizer.step()
        seen += [optimizer.state[weight]["basis"].clone() for weight in weights]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(seen) for b in seen[:i])


# --- the moments at a new basis


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_carry_rotate_keeps_the_momentum_where_the_subspace_stays(shape):
    tall, K = shape[0] >= shape[1], min(shape)
    U = torch.linalg.qr(torch.randn(K, 3, dtype=torch.float64)).Q  # all gradients lie in its span
    grads = [
        torch.randn(shape[0], 3, dtype=torch.float64) @ U.T
        if tall
        else U @ torch.randn(3, shape[1], dtype=torch.float64)
        for _ in range(2)
    ]
    kept = {}
    for carry in ("keep", "rotate"):
        weight, optimizer = optimizer_of(torch.zeros(shape, dtype=torch.float64), every=1, carry=carry)
        (P,) = advance(weight, optimizer, grads[:1])
        state = optimizer.state[weight]
        before, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        weight.grad = grads[1]
        optimizer.prepare()
        up = (lambda m, P: m @ P.T) if tall else (lambda m, P: P @ m)
        kept[carry] = error(up(state["exp_avg"], state["basis"]), up(before, P))
        C = (P.T @ state["basis"]).square()
        turned = v @ C if tall else C.T @ v
        assert torch.allclose(state["exp_avg_sq"], turned if carry == "rotate" else v)
    assert kept["rotate"] < 1e-10 < 1e-2 < kept["keep"]


def test_carry_reset_starts_bias_correction_again():
    grads = gradients((12, 8), 5)
    weight, optimizer = optimizer_of(torch.zeros(12, 8), carry="reset", every=4)
    advance(weight, optimizer, grads[:4])
    before = weight.detach().clone()
    advance(weight, optimizer, grads[4:])
    fresh, other = optimizer_of(before, carry="reset", every=4)
    advance(fresh, other, grads[4:])
    assert torch.equal(weight, fresh)
    assert optimizer.state[weight]["step"] == 1


# --- Lotus


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_lotus_switches_at_a_multiple_of_check_below_a_bound_for_any_gradients(data):
    check = data.draw(st.integers(1, 7), label="check")
    threshold = data.draw(st.sampled_from([0.15, 0.25, 0.5, 1.0, 2.5]), label="threshold")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    kinds = data.draw(
        st.lists(st.sampled_from(["random", "same", "flip", "zero", "huge"]), min_size=1, max_size=6)
    )
    longest = math.floor(2 / (threshold * check) + 1e-9) * check + check
    base, grads = gradients((4, 6), 1, seed=seed)[0], []
    for number, random in enumerate(gradients((4, 6), 2 * longest + 2, seed=seed + 1)):
        kind = kinds[number % len(kinds)]
        grads.append(
            {"random": random, "same": base, "flip": -base, "zero": 0 * base, "huge": 1e20 * random}[kind]
        )
    weight, optimizer = optimizer_of(
        torch.zeros(4, 6), "lotus", rank=2, check=check, threshold=threshold, oversample=0, iterations=1
    )
    made = refreshes(weight, optimizer, grads)
    assert weight.isfinite().all()
    intervals = [later - earlier for earlier, later in zip(made, made[1:], strict=False)]
    assert intervals
    assert all(interval % check == 0 and check <= interval <= longest for interval in intervals)


def test_lotus_with_one_gradient_switches_at_every_check():
    grad = gradients((8, 12), 1)[0]
    weight, optimizer = optimizer_of(torch.zeros(8, 12), "lotus", check=4, threshold=0.01)
    assert refreshes(weight, optimizer, [grad] * 13) == [0, 4, 8, 12]


def test_lotus_compares_with_the_first_direction_of_the_present_basis():
    weight, optimizer = optimizer_of(torch.zeros(8, 12), "lotus", check=2, threshold=2.0)
    for number, grad in enumerate(gradients((8, 12), 5)):
        (P,) = advance(weight, optimizer, [grad])
        if number % 2 == 0:
            S = P.T @ grad
        assert torch.allclose(optimizer.state[weight]["first"], S / S.norm(), rtol=1e-5, atol=1e-6)


def test_lotus_with_uncorrelated_gradients_switches_above_root_2_by_threshold():
    weight, optimizer = optimizer_of(torch.zeros(64, 64), "lotus", rank=16, check=5, threshold=0.05)
    assert math.sqrt(2) / 0.05 < 30
    assert refreshes(weight, optimizer, gradients((64, 64), 62)) == [0, 30, 60]


def test_lotus_decides_alike_for_larger_gradients_and_counts_zero_ones_as_no_movement():
    grads = gradients((8, 12), 20)
    made = [
        refreshes(*optimizer_of(torch.zeros(8, 12), "lotus", threshold=0.4), [factor * g for g in grads])
        for factor in (1, 1000)
    ]
    assert made[0] == made[1]
    assert len(made[0]) > 2
    for zeros in ([0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]):
        weight, optimizer = optimizer_of(torch.zeros(8, 12), "lotus", check=4, threshold=0.01)
        assert refreshes(weight, optimizer, [z * grads[0] for z in zeros]) == [0, 4, 8]
        assert weight.isfinite().all()


def test_lotus_without_threshold_is_galore_2_without_end():
    grads = gradients((12, 8), 9)
    (one, lotus), (other, galore2) = (
        optimizer_of(torch.zeros(12, 8), "lotus", threshold=0.0),
        optimizer_of(torch.zeros(12, 8), "galore2", every=10**9, oversample=10),
    )
    advance(one, lotus, grads)
    advance(other, galore2, grads)
    assert torch.equal(one, other)


# --- VLoRP


def vlorp_in_float64(weight, grads, bases, *, grain, lr, betas, eps):
    """The authors' rule, written anew."""
    M, (N, D), tall = weight.clone(), weight.shape, weight.shape[0] >= weight.shape[1]
    m, row, col = 0.0, torch.zeros(N, 1, dtype=M.dtype), torch.zeros(1, D, dtype=M.dtype)
    cut = (round(N * grain), round(D / grain)) if tall else (round(N / grain), round(D * grain))

    def back(S, B):
        return (S @ B.T if tall else B @ S).reshape(N, D)

    for t, (G, B) in enumerate(zip(grads, bases, strict=True), start=1):
        S = G.reshape(cut) @ B if tall else B.T @ G.reshape(cut)
        m = betas[0] * m + (1 - betas[0]) * S
        square = back(S, B) ** 2
        row = betas[1] * row + (1 - betas[1]) * square.sum(1, keepdim=True)
        col = betas[1] * col + (1 - betas[1]) * square.sum(0, keepdim=True)
        V = row @ col / row.sum()
        M -= lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * back(m, B) / (V.sqrt() + eps)
    return M


@pytest.mark.parametrize("distribution", ["normal", "sign"])
@pytest.mark.parametrize("grain", [1, 2, 4, 0.5, 0.25])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (8, 8)])
def test_vlorp_is_the_authors_rule_in_float64(shape, grain, distribution):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 15, dtype=torch.float64)
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    weight, optimizer = optimizer_of(
        start, "vlorp", grain=grain, rank=2, every=4, distribution=distribution, **options
    )
    advance(weight, optimizer, grads)
    item = next(_items(optimizer))
    bases = [item.drawn_basis(1 + t // 4) for t in range(15)]
    side = round(min(shape) / grain)
    assert bases[0].shape == (side, 2)
    assert distribution == "normal" or bases[0].abs().sub(math.sqrt(0.5)).abs().max() < 1e-7
    assert error(weight.detach(), vlorp_in_float64(start, grads, bases, grain=grain, **options)) < 1e-10
    assert optimizer.report()[0]["refreshes"] == 4


@pytest.mark.parametrize("grain", [1, 4])
def test_vlorp_is_unbiased_with_the_variance_of_theory(grain):
    """E‖o(S(G)) − G‖²/‖G‖² = (K + c)/(c·r); for c = 1, 4 and c·r = 8, K = 16: 2.125 and 2.5."""
    K = 16
    weight, optimizer = optimizer_of(torch.zeros(K, K), "vlorp", grain=grain, rank=8 // grain)
    item = next(_items(optimizer))
    X = gradients((K, K), 1)[0].reshape(item.frame()[:2])
    B = torch.stack([item.drawn_basis(draw) for draw in range(20_000)])
    back = X @ B @ B.mT
    variance = (back - X).square().sum(dim=(1, 2)).mean() / X.square().sum()
    assert error(back.mean(dim=0), X) < 0.03
    assert variance.item() == pytest.approx((K + grain) / 8, rel=0.03)


def test_vlorp_with_grain_1_projects_rows():
    weight, optimizer = optimizer_of(torch.zeros(12, 8), "vlorp", grain=1, rank=3)
    grad = gradients((12, 8), 1)[0]
    advance(weight, optimizer, [grad])
    B = next(_items(optimizer)).drawn_basis(1)
    assert torch.allclose(optimizer.state[weight]["exp_avg"], 0.1 * grad @ B, rtol=1e-5)


def test_vlorp_with_the_identity_has_adafactors_second_and_adams_first_moment(monkeypatch):
    monkeypatch.setattr(_Item, "drawn_basis", lambda self, draw: torch.eye(4))
    weight, optimizer = optimizer_of(torch.zeros(12, 8), "vlorp", grain=2, rank=4, lr=0.01)
    grads = gradients((12, 8), 12)
    advance(weight, optimizer, grads)
    m, row, col, M = torch.zeros(12, 8), torch.zeros(12), torch.zeros(8), torch.zeros(12, 8)
    for t, G in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * G
        row, col = (0.999 * sums + 0.001 * G.square().sum(dim) for sums, dim in ((row, 1), (col, 0)))
        V = torch.outer(row, col) / row.sum() / (1 - 0.999**t)
        M -= 0.01 * m / (1 - 0.9**t) / V.sqrt()
    assert error(weight.detach(), M) < 1e-5
    assert error(optimizer.state[weight]["exp_avg"].reshape(12, 8), m) < 1e-6


# --- in anyone's loop


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [*((name, torch.float32) for name in SMALL), ("lotus", torch.bfloat16), ("vlorp", torch.bfloat16)],
)
def test_stopping_and_resuming_at_any_step_changes_no_bit(strategy, dtype):
    def start():
        net, optimizer = net_and_optimizer(strategy)
        net.to(dtype)
        return net, optimizer

    def steps(net, optimizer, numbers):
        for number in numbers:
            net.zero_grad()
            loss_of(net, batch(number).to(dtype)).backward()
            optimizer.step()

    whole = start()
    saved = []
    for number in range(7):
        saved.append(through_a_file({"net": whole[0].state_dict(), "optimizer": whole[1].state_dict()}))
        steps(*whole, [number])
    assert all(row["refreshes"] > 2 for row in whole[1].report())
    for number, state in enumerate(saved):
        net, optimizer = start()
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        steps(net, optimizer, range(number, 7))
        assert_same_bits(whole, (net, optimizer))
    tensors = [v for s in whole[1].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    for state in saved[-1]["optimizer"]["state"].values():
        assert all(type(state[name]) is int for name in ("step", "refreshes", "since") if name in state)


@pytest.mark.parametrize("strategy", SMALL)
def test_resuming_between_prepare_and_step_changes_no_bit(strategy):
    whole = net_and_optimizer(strategy)
    train(*whole, range(3))
    backward(whole[0], batch(3))
    whole[1].prepare()
    whole[1].prepare()  # again: nothing is due
    state = through_a_file(whole[1].state_dict())
    net, optimizer = net_and_optimizer(strategy)
    net.load_state_dict(whole[0].state_dict())
    optimizer.load_state_dict(state)
    backward(net, batch(3))
    optimizer.step()
    whole[1].step()
    assert_same_bits(whole, (net, optimizer))


def test_a_loaded_state_is_not_shared_with_where_it_came_from():
    one, other = net_and_optimizer("galore"), net_and_optimizer("galore")
    train(*one, range(2))
    other[1].load_state_dict(one[1].state_dict())
    before = copy.deepcopy(one[1].state_dict())["state"][0]["exp_avg"]
    train(*other, range(2))
    assert torch.equal(one[1].state_dict()["state"][0]["exp_avg"], before)


def test_a_copied_optimizer_goes_on():
    net, optimizer = net_and_optimizer("galore2")
    train(net, optimizer, range(2))
    pair = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 6))
    train(*pair, range(2, 6))
    assert_same_bits((net, optimizer), pair)


@pytest.mark.parametrize("strategy", SMALL)
def test_updates_in_backward_are_the_ordinary_ones(strategy):
    ordinary, layerwise = net_and_optimizer(strategy), net_and_optimizer(strategy)
    schedule = torch.optim.lr_scheduler.StepLR(layerwise[1], 100)
    train(*ordinary, range(7))
    for number in range(7):
        with layerwise[1].in_backward():
            loss_of(layerwise[0], batch(number)).backward()
        schedule.step()
        assert all(p.grad is None for p in layerwise[0].parameters())
    assert_same_bits(ordinary, layerwise)


def test_updates_in_backward_refuse_what_needs_all_gradients():
    net, optimizer = net_and_optimizer("galore")
    for options in ({"pieces": 4}, {"clip": 1.0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"got .*{name}={value}"), optimizer.in_backward(**options):
            pass
    with (
        pytest.raises(ValueError, match=r"\w+: a second gradient in in_backward"),
        optimizer.in_backward(),
    ):
        loss_of(net, batch(0)).backward()
        loss_of(net, batch(1)).backward()
    loss_of(net, batch(0)).backward()  # no hook is left
    assert net.head.weight.grad is not None
    with (
        pytest.raises(ValueError, match="conv.weight has a gradient before in_backward"),
        optimizer.in_backward(),
    ):
        pass


@pytest.mark.parametrize("strategy", SMALL)
def test_four_pieces_are_one_batch(strategy):
    xs, ys, start = gradients((8, 12), 5, seed=1), gradients((8, 8), 5, seed=2), torch.randn(8, 12)
    (whole, optimizer), (pieces, other) = (optimizer_of(start, strategy, lr=0.01) for _ in range(2))
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        ((x @ whole.T) * y).sum().backward()
        optimizer.step()
        other.zero_grad()
        for part, target in zip(x.split(2), y.split(2), strict=True):
            ((part @ pieces.T) * target).sum().backward()
        other.step()
    assert error(pieces.detach(), whole.detach()) < 1e-6
    assert other.state[pieces]["step"] == 5
    assert other.report()[0]["refreshes"] == optimizer.report()[0]["refreshes"]


def test_schedulers_clipping_and_a_closure():
    net, optimizer = net_and_optimizer("galore", lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=True)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, batch(0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
        return loss

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < 0.2 * losses[0]
    again = torch.optim.lr_scheduler.LambdaLR(
        GradientProjection(net.parameters(), lr=torch.tensor(0.1)), lambda t: 0.5
    )
    assert again.optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)


@pytest.mark.parametrize("strategy", SMALL)
def test_a_loop_in_autocast_computes_the_same(strategy):
    grads, results = gradients((12, 8), 4), []
    for enabled in (False, True):
        weight, optimizer = optimizer_of(torch.zeros(12, 8), strategy)
        with torch.autocast("cpu", enabled=enabled):
            advance(weight, optimizer, grads)
        results.append(weight)
    assert torch.equal(*results)


# --- several processes


def in_a_group(rank, folder):
    """Be one of two processes: train each strategy on half of each batch; leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    computed, results = [], {}
    original = _Item.new_basis
    _Item.new_basis = lambda self, draw: computed.append(self.name) or original(self, draw)
    for strategy in SMALL:
        computed.clear()
        net, optimizer = net_and_optimizer(strategy, group=dist.group.WORLD)
        parallel = DistributedDataParallel(net)
        for number in range(7):
            parallel.zero_grad()
            loss_of(parallel, batch(number).chunk(2)[rank]).backward()
            optimizer.step()
        results[strategy] = net.state_dict(), optimizer.state_dict(), sorted(computed), optimizer.report()
    refused = ""
    try:
        with optimizer.in_backward():
            pass
    except ValueError as problem:
        refused = str(problem)
    torch.save((results, refused), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_mean_gradient(tmp_path):
    started = [FORK.Process(target=in_a_group, args=(rank, tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0, 0]
    (first, refused), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "got several processes; use step()" in refused
    for strategy in SMALL:
        net, optimizer = net_and_optimizer(strategy)
        for number in range(7):
            halves = []
            for half in batch(number).chunk(2):
                backward(net, half)
                halves.append([p.grad.clone() for p in net.parameters()])
            for p, a, b in zip(net.parameters(), *halves, strict=True):
                p.grad = a / 2 + b / 2
            optimizer.step()
        for weights, state, _, _ in (first[strategy], second[strategy]):
            other = net_and_optimizer(strategy)
            other[0].load_state_dict(weights)
            other[1].load_state_dict(state)
            assert_same_bits((net, optimizer), other)
        made = sum(row["refreshes"] for row in optimizer.report())
        shares = [len(results[strategy][2]) for results in (first, second)]
        assert sum(shares) == (0 if strategy == "vlorp" else made)  # each basis was computed once
        assert strategy == "vlorp" or min(shares) > 0


# --- the state


def numbers_of(strategy, N, D, rank, grain):
    """The specification's formula."""
    K, L = sorted((N, D))
    if strategy == "vlorp":
        return grain * rank * L + N + D
    return rank * K + (3 if strategy == "lotus" else 2) * rank * L


@pytest.mark.parametrize("strategy", SMALL)
def test_state_bytes_are_the_formula_and_the_bytes_of_the_checkpoint(strategy):
    net, optimizer = net_and_optimizer(strategy)
    assert optimizer.state_bytes() == 0
    train(net, optimizer, range(2))
    rank, grain = SMALL[strategy]["rank"], SMALL[strategy].get("grain", 1)
    shapes = [(8, 36), (24, 8), (8, 24), (8, 8)]
    plain = sum(p.numel() for p in net.parameters()) - sum(N * D for N, D in shapes)
    numbers = sum(numbers_of(strategy, N, D, rank, grain) for N, D in shapes) + 2 * plain
    assert optimizer.state_bytes() == 4 * numbers
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with zipfile.ZipFile(file) as archive:
        stored = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
    assert sum(stored) == optimizer.state_bytes()
    assert all(row["name"].endswith(".weight") and row["note"] == "" for row in optimizer.report())
    assert len(optimizer.report()) == 4


def test_a_quarter_of_the_rank_needs_less_than_half_of_adams_state():
    for strategy in ("galore", "galore2"):
        weight, optimizer = optimizer_of(torch.zeros(48, 192), strategy, rank=12)
        advance(weight, optimizer, gradients((48, 192), 1))
        assert optimizer.state_bytes() <= 0.45 * 2 * 4 * weight.numel()


# --- odd weights and gradients, and errors


@pytest.mark.parametrize("strategy", SMALL)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8), (1, 8), (8, 1), (1, 1), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_odd_weights_and_zero_gradients_stay_finite(strategy, shape, dtype):
    settings = {"rank": 50} | ({"grain": 1} if strategy == "vlorp" else {})
    # With this learning rate an update is larger than the spacing of bfloat16 numbers.
    weight, optimizer = optimizer_of(torch.ones(shape, dtype=dtype), strategy, lr=0.1, **settings)
    zero = torch.zeros(shape)
    advance(weight, optimizer, [zero, zero])
    assert (weight == 1).all()
    advance(weight, optimizer, [*gradients(shape, 4), zero])
    assert weight.isfinite().all()
    assert (weight != 1).any()
    (row,) = optimizer.report()
    assert row["rank"] == min(shape[0], math.prod(shape[1:]))
    assert "rank ≥ short side" in row["note"]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    for value in optimizer.state[weight].values():
        assert not isinstance(value, torch.Tensor) or value.dtype == precise
    if "basis" in optimizer.state[weight]:
        P = optimizer.state[weight]["basis"]
        assert (P.T @ P - torch.eye(P.shape[1])).abs().max() < 1e-5


def test_a_channels_last_convolution_is_updated_like_any():
    grads, start = gradients((8, 4, 3, 3), 5), torch.randn(8, 4, 3, 3)
    one, first = optimizer_of(start)
    other, second = optimizer_of(start.to(memory_format=torch.channels_last))
    advance(one, first, grads)
    advance(other, second, [g.to(memory_format=torch.channels_last) for g in grads])
    assert torch.equal(one, other)


def test_a_parameter_without_gradient_waits():
    weights = [nn.Parameter(torch.zeros(4, 6)) for _ in range(2)]
    optimizer = GradientProjection([{"params": weights, "strategy": "galore", "rank": 2, "every": 2}])
    weights[0].grad = torch.ones(4, 6)
    for _ in range(3):
        optimizer.step()
    weights[1].grad = torch.ones(4, 6)
    optimizer.step()
    assert [row["refreshes"] for row in optimizer.report()] == [2, 1]
    assert [optimizer.state[weight]["step"] for weight in weights] == [4, 1]


@pytest.mark.parametrize("strategy", SMALL)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name_before_anything_changes(strategy, value):
    for earlier in (0, 1):
        net, optimizer = net_and_optimizer(strategy)
        train(net, optimizer, range(earlier))
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        backward(net, batch(9))
        net.blocks[2].weight.grad[1, 1] = value
        with pytest.raises(ValueError, match=r"blocks\.2\.weight: the gradient holds NaN or infinite"):
            optimizer.step()
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), before[0].values(), strict=True)
        )
        assert [row["refreshes"] for row in optimizer.report()] == [earlier] * 4
        assert optimizer.state_dict()["state"].keys() == before[1]["state"].keys()


@pytest.mark.parametrize("strategy", ["galore", "galore2"])
def test_a_finite_gradient_whose_sums_overflow_is_taken(strategy):
    weight, optimizer = optimizer_of(torch.zeros(8, 12), strategy)
    advance(weight, optimizer, [torch.full((8, 12), 1e38)])
    assert optimizer.report()[0]["energy"] == pytest.approx(1)


def test_sparse_and_complex_gradients_are_refused_by_name():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = GradientProjection(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="weight: the gradient is sparse"):
        optimizer.step()
    weight = nn.Parameter(torch.ones(4, 6, dtype=torch.complex64))
    optimizer = GradientProjection([{"params": [("waves", weight)], "strategy": "galore", "rank": 2}])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="waves: the gradient is complex"):
        optimizer.step()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"strategy": "galroe", "rank": 2}, "layer: strategy must be one of galore, .*got 'galroe'"),
        ({"strategy": "galore"}, "layer: rank must be a whole number of 1 or more; got None"),
        ({"strategy": "galore", "rank": 0}, "layer: rank must be .*got 0"),
        ({"strategy": "galore", "rank": True}, "layer: rank must be .*got True"),
        ({"strategy": "galore", "rank": 2.0}, "layer: rank must be .*got 2.0"),
        ({"strategy": "galore", "rank": 2, "every": 0}, "layer: every must be"),
        ({"strategy": "galore", "rank": 2, "scale": math.nan}, "layer: scale must be a positive number"),
        ({"strategy": "galore", "rank": 2, "carry": "turn"}, "layer: carry must be keep, rotate or reset"),
        (
            {"strategy": "galore", "rank": 2, "check": 5},
            "layer: unknown setting check; strategy galore has rank",
        ),
        ({"strategy": "galore2", "rank": 2, "oversample": -1}, "layer: oversample must be"),
        ({"strategy": "lotus", "rank": 2, "every": 5}, "layer: unknown setting every"),
        ({"strategy": "lotus", "rank": 2, "threshold": -0.1}, "layer: threshold must be"),
        ({"strategy": "vlorp", "rank": 2}, "layer: grain must be a positive number; got None"),
        (
            {"strategy": "vlorp", "rank": 2, "grain": 3},
            "layer: grain must divide .* of the 6×4 gradient.*got 3",
        ),
        ({"strategy": "vlorp", "rank": 2, "grain": 0.25}, "layer: grain must divide .*got 0.25"),
        ({"strategy": "vlorp", "rank": 2, "grain": 1, "scale": 1.0}, "layer: unknown setting scale"),
        (
            {"strategy": "vlorp", "rank": 2, "grain": 1, "distribution": "uniform"},
            "layer: distribution must be",
        ),
        ({"rank": 2}, "layer: unknown setting rank; strategy None has none"),
        ({"seed": 1.5}, "layer: seed must be a whole number"),
        ({"lr": -1.0}, "layer: lr must be a number of 0 or more; got -1.0"),
        ({"betas": (0.9, 1.0)}, "layer: betas must be two"),
        ({"eps": -1e-8}, "layer: eps must be"),
        ({"weight_decay": -0.1}, "layer: weight_decay must be"),
    ],
)
def test_bad_settings_are_refused_by_name(group, message):
    with pytest.raises(ValueError, match=message):
        GradientProjection([group | {"params": [("layer", nn.Parameter(torch.ones(6, 4)))]}])


def test_a_vector_cannot_be_projected_and_a_refused_group_is_not_added():
    optimizer = GradientProjection([nn.Parameter(torch.ones(6, 4))])
    with pytest.raises(ValueError, match=r"parameter 1: a weight of shape \(6,\) cannot be projected"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(6)), "strategy": "galore", "rank": 1})
    assert len(optimizer.param_groups) == 1


def test_groups_take_matching_layers_and_leave_the_frozen_out():
    net = Net()
    net.head.bias.requires_grad_(False)
    projected, plain = projection_groups(net, "lotus", include="blocks.*", rank=2, lr=0.5)
    assert [name for name, _ in projected["params"]] == [f"blocks.{i}.weight" for i in (0, 2, 3)]
    assert projected["strategy"] == "lotus"
    assert projected["lr"] == 0.5
    assert len(plain["params"]) == len(list(net.parameters())) - 4
    (only,) = projection_groups(nn.Linear(3, 4, bias=False), "galore", include="*", rank=2)
    assert only["params"][0][0] == "weight"
    with pytest.raises(ValueError, match="include='block.*' matches no trainable"):
        projection_groups(net, "galore", include="block.*", rank=2)


def test_refresh_next_is_due_once_for_every_strategy():
    for strategy in STRATEGIES:
        forever = {"threshold": 0.0} if strategy == "lotus" else {"every": 10**9}
        weight, optimizer = optimizer_of(torch.zeros(8, 12), strategy, **forever)
        grads = gradients((8, 12), 4)
        advance(weight, optimizer, grads[:2])
        optimizer.refresh_next()
        assert refreshes(weight, optimizer, grads[2:3]) == [0]
        advance(weight, optimizer, grads[3:])
        assert optimizer.report()[0]["refreshes"] == 2


# --- other people's packages
# one basis: at most 2.7e-6 and 6.0e-7; 60 steps on 5 bases of galore-torch: 2.1e-7 with ours in their place,
# one basis: at most 2.7e-6 and 6.0e-7; 60 steps on 5 bases of galore-torch: 2.1e-7 with ours in their place,
# 6.9e-6 with its own after our choice of signs, 0.4 to 0.8 with its own as they come.


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name}, an oracle, is not installed")


def against(oracle, shape, steps, **options):
    """Return our weight and an oracle's after the same gradients."""
    start = torch.zeros(shape)  # so that the comparison is of the change alone
    ours, optimizer = optimizer_of(start, lr=0.01, eps=1e-12, scale=0.25, **options)
    theirs = nn.Parameter(start.clone())
    other = oracle(theirs)
    for grad in gradients(shape, steps):
        advance(ours, optimizer, [grad])
        theirs.grad = grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.step()
    return ours.detach(), theirs.detach()


def galore_torch(rank, every):
    module = package("galore_torch")
    group = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    return lambda weight: module.GaLoreAdamW(
        [{"params": [weight]} | group], lr=0.01, eps=1e-12, no_deprecation_warning=True
    )


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_galore_torch_agrees_up_to_the_second_basis(shape, rank):
    oracle = galore_torch(rank, 20)
    assert error(*against(oracle, shape, 20, rank=rank, every=20)) < 1e-5


@pytest.mark.parametrize("own", [False, True], ids=["our bases", "its bases with our signs"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_galore_torch_agrees_beyond_a_refresh(shape, own, monkeypatch):
    oracle = galore_torch(3, 12)
    projector = package("galore_torch.galore_projector").GaLoreProjector
    svd = projector.get_orthogonal_matrix

    def basis(self, grad, rank, type):
        right = type == "right"
        if own:
            P = svd(self, grad, rank, type)
            P = P.T if right else P
            P = P * P.gather(0, P.abs().argmax(dim=0, keepdim=True)).sign()
        else:
            (P,) = advance(*optimizer_of(torch.zeros_like(grad), rank=rank), [grad])
        return P.T if right else P

    monkeypatch.setattr(projector, "get_orthogonal_matrix", basis)
    assert error(*against(oracle, shape, 60, rank=3, every=12)) < (1e-4 if own else 1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pytorch_optimizer_agrees_until_its_first_refresh(shape):
    """Its first refresh comes one step early, since its counter starts at 1."""
    module = package("pytorch_optimizer")
    group = {"rank": 3, "update_proj_gap": 20, "scale": 0.25, "projection_type": "std"}

    def oracle(weight):
        return module.GaLore([{"params": [weight]} | group], lr=0.01, eps=1e-12)

    assert error(*against(oracle, shape, 19, rank=3, every=20)) < 1e-5
