"""What is read off recorded runs is right by hand; figures are whole; missing records are named."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from helpers import TINY, check_layout
from PIL import Image

from lrpet import RunConfig, build_model, figures, ranks_from_ratio, run
from lrpet.experiments import load_profile
from lrpet.figures.style import save_figure
from lrpet.tables.recorded import (
    choose_runs,
    energy_shares,
    gradient_ratios,
    read_recorded,
)
from lrpet.training.recording import load_gradients, load_spectra

METHODS = ("dense", "lrp", "lrpet")
RANKS = ranks_from_ratio(build_model("resnet8"), 0.57)


def spectra(layers=7, epochs=(1, 4, 8, 20), K=8, R=3):
    """Tables as runs record them: s_i = 1 / i, which LRP cuts and LRPET scales to the energy of all."""
    s = 1 / np.arange(1, K + 1)
    energy = np.square(s).cumsum()
    after = {"dense": None, "lrp": 1.0, "lrpet": np.sqrt(energy[-1] / energy[R - 1])}
    tables = {}
    for method in METHODS:
        parts = []
        for epoch in epochs:
            for layer in range(layers):
                row = {"epoch": epoch, "layer": f"blocks.{layer}.conv", "i": np.arange(1, K + 1)}
                parts.append(pd.DataFrame({**row, "when": "before", "s": s}))
                if after[method] is not None:
                    parts.append(
                        pd.DataFrame(
                            {**row, "when": "after", "s": np.where(row["i"] <= R, after[method] * s, 0.0)}
                        )
                    )
        tables[method] = pd.concat(parts, ignore_index=True)
    return tables, {f"blocks.{layer}.conv": R for layer in range(layers)}


def gradients(layers=7, epochs=(1, 4, 8, 20)):
    rows = [
        {"epoch": epoch, "layer": f"blocks.{layer}.conv", "weight_norm": 4.0}
        for epoch in epochs
        for layer in range(layers)
    ]
    size = {"dense": 1.0, "lrp": 0.1, "lrpet": 0.5}
    return {
        method: pd.DataFrame(rows).assign(gradient_norm=size[method] * np.linspace(1, 2, len(rows)))
        for method in METHODS
    }


def compared(layers=19):
    depth = np.arange(layers)[::-1]

    def table(rate):
        return pd.DataFrame(
            {"gradient": 0.1 * rate**depth, "bound": 0.1 * 3.0**depth, "norm_product": 5 * rate**depth}
        )

    return {"dense": table(1.0), "lrp": table(0.7), "lrpet": table(1.01)}


def everything_drawn(layers=7):
    some, ranks = spectra(layers)
    names = list(ranks)
    return {
        "spectra": figures.plot_spectra(some, names, ranks),
        "map": figures.plot_spectrum_map(some, names[0], ranks),
        "energy": figures.plot_energy_kept(energy_shares(some, ranks)),
        "gradients": figures.plot_gradients(gradients(layers)),
        "ratios": figures.plot_gradient_ratios(gradient_ratios(gradients(layers))),
        "bound": figures.plot_gradient_bound({"fresh weights": compared(), "trained weights": compared()}),
    }


# ---------------------------------------------------------------- tables


def test_energy_shares_by_hand():
    shares = energy_shares(*spectra())
    energy = np.square(1 / np.arange(1, 9)).cumsum()
    assert np.allclose(shares.kept_pct, 100 * energy[2] / energy[-1])
    after = shares.groupby("method", sort=False).after_pct.mean()
    assert np.isnan(after["dense"])
    assert after["lrp"] == pytest.approx(100 * energy[2] / energy[-1])
    assert after["lrpet"] == pytest.approx(100)
    assert shares.columns.tolist() == ["method", "epoch", "layer", "rank", "kept_pct", "after_pct"]


def test_epochs_without_a_projection_and_layers_without_a_rank():
    some, ranks = spectra()
    table = some["lrp"][
        (some["lrp"].epoch == 20) | (some["lrp"].when == "before")
    ]  # projected in the last epoch only
    del ranks["blocks.0.conv"]
    shares = energy_shares({"lrp": table}, ranks)
    assert set(shares.layer) == set(ranks)
    assert (
        shares[shares.epoch < 20].after_pct.isna().all()
        and shares[shares.epoch == 20].after_pct.notna().all()
    )


def test_ratios_by_hand():
    both = gradients()
    both["lrp"]["weight_norm"] = 2.0
    ratios = gradient_ratios(both)
    assert np.allclose(ratios.gradient, 5) and np.allclose(ratios.scale_free, 10)


def test_recorded_runs_from_the_store_to_the_tables():
    folders = {method: run(RunConfig(method=method, **TINY), progress="off").folder for method in METHODS}
    shares = energy_shares(read_recorded(load_spectra, folders), RANKS)
    first = shares[shares.epoch == 1].set_index(["method", "layer"])
    for layer in RANKS:  # until the first projection all three are the same run
        assert (
            first.kept_pct["dense", layer]
            == pytest.approx(first.kept_pct["lrp", layer])
            == pytest.approx(first.kept_pct["lrpet", layer])
        )
        assert first.after_pct["lrp", layer] < first.after_pct["lrpet", layer]
    ratios = gradient_ratios(read_recorded(load_gradients, folders))
    assert np.allclose(ratios[ratios.epoch == 1][["gradient", "scale_free"]], 1)
    assert not np.allclose(ratios[ratios.epoch == 2][["gradient", "scale_free"]], 1)


def test_without_batchnorm_energy_transfer_keeps_the_energy_of_the_weight_itself():
    settings = {"model": "plain20", "learning_rate": 0.005, **TINY, "epochs": 1, "milestones": ()}
    ranks = ranks_from_ratio(build_model("plain20"), 0.57)
    shares = energy_shares({"lrpet": load_spectra(run(RunConfig(**settings), progress="off").folder)}, ranks)
    assert len(shares) == 19
    assert np.allclose(shares.after_pct, 100, atol=0.2)


@pytest.mark.parametrize("load", [load_spectra, load_gradients])
def test_an_older_run_is_named_and_the_rest_goes_on(load, tmp_path, capsys):
    done = run(RunConfig(**TINY), progress="off").folder
    (tmp_path / "an older run").mkdir()
    assert list(read_recorded(load, {"dense": tmp_path / "an older run", "lrpet": done})) == ["lrpet"]
    assert "dense: not recorded; an older run is older than recording" in capsys.readouterr().out


def test_nothing_recorded_is_said_and_drawn():
    shares, ratios = energy_shares({}, RANKS), gradient_ratios({})
    drawn = [
        figures.plot_spectra({}, [], RANKS),
        figures.plot_spectrum_map({}, "conv", RANKS),
        figures.plot_energy_kept(shares),
    ]
    drawn += [figures.plot_gradients({}), figures.plot_gradient_ratios(ratios)]
    for figure in drawn:
        assert {text.get_text() for ax in figure.axes for text in ax.texts} == {"not recorded"}
        assert len(Image.open(BytesIO(figure.png())).getcolors()) > 2
    assert "weights not in the store" in [
        text.get_text() for ax in figures.plot_gradient_bound({"trained": {}}).axes for text in ax.texts
    ]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("layers", [1, 25])
def test_every_figure_says_what_it_shows_and_has_room_for_it(layers):
    for name, figure in everything_drawn(layers).items():
        check_layout(figure, name)
        assert figure.finding, name
        assert figure.get_supxlabel() or any(ax.get_xlabel() for ax in figure.axes), name
        assert figure.get_supylabel() or any(ax.get_ylabel() for ax in figure.axes), name


def test_figures_are_saved_byte_for_byte_the_same():
    saved = [
        [
            path.read_bytes()
            for path in save_figure(figures.plot_gradient_ratios(gradient_ratios(gradients(2))), "r", "smoke")
        ]
        for _ in range(2)
    ]
    assert saved[0] == saved[1]


def test_telling_layers_are_the_most_alike_and_the_least_alike():
    some, ranks = spectra(6)
    away = {"blocks.1.conv": 3.0, "blocks.2.conv": 1.1, "blocks.3.conv": 1.2, "blocks.5.conv": 2.0}
    some["lrpet"] = some["lrpet"].assign(s=some["lrpet"].s * some["lrpet"].layer.map(away).fillna(1.0))
    assert figures.telling_layers(some) == [f"blocks.{k}.conv" for k in (0, 1, 4, 5)]


def test_markers_show_a_projection_only_where_it_changes_something():
    some, ranks = spectra(2)
    table = some["lrpet"]
    settled = (table.layer == "blocks.1.conv") & (table.when == "before")  # as at the end of training
    last = table[(table.layer == "blocks.1.conv") & (table.when == "after")]
    table.loc[settled, "s"] = last.s.to_numpy()
    first, second = figures.plot_spectra({"lrpet": table}, list(ranks), ranks).axes
    assert [line.get_label() for line in first.lines[:2]] == ["LRPET", "LRPET, after the projection"]
    assert "LRPET, after the projection" not in [line.get_label() for line in second.lines]


def test_energy_that_is_forced_is_called_so():
    some, ranks = spectra()
    for method in ("lrp", "lrpet"):
        table = some[method]
        table.loc[(table.when == "before") & (table.i > 3), "s"] = 1e-6
    assert figures.plot_energy_kept(energy_shares(some, ranks)).finding == (
        "Energy in the first $R$ values: LRP and LRPET forced to 100 % by projections, dense ends at 89 %"
    )
    assert "forced" not in figures.plot_energy_kept(energy_shares(*spectra())).finding


def test_gradients_are_ticked_at_one_two_and_five():
    ax = figures.plot_gradients({"lrp": gradients()["lrp"]}).axes[0]  # from 0.1 to 0.2
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert np.allclose(ticks, [0.05, 0.1, 0.2])


def test_the_map_of_ratios_is_centred_on_one_and_reads_in_greyscale():
    ratios = gradient_ratios(gradients(3))
    ratios.loc[0, "gradient"] = 0.5
    left, _, bar = figures.plot_gradient_ratios(ratios).axes
    low, high = left.collections[0].get_clim()
    assert low == -high  # of logarithms: the middle colour is a ratio of 1
    dots = next(line for line in left.lines if line.get_marker() == "o")
    assert len(dots.get_xdata()) == (ratios.gradient > 1).sum() == len(ratios) - 1
    assert [label.get_text() for label in bar.get_yticklabels()] == [
        "0.2",
        "0.5",
        "0.8",
        "1",
        "1.25",
        "2",
        "5",
    ]


def test_one_run_and_one_epoch_are_enough():
    some, ranks = spectra(3, epochs=(1,))
    only = {"lrpet": some["lrpet"]}
    for figure in (
        figures.plot_spectra(only, list(ranks), ranks),
        figures.plot_spectrum_map(only, "blocks.1.conv", ranks),
    ):
        assert len(figure.png()) > 5000
    figures.plot_energy_kept(energy_shares(only, ranks)).png()
    figures.plot_gradients({"lrp": gradients(3, epochs=(1,))["lrp"]}).png()


def test_the_first_seed_that_is_recorded_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("LRPET_RESULTS", str(tmp_path))
    profile = load_profile("smoke")

    def choose(*args):
        return {e.name for e in choose_runs(profile, "resnet8", ["lrp", "lrpet"], *args)}

    assert choose() == {"resnet8-lrp-s1", "resnet8-lrpet-s1"}  # nothing is recorded yet
    for experiment in profile.experiments:
        if experiment.name in ("resnet8-lrp-s2", "resnet8-lrpet-s2", "resnet8-lrp-s1"):
            experiment.config.folder().mkdir(parents=True)
            (experiment.config.folder() / "spectra.npz").touch()
    assert choose() == {"resnet8-lrp-s2", "resnet8-lrpet-s2"}
    assert choose(1) == {"resnet8-lrp-s1", "resnet8-lrpet-s1"}
    with pytest.raises(ValueError, match="no experiment of profile 'smoke' is called 'resnet56-lrp-s1'"):
        choose_runs(profile, "resnet56", ["lrp"])
