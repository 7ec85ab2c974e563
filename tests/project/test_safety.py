"""Nothing unsafe: no code from files, no notebook server without its token, audited dependencies."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import TINY, refused

from lrpet import RunConfig, run
from lrpet.data.cache import DataError
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.lowrank.compact_file import compact_header
from lrpet.paths import PROJECT
from lrpet.runs.store import load_run
from lrpet.training.checkpoint import save_checkpoint

SOURCES = sorted([*(PROJECT / "lrpet").rglob("*.py"), *(PROJECT / "scripts").glob("*.py")])
KINDS = (".md", ".sh", ".py", ".ipynb", ".yml", ".yaml")
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


class Malicious:
    """A pickle that runs code where it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A folder that is there only if malicious code has run."""
    place = tmp_path / "code has run"
    yield place
    assert not place.exists()


# ---------------------------------------------------------------- the sources

UNSAFE = (
    r"(?<![\w.])(eval|exec|compile|__import__)\(",
    r"\bos\.(system|popen)\(|\bread_pickle\(|\bjoblib\.load\(|\bshell=True|\ballow_pickle=True",
    r"\bweights_only=(?!True)|\byaml\.(load|load_all)\((?!.*(SafeLoader|_UniqueKeys))|\byaml\.(unsafe|full)_load",
    r"^\s*(import|from) (c?[Pp]ickle|dill|marshal|shelve)\b(?! import UnpicklingError)",  # loads nothing
)


def unsafe(source):
    """Return what in a source could run or load code from a file; ``torch.load`` does so only if told to."""
    return [found.group() for pattern in UNSAFE for found in re.finditer(pattern, source, re.MULTILINE)]


@pytest.mark.parametrize("path", [*SOURCES, *NOTEBOOKS], ids=lambda path: path.name)
def test_no_source_runs_or_unpickles_what_it_reads(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "exec(open(f).read())",
        "import pickle",
        "from pickle import load",
        "torch.load(f, weights_only=False)",
        "yaml.load(t, yaml.Loader)",
        "yaml.load(t, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(t)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(unsafe(source)) == 1


def test_the_loader_of_experiments_is_a_safe_one():
    from lrpet.experiments import _UniqueKeys

    assert issubclass(_UniqueKeys, yaml.constructor.SafeConstructor)


# ---------------------------------------------------------------- files from elsewhere


@pytest.mark.parametrize("whole", [True, False], ids=["with a right checksum", "a bare pickle"])
def test_a_malicious_checkpoint_ends_a_run_and_runs_nothing(tmp_path, marker, whole):
    config = RunConfig(**TINY)
    folder = config.folder(tmp_path)
    folder.mkdir(parents=True)
    if whole:
        save_checkpoint(folder / "checkpoint.pt", {"step": 1, "model": Malicious(marker)})
    else:
        (folder / "checkpoint.pt").write_bytes(pickle.dumps(Malicious(marker)))
    (folder / "environment.json").write_text(json.dumps(load_data(config).fingerprint))
    with pytest.raises(ValueError, match=r"checkpoint\.pt (holds more than data|is damaged)"):
        run(config, results=tmp_path, device="cpu", progress="off")


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "history.csv", "layers.csv", "environment.json", "SHA256SUMS"]
)
def test_a_malicious_file_of_a_run_is_refused(tmp_path, marker, name):
    folder = run(
        RunConfig(**TINY | {"epochs": 1, "milestones": ()}), results=tmp_path, device="cpu", progress="off"
    ).folder
    (folder / name).write_bytes(pickle.dumps(Malicious(marker), protocol=0))
    refused(lambda: load_run(folder), str(folder), "damaged")


def test_a_malicious_compact_network_is_refused(tmp_path, marker):
    torch.save({"model": Malicious(marker)}, tmp_path / "net.safetensors")
    refused(lambda: compact_header(tmp_path / "net.safetensors"), "net.safetensors", "not a whole")


def test_a_malicious_cache_is_decoded_anew(tmp_path, marker, monkeypatch, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        for i in range(5):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20)).save(tmp_path / "images" / name / f"{i}.png")
    config = RunConfig(dataset="imagefolder", image_size=16, model="resnet18")
    first = load_data(config, tmp_path / "images").fingerprint
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(pickle.dumps(Malicious(marker)))
    assert load_data(config, tmp_path / "images").fingerprint == first
    assert capsys.readouterr().out.count("is damaged; decoding the images again") == 2


def test_a_malicious_pickle_in_the_place_of_cifar10_is_refused(tmp_path, marker, monkeypatch):
    import torchvision.datasets

    def no_network(*_):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)  # asks for the checksums first
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    cifar10 = RunConfig(dataset="cifar10")
    refused(lambda: load_data(cifar10, tmp_path), str(tmp_path), "could not be downloaded", kind=DataError)


def test_a_malicious_experiments_file_is_refused(tmp_path, marker):
    path = tmp_path / "experiments.yaml"
    path.write_text(f"smoke: !!python/object/apply:os.mkdir ['{marker}']")
    refused(lambda: load_profile("smoke", path), str(path), "not valid YAML")


# ---------------------------------------------------------------- notebook servers and dependencies


def test_jupyter_is_told_nowhere_to_give_up_its_token_or_to_leave_loopback():
    wrong = r"token=(['\"]{2}|\s|$)|password=['\"]{2}|0\.0\.0\.0|--ip[= ]\*|disable_check_xsrf|allow_origin"
    texts = [
        file
        for place in (".", "lrpet", "scripts", "notebooks", "results")
        for file in (PROJECT / place).glob("*")
        if file.suffix in KINDS
    ]
    assert len(texts) > 30
    for file in texts:
        assert not re.search(wrong, file.read_text(encoding="utf-8"), re.MULTILINE), file


def test_the_readme_says_how_to_open_the_notebooks():
    assert "jupyter lab notebooks/00_method.ipynb" in (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_audit_covers_every_locked_package():
    script = (PROJECT / "scripts" / "audit.sh").read_text()
    assert "requirements.lock" in script and "pip-audit" in script
    assert "--strict" in script  # else what could not be looked up passes
    assert subprocess.run(["bash", "-n", PROJECT / "scripts" / "audit.sh"]).returncode == 0


@pytest.mark.slow
def test_no_locked_package_is_known_to_be_vulnerable():
    environment = {**os.environ, "LRPET_PYTHON": sys.executable}
    done = subprocess.run(
        [PROJECT / "scripts" / "audit.sh"], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_clone_with_crlf_keeps_its_scripts_and_checksums(tmp_path):
    clone = tmp_path / "clone"
    git = ["git", "clone", "-q", "--no-hardlinks", "-c", "core.autocrlf=true", str(PROJECT), str(clone)]
    if subprocess.run(git, capture_output=True, check=False).returncode:
        pytest.skip("this copy is no git repository")
    assert b"\r" not in (clone / "run_tests.sh").read_bytes()
    run = next((clone / "results" / "short" / "runs").iterdir())
    assert load_run(run).summary["run_id"] == run.name
