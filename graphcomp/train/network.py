"""A program's network while it is trained: where, in which arithmetic, by how many processes."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from graphcomp.base import distributed
from graphcomp.errors import AnalysisError
from graphcomp.ir import Batch, Program, acts_in_place, editable, in_type, same_memory
from graphcomp.train.normalisation import BatchNorm, synchronise

Precision = Literal["float32", "bf16"]
Layout = Literal["contiguous", "channels_last"]
Statistics = Literal["batch", "frozen"]
"""What normalisations go by in training: those of the batch, or the running ones, which then stay."""

LAYOUTS: dict[Layout, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


@dataclass(frozen=True)
class Mode:
    """How the arithmetic is done; "float32" is the program's own type, "bf16" is torch's autocast."""

    precision: Precision = "float32"
    layout: Layout = "contiguous"

    def __str__(self) -> str:
        return f"{self.precision}, {self.layout}"


def device() -> torch.device:
    """This process's GPU if there is one, else the CPU. The GPU path **has not yet been run**."""
    if distributed.world_size() == 1 and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return distributed.device()


class Network:
    """A copy of a program's network that yields the outputs of some of its nodes beside its own.

    Args:
        program: left as it is.
        watch: names of nodes.
        mode: of the arithmetic.
        training: False for a teacher: eval mode, and no tensor wants a gradient.
        statistics: of a network that is trained.

    Raises:
        AnalysisError: if there is no such node, or it does not yield one tensor.
    """

    def __init__(
        self,
        program: Program,
        watch: Sequence[str],
        mode: Mode,
        *,
        training: bool = True,
        statistics: Statistics = "batch",
    ) -> None:
        self.program, self.watch, self.mode, self.device = program, tuple(watch), mode, device()
        self.statistics = statistics
        self.module = with_watched(program, self.watch).train(training)
        self.module.to(device=self.device, memory_format=LAYOUTS[mode.layout])  # type: ignore[call-overload]
        self.dtype = next((t.dtype for t in self.module.parameters()), torch.float32)
        self.shared = training and distributed.world_size() > 1
        self.run: nn.Module = self.module
        if not training:
            self.module.requires_grad_(False)
        if self.shared:
            synchronise(self.module)
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.run = DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)
        if training:
            self.learn()

    def learn(self) -> None:
        """Into the mode of a training step."""
        self.module.train()
        for norm in self.module.modules():
            if isinstance(norm, BatchNorm) and self.statistics == "frozen" and norm.running_mean is not None:
                norm.eval()

    def __call__(self, inputs: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The network's outputs, and those of the watched nodes by name; float32 at least."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mode.precision == "bf16"):
            outputs, watched = nn.Module.__call__(self.run, *inputs)
        return _wide(outputs), dict(zip(self.watch, _wide(watched), strict=True))

    def predict(self, inputs: Batch) -> Any:
        """The outputs alone, in the program's own precision and on the CPU; the mode is the module's."""
        outputs, _ = self.module(*self.place(inputs))
        return tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, outputs)

    def place(self, inputs: Batch) -> Batch:
        """Inputs in the device, type and layout that the network takes; whole numbers keep their type."""

        def placed(x: Tensor) -> Tensor:
            layout = LAYOUTS[self.mode.layout] if x.ndim == 4 else torch.contiguous_format
            return x.to(self.device, non_blocking=True, memory_format=layout)

        return tuple(map(placed, in_type(inputs, self.dtype)))

    def seed(self, seed: int) -> None:
        """Seed what the network draws (dropout); torch.manual_seed takes long to do it for absent devices."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """While gradients are accumulated and the processes need not exchange them yet."""
        run = self.run
        return run.no_sync() if isinstance(run, DistributedDataParallel) else contextlib.nullcontext()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by dotted name, tied ones under their first."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def to_program(self, tensors: Mapping[str, Tensor]) -> Program:
        """The program with these values; type, memory layout and `requires_grad` are the program's."""
        old = self.program.tensors
        new = {name: torch.empty_like(old[name]).copy_(t.detach()) for name, t in tensors.items()}
        return replace(self.program, module=editable(self.program, new))


def _wide(value: Any) -> Any:
    """Losses are computed in float32 also where the network is not."""
    half = (torch.bfloat16, torch.float16)
    return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.dtype in half else v, value)


def with_watched(program: Program, names: Sequence[str]) -> fx.GraphModule:
    """A copy of the network that returns (what it returned, (output of each named node, …)).

    A node whose output a later one writes into is copied first.
    """
    module = editable(program)
    nodes = {n.name: n for n in module.graph.nodes}
    watched = [_kept(program, module.graph, nodes, name) for name in names]
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = ((output.args[0], tuple(watched)),)
    module.graph.lint()
    module.recompile()
    return module


def _kept(program: Program, graph: fx.Graph, nodes: Mapping[str, fx.Node], name: str) -> fx.Node:
    original = next((n for n in program.graph.nodes if n.name == name), None)
    if original is None or program.shape(original) is None:
        found = "no such node" if original is None else "a node that does not yield one tensor"
        raise AnalysisError(
            f"{name}: found {found}, expected one whose output can be watched; "
            "`graphcomp inspect --nodes` lists them"
        )
    if not _is_overwritten(program, original):
        return nodes[name]
    with graph.inserting_after(nodes[name]):
        return graph.call_method("clone", (nodes[name],))


def _is_overwritten(program: Program, node: fx.Node) -> bool:
    order = list(program.graph.nodes)
    later = order[order.index(node) + 1 :]
    writers = (n for n in later if acts_in_place(program.module, n) and n.all_input_nodes)
    value = program.values[node]
    return any(same_memory(program.values[n.all_input_nodes[0]], value) for n in writers)
