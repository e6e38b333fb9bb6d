"""What a data spec asks for: its options, read and checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphcomp.errors import DataError
from graphcomp.ir import Numbers, Program, input_names, numbers_of

SCOPED = "mean", "std"
"""Options that may be of one input alone."""

IMAGE = 3
"""Dimensions of an image, without the batch."""


@dataclass(frozen=True)
class Slot:
    """An input of the network that samples are for.

    Attributes:
        name: as `ir.input_names` says.
        shape: of one sample, without the batch.
        dtype: of the input.
        numbers: that it may hold, if it holds whole ones and these are known.
        example: whole numbers `[1, …]` that are all that is known to work, where `numbers` are not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    numbers: Numbers | None = None
    example: Tensor | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({sizes(self.shape)})"


def slots_of(program: Program) -> tuple[Slot, ...]:
    """The inputs of a program."""
    found = zip(input_names(program), program.example_inputs, numbers_of(program), strict=True)
    return tuple(Slot(name, tuple(x.shape[1:]), x.dtype, numbers, x) for name, x, numbers in found)


@dataclass(frozen=True)
class Request:
    """A data spec, read, and what the network takes; see `load_data`.

    `own`: options of one input alone, by its name: `?image.mean=..&image.std=..`.
    """

    spec: str
    where: str
    inputs: tuple[Slot, ...]
    seed: int
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: str | None = None
    labels: str | None = None
    outputs: int | None = None
    own: Mapping[str, Mapping[str, tuple[float, ...] | None]] = field(default_factory=dict)

    @property
    def slot(self) -> Slot:
        """The only input; DataError if there are several."""
        if len(self.inputs) > 1:
            raise DataError.at(
                self.spec,
                f"a network that takes {' and '.join(map(str, self.inputs))}",
                "one with one input: these samples have one tensor each",
                "give npz:FILE with an array for each input, a dataset of your own (FILE.py:NAME), or random",
            )
        return self.inputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """What the only input takes, without the batch."""
        return self.slot.shape

    def of(self, slot: Slot) -> "Request":
        """The same request for one of the inputs alone: mean and std of it, or of all images."""
        shared = len(self.inputs) == 1 or len(slot.shape) == IMAGE
        own = self.own.get(slot.name, {"mean": self.mean, "std": self.std} if shared else {})
        return replace(self, inputs=(slot,), own={}, mean=own.get("mean"), std=own.get("std"))


def read_options(spec: str, query: str, known: tuple[str, ...], inputs: Sequence[Slot]) -> dict[str, Any]:
    """The options behind a spec's question mark, by name; those of one input alone under `own`."""
    options: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {slot.name: {} for slot in inputs}
    for item in query.split("&"):
        name, _, text = item.partition("=")
        whose, _, what = name.rpartition(".")
        scoped = what in SCOPED and what in known and whose in own
        if not scoped and name not in known:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r}", either(known), "correct it")
        found, name = (own[whose], what) if scoped else (options, name)
        if name in found:
            raise DataError.at(f"data spec {spec!r}", f"option {name!r} twice", "it once", "remove one")
        found[name] = _READERS[name](spec, name, text)
    for found in (options, *own.values()):
        if ("mean" in found) != ("std" in found):
            raise DataError.at(
                f"data spec {spec!r}", "only one of mean and std", "both", "give the other too"
            )
    return {**options, "own": {name: found for name, found in own.items() if found}}


def read_limit(spec: str, name: str, text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", "a whole number from 1", "correct it")
    return int(text)


def _text(spec: str, name: str, text: str) -> str:
    if not text:
        raise DataError.at(f"data spec {spec!r}", f"{name} without a value", "one", "correct it")
    return text


def _floats(spec: str, name: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(v) for v in values) or (name == "std" and min(values) <= 0):
        expected = "positive numbers" if name == "std" else "numbers"
        raise DataError.at(f"data spec {spec!r}", f"{name}={text!r}", expected, f"e.g. {name}=0.5,0.5,0.5")
    return values


_READERS: dict[str, Callable[[str, str, str], Any]] = {
    "limit": read_limit,
    "mean": _floats,
    "std": _floats,
    "classes": _text,
    "labels": _text,
}


def sizes(shape: tuple[int, ...]) -> str:
    """As in 3x224x224."""
    return "x".join(str(n) for n in shape)


def either(names: tuple[str, ...]) -> str:
    """Names that are expected."""
    return " or ".join(names)
