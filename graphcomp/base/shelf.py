"""Where large tensors wait: in memory, and beyond a budget in files without names that are mapped into it."""

import mmap
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from graphcomp.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


class Shelf:
    """Keeps tensors within a budget.

    What lies in a file is gone from memory until it is read, and the system may take it back at any time.

    Args:
        budget: bytes to keep in memory.

    Attributes:
        kept: bytes that are.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.kept = budget, 0
        self.mapped: set[int] = set()  # addresses

    def keep(self, tensor: "Tensor") -> "Tensor":
        """The tensor, or a copy in a file if memory is spent; for tensors that nothing else views."""
        if self.kept + tensor.nbytes > self.budget and self.can_be_mapped(tensor):
            return self.in_file(tensor)
        if not self.is_mapped(tensor):
            self.kept += tensor.nbytes
        return tensor

    def release(self, tensor: "Tensor | None") -> None:
        """Nobody needs what was kept any more."""
        if tensor is not None and not self.is_mapped(tensor):
            self.kept -= tensor.nbytes

    def can_be_mapped(self, tensor: "Tensor") -> bool:
        """Whether it has to lie in memory no longer."""
        return tensor.device.type == "cpu" and bool(tensor.nbytes) and not self.is_mapped(tensor)

    def is_mapped(self, tensor: "Tensor") -> bool:
        """Whether it lies in a file already."""
        return tensor.untyped_storage().data_ptr() in self.mapped

    def in_file(self, tensor: "Tensor") -> "Tensor":
        """A copy in a file without a name, which goes with the last use of it.

        Raises:
            OutputError: no room on the disk.
        """
        import torch

        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if free < tensor.nbytes:
            raise OutputError(
                f"{folder}: found {free} bytes free, expected {tensor.nbytes} for what does not fit into "
                "memory; set TMPDIR to a larger disk, take fewer samples, or give more --memory"
            )
        with tempfile.TemporaryFile(prefix="graphcomp-") as file:
            file.truncate(tensor.nbytes)
            room = mmap.mmap(file.fileno(), tensor.nbytes)
        copy = torch.frombuffer(room, dtype=tensor.dtype).reshape(tensor.shape)
        copy.copy_(tensor)
        if hasattr(mmap, "MADV_DONTNEED"):  # it is in the file: memory may have it again when it is read
            room.madvise(mmap.MADV_DONTNEED)
        address = copy.untyped_storage().data_ptr()
        self.mapped.add(address)
        weakref.finalize(room, self.mapped.discard, address)
        return copy
