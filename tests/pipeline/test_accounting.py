"""Every layer that a pass concerns is changed, or in its plan with a reason: all passes, kinds of layers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from graphcomp.channels import analyse
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.passes import PASSES
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.accounting import FROZEN, FUNCTION
from tests.learnable import SHAPE, make_data
from tests.nets import scramble
from tests.tiny import context

WIDTH = 16


class Every(nn.Module):
    """One of every kind of layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        w = WIDTH
        self.stem, self.bn2 = nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.second, self.still = nn.Conv2d(w, w, 3, padding=1), FrozenBatchNorm2d(w)
        self.depthwise = nn.Conv2d(w, w, 3, padding=1, groups=w)
        self.prelu = nn.PReLU(w)
        self.grouped, self.group_norm = nn.Conv2d(w, w, 3, padding=1, groups=4), nn.GroupNorm(4, w)
        self.free, self.after = nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, w, 1)
        self.twice = nn.Conv2d(w, w, 1)
        self.transposed = nn.ConvTranspose2d(w, w, 2, stride=2)
        self.conv3, self.bn3 = nn.Conv3d(w, w, 1), nn.BatchNorm3d(w)
        self.conv1, self.bn1 = nn.Conv1d(w, w, 3, padding=1), nn.BatchNorm1d(w)
        self.embedding, self.layer_norm = nn.Embedding(16, w), nn.LayerNorm(w)
        self.lstm = nn.LSTM(w, w, batch_first=True)
        self.attention = nn.MultiheadAttention(w, 2, batch_first=True)
        self.closed = nn.MultiheadAttention(w, 2, batch_first=True, add_bias_kv=True)
        self.mixing = nn.Parameter(torch.randn(w, w) / 4)
        self.hidden, self.frozen = nn.Linear(w, 2 * w), nn.Linear(2 * w, 2 * w).requires_grad_(False)
        self.head = nn.Linear(2 * w, 4)
        self.register_buffer("places", torch.arange(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.stem(x)).relu()
        x = self.still(self.second(x)).relu()
        x = self.prelu(self.depthwise(x))
        x = self.group_norm(self.grouped(x)).relu()
        x = self.after(self.free(x).relu()).relu()
        x = self.twice(self.twice(x).relu())
        x = nn.functional.max_pool2d(self.transposed(x).relu(), 4)
        x = self.bn3(self.conv3(x.unsqueeze(2))).squeeze(2)
        x = self.bn1(self.conv1(x.flatten(2))).relu()
        x = x.transpose(1, 2) + self.embedding(self.places)
        x = self.lstm(self.layer_norm(x))[0]
        x = x + self.attention(x, x, x)[0]
        x = x + self.closed(x, x, x)[0]
        x = torch.matmul(x, self.mixing).mean(1)
        return self.head(self.frozen(self.hidden(x).relu()).relu())  # type: ignore[no-any-return]


MATRICES = (
    "stem second depthwise grouped free after twice transposed conv3 conv1 embedding lstm.layers.0 "
    "attention.in_proj attention.out_proj closed mixing hidden frozen head"
).split()
NORMS = "bn1 bn2 bn3 still".split()
PARAMETERS = [*MATRICES, *NORMS, "prelu", "group_norm", "layer_norm"]
CONCERNS = {"channels": MATRICES, "weights": MATRICES, "normalisations": NORMS, "parameters": PARAMETERS}

TRAINING = {"epochs": 1, "batch": 24, "lr": 0.01, "precision": "float32"}
REMOVAL = {"ratio": 0.5, "multiple": 1}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fold-bn": ("normalisations", {}),
    "l1": ("channels", REMOVAL),
    "random": ("channels", {"ratio": 0.25, "multiple": 1}),  # half leaves little that depends on the input
    "apoz": ("channels", REMOVAL),
    "slimming": ("channels", REMOVAL),
    "pfa": ("channels", {"target": {"macs": 0.97}, "multiple": 1}),
    "play-and-prune": ("channels", {"max_epochs": 1, "eps": 100, "training": TRAINING}),
    "student": ("channels", {"fraction": 0.5, "also": ("stem", "free")}),
    "low-rank": ("weights", {"energy": 0.7, "multiple": 1}),
    "cc": ("weights", {"rate": 0.4, "multiple": 1, "samples": 32}),
    "dct": ("weights", {"rate": 4, "min_weights": 1}),
    "refit": ("weights", {}),
    "obs": ("channels", {"ratio": 0.5, "multiple": 1}),
    "reinit": ("parameters", {"seed": 1}),  # 0 is what the network was drawn from
    "finetune": ("parameters", TRAINING),
    "distil": ("parameters", {**TRAINING, "teacher": 0, "loss": "kl"}),
}


@cache
def every() -> Program:
    torch.manual_seed(0)
    return trace(scramble(Every(), 1).eval(), torch.zeros(1, *SHAPE))


def state(program: Program, path: str) -> dict[str, Tensor]:
    own = {n: t for n, t in program.tensors.items() if n == path or n.startswith(f"{path}.")}
    return {n: t for n, t in own.items() if not n.endswith("num_batches_tracked")}


def is_changed(before: Program, after: Program, path: str) -> bool:
    old, new = state(before, path), state(after, path)
    assert old
    return old.keys() != new.keys() or any(
        t.shape != new[n].shape or not torch.equal(t, new[n]) for n, t in old.items()
    )


def is_narrower(before: Program, after: Program, path: str) -> bool:
    """By what the layer yields, whatever it is."""

    def width(program: Program) -> list[tuple[int, ...] | None]:
        nodes = [n for n in program.graph.nodes if n.target == path]
        return [program.shape(n) for n in nodes]

    old, new = width(before), width(after)
    return len(old) != len(new) or any(a and b and a != b for a, b in zip(old, new, strict=True))


def test_every_pass_is_here() -> None:
    """But for what is carried out on a file."""
    assert OPTIONS.keys() == PASSES.keys() - {"quantize"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_layer_is_changed_or_named(name: str) -> None:
    concern, options = OPTIONS[name]
    pass_ = PASSES[name](**options)
    before = every()
    after, (step,) = Pipeline([pass_]).run(before, context(make_data()))
    assert all(k.reason for k in step.plan.kept)
    named = {k.where for k in step.plan.kept}
    if concern == "channels":  # a group goes by the name of one of its layers
        named |= {p for g in analyse(before).groups if g.name in named for p in g.producers}
    changed: Callable[[Program, Program, str], bool] = is_narrower if concern == "channels" else is_changed
    missing = [path for path in CONCERNS[concern] if path not in named and not changed(before, after, path)]
    assert not missing
    reasons = {k.where: k.reason for k in step.plan.kept}
    if concern == "weights":
        assert reasons["mixing"] == FUNCTION and "LstmLayer" in reasons["lstm.layers.0"]
        assert "Embedding" in reasons["embedding"]
    if concern == "parameters" and name != "reinit":  # that knows no function's parameters
        assert reasons == {"frozen": FROZEN, "still": FROZEN}
