"""Every figure of every profile: panels keep half the height, no texts overlap, nothing leaves the canvas."""

import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import check_layout, put

from lrpet import build_model, figures
from lrpet.bench import find, load_results
from lrpet.experiments import load_profile
from lrpet.methods import ranks_of
from lrpet.paths import PROJECT
from lrpet.tables.claims import ablation_table
from lrpet.tables.recorded import choose_runs, energy_shares, gradient_ratios, read_recorded
from lrpet.tables.rows import profile_runs, published
from lrpet.training.recording import load_gradients, load_spectra

METHODS = ("dense", "lrp", "lrpet")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Return a store in which every run of smoke and of paper is finished, with numbers that mean nothing."""
    root = tmp_path_factory.mktemp("store")
    for profile in ("smoke", "paper"):
        for e in load_profile(profile).experiments:
            top1 = 80 + zlib.crc32(e.name.encode()) % 1500 / 100
            ratio = e.config.prune_ratio or 0.0
            projections = 1 + zlib.crc32(str(e.config.projection_interval).encode()) % 400
            more = {"macs": int(125e6 * (1.02 - ratio)), "projections": projections}
            put(root, e.config, top1, **more)
            epoch = np.arange(1, 21)
            history = {"epoch": epoch, "learning_rate": np.where(epoch > 10, 0.01, 0.1), "scored_on": "test"}
            history |= dict.fromkeys(("loss", "train_loss"), 3 / epoch)
            history |= dict.fromkeys(("top1_pct", "train_top1_pct"), 90 - 50 / epoch)
            pd.DataFrame(history).to_csv(e.config.folder(root) / "history.csv", index=False)
    return root


def of_the_store(profile, results):
    """Return the figures that need what each run leaves: accuracy, history."""
    runs = profile_runs(profile, results)
    table = ablation_table(runs)
    drawn = {
        "headline": figures.plot_headline(runs),
        "accuracy": figures.plot_accuracy_against_macs(runs, published()),
        "training": figures.plot_training(runs),
        "ablations": figures.plot_ablations(table, runs),
    }
    for network in runs.network.unique():
        drawn[f"headline of {network}"] = figures.plot_headline(runs, network)
    return drawn


def recorded(spectra, gradients, ranks):
    """Return the figures of what runs recorded."""
    telling = figures.telling_layers(spectra)
    rest = [layer for layer in ranks if layer not in telling]
    return {
        "spectra": figures.plot_spectra(spectra, telling, ranks),
        "spectra of the rest": figures.plot_spectra(spectra, rest, ranks),
        "map": figures.plot_spectrum_map(
            {m: table for m, table in spectra.items() if m != "lrp"}, telling[-1], ranks
        ),
        "energy": figures.plot_energy_kept(energy_shares(spectra, ranks)),
        "gradients": figures.plot_gradients(gradients),
        "ratios": figures.plot_gradient_ratios(gradient_ratios(gradients)),
    }


def of_one_run():
    """Return the figures of a matrix, a network and a run, with numbers as a notebook has them."""
    M = torch.randn(16, 144, generator=torch.Generator().manual_seed(1))
    epoch = np.arange(1, 9)
    history = dict.fromkeys(("loss", "train_loss"), 3 / epoch)
    history |= dict.fromkeys(("top1_pct", "train_top1_pct"), 90 - 50 / epoch)
    history = pd.DataFrame({"epoch": epoch, "learning_rate": np.where(epoch > 4, 0.01, 0.1)} | history)
    names = [f"blocks.{k // 2}.conv{k % 2}" for k in range(110)]
    layers = pd.DataFrame({"name": names, "macs": 4e5, "dense_macs": 1e6, "energy_kept": 0.7})
    candidates = pd.DataFrame({"macs": [1e6, 2e6, 3e6], "top1_pct": [90.0, 92.0, 91.0]})
    curves = {"product of norms, relative": {"lrp": [0.9, 0.05], "lrpet": [1, 1.1]}}
    bound = pd.DataFrame({"gradient": 0.1 * 0.7 ** np.arange(19), "bound": 0.1 * 3.0 ** np.arange(19)})
    return {
        "spectrum": figures.plot_spectrum(M, 6),
        "sweep": figures.plot_rank_sweep(M, 6),
        "depth": figures.plot_by_depth(
            curves | {"‖∂L/∂h‖, relative to dense": {"lrp": [1, 0.2], "lrpet": [1, 2]}}
        ),
        "channels": figures.plot_channel_errors(
            [0.1, 1.0, 10.0], {"without": [0.5] * 3, "with": [0.9, 0.2, 0]}
        ),
        "history": figures.plot_history(history),
        "layers": figures.plot_layers(layers),
        "search": figures.plot_rank_search(candidates.assign(pareto=[True, True, False]), candidates),
        "bound": figures.plot_gradient_bound({"fresh": dict.fromkeys(METHODS, bound), "trained": {}}),
    }


def of_speed(monkeypatch):
    """Return the figures of the committed measurements."""
    monkeypatch.setenv("LRPET_RESULTS", str(PROJECT / "results"))
    results = load_results()
    inference = find(results, "inference", "resnet56")
    return {
        "projection": figures.plot_projection_speed([r for r in results if r["benchmark"] == "projection"]),
        "inference": figures.plot_inference(pd.DataFrame(inference["rows"]), inference["ideal"]),
        "gains": figures.plot_layer_gains(pd.DataFrame(inference["layers"])),
        "latency": figures.plot_latency_trade(
            pd.DataFrame({"speedup": [1.5, 2.0], "allocated": [0.9, 0.8], "uniform": [0.8, np.nan]}),
            "openvino",
        ),
        "growth": figures.plot_growth(pd.DataFrame(find(results, "scaling")["rows"])),
    }


def recorded_by(profile, network, monkeypatch):
    """Return the figures of what the committed runs of a network recorded."""
    monkeypatch.setenv("LRPET_RESULTS", str(PROJECT / "results"))
    chosen = choose_runs(load_profile(profile), network, METHODS)
    folders = {e.config.method: e.config.folder() for e in chosen}
    ranks = ranks_of(build_model(network), chosen[-1].config)
    return recorded(read_recorded(load_spectra, folders), read_recorded(load_gradients, folders), ranks)


@pytest.mark.parametrize(
    "profile", ["smoke", "short", "selection", "scaled", "paper", "imagenette", "imagenet"]
)
def test_figures_of_a_profile(profile, made_up):
    committed = profile in ("short", "selection", "scaled", "imagenette")
    drawn = of_the_store(profile, PROJECT / "results" if committed else made_up)
    for name, figure in drawn.items():
        check_layout(figure, name)
        empty = any(text.get_text() in EMPTY for ax in figure.axes for text in ax.texts) or not figure.axes
        assert empty != bool(figure.finding), name  # each that shows something says what


EMPTY = ("no run of LRPET has finished", "no two ratios of one network have been run", "no run has finished")


@pytest.mark.parametrize(
    ("profile", "network"), [("short", "resnet20"), ("scaled", "resnet20"), ("imagenette", "resnet18")]
)
def test_figures_of_what_runs_recorded(profile, network, monkeypatch):
    for name, figure in recorded_by(profile, network, monkeypatch).items():
        check_layout(figure, name)
        assert figure.finding, name


def test_figures_of_one_run_and_of_speed(monkeypatch):
    for name, figure in (of_one_run() | of_speed(monkeypatch)).items():
        check_layout(figure, name)
        assert figure.finding, name


def test_a_layout_that_is_wrong_is_found():
    figure = figures.ProjectFigure(3)
    ax = figure.subplots()
    ax.text(0.5, 0.5, "one text"), ax.text(0.5, 0.52, "another text")
    with pytest.raises(AssertionError, match="overlaps"):
        check_layout(figure)
    figure = figures.ProjectFigure(3)
    figure.text(0.95, 0.5, "a text that is cut off")
    with pytest.raises(AssertionError, match="leaves the canvas"):
        check_layout(figure)
    figure = figures.ProjectFigure(3)
    figure.set_layout_engine("none")
    figure.add_axes([0.1, 0.1, 0.8, 0.4])
    with pytest.raises(AssertionError, match="% of the height"):
        check_layout(figure)
