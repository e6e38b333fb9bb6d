"""What the exporter sees of DCT layers: the same network, whose layers hold or take their weight."""

from typing import cast

import torch
from torch import Tensor, nn

from graphcomp.ir.coefficients import compressed
from graphcomp.ir.inputs import fresh_inputs
from graphcomp.ir.program import Program, assemble, parts
from graphcomp.ir.tracing import trace
from graphcomp.onnx.lowering import dct_layers, densified, taking_weights
from tests.dct_nets import LAYERS, dct_program


def test_given_their_weights_layers_compute_the_same() -> None:
    program = dct_program()
    network, weights = taking_weights(program)
    assert list(weights) == [f"{name}.weight" for name in LAYERS]
    given = [layer.weight() for layer in dct_layers(program).values()]
    assert [w.shape for w in given] == [w.shape for w in weights.values()]
    (x,) = fresh_inputs(program, 2, seed=5)
    torch.testing.assert_close(network(x, *given), program(x))
    held = dict(network.named_parameters())
    assert not any("coefficients" in name for name in held)
    assert {name for name in held if name.startswith("fc")} == {"fc.bias"}
    computing = [n.name for n in network.graph.nodes if n.op != "placeholder"]
    assert computing == [n.name for n in program.graph.nodes if n.op != "placeholder"]


def test_densified_is_the_same_network_and_leaves_the_program_alone() -> None:
    program = dct_program()
    dense = densified(program)
    assert not dct_layers(dense) and list(dct_layers(program)) == list(LAYERS)
    assert {type(dense.modules[name]) for name in LAYERS} == {nn.Conv2d, nn.Linear}
    (x,) = fresh_inputs(program, 2, seed=5)
    expected = program(x).detach()
    torch.testing.assert_close(dense(x).detach(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert [n.name for n in dense.graph.nodes] == [n.name for n in program.graph.nodes]


def test_a_module_under_two_names_has_one_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.b(self.a(x)))

    program = trace(Tied().eval(), torch.randn(1, 8))
    one = compressed(program.layer("a"), 2, 16, torch.randperm(32))  # type: ignore[arg-type]
    root, graph = parts(program)
    for name in ("a", "b"):
        if any(n.target == name for n in graph.nodes):
            root.set_submodule(name, one)
    program = Program(assemble(program, root, graph), program.example_inputs)
    network, weights = taking_weights(program)
    assert [tuple(w.shape) for w in weights.values()] == [(8, 8)]
    x = torch.randn(3, 8)
    torch.testing.assert_close(network(x, one.weight()), program(x))
