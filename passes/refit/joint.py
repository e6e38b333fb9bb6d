"""Layers in a line improved together, for what the last one of them is to yield.

A layer whose outputs nothing reads but the next one need not yield what the original does. What the last one
of a line lacks behind its activation is lowered by Gauss-Newton steps of all its layers (`curvature`). How
far to go held-out samples say, for which the error is taken to be linear in the steps: one number a layer,
from as many runs of the line, so that what only the samples of the fit gain is not gone after. The whole of
it, or a half, or a quarter is taken, where that lowers their error. Other than regressions, which know each
output by itself, such a step weighs one output against another: by how much it moves those of the network.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.measure import Positions, as_weight, is_linear, matrix, patches_at
from graphcomp.passes.refit.curvature import FLOOR, Curvature, Pulls, Step
from graphcomp.passes.refit.line_run import LineRun, Sample
from graphcomp.passes.refit.lines import Line

STEPS = 4
"""Gauss-Newton steps of a line at most."""

GAIN = 0.01
"""Part of the error that a step has to take away to be followed by another."""

POSITIONS = 16
"""Of every map, at which second moments of what a layer reads are taken."""

LENGTHS = 1.0, 0.5, 0.25
"""Parts of a step that are tried."""

MOST = 2.0
"""Times a layer's own step that it may take."""

LEAST = 1e-9
"""Added to the diagonal where lengths are solved for, as a share of it."""

Tensors = Mapping[str, tuple[Tensor, Tensor | None]]
"""Layer -> W `[g, o, K]` and its bias."""


class Together:
    """The layers of a line, in place in a module.

    Args:
        module, line: see there.
        weights: see `LineRun`.
        ridges: of those that may be changed, in order; see `Curvature`.
        seed: of positions and signs.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        line: Line,
        weights: Tensor | None,
        ridges: Mapping[str, float],
        seed: int,
    ) -> None:
        self.layers = {name: module.get_submodule(name) for name in ridges}
        self.ridges = ridges
        self.run = LineRun(module, line, weights)
        self.drawn = Positions(POSITIONS, seed)

    def improve(self, samples: Sequence[Sample]) -> float:
        """Take steps; what part of the error on held-out samples is left, 1 if nothing helped; collective."""
        seen = [s for s in samples if not s.is_held_out]
        judges = [s for s in samples if s.is_held_out]
        start = best = self.loss(judges)
        for _ in range(STEPS if start > 0 else 0):
            here = self.here()
            steps = self.steps(seen)
            lengths = self.lengths(judges, here, steps)
            for part in LENGTHS:
                self.put(here, steps, {name: part * a for name, a in lengths.items()})
                if (now := self.loss(judges)) < best:
                    break
            else:
                self.put(here, steps, {})
                break
            before, best = best, now
            if best > (1 - GAIN) * before:
                break
        return best / start if start > 0 else 1.0

    def here(self) -> Tensors:
        """Where the layers are."""
        biases = [cast(Tensor | None, layer.bias) for layer in self.layers.values()]
        return {
            name: (matrix(layer).clone(), None if bias is None else bias.double().clone())
            for (name, layer), bias in zip(self.layers.items(), biases, strict=True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights and biases by name."""
        named = {
            f"{name}.{kind}": getattr(x, kind)
            for name, x in self.layers.items()
            for kind in ("weight", "bias")
        }
        return {name: t.detach().cpu().clone() for name, t in named.items() if t is not None}

    def loss(self, samples: Sequence[Sample]) -> float:
        """Mean squared error, over all processes."""
        sums = torch.zeros(2, dtype=torch.float64)
        for sample in samples:
            e = self.run.error(sample)
            sums += torch.tensor([float(e.double().square().sum()), float(e.numel())])
        distributed.all_reduce([sums])
        return float(sums[0] / sums[1].clamp(min=1))

    def steps(self, samples: Sequence[Sample]) -> dict[str, Step]:
        """A Gauss-Newton step of every layer by itself."""
        found = {name: Curvature(layer, self.ridges[name]) for name, layer in self.layers.items()}
        for sample in samples:
            for name, pull in self.pulls(sample).items():
                found[name].add(pull)
        return {name: curvature.step() for name, curvature in found.items()}

    @torch.enable_grad()
    def pulls(self, sample: Sample) -> dict[str, Pulls]:
        """What some samples say of every layer."""
        weights = [cast(Tensor, layer.weight) for layer in self.layers.values()]
        flags = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_()
        e = self.run.error(sample)
        yielded = [self.run.yielded[name] for name in self.layers]
        signed: Sequence[Tensor | None] = [None] * len(yielded)
        if sample.is_scout:
            drawn = torch.Generator().manual_seed(hash((self.drawn.seed, sample.first)) % (1 << 63))
            signs = torch.randint(0, 2, e.shape, generator=drawn).to(e) * 2 - 1
            signed = torch.autograd.grad([(e * signs).sum()], yielded, retain_graph=True)
        pulled = torch.autograd.grad([e.square().sum() / 2], [*weights, *yielded])
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
        return {
            name: Pulls(
                pulled[i],
                pulled[len(weights) + i],
                signed[i],
                self.patches(name, layer, sample) if sample.is_scout else None,
            )
            for i, (name, layer) in enumerate(self.layers.items())
        }

    def patches(self, name: str, layer: nn.Module, sample: Sample) -> Tensor:
        """What a layer reads, at some positions."""
        x, y = self.run.read[name], self.run.yielded[name]
        maps = sample.count if is_linear(layer) else len(y)
        plane = y.shape[:-1].numel() // maps if is_linear(layer) else y.shape[2:].numel()
        at = self.drawn.of(plane, sample.first * maps // sample.count, maps).to(x.device)
        return patches_at(layer, x, at)

    def lengths(
        self, samples: Sequence[Sample], here: Tensors, steps: Mapping[str, Step]
    ) -> dict[str, float]:
        """How far to go along every step, if the error is linear in them: least squares."""
        m = len(steps)
        sums = torch.zeros(m, m + 1, dtype=torch.float64)
        for sample in samples:
            errors = []
            for name in (None, *steps):
                self.put(here, steps, {} if name is None else {name: 1.0})
                errors.append(self.run.error(sample).double().flatten())
            moved = torch.stack(errors[1:]) - errors[0]
            sums += (moved @ torch.stack([*moved, errors[0]]).T).cpu()
        distributed.all_reduce([sums])
        inner, right = sums[:, :m], -sums[:, m]
        inner.diagonal().add_(LEAST * inner.diagonal().mean() + FLOOR)
        found = torch.linalg.solve(inner, right).clamp(0, MOST)
        return dict(zip(steps, found.tolist(), strict=True))

    def put(self, here: Tensors, steps: Mapping[str, Step], lengths: Mapping[str, float]) -> None:
        """Set the layers to where they were, and so far along their steps."""
        for name, layer in self.layers.items():
            length, (w, b) = lengths.get(name, 0.0), here[name]
            step = steps[name]
            cast(Tensor, layer.weight).copy_(as_weight(layer, w + length * step.w))
            if b is not None and step.b is not None:
                cast(Tensor, layer.bias).copy_(b + length * step.b.reshape(-1).to(b))
