"""A dense network with a region of it compressed, from two saved programs (METHODS 1.6)."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

from graphcomp.errors import SurgeryError
from graphcomp.factors.decompose import read_factors
from graphcomp.factors.layers import candidates
from graphcomp.factors.surgery import rewrite, simulate
from graphcomp.ir import Program


def region(
    dense: Program, compressed: Program, include: Sequence[str], exclude: Sequence[str] = ()
) -> Program:
    """The dense network with only a region compressed, from two saved programs (METHODS 1.6).

    The choices are those of the whole network; layers outside of the region keep their dense weights.

    Args:
        dense: what the compressing pass was given.
        compressed: what came out of it; only its plan is read.
        include, exclude: globs on module paths of `dense`.

    Raises:
        SurgeryError: if `compressed` was not made from `dense` by one pass that factors layers, or no layer
            matches one of the globs.
    """
    plans = compressed.history[len(dense.history) :]
    if compressed.history[: len(dense.history)] != dense.history or len(plans) != 1:
        raise SurgeryError(
            f"region: found a history of {len(compressed.history)} plans, expected that of the dense program "
            f"({len(dense.history)} plans) and one more; give the program that the pass started from"
        )
    (plan,) = plans
    factors = read_factors(plan["decisions"])
    for glob in (*include, *exclude):
        if not any(fnmatch(layer, glob) for layer in candidates(dense)):
            raise SurgeryError(f"region: found no layer that {glob!r} matches, expected a module path")
    chosen = [f for f in factors if _within(f.layer, include, exclude)]
    multiple = plan["decisions"].get("multiple", 1)
    result = rewrite(simulate(dense, chosen), chosen, plan["name"], multiple)
    plan = {
        **plan,
        "decisions": {**plan["decisions"], "factors": [f.model_dump(mode="json") for f in chosen]},
        "summary": f"{len(chosen)} of {len(factors)} layers of: {plan['summary']}",
    }
    return replace(result, history=(*dense.history, plan))


def _within(layer: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatch(layer, g) for g in include) and not any(fnmatch(layer, g) for g in exclude)
