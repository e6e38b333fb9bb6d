"""What arguments there may be in a saved program: a schema for every function, method, layer and constructor.

Not written by hand but read off torch: native operators describe themselves in the registry of TorchScript,
functions of Python by their signatures. A schema says how many arguments there are, what they are called, and
which of them may be more than data (numbers, tensors, and lists of them): words that choose a mode, constants
of torch, indices. Parameters that take something else (callables, generators, `out=`) are in no schema.
"""

import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

WORD = "word"  # chooses among what a function does: a mode, an einsum equation, a device
TEXT = "text"  # is compared or shown, never interpreted
CONSTANT = "constant"  # dtype, layout, memory format, device
INDEX = "index"  # slices and ellipsis

_WORD = re.compile(r"[\w\-,.:> ]{0,200}", re.ASCII)
_CONSTANT_NAMES = frozenset({"dtype", "layout", "memory_format", "device"})
_ALIASES = {"dim": "axis", "keepdim": "keepdims", "self": "input"}  # what the Python binding takes as well
_FACTORY_NAMES = ("requires_grad", "pin_memory")
_NO_DATA = re.compile(r"Callable|Options|Generator|tracker", re.ASCII)
_STRINGS = re.compile(r"\bstr\b|Literal", re.ASCII)

Kinds = frozenset[str]
DATA: Kinds = frozenset()


@dataclass(frozen=True)
class Schema:
    """Which arguments a callable takes.

    Attributes:
        places: what the positional arguments may be besides data, in order.
        names: the same by name.
        rest: what further positional arguments may be; None if there are none.
        least: how many positional arguments there are at least.
    """

    places: tuple[Kinds, ...] = ()
    names: Mapping[str, Kinds] = field(default_factory=dict)
    rest: Kinds | None = None
    least: int = 0

    def flaw(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """`found X, expected Y` for the first argument that the schema has no room for; None if it fits."""
        if len(args) < self.least or (len(args) > len(self.places) and self.rest is None):
            more = "" if self.rest is None else " or more"
            return f"found {len(args)} arguments, expected {self.least} to {len(self.places)}{more}"
        for place, value in enumerate(args):
            kinds = self.places[place] if place < len(self.places) else self.rest
            found = _stranger(value, kinds or DATA)
            if found is not None:
                return f"found {found} as argument {place}, expected {_expected(kinds or DATA)}"
        for name, value in kwargs.items():
            if name not in self.names:
                return f"found argument {name!r}, expected one of {sorted(self.names)}"
            found = _stranger(value, self.names[name])
            if found is not None:
                return f"found {found} as {name}, expected {_expected(self.names[name])}"
        return None


def _expected(kinds: Kinds) -> str:
    return " or ".join(["numbers, nodes, and lists of them", *sorted(kinds)])


def _stranger(value: Any, kinds: Kinds) -> str | None:
    """The first thing in `value` that is neither data nor one of `kinds`."""
    if isinstance(value, str):
        known = TEXT in kinds or (WORD in kinds and _WORD.fullmatch(value) is not None)
        return None if known else f"text {value!r:.60}"
    if value is None or isinstance(value, bool | int | float | fx.Node):
        return None
    if isinstance(value, tuple | list):
        return next((f for f in (_stranger(v, kinds) for v in value) if f is not None), None)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.device):
        return None if CONSTANT in kinds else str(value)
    if isinstance(value, slice) and INDEX in kinds:
        return _stranger((value.start, value.stop, value.step), DATA)
    return None if value is ... and INDEX in kinds else f"a {type(value).__name__}"


# ---- native operators ------------------------------------------------------------------------------------


def native(names: Sequence[str], *, method: bool) -> Schema | None:
    """The schema of the native operators `aten::name`, all overloads together; None if there are none.

    Args:
        names: without `aten::`.
        method: the first argument is the receiver.
    """
    overloads = [s for n in names for s in torch._C._jit_get_schemas_for_operator(f"aten::{n}")]
    places: list[set[str]] = []
    known: dict[str, set[str]] = {}
    rest = False
    for overload in overloads:
        arguments = [a for a in overload.arguments if not a.is_out]
        positional = [a for a in arguments if not a.kwarg_only]
        for i, a in enumerate(positional):
            if i == len(places):
                places.append(set())
            places[i] |= _native_kinds(a.name, str(a.type))
            rest = rest or (i <= method and "List[int]" in str(a.type))  # x.view(2, 3), torch.ones(2, 3)
        for a in arguments:
            for name in (a.name, _ALIASES.get(a.name, a.name)):
                known.setdefault(name, set()).update(_native_kinds(a.name, str(a.type)))
    if not overloads:
        return None
    if "dtype" in known:
        known |= {name: set() for name in _FACTORY_NAMES}
    known.pop("generator", None)
    return Schema(
        places=tuple(map(frozenset, places)),
        names={name: frozenset(kinds) for name, kinds in known.items()},
        rest=DATA if rest else None,
        least=int(method),
    )


def _native_kinds(name: str, kind: str) -> Kinds:
    if name == "device" or "Device" in kind:
        return frozenset({WORD, CONSTANT})
    if name in _CONSTANT_NAMES:
        return frozenset({CONSTANT})
    return frozenset({WORD}) if "str" in kind or kind in ("Any", "AnyEnumType") else DATA


# ---- functions of Python ---------------------------------------------------------------------------------


def of_signature(function: Callable[..., Any], skip: int = 0) -> Schema:
    """The schema of a function by its signature.

    Args:
        function: of Python, or one of C that has a signature.
        skip: how many parameters to leave out at the front (`self`).
    """
    places: list[Kinds] = []
    names: dict[str, Kinds] = {}
    rest: Kinds | None = None
    least = 0
    for p in list(inspect.signature(function).parameters.values())[skip:]:
        if p.kind is p.VAR_KEYWORD or _is_closed(p):
            if p.kind is p.POSITIONAL_OR_KEYWORD:
                break  # what comes after it cannot be reached by place; by name it is rare enough
            continue
        kinds = _signature_kinds(p)
        if p.kind is p.VAR_POSITIONAL:
            rest = kinds
            continue
        if p.kind is not p.KEYWORD_ONLY:
            places.append(kinds)
            least += p.default is p.empty and p.kind is p.POSITIONAL_ONLY
        if p.kind is not p.POSITIONAL_ONLY:
            names[p.name] = kinds
    return Schema(tuple(places), names, rest, least)


def _is_closed(p: inspect.Parameter) -> bool:
    text = _annotation(p)
    return p.name in ("out", "generator", "tracker") or _NO_DATA.search(text) is not None


def _signature_kinds(p: inspect.Parameter) -> Kinds:
    kinds: set[str] = set()
    if p.name in _CONSTANT_NAMES:
        kinds.add(CONSTANT)
    if _STRINGS.search(_annotation(p)) or isinstance(p.default, str) or _annotation(p) == "typing.Any":
        kinds.add(WORD)
    return frozenset(kinds)


def _annotation(p: inspect.Parameter) -> str:
    if p.annotation is p.empty:
        return ""
    return p.annotation.__name__ if isinstance(p.annotation, type) else str(p.annotation)


# ---- by hand: what describes itself nowhere ---------------------------------------------------------------


def positional(least: int, most: int | None = None, kinds: Kinds = DATA) -> Schema:
    """A schema of positional arguments only."""
    most = least if most is None else most
    return Schema((kinds,) * most, {}, None, least)


_UNARY = positional(1)
_BINARY = positional(2)
_COMPARING = positional(2, kinds=frozenset({TEXT, CONSTANT}))
_GETITEM = Schema((DATA, frozenset({INDEX, TEXT})), {}, None, 2)
_SETITEM = Schema((DATA, frozenset({INDEX}), DATA), {}, None, 3)
_UNARY_OPERATORS = frozenset("abs index inv invert neg not_ pos truth".split())
_COMPARISONS = frozenset("eq ne is_ is_not contains".split())


def of_operator(name: str) -> Schema:
    """Of a function of `operator`, or of a tensor's method of that name (`add` for `__add__`)."""
    if name in _UNARY_OPERATORS:
        return _UNARY
    if name in _COMPARISONS:
        return _COMPARING
    return {"getitem": _GETITEM, "setitem": _SETITEM}.get(name, _BINARY)


BUILTINS = {
    "abs": _UNARY,
    "bool": _UNARY,
    "divmod": _BINARY,
    "float": _UNARY,
    "int": _UNARY,
    "len": _UNARY,
    "max": Schema(rest=DATA, least=1),
    "min": Schema(rest=DATA, least=1),
    "pow": positional(2, 3),
    "round": positional(1, 2),
    "sum": positional(1, 2),
}
"""Schemas of functions of `builtins`; `max` and `min` without `key`, so that nothing is called."""


def of_math(function: Callable[..., Any]) -> Schema:
    """Of a function of `math`: numbers, by place."""
    try:
        schema = of_signature(function)
    except ValueError:  # a few say nothing of themselves
        return Schema(rest=DATA, least=1)
    return Schema(schema.places, {}, schema.rest, schema.least)


_UNIQUE = ("input", "sorted", "return_inverse", "return_counts", "dim")
_UNIQUE_CONSECUTIVE = ("input", "return_inverse", "return_counts", "dim")
_ASSERT = Schema((DATA, frozenset({TEXT})), {"condition": DATA, "message": frozenset({TEXT})}, None, 0)
_EINSUM = Schema((frozenset({WORD}),), {}, DATA, 1)


def _plain(names: Sequence[str]) -> Schema:
    return Schema((DATA,) * len(names), dict.fromkeys(names, DATA))


_BY_HAND: dict[Any, Schema] = {
    torch._assert: _ASSERT,
    torch.einsum: _EINSUM,
    torch.unique: _plain(_UNIQUE),
    torch.unique_consecutive: _plain(_UNIQUE_CONSECUTIVE),
}


def of_torch(function: Callable[..., Any], namespace: str, name: str) -> Schema | None:
    """Of a function of torch; None if it does not say what it takes.

    Args:
        function: the function.
        namespace: "", or "linalg", "special", "fft".
        name: within it.
    """
    if function in _BY_HAND:
        return _BY_HAND[function]
    choosing = getattr(F, f"{name}_with_indices", None)  # `boolean_dispatch` hides the signature
    if inspect.isfunction(choosing) and function is getattr(F, name, None):
        return of_signature(choosing)
    if inspect.isfunction(function):
        return of_signature(function)
    return native([f"{namespace}_{name}"] if namespace else [name], method=False)


_CAST = Schema((DATA,), {"memory_format": frozenset({CONSTANT})}, None, 1)
_CASTS = "bfloat16 bool byte cdouble cfloat char double float half int long short cpu cuda".split()
_METHODS: dict[str, Schema] = {
    **dict.fromkeys(_CASTS, _CAST),
    **dict.fromkeys("dim_order ndimension nelement tolist".split(), _UNARY),
    "type": Schema(
        (DATA, frozenset({WORD, CONSTANT}), DATA),
        {"dtype": frozenset({WORD, CONSTANT}), "non_blocking": DATA},
        None,
        1,
    ),
    "new_tensor": Schema(
        (DATA, DATA), {"data": DATA, "dtype": frozenset({CONSTANT}), "requires_grad": DATA}, None, 1
    ),
    "unique": Schema((DATA,) * 5, dict.fromkeys(_UNIQUE[1:], DATA), None, 1),
    "unique_consecutive": Schema((DATA,) * 4, dict.fromkeys(_UNIQUE_CONSECUTIVE[1:], DATA), None, 1),
}


def of_method(name: str) -> Schema | None:
    """Of a method of `torch.Tensor`, the receiver included; None if it does not say what it takes."""
    if name.startswith("__"):
        plain = name.strip("_")
        reflected = plain[1:] if plain.startswith("r") and plain != "rshift" else plain
        return of_operator(plain if hasattr(operator, plain) else reflected)
    if name in _METHODS:
        return _METHODS[name]
    written = getattr(Tensor, name)
    native_schema = native([name], method=True)
    if not inspect.isfunction(written):
        return native_schema
    schema = of_signature(written, skip=1)
    rest = schema.rest if native_schema is None or native_schema.rest is None else DATA
    return Schema((DATA, *schema.places), schema.names, rest, 1)
