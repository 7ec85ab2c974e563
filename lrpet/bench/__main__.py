"""The command line of the benchmarks; each run keeps one JSON file under ``results/bench``."""

from __future__ import annotations

import argparse
import inspect
import json
import sys

import torch

from lrpet.bench.equal_latency import bench_equal_latency
from lrpet.bench.inference import bench_inference
from lrpet.bench.latency import bench_latency
from lrpet.bench.models import bench_models
from lrpet.bench.optimizers import bench_optimizers
from lrpet.bench.projection import bench_projection
from lrpet.bench.runtimes import bench_runtimes
from lrpet.bench.scaling import bench_scaling
from lrpet.bench.training import bench_training
from lrpet.files import write_file
from lrpet.models import MODELS
from lrpet.paths import results_root
from lrpet.runs.environment import environment

BENCHMARKS = {
    "projection": bench_projection,
    "training": bench_training,
    "inference": bench_inference,
    "runtimes": bench_runtimes,
    "latency": bench_latency,
    "equal-latency": bench_equal_latency,
    "optimizers": bench_optimizers,
    "scaling": bench_scaling,
    "models": bench_models,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, print its result and keep it."""
    parser = argparse.ArgumentParser(
        prog="python -m lrpet.bench", description="Measured side by side in one run."
    )
    verbs = parser.add_subparsers(dest="benchmark", required=True)
    for verb, function in BENCHMARKS.items():
        sub = verbs.add_parser(verb, help=inspect.getdoc(function).splitlines()[0])
        for name, option in inspect.signature(function).parameters.items():
            choices = {"model": MODELS, "device": ("cpu", "cuda")}.get(name)
            sub.add_argument(
                f"--{name.replace('_', '-')}",
                type=type(option.default),
                default=option.default,
                choices=choices,
            )
    args = vars(parser.parse_args(arguments))
    benchmark = args.pop("benchmark")
    if args["device"] == "cuda" and not torch.cuda.is_available():
        print("error: device 'cuda' was asked for, but PyTorch sees no CUDA GPU", file=sys.stderr)
        return 1
    origin = environment(torch.device(args["device"]))
    result = {"benchmark": benchmark, "model": args.get("model"), **BENCHMARKS[benchmark](**args), **origin}
    path = (
        results_root()
        / "bench"
        / ("-".join(filter(None, [benchmark, args.get("model"), args["device"]])) + ".json")
    )
    write_file(path, json.dumps(result, indent=1) + "\n")
    print(path.read_text(encoding="utf-8"), end="")
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
