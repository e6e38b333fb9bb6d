"""What a file says of itself stays with a program through every pass."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from graphcomp.ir import Interface, Port
from graphcomp.passes import PASSES
from graphcomp.pipeline import Pipeline
from tests.learnable import make_data
from tests.tiny import context, tiny_program

SPOKEN = Interface(inputs=(Port(name="images:0", axes={0: "N"}),), metadata={"stride": "32"}, opset=11)

OPTIONS: dict[str, dict[str, Any]] = {
    "l1": {"ratio": 0.5},
    "random": {"ratio": 0.5},
    "slimming": {"ratio": 0.5},
    "obs": {"ratio": 0.5},
    "pfa": {"energy": 0.9},
    "cc": {"rate": 0.3},
    "low-rank": {"energy": 0.9},
    "dct": {"rate": 4},
    "student": {"fraction": 0.5},
    "distil": {"epochs": 1, "teacher": "input"},
    "finetune": {"epochs": 1},
}
"""Of passes that have to be told something."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_keeps_it(name: str) -> None:
    program = replace(tiny_program(), interface=SPOKEN)
    made = TypeAdapter(PASSES[name]).validate_python(OPTIONS.get(name, {}))
    result, steps = Pipeline([made], allow_nothing=True).run(program, context(make_data()))
    assert len(result.history) >= 1 and steps
    assert result.interface == SPOKEN
