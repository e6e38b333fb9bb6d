"""Arguments of forward that are no tensors: what they are when a network is traced, and later."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.errors import GraphcompError, TraceError
from graphcomp.ir import load, save

X, Y = torch.randn(2, 4), torch.randn(2, 4)


class Choosy(nn.Module):
    """Every argument decides something."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(
        self, x: Tensor, scale: float = 1.0, y: Tensor | None = None, *, way: str = "add", sizes: Any = ()
    ) -> Tensor:
        z = self.outer(self.inner(x).relu()) * scale
        if y is not None:
            z = z + y if way == "add" else z * y
        if way not in ("add", "multiply"):
            raise ValueError(f"no {way}")
        assert isinstance(sizes, tuple)
        return z.reshape(-1, *sizes) if sizes else z


class Exported(Choosy):
    """torch.fx cannot follow it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        torch._check(x.shape[1] == 4)
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ((X,), {}),
        ((X,), {"scale": 3}),
        ((X,), {"scale": 0.5, "y": None, "way": "multiply"}),
        ((X, Y), {"scale": 2, "way": "multiply"}),  # the second input is y: scale is taken
        ((X,), {"sizes": [2, 2]}),
    ],
)
@pytest.mark.parametrize("kind", [Choosy, Exported])
def test_arguments_are_what_they_are_told_to_be(
    kind: type[nn.Module], inputs: tuple[Tensor, ...], arguments: dict[str, Any], tmp_path: Path
) -> None:
    if kind is Exported and len(inputs) > 1:
        pytest.skip("its second argument has no name")
    model = kind().eval()
    named = dict(zip(("x", "y"), inputs, strict=False))
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    program = graphcomp.trace(model, inputs, arguments=arguments)
    assert program.interface.arguments == told
    assert any("which it is for" in remark for remark in program.interface.remarks) == bool(told)
    torch.testing.assert_close(program(*inputs), model(**named, **told))
    save(program, tmp_path / "p")
    assert load(tmp_path / "p").interface == program.interface


def test_apply_calls_the_network_as_it_was_traced() -> None:
    model = Choosy().eval()
    program = graphcomp.trace(model, (X, Y), arguments={"scale": 3.0, "way": "multiply"})
    small = graphcomp.compile(program, "l1{ratio=0.5, multiple=1}").program
    result = graphcomp.apply(small, model)
    assert isinstance(result, Choosy) and result.inner.out_features == 4
    torch.testing.assert_close(result(X, 3.0, Y, way="multiply"), small(X, Y))


def test_parts_are_reached_with_the_arguments() -> None:
    model = Choosy().eval()
    for start in ("", "inner"):
        program = graphcomp.trace(model, (X,), start=start, until="outer", arguments={"way": "multiply"})
        torch.testing.assert_close(program(X), model.outer(model.inner(X).relu()))
        graphcomp.apply(program, model, (X,))
    for until in ("", "outer"):
        with pytest.raises(GraphcompError, match="no way"):
            graphcomp.apply(
                graphcomp.trace(model, (X,), start="inner", until=until, arguments={"way": "way"}),
                model,
                (X,),
            )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scales": 2}, "arguments: found 'scales', expected .* which are x, scale, y, way, sizes"),
        ({"y": Y}, "arguments.y: found a tensor"),
        ({"scale": float("nan")}, "arguments.scale: found nan, expected None"),
        ({"scale": b"1"}, "arguments.scale: found b'1', expected"),
        ({"sizes": [[1]]}, r"arguments.sizes: found \[\[1\]\]"),
        ({"x": 1, "scale": 1, "y": None, "way": "add", "sizes": ()}, "leave none to 1 of 1 example inputs"),
        ({"way": "divide"}, "ValueError: no divide"),
    ],
)
def test_what_no_argument_is(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        graphcomp.trace(Choosy(), X, arguments=arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_captured_programs_have_no_arguments() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 4), X)
    exported = torch.export.export(nn.Linear(4, 4), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for model in (scripted, exported):
        with pytest.raises(TraceError, match=r"arguments: found flag for .* expected a torch.nn.Module"):
            graphcomp.trace(model, X, arguments={"flag": True})


def test_a_decorated_forward_is_followed_by_torch_fx() -> None:
    """Whatever names the decorator's own code has, and how many."""
    from tests.strangers.attention import Options

    torch.manual_seed(0)
    model, x = Options().eval(), torch.randn(2, 3, 32, 32)
    program = graphcomp.trace(model, x)
    assert program.interface.remarks == ()
    torch.testing.assert_close(program(x), model(x))
