"""The command line, no Jupyter needed: ``python -m lrpet VERB``.

Verbs: ``list``, ``check``, ``headline``, ``run NAME…``, ``train FIELD=VALUE…``, ``tables``, ``export RUN``,
``throughput NAME…``.
``torchrun --nproc-per-node 4 -m lrpet run NAME`` trains one network in four processes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lrpet.bench.loading import keep, measure, throughput_line
from lrpet.config import PROFILES, RunConfig, describe_fields, read_fields
from lrpet.data.load import load_images, make_batches
from lrpet.deploy.export import FORMATS
from lrpet.experiments import Experiment, load_profile, select
from lrpet.paths import has_own_results, results_root
from lrpet.processes import Processes, join_processes
from lrpet.runs.device import device_of
from lrpet.runs.environment import environment
from lrpet.runs.export import export_run
from lrpet.runs.run import run
from lrpet.runs.store import Damaged, Run, is_complete, load_run, or_leave_out
from lrpet.training.checkpoint import has_checkpoint
from lrpet.training.loop import Paused
from lrpet.training.recipes import augmentation

DAMAGED = 65  # "the input data was incorrect in some way" of sysexits.h
PAUSED = 75  # exit status: "temporary failure, try again" of sysexits.h
BROKEN_PIPE = 141  # 128 + SIGPIPE
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; return its exit status.

    0: all complete; 1: an error; 65: done, except for something in the store that cannot be read, which is
    named; 75: paused by the time budget; 130: stopped by Ctrl-C; 141: nobody reads the output.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may know fewer characters than names and tables have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(arguments)
    damaged = []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def warn(message, category, *_, **__) -> None:
        damaged.extend([message] * issubclass(category, Damaged))
        if rank == 0:
            print(f"warning: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():  # else each would show a line of source, in every process
            warnings.showwarning = warn
            warnings.simplefilter("always", Damaged)  # whatever PYTHONWARNINGS says: it decides the status
            status = args.action(args) or (DAMAGED if damaged else 0)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of ``| head``: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return BROKEN_PIPE
    except Paused as pause:
        if rank == 0:
            print(pause)
        return PAUSED
    except KeyboardInterrupt as stop:
        if rank == 0:
            print(stop.args[0] if stop.args else "stopped; what was trained so far is kept", file=sys.stderr)
        return INTERRUPTED
    except (ImportError, ValueError, FloatingPointError, MemoryError, OSError) as error:
        where = f" in process {rank + 1} of {world}" if world > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 1


class _Once(argparse.Action):
    """An option that is refused where it is given a second time, which argparse takes without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = vars(namespace).setdefault("given", set())
        if option_string and self.dest in given:
            parser.error(f"{option_string} must be given once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def _seconds(text: str) -> float:
    """Return a length of time that was typed."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more; got {text!r}")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrpet", description="Train, resume and list the runs of experiments.yaml."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, action: Callable, text: str, profile: str | None = None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, allow_abbrev=False)
        sub.register("action", None, _Once)
        sub.set_defaults(action=action)
        if profile is not None:
            sub.add_argument("--profile", default=profile, choices=PROFILES)
        return sub

    verb("list", _list, "list the runs of a profile and their state", "smoke")
    verb("check", _list, "the same; exit status 1 unless all are complete", "smoke")
    verb("headline", _headline, "print the numbers of a profile that matter most", "smoke")
    verb("tables", _tables, "write the tables of results/ and those of the pages from the store")
    sub = verb(
        "export", _export, "write the compact network of a finished run for other programs, and check it"
    )
    sub.add_argument("run", metavar="RUN", help="run id, as 'list' shows it, or folder")
    sub.add_argument("--to", required=True, choices=FORMATS)
    sub.add_argument("--out", metavar="FILE", help="default: RUN.onnx and so on, here")
    sub.add_argument("--half", action="store_true", help="round the weights to half precision (safetensors)")
    sub = verb("run", _run, "do the named runs of a profile; * and ? match", "smoke")
    sub.add_argument("names", nargs="*", metavar="NAME", help="as 'list' shows them; none is all")
    sub.add_argument("--jobs", type=int, default=1, help="runs at a time, on one device")
    _add_training(sub)
    sub = verb("train", _train, "do one run of your own")
    sub.epilog, sub.formatter_class = f"fields:\n{describe_fields()}", argparse.RawDescriptionHelpFormatter
    text = "fields of RunConfig, as dataset=imagefolder epochs=10"
    sub.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help=text)
    _add_training(sub)
    text = "measure loading and training of the named runs of a profile, alone and together"
    sub = verb("throughput", _throughput, text, "imagenet")
    sub.add_argument("names", nargs="+", metavar="NAME", help="as 'list' shows them")
    _add_place(sub)
    sub.add_argument("--seconds", type=_seconds, default=20.0, help="of each of the three measurements")
    text = "write results/bench/throughput-*.json, which the tables estimate times from"
    sub.add_argument("--keep", action="store_true", help=text)
    return parser


def _add_place(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", metavar="DIR", help="folder of the images (default: LRPET_DATA)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")


def _add_training(sub: argparse.ArgumentParser) -> None:
    _add_place(sub)
    text = "stop at a checkpoint after this time"
    sub.add_argument("--time-budget", type=_seconds, metavar="SECONDS", help=text)
    text = "epochs between checkpoints"
    sub.add_argument("--checkpoint-epochs", type=int, default=1, metavar="N", help=text)
    text = "images that a device takes at a time (default: all of its batch)"
    sub.add_argument("--device-batch", type=int, metavar="N", help=text)


def _read(experiment: Experiment) -> Run | None:
    """Return a finished run, or None and a warning where it cannot be read."""
    return or_leave_out(load_run, experiment.config.folder())


def _list(args) -> int:
    profile = load_profile(args.profile)
    print(f"profile {profile.name}: {profile.note}\ncost: {profile.cost}")
    missing = 0
    for experiment in profile.experiments:
        folder = experiment.config.folder()
        done = _read(experiment) if is_complete(folder) else None
        if done:
            metric = experiment.config.metric
            score = f"{metric.text(done.summary[metric.column])} {done.summary['scored_on']}"
            state = f"complete  {score}, {done.summary['macs'] / 1e6:.2f} M MACs"
        elif is_complete(folder):
            state = "damaged"
        else:
            state = "started" if has_checkpoint(folder / "checkpoint.pt") else "not run"
        missing += done is None
        print(f"  {experiment.name:28s} {experiment.config.run_id:44s} {state}")
    print(f"{len(profile.experiments) - missing} of {len(profile.experiments)} complete")
    return 1 if missing and args.verb == "check" else 0


def _headline(args) -> int:
    from lrpet.tables.pages import headline

    print(headline(args.profile))
    return 0


def _tables(_args) -> int:
    from lrpet.tables.pages import write_pages

    write_pages()
    pages = (
        ", docs/evidence.md, REPRODUCING.md"
        if has_own_results()
        else "; pages are written from results/ only"
    )
    print(f"tables written to {results_root()}/*/tables{pages}")
    return 0


def _export(args) -> int:
    path, difference = export_run(args.run, args.to, args.out, args.half)
    print(f"{path}: largest difference of an output {difference:.1e}")
    return 0


def _throughput(args) -> int:
    for experiment in select(load_profile(args.profile), args.names):
        config = experiment.config
        where = device_of(args.device, config)
        images = load_images(config, args.data, device=where)
        batches = make_batches(images, config.batch_size, where, config.seed, **augmentation(config))
        result = measure(config, batches, args.seconds)
        print(f"{experiment.name}: {throughput_line(result)}", flush=True)
        if args.keep:
            print(f"kept in {keep(config, result, environment(where))}")
    return 0


def _train(args) -> int:
    config = RunConfig.from_dict(read_fields(args.fields))
    done = _do(config, args, args.time_budget)
    if Processes.now().first:
        s, metric = done.summary, config.metric
        score = f"{metric.title} {metric.text(s[metric.column])} ({s['scored_on']})"
        print(f"{score} at {s['macs'] / 1e6:.2f} M MACs; all files: {done.folder}")
    return 0


def _do(config: RunConfig, args, time_budget: float | None) -> Run:
    return run(
        config,
        data=args.data,
        device=args.device,
        time_budget=time_budget,
        checkpoint_epochs=args.checkpoint_epochs,
        device_batch=args.device_batch,
    )


def _run(args) -> int:
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {args.jobs}")
    chosen = select(load_profile(args.profile), args.names)
    todo = [e for e in chosen if not is_complete(e.config.folder())]
    processes, began = join_processes(), time.monotonic()
    damaged = processes.share(lambda: [e.name for e in chosen if e not in todo and not _read(e)])
    end = None if args.time_budget is None else began + args.time_budget
    if processes.first:
        counts = f"{len(chosen)} runs asked for, {len(chosen) - len(todo) - len(damaged)} complete"
        cost = load_profile(args.profile).cost
        print(f"profile {args.profile}: {counts}, cost of all: {cost}", flush=True)
    if processes.world > 1 and args.jobs > 1:
        raise ValueError(f"--jobs must be 1 under torchrun, whose processes share one run; got {args.jobs}")
    if len(chosen) == 1 or processes.world > 1:  # torchrun's processes do one run after the other, together
        for experiment in chosen:
            if experiment.name not in damaged:
                _do(experiment.config, args, _left(end))
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        states = list(pool.map(lambda e: _run_apart(e, args, end), todo))
    incomplete = [
        (e.name, state) for e, state in zip(todo, states, strict=True) if not is_complete(e.config.folder())
    ]
    for name, state in incomplete:
        print(f"not complete: {name} ({'paused' if state == PAUSED else f'failed with status {state}'})")
    for name in damaged:
        print(f"not complete: {name} (damaged, see above)")
    complete = len(chosen) - len(incomplete) - len(damaged)
    print(f"{complete} of {len(chosen)} complete after {time.monotonic() - began:.0f} s")
    if not incomplete:
        return 0
    return PAUSED if all(state == PAUSED for _, state in incomplete) else 1


def _left(end: float | None) -> float | None:
    """Return the seconds left until a moment of ``time.monotonic()``."""
    return None if end is None else max(0.0, end - time.monotonic())


def _run_apart(experiment: Experiment, args, end: float | None) -> int:
    """Do one run in its own process, with its own threads and memory; return its exit status."""
    left = _left(end)
    if left == 0:
        return PAUSED
    command = [sys.executable, "-m", "lrpet", "run", experiment.name, "--profile", args.profile]
    command += ["--device", args.device, "--checkpoint-epochs", str(args.checkpoint_epochs)]
    command += ["--data", args.data] if args.data else []
    command += ["--device-batch", str(args.device_batch)] if args.device_batch else []
    command += [] if left is None else ["--time-budget", str(left)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // args.jobs))
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
