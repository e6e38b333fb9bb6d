"""What an optimiser remembers: into a training, out of it, and through a removal of channels."""

from typing import Any

import pytest
import torch

from graphcomp.channels import Removal, analyse
from graphcomp.errors import PassError
from graphcomp.ir.program import Program
from graphcomp.passes import L1
from graphcomp.pipeline.momenta import cut_momenta
from graphcomp.train.options import TrainOptions
from graphcomp.train.training import fit
from tests.learnable import make_split, normalised_net, same
from tests.tiny import context
from tests.training import options

ROWS = {"0.weight": [1, 4]}


def cut(program: Program) -> Program:
    """Two of the six channels of the first convolution go."""
    channels = analyse(program)
    return Removal.from_rows(channels, ROWS).apply("test")


def constant(epochs: int, **changes: Any) -> TrainOptions:
    return options(epochs=epochs, schedule="constant", keep="last", **changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_trainings_are_one_if_momenta_are_handed_on(optimizer: str) -> None:
    """Whole batches, so that the order of samples plays no part; without momenta it is another one."""
    how = constant(1, batch=96, max_steps=1, optimizer=optimizer, lr=0.01)
    first = fit(normalised_net(), make_split(), how)
    on = fit(first.program, make_split(), how, momenta=first.momenta)
    anew = fit(first.program, make_split(), how)
    whole = fit(normalised_net(), make_split(), constant(2, batch=96, optimizer=optimizer, lr=0.01))
    close = [torch.allclose(t, whole.program.tensors[n], atol=1e-6) for n, t in on.program.tensors.items()]
    assert all(close)
    assert not all(
        torch.allclose(t, whole.program.tensors[n], atol=1e-6) for n, t in anew.program.tensors.items()
    )


def test_momenta_of_sgd_by_hand() -> None:
    """After one step they are the gradient with the decay: (old - new) / lr."""
    program = normalised_net()
    fitted = fit(program, make_split(), constant(1, max_steps=1))
    names = [n for n, t in program.tensors.items() if t.requires_grad]
    assert sorted(fitted.momenta) == sorted(f"{n}#momentum_buffer" for n in names)
    for name in names:
        moved = (program.tensors[name] - fitted.program.tensors[name]).detach() / 0.05
        assert torch.allclose(fitted.momenta[f"{name}#momentum_buffer"], moved, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_t0_8_momenta_are_cut_with_the_weights(optimizer: str) -> None:
    """T0.8: rows of the filters, of their normalisation, and columns of what reads them; values stay."""
    fitted = fit(normalised_net(), make_split(), constant(1, optimizer=optimizer))
    after = cut(fitted.program)
    momenta = cut_momenta(fitted.momenta, fitted.program, cut)
    assert momenta.keys() == fitted.momenta.keys()
    kept = torch.tensor([0, 2, 3, 5])
    kinds = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[optimizer]
    for kind in kinds:
        old = {n: fitted.momenta[f"{n}#{kind}"] for n in ("0.weight", "1.weight", "1.bias", "4.weight")}
        for name in ("0.weight", "1.weight", "1.bias"):
            assert torch.equal(momenta[f"{name}#{kind}"], old[name][kept])
        assert torch.equal(momenta[f"4.weight#{kind}"], old["4.weight"][:, kept])
    for name, value in momenta.items():
        parameter = after.tensors[name.partition("#")[0]]
        assert value.shape == parameter.shape or (name.endswith("#step") and not value.ndim)
    fit(after, make_split(), constant(1, optimizer=optimizer), momenta=momenta)


def test_momenta_of_the_old_shapes_are_refused() -> None:
    fitted = fit(normalised_net(), make_split(), constant(1))
    with pytest.raises(
        PassError, match=r"momentum_buffer of 0.weight with shape \(6, 3, 3, 3\), expected \(4"
    ):
        fit(cut(fitted.program), make_split(), constant(1), momenta=fitted.momenta)
    with pytest.raises(
        PassError, match="found x of nothing, expected momenta of parameters that are trained"
    ):
        fit(normalised_net(), make_split(), constant(1), momenta={"nothing#x": torch.zeros(1)})


def test_frozen_parameters_have_none() -> None:
    program = normalised_net()
    program.tensors["0.weight"].requires_grad_(False)
    fitted = fit(program, make_split(), constant(1))
    assert "0.weight#momentum_buffer" not in fitted.momenta
    assert cut_momenta(fitted.momenta, fitted.program, cut).keys() == fitted.momenta.keys()


def test_they_belong_to_the_state_of_a_training(tmp_path: Any) -> None:
    """A training that went on from other momenta is another training."""
    from graphcomp.errors import LoadError

    state = tmp_path / "state"
    first = fit(normalised_net(), make_split(), constant(1))
    fit(first.program, make_split(), constant(1), momenta=first.momenta, state=state)
    again = fit(first.program, make_split(), constant(1), momenta=first.momenta, state=state)
    assert same(again.program, fit(first.program, make_split(), constant(1), momenta=first.momenta).program)
    with pytest.raises(LoadError, match="state of another training"):
        fit(first.program, make_split(), constant(1), state=state)


def test_the_plan_of_a_removal_cuts_them() -> None:
    """As a round does: by the pass's own `rewrite`."""
    fitted = fit(normalised_net(), make_split(), constant(1))
    pass_ = L1(ratio=0.5, multiple=1)
    plan = pass_.plan(fitted.program, context())
    after = pass_.rewrite(fitted.program, plan)
    momenta = cut_momenta(fitted.momenta, fitted.program, lambda held: pass_.rewrite(held, plan))
    assert all(v.shape == after.tensors[n.partition("#")[0]].shape for n, v in momenta.items())
