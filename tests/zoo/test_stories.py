"""Three users' own networks and loops, from training to a compact network; docs/library.md tells the same."""

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import lrpet
from lrpet.deploy.integrations import trainer_callback
from lrpet.lowrank.layers import matrix_of
from lrpet.paths import PROJECT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # what the libraries warn of in each other is not ours to mend
]


def assert_low_rank(model, ranks):
    for name, rank in ranks.items():
        weight = matrix_of(model.get_submodule(name)).detach().double()
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) <= rank, name


def test_a_timm_vit_in_the_trainer_of_hugging_face(tmp_path):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # without which the Trainer does not start
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (B, 1, 8, 8)
    data = [{"x": x, "labels": y} for x, y in zip(images, digits.target, strict=True)]
    train, test = data[:1500], data[1500:]

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            size = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
            self.vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **size)

        def forward(self, x, labels):
            logits = self.vit(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def fit(model, epochs, callbacks):
        settings = {"per_device_train_batch_size": 50, "learning_rate": 3e-3, "use_cpu": True, "seed": 0}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "output_dir": str(tmp_path)}
        args = transformers.TrainingArguments(num_train_epochs=epochs, **settings, **quiet)
        transformers.Trainer(model, args, train_dataset=train, callbacks=callbacks).train()

    def accuracy(network):
        with torch.no_grad():
            logits = network.eval()(torch.stack([d["x"] for d in test]))
        return (logits.argmax(1) == torch.tensor([d["labels"] for d in test])).float().mean().item()

    torch.manual_seed(0)
    model = Classifier()
    fit(model, 6, [])
    before = accuracy(model.vit)
    plan = lrpet.select(model.vit, "blocks.*", prune_ratio=0.7, example_inputs=images[:2])
    projector = lrpet.LowRankProjector(model.vit, plan)
    callback = trainer_callback(projector)
    fit(model, 4, [callback])
    assert [layer.action for layer in callback.report if layer.rank] == ["projected"] * len(plan)
    assert_low_rank(model.vit, plan)
    compact = lrpet.factorize(model.vit, plan)
    assert accuracy(compact) == accuracy(model.vit) > 0.8 * before > 0.6
    cost = lrpet.cost(model.vit, ranks=plan, example_inputs=images[:1])
    assert cost.macs < 0.6 * cost.dense_macs


def test_faster_rcnn_of_which_the_backbone_becomes_compact():
    def scene(seed):
        """Return an image with two bright boxes on a dark ground, and where they are."""
        draw = torch.Generator().manual_seed(seed)
        image, boxes = 0.1 * torch.rand(3, 96, 96, generator=draw), []
        for label in (1, 2):
            x, y, width, height = torch.randint(10, 40, (4,), generator=draw).tolist()
            image[label - 1, y : y + height, x : x + width] += 0.8
            boxes.append([x, y, x + width, y + height])
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor([1, 2])}

    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96
    )
    images, targets = map(list, zip(*map(scene, range(2)), strict=True))
    example = (images,)
    plan = lrpet.select(model, "backbone.*", prune_ratio=0.6, example_inputs=example)
    projector = lrpet.LowRankProjector(model, plan, example_inputs=example)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for _ in range(2):
        losses = model.train()(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report = projector.step()
    assert torch.isfinite(loss)
    assert {layer.action for layer in report if layer.rank} == {"projected"}
    assert_low_rank(model, plan)
    compact = lrpet.factorize(model, plan)
    with torch.no_grad():
        features, same = (net.eval().backbone(torch.stack(images)) for net in (model, compact))
        assert [set(found) for found in compact(images)] == [{"boxes", "labels", "scores"}] * 2
    for level, x in features.items():
        assert torch.allclose(x, same[level], rtol=1e-3, atol=1e-4 * x.abs().max())
    rows = [row for row in lrpet.cost(model, ranks=plan, example_inputs=example).layers if row.name in plan]
    assert sum(row.macs for row in rows) < 0.7 * sum(row.dense_macs for row in rows)


def test_a_language_model_shaped_as_gpt2():
    transformers = pytest.importorskip("transformers")
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(letters),
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    plan = lrpet.select(model, "transformer.h.*", prune_ratio=0.6)
    assert {layer.kind for layer in plan.layers if layer.taken} == {"Conv1D"}
    projector = lrpet.LowRankProjector(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(120):
        starts = torch.randint(0, len(tokens) - 64, (16,))
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        loss = model.train()(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            projector.step()
    projector.step()
    assert_low_rank(model, plan)
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    compact = lrpet.factorize(model, plan).eval()
    start = tokens[:8].unsqueeze(0)
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(start, **asked), compact.generate(start, **asked))
    with torch.no_grad():
        logits, same = (net(input_ids=start).logits for net in (model, compact))
    assert torch.allclose(logits, same, atol=1e-4)
    assert sum(p.numel() for p in compact.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
