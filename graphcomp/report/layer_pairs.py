"""Which layers of a result stand for which layer of the original."""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from graphcomp.records import LayerRow


@dataclass(frozen=True)
class LayerPair:
    """A layer of the original beside what is left of it.

    Attributes:
        name: module path.
        before: None for a layer that is new.
        after: the layer of this name, or the factors that it was split into, in their order; empty if it is
            gone.
    """

    name: str
    before: LayerRow | None
    after: tuple[LayerRow, ...]

    @property
    def factors(self) -> tuple[LayerRow, ...]:
        """What it was split into; empty if it was not."""
        return self.after if any(row.name != self.name for row in self.after) else ()

    @property
    def result(self) -> LayerRow | None:
        """`after` as one layer: input of the first, output of the last, sums of parameters and MACs."""
        if not self.factors:
            return self.after[0] if self.after else None
        first, last = self.after[0], self.after[-1]
        return LayerRow(
            name=self.name,
            kind=f"{len(self.after)} factor{'s' if len(self.after) > 1 else ''}",
            in_channels=first.in_channels,
            out_channels=last.out_channels,
            params=sum(row.params for row in self.after),
            macs=sum(row.macs for row in self.after),
        )


def owner(name: str, known: Container[str]) -> str | None:
    """The layer that `name` is, or was split from: `a` lives on as `a.0`, `a.1`, …; None if none is known."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def pair_layers(before: Sequence[LayerRow], after: Sequence[LayerRow]) -> list[LayerPair]:
    """Layers side by side, in the original's order; a new layer stands behind the one that it follows.

    A module that is called several times has a row a call; they are paired in turn.
    """
    old, found = _by_call(before), _by_call(after)
    left = {name for name, _ in found}
    replaced = {name for name, _ in old} - left
    new: dict[tuple[str, int], list[LayerRow]] = {}
    order, place = list(old), 0
    for (name, call), row in found.items():
        key = (owner(name, replaced) or name, call)
        if key not in old and key not in new:
            order.insert(place, key)
        new.setdefault(key, []).append(row)
        place = order.index(key) + 1
    return [LayerPair(key[0], old.get(key), tuple(new.get(key, ()))) for key in order]


def _by_call(layers: Iterable[LayerRow]) -> dict[tuple[str, int], LayerRow]:
    seen: Counter[str] = Counter()
    rows = {}
    for layer in layers:
        rows[layer.name, seen[layer.name]] = layer
        seen[layer.name] += 1
    return rows
