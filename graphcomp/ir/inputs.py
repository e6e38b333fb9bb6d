"""Random inputs of the kind that a network takes.

Floating point inputs are standard normal. Whole numbers come from the range that the network works on: token
ids below the size of the embedding that they index, those that a one-hot code is made of by comparison, 0 to
255 where nothing bounds them (an image), 0 and 1 for masks. What bounds them is not argued operator by
operator but run: the part of the network that computes with whole numbers, on tensors full of one.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from graphcomp.ir.program import Program
from graphcomp.ir.ranges import Numbers
from graphcomp.ir.text import op_name

MOST = 2**20
"""A network that takes this number takes any."""

BYTE = 255


def fresh_inputs(
    program: Program, batch: int, seed: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Seeded random inputs of the program's shapes.

    Args:
        program: its example inputs say how many inputs there are, and of what shape and type.
        batch, seed: how many samples, and which.
        dtype: of the inputs that are floating point; None for each example's own.
    """
    generator = torch.Generator().manual_seed(seed)

    def fresh(example: Tensor, numbers: Numbers | None) -> Tensor:
        shape = (batch, *example.shape[1:])
        if example.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype or example.dtype)
        return example.expand(shape).clone() if numbers is None else numbers.draw(shape, generator)

    return tuple(map(fresh, program.example_inputs, numbers_of(program)))


def input_names(program: Program) -> list[str]:
    """What each input is called: as its file does, else as forward's argument; `input` if there is one."""
    if program.interface.inputs:
        return [port.name for port in program.interface.inputs]
    names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    return ["input"] if len(program.example_inputs) == 1 else names[: len(program.example_inputs)]


def numbers_of(program: Program) -> tuple[Numbers | None, ...]:
    """For every input the whole numbers that it may hold.

    None for floating point, and where the example's are all that is known to work.
    """
    if program not in _KNOWN:
        is_whole = any(map(_is_whole, program.example_inputs))
        _KNOWN[program] = _find(program) if is_whole else (None,) * len(program.example_inputs)
    return _KNOWN[program]


def _find(program: Program) -> tuple[Numbers | None, ...]:
    examples = program.example_inputs
    found = [
        None if x.is_floating_point() or x.is_complex() else _range(program, i)
        for i, x in enumerate(examples)
    ]
    for end in ("low", "high"):  # several inputs may index one table together
        pairs = zip(examples, found, strict=True)
        filled = [x if n is None else torch.full_like(x, getattr(n, end)) for x, n in pairs]
        if not _takes(program, filled):
            return (None,) * len(examples)
    return tuple(found)


def _range(program: Program, index: int) -> Numbers | None:
    example = program.example_inputs[index]
    if example.dtype is torch.bool:
        return Numbers(torch.bool, 0, 1)
    smallest, largest = (int(x) for x in (example.min(), example.max()))
    most = min(MOST, torch.iinfo(example.dtype).max)

    def takes(number: int) -> bool:
        inputs = list(program.example_inputs)
        inputs[index] = torch.full_like(example, number)
        return _takes(program, inputs)

    low = next((n for n in (0, smallest) if takes(n)), None)
    if low is None:
        return None
    if takes(most):
        codes = _codes(program, index)
        if codes is not None:
            return Numbers(example.dtype, low, max(low, min(codes, most)))
        is_mask = example.dtype is not torch.uint8 and smallest >= 0 and largest <= 1
        return Numbers(example.dtype, low, max(low, 1 if is_mask else min(BYTE, most)))
    high = low
    while most - high > 1:  # takes(high), and not takes(most)
        middle = (high + most) // 2
        high, most = (middle, most) if takes(middle) else (high, middle)
    ends = low == torch.iinfo(example.dtype).min or not takes(low - 1)  # Python also counts from the end
    return Numbers(example.dtype, low, high, (low if ends else None, high))


def _codes(program: Program, index: int) -> int | None:
    """The largest of the numbers that an input is compared with, all at once: a one-hot code written out."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    follows = {placeholders[index]}
    found: list[int] = []
    for node in program.graph.nodes:
        if not any(n in follows for n in node.all_input_nodes):
            continue
        if op_name(program, node) == "eq":
            held = [program.tensors[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr"]
            found += [int(t.max()) for t in held if t.numel() > 1 and _is_whole(t)]
        elif _is_whole(program.values[node]):
            follows.add(node)
    return max(found, default=None)


@torch.no_grad()
def _takes(program: Program, inputs: Sequence[Tensor]) -> bool:
    """Whether what a network computes with whole numbers works on these inputs.

    Activations are unknown here; zeros stand for them where whole numbers index them.
    """
    known: dict[fx.Node, Any] = {}
    given = iter(inputs)

    def load(node: fx.Node) -> Any:
        value = program.values[node]
        if node in known or not isinstance(value, Tensor):
            return known.get(node, value)
        return torch.zeros((), dtype=value.dtype).expand(value.shape)

    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = next(given, None)
            if value is not None and not value.is_floating_point():
                known[node] = value.clone()
        elif node.op == "get_attr":
            known[node] = program.tensors[str(node.target)]
        elif node.op != "output" and _is_of_numbers(program, node, known):
            try:
                result = _run(program, node, load)
            except (RuntimeError, IndexError, ValueError, TypeError):
                return False
            if _is_whole(result) and not any(_is_unknown(program, n, known) for n in node.all_input_nodes):
                known[node] = result
    return True


def _is_of_numbers(program: Program, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    """Whether a node reads, or makes, whole numbers that are known."""
    if any(n in known and _is_whole(known[n]) for n in node.all_input_nodes):
        return True
    unknown = any(_is_unknown(program, n, known) for n in node.all_input_nodes)
    return _is_whole(program.values[node]) and not unknown


def _is_unknown(program: Program, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    return node not in known and _holds(program.values[node])


def _holds(value: Any) -> bool:
    return isinstance(value, Tensor) or isinstance(value, tuple | list) and any(map(_holds, value))


def _is_whole(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_whole, value))
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _run(program: Program, node: fx.Node, load: Any) -> Any:
    args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
    if node.op == "call_module":
        return program.layer(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


_KNOWN: WeakKeyDictionary[Program, tuple[Numbers | None, ...]] = WeakKeyDictionary()
