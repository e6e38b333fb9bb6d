"""Which factors are made for which ranks, and which energies meet a target."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from graphcomp.budget import Clock, LayerClock, Stopwatch, latency
from graphcomp.errors import PassError
from graphcomp.factors import Factor, rank_text, rewrite, simulate
from graphcomp.ir import Program
from graphcomp.measure import macs, params_trainable
from graphcomp.passes.low_rank.ladders import bought, one_for_all
from graphcomp.passes.low_rank.layer import Energies, SplitLayer
from graphcomp.records import LeftAlone


def chosen(
    layers: Sequence[SplitLayer],
    wanted: Mapping[SplitLayer, Sequence[int]],
    needless: Collection[SplitLayer] = (),
    clock: LayerClock | None = None,
) -> tuple[dict[SplitLayer, Factor], list[LeftAlone]]:
    """The factors that pay, in MACs and, if time is the target, in predicted time; and the others.

    Args:
        wanted: ranks before rounding.
        needless: layers that the target is met without.
        clock: predicts times; None: they are not the target.
    """
    made, kept = {}, []
    for layer in layers:
        factor = layer.factor(wanted[layer])
        reason = layer.loss(factor) if layer.macs(factor) >= layer.dense else None
        if reason is None and clock is not None:
            reason = _time_loss(clock, factor)
        if reason is None and layer in needless:
            reason = "the target is met without it"
        if reason is None:
            made[layer] = factor
        else:
            kept.append(LeftAlone(where=layer.name, reason=reason))
    return made, kept


def chosen_by(
    layers: Sequence[SplitLayer], energies: Energies, clock: LayerClock | None = None
) -> tuple[dict[SplitLayer, Factor], list[LeftAlone]]:
    """`chosen` for energies."""
    wanted = {layer: layer.wanted(energies.get(layer, 0.0)) for layer in layers}
    return chosen(layers, wanted, [layer for layer in layers if layer not in energies], clock)


def met(
    program: Program,
    layers: Sequence[SplitLayer],
    target: Mapping[Any, float | str],
    clock: Clock,
    greedy: bool,
) -> tuple[Energies, LayerClock | None, dict[str, Any]]:
    """Energies that meet a target; for a latency what predicts times, and the evidence.

    Raises:
        PassError: none leave so little. ExportError, ProviderError: times cannot be measured.
    """
    ((counter, amount),) = target.items()
    if counter != "latency":
        return _meet(program, layers, counter, float(amount), greedy), None, {}
    times = LayerClock(program, clock.model(program), [x.factor(x.full) for x in layers])
    energies, evidence = _meet_latency(layers, times, clock.stopwatch(program), amount, greedy)
    return energies, times, evidence


def _meet(
    program: Program, layers: Sequence[SplitLayer], counter: str, fraction: float, greedy: bool
) -> Energies:
    """Energies that leave a fraction of the MACs or parameters; PassError if none leave so little."""
    whole = _counted(program, counter)

    def left(energies: Energies) -> int:
        return whole - sum(x.saving(x.factor(x.wanted(e)), counter) for x, e in energies.items())

    if greedy:
        found = bought(layers, lambda x, f: x.saving(f, counter), whole, fraction * whole)
    else:
        found = one_for_all(layers, lambda energies: left(energies) <= fraction * whole)
    if found is None:
        raise _out_of_reach(counter, counter, left(dict.fromkeys(layers, 0.0)) / whole, fraction)
    return found


def _meet_latency(
    layers: Sequence[SplitLayer], clock: LayerClock, watch: Stopwatch, amount: float | str, greedy: bool
) -> tuple[Energies, dict[str, Any]]:
    """Energies by predicted time, corrected until the measured one is what was asked for."""
    asked = watch.ratio_of(amount)

    def saving(layer: SplitLayer, factor: Factor) -> float:
        return clock.saving(factor) if layer.macs(factor) < layer.dense else 0.0

    def left(energies: Energies) -> float:
        saved = sum(map(clock.saving, chosen_by(layers, energies, clock)[0].values()))
        return 1 - saved / clock.whole

    def propose(goal: float) -> Energies | None:
        if greedy:
            return bought(layers, saving, clock.whole, goal * clock.whole)
        return one_for_all(layers, lambda energies: left(energies) <= goal)

    def build(energies: Energies) -> Program:
        factors = list(chosen_by(layers, energies, clock)[0].values())
        return rewrite(simulate(watch.program, factors), factors, "low-rank")

    met = latency.meet(watch, asked, propose, left, build)
    if met is None:
        raise _out_of_reach("latency", "time", left(dict.fromkeys(layers, 0.0)), asked)
    return met


def reached(
    program: Program, target: Mapping[Any, float | str] | None, made: Mapping[SplitLayer, Factor]
) -> dict[str, Any]:
    """What was asked for, and what part is left with these factors; nothing without a target."""
    if target is None:
        return {}
    ((counter, fraction),) = target.items()
    whole = _counted(program, counter)
    left = whole - sum(layer.saving(factor, counter) for layer, factor in made.items())
    return {"target": {"of": counter, "asked": float(fraction), "reached": left / whole}}


def _out_of_reach(counter: str, of: str, least: float, asked: float) -> PassError:
    return PassError(
        f"target {counter}: found {least:.3f} of the {of} left at the lowest ranks (rounded up to the "
        f"multiple), expected {asked}; ask for less, include more layers, or set multiple=1"
    )


def _counted(program: Program, counter: str) -> int:
    return macs(program) if counter == "macs" else params_trainable(program)


def _time_loss(clock: LayerClock, factor: Factor) -> str | None:
    """Why factors are not made although they have fewer MACs; None if they are faster."""
    before, after = clock.milliseconds(factor.as_one_weight()), clock.milliseconds(factor)
    if after < before:
        return None
    return f"rank {rank_text(factor)} is predicted to take {after:.3g} ms, one weight {before:.3g} ms"
