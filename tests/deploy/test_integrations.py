"""The callbacks in the real libraries, where those are installed: they project, and nothing else changes."""

import copy
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from helpers import refused
from torch import nn

import lrpet
from lrpet.deploy.integrations import (
    hub_network_class,
    lightning_callback,
    project_everywhere,
    trainer_callback,
    write_scalars,
)

# what the libraries warn of in each other and in PyTorch is not ours to mend
pytestmark = pytest.mark.filterwarnings("default")
RANKS = {"0": 3, "2": 2}
X, Y = torch.randn(24, 6), torch.arange(24) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def has_ranks(net):
    return [int(torch.linalg.matrix_rank(net[i].weight.detach().double(), rtol=1e-5)) for i in (0, 2)] == [
        3,
        2,
    ]


class Counted(lrpet.LowRankProjector):
    """Remembers at which step of the optimizer it was asked to project."""

    def __init__(self, net):
        super().__init__(net, RANKS)
        self.calls, self.now = [], lambda: None

    def step(self, *, exact=False):
        self.calls.append((self.now(), exact))
        return super().step(exact=exact)


class ForTrainer(nn.Module):
    """What the Trainer trains: it returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(("every", "expected"), [(None, [3, 6, 6]), (2, [2, 4, 6, 6]), (4, [4, 6])])
def test_the_trainer_of_hugging_face_projects_before_it_evaluates_and_at_the_end(tmp_path, every, expected):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, seen = ForTrainer(), []
    projector = Counted(model.net)
    callback = trainer_callback(projector, every)

    class Evaluated(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(has_ranks(model.net))

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
        eval_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
        callbacks=[callback, Evaluated()],
    )
    projector.now = lambda: trainer.state.global_step
    trainer.train()
    assert projector.calls == [(step, i == len(expected) - 1) for i, step in enumerate(expected)]
    assert has_ranks(model.net) and callback.report[0].action == "projected"
    assert every is not None or seen == [True, True]
    compact = lrpet.factorize(model, {f"net.{name}": rank for name, rank in RANKS.items()})
    torch.testing.assert_close(compact(X, Y)["logits"], model(X, Y)["logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("every", "expected"), [(None, {1: [3, 6, 6], 3: [1, 2, 2]}), (2, {1: [2, 4, 6, 6], 3: [2, 2]})]
)
def test_the_trainer_of_lightning_projects_before_it_validates_and_at_the_end(
    tmp_path, every, expected, accumulate
):
    pl = pytest.importorskip("lightning.pytorch")
    seen = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            seen.append(has_ranks(self.net))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    projector = Counted(module.net)
    callback = lightning_callback(projector, every)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    projector.now = lambda: trainer.global_step
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer.fit(module, batches, batches)
    steps = expected[accumulate]
    assert projector.calls == [(step, i == len(steps) - 1) for i, step in enumerate(steps)]
    assert has_ranks(module.net) and callback.report[0].action == "projected"
    assert every is not None or (seen and all(seen))


def test_the_example_of_the_readme_for_accelerate_runs():
    accelerate = pytest.importorskip("accelerate")
    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    projector = lrpet.LowRankProjector(accelerator.unwrap_model(model), RANKS)
    for _ in range(2):
        for x, y in batches:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        project_everywhere(projector)
    net = accelerator.unwrap_model(model)
    assert has_ranks(net)
    torch.testing.assert_close(lrpet.factorize(net, RANKS)(X), net(X), atol=1e-5, rtol=1e-4)


def test_a_compact_network_is_saved_and_loaded_as_on_the_hub_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    compact = lrpet.fold_batchnorm(lrpet.factorize(model, {"0": 3}))
    cls = hub_network_class()
    cls(compact).save_pretrained(tmp_path / "net")
    assert {"README.md", "model.safetensors"} <= {file.name for file in (tmp_path / "net").iterdir()}
    again = cls.from_pretrained(tmp_path / "net", model=copy.deepcopy(model))
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(again(x), compact(x))
    again.save_pretrained(tmp_path / "again")
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("net", "again")]
    assert same[0] == same[1]


def test_a_report_becomes_scalars_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    projector = lrpet.LowRankProjector(network(), RANKS)
    kept = {}
    with SummaryWriter(tmp_path) as writer:
        for epoch in range(2):
            report = projector.step()
            kept[epoch] = report[0].energy_kept
            write_scalars(writer, report, epoch)
    events = tensorboard.EventAccumulator(str(tmp_path))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("energy_kept/0")}
    assert found == pytest.approx(kept) and found[0] < 0.999 < found[1]


def one_of_two(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = network()
    with torch.no_grad():
        net[0].weight += rank  # so that what each projects alone is something else
    report = project_everywhere(lrpet.LowRankProjector(net, RANKS))
    torch.save((report[0].action, net.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_get_the_weights_that_the_first_projected(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (action, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert action == "projected" and all(torch.equal(first[name], second[name]) for name in first)
    alone = network()
    lrpet.LowRankProjector(alone, RANKS).step()
    torch.testing.assert_close(first["0.weight"], alone[0].weight.detach())


@pytest.mark.parametrize("every", [0, 2.5, True])
def test_a_wrong_interval_is_refused(every):
    projector = lrpet.LowRankProjector(network(), RANKS)
    for package, callback in (("transformers", trainer_callback), ("lightning", lightning_callback)):
        pytest.importorskip(package)
        refused(lambda callback=callback: callback(projector, every), "every", repr(every), "1 or more")
