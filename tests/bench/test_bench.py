"""The benchmarks run and keep what they promise; how fast anything is they alone may say."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import refused

import lrpet.bench.equal_latency
import lrpet.bench.inference
import lrpet.bench.latency
import lrpet.bench.optimizers
import lrpet.bench.runtimes
import lrpet.bench.scaling
import lrpet.bench.training
from lrpet import bench, build_model
from lrpet.bench.__main__ import main
from lrpet.bench.memory import peak_bytes
from lrpet.deploy.latency import LatencyLayer, LatencyPlan, OutOfReach
from lrpet.deploy.programs import LayeredProgram, onnxruntime_session, onnxruntime_task, quantized
from lrpet.lowrank.ranks import compressible_layers
from lrpet.lowrank.timing import side_by_side
from lrpet.paths import results_root


def result(name):
    return json.loads((results_root() / "bench" / name).read_text())


def test_tasks_are_timed_in_turn_after_a_warm_up_with_what_prepares_them():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = side_by_side(tasks, 3, torch.device("cpu"), prepare=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 4
    assert [t["n"] for t in timings.values()] == [3, 3]
    assert timings["a"]["ratio_to_first"] == 1
    assert all(0 < t["min_seconds"] <= t["median_seconds"] <= t["max_seconds"] for t in timings.values())


def test_where_time_is_short_two_rounds_are_timed():
    assert side_by_side({"a": lambda: None}, 9, torch.device("cpu"), seconds=0)["a"]["n"] == 2


def test_peak_memory_counts_what_lives_at_the_same_time():
    def one_after_the_other():
        for _ in range(5):
            torch.zeros(250_000).add(1.0)

    assert 2_000_000 <= peak_bytes(one_after_the_other, torch.device("cpu")) < 3_100_000


def test_projection_benchmark_keeps_its_measurements_with_the_machine(capsys):
    assert main(["projection", "--model", "resnet8", "--rounds", "1"]) == 0
    kept = result("projection-resnet8-cpu.json")
    assert {"svd", "svd_thin", "exact", "fast"} <= set(kept["timings"])
    assert all(t["n"] == 1 for t in kept["timings"].values())
    assert {"commit", "dirty", "python", "torch", "device", "threads", "started"} <= set(kept)
    assert kept["layers"] == 7
    assert kept["followed"] == 7
    assert 0 < kept["memory"]["bases_bytes"] < kept["memory"]["model_bytes"]
    assert "projection-resnet8-cpu.json" in capsys.readouterr().out


def test_tables_hold_what_was_measured_and_say_what_was_not(monkeypatch):
    monkeypatch.setattr(bench, "TARGETS", {"cpu": {"resnet8": 0, "resnet20": 8}})
    assert main(["projection", "--model", "resnet8", "--rounds", "1"]) == 0
    results = bench.load_results()
    measured, missing = bench.projection_table(results).to_dict("records")
    timings = results[0]["timings"]
    assert measured["speedup"] == pytest.approx(
        timings["svd_thin"]["median_seconds"] / timings["fast"]["median_seconds"]
    )
    assert measured["followed"] == "7 of 7"
    assert (missing["network"], missing["n"], missing["speedup"]) == ("resnet20", "not run", "")
    verdicts = bench.verdicts(results)
    assert verdicts["verdict"][0] == "met"
    assert set(verdicts["verdict"].tolist()[2:]) == {"not run"}
    assert bench.describe(results)["file"].tolist() == ["projection-resnet8-cpu.json"]
    advice = "python -m lrpet.bench inference --model resnet8 --device cpu"
    refused(lambda: bench.find(results, "inference", "resnet8"), "not run", advice)


def test_training_benchmark_and_what_is_concluded_from_it(monkeypatch):
    monkeypatch.setattr(lrpet.bench.training, "SEEDS", (1,))
    options = "--model resnet8 --batch-size 8 --steps 1 --rounds 1 --epochs 1"
    assert main(["training", *options.split()]) == 0
    kept = result("training-resnet8-cpu.json")
    assert list(kept["timings"]) == ["plain", "ours_fp32", "ours_bf16"]
    assert kept["images_per_second"]["plain"] == pytest.approx(8 / kept["timings"]["plain"]["median_seconds"])
    assert kept["epoch_seconds"]["plain"] == pytest.approx(50_000 / kept["images_per_second"]["plain"])
    assert [len(values) for values in kept["top1_pct"].values()] == [1, 1]

    def timed(seconds):
        return {"n": 3, "median_seconds": seconds, "ratio_to_first": seconds / 4}

    ways = {"timings": {"plain": timed(4.0), "ours_bf16": timed(2.0)}, "steps": 20, "threads": 2}
    ways |= {"images_per_second": {"plain": 1, "ours_bf16": 2}, "epoch_seconds": {"plain": 9, "ours_bf16": 4}}
    training = {"benchmark": "training", "model": "resnet56", "kind": "cpu"} | ways
    projection = {"benchmark": "projection", "model": "resnet56", "kind": "cpu"}
    projection |= {"threads": 2, "followed": 1, "layers": 1}
    seconds = {"svd": 1.0, "svd_thin": 1.0, "exact": 0.2, "fast": 0.1}
    projection["timings"] = {name: timed(value) for name, value in seconds.items()}
    projection["memory"] = {"exact_step_bytes": 1, "fast_step_bytes": 1, "bases_bytes": 1, "model_bytes": 1}
    verdicts = bench.verdicts([training, projection]).set_index("what")
    row = verdicts.loc["training of resnet56 on cpu, times the throughput of a plain loop"]
    assert row.tolist() == ["2.00", "≥ 1.5", "met"]
    row = verdicts.loc["projection of resnet56 on cpu after every epoch (exact), % of the training time"]
    assert row["measured"] == "0.51"  # 0.2 of 39.3
    row = verdicts.loc["projection of resnet56 on cpu every 16 iterations (fast), % of the training time"]
    assert row.tolist() == ["5.88", "≤ 1", "not met"]  # 0.1 of 1.7
    assert bench.training_table([training])["way"].tolist() == ["plain", "ours_bf16", "not run"]


def test_scaling_benchmark_covers_every_axis(monkeypatch):
    monkeypatch.setattr(
        lrpet.bench.scaling, "AXES", {"width": (8, 16), "depth": (2,), "batch": (2,), "rank": (4,)}
    )
    monkeypatch.setattr(lrpet.bench.scaling, "BASE", {"width": 8, "depth": 2, "batch": 2, "rank": 2})
    assert main(["scaling", "--rounds", "1"]) == 0
    rows = result("scaling-cpu.json")["rows"]
    assert len(rows) == 5 * 3
    assert {row["what"] for row in rows} == {"training step", "projection, exact", "projection, fast"}
    assert all(row["median_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)


def test_inference_benchmark_covers_every_setting(monkeypatch):
    monkeypatch.setattr(lrpet.bench.inference, "BATCHES", (1, 2))
    monkeypatch.setattr(lrpet.bench.inference, "_can_compile", lambda _: False)  # half a minute per setting
    assert main(["inference", "--model", "resnet8", "--rounds", "1", "--seconds", "1"]) == 0
    kept = result("inference-resnet8-cpu.json")
    assert [(row["batch"], row["memory"], row["mode"]) for row in kept["rows"]] == [
        (batch, memory, "eager") for batch in (1, 2) for memory in ("contiguous", "channels_last")
    ]
    assert {row["batch"] for row in kept["layers"]} == {1, 2}
    assert kept["ideal"] > 2
    assert min(layer["gain"] for layer in kept["layers"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_missing_gpu_is_one_line(capsys):
    assert main(["projection", "--device", "cuda"]) == 1
    assert "PyTorch sees no CUDA GPU" in capsys.readouterr().err


def test_runtimes_compares_dense_with_three_compact_ones_by_their_multiply_adds(monkeypatch):
    module = lrpet.bench.runtimes
    network = build_model("resnet20").eval()
    choices = module._variants(network, 32, 0.57, None)
    assert list(choices) == ["dense", "compact", "aligned", "columns"]
    assert all(rank % 16 == 0 for rank, _ in choices["aligned"].values())
    macs = {variant: module._macs(network, choice, 32) for variant, choice in choices.items()}
    assert macs["compact"] < macs["aligned"] < macs["dense"]
    assert "columns" not in module._variants(build_model("vit"), 32, 0.6, "*.mlp.*")  # Linear layers alone
    monkeypatch.setattr(module, "require", lambda *_, **__: None)
    for arguments in ({"networks": "resnet19"}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            module.bench_runtimes(**arguments)


def test_deployed_networks_are_judged_by_the_better_compiled_runtime():
    def row(runtime, variant, seconds, ideal, precision="fp32"):
        gain = 2.0 / seconds
        made = {"network": "vgg16", "runtime": runtime, "precision": precision, "batch": 1, "threads": 1}
        made |= {"variant": variant, "n": 3, "seconds": seconds, "gain": gain, "ideal": ideal}
        return made | {"share": gain / ideal}

    rows = [row(runtime, "dense", 2.0, 1.0) for runtime in ("eager", "openvino", "onnxruntime")]
    rows += [row(runtime, "compact", 1.6, 2.5) for runtime in ("eager", "openvino", "onnxruntime")]
    aligned = {"eager": 0.5, "openvino": 1.0, "onnxruntime": 1.25}
    rows += [row(runtime, "aligned", seconds, 2.0) for runtime, seconds in aligned.items()]
    rows += [row("onnxruntime", "dense", 2.0, 1.0, "int8"), row("onnxruntime", "aligned", 0.5, 2.0, "int8")]
    results = [{"benchmark": "runtimes", "kind": "cpu", "rows": rows}]
    table = bench.runtimes_table(results).set_index(["runtime", "precision"])
    assert table.loc["openvino", "fp32"][["compact", "aligned", "share"]].tolist() == [1.25, 2.0, 1.0]
    assert table.loc["onnxruntime", "int8"]["over_fp32"] == 4.0
    assert bench.runtimes_table(results, batch=32).empty
    verdicts = bench.verdicts(results).set_index("what")
    where = "(ONNX Runtime or OpenVINO, fp32, batch 1, one thread)"
    share = verdicts.loc[f"vgg16, aligned, share of the ideal gain {where}"]
    assert share.tolist() == ["1.00", "≥ 0.9", "met"]
    assert verdicts.loc[f"vgg16, aligned, times as fast as dense {where}", "measured"] == "2.00"
    assert verdicts.loc[f"resnet56, columns, times as fast as dense {where}", "verdict"] == "not run"


def test_latency_is_planned_and_measured_once_more(monkeypatch):
    module = lrpet.bench.latency
    layers = compressible_layers(build_model("resnet8"))
    rows = [(1, name, i + 1, 0.5**i) for name, shape in layers.items() for i in range(min(shape))]
    spectra = pd.DataFrame(rows, columns=["epoch", "layer", "i", "s"])
    monkeypatch.setattr(module, "load_spectra", lambda _: spectra)
    network = build_model("resnet8")
    module.take_spectra(network, spectra)
    largest = torch.linalg.matrix_norm(network.conv.weight.detach().flatten(1), 2)
    assert largest.item() == pytest.approx(1.0, rel=1e-5)

    def plan(model, x, asked, runtime, threads):
        layer = LatencyLayer("blocks.0.conv1", 8, "rows", 0.9, 2.0, 1.0)
        trade = [{"speedup": 1.5, "allocated": 0.9, "uniform": 0.8}]
        return LatencyPlan((layer,), asked, asked, asked * 1.02, 2.0, 2.0 / asked, runtime, trade)

    monkeypatch.setattr(module, "ranks_for_latency", plan)  # tested where it is; here it would take minutes
    result = {"benchmark": "latency", "kind": "cpu"} | module.bench_latency("resnet8", runtimes="eager")
    table = bench.latency_table([result])
    assert table["asked"].tolist() == [1.5, 2.0]
    assert (table["again"] > 0).all()
    assert table["on"].tolist() == ["cpu", "cpu"]
    verdicts = bench.verdicts([result]).set_index("what")
    assert verdicts.loc["resnet18 in eager, % by which ranks for 1.5 and 2.0 miss", "measured"] == "2.00"
    assert verdicts.loc["resnet18 in openvino, % by which ranks for 1.5 and 2.0 miss", "verdict"] == "not run"


def test_a_speed_up_that_cannot_be_reached_is_a_row_and_a_miss(monkeypatch):
    def refuse(model, x, asked, runtime, threads):
        raise OutOfReach(f"speedup {asked:g} cannot be reached in eager: the most is 1.10, measured")

    monkeypatch.setattr(lrpet.bench.latency, "ranks_for_latency", refuse)
    monkeypatch.setattr(lrpet.bench.latency, "load_spectra", lambda _: None)
    monkeypatch.setattr(lrpet.bench.latency, "take_spectra", lambda *_: None)
    found = lrpet.bench.latency.bench_latency("resnet8", runtimes="eager", batch=2)
    result = {"benchmark": "latency", "kind": "cpu"} | found
    assert [row["batch"] for row in found["rows"]] == [2, 2]
    assert "the most is 1.10" in bench.latency_table([result]).refused[0]
    verdicts = bench.verdicts([result]).set_index("what")
    missed = verdicts.loc["resnet18 in eager, % by which ranks for 1.5 and 2.0 miss"]
    assert missed.tolist()[::2] == ["inf", "not met"]


def test_a_mistyped_runtime_is_no_speed_up_out_of_reach(monkeypatch):
    monkeypatch.setattr(lrpet.bench.latency, "load_spectra", lambda _: None)
    monkeypatch.setattr(lrpet.bench.latency, "take_spectra", lambda *_: None)
    with pytest.raises(ValueError, match="runtime must be one of .*; got 'eagre'"):
        lrpet.bench.latency.bench_latency("resnet8", runtimes="eagre")


def test_optimizers_are_compared_with_adamw(monkeypatch):
    monkeypatch.setattr(lrpet.bench.optimizers, "SIZES", ((8, 16),))
    assert main(["optimizers", "--layers", "2", "--rounds", "2"]) == 0
    table = bench.optimizers_table([result("optimizers-cpu.json") | {"kind": "cpu"}]).set_index("way")
    assert list(table.index) == ["adamw", *lrpet.bench.optimizers.STRATEGIES]
    assert table.loc["adamw", "times_adamw"] == 1.0
    lotus = table.loc["lotus"]
    expected = (199 * lotus["update_ms"] + lotus["refresh_ms"]) / 200
    assert lotus["averaged_ms"] == pytest.approx(expected)


def test_a_ratio_is_found_by_its_measured_speed(monkeypatch):
    module, network = lrpet.bench.equal_latency, build_model("resnet20").eval()
    choice = module._uniform(network, 0.57)
    assert choice and all(rank % 16 == 0 and how == "rows" for rank, how in choice.values())
    meter = SimpleNamespace(task=lambda choice: choice, device=torch.device("cpu"))

    def timed(tasks, *_, **__):
        return {"so": {"ratio_to_first": 1 - tasks["so"]}}  # the ratio itself: 1 / (1 − ρ) times as fast

    monkeypatch.setattr(module, "side_by_side", timed)
    assert module._ratio(lambda ratio: (meter, ratio), meter, 2.0) == pytest.approx(0.5, abs=0.011)
    for arguments in ({"device": "cuda"}, {"runtime": "eager"}):
        with pytest.raises(ValueError, match="device must be cpu, runtime one of onnxruntime, openvino"):
            module.bench_equal_latency(**arguments)


def test_a_quantized_program_says_nearly_the_same():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    program = LayeredProgram(network, torch.randn(1, 3, 8, 8), ["0"])
    whole = program.variant({})
    small = quantized(whole, program.feeds)
    expected, got = (onnxruntime_task(onnxruntime_session(p, 1), program.feeds)()[0] for p in (whole, small))
    off = abs(got - expected).max() / abs(expected).max()
    assert 0 < off < 0.1
