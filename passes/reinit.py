"""reinit: the network's structure with weights drawn anew, so that training begins from nothing.

    every layer is initialised as its own class does it (torch's `reset_parameters`), in the order they run,
    from one seed; normalisations start from the identity and forget their statistics

It answers what a compressed structure is worth without the weights that were kept: PFA's comparison of random
initialisation with filter selection, "full scratch" and "PFA scratch" (Suau et al. 2020, 4.1 and 4.3).
What no layer holds (a parameter that a function reads) and what is frozen keeps its values, and is named.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from graphcomp.bases import OPTIONS, options_of
from graphcomp.errors import PassError
from graphcomp.ir import Program, editable
from graphcomp.pipeline import Context, Outlook
from graphcomp.records import LeftAlone, Plan

FUNCTION = "a function reads it, and no layer says how to draw it"
FROZEN = "it is frozen: none of its parameters requires gradients"


@dataclass(frozen=True, config=OPTIONS)
class Reinit:
    """Draw all weights anew, by the layers' own initialisers; the structure stays."""

    name: ClassVar[str] = "reinit"
    keeps_rows: ClassVar[bool] = True

    seed: Annotated[int | None, Field(ge=0, lt=2**32, description="default: the run's")] = None

    def require(self, outlook: Outlook) -> None:
        """Some layer to draw."""
        _layers(outlook.program)

    def foresee(self, outlook: Outlook) -> Outlook:
        """The same layers, and nothing is left of what they had learned."""
        return replace(outlook, untrained=outlook.untrained | {len(outlook.context.earlier)})

    def plan(self, program: Program, context: Context) -> Plan:
        """Name the layers; PassError if there is none."""
        layers = _layers(program)
        reasons = {n: _reason(m) for n, m in program.called_modules().items() if _holds(m)}
        read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        reasons |= {n: FUNCTION for n in sorted(read) if isinstance(program.tensors.get(n), nn.Parameter)}
        seed = context.seed if self.seed is None else self.seed
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"seed": seed, "layers": layers},
            kept=[LeftAlone(where=name, reason=why) for name, why in reasons.items() if why is not None],
            summary=f"{len(layers)} layers drawn anew from seed {seed}",
        )

    @torch.no_grad()
    def simulate(self, program: Program, plan: Plan) -> Program:
        """Draw the layers' values."""
        module = editable(program)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.decisions["seed"])
            for name in plan.decisions["layers"]:
                _draw(module.get_submodule(name))
        return replace(program, module=module)

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Nothing is left to do."""
        return program


def _initialiser(module: nn.Module) -> Any:
    """What draws a layer's values; None if it has no such method."""
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def _holds(module: nn.Module) -> bool:
    """Whether a layer has values at all: parameters, or statistics."""
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _reason(module: nn.Module) -> str | None:
    """Why the values of a layer stay as they are; None if they do not."""
    if _initialiser(module) is None:
        return f"a {type(module).__name__} does not say how its values are drawn"
    parameters = list(module.parameters())
    return FROZEN if parameters and not any(p.requires_grad for p in parameters) else None


def _layers(program: Program) -> list[str]:
    found = [n for n, m in program.called_modules().items() if _holds(m) and _reason(m) is None]
    if not found:
        raise PassError(
            "reinit: found no layer whose values can be drawn, expected one that is not frozen; leave it out"
        )
    return found


def _draw(module: nn.Module) -> None:
    """New values for all but what is frozen."""
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    _initialiser(module)()
    for name, value in frozen.items():
        module.get_parameter(name).copy_(value)
