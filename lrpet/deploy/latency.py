"""Ranks for a latency: measured in the runtime that the network is for, layer by layer in its place."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from lrpet.deploy.export import batch_size, is_batched
from lrpet.deploy.meters import RUNTIMES, Choice, Meter, make_meter
from lrpet.lowrank.arguments import check, is_number, is_whole
from lrpet.lowrank.batchnorm import fold_batchnorm, resolve_batchnorms
from lrpet.lowrank.budget import energy_shares
from lrpet.lowrank.layers import UNFOLDINGS, unwrap
from lrpet.lowrank.ranks import Choice as Layers
from lrpet.lowrank.ranks import check_multiple, compressible_layers
from lrpet.lowrank.table import LayerTable

__all__ = [
    "LatencyLayer",
    "LatencyPlan",
    "Option",
    "OutOfReach",
    "allocate",
    "plan_latency",
    "ranks_for_latency",
]
CANDIDATES = 8  # uniform ones that are profiled, for each unfolding
CORRECTIONS = 8  # measurements end to end, at most
TOLERANCE = 0.05  # of the speed-up that is asked for
TRADE = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # speed-ups of which the table tells the price


class OutOfReach(ValueError):
    """A speed-up that no ranks reach; the text names the largest that was measured."""


@dataclass(frozen=True)
class Option:
    """What a layer may become: its rank and unfolding, the share of energy kept, and its time in place."""

    rank: int | None  # None: dense
    unfolding: str
    energy: float  # Σ_{i≤R} s_i² / E of diag(a)·M, 0 to 1
    seconds: float


@dataclass(frozen=True)
class LatencyLayer:
    """One layer of a :class:`LatencyPlan`; times are of the profile, in milliseconds."""

    name: str
    rank: int | None  # None: dense
    unfolding: str
    energy_kept: float
    dense_ms: float
    ms: float


@dataclass(frozen=True, eq=False)
class LatencyPlan(LayerTable):
    """Ranks for a latency, and what was measured; it prints as two tables.

    ``ranks`` and ``unfolding`` are for :class:`lrpet.Compressor` and :func:`lrpet.factorize`; they are empty
    where nothing is faster than the dense network.
    """

    layers: tuple[LatencyLayer, ...]
    asked: float
    predicted: float  # speed-ups: dense by compact time, 1 for the dense plan
    measured: float
    dense_ms: float
    ms: float  # measured end to end
    runtime: str
    trade: list[dict[str, float]] = field(default_factory=list)  # speedup, allocated, uniform: energy kept

    @property
    def ranks(self) -> dict[str, int]:
        """Layer name → R, of the layers that become factors."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    @property
    def unfolding(self) -> dict[str, str]:
        """Layer name → "rows" or "columns", of the same layers."""
        return {layer.name: layer.unfolding for layer in self.layers if layer.rank is not None}

    @property
    def energy_kept(self) -> float:
        """The share of energy that a layer keeps, on average."""
        return statistics.fmean(layer.energy_kept for layer in self.layers)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the header, then what is shown of each layer."""
        table = [("layer", "rank", "unfolding", "energy kept", "dense ms", "ms")]
        for layer in self.layers:
            rank, how = ("dense", "") if layer.rank is None else (str(layer.rank), layer.unfolding)
            times = (f"{layer.dense_ms:.3f}", f"{layer.ms:.3f}")
            table.append((layer.name, rank, how, f"{layer.energy_kept:.4f}", *times))
        return table

    def footer(self) -> str:
        """Return the times, and which energy is kept at which speed-up, allocated and uniform."""
        lines = [
            f"{self.runtime}: {self.dense_ms:.2f} ms dense, {self.ms:.2f} ms so, {self.measured:.2f} times "
            f"as fast (asked {self.asked:.2f}, predicted {self.predicted:.2f}); energy kept "
            f"{self.energy_kept:.4f}",
            "predicted speed-up  energy kept, allocated  uniform",
        ]
        for row in self.trade:
            uniform = "–" if math.isnan(row["uniform"]) else f"{row['uniform']:.4f}"
            lines.append(f"{row['speedup']:<18.2f}  {row['allocated']:<22.4f}  {uniform}")
        return "\n".join(lines if self.trade else lines[:1])


def ranks_for_latency(
    model: nn.Module,
    example_inputs: Any,
    speedup: float = 2.0,
    runtime: str = "openvino",
    *,
    threads: int | None = None,
    batch: int | None = None,
    multiple_of: int = 16,
    include: Layers | None = None,
    exclude: Layers = (),
    batchnorms: Mapping[str, str | None] | None = None,
) -> LatencyPlan:
    """Return the ranks and unfoldings with which a network runs so many times as fast, and keeps most energy.

    The dense network is brought to the runtime once; layers of it are swapped for factors of random weights.
    Some uniform candidates are profiled, which gives the time of each layer in its place at each rank. Of all
    ranks and unfoldings those are chosen that keep the largest share of the energy of diag(a)·M, the weight
    as BatchNorm scales it, within the time. The result is measured end to end beside the dense network, and
    corrected until the speed-up is within 5 %.

    Args:
        model: a network that has been trained, at least briefly: the energies are those of its weights.
        example_inputs: a tensor or a tuple of tensors, as in use.
        speedup: times as fast as the dense network, above 1.
        runtime: "openvino", "onnxruntime", "eager" or "compile", where the network will run. The first two
            are on the CPU; the others where the model is.
        threads: that one inference may use; None for as many as PyTorch has.
        batch: repeat the rows of the inputs to so many; None for as many as there are.
        multiple_of: what every rank is a multiple of.
        include, exclude: which layers may take part, as for :func:`lrpet.select`.
        batchnorms: layer name → BatchNorm name or None; None to read them off a run.

    Returns:
        A :class:`LatencyPlan`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.
        OutOfReach: the speed-up cannot be reached; it names the largest. It is a ValueError, too.
        ImportError: a package is missing.

    Warns:
        UserWarning: nothing is faster than the dense network, or 5 % was missed.

    >>> net = nn.Sequential(nn.Conv2d(16, 128, 3), nn.Conv2d(128, 128, 3)).eval()
    >>> plan = ranks_for_latency(net, torch.ones(1, 16, 24, 24), 1.3, "eager")  # doctest: +SKIP
    >>> compact = lrpet.factorize(net, plan.ranks, unfolding=plan.unfolding)  # doctest: +SKIP
    """
    wanted = "speedup is how many times as fast as the dense network, above 1"
    check(wanted, speedup, is_number(speedup), lambda speedup: 1 < speedup < math.inf)
    check(
        f"runtime must be one of {', '.join(RUNTIMES)}",
        runtime,
        isinstance(runtime, str),
        RUNTIMES.__contains__,
    )
    check_multiple(multiple_of)
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in {"threads": threads, "batch": 1 if batch is None else batch}.items():
        check(f"{name} must be a whole number of 1 or more", value, is_whole(value), lambda value: value >= 1)
    model = unwrap(model)
    inputs = example_inputs if batch is None else _rebatched(example_inputs, batch)
    shapes = {how: compressible_layers(model, include, exclude, how) for how in UNFOLDINGS}
    if not shapes["rows"]:
        raise ValueError(
            f"{type(model).__name__} has no layer to compress whose name include= and exclude= allow"
        )
    pairs = resolve_batchnorms(model, shapes["rows"], batchnorms, example_inputs)
    folded = fold_batchnorm(model, batchnorms, example_inputs=None if batchnorms else example_inputs)
    meter = make_meter(runtime, folded, inputs, list(shapes["rows"]), threads)
    ways, energies = {}, {}
    for how in UNFOLDINGS:
        shares = energy_shares(model, pairs, dict.fromkeys(pairs, how))
        for name in meter.layers:
            if how == "rows" or shapes[how][name] != shapes["rows"][name]:
                ways.setdefault(name, {})[how] = _ranks(shapes[how][name], multiple_of)
                energies.setdefault(name, {})[how] = np.cumsum(shares[name])
    return plan_latency(meter, ways, energies, float(speedup), runtime)


def _rebatched(inputs: Any, batch: int) -> Any:
    count = batch_size(inputs)
    if count is None:
        raise ValueError("batch must be None where the first tensor of example_inputs has no rows to repeat")
    rows = torch.arange(batch) % count
    return tree_map(lambda x: x[rows.to(x.device)] if is_batched(x, count) else x, inputs)


def _ranks(shape: tuple[int, int], multiple_of: int) -> list[int]:
    """Return the ranks that a layer may have: the multiples whose factors are smaller than itself."""
    N, D = shape
    return list(range(multiple_of, (N * D - 1) // (N + D) + 1, multiple_of))


def plan_latency(
    meter: Meter,
    ways: Mapping[str, Mapping[str, Sequence[int]]],
    energies: Mapping[str, Mapping[str, Sequence[float]]],
    speedup: float,
    runtime: str,
) -> LatencyPlan:
    """Do what :func:`ranks_for_latency` does, for any meter.

    Args:
        meter: times variants.
        ways: layer → unfolding → ranks that it may have, ascending.
        energies: layer → unfolding → share of energy kept at rank 1, 2, ….
        speedup: what is asked for.
        runtime: its name, for the plan.

    Raises:
        OutOfReach: the speed-up cannot be reached.
    """
    profile = _Profile(meter, ways)
    options = profile.options(energies)
    dense = meter.compare([{}])[0]
    if profile.rest(dense) + sum(_fastest(o).seconds for o in options.values()) > dense / speedup:
        profile = _Profile(meter, ways, profile)  # before it is called impossible
        options = profile.options(energies)
    rest = profile.rest(dense)
    tried = _approach(meter, options, rest, dense, speedup)
    dense, now, chosen = min(tried, key=lambda one: abs(math.log(one[0] / one[1] / speedup)))
    reached = dense / now
    if reached <= 1:
        warnings.warn(
            f"nothing is faster than the dense network in {runtime}: the best that was tried is "
            f"{reached:.2f} times as fast; the plan leaves every layer dense",
            stacklevel=3,
        )
        chosen, now, reached = {name: _dense(some) for name, some in options.items()}, dense, 1.0
    elif _most(tried) < speedup * (1 - TOLERANCE):
        raise OutOfReach(
            f"speedup {speedup:g} cannot be reached in {runtime}: the most is {_most(tried):.2f}, measured; "
            "ask for less, let more layers take part, or choose another runtime"
        )
    elif abs(reached / speedup - 1) > TOLERANCE:
        warnings.warn(f"{reached:.2f} times as fast is as close to {speedup:g} as it came", stacklevel=3)
    full = rest + sum(_dense(some).seconds for some in options.values())
    predicted = full / (rest + sum(option.seconds for option in chosen.values()))
    layers = tuple(
        LatencyLayer(
            name, o.rank, o.unfolding, o.energy, 1e3 * _dense(options[name]).seconds, 1e3 * o.seconds
        )
        for name, o in chosen.items()
    )
    trade = _trade(options, rest)
    return LatencyPlan(layers, speedup, predicted, reached, 1e3 * dense, 1e3 * now, runtime, trade)


def _approach(
    meter: Meter, options: Mapping, rest: float, dense: float, speedup: float
) -> list[tuple[float, float, dict[str, Option]]]:
    """Allocate and measure until the speed-up is met; return seconds, dense and so, of each allocation.

    What is too slow and what is too fast bracket the time to allocate; within, errors of the profile are
    divided out. Where all was too slow, the last one is the fastest that there is.
    """
    fastest = {name: _fastest(some) for name, some in options.items()}
    low, high = (
        rest + sum(option.seconds for option in ends)
        for ends in (fastest.values(), [_dense(some) for some in options.values()])
    )
    aim, tried = max(low, dense / speedup), []
    for left in range(CORRECTIONS, 0, -1):
        chosen = fastest if left == 1 and _most(tried) < speedup else allocate(options, aim - rest)
        dense, now = meter.compare([{}, _choice(chosen)])
        tried.append((dense, now, chosen))
        too_slow = dense / now < speedup
        if abs(dense / now / speedup - 1) <= TOLERANCE or (too_slow and chosen == fastest):
            break
        low, high = (low, aim) if too_slow else (aim, high)
        guess = aim * (dense / speedup) / now
        aim = guess if low < guess < high else (low + high) / 2
    return tried


def _most(tried: Sequence[tuple]) -> float:
    """Return the largest speed-up of those measured."""
    return max((dense / now for dense, now, _ in tried), default=0.0)


class _Profile:
    """Seconds of each layer in its place, dense and at some ranks of each unfolding.

    Args:
        meter: what measures.
        ways: see :func:`plan_latency`.
        before: an earlier profile, which is taken along.
    """

    def __init__(self, meter: Meter, ways: Mapping, before: _Profile | None = None):
        self.ways = ways
        self.dense = [*(before.dense if before else []), meter.profile({})]
        self.seen = before.seen if before else {}  # layer, unfolding, rank → seconds
        for how in UNFOLDINGS:
            for share in np.linspace(0, 1, CANDIDATES):  # the lowest and the highest too
                choice: Choice = {
                    name: (ranks[how][round(share * (len(ranks[how]) - 1))], how)
                    for name, ranks in ways.items()
                    if ranks.get(how)
                }
                for name, seconds in meter.profile(choice).items() if choice else ():
                    if name in choice:
                        self.seen.setdefault((name, *choice[name]), []).append(seconds)

    def _dense_seconds(self, name: str) -> float:
        return statistics.median(run[name] for run in self.dense)

    def rest(self, dense: float) -> float:
        """Return the seconds of a whole inference that are in no layer."""
        return max(0.0, dense - sum(map(self._dense_seconds, self.ways)))

    def options(self, energies: Mapping) -> dict[str, list[Option]]:
        """Return what each layer may become, dense first; times between profiled ranks are interpolated."""
        options = {}
        for name, unfoldings in self.ways.items():
            options[name] = [Option(None, "rows", 1.0, self._dense_seconds(name))]
            for how, ranks in unfoldings.items():
                known = {
                    rank: statistics.median(self.seen[name, rank, how])
                    for rank in ranks
                    if (name, rank, how) in self.seen
                }
                for rank in ranks:
                    seconds = float(np.interp(rank, list(known), list(known.values())))
                    options[name].append(Option(rank, how, float(energies[name][how][rank - 1]), seconds))
        return options


def _dense(options: Sequence[Option]) -> Option:
    return options[0]


def _fastest(options: Sequence[Option]) -> Option:
    return min(options, key=lambda option: (option.seconds, -option.energy))


def _choice(chosen: Mapping[str, Option]) -> Choice:
    return {name: (o.rank, o.unfolding) for name, o in chosen.items() if o.rank is not None}


def allocate(options: Mapping[str, Sequence[Option]], seconds: float) -> dict[str, Option]:
    """Return the option of each layer that keeps most energy in sum, within a time; else the fastest ones.

    Energy − λ·time is maximized for each layer alone, λ found by bisection; what is left of the time goes to
    the layers where it brings most.

    Args:
        options: layer → what it may become.
        seconds: for all of them together.

    Source: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers (1988), for the
        multiplier.

    >>> dense, half = Option(None, "rows", 1.0, 2.0), Option(16, "rows", 0.9, 1.0)
    >>> poor = Option(16, "rows", 0.5, 1.0)
    >>> chosen = allocate({"a": [dense, poor], "b": [dense, half]}, 3.0)
    >>> chosen["a"].rank, chosen["b"].rank
    (None, 16)
    """

    def at(price: float) -> dict[str, Option]:
        return {
            name: max(some, key=lambda option: option.energy - price * option.seconds)
            for name, some in options.items()
        }

    def time_of(chosen: Mapping[str, Option]) -> float:
        return sum(option.seconds for option in chosen.values())

    chosen = {name: _fastest(some) for name, some in options.items()}
    if time_of(chosen) > seconds:
        return chosen
    low, high = -12.0, 12.0  # of the logarithm of λ, which is energy for a second
    for _ in range(60):
        middle = (low + high) / 2
        if time_of(found := at(10**middle)) > seconds:
            low = middle
        else:
            high, chosen = middle, found
    left = seconds - time_of(chosen)
    while True:
        better = [
            ((option.energy - now.energy) / max(option.seconds - now.seconds, 1e-12), name, option)
            for name, now in chosen.items()
            for option in options[name]
            if option.energy > now.energy and option.seconds - now.seconds <= left
        ]
        if not better:
            return chosen
        _, name, option = max(better, key=lambda one: one[0])
        left -= option.seconds - chosen[name].seconds
        chosen = chosen | {name: option}


def _trade(options: Mapping[str, Sequence[Option]], rest: float) -> list[dict[str, float]]:
    """Return the mean energy kept at each speed-up that can be had: allocated, and by one ratio for all."""
    uniform = []  # seconds and energy of each ratio
    for share in np.linspace(0, 1, 65):
        chosen = []
        for some in options.values():
            rows = [option for option in some if option.rank is not None and option.unfolding == "rows"]
            at = math.ceil(share * (len(rows) + 1)) or 1
            chosen.append(rows[at - 1] if at <= len(rows) else _dense(some))
        energy = statistics.fmean(option.energy for option in chosen)
        uniform.append((rest + sum(option.seconds for option in chosen), energy))
    full = rest + sum(_dense(some).seconds for some in options.values())
    trade = []
    for speedup in TRADE:
        allocated = list(allocate(options, full / speedup - rest).values())
        if rest + sum(option.seconds for option in allocated) > full / speedup:
            break
        within = [energy for seconds, energy in uniform if seconds <= full / speedup]
        mean = statistics.fmean(option.energy for option in allocated)
        trade.append({"speedup": speedup, "allocated": mean, "uniform": max(within, default=math.nan)})
    return trade
