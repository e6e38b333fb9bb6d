"""head: logits of some classes are exactly those of the whole network."""

import pytest
import torch
from torch import Tensor, nn

from graphcomp.compiler.classes import restrict_head
from graphcomp.errors import AnalysisError, RecipeError
from graphcomp.ir.program import Program
from graphcomp.models import MODELS
from tests.tiny import tiny, tiny_program, traced


def same_logits(whole: Program, some: Program, classes: list[int]) -> bool:
    x = torch.randn(3, *whole.example_inputs[0].shape[1:])
    with torch.no_grad():
        return torch.allclose(some(x), whole(x)[:, classes], atol=1e-6)


def test_slice_yields_the_same_logits_in_order_of_the_class() -> None:
    program = tiny_program()
    some = restrict_head(program, [3, 1])
    assert same_logits(program, some, [1, 3])
    assert some.shape(next(n for n in some.graph.nodes if n.op == "output").all_input_nodes[0]) == (1, 2)
    assert some.layer("fc", nn.Linear).out_features == 2


def test_the_whole_network_is_left_as_it_is() -> None:
    program = tiny_program()
    before = {k: t.clone() for k, t in program.tensors.items()}
    restrict_head(program, [0, 1], "random")
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())


def test_all_classes_change_nothing() -> None:
    program = tiny_program()
    assert same_logits(program, restrict_head(program, [0, 1, 2, 3]), [0, 1, 2, 3])


class ConvHead(nn.Module):
    """Logits of a 1x1 convolution, pooled, as in SqueezeNet and PFA's SimpleCNN."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.body(x).relu())).relu().mean((2, 3))  # type: ignore[no-any-return]


def test_convolutional_head() -> None:
    program = traced(ConvHead(), 1, 3, 8, 8)
    some = restrict_head(program, [4, 0, 2])
    assert same_logits(program, some, [0, 2, 4])
    assert some.layer("norm", nn.BatchNorm2d).num_features == 3


def test_real_network_with_an_option_a_trunk() -> None:
    module = MODELS["resnet20"].factory()
    program = traced(module, 1, 3, 32, 32)
    assert same_logits(program, restrict_head(program, list(range(4))), list(range(4)))


def test_random_head_is_seeded_and_new() -> None:
    program = tiny_program()
    one, same, other = (restrict_head(program, [0, 2], "random", seed=s) for s in (1, 1, 2))
    weights = [p.layer("fc", nn.Linear).weight for p in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    sliced = restrict_head(program, [0, 2])
    assert not torch.equal(weights[0], sliced.layer("fc", nn.Linear).weight)
    assert torch.equal(one.tensors["stem.weight"], program.tensors["stem.weight"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [([0, 4], "found class 4"), ([2], r"found 1 class\(es\)"), ([2, 2], "1 class"), ([-1, 2], "class -1")],
)
def test_impossible_classes_are_refused(classes: list[int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        restrict_head(tiny_program(), classes)


def test_logits_that_are_no_rows_are_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return torch.cat([y, y], 1)

    with pytest.raises(AnalysisError, match=r"cat: found logits that are not the rows of one layer"):
        restrict_head(traced(Doubled(), 1, 3, 8, 8), [0, 5])


def test_feature_maps_are_no_head() -> None:
    with pytest.raises(AnalysisError, match="expected a classifier"):
        restrict_head(traced(nn.Conv2d(3, 4, 3), 1, 3, 8, 8), [0, 1])
