"""What computes with all channels of an axis: the smaller network is the one that torch builds at that width.

The oracle is no code of graphcomp: the same network is built anew with fewer channels and gets the rows and
columns of the weights that stay.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import Removal, analyse
from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.onnx import export_onnx
from graphcomp.pipeline.verify import TOLERANCE, check, difference, verify_pass
from tests.nets import scramble
from tests.removing import ByRows, half, random_scores

WIDTH, PLANE = 12, 4
GONE = [0, 3, 4, 7, 11]
Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A stem of so many channels, what a form does with them, and a head that reads what comes out."""

    def __init__(self, form: "Form", width: int) -> None:
        super().__init__()
        self.form, self.width = form, width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleDict(form.parts(width))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.head = nn.Conv2d(width if form.keeps else form.out, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.form.forward(self, self.stem(x)))


class Form:
    """One way of mixing channels: what the network holds for it, and what it does.

    Attributes:
        out: channels that come out where the width does not.
    """

    def __init__(
        self, forward: Forward, parts: Callable[[int], dict[str, nn.Module]] = lambda _: {}, out: int = 0
    ) -> None:
        self.forward, self.parts, self.out, self.keeps = forward, parts, out, not out


def norm(make: Callable[[int], nn.Module], before: Any = None, after: Any = None) -> Form:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (after or same)(m.parts["norm"]((before or same)(x)))

    return Form(forward, lambda width: {"norm": make(width)})


def same(x: Tensor) -> Tensor:
    return x


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """As detection networks write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ByVariance(LayerNorm2d):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, 1, keepdim=True, **self.options)
        return (x - mean) * (var + 1e-5).rsqrt() * self.weight.view(1, -1, 1, 1)


class Grn(LayerNorm2d):
    """ConvNeXt-V2's response normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * n)


def reduced(function: Callable[[Tensor], Tensor], out: int = 1) -> Form:
    return Form(lambda m, x: function(x), out=out)


FORMS: dict[str, Form] = {
    "layer_norm": norm(nn.LayerNorm, last, first),
    "layer_norm eps": norm(lambda w: nn.LayerNorm(w, eps=0.3), last, first),
    "layer_norm without weights": norm(lambda w: nn.LayerNorm(w, elementwise_affine=False), last, first),
    "layer_norm without bias": norm(lambda w: nn.LayerNorm(w, bias=False), last, first),
    "layer_norm of maps": norm(lambda w: nn.LayerNorm([w, PLANE, PLANE])),
    "layer_norm of rows": norm(
        lambda w: nn.LayerNorm([w, PLANE]), lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)
    ),
    "F.layer_norm": Form(
        lambda m, x: first(F.layer_norm(last(x), (m.width,), m.weight, m.bias, 1e-2)),
    ),
    "F.layer_norm without weights": Form(lambda m, x: first(F.layer_norm(last(x), (m.width,)))),
    "layer norm by hand": norm(LayerNorm2d),
    "layer norm by variance": norm(ByVariance),
    "layer norm by biased variance": norm(lambda w: ByVariance(w, unbiased=False)),
    "layer norm by correction": norm(lambda w: ByVariance(w, correction=3)),
    "rms_norm": norm(nn.RMSNorm, last, first),
    "rms_norm eps": norm(lambda w: nn.RMSNorm(w, eps=0.2), last, first),
    "rms_norm without weights": norm(lambda w: nn.RMSNorm(w, elementwise_affine=False), last, first),
    "F.rms_norm": Form(lambda m, x: first(F.rms_norm(last(x), (m.width,), m.weight, 1e-3))),
    "rms norm by hand": Form(
        lambda m, x: x * torch.rsqrt(x.square().mean(1, True) + 1e-6) * m.weight.view(-1, 1, 1)
    ),
    "group_norm 1": norm(lambda w: nn.GroupNorm(1, w)),
    "group_norm without weights": norm(lambda w: nn.GroupNorm(1, w, affine=False)),
    "group_norm of vectors": Form(
        lambda m, x: m.parts["norm"](x.mean((2, 3)))[:, :, None, None], lambda w: {"norm": nn.GroupNorm(1, w)}
    ),
    "F.group_norm": Form(lambda m, x: F.group_norm(x, 1, m.weight, m.bias)),
    "grn": norm(Grn),
    "normalize": Form(lambda m, x: F.normalize(x, dim=1)),
    "normalize p=1": Form(lambda m, x: F.normalize(x, 1.0, 1)),
    "softmax": Form(lambda m, x: x.softmax(1)),
    "log_softmax": Form(lambda m, x: F.log_softmax(x, dim=1)),
    "softmin": Form(lambda m, x: F.softmin(x, dim=1)),
    "mean": reduced(lambda x: x.mean(1, keepdim=True)),
    "mean of all": reduced(lambda x: x.mean((1, 2, 3), keepdim=True)),
    "mean without axis": Form(lambda m, x: x * x.mean(1)[:, None]),
    "sum": reduced(lambda x: x.sum(dim=1, keepdim=True)),
    "mean and max": reduced(
        lambda x: torch.cat([x.mean(1, True), x.max(1, keepdim=True)[0], x.amin(1, True)], 1), 3
    ),
    "max.values": reduced(lambda x: torch.max(x, dim=1, keepdim=True).values),
    "min": reduced(lambda x: x.min(1, keepdim=True)[0]),
    "logsumexp": reduced(lambda x: torch.logsumexp(x, 1, keepdim=True)),
    "norm": reduced(lambda x: x.norm(dim=1, keepdim=True)),
    "vector_norm": reduced(lambda x: torch.linalg.vector_norm(x, 3, 1, keepdim=True)),
    "std": reduced(lambda x: x.std(1, keepdim=True)),
    "var of all": reduced(lambda x: x.var((1, 2, 3), keepdim=True, correction=0)),
    "std_mean": reduced(lambda x: torch.cat(torch.std_mean(x, dim=1, keepdim=True), 1), 2),
    "spatial gate": Form(lambda m, x: x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True))),
    "twice": Form(
        lambda m, x: first(m.parts["norm"](m.parts["norm"](last(x)).relu())),
        lambda w: {"norm": nn.LayerNorm(w, elementwise_affine=False)},
    ),
}  # fmt: skip


def narrow(model: nn.Module, form: Form, kept: list[int]) -> nn.Module:
    """The network at a smaller width, with what of the weights stays."""
    small = Net(form, len(kept)).to(torch.float64).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        for d in range(tensor.ndim):
            if tensor.size(d) == WIDTH:
                tensor = tensor.index_select(d, torch.tensor(kept))
        state[name] = tensor
    small.load_state_dict(state)
    return small


def traced(form: Form, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Program]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scramble(Net(form, WIDTH), 0).to(dtype).eval()
    return model, graphcomp.trace(model, torch.zeros(1, 3, PLANE, PLANE, dtype=dtype))


def without(program: Program, gone: list[int]) -> Removal:
    """These channels of the stem."""
    channels = analyse(program)
    (group,) = channels.group_of("stem")
    assert group.pinned is None, group.pinned
    removal = Removal.of(channels, group.channels[gone].tolist())
    found = removal.legal(np.zeros(len(removal.gone)))
    assert np.array_equal(found.gone, removal.gone)
    return removal


@pytest.mark.parametrize("name", FORMS)
def test_what_is_left_is_the_narrower_network(name: str) -> None:
    model, program = traced(FORMS[name])
    removal = without(program, GONE)
    smaller, masked = removal.apply("test"), removal.mask()
    check(smaller)
    expected = narrow(model, FORMS[name], [c for c in range(WIDTH) if c not in GONE])
    x = torch.randn(2, 3, PLANE, PLANE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(smaller(x), expected(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked(x), expected(x), rtol=1e-11, atol=1e-11)
    verify_pass(ByRows(), program, removal.rows)


@pytest.mark.parametrize("name", FORMS)
def test_a_plan_is_replayed_on_the_masked_program(name: str) -> None:
    _, program = traced(FORMS[name])
    removal = without(program, GONE)
    masked = removal.mask()
    replayed = ByRows().rewrite(masked, removal.rows)
    assert difference(masked, replayed) <= TOLERANCE
    assert str(replayed) == str(removal.apply("removal"))


@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "layer norm by variance", "mean and max", "softmax"]
)
def test_masked_programs_are_saved_and_exported(name: str, tmp_path: Path) -> None:
    _, program = traced(FORMS[name], torch.float32)
    masked = without(program, GONE).mask()
    save(masked, tmp_path / "masked")
    x = torch.randn(2, 3, PLANE, PLANE)
    assert torch.equal(load(tmp_path / "masked")(x), masked(x))
    assert max(export_onnx(masked, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-4


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "std"])
def test_a_variance_of_one_channel_says_nothing(name: str) -> None:
    """What would leave one channel to be normalised by itself keeps two."""
    _, program = traced(FORMS[name])
    channels = analyse(program)
    (group,) = channels.group_of("stem")
    scores = np.arange(len(channels.channel_of), dtype=float)
    found = Removal.of(channels, group.channels[1:].tolist()).legal(scores)
    assert np.array_equal(np.flatnonzero(~found.gone[group.channels]), [0, WIDTH - 1])
    verify_pass(ByRows(), program, found.rows)


def test_a_channel_of_zeros_is_missed() -> None:
    """A mean over channels counts what is zero: to remove it is no longer the same function."""
    model, _ = traced(FORMS["layer_norm"])
    with torch.no_grad():
        for tensor in (model.stem.weight, model.stem.bias):
            tensor[GONE] = 0
    program = graphcomp.trace(model, torch.zeros(1, 3, PLANE, PLANE, dtype=torch.float64))
    removal = without(program, GONE)
    x = torch.randn(2, 3, PLANE, PLANE, dtype=torch.float64)
    assert not removal.shifts
    assert not torch.allclose(removal.mask()(x), program(x), atol=1e-3)
    torch.testing.assert_close(removal.mask()(x), removal.apply("test")(x), rtol=1e-11, atol=1e-11)


def grouped(groups: int, **options: Any) -> Form:
    return norm(lambda w: nn.GroupNorm(groups if w == WIDTH else w // (WIDTH // groups), w, **options))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("groups", "gone"),
    [(4, [3, 4, 5]), (4, [0, 1, 2, 9, 10, 11]), (3, [4, 5, 6, 7]), (2, list(range(6))), (6, [2, 3, 10, 11])],
)
def test_whole_groups_go(groups: int, gone: list[int], affine: bool) -> None:
    """Their number is another one then, and who stays is normalised with whom it was."""
    form = grouped(groups, affine=affine)
    model, program = traced(form)
    removal = without(program, gone)
    expected = narrow(model, form, [c for c in range(WIDTH) if c not in gone])
    smaller = removal.apply("test")
    check(smaller)
    x = torch.randn(2, 3, PLANE, PLANE, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), expected(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(removal.mask()(x), expected(x), rtol=1e-11, atol=1e-11)
    verify_pass(ByRows(), program, removal.rows)


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
def test_a_criterion_takes_whole_groups(affine: bool, tmp_path: Path) -> None:
    """Two of six, those of the smallest rows together; their number is in the file, too."""
    model, _ = traced(grouped(6, affine=affine))
    with torch.no_grad():
        model.stem.weight[[2, 3, 8, 9]] *= 0.3
        model.stem.weight[0] *= 0.01  # alone it would be the first to go
        model.stem.weight[1] *= 4
    program = graphcomp.trace(model.float(), torch.zeros(1, 3, PLANE, PLANE))
    smaller = graphcomp.compile(program, "l1{ratio=0.34, multiple=1, granularity=group}").program
    (plan,) = smaller.history
    assert plan["decisions"] == {
        "join": "couple", "rows": {"stem.weight": [2, 3, 8, 9]}, "granularity": "group"
    }  # fmt: skip
    (module,) = (m for m in smaller.called_modules().values() if isinstance(m, nn.GroupNorm))
    assert (module.num_groups, module.num_channels) == (4, 8)
    expected = narrow(model.double(), grouped(6, affine=affine), [0, 1, 4, 5, 6, 7, 10, 11])
    x = torch.randn(2, 3, PLANE, PLANE, dtype=torch.float64)
    torch.testing.assert_close(smaller.to(torch.float64)(x), expected(x), rtol=1e-6, atol=1e-6)
    assert max(export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-5


def test_of_every_group_equally_many_go() -> None:
    form = norm(lambda w: nn.GroupNorm(4, w))
    model, program = traced(form)
    channels = analyse(program)
    (group,) = channels.group_of("stem")
    assert len(set(group.blocks.tolist())) == 4
    gone = [0, 4, 5, 8, 9, 10, 11]  # of the groups 1, 2 and 1, and one whole: the second gets one back
    scores = np.arange(len(channels.channel_of), dtype=float)
    found = Removal.of(channels, group.channels[gone].tolist()).legal(scores)
    assert np.flatnonzero(found.gone[group.channels]).tolist() == [0, 4, 8, 9, 10, 11]
    verify_pass(ByRows(), program, found.rows)
    kept = np.flatnonzero(~found.gone[group.channels]).tolist()
    expected = narrow(model, norm(lambda w: nn.GroupNorm(3, w)), kept)
    x = torch.randn(2, 3, PLANE, PLANE, dtype=torch.float64)
    torch.testing.assert_close(found.apply("test")(x), expected(x), rtol=1e-12, atol=1e-12)


PINNED: dict[str, tuple[Form, str]] = {
    "no eps": (norm(lambda w: nn.LayerNorm(w, eps=0), last, first), "without eps"),
    "computed size": (
        Form(lambda m, x: first(F.layer_norm(last(x), last(x).shape[-1:], m.weight * 2))),
        "number of channels is used as a number",
    ),
    "positions of maxima": (Form(lambda m, x: x + x.max(1, keepdim=True)[1]), "max mixes"),
    "negative order": (Form(lambda m, x: x / torch.linalg.vector_norm(x, -1, 1, True)), "vector_norm mixes"),
    "median": (Form(lambda m, x: x - x.median(1, keepdim=True)[0]), "median mixes"),
    "laid out again": (
        Form(lambda m, x: x - x.mean(1, keepdim=True).expand(-1, 12, -1, -1)),
        "meets what was computed of all channels",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_nothing_can_stand_for_stays_by_name(name: str) -> None:
    form, why = PINNED[name]
    _, program = traced(form)
    (group,) = analyse(program).group_of("stem")
    assert group.pinned is not None and why in group.pinned[1]


def test_a_layer_without_weights_has_one_width_at_all_calls() -> None:
    """Two streams through one module: what goes of one goes of the other."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
            self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
            self.c, self.d = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Any:
            return self.c(self.norm(self.a(x))) + self.d(self.norm(self.b(x)))

    program = graphcomp.trace(scramble(Shared(), 0).double().eval(), torch.zeros(1, 4, 3).double())
    channels = analyse(program)
    assert channels.group_of("a") == channels.group_of("b")
    removal, kept = half(channels).feasible(random_scores(channels))
    assert len(removal) == WIDTH // 2 and not kept
    verify_pass(ByRows(), program, removal.rows)
    check(removal.apply("test"))
