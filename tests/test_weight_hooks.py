"""Weights that hooks compute are baked in when a network is traced; other hooks are named, never dropped."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from graphcomp import compile
from graphcomp.errors import GraphcompWarning, TraceError
from graphcomp.ir import load, save
from graphcomp.ir.tracing import trace
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.passes.l1 import L1
from tests.tiny import context

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(216, 4)
    )


def pruned(model: nn.Sequential) -> None:
    """Twice, so that torch keeps a container; and a bias."""
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[0], "weight", 0.25, n=2, dim=0)
    prune.random_unstructured(model[3], "bias", 0.5)


def old_weight_norm(model: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])


def old_spectral_norm(model: nn.Sequential) -> None:
    nn.utils.spectral_norm(model[0])
    nn.utils.spectral_norm(model[5])


COMPUTED: dict[str, tuple[Callable[[nn.Sequential], object], str | None]] = {
    "pruning": (pruned, "0, 3: found masks of nn.utils.prune"),
    "old spectral norm": (old_spectral_norm, "0, 5: found spectral_norm"),
    "old weight norm": (old_weight_norm, None),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[0]), None),
    "weight norm": (lambda m: parametrizations.weight_norm(m[0]), None),
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_baked_in(name: str, share: bool, tmp_path: Path) -> None:
    model = net()
    compute, said = COMPUTED[name]
    compute(model)
    model(X)  # a power iteration, and running statistics
    expected = model.eval()(X)
    names = set(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = trace(model, X, copy_weights=not share)
    assert [str(w.message).partition(";")[0] for w in caught if w.category is GraphcompWarning] == (
        [said] if said else []
    )
    assert set(program.tensors) == set(net().state_dict())
    assert not any(m._forward_pre_hooks for m in program.module.modules())
    torch.testing.assert_close(program(X), expected)
    assert set(model.state_dict()) == names and torch.equal(model(X), expected)
    save(program, tmp_path / "saved")
    torch.testing.assert_close(load(tmp_path / "saved")(X), expected)
    result = compile(program, [FoldBN(), L1(ratio=0.5, multiple=1)]).program
    assert result.layer("0", nn.Conv2d).out_channels == 4


def test_hooks_of_a_layer_are_named() -> None:
    for at in (0, 1):
        model = net().eval()
        model[at].register_forward_hook(lambda m, x, y: 2 * y)
        program = trace(model, X)
        assert torch.equal(program(X), model(X))
        (kept,) = FoldBN().plan(program, context()).kept
        assert (kept.where, kept.reason) == ("1", "one of the two has forward hooks")
        left = {k.where: k.reason for k in L1(ratio=0.5, multiple=1).plan(program, context()).kept}
        assert "has forward hooks" in left["01"[at]]


def test_hooks_of_what_is_traced_through_are_traced() -> None:
    model = nn.Sequential(net(), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda m, x, y: 2 * y)
    model[0].register_forward_pre_hook(lambda m, x: (x[0] + 1,))
    assert torch.equal(trace(model, X)(X), model(X))


def test_hooks_of_the_network_itself_are_refused() -> None:
    model = net()
    model.register_forward_hook(lambda m, x, y: 2 * y)
    with pytest.raises(TraceError, match="Sequential: found forward hooks on the network itself"):
        trace(model, X)


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(net().eval(), (X,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: exported().module(),
        lambda: nn.Sequential(exported().module(), nn.ReLU()),
        lambda: torch.export.unflatten(exported()),
    ],
)
def test_programs_of_torch_export_are_named(make: Callable[[], nn.Module]) -> None:
    message = "found a program of torch.export, which has no layers any more, expected"
    model = make()
    for use in (trace, lambda m, x: compile(m, "fold-bn", example_inputs=x)):
        with pytest.raises(TraceError, match=message):
            use(model, X)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
def test_torchscript_gets_layers_again(make: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = make(net().eval())
        program = trace(script, X[:1])
    torch.testing.assert_close(program(X), script(X))
    assert any("TorchScript" in said for said in program.interface.remarks)
    kinds = {type(m) for m in program.called_modules().values()}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


def test_what_torchscript_does_beyond_layers_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x
            while bool(y.abs().max() > 1):
                y = y / 2
            return y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(Odd())
        with pytest.raises(TraceError, match=r"found a TorchScript module with .*give the module"):
            trace(script, X)


def test_a_wrapped_operator_of_aten_is_no_exported_program() -> None:
    class Direct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.relu.default(x)  # type: ignore[no-any-return]

    assert torch.equal(trace(Direct(), X)(X), X.relu())
