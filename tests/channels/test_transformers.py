"""Networks with normalised streams, small ones of torchvision: all widths may go, exactly."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

import graphcomp
from graphcomp.channels import analyse
from graphcomp.ir.program import Program
from graphcomp.onnx import export_onnx
from graphcomp.pipeline.verify import check, verify_pass
from tests.nets import scramble
from tests.removing import ByRows, half, random_scores

pytestmark = pytest.mark.slow

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], num_classes=5),
        32,
        1.0,
    ),
    "vit": (
        lambda: VisionTransformer(16, 4, 2, num_heads=2, hidden_dim=16, mlp_dim=20, num_classes=5),
        16,
        1.0,
    ),
    "swin": (lambda: SwinTransformer([4, 4], 12, [2, 2], [2, 3], [4, 4], num_classes=5), 64, 1.0),
    "swin-v2": (
        lambda: SwinTransformer(
            [4, 4],
            12,
            [2, 1],
            [2, 3],
            [4, 4],
            num_classes=5,
            block=partial(SwinTransformerBlockV2, attn_layer=ShiftedWindowAttentionV2),
            downsample_layer=PatchMergingV2,
        ),
        64,
        0.7,
    ),
}
"""A network, the side of its images, and the least share of its channels that may go."""


def traced(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Program]:
    make, side, _ = NETWORKS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = scramble(make(), 0).to(dtype).eval()
        return model, graphcomp.trace(model, torch.zeros(1, 3, side, side, dtype=dtype))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("join", ["couple", "pad"])
def test_half_of_every_width_goes_exactly(name: str, join: str) -> None:
    model, program = traced(name)
    x = torch.randn(2, *program.example_inputs[0].shape[1:], dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-10, atol=1e-10)
    channels = analyse(program, join)  # type: ignore[arg-type]
    inner = [g for g in channels.groups if g.pinned is None or g.pinned[1] != "network output"]
    share = sum(len(g.channels) for g in channels.removable) / sum(
        len(g.channels) for g in inner if not g.derived
    )
    assert share >= NETWORKS[name][2], [g.pinned for g in inner if g.pinned]
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    verify_pass(ByRows(join), program, removal.rows)  # type: ignore[arg-type]
    smaller = removal.apply("test")
    check(smaller)
    torch.testing.assert_close(smaller(x), removal.mask()(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_is_exported(name: str, tmp_path: Path) -> None:
    _, program = traced(name, torch.float32)
    channels = analyse(program)
    smaller = half(channels).feasible(random_scores(channels))[0].apply("test")
    exported = export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3))
    assert not exported.fallback and max(exported.parity.values()) < 1e-4
