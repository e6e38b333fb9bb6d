"""The base of all records. Pure data: no torch, no files, no logic beyond ratios.

Units: times in milliseconds unless a name says seconds; sizes in bytes; MACs as METHODS count them
(convolutions, linear layers and matrix products; nothing for bias, normalisation, activation, pooling).
"""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records: frozen, an unknown field is an error, NaN and infinity are strings in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
