"""How far the outputs of a network move when some of its layers get other weights, one set after the other.

Samples run once, and from each set's first layer on once more: what is in front of it is the same. Results
are kept by content (`base.cache`), some sets at a time, so that an interrupted measurement goes on.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, UntypedStorage, fx, nn
from torch.fx.node import map_aggregate

from graphcomp.base import Progress, part
from graphcomp.base import cache as disk
from graphcomp.data import Split
from graphcomp.ir import Program, editable, evaluating
from graphcomp.measure import by_sample, calibrate

BATCH = 32
"""Samples at a time, at most: what is alive where sets begin is copied."""

AT_ONCE = 16
"""Sets that are measured in one pass over the samples."""

KIND = "sensitivities"
"""Of entries in the cache."""

Key = TypeVar("Key", bound=Hashable)
Change = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> its weight, and what is added to each of its output channels."""


@torch.no_grad()
def movements(
    program: Program, split: Split, changes: Mapping[Key, Change], memory: int, progress: Progress
) -> dict[Key, float]:
    """Squared distance that the outputs move, a sample, by set of changes.

    Outputs are centred: what moves all of a sample's alike does not count (METHODS 9.4).

    Args:
        program: left as it is.
        split: the samples, all of which are looked at.
        changes: of layers whose outputs are (n, channels, …), or (n, …, channels) of linear ones. Each is
            asked for once.
        memory: bytes of changes that are held at once; one is in any case.
        progress: told a message and a fraction.
    """
    content = {"program": program.fingerprint(), "data": split.fingerprint()}
    found, pending, places = dict[Key, float](), dict[Key, Change](), dict[Key, str]()
    runs: _Runs[Key] = _Runs(program)  # one copy of the network for all

    def measure(done: int) -> None:
        tell = part(progress, (done - len(pending)) / len(changes), len(pending) / len(changes))
        for key, moved in runs.over(pending, split, tell).items():
            found[key] = moved
            disk.store(KIND, places[key], {"moved": torch.tensor(moved, dtype=torch.float64)})
        pending.clear()

    held = 0
    for number, (key, change) in enumerate(changes.items()):
        places[key] = disk.key(__name__, **content, change=_digest(change))
        known = disk.load(KIND, places[key])
        if known is not None:
            found[key] = float(known["moved"])
            continue
        size = sum(tensor.nbytes for tensors in change.values() for tensor in tensors)
        if len(pending) == AT_ONCE or (pending and held + size > memory):
            measure(number)
            held = 0
        pending[key], held = change, held + size
    if pending:
        measure(len(changes))
    return {key: found[key] for key in changes}


def _digest(change: Change) -> str:
    digest = hashlib.sha256()
    for layer, tensors in sorted(change.items()):
        for tensor in tensors:
            digest.update(f"{layer} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Runs(fx.Interpreter, Generic[Key]):
    def __init__(self, program: Program) -> None:
        module = editable(program)
        super().__init__(module)
        self.network = module
        self.program, self.samples = program, 0
        self.batch = min(calibrate.batch_size(program), BATCH)
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.offsets: dict[str, Tensor] = {}

    def over(self, changes: Mapping[Key, Change], split: Split, progress: Progress) -> dict[Key, float]:
        due: dict[fx.Node, list[Key]] = {}
        for key, change in changes.items():
            first = next(n for n in self.nodes if n.op == "call_module" and n.target in change)
            due.setdefault(first, []).append(key)
        moved = dict.fromkeys(changes, 0.0)
        seen = 0
        with evaluating(self.network):
            for x, _ in split.batches(self.batch):
                self.args_iter, self.samples = iter(x), len(x[0])
                outputs: dict[Key, Tensor] = {}
                env: dict[fx.Node, Any] = {}
                for i, node in enumerate(self.nodes):
                    for key in due.get(node, ()):
                        outputs[key] = self.changed(changes[key], self.nodes[i:], copied_values(env))
                    self.step(node, env)
                base = self.outputs(env)
                for key, output in outputs.items():
                    moved[key] += float((output - base).double().square().sum())
                seen += len(x[0])
                progress(f"sensitivities: {seen} of {len(split)} samples", seen / len(split))
        return {key: total / len(split) for key, total in moved.items()}

    def outputs(self, env: Mapping[fx.Node, Any]) -> Tensor:
        z = by_sample(self.program, env[self.nodes[-1]], self.samples)
        return z - z.mean(1, keepdim=True)

    def step(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        self.env = env
        env[node] = self.run_node(node)
        if node.op != "output":
            for dead in self.user_to_last_uses.get(node, ()):
                del env[dead]

    def changed(self, change: Change, nodes: Sequence[fx.Node], env: dict[fx.Node, Any]) -> Tensor:
        """Outputs with other weights, from here on."""
        own = {name: cast(Tensor, self.network.get_submodule(name).weight) for name in change}
        before = {name: weight.detach().clone() for name, weight in own.items()}
        for name, (weight, offset) in change.items():
            own[name].copy_(weight)
            self.offsets[name] = offset
        for node in nodes:
            self.step(node, env)
        for name, weight in before.items():
            own[name].copy_(weight)
        self.offsets.clear()
        return self.outputs(env)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With what is added to its channels."""
        value = super().call_module(target, args, kwargs)
        if target not in self.offsets:
            return value
        offset = self.offsets[target].to(value.dtype)
        is_last = isinstance(self.fetch_attr(target), nn.Linear)
        return value + (offset if is_last else offset.reshape(-1, *[1] * (value.ndim - 2)))


def copied_values(env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Values that changes in place do not reach; what views one memory still does."""
    memo: dict[int, UntypedStorage] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in memo:
            memo[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
        new = torch.empty(0, dtype=value.dtype)
        return new.set_(memo[storage._cdata], value.storage_offset(), value.shape, value.stride())

    return {node: map_aggregate(value, copied) for node, value in env.items()}
