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


def test_import_sets_nothing_and_the_package_does_without_matplotlib(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # else reading rcParams["backend"] imports pyplot to find one
    code = (
        "import sys, lrpet; assert not {'matplotlib', 'seaborn'} & set(sys.modules)\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        "from lrpet import figures; figures.plot_rank_sweep(__import__('torch').eye(3), 1).png()\n"
        "assert matplotlib.rcParams == before and not sys.modules['matplotlib.pyplot'].get_fignums()"
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


def test_layers_and_history_of_a_run_of_the_store():
    run = lrpet.run(lrpet.RunConfig(epochs=1, milestones=(), batch_size=256), progress="off")
    assert figures.plot_layers(run.layers).png()
    assert figures.plot_history(run.history).png()


def store(root, **accuracies):
    """Put runs of scaled into a store: experiment → accuracy of seeds 1, 2, …; MACs as the ratio says."""
    for name, values in accuracies.items():
        for seed, value in enumerate(values, start=1):
            config = experiment("scaled", f"resnet20-{name.replace('_', '-')}-s{seed}")
            put(root, config, value, macs=int(100e6 * (1 - (config.prune_ratio or 0))), dense_macs=10**8)
    return profile_runs("scaled", root)


def test_accuracy_against_macs_is_a_sweep_of_ratios_and_nothing_else(tmp_path):
    sweep = {"lrpet": (90.0, 92.0), "lrpet_0.30": (95.0, 94.0), "lrpet_0.80": (80.0, 81.0)}
    runs = store(tmp_path, dense=(97.0, 98.0), lrp=(89.0, 88.0), lrpet_4_epochs=(60.0,), **sweep)
    figure = figures.plot_accuracy_against_macs(runs)
    (ax,) = figure.axes
    assert labels(figure) == ["LRPET"]  # of LRP there is one ratio, which is no sweep
    mean = next(line for line in ax.lines if line.get_label() == "LRPET")
    np.testing.assert_allclose(mean.get_xydata(), [[20, 80.5], [43, 91], [70, 94.5]])
    assert ax.get_title(loc="left") == "resnet20, 2 seeds a point"
    (band,) = ax.collections
    at = band.get_paths()[0].vertices
    np.testing.assert_allclose(sorted(set(at[at[:, 0] == 43][:, 1])), [90, 92])  # lowest and highest seed
    assert [text.get_text() for text in ax.texts] == ["dense, 100.0 M: 97.50 %"]
    assert (
        figure.finding == "resnet20: LRPET goes from 94.50 to 80.50 % as 70.0 M multiply-adds become 20.0 M"
    )


def test_published_numbers_of_the_same_network_are_hollow():
    runs = profile_runs("paper", PROJECT / "results")
    lrpet = runs.label.eq("LRPET") & runs.network.eq("resnet56") & runs.ratio.notna()
    made_up = {"top1_pct": 90.0, "macs": 125e6 * (1 - runs.ratio), "dense_macs": 125e6}
    made_up |= {"dataset": "cifar10", "scored_on": "test"}
    figure = figures.plot_accuracy_against_macs(runs[lrpet].assign(**made_up), published())
    line = next(line for line in figure.axes[0].lines if line.get_label() == "LRPET, published")
    known = published().query("dataset == 'cifar10' and model == 'resnet56' and method == 'LRPET'")
    known = known.dropna(subset=["macs_m", "top1_pct"]).sort_values("macs_m")
    np.testing.assert_allclose(line.get_xydata(), known[["macs_m", "top1_pct"]])
    assert line.get_markerfacecolor() == "#FFFFFF"


def test_saved_files_are_the_same_every_time():
    contents = []
    for figure in (
        figures.plot_history({"lrp": [history(), history()]}),
        figures.plot_history({"lrp": [history(), history()]}),
    ):
        for _ in range(2):
            paths = figures.save_figure(figure, "history", "smoke")
            contents.append([path.read_bytes() for path in paths])
    assert all(content == contents[0] for content in contents)
    assert [path.name for path in paths] == ["history.png", "history.svg"]
    assert {path.parent for path in paths} == {figures_root() / "smoke"}
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["history.png", "history.svg"]
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
    for name in ("ablations", "unheard_of"):
        figures.save_figure(figures.plot_rank_sweep(torch.eye(2)), name, "smoke")
    captions = {path.stem: caption for caption, path in figures.saved_figures("smoke")}
    assert captions["ablations"].startswith("**ablations.** Accuracy with one thing changed.")
    assert "03_ablations.ipynb" in captions["ablations"]
    assert captions["unheard_of"] == "**unheard_of**"


def test_every_figure_that_a_notebook_saves_has_a_caption():
    saved = {
        name
        for notebook in (PROJECT / "notebooks").glob("*.ipynb")
        for name in re.findall(r'save_figure\(\w+, f?\\"(\w+)', notebook.read_text(encoding="utf-8"))
    }
    told = re.findall(r"^\| `(\w+)\*?` \|", (PROJECT / "figures/README.md").read_text(), re.MULTILINE)
    assert len(saved) > 15 and saved == set(told)


def test_a_setting_that_was_not_run_says_so():
    rows = [
        ["from", "scratch", "a", "LRPET as it is"],
        ["from", "a trained one", "b", "not tested"],
        ["from", "another", "c", "higher"],
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
    dots = sorted(x for line in first.lines for x in line.get_xdata() if line.get_marker() == "o")
    assert dots == [90.0, 91.0, 95.0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["scratch", "a trained one", "another"]
    assert figure.finding.startswith("1 of 1 settings with enough seeds is shown to differ")


def test_a_setting_that_is_a_number_is_a_line_with_a_band():
    rows = [[0.57, "a", "LRPET as it is"], [0.3, "b", "higher"], [0.7, "c", "not tested"]]
    table = pd.DataFrame(rows, columns=["setting", "experiment", "verdict"])
    table = table.assign(question="prune ratio", setting=table.setting.astype(str))
    runs = pd.DataFrame({"experiment": list("aabbc"), "top1_pct": [90.0, 91.0, 95.0, 96.0, None]})
    figure = figures.plot_ablations(table, runs.assign(ratio=[0.57, 0.57, 0.3, 0.3, 0.7]))
    (ax,) = figure.axes
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.3, 95.5], [0.57, 90.5]])
    assert len(ax.collections) == 1 and labels(figure) == ["LRPET"]
    assert ax.get_xlabel() == "prune ratio\nnot run: 0.7"


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
    assert rows == ["dense (40.6 M MACs)", "narrow network", "LRPET", "LRP"]
    assert figure.finding.startswith("At 18.2 M multiply-adds LRPET beats LRP; no other")
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


def test_plain_networks_have_a_headline_of_their_own(tmp_path):
    for name, top1 in (("resnet20-lrpet", 90), ("plain20-lrpet", 70), ("plain20-lrp", 60)):
        put(tmp_path, experiment("scaled", f"{name}-s1"), top1, macs=18_211_456, dense_macs=40_551_040)
    runs = profile_runs("scaled", tmp_path)
    rows = [
        [label.get_text() for label in figures.plot_headline(runs, network).axes[0].get_yticklabels()]
        for network in (None, "resnet20", "plain20")
    ]
    assert rows == [["LRPET"], ["LRPET"], ["LRP", "LRPET"]]
    finding = figures.plot_headline(runs, "plain20").finding
    assert finding == "At 18.2 M multiply-adds 1 seed of LRPET is too few for a verdict on plain20"


def test_training_curves_are_of_the_main_methods_over_all_seeds():
    figure = figures.plot_training(profile_runs("short", PROJECT / "results"))
    assert labels(figure) == ["dense (3 seeds)", "LRP (3 seeds)", "LRPET (3 seeds)"]
