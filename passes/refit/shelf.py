"""Where activations wait: in memory, and beyond a budget in files that are mapped."""

import shutil
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from graphcomp.errors import OutputError
from graphcomp.passes.refit.chunks import Chunk


class Shelf:
    """Where tensors wait: in memory, and beyond a budget in files that are mapped."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.count = folder, budget, 0
        self.kept = 0  # bytes in memory
        self.waiting: dict[Chunk, int] = {}  # bytes in memory, chunk by chunk
        self.mapped: set[int] = set()  # addresses

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy in a file if memory is spent; for tensors that nothing else views."""
        if self.kept + tensor.nbytes > self.budget and self._can_be_mapped(tensor):
            return self._mapped(tensor)
        self.kept += tensor.nbytes
        return tensor

    def release(self, tensor: Tensor | None) -> None:
        """Nobody needs what was kept any more."""
        if tensor is not None and not self._is_mapped(tensor):
            self.kept -= tensor.nbytes

    def settle(self, chunk: Chunk, node: fx.Node) -> None:
        """Move what a node has just yielded to a file if memory is spent."""
        self.waiting[chunk] = self._in_memory(chunk)
        value = chunk.env.get(node)
        if self.kept + sum(self.waiting.values()) <= self.budget or not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()._cdata
        views = [t for n, t in chunk.env.items() if n is not node and isinstance(t, Tensor)]
        is_shared = any(t.untyped_storage()._cdata == storage for t in views)
        if self._can_be_mapped(value) and value.is_contiguous() and not is_shared:
            chunk.env[node] = self._mapped(value)
            self.waiting[chunk] = self._in_memory(chunk)

    def _in_memory(self, chunk: Chunk) -> int:
        found = {t.untyped_storage()._cdata: t for t in chunk.waiting() if not self._is_mapped(t)}
        return sum(t.untyped_storage().nbytes() for t in found.values())

    def _can_be_mapped(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and bool(tensor.nbytes) and not self._is_mapped(tensor)

    def _is_mapped(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.mapped

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy in a file without a name, which goes with the last use of it.

        Raises:
            OutputError: no room on the disk.
        """
        free = shutil.disk_usage(self.folder).free
        if free < tensor.nbytes:
            raise OutputError(
                f"{self.folder}: found {free} bytes free, expected {tensor.nbytes} for activations that do "
                "not fit into memory; set TMPDIR to a larger disk, or take fewer samples"
            )
        path = self.folder / str(self.count)
        self.count += 1
        array = np.memmap(path, mode="w+", dtype=np.uint8, shape=(tensor.nbytes,))
        path.unlink()
        copy = torch.from_numpy(array).view(tensor.dtype).reshape(tensor.shape)
        copy.copy_(tensor)
        address = copy.untyped_storage().data_ptr()
        self.mapped.add(address)
        weakref.finalize(array, self.mapped.discard, address)
        return copy
