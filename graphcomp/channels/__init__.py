"""Which channels are coupled, which may go, and how they go exactly."""

from graphcomp.channels.analysis import analyse
from graphcomp.channels.indexing import insert_select
from graphcomp.channels.labels import Ints, Marks, compact, varying
from graphcomp.channels.model import ELEMENTS, Axis, ChannelGroup, Channels, Granularity, Join, JoinPolicy
from graphcomp.channels.moves import CONCATENATIONS
from graphcomp.channels.pointwise import batch_norm_affine
from graphcomp.channels.removal import Removal
from graphcomp.channels.rules import opaque_layers
from graphcomp.channels.shifts import Shift
from graphcomp.channels.surgery import sync_attributes
from graphcomp.channels.widths import (
    multiple_for,
    next_multiple,
    round_up,
    round_within,
    rounding_step,
)

__all__ = [
    "Axis",
    "CONCATENATIONS",
    "ChannelGroup",
    "Channels",
    "ELEMENTS",
    "Ints",
    "Join",
    "Granularity",
    "JoinPolicy",
    "Marks",
    "Removal",
    "Shift",
    "analyse",
    "batch_norm_affine",
    "compact",
    "insert_select",
    "multiple_for",
    "next_multiple",
    "opaque_layers",
    "round_up",
    "round_within",
    "rounding_step",
    "sync_attributes",
    "varying",
]
