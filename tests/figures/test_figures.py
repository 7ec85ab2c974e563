"""Figures leave no state behind, have units, stand what is missing, and are saved as the same bytes."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import COLOUR_BLINDNESS, experiment, lab_of, linear_rgb, put
from matplotlib import rc_context, rcParams, style
from matplotlib.figure import Figure
from matplotlib.text import Text

import lrpet
from lrpet import figures
from lrpet.paths import PROJECT, figures_root
from lrpet.registry import METHODS
from lrpet.tables.rows import profile_runs, published

EPOCHS = 6


def matrix(N=16, D=40):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def history(epochs=EPOCHS):
    epoch = np.arange(1, epochs + 1)
    rate = np.where(epoch > 3, 0.01, 0.1)
    losses = {"train_loss": 2.0 / epoch, "loss": 3.0 / epoch}
    return pd.DataFrame(
        {
            "epoch": epoch,
            "learning_rate": rate,
            **losses,
            "train_top1_pct": 90 - 50 / epoch,
            "top1_pct": 95 - 60 / epoch,
            "scored_on": "test",
        }
    )


def layers(n=7, dead=()):
    table = pd.DataFrame(
        {
            "name": [f"blocks.{i}.conv" for i in range(n)],
            "macs": 4e5,
            "dense_macs": 1e6,
            "energy_kept": 0.7,
            "action": "factorized",
        }
    )
    table.loc[list(dead), ["macs", "energy_kept", "action"]] = [0, np.nan, "constant"]
    return table


def runs(methods=("dense", "lrp", "lrpet"), seeds=(1, 2, 3), ratios=(0.57,), **fields):
    rows = []
    for method, seed in itertools.product(methods, seeds):
        for ratio in [None] if method == "dense" else ratios:
            cost = 1.0 if ratio is None else 1.02 - ratio
            settings = {"dataset": "cifar10", "profile": "paper", "model": "resnet56", "scored_on": "test"}
            settings |= {"milestones": [200, 300], "ranks": None, "bn_rectification": True}
            row = {**settings, "method": method, "seed": seed, "prune_ratio": ratio, **fields}
            rows.append(
                row
                | {"macs": 125e6 * cost, "dense_macs": 125e6, "top1_pct": 93 + 0.1 * seed - (method == "lrp")}
            )
    return pd.DataFrame(rows)


def labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def everything_drawn():
    M = matrix()
    return {
        "spectrum": figures.plot_spectrum(M, 6),
        "sweep": figures.plot_rank_sweep(M, 6),
        "history": figures.plot_history({"dense": history(), "lrpet": [history(), history()]}),
        "layers": figures.plot_layers(layers(dead=[2])),
        "depth": figures.plot_by_depth({"product of norms, relative": {"lrp": [0.9, 0.05], "lrpet": [1, 1]}}),
        "channels": figures.plot_channel_errors(
            [0.1, 1.0, 10.0], {"without": [0.5, 0.5, 0.5], "with": [0.9, 0.2, 0.0]}
        ),
        "accuracy": figures.plot_accuracy_against_macs(runs(), published()),
        "headline": figures.plot_headline(profile_runs("short", PROJECT / "results")),
    }


def test_every_figure_is_labelled_with_units():
    units = ("%", "nats", "millions", "epoch", "layer", "number", "rank", "s_i", "relative", "scale")
    for name, figure in everything_drawn().items():
        assert isinstance(figure, Figure), name
        assert len(figure.png()) > 5000, name
        for ax in figure.axes:
            shared = ax.get_shared_x_axes().get_siblings(ax)
            assert any(a.get_xlabel() for a in shared), name
            if name != "headline":  # whose rows are named
                assert any(unit in ax.get_ylabel() for unit in units), (name, ax.get_ylabel())
            assert all(
                any(unit in a.get_xlabel() for unit in (*units, "MACs")) for a in shared if a.get_xlabel()
            ), name


def test_nothing_is_cut_off_or_covered():
    for name, figure in everything_drawn().items():
        figure.png()
        page = figure.bbox
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 + 1, name
            assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes), name
        for ax in figure.axes:
            for text in filter(Text.get_text, (ax.xaxis.label, ax.yaxis.label, *ax.texts)):
                box = text.get_window_extent()
                assert (
                    page.x0 - 1 <= box.x0
                    and box.x1 <= page.x1 + 1
                    and page.y0 - 1 <= box.y0
                    and box.y1 <= page.y1 + 1
                ), (name, text.get_text())


def test_import_sets_nothing_and_the_package_does_without_matplotlib(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # else reading rcParams["backend"] imports pyplot to find one
    code = (
        "import sys, lrpet; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        "from lrpet import figures; figures.plot_rank_sweep(__import__('torch').eye(3), 1).png()\n"
        "assert matplotlib.rcParams == before and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_callers_style_neither_changes_nor_matters():
    plain = figures.plot_layers(layers()).png()
    with style.context("dark_background"), rc_context({"font.size": 30, "xtick.color": "red"}):
        before = dict(rcParams)
        figure = figures.plot_layers(layers())
        assert figure.png() == plain
        assert dict(rcParams) == before
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_methods_look_different():
    assert list(METHODS) == list(figures.METHOD_STYLES)
    looks = list(figures.METHOD_STYLES.values())
    for part in ("label", "color", "marker", "linestyle"):
        values = [getattr(look, part) for look in looks]
        assert part == "linestyle" or len(set(values)) == len(values), part
    assert len({(look.marker, look.linestyle) for look in looks}) == len(looks)  # in grayscale too
    for seen in COLOUR_BLINDNESS:
        lab = {
            name: lab_of(np.clip(np.array(seen) @ linear_rgb(look.color), 0, 1))
            for name, look in figures.METHOD_STYLES.items()
        }
        distances = {
            pair: np.linalg.norm(lab[pair[0]] - lab[pair[1]]) for pair in itertools.combinations(lab, 2)
        }
        assert min(distances.values()) > 15, min(distances, key=distances.get)
        assert min(distances[pair] for pair in itertools.combinations(("dense", "lrp", "lrpet"), 2)) > 40


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("LRPET", "lrpet"),
        ("baseline (TRP)", "dense"),
        ("TRP+nuclear (channel)", "trp"),
        ("cifar10-resnet20-lrp-0.57-s1-3f9a21", "lrp"),
    ],
)
def test_names_find_their_style(name, same_as):
    assert figures.method_style(name).color == figures.METHOD_STYLES[same_as].color
    assert figures.method_style(name).label == name


def test_spectrum_shows_what_project_does():
    M = matrix().double()
    left, right = figures.plot_spectrum(M, 6).axes
    for name, transfer in (("LRP", False), ("LRPET", True)):
        s = torch.linalg.svdvals(lrpet.project(M, 6, energy_transfer=transfer))
        points = next(line for line in left.lines if line.get_label() == name)
        np.testing.assert_allclose(points.get_ydata(), s[:6], rtol=1e-6)
        curve = next(line for line in right.lines if line.get_label() == name)
        np.testing.assert_allclose(
            curve.get_ydata()[-1], 100 * (s.square().sum() / M.square().sum()).item(), rtol=1e-6
        )
    heights = [bar.get_height() for bar in left.patches]
    np.testing.assert_allclose(heights, torch.linalg.svdvals(M), rtol=1e-6)
    assert sum(bool(bar.get_hatch()) for bar in left.patches) == 10


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_spectrum_at_the_ends(rank, shape):
    assert figures.plot_spectrum(matrix(*shape).half(), rank).png()


def test_spectrum_refuses_a_wrong_rank():
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 16"):
        figures.plot_spectrum(matrix(), 17)


def test_zero_matrix_draws():
    for figure in (
        figures.plot_spectrum(torch.zeros(4, 6), 2),
        figures.plot_rank_sweep(torch.zeros(4, 6), 2),
    ):
        assert figure.png()


def test_rank_sweep_formula_is_what_project_does():
    M = matrix().double()
    energy, error = figures.plot_rank_sweep(M).axes
    for k, transfer in enumerate((False, True)):
        measured = [lrpet.project(M, R, energy_transfer=transfer) for R in range(1, 17)]
        np.testing.assert_allclose(
            error.lines[k].get_ydata(), [((P - M).norm() / M.norm()).item() for P in measured], atol=1e-6
        )
        np.testing.assert_allclose(
            energy.lines[k].get_ydata(),
            [100 * ((P.norm() / M.norm()) ** 2).item() for P in measured],
            rtol=1e-6,
        )


def test_history_marks_milestones_and_seeds():
    figure = figures.plot_history(
        {"dense": history(), "lrpet": [history(), history()], "lrpet, no BN": history()}
    )
    assert labels(figure) == ["dense", "LRPET (2 seeds)", "lrpet, no BN"]
    loss, accuracy = figure.axes
    assert loss.get_yscale() == "log"
    assert [line.get_xdata()[0] for line in accuracy.lines if len(set(line.get_xdata())) == 1] == [3.5]
    assert len(accuracy.collections) == 1  # the band over seeds
    blue = figures.METHOD_STYLES["lrpet"].color
    assert (
        len({line.get_linestyle() for line in accuracy.lines if line.get_color() == blue}) == 2
    )  # two variants of one method


@pytest.mark.parametrize(
    "histories", [{}, {"lrpet": []}, history(), history(1), {"my own": history(), "another": history()}]
)
def test_history_of_little_or_unknown(histories):
    assert figures.plot_history(histories).png()


def test_layers_mark_dead_ones_and_count():
    figure = figures.plot_layers(layers(dead=[2, 3]))
    assert set(labels(figure)) == {"dense, 7.00 M in all", "compact, 2.00 M in all", "dead layer, no MACs"}


@pytest.mark.parametrize(
    "table",
    [
        layers().drop(columns=["energy_kept", "action"]),
        layers(110),
        layers().assign(energy_kept=np.nan),
        layers(1),
    ],
)
def test_layers_of_every_kind(table):
    figure = figures.plot_layers(table)
    assert figure.png()
    assert len(figure.axes[1].get_xticks()) <= 28


def test_layers_names_a_missing_column():
    with pytest.raises(ValueError, match="'dense_macs'"):
        figures.plot_layers(layers().drop(columns="dense_macs"))


def test_accuracy_of_a_run_of_the_store():
    run = lrpet.run(lrpet.RunConfig(epochs=1, milestones=(), batch_size=256), progress="off")
    assert figures.plot_accuracy_against_macs(lrpet.load_runs(run.folder.parent), published()).png()
    assert figures.plot_layers(run.layers).png()
    assert figures.plot_history(run.history).png()


def points(ax, label):
    line = next(line for line in ax.lines if line.get_label() == label)
    return np.column_stack([line.get_xdata(), line.get_ydata()])


def test_accuracy_averages_over_seeds():
    figure = figures.plot_accuracy_against_macs(runs(ratios=(0.57, 0.7)), published())
    (ax,) = figure.axes
    np.testing.assert_allclose(points(ax, "LRPET"), [[40.0, 93.2], [56.25, 93.2]])
    np.testing.assert_allclose(points(ax, "LRP"), [[40.0, 92.2], [56.25, 92.2]])
    np.testing.assert_allclose(points(ax, "LRPET, published"), [[56.06, 93.27]])
    bars = [segment for collection in ax.collections for segment in collection.get_segments() if len(segment)]
    interval = 2 * 4.302653 * 0.1 / 3**0.5  # Student's t for three values of standard deviation 0.1
    np.testing.assert_allclose(np.ptp(np.array(bars)[:, :, 1], axis=1), interval, rtol=1e-6)
    assert ax.get_title(loc="left") == "last epoch, mean and 95 % interval over 3 seeds; hollow: published"


def test_accuracy_of_equal_cost_stands_side_by_side():
    figure = figures.plot_accuracy_against_macs(runs())
    figure.png()
    (ax,) = figure.axes
    places = {}
    for line in ax.lines:
        if line.get_label() in ("LRP", "LRPET"):
            places[line.get_label()] = line.get_transform().transform(
                np.column_stack([line.get_xdata(), line.get_ydata()])
            )[0, 0]
    assert places["LRPET"] - places["LRP"] == pytest.approx(8 * figure.dpi / 72)


def test_accuracy_tells_variants_and_networks_apart():
    table = pd.concat(
        [runs(), runs(["lrpet"], bn_rectification=False), runs(["lrpet"], seeds=[1], model="resnet110")],
        ignore_index=True,
    )
    figure = figures.plot_accuracy_against_macs(table)
    assert set(labels(figure)) == {"dense (3 seeds)", "LRP (3 seeds)", "LRPET (3 seeds)"} | {
        "LRPET without BN rectification (3 seeds)",
        "LRPET (1 seed)",
    }
    assert {text.get_text() for text in figure.axes[0].texts} == {"resnet56", "resnet110"}


@pytest.mark.parametrize(
    ("table", "reported"),
    [
        (runs(["dense"]), None),
        (runs(["lrpet"], seeds=[1]), None),
        (runs(seeds=[1]), published()),
        (runs().iloc[:0], None),
        (pd.DataFrame(), published()),
        (runs().iloc[:0], published()),
        (runs(dataset="digits"), published()),
        (runs(["my_method"]), published().iloc[:0]),
        (runs(list(figures.METHOD_STYLES)), published()),
    ],
)
def test_accuracy_with_something_missing(table, reported):
    figure = figures.plot_accuracy_against_macs(table, reported)
    assert figure.png()
    assert bool(labels(figure)) == bool(len(table))
    assert [text.get_text() for text in figure.axes[0].texts] == (
        [] if len(table) else ["no run has finished"]
    )


def test_accuracy_takes_a_published_share_for_the_same_network():
    table = runs(["dense"], model="resnet20")
    (ax,) = figures.plot_accuracy_against_macs(table, published()).axes
    np.testing.assert_allclose(points(ax, "baseline (TRP), published"), [[125.0, 91.74]])
    np.testing.assert_allclose(points(ax, "TRP+nuclear (channel), published"), [[125 * (1 - 0.539), 90.50]])


@pytest.mark.parametrize("column", ["dataset", "profile"])
def test_accuracy_refuses_what_does_not_compare(column):
    table = pd.concat([runs(), runs(**{column: "another"})])
    with pytest.raises(ValueError, match=f"runs must be of one {column}"):
        figures.plot_accuracy_against_macs(table)


def test_saved_files_are_the_same_every_time():
    contents = []
    for figure in (
        figures.plot_accuracy_against_macs(runs(), published()),
        figures.plot_accuracy_against_macs(runs(), published()),
    ):
        for _ in range(2):
            paths = figures.save_figure(figure, "accuracy", "smoke")
            contents.append([path.read_bytes() for path in paths])
    assert all(content == contents[0] for content in contents)
    assert [path.name for path in paths] == ["accuracy.png", "accuracy.svg"]
    assert {path.parent for path in paths} == {figures_root() / "smoke"}
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["accuracy.png", "accuracy.svg"]
    png, svg = contents[0]
    assert png.startswith(b"\x89PNG")
    assert b"matplotlib version" not in png and b"<dc:date>" not in svg


def test_another_process_saves_the_same_bytes(tmp_path):
    code = "import torch; from lrpet import figures as f; M = torch.diag(torch.arange(1., 9.)); "
    code += "f.save_figure(f.plot_spectrum(M, 3), 's', 'smoke')"
    subprocess.run([sys.executable, "-c", code], check=True)
    folder = figures_root() / "smoke"
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    figures.save_figure(figures.plot_spectrum(torch.diag(torch.arange(1.0, 9.0)), 3), "s", "smoke")
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before


@pytest.mark.parametrize(
    ("name", "profile"),
    [("../up", "smoke"), ("", "smoke"), ("a/b", "smoke"), ("a", "nowhere"), ("a", "../smoke")],
)
def test_save_refuses_a_place_outside(name, profile):
    with pytest.raises(ValueError, match="name must be|profile must be"):
        figures.save_figure(figures.plot_rank_sweep(matrix()), name, profile)
    assert not Path(figures_root()).exists()


def test_saved_figures_come_with_their_origin(monkeypatch, tmp_path):
    monkeypatch.setenv("LRPET_FIGURES", str(tmp_path))
    assert figures.saved_figures("smoke") == []
    for name in ("ablations", "00_anything", "unheard_of"):
        figures.save_figure(figures.plot_rank_sweep(torch.eye(2)), name, "smoke")
    captions = {path.stem: caption for caption, path in figures.saved_figures("smoke")}
    assert "03_ablations.ipynb" in captions["ablations"] and "00_method.ipynb" in captions["00_anything"]
    assert captions["unheard_of"] == "**unheard_of**, "


def test_a_setting_that_was_not_run_says_so():
    rows = [
        ["residual factor", "0", "a", "LRPET as it is"],
        ["residual factor", "0.3", "b", "not tested"],
        ["residual factor", "0.6", "c", "higher"],
        ["row_eps", "0", "a", "LRPET as it is"],
        ["row_eps", "1", "b", "not tested"],
    ]
    table = pd.DataFrame(rows, columns=["question", "setting", "experiment", "verdict"])
    figure = figures.plot_ablations(
        table, pd.DataFrame({"experiment": ["a", "a", "b", "c"], "top1_pct": [90.0, 91.0, None, 95.0]})
    )
    figure.png()
    (first,) = figure.axes  # one setting alone is no ablation
    assert [text.get_text() for text in first.texts] == ["not run"]
    assert sorted(x for line in first.lines for x in line.get_xdata() if line.get_marker() == "o") == [
        90.0,
        91.0,
        95.0,
    ]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "0.3", "0.6"]


# ---------------------------------------------------------------- headline


def test_the_headline_sorts_by_mean_and_claims_only_what_is_decided(tmp_path):
    values = {"dense": (90, 90.1, 90.2), "lrpet": (85, 85.1, 85.2), "lrp": (80, 80.12, 80.2), "narrow": (86,)}
    for method, seeds in values.items():
        for seed, value in enumerate(seeds, start=1):
            config = experiment("scaled", f"resnet20-{method}-s{seed}")
            macs = 40_551_040 if method == "dense" else 18_211_456
            put(tmp_path, config, value, macs=macs, dense_macs=40_551_040)
    figure = figures.plot_headline(profile_runs("scaled", tmp_path))
    figure.png()
    (ax,) = figure.axes
    rows = [label.get_text() for label in ax.get_yticklabels()][::-1]
    assert rows == ["dense, 40.6 M MACs", "narrow network", "LRPET", "LRP"]
    assert figure.get_suptitle().startswith("At 18.2 M multiply-adds LRPET beats LRP; no other")
    told = [text.get_text() for text in ax.texts][::-1]
    assert told == ["90.10  (3 seeds)", "86.00  (1 seed)", "85.10  (3 seeds)", "80.11  (3 seeds)"]


def test_the_headline_of_a_profile_without_runs_says_so(tmp_path):
    (ax,) = figures.plot_headline(profile_runs("paper", tmp_path)).axes
    assert ax.texts[0].get_text() == "no run of LRPET has finished"


def shown(svg):
    """Return the texts of a figure's SVG, and where its marks stand, in points."""
    marks = re.findall(r'<use [^>]*\bx="([-\d.]+)" y="([-\d.]+)"', svg)
    return re.findall("<!-- (.*?) -->", svg), np.array(marks, dtype=float)


@pytest.mark.parametrize("profile", [path.parent.name for path in PROJECT.glob("figures/*/headline.svg")])
def test_a_committed_headline_shows_what_the_store_holds(profile):
    committed = (PROJECT / "figures" / profile / "headline.svg").read_text(encoding="utf-8")
    today = figures.plot_headline(profile_runs(profile, PROJECT / "results")).svg().decode()
    (texts, marks), (texts_today, marks_today) = shown(committed), shown(today)
    assert texts == texts_today and any("seeds)" in text for text in texts)
    assert marks.shape == marks_today.shape and len(marks) > 10
    assert np.abs(marks - marks_today).max() < 0.5  # points: fonts are drawn a little otherwise elsewhere


def test_the_readme_shows_a_headline_that_is_compared_with_the_store():
    assert (PROJECT / "figures" / "scaled" / "headline.svg").is_file()
    assert "(figures/scaled/headline.png)" in (PROJECT / "README.md").read_text(encoding="utf-8")
