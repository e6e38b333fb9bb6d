"""Every pass on networks of two inputs, by data of every kind; held against networks of one input."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.data.sources import load_data
from graphcomp.errors import DataError, PassError
from graphcomp.ir import trace
from graphcomp.ir.program import Program
from tests.fitting import dense
from tests.learnable import CLASSES, SHAPE, gap, same
from tests.several import NUMBERS, Tokens, alone, fused, listed, samples, tokens, two_input_data

STEPS = "epochs=1, batch=32, lr=0.01, precision=float32, layout=contiguous"
HALF = "l1{ratio=0.5, multiple=1}"
WITHOUT_LABELS = {
    "fold-bn": "fold-bn",
    "l1": HALF,
    "random": "random{ratio=0.5, multiple=1}",
    "calibrated": "l1{target=macs:0.6, allocation=calibrated, multiple=1}",
    "greedy": "l1{target=macs:0.6, allocation=greedy, multiple=1}",
    "obs": "obs{target=macs:0.6, multiple=1}",
    "apoz": "apoz{ratio=0.5, multiple=1}",
    "slimming": "slimming{ratio=0.5, multiple=1}",
    "low-rank": "low-rank{ratio=0.4, fit=responses, multiple=1}",
    "cc": "cc{rate=0.3, multiple=1, fit=responses}",
    "pfa": "pfa{energy=0.9, multiple=1}",
    "kl": "pfa{mode=kl, multiple=1}",
    "dct": "dct{rate=2, min_weights=1}",
    "refit": f"{HALF}, refit",
    "bias": f"{HALF}, refit{{only=bias}}",
    "statistics": f"{HALF}, finetune{{epochs=0, bn_reestimate=50}}",
    "distil": f"{HALF}, distil{{teacher=input, prediction=1, {STEPS}}}",
    "reinit": "reinit",
    "student": "student{fraction=0.5}",
}
BY_LABELS = {
    "gradients": "cc{rate=0.3, multiple=1, samples=48}",
    "finetune": f"finetune{{{STEPS}, keep=last}}",
    "steps": f"apoz{{steps=2, multiple=1, finetune={{{STEPS}}}}}",
    "play-and-prune": f"play-and-prune{{eps=100, alpha=0.5, max_epochs=1, training={{{STEPS}}}}}",
}
KINDS = ["file", "file without labels", "order", "name", "unlabelled", "random"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)


def inputs(count: int, seed: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), torch.randn(count, NUMBERS, generator=generator)


def differs(a: Program, b: Program) -> bool:
    return a.tensors.keys() != b.tensors.keys() or not same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*WITHOUT_LABELS, *BY_LABELS])
def test_every_pass(tmp_path: Path, name: str, kind: str) -> None:
    """It runs, is verified, changes something, and its result takes both inputs."""
    program = fused()
    data = two_input_data(tmp_path, kind, program)
    recipe = (WITHOUT_LABELS | BY_LABELS)[name]
    if name in BY_LABELS and not data.labelled:
        with pytest.raises((DataError, PassError), match="label"):
            graphcomp.compile(program, recipe, data=data)
        return
    done = graphcomp.compile(program, recipe, data=data)
    assert differs(done.program, program)
    found = done.program(*inputs(3))
    assert found.shape == (3, CLASSES) and bool(torch.isfinite(found).all())
    assert name == "fold-bn" or any(step.drift is not None for step in done.steps)


# ---------------------------------------------------------------------- held against one input


OWN = "include=[first.0, head.0], multiple=1"
LIKE_ONE = {
    "pfa": f"pfa{{energy=0.9, {OWN}}}",
    "apoz": f"apoz{{ratio=0.5, {OWN}}}",
    "obs": f"obs{{ratio=0.5, {OWN}}}",
    "low-rank": f"low-rank{{ratio=0.4, fit=responses, {OWN}}}",
    "refit": f"l1{{ratio=0.5, {OWN}}}, refit{{include=[first.*, second.*, head.*], together=false}}",
    "finetune": f"finetune{{{STEPS}, keep=last}}",
    "statistics": f"l1{{ratio=0.5, {OWN}}}, finetune{{epochs=0, bn_reestimate=96}}",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "pfa" else pytest.mark.slow) for n in LIKE_ONE]
)
def test_an_input_that_does_not_count_changes_nothing(name: str) -> None:
    """Times zero: what is left of the rest is what is left of the network without it."""
    one, two = alone(), fused(share=0.0)
    rows = listed("order")
    both = load_data(rows, program=two, seed=0)
    images = {part: [(image, y) for (image, _), y in given] for part, given in rows.items()}
    single = load_data(images, program=one, seed=0)
    expected = graphcomp.compile(one, LIKE_ONE[name], data=single).program
    found = graphcomp.compile(two, LIKE_ONE[name], data=both).program
    shared = {n: t for n, t in found.tensors.items() if not n.startswith("numbers")}
    assert shared.keys() == {n for n in expected.tensors if not n.startswith("numbers")}
    for n, t in shared.items():
        assert t.shape == expected.tensors[n].shape, n
        assert torch.allclose(t, expected.tensors[n], rtol=1e-4, atol=1e-5), n
    image, numbers = inputs(5)
    assert torch.allclose(found(image, numbers), expected(image), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- refit


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 5)
        self.head = nn.Linear(13, 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).relu(), self.b(y).relu()], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_refit_is_dense_least_squares(ridge: float) -> None:
    """Of a layer that reads what both inputs become."""
    program = trace(Beside(), (torch.ones(1, 6), torch.ones(1, 4))).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    data = load_data(
        {part: list(zip(x, y, strict=True)) for part in ("train", "eval")}, program=program, seed=0
    )
    smaller = "l1{ratio=0.5, multiple=1, include=[a]}"
    cut = graphcomp.compile(program, smaller, data=data).program
    fit = f"{smaller}, refit{{ridge={ridge}, include=[head], samples=1000}}"
    found = graphcomp.compile(program, fit, data=data).program
    with torch.no_grad():
        a, b = (cut.layer(n)(value).relu() for n, value in (("a", x), ("b", y)))
        w, bias = dense(
            torch.cat([a, b], 1), program(x, y), cut.tensors["head.weight"], ridge, intercept=True
        )
    assert torch.allclose(found.tensors["head.weight"], w, rtol=1e-7, atol=1e-9)
    assert torch.allclose(found.tensors["head.bias"], bias, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(found.tensors["head.bias"], cut.tensors["head.bias"])


def test_nothing_removed_nothing_changed() -> None:
    program = fused()
    data = load_data(listed("unlabelled"), program=program, seed=0)
    done = graphcomp.compile(program, "refit", data=data, allow_nothing=True)
    assert same(done.program, program)


# ---------------------------------------------------------------------- words, and the order of inputs


class Swapped(Tokens):
    def forward(self, mask: Tensor, tokens: Tensor) -> Tensor:
        return super().forward(tokens, mask)


def words(count: int = 96) -> list[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 20, (count, 6), generator=generator)
    kept = (torch.rand(count, 6, generator=generator) < 0.7).float()
    return [(t, m, int(t.sum()) % CLASSES) for t, m in zip(drawn, kept, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "obs{ratio=0.5, multiple=1}, refit", "pfa{energy=0.9, multiple=1}", "apoz{ratio=0.5, multiple=1}",
        f"finetune{{{STEPS}, keep=last}}", "low-rank{ratio=0.4, fit=responses, multiple=1}",
        f"l1{{ratio=0.5, multiple=1}}, distil{{teacher=input, prediction=1, {STEPS}}}",
    ],
)  # fmt: skip
def test_whole_numbers_stay_whole_and_the_order_does_not_matter(recipe: str) -> None:
    rows = words()
    program = tokens()
    swapped = trace(Swapped(), tuple(reversed(program.example_inputs)))
    data = load_data(rows, program=program, seed=0)
    other = load_data([(m, t, y) for t, m, y in rows], program=swapped, seed=0)
    found = graphcomp.compile(program, recipe, data=data).program
    again = graphcomp.compile(swapped, recipe, data=other).program
    assert found.tensors.keys() == again.tensors.keys() and gap(found, again) < 1e-4
    assert differs(found, program)


# ---------------------------------------------------------------------- files


@pytest.mark.slow
def test_a_file_of_the_result_takes_both_inputs_by_name(tmp_path: Path) -> None:
    program = fused()
    data = load_data(listed("order"), program=program, seed=0)
    small = graphcomp.compile(program, "fold-bn, obs{ratio=0.5, multiple=1}, refit", data=data).program
    graphcomp.export_onnx(small, tmp_path / "small.onnx")
    session = ort.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        image, numbers = inputs(count)
        (found,) = session.run(None, {"numbers": numbers.numpy(), "image": image.numpy()})
        np.testing.assert_allclose(found, small(image, numbers).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["fused", "tokens"])
def test_files_of_two_inputs_are_quantised(tmp_path: Path, net: str) -> None:
    """Ranges are of all samples' inputs; whole numbers are looked at by nobody."""
    program, rows = (tokens(), words(64)) if net == "tokens" else (fused(), listed("order")["train"])
    program = graphcomp.compile(program, "fold-bn", allow_nothing=True).program
    graphcomp.export_onnx(program, tmp_path / "float.onnx")
    data = load_data(rows, program=program, seed=0)
    whole = load_data({"train": rows, "eval": rows}, program=program, seed=0).train
    record = graphcomp.quantize_onnx(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        whole,
        count=64,
        evaluate=data.eval,
        faster_only=False,
    )
    assert record.snr_db > 15 and record.accuracy is not None and len(record.layers) >= 3
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    batch = whole.fetch(whole.indices[:5])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), batch, strict=True)}
    (found,) = session.run(None, feeds)
    expected = program(*batch).detach().numpy()
    assert np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    one = load_data(list(samples()["train"]["image"]), input_shape=SHAPE, seed=0).train
    with pytest.raises(DataError, match=r"found 1 tensor\(s\) a sample, expected one for each of"):
        graphcomp.quantize_onnx(tmp_path / "float.onnx", tmp_path / "x.onnx", one, count=40)
