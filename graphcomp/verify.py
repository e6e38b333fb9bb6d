"""What must hold after every pass: a sound program, and `rewrite(simulate(p)) == simulate(p)`."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from graphcomp.errors import GraphcompError, VerifyError
from graphcomp.program import Program, fresh_inputs, named_tensors, output_tensors, run_on_meta

TOLERANCE = 1e3 * torch.finfo(torch.float64).eps
"""Largest relative difference in float64 that counts as equal: room for another order of summation."""


def check(program: Program) -> None:
    """Raise VerifyError, naming the place, if the program is not sound.

    Checks: the graph is well formed, every shape follows from the inputs, module attributes agree with
    weights, every tensor is used and finite.
    """
    try:
        program.graph.lint()
        run_on_meta(program)
    except (RuntimeError, GraphcompError) as error:
        raise VerifyError(f"graph: found {error}, expected a well-formed graph") from error
    for name, module in program.called_modules().items():
        _check_attributes(name, module)
    called = tuple(f"{t}." for t in program.called_modules())
    direct = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    for name, tensor in named_tensors(program.module).items():
        if not (name.startswith(called) or name in direct):
            raise VerifyError(f"{name}: found a tensor that no node uses, expected every tensor to be used")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise VerifyError(f"{name}: found {bad} NaN or infinite values, expected finite weights")


def _check_attributes(name: str, module: nn.Module) -> None:
    expected: dict[str, int] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.weight.shape[:2]
        wide = columns * module.groups
        out, into = (wide, rows) if module.transposed else (rows, wide)
        expected = {"in_channels": into, "out_channels": out}
        if module.bias is not None and module.bias.numel() != out:
            raise VerifyError(f"{name}.bias: found {module.bias.numel()} values, expected {out}")
    elif isinstance(module, nn.Linear):
        expected = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
        expected = {"num_features": module.running_mean.numel()}
    for attribute, value in expected.items():
        if getattr(module, attribute) != value:
            raise VerifyError(
                f"{name}.{attribute}: found {getattr(module, attribute)}, expected {value} as its weights have"
            )


@torch.no_grad()
def scrambled(program: Program, seed: int = 0) -> Program:
    """A float64 copy with random biases and normalisation statistics; constant weights become random.

    A fresh network hides bugs: its statistics are those of the identity and its biases are zero.
    """
    copy = program.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    def uniform(like: Tensor) -> Tensor:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)

    for module in copy.called_modules().values():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            module.running_var.mul_(uniform(module.running_var))
            mean = cast(Tensor, module.running_mean)
            mean.add_(noise(mean) * module.running_var.sqrt() * 0.1)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.add_(noise(bias) * (0.1 + bias.abs().mean()))
        if isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(module.weight, Tensor):
            module.weight.mul_(uniform(module.weight))
    for tensor in copy.module.parameters():
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(noise(tensor) * 0.1)
    return copy


@torch.no_grad()
def difference(a: Program, b: Program, seed: int = 1) -> float:
    """max |a - b| / max |a| over all outputs, on random inputs at batch 1 and (if the network takes it) 3."""
    worst = 0.0
    dtype = next((t.dtype for t in a.module.parameters() if t.is_floating_point()), torch.float32)
    for batch in (1, 3):
        inputs = fresh_inputs(a, batch, seed, dtype)
        try:
            expected = output_tensors(a(*inputs))
        except RuntimeError:
            if batch == 1:
                raise
            continue  # a literal batch size in the network
        found = output_tensors(b(*inputs))
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise VerifyError(
                f"outputs: found shapes {[tuple(t.shape) for t in found]}, "
                f"expected {[tuple(t.shape) for t in expected]}"
            )
        worst = max([worst, *(relative_error(f, e) for f, e in zip(found, expected, strict=True))])
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; infinite if either is not finite."""
    if not (bool(torch.isfinite(found).all()) and bool(torch.isfinite(expected).all())):
        return float("inf")
    error = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    return float(error / scale) if scale else float(error)


def verify_pass(pass_: Any, program: Program, plan: Any, seed: int = 0) -> float:
    """The one check: simulate and rewrite a scrambled float64 copy, and compare.

    Returns:
        The relative difference.

    Raises:
        VerifyError: if it exceeds `TOLERANCE`.
    """
    simulated = pass_.simulate(scrambled(program, seed), plan)
    error = difference(simulated, pass_.rewrite(simulated, plan), seed + 1)
    if not error <= TOLERANCE:
        raise VerifyError(
            f"{pass_.name}: found outputs that differ by {error:.3g} (relative, float64) between simulate and "
            f"rewrite, expected at most {TOLERANCE:.3g}; this is a bug in graphcomp: please report the model"
        )
    return error
