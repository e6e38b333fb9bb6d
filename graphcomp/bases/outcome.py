"""What a plan says about a removal: what stayed and why, what went, what was constant, and what is left."""

from collections.abc import Sequence
from typing import Any

from graphcomp.channels import ChannelGroup, Removal, Shift, round_up, rounding_step
from graphcomp.records import LeftAlone


def untouched(
    groups: list[ChannelGroup], removal: Removal, multiple: int, min_channels: int
) -> list[LeftAlone]:
    """Groups that could lose channels and lost none."""
    found = []
    for group in groups:
        width, step = len(group.channels), rounding_step(group, multiple)
        if removal.kept(group) < width:
            continue
        if width <= max(min_channels, 1):
            tied = f", coupled at {', '.join(group.coupled_by[:3])}" if group.coupled_by else ""
            reason = f"{width} channel(s) wide{tied}"
        elif round_up(1, group, multiple, min_channels) >= width:
            reason = f"all {width} channels are the fewest that stay in steps of {step}"
        else:
            reason = f"nothing left to remove after rounding up to steps of {step} and the criterion's choice"
        found.append(LeftAlone(where=group.name, reason=reason))
    return found


def summary(removal: Removal) -> str:
    """How many channels of how many groups went."""
    groups = [removal.gone[g.channels] for g in removal.channels.groups]
    lost, total = [gone for gone in groups if gone.any()], sum(map(len, groups))
    whole = sum(bool(gone.all()) for gone in lost)
    return f"removed {len(removal)} of {total} coupled channels in {len(lost)} of {len(groups)} groups" + (
        f", {whole} of them whole" if whole else ""
    )


def moved(lost: Sequence[Shift]) -> str:
    """What the summary adds where removed channels held constants: see `channels.shifts`."""
    if not lost:
        return ""
    border = [s.layer for s in lost if not s.exact]
    more = ", …" if len(border) > 3 else ""
    doubt = f", but for the padded borders of {', '.join(border[:3])}{more}" if border else ""
    return f"; what was constant of them went into the biases of {len(lost)} layers{doubt}"


def restated(nodes: Sequence[str]) -> str:
    """What the summary adds where normalisations and means over channels have lost some of them."""
    if not nodes:
        return ""
    named = ", ".join(nodes[:3]) + (", …" if len(nodes) > 3 else "")
    return f"; {len(nodes)} normalisations or sums over channels are of what stays ({named})"


def moved_evidence(lost: Sequence[Shift]) -> dict[str, Any]:
    """Layers into whose biases constants went -> how many, and those where that is not exact."""
    if not lost:
        return {}
    border = [s.layer for s in lost if not s.exact]
    return {"constants": {s.layer: s.channels for s in lost}, "inexact_at_the_border": border}


def missed(of: str = "", asked: float = 1.0, reached: float = 0.0) -> str:
    """What the summary adds where more is left than was asked for."""
    return f"; {reached:.3f} of the {of} left, {asked:.3g} asked for" if reached > asked * 1.001 else ""
