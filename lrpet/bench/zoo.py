"""Networks that people bring, from five libraries, with random weights: what ``bench models`` tries."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["LIBRARIES", "Network", "networks", "versions"]
LIBRARIES = {  # as on PyPI → as imported
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "ultralytics": "ultralytics",
}
# name → edge of the image
TORCHVISION = {
    "resnet18": 64,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
}
SEGMENTATION = {"deeplabv3_mobilenet_v3_large": 64, "lraspp_mobilenet_v3_large": 64}
TIMM = {
    "efficientnet_b0": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv4_conv_small": 64,
    "repvgg_a0": 64,
    "nf_regnet_b0": 64,
    "levit_128s": 224,
    "mobilevit_xxs": 64,
    "edgenext_xx_small": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
    "xcit_nano_12_p16_224": 224,
}
SMP = {
    "Unet": "resnet18",
    "UnetPlusPlus": "mobilenet_v2",
    "FPN": "tu-mobilenetv3_small_100",
    "PSPNet": "resnet18",
    "PAN": "resnet18",
    "DeepLabV3Plus": "efficientnet-b0",
}
ULTRALYTICS = {
    "yolov8n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo12n": "DetectionModel",
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = SMALL | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4} | {
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_model": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
# class of the network → class of its configuration, what is set there, what the network takes
TRANSFORMERS: dict[str, tuple[str, dict, str]] = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 100}
        | {"bos_token_id": 1, "eos_token_id": 2, "use_cache": False},
        "tokens",
    ),
    "LlamaForCausalLM": ("LlamaConfig", TEXT | {"num_key_value_heads": 2, "use_cache": False}, "tokens"),
    "MixtralForCausalLM": (
        "MixtralConfig",
        TEXT
        | {"num_key_value_heads": 2, "num_local_experts": 4, "use_cache": False}
        | {"experts_implementation": "eager"},  # their grouped products take no float64
        "tokens",
    ),
    "BertForSequenceClassification": ("BertConfig", TEXT, "tokens"),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
        | {"use_cache": False},
        "both tokens",
    ),
    "BartModel": ("BartConfig", SEQ2SEQ, "both tokens"),
    "WhisperModel": (
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 20, "max_source_positions": 32, "max_target_positions": 32},
        "spectrum",
    ),
    "Wav2Vec2Model": (
        "Wav2Vec2Config",
        SMALL | {"conv_dim": (32,) * 7, "num_conv_pos_embedding_groups": 4},
        "sound",
    ),
    "ViTForImageClassification": ("ViTConfig", SMALL | {"image_size": 32, "patch_size": 8}, "image"),
    "CLIPVisionModel": ("CLIPVisionConfig", SMALL | {"image_size": 32, "patch_size": 8}, "image"),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
        "image",
    ),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {"depths": [1, 1, 1, 1]}, "image"),
}


@dataclass(frozen=True)
class Network:
    """One network: how to build it with random weights, and what it takes."""

    library: str  # as on PyPI
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]  # a tensor, a tuple or a dict; the same at each call


def networks() -> list[Network]:
    """Return the networks, also of libraries that are not installed: those cannot be built.

    >>> networks()[0].build().fc.out_features
    1000
    """
    found = [
        Network("torchvision", name, partial(_torchvision, name), partial(image, edge))
        for name, edge in (TORCHVISION | SEGMENTATION).items()
    ]
    found += [
        Network("torchvision", "r3d_18", partial(_torchvision, "r3d_18"), partial(image, 4, 32, 32)),
        Network("torchvision", "VisionTransformer, small", _vit, partial(image, 32)),
        Network("torchvision", "SwinTransformer, small", _swin, partial(image, 32)),
        Network("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn", _faster_rcnn, _list_of_images),
    ]
    found += [
        Network("timm", name, partial(_timm, name), partial(image, edge)) for name, edge in TIMM.items()
    ]
    found += [
        Network("transformers", name, partial(_transformers, name), partial(_taken_by, takes))
        for name, (_, _, takes) in TRANSFORMERS.items()
    ]
    for name, encoder in SMP.items():
        edge = 128 if name == "PAN" else 64  # it pools away smaller ones
        build = partial(_smp, name, encoder)
        found.append(
            Network("segmentation-models-pytorch", f"{name}, {encoder}", build, partial(image, edge))
        )
    found += [
        Network("ultralytics", name, partial(_ultralytics, name), partial(image, 64)) for name in ULTRALYTICS
    ]
    return found


def versions() -> dict[str, str | None]:
    """Return the version of each library, None of those that are not installed.

    >>> list(versions())[0]
    'torchvision'
    """
    found: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def image(*edges: int) -> Tensor:
    """Return two random images (2, 3, edge, edge) in [0, 1]; with several edges of that shape.

    >>> image(8).shape, image(4, 8, 8).shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 3, 4, 8, 8]))
    """
    edges = edges * 2 if len(edges) == 1 else edges
    return torch.rand(2, 3, *edges, generator=torch.Generator().manual_seed(0))


def _list_of_images() -> tuple[list[Tensor]]:
    return (list(image(64)),)


def _taken_by(kind: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    decoder = {"decoder_input_ids": tokens[:, :8]}
    return {
        "tokens": {"input_ids": tokens},
        "both tokens": {"input_ids": tokens, **decoder},
        "spectrum": {"input_features": image(20, 64)[:, 0], **decoder},
        "sound": {"input_values": image(1000, 1)[:, 0, :, 0]},
        "image": {"pixel_values": image(32)},
    }[kind]


def _load(library: str):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes settings where it is imported
    return importlib.import_module(LIBRARIES[library])


def _torchvision(name: str) -> nn.Module:
    more = {"weights_backbone": None} if name in SEGMENTATION else {}
    return torchvision.models.get_model(name, weights=None, **more)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 32, [2, 2], [2, 4], [4, 4])


def _faster_rcnn() -> nn.Module:
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return build(weights=None, weights_backbone=None, box_score_thresh=0.0, min_size=64, max_size=64)


def _timm(name: str) -> nn.Module:
    return _load("timm").create_model(name, pretrained=False)


def _transformers(name: str) -> nn.Module:
    transformers, (config, settings, _) = _load("transformers"), TRANSFORMERS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).float()


def _smp(name: str, encoder: str) -> nn.Module:
    return getattr(_load("segmentation-models-pytorch"), name)(encoder, encoder_weights=None)


def _ultralytics(name: str) -> nn.Module:
    _load("ultralytics")
    kinds = importlib.import_module("ultralytics.nn.tasks")
    return getattr(kinds, ULTRALYTICS[name])(f"{name}.yaml", verbose=False)
