"""How long a network takes in a runtime: each layer in its place, and variants end to end, in turn."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lrpet.deploy.programs import (
    LayeredProgram,
    layer_in,
    onnxruntime_session,
    onnxruntime_task,
    openvino_program,
    openvino_task,
)
from lrpet.lowrank.factors import rebuild
from lrpet.lowrank.observe import call
from lrpet.lowrank.ranks import LayerReport
from lrpet.lowrank.timing import side_by_side

__all__ = ["RUNTIMES", "Choice", "Meter", "OnnxRuntimeMeter", "OpenVinoMeter", "TorchMeter", "make_meter"]
RUNTIMES = ("openvino", "onnxruntime", "eager", "compile")
Choice = Mapping[str, tuple[int, str]]  # layer name → rank and unfolding; the others are dense
WARM_UP, PROFILED, COMPARED = 3, 9, 25  # runs before any is counted, of a profile, of a comparison
SECONDS = 20.0  # no further round of a comparison begins after this time


class Meter(ABC):
    """What times one network in one runtime, in variants with random weights.

    Args:
        layers: names of the layers that can be swapped for factors.
        threads: that an inference may use.
        device: of the network.
    """

    def __init__(self, layers: Sequence[str], threads: int, device: torch.device):
        self.layers, self.threads, self.device = list(layers), threads, device

    @abstractmethod
    def task(self, choice: Choice) -> Callable:
        """Return the function of no argument that runs a variant once."""

    @abstractmethod
    def profile(self, choice: Choice) -> dict[str, float]:
        """Return the seconds that each layer of a variant takes inside of it."""

    def compare(self, choices: Sequence[Choice]) -> list[float]:
        """Return the median seconds of variants, timed in turn."""
        tasks = {str(i): self.task(choice) for i, choice in enumerate(choices)}
        with _torch_threads(self.threads):
            timings = side_by_side(tasks, COMPARED, self.device, seconds=SECONDS)
        return [timing["median_seconds"] for timing in timings.values()]


class OnnxRuntimeMeter(Meter):
    """ONNX Runtime, whose profiler writes the time of each operator of each run."""

    def __init__(self, network: nn.Module, inputs: Any, layers: Sequence[str], threads: int):
        self.program = LayeredProgram(network, inputs, layers)
        super().__init__(self.program.layers, threads, torch.device("cpu"))

    def task(self, choice: Choice) -> Callable:
        """See :class:`Meter`."""
        session = onnxruntime_session(self.program.variant(choice), self.threads)
        return onnxruntime_task(session, self.program.feeds)

    def profile(self, choice: Choice) -> dict[str, float]:
        """See :class:`Meter`."""
        with tempfile.TemporaryDirectory() as folder:
            options = {"enable_profiling": True, "profile_file_prefix": os.path.join(folder, "profile")}
            session = onnxruntime_session(self.program.variant(choice), self.threads, **options)
            task = onnxruntime_task(session, self.program.feeds)
            for _ in range(WARM_UP + PROFILED):
                task()
            with open(session.end_profiling(), encoding="utf-8") as file:
                return _least(_runs_of_trace(json.load(file), self.layers)[WARM_UP:], self.layers)


class OpenVinoMeter(Meter):
    """OpenVINO on the CPU, whose counters are means over all runs so far, in whole microseconds."""

    def __init__(self, network: nn.Module, inputs: Any, layers: Sequence[str], threads: int):
        self.program = LayeredProgram(network, inputs, layers)
        super().__init__(self.program.layers, threads, torch.device("cpu"))

    def task(self, choice: Choice) -> Callable:
        """See :class:`Meter`."""
        return openvino_task(openvino_program(self.program.variant(choice), self.threads), self.program.feeds)

    def profile(self, choice: Choice) -> dict[str, float]:
        """See :class:`Meter`."""
        program = openvino_program(self.program.variant(choice), self.threads, PERF_COUNT=True)
        request, given = program.create_infer_request(), list(self.program.feeds)
        snapshots = []
        for _ in range(4):
            for _ in range(WARM_UP):
                request.infer(given)
            sums = defaultdict(float)
            for node in request.profiling_info:
                if name := layer_in(node.node_name, self.layers):
                    sums[name] += node.real_time.total_seconds()
            snapshots.append(sums)
        return _least(_apart(snapshots), self.layers)


def _apart(snapshots: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the mean of each stretch of runs from the means so far at their ends; not of the first.

    >>> _apart([{"a": 4.0}, {"a": 3.0}, {"a": 2.0}])
    [{'a': 2.0}, {'a': 0.0}]
    """
    pairs = enumerate(zip(snapshots, snapshots[1:], strict=False), 1)
    return [
        {name: max(0.0, after[name] * (i + 1) - before[name] * i) for name in after}
        for i, (before, after) in pairs
    ]


def _runs_of_trace(events: Sequence[Mapping], names: Sequence[str]) -> list[dict[str, float]]:
    """Return the seconds of each layer, run by run, from the trace of ONNX Runtime."""
    runs, run = [], defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and (name := layer_in(event["name"], names)):
            run[name] += event["dur"] / 1e6
        elif event["name"] == "model_run":
            runs.append(run)
            run = defaultdict(float)
    return runs


def _least(runs: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Return the least seconds of each layer: what else the machine does only adds to them."""
    return {name: min(run.get(name, 0.0) for run in runs) for name in names}


class TorchMeter(Meter):
    """PyTorch, eager or compiled, on a CPU or by events on a GPU.

    A compiled network has no layers any more, so its profile is that of the eager one; the comparison is of
    the compiled ones.
    """

    def __init__(
        self, network: nn.Module, inputs: Any, layers: Sequence[str], threads: int, *, compiled: bool = False
    ):
        device = next(network.parameters()).device
        self.network, self.inputs, self.compiled = network, inputs, compiled
        super().__init__(layers, threads, device)

    def _variant(self, choice: Choice) -> nn.Module:
        reports = [
            LayerReport(name, rank, math.nan, "factorized", "", unfolding)
            for name, (rank, unfolding) in choice.items()
        ]
        variant = rebuild(self.network, reports).eval()
        with torch.no_grad():
            for name in choice:
                for factor in variant.get_submodule(name):
                    factor.weight.normal_(0, factor.weight[0].numel() ** -0.5)
        return variant

    def task(self, choice: Choice) -> Callable:
        """See :class:`Meter`."""
        variant = self._variant(choice)
        if self.compiled:
            variant = torch.compile(variant)

        @torch.inference_mode()
        def run() -> None:
            call(variant, self.inputs)

        return run

    def profile(self, choice: Choice) -> dict[str, float]:
        """See :class:`Meter`."""
        variant = self._variant(choice)
        names, began, runs = {variant.get_submodule(name): name for name in self.layers}, {}, []
        clock = _cuda_clock if self.device.type == "cuda" else time.perf_counter

        def begin(layer, *_):
            began[layer] = clock()

        def end(layer, *_):
            spans.append((names[layer], began[layer], clock()))

        for layer in names:
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)
        with torch.inference_mode(), _torch_threads(self.threads):
            for _ in range(WARM_UP + PROFILED):
                spans: list[tuple] = []
                call(variant, self.inputs)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                run = defaultdict(float)
                for name, start, stop in spans:
                    run[name] += stop - start if isinstance(stop, float) else start.elapsed_time(stop) / 1e3
                runs.append(run)
        return _least(runs[WARM_UP:], self.layers)


def _cuda_clock():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_meter(runtime: str, network: nn.Module, inputs: Any, layers: Sequence[str], threads: int) -> Meter:
    """Return the meter of a runtime.

    Args:
        runtime: one of ``RUNTIMES``.
        network: in evaluation mode, with its BatchNorms folded.
        inputs: what it is run on.
        layers: names of the layers that may be swapped.
        threads: that an inference may use.

    Raises:
        ImportError: a package is missing.

    >>> make_meter("eager", nn.Sequential(nn.Conv2d(3, 8, 3)), torch.ones(1, 3, 8, 8), ["0"], 1).layers
    ['0']
    """
    if runtime in ("eager", "compile"):
        return TorchMeter(network, inputs, layers, threads, compiled=runtime == "compile")
    kind = OpenVinoMeter if runtime == "openvino" else OnnxRuntimeMeter
    on_cpu = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, inputs)
    return kind(network.cpu(), on_cpu, layers, threads)
