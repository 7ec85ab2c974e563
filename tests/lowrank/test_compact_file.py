"""A compact network loads again in one call, whatever was done to it and in which order."""

import json
import sys

import pytest
import torch
from helpers import randomize_batchnorms, refused
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lrpet import factorize, fold_batchnorm, load_compact, save_compact
from lrpet.lowrank import compact_header, normalized_weights


class Net(nn.Module):
    """Torch.fx cannot trace it, so pairs are stated or read off a run."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.a, self.bn = nn.Conv2d(6, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 12, 4, 2, 1)
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x):
        x = torch.relu(self.bn(self.a(x if x.sum() > 0 else -x)))
        x = torch.relu(self.bn2(self.b(x)))
        return self.up(torch.relu(self.bn3(self.c(x))))


X = torch.rand(2, 6, 8, 8)


def fold(net):
    return fold_batchnorm(net, example_inputs=X)


def fold_stated(net):
    return fold_batchnorm(net, {"a.0": None, "a.1": "bn"})


def made_by(*steps, tied=False):
    net = randomize_batchnorms(Net(tied=tied)).eval()
    for step in steps:
        net = step(net) if callable(step) else factorize(net, step)
    return net


def dead(net):
    nn.init.zeros_(net.b.weight)
    return net


WAYS = {
    "twice": [{"a": 10, "up": 8}, {"a.0": 4, "a.1": 5, "up.0": 3}],
    "three times": [{"a": 10}, {"a.1": 6}, {"a.1.0": 3}],
    "transposed": [{"up": 8}, {"up.0": 3}],
    "another layer each time": [{"a": 4}, {"b": 4}, {"c": 4}],
    "stated pairs": [{"a": 4}, fold_stated],
    "stated pairs, then those of a run": [{"a": 4}, fold_stated, fold],
    "folded twice": [{"a": 4}, fold, fold],
    "folded, then factorized": [fold, {"a": 4, "b": 5}],
    "folded and factorized in turn": [{"a": 9}, fold_stated, {"a.1": 3, "b": 4}, fold, {"c": 2}],
    "folded alone": [fold],
    "dead": [dead, {"a": 4, "b": 2}, fold, {"a.0": 2}],
    "nothing": [{"a": 16}],
}


TIED_WAYS = {  # of a network in which b and c share a weight
    "tied": [{"b": 4, "c": 4}],
    "tied, of which nothing is factorized": [{"a": 4}],
    "tied twice": [{"b": 9, "c": 9}, {"b.0": 3, "c.0": 3, "a": 4}],
    "untied by folding": [{"b": 4, "c": 4}, fold],
    "untied by folding, then factorized apart": [fold, {"b": 4, "c": 5}],
}


def assert_same(network, again):
    state, loaded = network.state_dict(), again.state_dict()
    assert list(state) == list(loaded)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(again.eval()(X), network.eval()(X))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("way", WAYS | TIED_WAYS)
def test_every_sequence_of_compressions_loads_and_can_be_saved_again(tmp_path, way):
    steps, tied = (WAYS | TIED_WAYS)[way], way in TIED_WAYS
    network = made_by(*steps, tied=tied)
    save_compact(network, tmp_path / "net", note=way)
    fresh = Net(tied=tied)
    again = load_compact(tmp_path / "net", fresh)
    assert_same(network, again)
    assert not hasattr(fresh, "compressions")
    save_compact(again, tmp_path / "again", note=way)
    assert (tmp_path / "net").read_bytes() == (tmp_path / "again").read_bytes()


def test_factorizing_twice_approximates_what_the_first_time_made():
    once = made_by({"a": 16, "up": 8})
    twice = factorize(once, {"up.0": 8})
    torch.testing.assert_close(twice(X), once(X), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twice.up.weight, once.up.weight, atol=1e-5, rtol=1e-4)
    assert once.up.weight.shape == (16, 12, 4, 4)


def test_all_factors_of_a_layer_that_was_factorized_twice_are_followed_by_its_batchnorm():
    net = nn.Sequential(nn.Conv2d(6, 16, 3), nn.BatchNorm2d(16))
    twice = factorize(factorize(net, {"0": 5}), {"0.1": 3})
    assert [tuple(w.shape[:2]) for w in normalized_weights(twice)] == [(5, 6), (3, 5), (16, 3)]


@pytest.mark.parametrize("saved_tied", [False, True])
def test_what_shared_a_tensor_when_it_was_saved_shares_it_again_and_nothing_else(tmp_path, saved_tied):
    network = made_by({"a": 4}, tied=saved_tied)
    save_compact(network, tmp_path / "net")
    again = load_compact(
        tmp_path / "net", Net(tied=not saved_tied)
    )  # tied by hand after it was built, or not
    assert (again.b.weight is again.c.weight) == saved_tied
    assert_same(network, again)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_the_network_inside_a_wrapper_is_saved(tmp_path, wrap):
    network = made_by({"a": 4})
    save_compact(wrap(network), tmp_path / "net")
    assert_same(network, load_compact(tmp_path / "net", wrap(Net())))


@pytest.mark.parametrize("folded", [False, True])
def test_a_file_of_the_earlier_form_loads(tmp_path, folded):
    network = made_by({"a": 4, "b": 3}, *[fold] * folded)
    tensors = network.state_dict()
    save_compact(network, tmp_path / "net")
    header = {"layers": {"a": [4, "factorized"], "b": [3, "factorized"]}, "batchnorm_folded": folded}
    if folded:
        header["batchnorms"] = network.folded_batchnorms
    header["sha256"] = compact_header(tmp_path / "net")["sha256"]
    save_file(tensors, tmp_path / "old", metadata={"lrpet": json.dumps(header)})
    assert_same(network, load_compact(tmp_path / "old", Net()))


def test_the_oldest_files_named_no_pairs_and_found_them_again(tmp_path):
    model = randomize_batchnorms(nn.Sequential(nn.Conv2d(6, 16, 3), nn.BatchNorm2d(16)))
    network = fold_batchnorm(factorize(model, {"0": 4}))
    save_compact(network, tmp_path / "net")
    header = {"layers": {"0": [4, "factorized"]}, "batchnorm_folded": True}
    header["sha256"] = compact_header(tmp_path / "net")["sha256"]
    save_file(network.state_dict(), tmp_path / "old", metadata={"lrpet": json.dumps(header)})
    assert_same(network, load_compact(tmp_path / "old", model))


def test_a_file_that_reads_back_differently_is_not_kept_and_the_earlier_one_stays(tmp_path, monkeypatch):
    network, path = made_by({"a": 4}), tmp_path / "net"
    save_compact(network, path)
    before = path.read_bytes()
    module = sys.modules["lrpet.lowrank.compact_file"]
    whole = module.save
    for wrong in (lambda *a, **o: whole(*a, **o)[:-1] + b"?", lambda *a, **o: whole(*a, **o)[:-4]):
        monkeypatch.setattr(module, "save", wrong)
        refused(lambda: save_compact(network, path), "net", "read back", kind=OSError)
        assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["net"]


def test_a_network_of_which_nothing_was_compressed_can_be_saved_where_it_says_so(tmp_path):
    dense = Net().eval()
    dense.compressions = []
    save_compact(dense, tmp_path / "net")
    again = load_compact(tmp_path / "net", Net())
    assert_same(dense, again)
    save_compact(again, tmp_path / "again")


def test_mistakes_are_named(tmp_path):
    net = made_by({"a": 4})
    refused(lambda: save_compact(Net(), tmp_path / "net"), "Net", "factorize()", "fold_batchnorm()")
    refused(lambda: save_compact(net, tmp_path / "net", shared="x"), "'shared'", "another name")
    save_compact(net, tmp_path / "net")
    with torch.device("meta"):
        fresh = Net()
    refused(lambda: load_compact(tmp_path / "net", fresh), "meta device", "build it on the CPU")
    with safe_open(tmp_path / "net", framework="pt") as file:
        header = json.loads(file.metadata()["lrpet"])
    assert header["compressions"] == [["factorize", {"a": [4, "factorized"]}]]
    header["shared"] = {"nothing": "a.0.weight"}
    save_file(net.state_dict(), tmp_path / "other", metadata={"lrpet": json.dumps(header)})
    refused(lambda: load_compact(tmp_path / "other", Net()), "other does not fit a Net", "nothing")


class Versioned(nn.Module):
    """Refuses a state that does not say its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_that_ask_for_the_version_of_a_state_get_it(tmp_path):
    compact = factorize(Versioned(), {"fc": 2})
    save_compact(compact, tmp_path / "net")
    again = load_compact(tmp_path / "net", Versioned())
    assert torch.equal(again.fc[0].weight, compact.fc[0].weight)
