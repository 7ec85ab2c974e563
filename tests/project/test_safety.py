"""Nothing unsafe: no code from files, no notebook server without its token, audited dependencies."""

import ast
import json
import os
import pickle
import re
import subprocess

import nbformat
import pytest
import torch
import yaml
from helpers import TINY

from lrpet import RunConfig, run
from lrpet.data.cache import DataError
from lrpet.data.sets import load_data
from lrpet.experiments import load_profile
from lrpet.lowrank.compact_file import compact_header
from lrpet.paths import PROJECT
from lrpet.runs.store import load_run
from lrpet.training.checkpoint import save_checkpoint

SOURCES = [
    path for folder in ("lrpet", "scripts", "tests") for path in sorted((PROJECT / folder).rglob("*.py"))
]
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


def code_of(path):
    """The sources of a file or notebook; lines that are for the shell or for IPython are left out."""
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(
        re.sub(r"^\s*[!%].*$", "", cell.source, flags=re.MULTILINE)
        for cell in cells
        if cell.cell_type == "code"
    )


def unsafe(source):
    """What in a source could run or load code from a file: the name, and its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [
                (alias.name, node.lineno)
                for alias in node.names
                if alias.name.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve")
            ]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "pickle",
            "dill",
            "marshal",
            "shelve",
        ):
            found += [
                (alias.name, node.lineno) for alias in node.names if alias.name != "UnpicklingError"
            ]  # an exception, which loads nothing
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "joblib.load",
            "pd.read_pickle",
            "yaml.unsafe_load",
            "yaml.full_load",
        ):
            found.append((name, node.lineno))
        if (
            name in ("torch.load", "load")
            and "map_location" in options
            and options.get("weights_only") != "True"
        ):
            found.append((name, node.lineno))
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append((name, node.lineno))
        if name in ("yaml.load", "yaml.load_all") and options.get("Loader") not in (
            "yaml.SafeLoader",
            "_UniqueKeys",
        ):
            found.append((name, node.lineno))
        if options.get("allow_pickle") == "True" or (
            name.startswith("subprocess.") and options.get("shell") == "True"
        ):
            found.append((name, node.lineno))
    return found


@pytest.mark.parametrize(
    "path", [*(p for p in SOURCES if "tests" not in p.parts), *NOTEBOOKS], ids=lambda path: path.name
)
def test_no_source_runs_or_unpickles_what_it_reads(path):
    assert unsafe(code_of(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "exec(open(f).read())",
        "import pickle",
        "from pickle import load",
        "torch.load(f)",
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

    assert issubclass(_UniqueKeys, yaml.SafeLoader)


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
    with pytest.raises(ValueError, match="damaged"):
        load_run(folder)


def test_a_malicious_compact_network_is_refused(tmp_path, marker):
    torch.save({"model": Malicious(marker)}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        compact_header(tmp_path / "net.safetensors")


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

    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "download", no_network
    )  # which asks for the checksums first
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(DataError, match="could not be downloaded"):
        load_data(RunConfig(dataset="cifar10"), tmp_path)


def test_a_malicious_experiments_file_is_refused(tmp_path, marker):
    (tmp_path / "experiments.yaml").write_text(f"smoke: !!python/object/apply:os.mkdir ['{marker}']")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_profile("smoke", tmp_path / "experiments.yaml")


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


def test_the_readme_tells_how_to_open_the_notebooks():
    assert re.search(
        r"jupyter lab notebooks/00_method\.ipynb", (PROJECT / "README.md").read_text(encoding="utf-8")
    )


def test_the_audit_covers_every_locked_package():
    script = (PROJECT / "scripts" / "audit.sh").read_text()
    assert "requirements.lock" in script and "pip-audit" in script
    assert "--strict" in script  # else what could not be looked up passes
    assert subprocess.run(["bash", "-n", PROJECT / "scripts" / "audit.sh"]).returncode == 0


def test_a_clone_with_crlf_keeps_its_scripts_and_checksums(tmp_path):
    clone = tmp_path / "clone"
    git = ["git", "clone", "-q", "--no-hardlinks", "-c", "core.autocrlf=true", str(PROJECT), str(clone)]
    if subprocess.run(git, capture_output=True, check=False).returncode:
        pytest.skip("this copy is no git repository")
    assert b"\r" not in (clone / "run_tests.sh").read_bytes()
    run = next((clone / "results" / "short" / "runs").iterdir())
    assert load_run(run).summary["run_id"] == run.name
