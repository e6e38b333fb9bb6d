"""slimming: one threshold for all layers, targets by the same threshold, and the training before it."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.compiler.recipe import parse_passes
from graphcomp.errors import PassError
from graphcomp.ir.program import Program
from graphcomp.passes import PASSES, Finetune, Slimming
from graphcomp.passes.finetune import with_sparsity
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.verify import TOLERANCE
from graphcomp.train.options import Seen
from tests.learnable import SHAPE, make_data, normalised_net, plain_net
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced


def chain(*scales: list[float]) -> Program:
    """Convolutions behind one another, each with a normalisation of these scales."""
    layers: list[nn.Module] = []
    channels = 3
    for row in scales:
        norm = nn.BatchNorm2d(len(row))
        norm.weight.data.copy_(torch.tensor(row))
        norm.bias.data.uniform_()
        layers += [nn.Conv2d(channels, len(row), 1), norm, nn.ReLU()]
        channels = len(row)
    return traced(nn.Sequential(*layers, nn.Conv2d(channels, 2, 1)), 1, 3, 4, 4)


def slimmed(program: Program, **options: Any) -> dict[str, list[int]]:
    step, plan, _ = run_pass(Slimming(multiple=1, **options), program, context())
    assert step.verify_error <= TOLERANCE
    return cast(dict[str, list[int]], plan.decisions["rows"])


def test_one_threshold_for_all_layers() -> None:
    """A layer of small scales loses nearly all, one of large scales nothing; signs do not matter."""
    program = chain([0.9, -0.8, 0.7, 0.6], [0.1, 0.5, -0.2, 0.3], [0.4, 1.0, 2.0, -3.0])
    assert slimmed(program, ratio=0.25) == {"3.weight": [0, 2, 3]}
    assert slimmed(program, ratio=5 / 12) == {"3.weight": [0, 2, 3], "6.weight": [0]}
    assert slimmed(program, ratio=6 / 12) == {"0.weight": [3], "3.weight": [0, 2, 3], "6.weight": [0]}


def test_a_layer_is_never_emptied() -> None:
    program = chain([0.01, 0.02, 0.03], [1.0, 2.0, 3.0])
    plan = Slimming(ratio=0.5, multiple=1).plan(program, context())
    assert plan.decisions["rows"] == {"0.weight": [0, 1]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_against_the_quantile(seed: int) -> None:
    rng = np.random.RandomState(seed)
    scales = [rng.random_sample(n).tolist() for n in (5, 9, 7)]
    every = np.sort(np.concatenate(scales))
    for gone in (3, 8, 12):
        expected = {
            f"{3 * i}.weight": np.flatnonzero(row <= every[gone - 1]).tolist() for i, row in enumerate(scales)
        }
        if any(len(rows) == len(scales[i]) for i, rows in enumerate(expected.values())):
            continue
        assert slimmed(chain(*scales), ratio=gone / 21) == {k: v for k, v in expected.items() if v}


def test_a_target_is_met_by_one_threshold() -> None:
    """What stays has larger scales than what goes, over all layers."""
    rng = np.random.RandomState(0)
    scales = [rng.random_sample(n) for n in (12, 16, 12)]
    program = chain(*(row.tolist() for row in scales))
    step, plan, _ = run_pass(Slimming(multiple=1, target={"macs": 0.5}), program, context())
    gone = {int(name.partition(".")[0]) // 3: rows for name, rows in plan.decisions["rows"].items()}
    lost = np.concatenate([scales[i][rows] for i, rows in gone.items()])
    left = np.concatenate([np.delete(row, gone.get(i, [])) for i, row in enumerate(scales)])
    assert lost.max() < left.min()
    assert len({len(rows) for rows in gone.values()}) > 1
    macs = sum(r.macs for r in step.after.layers)
    assert (
        0.4
        < macs / sum(r.macs for r in run_pass(Slimming(ratio=0), program, context())[0].after.layers)
        <= 0.5
    )


def test_shared_channels_count_with_the_mean() -> None:
    program = tiny_program()
    channels = analyse(program)
    scores, unjudged = Slimming(ratio=0.5).score(channels, context())
    stem = next(g for g in channels.removable if g.name == "stem")
    expected = (program.tensors["bn0.weight"].abs() + program.tensors["bn2.weight"].abs()).detach() / 2
    assert np.allclose(scores[stem.channels], expected.numpy()) and not unjudged


def test_without_normalisation_is_kept_with_the_reason() -> None:
    program = plain_net()
    plan = Slimming(ratio=0.5).plan(program, context())
    reasons = {(k.where, k.reason) for k in plan.kept}
    assert {("0", "no batch normalisation of its own behind it")} <= reasons
    with pytest.raises(PassError, match="no batch normalisation of its own"):
        Pipeline([Slimming(ratio=0.5)]).run(program, context())


# ---------------------------------------------------------------------- the training before it


def test_the_penalty() -> None:
    """strength * sum |gamma| over every normalisation, and its gradient is strength * sign(gamma)."""
    program = normalised_net()
    scales = {n: program.tensors[n] for n in ("1.weight", "5.weight")}
    scales["1.weight"].data[0] = -2.0
    tensors: dict[str, Tensor] = program.tensors
    nothing = torch.zeros(())
    seen = Seen(nothing, nothing, nothing, {}, tensors=tensors)
    loss = with_sparsity(lambda seen: torch.tensor(3.0), program, 0.01)(seen)
    assert float(loss.detach()) == pytest.approx(3 + 0.01 * (2 + 5 + 8))
    loss.backward()  # type: ignore[no-untyped-call]
    for scale in scales.values():
        assert scale.grad is not None and torch.allclose(scale.grad, 0.01 * scale.detach().sign())
    assert all(t.grad is None for n, t in tensors.items() if n not in scales and t.requires_grad)


def test_sparsity_makes_scales_small() -> None:
    options = {
        "epochs": 3,
        "batch": 24,
        "lr": 0.05,
        "precision": "float32",
        "keep": "last",
        "weight_decay": 0,
    }
    sums = []
    for sparsity in (0.0, 0.2):
        _, _, result = run_pass(
            Finetune(**options, sparsity=sparsity), normalised_net(), context(make_data())
        )
        sums.append(float(result.tensors["1.weight"].detach().abs().sum()))
    assert sums[1] < 0.8 * sums[0]


def test_the_best_epoch_may_be_one_before_scales_shrank() -> None:
    with pytest.raises(ValidationError, match="found sparsity with keep=best"):
        Finetune(sparsity=1e-4)


def test_sparsity_without_normalisations() -> None:
    with pytest.raises(PassError, match="sparsity: found no batch normalisation with scales"):
        run_pass(Finetune(sparsity=1e-4, keep="last"), plain_net(), context(make_data()))


def test_the_whole_method() -> None:
    made = parse_passes(
        "finetune{sparsity=0.01, keep=last, epochs=6, batch=24, lr=0.05}, slimming{ratio=0.5, multiple=1}, "
        "finetune{epochs=3, batch=24, lr=0.05}",
        PASSES,
    )
    result, steps = Pipeline(made).run(normalised_net(), context(make_data()))
    assert steps[-1].after.score is not None and steps[-1].after.score.value > 0.8
    assert steps[-1].after.macs < 0.7 * steps[0].after.macs
    assert result(torch.zeros(2, *SHAPE)).shape == (2, 4)
