"""What must hold after every pass: a sound program, and `rewrite(simulate(p)) == simulate(p)`."""

import contextlib
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import GraphcompError, VerifyError, first_line
from graphcomp.ir import (
    DctLayer,
    DctLinear,
    Program,
    damaged,
    fresh_inputs,
    named_tensors,
    negative_variances,
    output_tensors,
    run_on_meta,
)

TOLERANCE = 1e3 * torch.finfo(torch.float64).eps
"""Largest relative difference in float64 that counts as equal: room for another order of summation."""

ROUNDINGS = 100
"""Times what one rounding of every weight moves the outputs by counts as equal, too: a network can be so
ill-conditioned that another order of summation does more than `TOLERANCE`."""

CONSTANT = 1e-6
"""A channel that tells less of its input than this, relative to its mean, is one of zeros and a bias."""

BLIND = 1e-7
"""Outputs that differ less than this between two inputs (relative) cannot show a wrong removal."""


def check(program: Program) -> None:
    """Raise VerifyError, naming the place, if the program is not sound.

    Checks: the graph is well formed, every shape follows from the inputs, module attributes agree with
    weights, every tensor is used and none is damaged (`ir.damaged`), no variance is negative.
    """
    try:
        program.graph.lint()
        run_on_meta(program)
    except (RuntimeError, GraphcompError) as error:
        raise VerifyError(f"graph: found {first_line(error)}, expected a well-formed graph") from error
    for name, module in program.called_modules().items():
        _check_attributes(name, module)
    called = tuple(f"{t}." for t in program.called_modules())
    direct = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    tensors = named_tensors(program.module)
    for name in tensors:
        if not (name.startswith(called) or name in direct):
            raise VerifyError(f"{name}: found a tensor that no node uses, expected every tensor to be used")
    for name, bad in damaged(program.module, tensors).items():
        raise VerifyError(f"{name}: found {bad} NaN or infinite values, expected finite weights")
    for name in negative_variances(program.module, tensors):
        raise VerifyError(f"{name}: found a negative variance, expected 0 or more; the weights are damaged")


@torch.no_grad()
def check_outputs(program: Program) -> None:
    """Raise VerifyError, naming node and weight, if the outputs for the example inputs are not finite.

    Finite weights are no proof: what overflows on the way would only be found when the result is exported.
    """
    if _is_finite(output_tensors(program(*program.example_inputs))):
        return
    node = _first_infinite(program, program.example_inputs)
    sizes = {
        n: float(t.abs().max()) for n, t in program.tensors.items() if t.is_floating_point() and t.numel()
    }
    largest = max(sizes, key=lambda n: sizes[n], default=None)
    cause = f"; of the weights {largest} has the largest, {sizes[largest]:.3g}" if largest else ""
    raise VerifyError(
        f"{node}: found NaN or infinity in the outputs, and here first, expected finite numbers for finite "
        f"inputs{cause}; use weights that did not diverge"
    )


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def _first_infinite(program: Program, inputs: Iterable[Tensor]) -> str:
    """The node at which numbers are not finite any more."""
    first = _FirstInfinite(program)
    first.run(*(x.clone() for x in inputs))
    return "outputs" if first.found is None else first.found.name


class _FirstInfinite(fx.Interpreter):
    """Finds the first node whose output is not finite."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run it and look at what it yields."""
        value = super().run_node(n)
        if self.found is None and not _is_finite(output_tensors(value)):
            self.found = n
        return value


def _check_attributes(name: str, module: nn.Module) -> None:
    expected: dict[str, int] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        rows, columns = module.weight.shape[:2]
        wide = columns * module.groups
        out, into = (wide, rows) if module.transposed else (rows, wide)
        expected = {"in_channels": into, "out_channels": out}
        if module.bias is not None and module.bias.numel() != out:
            raise VerifyError(f"{name}.bias: found {module.bias.numel()} values, expected {out}")
    elif isinstance(module, DctLayer):
        flaw = module.flaw()
        if flaw is not None:
            raise VerifyError(f"{name}.{flaw}")
    elif isinstance(module, nn.Linear):
        expected = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
        expected = {"num_features": module.running_mean.numel()}
    for attribute, value in expected.items():
        if getattr(module, attribute) != value:
            found = getattr(module, attribute)
            raise VerifyError(f"{name}.{attribute}: found {found}, expected {value} as its weights have")


@torch.no_grad()
def scrambled(program: Program, seed: int = 0) -> Program:
    """A float64 copy with random biases and normalisation statistics, through which signals travel.

    A fresh network hides bugs: its statistics are those of the identity, its biases are zero, and in a deep
    one the signal dies on the way, so that a wrong output looks right. Here constant weights become random,
    then one run gives every normalisation the statistics of what arrives, disturbed, and rescales layers
    whose output is out of proportion.
    """
    copy = program.to(torch.float64)
    copy.module.eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in copy.module.parameters():
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(0.1 * _noise(tensor, generator))
    calibration = _Calibration(copy, generator)
    try:
        calibration.run(*fresh_inputs(copy, 2, seed, torch.float64))
    except RuntimeError:  # a literal batch size in the network
        calibration.run(*fresh_inputs(copy, 1, seed, torch.float64))
    return copy


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


class _Calibration(fx.Interpreter):
    """Runs a program once and sets each layer up when its input arrives."""

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        super().__init__(program.module)
        self.generator = generator
        self.done: set[str] = set()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scramble and calibrate a module before its first call."""
        module = self.fetch_attr(target)
        if target not in self.done:
            self.done.add(target)
            self.scramble(module)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
                self.set_statistics(module, args[0])
            elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear | DctLayer):
                return self.rescaled(module, module(*args, **kwargs))
        return super().call_module(target, args, kwargs)

    def scramble(self, module: nn.Module) -> None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.add_(_noise(bias, self.generator) * (0.1 + bias.abs().mean()))
        if isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(module.weight, Tensor):
            module.weight.mul_(self.uniform(module.weight))

    def set_statistics(self, module: nn.modules.batchnorm._NormBase, x: Tensor) -> None:
        rows = x.movedim(1, 0).flatten(1)
        var = rows.var(1, correction=0) + 1e-3 * rows.var() + 1e-6
        mean = cast(Tensor, module.running_mean)
        mean.copy_(rows.mean(1) + 0.1 * _noise(mean, self.generator) * var.sqrt())
        cast(Tensor, module.running_var).copy_(var * self.uniform(var))

    def rescaled(self, module: nn.Module, value: Tensor) -> Tensor:
        """What a layer yields, where its weight is scaled and its bias moved if they are out of proportion.

        In proportion to what its channels tell of their input: the bias that a normalisation was folded into
        is right for images, and drowns what noise does to a channel. A few such layers, one behind the other,
        yield the same whatever comes in.
        """
        channels = value.ndim - 1 if isinstance(module, nn.Linear | DctLinear) else 1
        rows = value.movedim(channels, 0).flatten(1)
        means = rows.mean(1)
        told = rows - means.unsqueeze(1) if rows.shape[1] > 1 else rows
        spread, bias = float(told.std()), module.bias
        if not spread > 0:
            return value
        like = [-1 if d == channels else 1 for d in range(value.ndim)]
        if not 0.1 < spread < 10:
            weight = cast(Tensor, module.coefficients if isinstance(module, DctLayer) else module.weight)
            weight.div_(spread)
            base = torch.zeros_like(means) if bias is None else cast(Tensor, bias).detach().clone()
            value = (value - base.reshape(like)) / spread + base.reshape(like)
            means, told = (means - base) / spread + base, told / spread
        if bias is None or rows.shape[1] == 1:
            return value
        most = told.std(1)
        moved = (means.clamp(-most, most) - means) * (most > CONSTANT * means.abs())
        cast(Tensor, bias).add_(moved)
        return value + moved.reshape(like)

    def uniform(self, like: Tensor) -> Tensor:
        return 0.5 + torch.rand(like.shape, generator=self.generator, dtype=torch.float64)


@torch.no_grad()
def difference(
    a: Program, b: Program, seed: int = 1, yields: Mapping[int, list[Tensor]] | None = None
) -> float:
    """max |a - b| / max |a| over all outputs, on random inputs at batch 1 and (if the network takes it) 3.

    Args:
        a, b: programs of the same inputs and outputs.
        seed: of the inputs.
        yields: `outputs(a, seed)`, where that is known.
    """
    worst = 0.0
    for batch, expected in (yields or outputs(a, seed)).items():
        try:
            found = output_tensors(b(*fresh_inputs(a, batch, seed, _float_type(a))))
        except RuntimeError as error:
            found_error = f"batch {batch}: found {first_line(error)}"
            raise VerifyError(f"{found_error}, expected a program that runs") from error
        if not expected:
            raise VerifyError("outputs: found no tensor to compare, expected at least one")
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise VerifyError(
                f"outputs: found shapes {[tuple(t.shape) for t in found]}, "
                f"expected {[tuple(t.shape) for t in expected]}"
            )
        worst = max([worst, *(relative_error(f, e) for f, e in zip(found, expected, strict=True))])
    return worst


@torch.no_grad()
def outputs(program: Program, seed: int) -> dict[int, list[Tensor]]:
    """What a program yields for random inputs, by batch: 1, and 3 if the network takes it."""

    def run(batch: int) -> list[Tensor]:
        return output_tensors(program(*fresh_inputs(program, batch, seed, _float_type(program))))

    found = {1: run(1)}
    with contextlib.suppress(RuntimeError):  # a literal batch size in the network
        found[3] = run(3)
    return found


def _float_type(program: Program) -> torch.dtype:
    """What a program computes in."""
    return next((t.dtype for t in program.module.parameters() if t.is_floating_point()), torch.float32)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; infinite if either is not finite."""
    if not (bool(torch.isfinite(found).all()) and bool(torch.isfinite(expected).all())):
        return float("inf")
    if not (found.is_floating_point() or found.is_complex()):
        found, expected = found.double(), expected.double()
    error = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    return float(error / scale) if scale else float(error)


def _response(program: Program, yields: Mapping[int, list[Tensor]], seed: int) -> float:
    """How much the outputs differ between samples, relative to their size.

    Args:
        program: is run once more where its outputs for three samples do not show one of them.
        yields: `outputs` of the program.
        seed: of another sample.
    """
    one, three = yields[1], yields.get(3, [])
    if three and all(t.ndim and t.shape == (3, *o.shape[1:]) for t, o in zip(three, one, strict=True)):
        one, other = [o.expand_as(t) for o, t in zip(one, three, strict=True)], three
    else:
        other = outputs(program, seed)[1]
    return max(relative_error(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def rounding(program: Program, seed: int) -> float:
    """How far the outputs of a float64 program move, relative, if every weight is rounded anew."""
    moved, generator = program.clone(), torch.Generator().manual_seed(seed)
    for tensor in named_tensors(moved.module).values():
        if tensor.is_floating_point():
            tensor.mul_(1 + torch.finfo(tensor.dtype).eps * _noise(tensor, generator))
    return difference(program, moved, seed)


def allowed(program: Program, seed: int) -> float:
    """The largest relative difference that counts as equal where a float64 program amplifies rounding."""
    return max(TOLERANCE, min(ROUNDINGS * rounding(program, seed), BLIND))


def verify_pass(pass_: Any, program: Program, plan: Any, seed: int = 0) -> float:
    """The one check: simulate and rewrite a scrambled float64 copy, and compare.

    Returns:
        The relative difference.

    Raises:
        VerifyError: if it exceeds `TOLERANCE`, and `ROUNDINGS` times what rounding alone does or `BLIND`.
    """
    simulated = pass_.simulate(scrambled(program, seed), plan)
    yields = outputs(simulated, seed + 1)
    if not all(map(_is_finite, yields.values())):
        where = _first_infinite(simulated, fresh_inputs(simulated, max(yields), seed + 1))
        raise VerifyError(
            f"{pass_.name}: found NaN or infinity in {where} of what is to be left, expected finite numbers: "
            "the network divides by, or takes the logarithm of, what can be zero then; leave the layers in "
            "front of it alone (exclude)"
        )
    if _response(simulated, yields, seed) < BLIND:
        raise VerifyError(
            f"{pass_.name}: found outputs that hardly depend on the inputs any more, expected some that do: "
            "nothing could be verified; remove less, or check the weights for dead layers"
        )
    error = difference(simulated, pass_.rewrite(simulated, plan), seed + 1, yields)
    if not error <= TOLERANCE and not error <= (most := allowed(simulated, seed + 1)):
        raise VerifyError(
            f"{pass_.name}: found outputs that differ by {error:.3g} (relative, float64) between simulate "
            f"and rewrite, expected at most {most:.3g}; this is a bug in graphcomp: please report it"
        )
    return error


def verify_trained(name: str, before: Program, after: Program) -> float:
    """Training may change values and nothing else: the same nodes with the same shapes, in eval mode.

    Returns:
        0: rewriting a trained program is the identity.

    Raises:
        VerifyError: naming the first node that is another.
    """
    if after.module.training:
        raise VerifyError(f"{name}: found a network in training mode, expected eval mode")
    for old, new in zip_longest(str(before).splitlines(), str(after).splitlines()):
        if old != new:
            raise VerifyError(f"{name}: found {new!r} after training, expected {old!r} as before")
    return 0.0
