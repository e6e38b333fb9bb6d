"""Recipes that cannot work are refused before any pass runs, and no others are."""

from typing import Any

import numpy as np
import pytest
import torch

from graphcomp.compiler.compiler import compile_program
from graphcomp.compiler.recipe import parse_passes
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.errors import GraphcompError, PassError
from graphcomp.ir.program import Program
from graphcomp.passes import PASSES
from graphcomp.pipeline import NEED_NO_LABELS, check_order
from graphcomp.pipeline.contract import Demanding, Foreseen
from tests.tiny import SHAPE, context, random_data, tiny_program


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data | None]:
    folder = tmp_path_factory.mktemp("data")
    x = np.random.RandomState(0).standard_normal((48, *SHAPE[1:])).astype(np.float32)
    np.savez(folder / "classes.npz", x=x, y=np.arange(48) % 4)
    np.savez(folder / "values.npz", x=x, y=np.random.RandomState(1).standard_normal((48, 4)))
    opened = {
        n: load_data(f"npz:{folder}/{n}.npz", input_shape=SHAPE[1:], seed=0) for n in ("classes", "values")
    }
    return {"none": None, "unlabelled": random_data(*SHAPE[1:], samples=24), **opened}


CANNOT: list[tuple[str, str, str]] = [
    (
        "fold-bn, finetune{epochs=0, bn_reestimate=9}",
        "unlabelled",
        "no batch normalisation .*run it later",
    ),
    ("fold-bn, finetune{bn_reestimate=9}", "classes", "found no batch normalisation with running statistics"),
    (
        "l1{ratio=0.5}, fold-bn, l1{ratio=0.1}, finetune{epochs=0, bn_reestimate=9}",
        "classes",
        "no batch norm",
    ),
    ("low-rank{ratio=0.5}, fold-bn, finetune{epochs=0, bn_reestimate=9}", "unlabelled", "no batch normalis"),
    ("fold-bn, finetune{sparsity=1e-4, keep=last}", "classes", "sparsity: found no batch normalisation"),
    ("fold-bn, slimming{ratio=0.5}", "unlabelled", "scales: found no batch normalisation behind a layer"),
    ("fold-bn, pfa{energy=0.9, response=bn}", "unlabelled", "response=bn: found no batch normalisation"),
    ("fold-bn, finetune", "unlabelled", "found data without labels.*need none"),
    ("fold-bn, finetune{loss=cross-entropy}", "values", "found values as labels, expected classes"),
    ("fold-bn, finetune{loss=l1}", "classes", "found classes as labels, expected values"),
    ("finetune{held_out=0.001}", "classes", "expected enough to hold out"),
    ("fold-bn, finetune{batch=4, accumulate=8}", "classes", "expected at least 8"),
    ("fold-bn, distil", "unlabelled", "did not find a step 'student'"),
    ("distil{teacher=student}, student", "unlabelled", "did not find 'student'"),
    ("student, distil{teacher=5}", "unlabelled", "did not find 5"),
    ("fold-bn, distil{teacher=/nowhere}", "unlabelled", "did not find '/nowhere'"),
    (
        "fold-bn, distil{teacher=input, loss=kl, alpha=0.5}",
        "unlabelled",
        "found data without labels.*need none",
    ),
    (
        "fold-bn, cc{rate=0.3}",
        "unlabelled",
        "gradients: found data without labels, expected a class.*need none",
    ),
    ("fold-bn, cc{rate=0.3}", "values", "gradients: found values as labels"),
    ("fold-bn, play-and-prune", "unlabelled", "found data without labels.*need none"),
    ("fold-bn, apoz{steps=2}", "unlabelled", "found data without labels.*need none"),
    *(
        (f"fold-bn, {p}", "none", "found no data")
        for p in ("pfa{energy=0.9}", "apoz", "cc{rate=0.3}", "finetune")
    ),
    *((f"fold-bn, {p}", "none", "found no data") for p in ("play-and-prune", "distil{teacher=input}")),
    *(
        (f"finetune, {p}, include=absent*}}", "classes", "found no layer that 'absent\\*' matches")
        for p in ("l1{ratio=0.5", "random{ratio=0.5", "low-rank{energy=0.9", "dct{rate=2", "cc{rate=0.3")
    ),
    ("finetune, student{also=absent}", "classes", "also: found no layer that 'absent' matches"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "kind", "message"), CANNOT)
def test_what_cannot_work_is_refused_before_any_work(
    passes: str, kind: str, message: str, program: Program, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parse_passes(passes, PASSES)
    for pass_ in made[:-1]:
        monkeypatch.setattr(type(pass_), "simulate", None)  # would fail another way
    with pytest.raises(PassError, match=f"cannot work after trace.*{message}"):
        compile_program(program, made, data=data[kind], target="cpu-avx2")


WITHOUT_LABELS = {
    "l1": "l1{ratio=0.3}",
    "pfa": "pfa{energy=0.9}",
    "apoz": "apoz",
    "obs": "obs{ratio=0.3}",
    "low-rank": "low-rank{ratio=0.3}",
    "dct": "dct{rate=1.2, min_weights=9}",
    "refit": "l1{ratio=0.3}, refit",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_what_is_advised_without_labels_works_without(name: str, program: Program, data: Any) -> None:
    """And without normalisations, which files have folded."""
    assert f"{', '.join([*WITHOUT_LABELS][:-1])} and {[*WITHOUT_LABELS][-1]} need none" == NEED_NO_LABELS
    passes = parse_passes(f"fold-bn, {WITHOUT_LABELS[name]}", PASSES)
    assert compile_program(program, passes, data=data["unlabelled"], target="cpu-avx2", allow_nothing=True)


FIRST = (
    "fold-bn",
    "dct{rate=2, min_weights=9, stem=true}",
    "low-rank{ratio=0.5, multiple=1}",
    "fold-bn{exclude=bn2}",
)
THEN = (
    "finetune{epochs=0, bn_reestimate=9}",
    "finetune{max_steps=1, sparsity=1e-4, keep=last}",
    "slimming{ratio=0.5}",
    "pfa{energy=0.9, response=bn}",
    "distil{max_steps=1}",
    "fold-bn, finetune{epochs=0, bn_reestimate=9}",
)


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_what_runs_is_not_refused_and_what_is_refused_does_not_run(
    first: str, program: Program, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the run itself."""
    for then in THEN:
        passes = parse_passes(f"{first}, {then}", PASSES)
        try:
            check_order(passes, program, context(data["classes"]))
            refused = None
        except PassError as error:
            refused = str(error)
        with monkeypatch.context() as patch:
            patch.setattr("graphcomp.compiler.compiler.check_order", lambda *_: None)
            try:
                steps = compile_program(program, passes, data=data["classes"], target="cpu-avx2").steps
                failed = None if steps[-1].changed else "found nothing to change"
            except GraphcompError as error:
                failed = str(error)
        if refused is None:  # how much is worth removing is no matter of order
            assert failed is None or "found nothing to change" in failed, (then, failed)
        else:
            assert failed is not None, (then, refused)


@pytest.mark.parametrize(
    ("passes", "works"),
    [
        ("apoz{steps=2}", False),
        ("play-and-prune", False),
        ("l1{ratio=0.5}, apoz{steps=2}", False),
        ("finetune, apoz{steps=2}", True),
        ("finetune, student, play-and-prune", False),
        ("finetune, student{init=slice}, play-and-prune", True),
        ("student, distil", False),
        ("finetune, student, distil", True),
        ("finetune, distil{teacher=input}", False),
        ("l1{ratio=0.5}, fold-bn, pfa{energy=0.9}, apoz", True),
    ],
)
def test_the_accuracy_of_random_weights_decides_nothing(
    passes: str, works: bool, program: Program, data: Any
) -> None:
    made = parse_passes(passes, PASSES)
    if works:
        check_order(made, program, context(data["classes"]), trained=False)
        return
    if "student," not in passes:
        check_order(made, program, context(data["classes"]))
    with pytest.raises(PassError, match=r"random weights, expected .*give --weights, or train"):
        check_order(made, program, context(data["classes"]), trained=False)


def test_every_pass_says_what_it_leaves() -> None:
    """And asks for what it needs, but for the one that needs nothing."""
    assert all(issubclass(kind, Foreseen) for kind in PASSES.values())
    assert [name for name, kind in PASSES.items() if not issubclass(kind, Demanding)] == ["fold-bn"]


def test_a_pass_that_says_nothing_is_not_refused(program: Program, data: Any) -> None:
    class Silent:
        name = "silent"

    bn = parse_passes("fold-bn, finetune{epochs=0, bn_reestimate=9}, l1{ratio=0.5, include=absent}", PASSES)
    check_order([Silent(), *bn], program, context(data["classes"]))  # type: ignore[list-item]
    assert torch.is_grad_enabled()
