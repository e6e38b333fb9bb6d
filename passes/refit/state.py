"""What was fitted before an interruption: a file a layer, its row and its tensors."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graphcomp.base import load_state, remove, save_state
from graphcomp.records import FittedLayer

STATE = "fitted"
"""Name of the folder in the working directory."""


class State:
    """The layers of one piece of work that are done.

    Args:
        workdir: where their folder is; None: nothing is kept.
        work: identity of the work; what belongs to another is not read.
    """

    def __init__(self, workdir: Path | None, work: str) -> None:
        self.folder, self.work = workdir and workdir / STATE, work
        self.count = 0

    def read(self) -> list[tuple[FittedLayer, dict[str, Tensor]]]:
        """All that was written, in order."""
        found = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            state = load_state(path, self.work)
            if state is not None:
                found.append((FittedLayer.model_validate(state[0]), state[1]))
        self.count = len(found)
        return found

    def write(self, row: FittedLayer, tensors: Mapping[str, Tensor]) -> None:
        """Add a layer."""
        if self.folder is not None:
            path = self.folder / f"{self.count:05}.safetensors"
            save_state(path, self.work, row.model_dump(mode="json"), tensors)
            self.count += 1

    def clear(self) -> None:
        """Forget all: the work is done."""
        if self.folder is not None:
            remove(self.folder)
