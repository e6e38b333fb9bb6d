"""What a program computes is what it computes in eval mode, whatever mode it was saved or left in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from graphcomp.compiler.compiler import compile_program, evaluate_source
from graphcomp.compiler.source import Source
from graphcomp.data.split import Split
from graphcomp.ir import load, save
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import Program, output_tensors
from graphcomp.measure.calibrate import collect
from graphcomp.measure.damage import Corruption, robustness
from graphcomp.measure.evaluate import accuracy, confusion, drift, first_inputs, mean_error, score
from graphcomp.measure.gradients import mean_gradients
from graphcomp.measure.statistics import Covariance, Request
from graphcomp.onnx.export import export_onnx
from graphcomp.passes.finetune import Finetune
from graphcomp.passes.fold_bn import FoldBN
from graphcomp.passes.l1 import L1
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.verify import check, difference, scrambled, verify_pass
from graphcomp.train.network import Mode, Network
from graphcomp.train.normalisation import reestimate
from tests.learnable import make_data, make_split, normalised_net, weights
from tests.tiny import context

SPLIT = make_split(60)
DATA = make_data(60)


def values() -> Split:
    """The same images with values as labels."""
    labels = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    return Split(labels, np.arange(60), SPLIT.fetch)


def everything(program: Program) -> dict[str, Any]:
    """Weights that a pass yields, and their modes."""
    assert not any(m.training for m in program.module.modules())
    return weights(program)


def exported(program: Program, folder: Path) -> Any:
    record = export_onnx(program, folder / "model.onnx", batches=(1,))
    return record.nodes, (folder / "model.onnx").read_bytes()


def collected(program: Program, _: Path) -> Tensor:
    request = Request("_0", "covariance")
    return cast(Covariance, collect(program, SPLIT, [request], cache=False)[request]).mean


EVALUATES: dict[str, Callable[[Program, Path], Any]] = {
    "call": lambda p, _: p(torch.ones(2, 3, 8, 8)).detach(),
    "accuracy": lambda p, _: accuracy(p, SPLIT),
    "mean error": lambda p, _: mean_error(p, values()),
    "score": lambda p, _: score(p, SPLIT),
    "confusion": lambda p, _: confusion(p, SPLIT),
    "drift": lambda p, _: drift(normalised_net(), p, first_inputs(SPLIT, 60)),
    "snapshot": lambda p, _: context(DATA).snapshot(p),
    "evaluate": lambda p, _: evaluate_source(Source(p, None, None), DATA, model="m").snapshot,
    "robustness": lambda p, _: robustness(p, SPLIT, [Corruption("brightness", 0.5)]),
    "collect": collected,
    "gradients": lambda p, _: mean_gradients(p, SPLIT, ["0.weight"], cache=False)["0.weight"],
    "statistics": lambda p, _: weights(reestimate(p, first_inputs(SPLIT, 60))),
    "teacher": lambda p, _: Network(p, [], Mode(), training=False)((torch.ones(2, 3, 8, 8),))[0],
    "check": lambda p, _: check(p),
    "difference": lambda p, _: difference(normalised_net(), p),
    "scrambled": lambda p, _: weights(scrambled(p)),
    "verify": lambda p, _: verify_pass(FoldBN(), p, FoldBN().plan(p, context())),
    "export": exported,
    "compile": lambda p, _: everything(compile_program(p, [FoldBN()]).program),
    "criterion": lambda p, _: everything(compile_program(p, [L1(ratio=0.5, multiple=1)], data=DATA).program),
    "training": lambda p, _: everything(
        Pipeline([Finetune(epochs=1, batch=20)]).run(p, context(DATA))[0]
    ),
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return bool(a == b)


SLOW = ("training", "export", "compile")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "partly"), [*((n, False) for n in EVALUATES), *((n, True) for n in EVALUATES if n not in SLOW)]
)
def test_the_mode_of_a_program_changes_nothing_and_stays(name: str, partly: bool, tmp_path: Path) -> None:
    evaluate = EVALUATES[name]
    program = normalised_net(dropout=0.5)
    (tmp_path / "eval").mkdir()
    (tmp_path / "train").mkdir()
    expected = evaluate(normalised_net(dropout=0.5), tmp_path / "eval")
    program.module.train()
    if partly:
        program.module.eval()
        program.layer("1").train()
    save(program, tmp_path / "saved")
    program = load(tmp_path / "saved")
    modes, before = {n: m.training for n, m in program.module.named_modules()}, weights(program)
    assert any(modes.values())
    assert same(evaluate(program, tmp_path / "train"), expected)
    assert {n: m.training for n, m in program.module.named_modules()} == modes
    assert same(weights(program), before)


def test_the_module_itself_trains() -> None:
    program = normalised_net()
    program.module.train()
    before = weights(program)
    program.module(*fresh_inputs(program, 4, 0))
    assert not same(weights(program), before)


def test_in_eval_mode_shares_tensors_and_leaves_the_program_alone() -> None:
    program = normalised_net()
    assert program.in_eval_mode() is program
    program.module.train()
    found = program.in_eval_mode()
    assert not any(m.training for m in found.module.modules())
    assert all(m.training for m in program.module.modules())
    assert all(t is found.tensors[n] for n, t in program.tensors.items())
    assert str(found) == str(program) and found.history == program.history
    (x,) = fresh_inputs(program, 2, 0)
    for a, b in zip(output_tensors(found(x)), output_tensors(program(x)), strict=True):
        assert torch.equal(a, b)
