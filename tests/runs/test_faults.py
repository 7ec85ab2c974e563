"""Faults: kill -9 at any moment, a full disk, damaged files, Ctrl-C. The result is the same, by itself."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY, command, in_folders, outcome, save_and_die
from PIL import Image

import lrpet.data.decode
import lrpet.training.loop
import lrpet.training.state
import lrpet.training.step
from lrpet import RunConfig, load_runs, run
from lrpet.__main__ import INTERRUPTED, main
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.paths import PROJECT
from lrpet.runs.store import Damaged, is_complete, load_network, load_run
from lrpet.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint

KILLS = int(
    os.environ.get("LRPET_TEST_KILLS", "4")
)  # of the grid, each of which costs some 20 seconds; the run is killed 20 times
CONFIG = RunConfig(**TINY)
FOLDER = RunConfig(dataset="imagefolder", image_size=16, model="resnet18")
LONG = RunConfig(epochs=6, milestones=(3, 5), batch_size=256)
FORK = multiprocessing.get_context(
    "forkserver"
)  # imports everything once, so that a process starts in no time
FORK.set_forkserver_preload(["lrpet.__main__", "sklearn.datasets"])


def start(function, *arguments):
    """Call a function in a new process, in this test's folders; the server's are those of the first test."""
    places = {name: value for name, value in os.environ.items() if name.startswith("LRPET_")}
    process = FORK.Process(target=in_folders, args=(places, function, *arguments))
    process.start()
    return process


def fields(config):
    """A configuration as arguments of ``train``."""
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for name, value in config.to_dict().items()
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What comes of the two configurations where nothing happens."""
    results = tmp_path_factory.mktemp("undisturbed")
    return {config: run(config, results=results, device="cpu", progress="off") for config in (CONFIG, LONG)}


def assert_as_undisturbed(folder, undisturbed):
    assert outcome(folder) == outcome(undisturbed.folder)
    assert {file.name for file in folder.iterdir()} - {"run.lock"} == {
        file.name for file in undisturbed.folder.iterdir()
    } - {"run.lock"}


# ---------------------------------------------------------------- kill -9


def beginning(folder):
    """The moment at which a run last wrote what it begins with."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "environment.json").stat().st_mtime_ns
    return None


def killed_at_random_moments(config, seconds):
    """Kill a run twenty times: three of four times while it trains, the others as it starts."""
    draw, kills, folder = random.Random(3), 0, config.folder()
    while kills < 20:
        before = beginning(folder)
        process = start(command, ["train", *fields(config), "--device", "cpu"])
        while kills % 4 and beginning(folder) == before and process.is_alive():
            time.sleep(0.001)
        process.join(draw.uniform(0, seconds / 2))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        yield process.exitcode


def killed_at_changes_of_a_file(config, _seconds):
    """Kill a run at its n-th change of a file after each start, before the change is made."""
    for die_at in (1, 3, 5, *range(7, 17), 19, 22, 26, 30, 34, 38, 42, 60):
        process = start(command, ["train", *fields(config), "--device", "cpu"], die_at)
        process.join()
        yield process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "killed", "least"),
    [(LONG, killed_at_random_moments, 20), (CONFIG, killed_at_changes_of_a_file, 8)],
    ids=["random moments", "changes of a file"],
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(undisturbed, capfd, config, killed, least):
    folder, statuses = config.folder(), []
    for status in killed(config, undisturbed[config].summary["train_seconds"]):
        statuses.append(status)
        main(["list"])  # says what is there, whatever is there
        if is_complete(folder):  # once more from the start, until it was killed often enough
            run(config, device="cpu", progress="off")  # loads it; tidies up after a kill after its summary
            assert_as_undisturbed(folder, undisturbed[config])
            shutil.rmtree(folder)
    assert set(statuses) <= {0, -signal.SIGKILL} and statuses.count(-signal.SIGKILL) >= least
    run(config, device="cpu", progress="off")
    assert_as_undisturbed(folder, undisturbed[config])


@pytest.mark.parametrize("before", [0, 1, 2])
def test_killed_at_any_change_of_a_file_a_checkpoint_is_the_old_or_the_new_one(tmp_path, before):
    for die_at in range(1, 10):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        path = folder / "checkpoint.pt"
        for step in range(before):
            save_checkpoint(path, {"step": step})
        process = start(save_and_die, path, {"step": before}, die_at)
        process.join()
        assert has_checkpoint(path) == (load_checkpoint(path) is not None)
        assert (load_checkpoint(path) or {"step": -1})["step"] in (before - 1, before)
        if process.exitcode == 0:
            break
    assert die_at > 2  # it was killed before it was not
    assert load_checkpoint(path)["step"] == before


def test_the_checkpoint_before_is_seen_by_list_and_keeps_guarding_the_data(tmp_path, capsys, monkeypatch):
    """Between the two renames of save_checkpoint there is no checkpoint.pt."""
    experiment = load_profile("smoke").experiments[0]
    folder = experiment.config.folder()
    folder.mkdir(parents=True)
    save_checkpoint(folder / "checkpoint.pt", {"step": 1})
    (folder / "checkpoint.pt").rename(folder / "checkpoint.previous")
    assert main(["list"]) == 0
    assert re.search(rf"{experiment.name} .* started", capsys.readouterr().out)
    (folder / "environment.json").write_text(json.dumps({"data_train_sha256": "of others"}))
    with pytest.raises(ValueError, match="was begun with other images"):
        run(experiment.config, device="cpu", progress="off")


GRID = {
    "dense": {"feeds": "x", "method": "dense"},
    "lrp": {"feeds": "x", "method": "lrp"},
    "lrpet": {"feeds": "x", "method": "lrpet"},
    "every-step": {"feeds": "x", "method": "lrpet", "projection_unit": "iteration"},
}


@pytest.fixture
def grid(tmp_path):
    """A copy of the project with four runs of a few seconds each, and no notebooks except theirs."""
    root = tmp_path / "project"
    for name in ("lrpet", "profiles", "scripts", "paper"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "run_all.sh", "pyproject.toml"):
        shutil.copy(PROJECT / name, root)
    (root / "notebooks").mkdir()
    shutil.copy(PROJECT / "notebooks" / "01_cifar10.ipynb", root / "notebooks")
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "a",
        "metadata": {"tags": ["parameters"]},
        "outputs": [],
        "source": "profile = ''",
    }
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    for name in (path.stem for path in (PROJECT / "notebooks").glob("*.ipynb") if path.stem != "01_cifar10"):
        notebook = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
        (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))
    settings = {"epochs": 12, "milestones": [6, 9], "batch_size": 64}
    smoke = {"note": "four runs", "cost": "seconds", "settings": settings, "seeds": [1], "experiments": GRID}
    (root / "experiments.yaml").write_text(yaml.safe_dump({"smoke": smoke}))
    return root


def run_all(project):
    """Start run_all.sh with four jobs as the leader of a process group of its own."""
    environment = {
        **os.environ,
        "LRPET_PYTHON": sys.executable,
        "LRPET_RESULTS": "",
        "LRPET_FIGURES": "",
        "PYTHONPATH": str(project),
    }
    with open(project / "log", "a") as log:
        return subprocess.Popen(
            [project / "run_all.sh", "--jobs", "4"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def assert_complete(grid):
    """All four runs are there, and are what they are where nothing happens."""
    assert "4 of 4 complete" in (grid / "log").read_text()
    settings = yaml.safe_load((grid / "experiments.yaml").read_text())["smoke"]["settings"]
    for experiment in GRID.values():
        config = RunConfig.from_dict(
            {**settings, **{key: value for key, value in experiment.items() if key != "feeds"}}
        )
        assert_as_undisturbed(
            grid / "results" / "smoke" / "runs" / config.run_id, run(config, device="cpu", progress="off")
        )


@pytest.mark.slow
def test_a_grid_killed_again_and_again_completes_by_itself_with_the_same_bits(grid):
    draw, kills = random.Random(4), 0
    runs, told = grid / "results" / "smoke" / "runs", lambda: (grid / "log").read_text()

    def newest():
        return max((file.stat().st_mtime_ns for file in runs.glob("*/checkpoint.pt")), default=0)

    while kills < KILLS:
        before, begun, process = newest(), told().count("begins") if kills else 0, run_all(grid)
        if kills == 1:  # a second instance is refused while the first is alive
            while told().count("begins") == begun:
                assert process.poll() is None, told()
                time.sleep(0.1)
            assert run_all(grid).wait(120) == 1
            assert "another run_all.sh" in told()
        if kills % 2:  # every other time while it trains
            while newest() <= before and process.poll() is None:
                time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.5, 2 if kills % 2 else 10))
        if process.poll() is not None:  # all done before it could be killed again: once more from the start
            assert_complete(grid)
            shutil.rmtree(grid / "results")
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert run_all(grid).wait(600) == 0, told()
    assert_complete(grid)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB: room for two checkpoints of resnet8 and not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_fills_up_ends_a_run_in_words_and_costs_no_checkpoint(
    small_disk, undisturbed, monkeypatch, capsys
):
    monkeypatch.setenv("LRPET_RESULTS", str(small_disk))
    assert main(["train", *fields(LONG), "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert re.match(
        rf"error: .*{small_disk}/\S+ could not be written: No space left on device, \d\.\d MB free; .*room",
        err,
    ), err
    folder = LONG.folder()
    step = load_checkpoint(folder / "checkpoint.pt")["step"]
    assert step >= 6
    assert main(["train", *fields(LONG), "--device", "cpu"]) == 1  # no room yet, and still nothing is lost
    assert load_checkpoint(folder / "checkpoint.pt")["step"] >= step
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert main(["train", *fields(LONG), "--device", "cpu"]) == 0
    assert_as_undisturbed(folder, undisturbed[LONG])


def test_a_limit_on_file_sizes_is_told_with_the_name_and_the_room_and_the_checkpoint_before_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint\.part could not be written: File too large, [\d.]+ MB free"
        ):
            save_checkpoint(path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_results_folder_that_is_read_only_is_refused_before_training(small_disk, monkeypatch, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setenv("LRPET_RESULTS", str(small_disk))
    monkeypatch.setattr(
        import_module("lrpet.runs.run"), "train", lambda *_, **__: pytest.fail("training began")
    )
    assert main(["train", *fields(CONFIG)]) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: results must be a folder that can be written; got {small_disk}")
        and "Read-only" in err
        and "LRPET_RESULTS" in err
    )


# ---------------------------------------------------------------- damaged files


def truncate(content):
    return content[: len(content) * 2 // 3]


def flip(content):
    """Another digit in the middle of the file, which leaves JSON, CSV and tensors readable."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    place = places[len(places) // 2] if places else len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


damages = pytest.mark.parametrize(
    "damage", [truncate, flip, lambda _: b""], ids=["truncated", "a flipped bit", "emptied"]
)


@damages
@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "history.csv", "layers.csv", "summary.json", "SHA256SUMS"]
)
def test_damage_to_a_finished_run_is_found_and_named(
    undisturbed, tmp_path, monkeypatch, capsys, name, damage
):
    folder = CONFIG.folder(tmp_path)
    shutil.copytree(undisturbed[CONFIG].folder, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    for load in (lambda: load_run(folder), lambda: run(CONFIG, results=tmp_path)):
        with pytest.raises(ValueError) as caught:
            load()
        assert str(folder / name) in str(caught.value) or (
            name == "SHA256SUMS" and "SHA256SUMS beside it" in str(caught.value)
        )
        assert "move the folder away to run it anew" in str(caught.value)
    with pytest.warns(Damaged, match=re.escape(str(folder))):
        assert len(load_runs(tmp_path)) == 0
    monkeypatch.setenv("LRPET_RESULTS", str(tmp_path))
    assert main(["train", *fields(CONFIG)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {folder}")


@pytest.mark.parametrize("name", ["history.csv", "layers.csv", "config.json", "environment.json"])
def test_a_file_that_is_gone_from_a_finished_run_is_named(undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[CONFIG].folder, folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is damaged .*No such file"):
        load_run(folder)


def test_checksums_are_those_that_sha256sum_reads(undisturbed):
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=undisturbed[CONFIG].folder,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("OK") == 5


@damages
def test_damage_to_the_weights_of_a_finished_run_is_found_and_named(undisturbed, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[CONFIG].folder, folder)
    file = folder / "compact.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"run/compact\.safetensors is (damaged|not a whole)"):
        load_network(load_run(folder))


def test_no_flipped_bit_of_the_weights_goes_unnoticed(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[CONFIG].folder, folder)
    file = folder / "compact.safetensors"
    whole, draw = file.read_bytes(), random.Random(1)
    for place in draw.sample(range(8 + int.from_bytes(whole[:8], "little"), len(whole)), 50):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"compact\.safetensors is damaged"):
            load_network(load_run(folder))


@pytest.mark.slow
@damages
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_also_where_the_run_is_killed_right_then(
    undisturbed, damage, capfd
):
    for _ in range(2):
        main(["train", *fields(CONFIG), "--device", "cpu", "--time-budget", "0"])
    path = CONFIG.folder() / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    for die_at in (
        6,
        8,
        10,
        11,
    ):  # among the changes around the next checkpoint, which must not cost the good one
        process = start(command, ["train", *fields(CONFIG), "--device", "cpu"], die_at)
        process.join()
        assert is_complete(path.parent) or load_checkpoint(path) is not None
    assert f"{path} is damaged; resuming from checkpoint.previous" in capfd.readouterr().out
    assert main(["train", *fields(CONFIG), "--device", "cpu"]) == 0
    assert_as_undisturbed(path.parent, undisturbed[CONFIG])


@damages
def test_a_damaged_record_of_what_an_unfinished_run_began_with_is_named(damage):
    main(["train", *fields(CONFIG), "--device", "cpu", "--time-budget", "0"])
    file = CONFIG.folder() / "environment.json"
    text = damage(file.read_bytes())
    file.write_bytes(text.replace(b'sha256": "', b'sha256": "0', 1) if damage is flip else text)
    with pytest.raises(ValueError, match=r"environment\.json is damaged|was begun with other images"):
        run(CONFIG, device="cpu", progress="off")


def make_tree(root):
    """Write five pictures of each of two classes."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.effect_noise((20, 20), 50).save(root / name / f"{i}.png")


@damages
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, damage, capsys, monkeypatch):
    make_tree(tmp_path / "images")
    first = load_data(FOLDER, tmp_path / "images").fingerprint
    caches = sorted(Path(os.environ["LRPET_CACHE"]).glob("*.cache"))
    assert len(caches) == 2
    caches[0].write_bytes(damage(caches[0].read_bytes()))
    assert load_data(FOLDER, tmp_path / "images").fingerprint == first
    assert capsys.readouterr().out == f"{caches[0]} is damaged; decoding the images again\n"
    assert load_data(FOLDER, tmp_path / "images").fingerprint == first
    assert capsys.readouterr().out == ""


def test_caches_of_a_folder_before_its_images_changed_are_deleted_and_others_are_not(tmp_path):
    for root in ("one", "two"):
        make_tree(tmp_path / root)
        load_data(FOLDER, tmp_path / root)
    cache = Path(os.environ["LRPET_CACHE"])
    before = set(cache.glob("*.cache"))
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "cat" / "5.png")
    load_data(FOLDER, tmp_path / "one")
    after = set(cache.glob("*.cache"))
    assert (len(before), len(after), len(before & after)) == (4, 4, 2)


def test_of_runs_that_start_together_one_decodes_and_the_others_wait(tmp_path, monkeypatch):
    make_tree(tmp_path / "images")
    decode, decoded = lrpet.data.decode._decode, []

    def slow(paths, *size):
        decoded.append(len(paths))
        time.sleep(0.5)  # the other is here by now, unless it waits
        return decode(paths, *size)

    monkeypatch.setattr(lrpet.data.decode, "_decode", slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = [
            loaded.fingerprint for loaded in pool.map(load_data, [FOLDER] * 2, [tmp_path / "images"] * 2)
        ]
    assert one == other
    assert decoded == [8, 2]


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    "when", [1, 5, 6, 7, 12, "evaluation 1", "evaluation 2", "checkpoint 1", "checkpoint 2"]
)
def test_ctrl_c_at_any_moment_leaves_a_checkpoint_from_which_the_same_bits_come(
    undisturbed, monkeypatch, when
):
    calls = {"step": 0, "evaluation": 0, "checkpoint": 0}

    def interrupting(kind, function):
        def wrapped(*given, **options):
            calls[kind] += 1
            if when in (calls[kind] if kind == "step" else None, f"{kind} {calls[kind]}"):
                signal.raise_signal(signal.SIGINT)
            return function(*given, **options)

        return wrapped

    with monkeypatch.context() as patch:
        places = {  # kind: where it is called from
            "step": (lrpet.training.tasks, "training_loss"),
            "evaluation": (lrpet.training.tasks, "evaluate"),
            "checkpoint": (lrpet.training.state, "save_checkpoint"),
        }
        for kind, (module, name) in places.items():
            patch.setattr(module, name, interrupting(kind, getattr(module, name)))
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(CONFIG, device="cpu", progress="off")
    if when != "checkpoint 2":  # the last step is made and scored; nothing is left to be said
        assert re.search(
            r"stopped (at|after) .*; a checkpoint is written, from which the same call resumes",
            str(stopped.value),
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    expected = {"evaluation 1": 6, "evaluation 2": 12, "checkpoint 1": 7, "checkpoint 2": 12}.get(when, when)
    assert load_checkpoint(CONFIG.folder() / "checkpoint.pt")["step"] == expected
    run(CONFIG, device="cpu", progress="off")
    assert_as_undisturbed(CONFIG.folder(), undisturbed[CONFIG])


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one waited")

    monkeypatch.setattr(lrpet.training.tasks, "training_loss", twice)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, device="cpu", progress="off")


def test_a_process_that_was_told_to_ignore_ctrl_c_ignores_it(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and a script's & do
    try:
        original = lrpet.training.recipes.training_loss
        monkeypatch.setattr(
            lrpet.training.tasks,
            "training_loss",
            lambda *given: signal.raise_signal(signal.SIGINT) or original(*given),
        )
        assert is_complete(run(CONFIG, device="cpu", progress="off").folder)
    finally:
        signal.signal(signal.SIGINT, before)


ENDLESS = RunConfig(epochs=100_000, milestones=())


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_with_a_checkpoint_in_five_seconds_and_status_130():
    command = [sys.executable, "-m", "lrpet", "train", *fields(ENDLESS), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch   1/" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    asked = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED == 130, err
    checkpoint = ENDLESS.folder() / "checkpoint.pt"
    assert re.fullmatch(
        rf"{ENDLESS.run_id} stopped (at|after) .*; a checkpoint is written, .* the same call resumes\n",
        err,
    )
    assert -0.1 < checkpoint.stat().st_mtime - asked < 5  # written for this
    assert load_checkpoint(checkpoint)["step"] >= 21


@pytest.mark.slow
def test_interrupt_kernel_in_jupyter_ends_with_a_checkpoint_and_the_cell_can_be_run_again():
    from jupyter_client.manager import start_new_kernel

    config = f"lrpet.RunConfig.from_dict({ENDLESS.to_dict()!r})"
    cell = f"import lrpet\nlrpet.run({config}, device='cpu', progress='lines')"
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        for begin in ("training", "resuming"):
            request = client.execute(cell)
            out = ""
            while f": {begin} 100000 epochs" not in out or not re.search(r"epoch +\d+/100000", out):
                message = client.get_iopub_msg(timeout=120)
                assert message["msg_type"] != "error", message["content"]
                out += message["content"].get("text", "") if message["msg_type"] == "stream" else ""
            asked = time.time()
            manager.interrupt_kernel()
            while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != request:
                pass
            assert reply["content"]["status"] == "error"
            assert reply["content"]["ename"] == "KeyboardInterrupt"
            assert "a checkpoint is written, from which the same call resumes" in reply["content"]["evalue"]
            assert -0.1 < (ENDLESS.folder() / "checkpoint.pt").stat().st_mtime - asked < 5
            while message["msg_type"] != "status" or message["content"]["execution_state"] != "idle":
                message = client.get_iopub_msg(timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
