"""Ranks for a latency, with clocks that do not run: every time is made up."""

import math

import pytest
import torch
from torch import nn

from lrpet import build_model, cost, factorize, ranks_for_latency
from lrpet.deploy import latency
from lrpet.deploy.latency import Option, allocate, plan_latency
from lrpet.deploy.meters import Meter, TorchMeter, _apart, _runs_of_trace
from lrpet.deploy.programs import layer_in
from lrpet.lowrank import fold_batchnorm

RANKS = list(range(4, 64, 4))


class FakeMeter(Meter):
    """Time follows rank; layers of "columns" are faster, and the profile may be off by a factor."""

    def __init__(self, layers, *, rank_ms=0.1, dense_ms=10.0, rest_ms=2.0, profile_off=1.0):
        super().__init__(layers, 1, torch.device("cpu"))
        self.times = (rank_ms, dense_ms, rest_ms, profile_off)
        self.profiles, self.compared = 0, []

    def task(self, choice):
        raise AssertionError("nothing is run here")

    def _layer(self, name, choice):
        rank_ms, dense_ms, *_ = self.times
        if name not in choice:
            return dense_ms / 1e3
        rank, how = choice[name]
        return rank * rank_ms / 1e3 * (0.8 if how == "columns" else 1.0)

    def profile(self, choice):
        self.profiles += 1
        return {name: self.times[3] * self._layer(name, choice) for name in self.layers}

    def compare(self, choices):
        self.compared.append(choices)
        return [self.times[2] / 1e3 + sum(self._layer(n, c) for n in self.layers) for c in choices]


def problem(names, flat=()):
    """Return ranks and energies of layers of 64 singular values: falling ones, or all alike."""
    ways = {name: {"rows": RANKS, "columns": RANKS} for name in names}
    energies = {}
    for name in names:
        values = torch.ones(64) if name in flat else torch.logspace(0, -4, 64)
        share = (values / values.sum()).cumsum(0).tolist()
        energies[name] = {"rows": share, "columns": [0.9 * s for s in share]}
    return ways, energies


def test_the_speedup_is_met_and_energy_is_spent_where_it_counts():
    ways, energies = problem("abcd", flat="a")
    plan = plan_latency(FakeMeter("abcd"), ways, energies, 2.0, "fake")
    assert plan.measured == pytest.approx(2.0, rel=0.05) and plan.predicted == pytest.approx(plan.measured)
    ranks = {layer.name: layer.rank or 64 for layer in plan.layers}
    assert ranks["a"] > max(ranks[name] for name in "bcd")
    assert set(plan.ranks) == {layer.name for layer in plan.layers if layer.rank}
    assert set(plan.unfolding.values()) <= {"rows", "columns"}
    for row in plan.trade:
        assert math.isnan(row["uniform"]) or row["allocated"] >= row["uniform"] - 1e-9
    assert "2.00" in str(plan) and "uniform" in str(plan)


def test_a_profile_that_is_off_is_corrected_end_to_end():
    meter = FakeMeter("abcdefgh", profile_off=0.6, rest_ms=0.0)
    plan = plan_latency(meter, *problem("abcdefgh"), 2.5, "fake")
    assert plan.measured == pytest.approx(2.5, rel=0.05)
    assert len(meter.compared) > 2


def test_the_impossible_names_the_most_after_a_second_profile():
    meter = FakeMeter("ab", rank_ms=0.3)
    with pytest.raises(ValueError, match=r"speedup 8 cannot be reached in fake: the most is 5\.61"):
        plan_latency(meter, *problem("ab"), 8.0, "fake")
    once = FakeMeter("ab")
    plan_latency(once, *problem("ab"), 3.0, "fake")
    assert meter.profiles == 2 * once.profiles


def test_what_is_slower_than_dense_stays_dense_and_says_so():
    meter = FakeMeter("ab", rank_ms=4.0)
    with pytest.warns(UserWarning, match="nothing is faster than the dense network"):
        plan = plan_latency(meter, *problem("ab"), 1.5, "fake")
    assert plan.ranks == {} and plan.measured == 1.0 and plan.energy_kept == 1.0
    assert plan.trade == []


def test_the_faster_unfolding_is_taken_where_it_keeps_as_much():
    ways, energies = problem("abcd")
    energies = {name: {"rows": how["rows"], "columns": how["rows"]} for name, how in energies.items()}
    plan = plan_latency(FakeMeter("abcd"), ways, energies, 2.0, "fake")
    assert set(plan.unfolding.values()) == {"columns"}
    kept = plan_latency(FakeMeter("abcdefgh"), *problem("abcdefgh"), 2.0, "fake").unfolding
    assert "rows" in kept.values()


def test_the_allocation_is_the_best_of_all_within_the_time():
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(3, 3, 2, generator=generator).tolist()
    options = {
        f"{i}": [Option(None, "rows", 1.0, 1.0), *(Option(16, "rows", e, t) for e, t in some)]
        for i, some in enumerate(draw)
    }
    chosen = allocate(options, 1.6)
    best = max(
        a.energy + b.energy + c.energy
        for a in options["0"]
        for b in options["1"]
        for c in options["2"]
        if a.seconds + b.seconds + c.seconds <= 1.6
    )
    assert sum(o.seconds for o in chosen.values()) <= 1.6
    assert sum(o.energy for o in chosen.values()) >= 0.9 * best
    assert sum(o.seconds for o in allocate(options, 0.0).values()) == sum(
        min(o.seconds for o in some) for some in options.values()
    )


def test_a_network_is_planned_through_pytorch_with_batchnorms_and_batches(monkeypatch):
    class Counted(TorchMeter):
        """Multiply-adds for time."""

        def _seconds(self, choice):
            variant = self._variant(choice)
            counted = cost(variant, (3, 16, 16))
            return {
                n: sum(r.macs for r in counted.layers if f"{r.name}.".startswith(f"{n}."))
                for n in self.layers
            }

        def profile(self, choice):
            super().profile(choice)  # runs
            return self._seconds(choice)

        def compare(self, choices):
            for choice in choices:
                self.task(choice)()
            return [sum(self._seconds(choice).values()) for choice in choices]

    made = []

    def make(runtime, network, inputs, layers, threads):
        made.append((runtime, inputs.shape, threads, network))
        return Counted(network, inputs, layers, threads)

    monkeypatch.setattr(latency, "make_meter", make)
    torch.manual_seed(0)
    model, x = build_model("resnet8"), torch.randn(2, 3, 16, 16)
    plan = ranks_for_latency(model, x, 1.5, "eager", threads=1, batch=3, multiple_of=4)
    runtime, shape, threads, network = made[0]
    assert (runtime, shape, threads) == ("eager", (3, 3, 16, 16), 1)
    assert len(network.folded_batchnorms) == 7
    assert all(rank % 4 == 0 for rank in plan.ranks.values())
    compact = factorize(model.eval(), plan.ranks, unfolding=plan.unfolding)
    counted = cost(model, (3, 16, 16)).macs / cost(compact, (3, 16, 16)).macs
    assert counted == pytest.approx(1.5, rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"speedup": 1.0}, "speedup"),
        ({"runtime": "tensorrt"}, "runtime must be one of openvino"),
        ({"threads": 0}, "threads"),
        ({"batch": 0}, "batch"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"include": "nothing"}, "no layer"),
    ],
)
def test_refusals_name_the_argument(arguments, word):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match=word):
        ranks_for_latency(model, torch.ones(1, 3, 8, 8), **{"runtime": "eager"} | arguments)


def test_traces_and_counters_of_runtimes_are_read():
    names = ["conv1", "conv2"]
    node = {"cat": "Node", "dur": 100}
    events = [{**node, "name": "fused L1@3_kernel_time"}, {**node, "name": "L0@1_nchwc_kernel_time"}]
    end = {"cat": "Session", "name": "model_run", "dur": 1}
    runs = _runs_of_trace([*events, {**node, "name": "ReorderInput"}, end, *events, end], names)
    assert runs == [{"conv2": 1e-4, "conv1": 1e-4}] * 2
    assert _apart([{"a": 9.0}, {"a": 5.0}, {"a": 4.0}]) == [{"a": 1.0}, {"a": 2.0}]
    assert layer_in("x_abcd_acdb_L1@4/WithoutBiases", names) == "conv2"


@pytest.mark.parametrize("unfolding", ["rows", "columns"])
def test_variants_of_the_onnx_program_run_and_have_the_shapes_of_the_factors(unfolding):
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from lrpet.deploy.programs import LayeredProgram, onnxruntime_session, onnxruntime_task

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.tokens, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
            return self.head(self.tokens(x).mean(1))

    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    program = LayeredProgram(fold_batchnorm(model, {}), x, ["conv", "tokens", "head"])
    assert program.layers == ["conv", "tokens", "head"]
    dense = onnxruntime_task(onnxruntime_session(program.variant({}), 1), program.feeds)()
    torch.testing.assert_close(torch.from_numpy(dense[0]), model(x).detach(), rtol=1e-4, atol=1e-5)
    choice = {"conv": (2, unfolding), "tokens": (3, "rows"), "head": (4, "rows")}
    variant = program.variant(choice)
    assert onnxruntime_task(onnxruntime_session(variant, 1), program.feeds)()[0].shape == (1, 5)
    sizes = sorted(tuple(w.dims) for w in onnx.load_from_string(variant).graph.initializer if len(w.dims) > 1)
    first = [(2, 3, 3, 3), (8, 2, 1, 1)] if unfolding == "rows" else [(2, 3, 1, 1), (8, 2, 3, 3)]
    assert set(first) <= set(sizes)
    assert onnxruntime.__version__
