"""The library by itself: it imports nothing above it, and a process group of its user is not its business."""

import ast
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import in_two_processes
from torch import nn

import lrpet

ALLOWED = ("lrpet.lowrank", "lrpet.files")


def test_the_library_imports_no_wing_above_it():
    files = list(Path(lrpet.lowrank.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            for name in names:
                assert not name.startswith("lrpet") or name.startswith(ALLOWED), (file.name, name)
                # which group they serve, by an argument and by DistributedDataParallel
                told = file.name in ("gradient_projection.py", "compressor.py")
                assert told or not name.startswith("torch.distributed"), file.name


def train_another_network(rank, store, pipe):
    """Be one of two processes of a job that has a group, each with a network of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = model[0].weight.detach().clone()
    if rank == 0:
        lrpet.LowRankProjector(model, {"0": 2}).step()  # the other does not call it at all
        pipe.send((before.tolist(), model[0].weight.tolist()))
    else:
        dist.barrier()
        lrpet.LowRankProjector(model, {"0": 2}).step()
        pipe.send((before.tolist(), model[0].weight.tolist()))
    if rank == 0:
        dist.barrier()
    dist.destroy_process_group()


def test_networks_of_two_processes_stay_different(tmp_path):
    results = in_two_processes(train_another_network, tmp_path / "store")
    weights = []
    for before, after in results:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(before))
        lrpet.LowRankProjector(model, {"0": 2}).step()
        torch.testing.assert_close(torch.tensor(after), model[0].weight.detach())
        weights.append(model[0].weight)
    assert not torch.allclose(*weights)
