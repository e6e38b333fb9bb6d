"""Every row of every table of operators, in every way that torch has of writing it.

The rows come from the tables, and the spellings from torch itself: functions, methods, in-place methods,
operators of Python and modules, found by their name. A new row without an example fails here. Modules stand
under an attribute that has another operator's name, for an operator is called what it is.
"""

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from graphcomp.budget.calls import LIGHT_OPS, calls
from graphcomp.budget.cost import cost_of
from graphcomp.channels import analyse
from graphcomp.channels.rules import FUNCTION_RULES, MODULE_RULES
from graphcomp.ir import op_name
from graphcomp.ir.coefficients import LAYERS
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.operators import ALIASES, MODULE_NAMES, function_name
from graphcomp.ir.program import Program
from graphcomp.ir.recurrent import GruLayer, LstmLayer, RecurrentLayer
from graphcomp.ir.text import describe
from graphcomp.ir.tracing import trace
from graphcomp.measure.cost import macs
from graphcomp.onnx.export import export_onnx
from graphcomp.pipeline.verify import check, verify_pass
from graphcomp.runtime.kernel import ACTIVATIONS
from tests.removing import ByRows, half, random_scores

WIDTH, PLANE = 8, 6
SHAPE = (1, 3, PLANE, PLANE)


def same(x: Any) -> Any:
    return x


def positive(x: Any) -> Any:
    return x.abs() + 0.5


def image(x: Any) -> Any:
    return x


def line(x: Any) -> Any:
    return x.flatten(2)


def volume(x: Any) -> Any:
    return x.unsqueeze(2).repeat(1, 1, 2, 1, 1)


def windows(x: Any) -> Any:
    return F.unfold(x, 2, stride=2)


def indices(x: Any) -> Any:
    return x.abs().clamp(max=6).to(torch.int64)


def sequence(x: Any) -> Any:
    return x.flatten(2).permute(2, 0, 1)


def samples_first(parts: Any) -> Any:
    return [part.transpose(0, 1) for part in parts]


def tokens(x: Any) -> Any:
    return x.flatten(2).transpose(1, 2)


PLANES = {1: line, 2: image, 3: volume}


def maxima(d: int, x: Any) -> Any:
    """The largest of every window, and where they were."""
    pool = getattr(F, f"max_pool{d}d")
    found = pool(PLANES[d](x), (1, 2, 2) if d > 2 else 2, return_indices=True)
    return found[0], found[1]


def by_computed(d: int, f: Any, x: Any, y: Any, _: Any) -> Any:
    """A convolution whose weight is made of another activation's first sample."""
    return f(PLANES[d](x), y[:1].mean((2, 3)).reshape(1, WIDTH, *[1] * d))


def pair(f: Any, x: Any, y: Any, _: Any) -> Any:
    return f(x, y)


def normalised(f: Any, x: Any, m: Any) -> Any:
    if f is torch.batch_norm:
        return f(x, None, None, m.mean, m.var, False, 0.1, 1e-5, False)
    return f(x, m.mean, m.var)


@dataclass(frozen=True)
class Example:
    """How a row is called.

    Attributes:
        args: behind the first operand; what `call` says, otherwise.
        before, after: made of both operands in front, of the result behind.
        call: f, x, y -> result, where f is any function or unbound method of that name.
    """

    args: tuple[Any, ...] = ()
    before: Callable[[Any], Any] = same
    after: Callable[[Any], Any] = same
    call: Callable[[Any, Any, Any, Any], Any] | None = None

    def __call__(self, f: Any, x: Any, y: Any, m: Any) -> Any:
        x, y = self.before(x), self.before(y)
        return self.after(f(x, *self.args) if self.call is None else self.call(f, x, y, m))


BINARY = Example(call=pair)
LOGICAL = replace(BINARY, before=lambda x: x > 0)
REDUCED = Example((2,))
OPERANDS = Example(call=lambda f, x, y, _: f([x, y]))


def pooled(window: Any, before: Callable[[Any], Any]) -> Example:
    return Example((window,), before)


EXAMPLES: dict[str, Example] = {
    "view": Example(call=lambda f, x, y, _: f(x, (x.size(0), 4, 2, PLANE * PLANE)), after=lambda x: x.sum(2)),
    "reshape": Example(call=lambda f, x, y, _: f(x, (x.size(0), WIDTH, PLANE * PLANE))),
    "flatten": Example((1,)),
    "unflatten": Example((1, (2, 4)), after=lambda x: x.sum(1)),
    "permute": Example(((0, 1, 3, 2),)),
    "transpose": Example((2, 3)),
    "movedim": Example((2, 3)),
    "t": Example(before=lambda x: x.mean((2, 3)), after=lambda x: x.transpose(0, 1)),
    "squeeze": Example((2,), before=lambda x: x.unsqueeze(2)),
    "unsqueeze": Example((2,)),
    "expand": Example(((-1, -1, PLANE, PLANE),), before=lambda x: x.mean((2, 3), keepdim=True)),
    "broadcast_to": Example(
        call=lambda f, x, y, _: f(x.mean((2, 3), keepdim=True), (x.size(0), WIDTH, PLANE, PLANE))
    ),
    "expand_as": Example(call=lambda f, x, y, _: f(x.mean((2, 3), keepdim=True), y)),
    "view_as": Example(call=lambda f, x, y, _: f(x.flatten(2), y)),
    "reshape_as": Example(call=lambda f, x, y, _: f(x.flatten(2), y)),
    **dict.fromkeys(
        ["matmul", "bmm"], Example(call=lambda f, x, y, _: f(x.flatten(2).transpose(1, 2), y.flatten(2)))
    ),
    "einsum": Example(call=lambda f, x, y, _: f("bchw,bchv->bwv", x, y)),
    "scaled_dot_product_attention": Example(call=lambda f, x, y, _: f(tokens(x), tokens(y), tokens(y))),
    "masked_fill": Example(call=lambda f, x, y, _: f(x, y > 0, 0.5)),
    "grid_sample": Example(
        call=lambda f, x, y, m: f(x, m.mean[:2].tanh().expand(x.size(0), 5, 4, 2), align_corners=False)
    ),
    "unfold": Example(call=lambda f, x, y, _: f(x, 3) if f is F.unfold else f(x, 2, 3, 1)),
    "fold": Example(call=lambda f, x, y, _: f(F.unfold(x, 2, stride=2), PLANE, 2, stride=2)),
    "repeat": Example(((1, 1, 2, 1),)),
    "tile": Example(((1, 1, 2, 1),)),
    "roll": Example((1, 2)),
    "flip": Example(((2,),)),
    "repeat_interleave": Example((2, 1)),
    "chunk": Example((2, 1)),
    "split": Example((4, 1)),
    "tensor_split": Example((2, 1)),
    "unbind": Example((2,)),
    "narrow": Example((1, 2, 4)),
    "select": Example((2, 1)),
    "index_select": Example(call=lambda f, x, y, m: f(x, 1, m.index)),
    "getitem": Example(((slice(None), slice(2, 6)),)),
    "cat": Example(call=lambda f, x, y, _: f([x, y], 1)),
    "hstack": OPERANDS,
    "column_stack": OPERANDS,
    "dstack": replace(OPERANDS, after=lambda x: x[:, :, :PLANE] + x[:, :, PLANE:]),
    "vstack": replace(OPERANDS, after=lambda x: x[:1] + x[-1:]),
    "stack": Example(call=lambda f, x, y, _: f([x, y], 1)),
    "arange": Example(call=lambda f, x, y, _: x.flatten(2) * f(x.size(2) * x.size(3))),
    "meshgrid": Example(call=lambda f, x, y, _: x * f([x[0, 0, 0], x[0, 0, 1]], indexing="ij")[0]),
    "pixel_shuffle": Example((2,), after=lambda x: x.mean((2, 3))),
    "pixel_unshuffle": Example((2,)),
    "channel_shuffle": Example((2,)),
    "pad": Example(((1, 1, 1, 1),)),
    "to": Example((torch.float32,)),
    "type": Example((torch.float32,)),
    "type_as": BINARY,
    **dict.fromkeys(["clamp"], Example((-1, 1))),
    **dict.fromkeys(["clamp_min", "clamp_max"], Example((0.1,))),
    "threshold": Example((0.1, 0.0)),
    **dict.fromkeys(["dropout", "alpha_dropout", "feature_alpha_dropout"], Example((0.5, False))),
    "dropout1d": Example((0.5, False), before=line),
    "dropout2d": Example((0.5, False)),
    "dropout3d": Example((0.5, False), before=volume),
    "stochastic_depth": Example(
        call=lambda f, x, y, _: torchvision.ops.StochasticDepth(0.5, "row").eval().forward(x)
    ),
    "bitwise_not": Example(before=lambda x: x > 0),
    **dict.fromkeys(["log", "log1p", "sqrt", "rsqrt", "reciprocal"], Example(before=positive)),
    **{f"{k}_pool1d": pooled(2, line) for k in ("avg", "max", "adaptive_avg", "adaptive_max")},
    **{f"{k}_pool2d": pooled(2, image) for k in ("avg", "max", "adaptive_avg", "adaptive_max")},
    **{f"{k}_pool3d": pooled((1, 2, 2), volume) for k in ("avg", "max", "adaptive_avg", "adaptive_max")},
    **{
        f"{k}_pool{d}d_with_indices": pooled((1, 2, 2) if d > 2 else 2, before)
        for k in ("max", "adaptive_max")
        for d, before in PLANES.items()
    },
    "lp_pool1d": Example((2, 2), before=line),
    "lp_pool2d": Example((2, 2)),
    "lp_pool3d": Example((2, (1, 2, 2)), before=volume),
    **{f"conv{d}d": Example(call=partial(by_computed, d)) for d in (1, 2, 3)},
    **{
        f"max_unpool{d}d": Example(call=lambda f, x, y, _, d=d: f(*maxima(d, x), (1, 2, 2) if d > 2 else 2))
        for d in (1, 2, 3)
    },
    "interpolate": Example((None, 2.0)),
    "batch_norm": Example(call=lambda f, x, y, m: normalised(f, x, m)),
    **dict.fromkeys(
        ["new_zeros", "new_ones"],
        Example(call=lambda f, x, y, _: x + 0 * f(x, x.shape[2:])),
    ),
    "new_full": Example(call=lambda f, x, y, _: x + f(x, x.shape[2:], 0.5)),
    **dict.fromkeys(["layer_norm", "rms_norm"], Example(((PLANE,),))),
    **dict.fromkeys(["softmax", "log_softmax", "softmin", "cumsum", "cumprod"], Example((2,))),
    "normalize": Example((2.0, 2)),
    **dict.fromkeys(
        "sum prod amax amin max min median logsumexp var std var_mean std_mean any all".split(), REDUCED
    ),
    "mean": Example(((2, 3),)),
    **dict.fromkeys(["norm", "vector_norm"], Example((2, 2))),
    "glu": Example((1,)),
    "getattr": Example(call=lambda f, x, y, _: x.max(2).values),
    **dict.fromkeys(
        """add sub mul maximum minimum fmax fmin atan2 rsub lt le gt ge eq ne logical_and logical_or
        logical_xor""".split(),
        BINARY,
    ),
    **dict.fromkeys(["bitwise_and", "bitwise_or", "bitwise_xor"], LOGICAL),
    **dict.fromkeys(["div", "pow", "floordiv", "remainder", "fmod"], replace(BINARY, before=positive)),
    "where": Example(call=lambda f, x, y, _: f(x > 0, x, y) if f is torch.where else f(x, x > 0, y)),
    "lerp": Example(call=lambda f, x, y, _: f(x, y, 0.3)),
    "addcmul": Example(call=lambda f, x, y, _: f(x, y, y)),
    "addcdiv": Example(call=lambda f, x, y, _: f(x, y, positive(y))),
    **dict.fromkeys(
        """relu relu6 elu selu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu logsigmoid
        softplus softsign tanhshrink sigmoid tanh exp expm1 square abs neg erf sin cos sign round floor ceil
        hardshrink softshrink positive logical_not nan_to_num zeros_like ones_like rrelu
        contiguous clone detach float double half bfloat16 int long""".split(),
        Example(),
    ),
}

MODULES: dict[type[nn.Module], tuple[Any, ...]] = {
    **dict.fromkeys([nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d], (2,)),
    **dict.fromkeys([nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d], ((1, 2, 2),)),
    **dict.fromkeys([nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d], (2,)),
    **dict.fromkeys([nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d], (2,)),
    nn.LPPool1d: (2, 2),
    nn.LPPool2d: (2, 2),
    nn.LPPool3d: (2, (1, 2, 2)),
    **dict.fromkeys([nn.MaxUnpool1d, nn.MaxUnpool2d], (2,)),
    nn.MaxUnpool3d: ((1, 2, 2),),
    nn.Upsample: (None, 2.0),
    nn.UpsamplingBilinear2d: (None, 2.0),
    nn.UpsamplingNearest2d: (None, 2.0),
    **dict.fromkeys([nn.Softmax, nn.LogSoftmax, nn.Softmin], (2,)),
    nn.Threshold: (0.1, 0.0),
    nn.Unfold: (3,),
    nn.Fold: (PLANE, 2, 1, 0, 2),
    nn.GLU: (1,),
    nn.LayerNorm: (PLANE,),
    nn.RMSNorm: (PLANE,),
    nn.GroupNorm: (WIDTH // 2, WIDTH),
    nn.PReLU: (WIDTH,),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm], (WIDTH,)),
    FrozenBatchNorm2d: (WIDTH,),
    **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], (WIDTH,)),
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], (WIDTH, 4, 1)),
    **dict.fromkeys([nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d], (WIDTH, 4, 1)),
    nn.Linear: (PLANE, 4),
    nn.Embedding: (7, 4),
    nn.Unflatten: (1, (2, 4)),
    **dict.fromkeys([nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle], (2,)),
    **{k: (1,) for k, name in MODULE_NAMES.items() if name == "pad"},
    **dict.fromkeys([nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d], (1, 0.5)),
    **dict.fromkeys([LstmLayer, GruLayer], (WIDTH, 4)),
    LAYERS["DctConv2d"]: (WIDTH, 4, (1, 1)),
    LAYERS["DctLinear"]: (PLANE, 4),
}
"""Module -> arguments, where it takes some."""

BEFORE: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.Fold: windows,
    **{getattr(nn, f"MaxUnpool{d}d"): partial(maxima, d) for d in (1, 2, 3)},
    nn.Embedding: indices,
    **dict.fromkeys([LstmLayer, GruLayer], sequence),
}

KEPT = {nn.Embedding, *LAYERS.values()}
"""Modules whose operand's channels stay."""

NAMESPACES = (torch, F, operator, torch.special, torch.linalg, torchvision.ops)
SCREENED = {"upsample"}
"""Deprecated by torch: calls warn."""


def functions(row: str) -> dict[str, Callable[..., Any]]:
    """Every function and method of torch that is the operator, by how it is written."""
    found: dict[str, Callable[..., Any]] = {"getattr": getattr} if row == "getattr" else {}
    for space in NAMESPACES:
        for name in dir(space):
            value = getattr(space, name) if name not in SCREENED and not name.startswith("_") else None
            if value is None or isinstance(value, type) or not callable(value) or inspect.ismodule(value):
                continue
            if function_name(value) == row and value not in found.values():
                found[f"{space.__name__}.{name}"] = value
    for name in dir(Tensor):
        if not name.startswith("_") and callable(getattr(Tensor, name)) and function_name(name) == row:
            found[f"x.{name}"] = method(name)
    return found


def method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **named: getattr(x, name)(*args, **named)


def modules(row: str) -> list[type[nn.Module]]:
    return [kind for kind in MODULE_RULES if MODULE_NAMES.get(kind, kind.__name__) == row]


@dataclass(frozen=True)
class Branch:
    """One way of writing an operator."""

    label: str
    run: Callable[[Any, Any, Any, Any], Any]
    module: nn.Module | None = None
    attribute: str = ""


def branches(row: str) -> list[Branch]:
    example = EXAMPLES.get(row)
    found = []
    for label, function in functions(row).items() if example else ():
        found.append(Branch(label, partial(example, function)))  # type: ignore[arg-type]
    for kind in modules(row):
        before = BEFORE.get(kind) or {"1d": line, "3d": volume}.get(kind.__name__[-2:], same)
        after = samples_first if issubclass(kind, RecurrentLayer) else example.after if example else same
        run = partial(called, before, lying(row), after)
        found.append(Branch(f"nn.{kind.__name__}", run, built(kind), lying(row)))
    return found


def called(before: Any, name: str, after: Any, x: Any, y: Any, m: Any) -> Any:
    given = before(x)
    return after(getattr(m, name)(*given if isinstance(given, tuple) else (given,)))


def lying(row: str) -> str:
    """An attribute name that is another operator's."""
    return "pad" if row != "pad" else "relu"


def built(kind: type[nn.Module]) -> nn.Module:
    options = {"rows": 2, "terms": 8} if kind in LAYERS.values() else {}
    return kind(*MODULES.get(kind, ()), **options).eval()


class Holder(nn.Module):
    """Gives a branch its module and buffers."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([0, 2, 3, 5, 6, 7]))
        self.register_buffer("mean", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("var", torch.linspace(0.5, 1, WIDTH))
        self.a, self.c = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(3, WIDTH, 1)
        if module is not None:
            setattr(self, name, module)
        self.readers = nn.ModuleList()


class Branches(nn.Module):
    """Every branch behind two convolutions of its own, with linear layers that read it."""

    def __init__(self, ways: Sequence[Branch]) -> None:
        super().__init__()
        self.runs = [way.run for way in ways]
        self.holders = nn.ModuleList(Holder(way.attribute, way.module) for way in ways)
        self.plain = nn.Conv2d(3, 2, 1)
        self.several = []
        for i, holder in enumerate(self.holders):
            y = self.result(i, torch.randn(SHAPE))
            self.several.append(isinstance(y, tuple | list))
            for part in y if self.several[i] else [y]:
                holder.readers.append(nn.Linear(part.flatten(1).shape[1], 2))

    def result(self, i: int, x: Tensor) -> Any:
        m = self.holders[i]
        return self.runs[i](m.a(x), m.c(x), m)

    def forward(self, x: Tensor) -> Any:
        found = [self.plain(x)]
        for i, holder in enumerate(self.holders):
            y = self.result(i, x)
            for k, reader in enumerate(holder.readers):
                found.append(reader((y[k] if self.several[i] else y).flatten(1).to(torch.float32)))
        return found


def branches_by_name(row: str) -> list[Branch]:
    """Functions and methods with all arguments behind the first by their names, where torch takes them so."""
    example, found = EXAMPLES[row], []
    for label, function in functions(row).items():
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{label.rpartition('.')[2]}")
        for names in [[a.name for a in schema.arguments] for schema in schemas]:
            branch = Branch(label, partial(example, partial(by_name, function, names)))
            if runs(branch):
                found.append(branch)
                break
    return found


def by_name(function: Callable[..., Any], names: Sequence[str], x: Any, *args: Any, **named: Any) -> Any:
    if len(args) >= len(names):
        raise TypeError("more arguments than this overload has")
    return function(x, **dict(zip(names[1:], args, strict=False)), **named)


def runs(branch: Branch) -> bool:
    try:
        Branches([branch])(torch.zeros(SHAPE))
    except (TypeError, RuntimeError, IndexError):
        return False
    return True


def network(ways: Sequence[Branch]) -> Program:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return trace(Branches(ways).eval(), torch.zeros(SHAPE))


ROWS = sorted({*FUNCTION_RULES, *(MODULE_NAMES.get(k, k.__name__) for k in MODULE_RULES)})


def test_every_row_has_an_example() -> None:
    assert set(EXAMPLES) == set(FUNCTION_RULES)
    assert set(MODULE_NAMES) | set(LAYERS.values()) == set(MODULE_RULES)
    assert {*LIGHT_OPS, *ACTIVATIONS} <= set(ROWS)
    assert not set(ALIASES) & set(ROWS)


def test_aliases_that_torch_documents_are_one_operator() -> None:
    known = 0
    for space in (torch, torch.special, Tensor):
        for name in dir(space):
            value = getattr(space, name)
            said = re.search(r"[Aa]lias (?:of|for) :(?:func|meth):`~?([\w.]+)`", str(value.__doc__ or ""))
            target = said[1].rpartition(".")[2].rstrip("_") if said and callable(value) else ""
            if ALIASES.get(target, target) in ROWS:
                known += 1
                spelled = name if space is Tensor else value
                assert function_name(spelled) == ALIASES.get(target, target), name
    assert known > 15


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_row(row: str) -> None:
    """Every way of writing it: one name, the same channels, an exact removal, and the same cost."""
    ways = branches(row)
    assert ways
    program = network(ways)
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    rows = drop.rows
    verify_pass(ByRows(), program, rows)
    smaller = drop.apply("test")
    check(smaller)
    if row != "linear":  # along the plane, with fewer rows for every channel that goes
        assert macs(smaller) == cost_of("macs", channels)(drop)
    names = [op_name(program, node) for node in program.graph.nodes]
    assert names.count(row) >= len(ways)
    called = [n for n in program.graph.nodes if n.op in ("call_function", "call_method")]
    assert not {describe(program, node).partition(" ")[0] for node in called} & set(ALIASES)
    gone = {way.label: f"holders.{i}.a.weight" in rows for i, way in enumerate(ways)}
    assert gone == {way.label: type(way.module) not in KEPT for way in ways}
    kernels = {kernels_of(program, i) for i in range(len(ways))}
    assert len(kernels) == len({found[-1] for found in kernels})  # a plane and a volume are read by others


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(FUNCTION_RULES))
def test_arguments_by_name(row: str) -> None:
    """The channels that the call by places has, and an exact removal."""
    ways = branches_by_name(row)
    if not ways:
        pytest.skip("no native function or method takes its arguments by name")
    places = {way.label: way for way in branches(row)}
    gone = []
    for some in (ways, [places[way.label] for way in ways]):
        program = network(some)
        drop, _ = half(analyse(program)).feasible(random_scores(analyse(program)))
        verify_pass(ByRows(), program, drop.rows)
        gone.append([f"holders.{i}.a.weight" in drop.rows for i in range(len(some))])
    assert gone[0] == gone[1]


def kernels_of(program: Program, i: int) -> tuple[str, ...]:
    """What the branch's operators are predicted from; the last one is its reader."""
    mine: set[Any] = set()
    for node in program.graph.nodes:
        own = node.op == "call_module" and str(node.target).startswith(f"holders.{i}.")
        if own or mine & set(node.all_input_nodes):
            mine.add(node)
    found = (f"{c.kernel.describe()} {c.into} {c.out}" for c in calls(program) if c.node in mine)
    return tuple(dict.fromkeys(found))


@pytest.mark.slow
def test_rows_are_exported(tmp_path: Path) -> None:
    """What ONNX Runtime computes is what the smaller program computes: every row, as function and module."""
    ways = []
    for row in sorted(ROWS):
        # torch's own adaptive_max_pool yields positions, too, which no row writes, and what reads such
        found = [
            w
            for w in branches(row)
            if not re.match(r"torch\.adaptive_max_pool|.*unpool|.*with_indices", w.label, re.I)
        ]
        ways += [way for i, way in enumerate(found) if i == 0 or way.module is not None]
    program = network(ways)
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    smaller = drop.apply("test")
    exported = export_onnx(smaller, tmp_path / "x.onnx", batches=(2,), dynamic=())
    assert exported.nodes > len(ways)
