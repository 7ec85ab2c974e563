"""Modules that read the weights of the layers in them run on factors, and are told what that costs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize_batchnorms
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from lrpet import LowRankProjector, cost, factorize, ranks_for_budget, ranks_from_ratio, select
from lrpet.lowrank.observe import call, weight_reads


class Reads(nn.Module):
    """Multiplies by one layer's weight itself, and asks another for its dtype, as Swin and T5 do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.wo, self.plain = nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = F.linear(x, self.qkv.weight, self.qkv.bias)
        return self.plain(self.wo(y.to(self.wo.weight.dtype)))


X, RANKS = torch.rand(50, 32), {"qkv": 4, "wo": 4, "plain": 4}


def floats(model, inputs):
    with torch.no_grad():
        return [
            x
            for x in tree_leaves(call(model, inputs))
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]


def assert_close(model, other, inputs, tolerance):
    for a, b in zip(floats(model, inputs), floats(other, inputs), strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_reads_are_counted_and_the_classes_are_as_before():
    model = Reads()
    with weight_reads([model.qkv, model.wo, model.plain]) as reads:
        model(X)
    assert (reads[model.qkv], reads[model.wo], reads[model.plain]) == (1, 1, 0)
    with pytest.raises(RuntimeError), weight_reads([model.plain]):
        model(torch.rand(3, 5))
    assert {type(layer) for layer in model.children()} == {nn.Linear}


def test_factors_that_are_multiplied_out_are_counted_and_noted():
    model = Reads()
    told, real = cost(model, ranks=RANKS, example_inputs=X), cost(factorize(model, RANKS), example_inputs=X)
    assert (told.macs, told.params) == (real.macs, real.params)
    rows = {row.name: row for row in told.layers}
    assert (rows["qkv"].macs, rows["qkv"].dense_macs) == (24 * 4 * 32, 0)
    assert rows["wo"].macs == 50 * 4 * (24 + 32) + 32 * 4 * 24
    assert rows["plain"].macs == 50 * 4 * 64
    assert "save no multiply-adds" in rows["qkv"].note and not rows["plain"].note


def test_a_plan_a_budget_and_measured_gains_leave_out_what_factors_cannot_speed_up():
    model = Reads()
    plan = select(model, "*", example_inputs=X)
    assert list(plan) == ["wo", "plain"]
    assert "another module reads its weight" in {row.name: row.reason for row in plan.layers}["qkv"]
    assert "qkv" in select(model, "*")  # without a run nobody knows
    ranks = ranks_for_budget(model, macs_reduction=0.4, include="*", example_inputs=X)
    assert list(ranks) == ["wo", "plain"]
    saved = cost(factorize(model, ranks), example_inputs=X)
    assert saved.macs <= 0.6 * cost(model, example_inputs=X).macs
    report = {row.name: row for row in factorize(model, RANKS, min_gain=1e-9, example_inputs=X).factorization}
    assert [report[name].action for name in RANKS] == ["dense", "factorized", "factorized"]
    assert "nothing calls it" in report["qkv"].reason


def test_a_transformer_layer_on_factors_calls_them_in_evaluation_too():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    ranks = ranks_from_ratio(model, 0.5, include="*linear*")
    LowRankProjector(model, ranks).step()
    compact, x = factorize(model, ranks), torch.rand(2, 5, 16)
    calls = []

    def watch(name, layer):
        forward = layer.forward
        layer.forward = lambda x: calls.append(name) or forward(x)  # a hook would switch the fast path off

    for name in ranks:
        watch(name, compact.get_submodule(name)[0])
    assert_close(model, compact, x, 1e-5)
    assert sorted(calls) == sorted(ranks)
    assert model.layers[0].activation_relu_or_gelu == 1  # the dense one keeps its fast path


def text(**more):
    return {"input_ids": torch.arange(10).view(2, 5), **more}


def attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    return Net(), torch.rand(2, 5, 16)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.rand(2, 5, 16)


def swin():
    from torchvision.models import SwinTransformer

    given = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return SwinTransformer(patch_size=[2, 2], **given), torch.rand(2, 3, 32, 32)


def hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, **small)
    return transformers.ViTForImageClassification(config), torch.rand(2, 3, 32, 32)


def t5():
    transformers = pytest.importorskip("transformers")
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=50, decoder_start_token_id=0, **small)
    return transformers.T5ForConditionalGeneration(config), text(labels=torch.arange(8).view(2, 4))


def gpt2():
    transformers = pytest.importorskip("transformers")
    small = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **small)), text()


@pytest.mark.filterwarnings("default")  # of transformers
@pytest.mark.parametrize("make", [attention, encoder, swin, hugging_face_vit, t5, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_run_train_and_are_copied_after_factorizing_and_cost_what_was_told(make, dtype):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.to(dtype).eval()
    inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    ranks = ranks_from_ratio(model, 0.6, include="*")
    LowRankProjector(model, ranks).step()
    compact = factorize(model, ranks)
    assert {p.dtype for p in compact.parameters()} == {dtype}
    assert_close(model, compact, inputs, 1e-4 if dtype == torch.float32 else 0.1)
    assert_close(compact, copy.deepcopy(compact), inputs, 0)
    told, real = cost(model, ranks=ranks, example_inputs=inputs), cost(compact, example_inputs=inputs)
    assert (told.macs, told.params) == (real.macs, real.params)
    assert sum(told.other_macs.values()) == sum(real.other_macs.values())
    outputs = [x for x in tree_leaves(call(compact.train(), inputs)) if isinstance(x, torch.Tensor)]
    outputs[0].float().sum().backward()
    assert all(p.grad is not None for p in compact.parameters() if p.requires_grad)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3), nn.Conv3d(4, 8, 3), nn.ConvTranspose2d(8, 16, 3)])
def test_the_memory_format_is_kept(layer):
    last = torch.channels_last_3d if layer.weight.ndim == 5 else torch.channels_last
    model = nn.Sequential(layer).to(memory_format=last)
    compact = factorize(model, {"0": 2})
    assert compact[0][0].weight.is_contiguous(memory_format=last)
    assert not compact[0][0].weight.is_contiguous()


def test_hooks_of_all_kinds_are_kept():
    model, calls = nn.Sequential(nn.Conv2d(8, 16, 3), randomize_batchnorms(nn.BatchNorm2d(16))), []
    layer = model[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"), always_call=True)
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    factorize(model, {"0": 3})(torch.rand(1, 8, 6, 6, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "before backward", "backward"]
