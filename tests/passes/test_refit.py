"""refit: every layer against a dense solver, rows against what passes removed, and what it may look at."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from graphcomp.compiler.recipe import parse_passes
from graphcomp.ir.program import Program
from graphcomp.passes import PASSES, Refit
from tests.fitting import ALL, check_fit, normal_data, run
from tests.nets import TRAPS
from tests.removing import exact_program
from tests.tiny import context

RIDGE = 1e-3
FIT = Refit(positions=ALL, ridge=RIDGE)


def passes(text: str) -> list[Any]:
    return parse_passes(text, PASSES)


def outputs(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = program.module(x.clone())
    return cast(Tensor, found)


# ---- Every kind of layer


SAMPLES_SEE_EACH_OTHER = {"batchnorm-of-batch"}


@pytest.mark.parametrize("name", [name for name in TRAPS if name not in SAMPLES_SEE_EACH_OTHER])
def test_every_layer_is_what_a_dense_solver_says(name: str) -> None:
    program = exact_program(TRAPS[name]())
    shape = program.example_inputs[0].shape[1:]
    data = normal_data(shape, count=96)
    ran = run([*passes("l1{ratio=0.5, multiple=1}"), FIT], program, context(data))
    assert check_fit(ran, program, data, RIDGE) or not ran.plans[0].decisions["rows"]
