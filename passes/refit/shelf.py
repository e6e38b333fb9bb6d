"""Where activations wait: in memory, and beyond a budget in files that are mapped."""

from torch import Tensor, fx

from graphcomp.base import Shelf
from graphcomp.passes.refit.chunks import Chunk


class Waiting(Shelf):
    """What is kept, and what chunks hold where they are, within one budget."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.waiting: dict[Chunk, int] = {}  # bytes in memory, chunk by chunk

    def begin(self, chunk: Chunk) -> None:
        """Take its samples in."""
        self.waiting[chunk] = self._in_memory(chunk)
        if self._is_full:
            chunk.inputs = tuple(self.in_file(x) if self.can_be_mapped(x) else x for x in chunk.inputs)
            self.waiting[chunk] = self._in_memory(chunk)

    def settle(self, chunk: Chunk, node: fx.Node) -> None:
        """Move what a node has just yielded to a file if memory is spent."""
        self.waiting[chunk] = self._in_memory(chunk)
        value = chunk.env.get(node)
        if not self._is_full or not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()._cdata
        views = [t for n, t in chunk.env.items() if n is not node and isinstance(t, Tensor)]
        is_shared = any(t.untyped_storage()._cdata == storage for t in views)
        if self.can_be_mapped(value) and value.is_contiguous() and not is_shared:
            chunk.env[node] = self.in_file(value)
            self.waiting[chunk] = self._in_memory(chunk)

    @property
    def _is_full(self) -> bool:
        return self.kept + sum(self.waiting.values()) > self.budget

    def _in_memory(self, chunk: Chunk) -> int:
        found = {t.untyped_storage()._cdata: t for t in chunk.waiting() if not self.is_mapped(t)}
        return sum(t.untyped_storage().nbytes() for t in found.values())
