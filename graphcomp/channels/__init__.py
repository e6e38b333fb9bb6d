"""Which channels are coupled, which may go, and how they go exactly."""

from graphcomp.channels.analysis import analyse
from graphcomp.channels.indexing import insert_select
from graphcomp.channels.labels import Ints, compact, varying
from graphcomp.channels.legal import Drop, drop_of, dropped_rows, legalise, no_drop
from graphcomp.channels.liveness import live_of
from graphcomp.channels.masks import mask
from graphcomp.channels.model import ELEMENTS, Axis, ChannelGroup, Channels, JoinPolicy
from graphcomp.channels.moves import CONCATENATIONS
from graphcomp.channels.rules import opaque_layers
from graphcomp.channels.shifts import Shift, shifts
from graphcomp.channels.surgery import feasible, remove, sync_attributes
from graphcomp.channels.widths import next_multiple, round_up, rounding_step

__all__ = [
    "Axis",
    "CONCATENATIONS",
    "ChannelGroup",
    "Channels",
    "Drop",
    "ELEMENTS",
    "Ints",
    "JoinPolicy",
    "Shift",
    "analyse",
    "compact",
    "drop_of",
    "dropped_rows",
    "feasible",
    "insert_select",
    "legalise",
    "live_of",
    "mask",
    "next_multiple",
    "no_drop",
    "opaque_layers",
    "remove",
    "round_up",
    "rounding_step",
    "shifts",
    "sync_attributes",
    "varying",
]
