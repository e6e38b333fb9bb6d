"""The networks of collections: how each is made, what it takes, and what of it is looked at."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo import without_random_inits

LARGEST = 60e6
"""Parameters above which a family's smallest is left out."""
WORDS = "atto femto pico nano tiny xxs extra_small small mini".split()
PARTS = "xs b0 m0 t0 s".split()
"""What small variants are called: anywhere in a name, and between underscores."""
SMALL = 128
"""Pixels of networks that say that they take any."""
_NARROW = {"depth": 2, "embed_dim": 192, "num_heads": 3}
SMALLER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("beit", "gemma4_vit", "naflexvit", "qwen3_vit"), _NARROW),
    "deepseek_vit": {**_NARROW, "img_size": 112},
    "convmixer": {"depth": 4, "dim": 128},
    "vision_transformer_sam": {**_NARROW, "img_size": 256, "global_attn_indexes": (1,)},
}
"""Families that have no small variant: the same code, narrower and less deep."""


@dataclass(frozen=True)
class Network:
    """A network with what it takes, and between which modules it is looked at.

    Attributes:
        heads: layers whose outputs are the network's, for tools that have to be told.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    start: str = ""
    until: str = ""
    heads: tuple[nn.Module, ...] = ()


Networks = dict[str, tuple[str, Callable[[], Network]]]
"""Name -> family, and how it is made."""


def families(each: int) -> dict[str, list[str]]:
    """Family (timm's file) -> the networks that stand for it, the smallest by their names."""
    import timm  # type: ignore[import-not-found] # only here

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)

    def size(name: str) -> tuple[int, int, int]:
        parts = name.split("_")
        words = [i for i, word in enumerate(WORDS) if word in name]
        words += [len(WORDS) + i for i, part in enumerate(PARTS) if part in parts]
        numbers = [int(number) for number in re.findall(r"(?<!v)\d+", name)]
        return min(words, default=len(WORDS) + len(PARTS)), min(numbers[:1], default=0), len(name)

    return {family: sorted(names, key=size)[:each] for family, names in sorted(found.items())}


def image(*shape: int) -> Tensor:
    """A seeded random one, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers_in(head: nn.Module | tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """What in a head, or in several, has weights."""
    heads = head if isinstance(head, tuple) else (head,)
    return tuple(m for h in heads for m in h.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def of_timm(each: int) -> Networks:
    """The smallest of every family."""
    import timm

    def build(name: str, options: dict[str, Any]) -> Network:
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name, **options).parameters())
        if count > LARGEST:
            raise ValueError(f"{count / 1e6:.0f} M parameters")
        with without_random_inits():
            model = timm.create_model(name, **options)
        _, *size = model.default_cfg["input_size"]
        if "img_size" in options:
            size = [options["img_size"]] * 2
        elif not model.default_cfg.get("fixed_input_size"):
            size = [min(SMALL, pixels) for pixels in size]
        return Network(model, (image(2, 3, *size),), heads=layers_in(model.get_classifier()))

    return {
        name: (family, partial(build, name, SMALLER.get(family, {})))
        for family, names in families(each).items()
        for name in names
    }


def of_smp(_: int) -> Networks:
    """Every architecture of segmentation_models_pytorch."""
    import segmentation_models_pytorch as smp  # type: ignore[import-not-found] # only here

    def build(name: str) -> Network:
        encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else "resnet18"
        model = smp.create_model(name, encoder_name=encoder, encoder_weights=None, classes=3)
        return Network(model, (image(2, 3, 224, 224),), heads=layers_in(model.segmentation_head))

    return {name: (name, partial(build, name)) for name in smp.MODEL_ARCHITECTURES_MAPPING}


DETECTORS = {
    "retinanet_resnet50_fpn": ("backbone", "head"),
    "retinanet_resnet50_fpn_v2": ("backbone", "head"),
    "fcos_resnet50_fpn": ("backbone", "head"),
    "ssd300_vgg16": ("backbone", "head"),
    "ssdlite320_mobilenet_v3_large": ("backbone", "head"),
    "fasterrcnn_resnet50_fpn": ("backbone", "backbone"),
    "fasterrcnn_resnet50_fpn_v2": ("backbone", "backbone"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("backbone", "backbone"),
    "maskrcnn_resnet50_fpn": ("backbone", "backbone"),
    "maskrcnn_resnet50_fpn heads": ("roi_heads.box_head", "roi_heads.box_predictor"),
    "keypointrcnn_resnet50_fpn": ("backbone", "backbone"),
}
"""What of a detector is a part: to the raw heads where nothing else reads the features."""
CLIPS = {"r3d_18": 112, "mc3_18": 112, "r2plus1d_18": 112, "s3d": 224, "mvit_v2_s": 224, "swin3d_t": 224}


def of_torchvision(_: int) -> Networks:
    """Detectors, and networks of videos."""
    from torchvision import models

    def detector(name: str) -> Network:
        kind = name.partition(" ")[0]
        size = {} if "ssd" in kind else {"min_size": 224, "max_size": 320}
        model = models.get_model(kind, weights=None, weights_backbone=None, **size)
        return Network(model, ([image(3, 224, 288), image(3, 200, 288)],), *DETECTORS[name])

    def clips(name: str) -> Network:
        model = models.get_model(name, weights=None)
        heads = tuple(m for m in model.modules() if getattr(m, "out_features", None) == 400)
        return Network(model, (image(2, 3, 16, CLIPS[name], CLIPS[name]),), heads=heads)

    found: Networks = {name: ("detection", partial(detector, name)) for name in DETECTORS}
    found |= {name: ("video", partial(clips, name)) for name in CLIPS}
    return found


COLLECTIONS = {"timm": of_timm, "smp": of_smp, "torchvision": of_torchvision}
