import pytest
import torch

import lrpet


def test_a_network_without_batchnorm_need_not_be_traceable():
    class Stubborn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(12, 20), torch.nn.Linear(20, 4)

        def forward(self, x):
            return (
                self.fc2(self.fc1(x)) if x.sum() > 0 else self.fc2(-self.fc1(x))
            )  # torch.fx cannot follow this

    model = Stubborn()
    ranks = lrpet.ranks_from_ratio(model, 0.5, include="fc1")
    report = lrpet.LowRankProjector(model, ranks).step()
    assert [(layer.name, layer.rank, layer.action) for layer in report] == [("fc1", 6, "projected")]
    x = torch.randn(3, 12)
    assert torch.allclose(lrpet.factorize(model, ranks)(x), model(x), atol=1e-5)


def test_only_the_mlp_layers_of_the_vit_are_touched():
    model = lrpet.build_model("vit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ranks = lrpet.ranks_from_ratio(model, 0.7, include="*.mlp.*")
    assert len(ranks) == 18 and set(ranks.values()) == {57}
    lrpet.LowRankProjector(model, ranks).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{name}.weight" for name in ranks}


def test_timm_vit_by_name_pattern():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=4, depth=2, num_classes=10
    ).eval()
    ranks = lrpet.ranks_from_ratio(model, 0.7, include="*.mlp.*")
    assert sorted(ranks) == [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]
    lrpet.LowRankProjector(model, ranks).step()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reference = model(x)
        assert (lrpet.factorize(model, ranks)(x) - reference).abs().max() < 1e-4 * reference.abs().max()
    counted = lrpet.cost(model, (3, 32, 32), ranks)
    assert counted.macs < counted.dense_macs
