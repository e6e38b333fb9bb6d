"""Which layers a student and its teacher are compared at, and whether they can be compared at all."""

from collections.abc import Sequence

from graphcomp.bases import matches, prunable_relus
from graphcomp.channels import analyse
from graphcomp.errors import PassError
from graphcomp.ir import Program, output_tensors


def hint_layers(program: Program, teacher: Program, hints: Sequence[str]) -> dict[str, str]:
    """Prunable layers that globs match -> the nodes of their ReLUs, in both networks.

    Raises:
        PassError: if there is none, or if shapes differ.
    """
    relus = prunable_relus(analyse(program))
    chosen = {n: relu.name for n, relu in relus.items() if matches([n], hints)}
    if not chosen:
        raise PassError(
            "hints: found no prunable layer with a ReLU that they match, expected at least one; set "
            "prediction=1 to learn from predictions alone"
        )
    theirs = {node.name: teacher.shape(node) for node in teacher.graph.nodes}
    for layer, node in chosen.items():
        own = program.shape(relus[layer])
        if theirs.get(node) != own:
            raise PassError(
                f"{layer}: found the shape {theirs.get(node)} in the teacher, expected {own} as here; "
                "learn from the network that this one was made from, leave the layer out of hints, or "
                "set prediction=1"
            )
    return chosen


def no_classifier() -> PassError:
    """That a softened prediction needs one."""
    return PassError("loss=kl: found no (batch, classes) output, expected a classifier; use cosine")


def require_same_outputs(program: Program, teacher: Program) -> None:
    """PassError if the outputs have other shapes."""
    found, expected = ([tuple(t.shape) for t in output_tensors(p.output)] for p in (teacher, program))
    if found != expected:
        raise PassError(f"teacher: found outputs of shape {found}, expected {expected} as the student's")
