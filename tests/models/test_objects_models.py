"""Detectors and segmenters: shapes, costs as published, ranks and factors, trained backbones."""

import warnings

import pytest
import torch
from helpers import refused
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

import lrpet
from lrpet.config import RunConfig
from lrpet.lowrank.layers import matrix_of
from lrpet.methods import build_network, make_method
from lrpet.models import DETECTORS, SEGMENTERS, build_model, unboxed
from lrpet.models.pretrained import load_backbone
from lrpet.registry import SMALLEST
from lrpet.tables import cost_table

SMALL = {"fasterrcnn_resnet8_fpn": "detection", "fcn_resnet8": "segmentation"}


def config_of(model, **more):
    fields = {"task": SMALL[model], "dataset": "digit_scenes", "model": model, "prune_ratio": 0.55}
    return RunConfig(**fields | more)


def test_detectors_are_torchvisions():
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models.detection)
    others = {name for name in known if not name.startswith(("maskrcnn", "keypointrcnn"))}
    assert others == set(DETECTORS) - {"fasterrcnn_resnet8_fpn", "fasterrcnn_resnet20_fpn"}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_takes_images_as_they_are_and_its_layers_can_be_counted(name):
    model = build_model(name, 3).eval()
    edge = max(128, SMALLEST.get(name, 0))
    x = torch.rand(1, 3, edge, edge)
    with torch.no_grad():
        (found,) = model(list(x))
    assert (found["boxes"] <= edge).all()
    view = unboxed(model)
    assert [n for n, _ in view.named_parameters()] == [n for n, _ in model.named_parameters()]
    counted = lrpet.cost(view, (3, edge, edge))
    run = {layer.name for layer in counted.layers if layer.dense_macs}
    layers = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert run == layers and counted.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_gives_each_pixel_a_class(name):
    if name.startswith("pspnet"):
        pytest.importorskip("segmentation_models_pytorch")
    with torch.no_grad():
        assert build_model(name, 5).eval()(torch.rand(1, 3, 64, 96)).shape == (1, 5, 64, 96)


def test_pspnet_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    refused(lambda: build_model("pspnet_resnet18", 5), "segmentation-models-pytorch", kind=ImportError)


def test_costs_of_the_published_networks():
    table = cost_table().set_index(["network", "method"])
    row = table.loc[("fasterrcnn_resnet50", "LRPET")]
    assert (row.prune_ratio, row.macs_reduction_pct, row.paper_macs_reduction_pct) == ("0.55", "43.0", "50")
    assert "1000 proposals" in row.input
    pytest.importorskip("segmentation_models_pytorch")
    row = table.loc[("pspnet_resnet50", "LRPET")]
    assert (row.prune_ratio, row.macs_reduction_pct, row.paper_macs_reduction_pct) == ("0.43", "30.0", "30")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rectified", [True, False])
def test_a_projected_network_becomes_compact_and_computes_the_same(name, rectified):
    config = config_of(name, bn_rectification=rectified)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_network(config, 10)
        method = make_method(model, config)
    reports = method.after_step(step=1, steps_per_epoch=1, last=True)
    assert {report.action for report in reports if report.rank} == {"projected"}
    assert bool(method.projector._pairs) is rectified
    for layer, rank in method.ranks.items():
        weight = matrix_of(model.get_submodule(layer)).detach().double()
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) <= rank
    compact, x = method.compact().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        a, b = (torch.utils._pytree.tree_leaves(unboxed(m)(x)) for m in (model.eval(), compact))
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in zip(a, b, strict=True))
    counted = lrpet.cost(unboxed(model), (3, 64, 64), method.ranks)
    assert lrpet.cost(unboxed(compact), (3, 64, 64)).macs == counted.macs < counted.dense_macs


def test_dense_layers_stay_dense():
    config = config_of("fcn_resnet8", dense_layers="classifier.*")
    ranks = make_method(build_network(config, 10), config).ranks
    assert ranks and not any(name.startswith("classifier") for name in ranks)


def test_a_trained_backbone_is_loaded_and_its_batchnorms_are_frozen(tmp_path):
    trained, file = resnet50(), tmp_path / "resnet50.pth"
    torch.save(trained.state_dict(), file)
    fields = {"task": "detection", "dataset": "voc", "model": "fasterrcnn_resnet50_fpn"}
    model = build_network(RunConfig(**fields, pretrained_backbone=True), 20)
    load_backbone(model, file)
    body = model.backbone.body
    assert torch.equal(body.layer4[2].conv3.weight, trained.layer4[2].conv3.weight)
    norms = [module for module in body.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 53 and all(isinstance(module, FrozenBatchNorm2d) for module in norms)
    torch.save(resnet18().state_dict(), file)
    refused(lambda: load_backbone(model, file), "resnet50.pth", "backbone")
    file.write_bytes(b"nothing")
    refused(lambda: load_backbone(model, file), "resnet50.pth", "state dicts")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "narrow"}, ("method", "one width")),
        ({"normalized_weight_decay": 0.1}, ("normalized_weight_decay", "left out")),
        ({"recipe": "adamw"}, ("recipe", "'sgd'")),
        ({"pretrained_backbone": True}, ("pretrained_backbone", "no such backbone")),
        ({"model": "resnet8"}, ("model", "detection")),
        ({"dataset": "digits"}, ("dataset", "detection")),
        ({"momentum": 0.0, "nesterov": True}, ("nesterov", "momentum")),
        ({"ranks": (3,), "prune_ratio": None, "dense_layers": "a"}, ("dense_layers", "ranks")),
        ({"task": "segmentation", "model": "pspnet_resnet50", "image_size": 100}, ("image_size", "32")),
    ],
)
def test_settings_that_do_not_fit(fields, words):
    usual = {"task": "detection", "dataset": "digit_scenes", "model": "fasterrcnn_resnet8_fpn"}
    refused(lambda: RunConfig(**usual | fields), *words)
