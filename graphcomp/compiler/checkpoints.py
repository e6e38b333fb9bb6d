"""Files of weights: what is read from them, and which of their tensors are a network's.

A file holds tensors in dictionaries, under the names of the network behind some prefix: a wrapping
(`state_dict`, `net`, `ema`), a wrapper of the network (`module.`, `_orig_mod.`) or the part of a larger one
that it was (`backbone.`, `encoder.`). None of these words is known here. All paths to tensors are spelled out
with dots, and of all prefixes behind which the network's own names are found, the one is taken that has most
of them with the right shapes; it has to have all, and no other may have all of them with other numbers.

No pickle that could run code is ever read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphcomp.base import is_dir, is_file
from graphcomp.errors import LoadError, first_line, some_of
from graphcomp.ir import damaged, negative_variances, without_inputs

__all__ = ["load_weights"]

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
"""Heads that torchvision only trains with."""

COUNTER = "num_batches_tracked"
LISTED = 10

State = dict[str, Tensor]
Places = Mapping[str, tuple[Tensor, str]]
"""Dotted path -> a tensor, and the path of the dictionary that it is in."""


def load_weights(module: nn.Module, path: str | Path) -> str | None:
    """Load a state dict of `module`'s architecture from safetensors or a `torch.save` file, onto its devices.

    Dictionaries around it and prefixes of its names are taken off (see above). Floating point numbers are
    cast to the module's types. Absent BatchNorm counters (files of old versions) are no error; heads that
    torchvision only trains with are ignored.

    Returns:
        Where in the file the weights were, and what beside them was left; None if they are all of it.

    Raises:
        LoadError: and the module is unchanged, if the file cannot be read without running code in it, if
            names or shapes differ, if two sets of weights fit, if a weight is damaged (`ir.damaged`), or if a
            variance is negative.
    """
    path = Path(path)
    own = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    found = _best(path, _read(path), own)
    found = Found(found.prefix, _without_auxiliary(module, found.state), found.beside)
    _require_same_keys(path, module, found.state, own)
    state = {key: tensor.to(own[key].dtype) for key, tensor in found.state.items()}
    _require_numbers(path, module, state)
    module.load_state_dict(state, strict=False)
    return _said(found)


# --- reading ------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    if not is_file(path):
        found = "a directory" if is_dir(path) else "no such file"
        raise LoadError.at(path, found, "a file of weights", "correct the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        raise LoadError.at(path, *_unreadable(path, error)) from error


def _read_safetensors(path: Path) -> State:
    try:
        return without_inputs(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        found = f"an unreadable file ({_what_it_is(path) or first_line(error)})"
        raise LoadError.at(path, found, "safetensors", "fetch or save it again") from error


def _unreadable(path: Path, error: Exception) -> tuple[str, str, str]:
    """What was found, what was expected, what to do; torch's own words advise to run what is read."""
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"objects that need unrestricted pickle, which can run code ({refused[1]})",
            "tensors in dictionaries",
            "load it where you trust it, and save model.state_dict() with torch.save or as safetensors",
        )
    kind = _what_it_is(path)
    if kind is None:
        reason = first_line(error)
        kind = "damaged" if "weights_only" in reason or "unpickl" in reason.lower() else reason[:200]
    return f"an unreadable file ({kind})", "one that torch.save wrote", "fetch or save it again"


def _what_it_is(path: Path) -> str | None:
    """What a file without weights is, if its beginning tells."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the file"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if head.startswith(b"PK"):
        return None if path.suffix != ".safetensors" else "it is a zip archive, as torch.save writes"
    if head[8:9] == b"{" and path.suffix != ".safetensors":
        return "it looks like safetensors; name it so"
    if head.isascii() and head.decode("ascii").isprintable():
        return f"it is text: {head[:32].decode('ascii')!r}"
    return None


# --- which tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """Weights of a network in a file.

    Attributes:
        prefix: of their names in the file, "" or with its last dot.
        state: what stands behind the prefix, beside the network's own tensors in the same dictionaries.
        beside: names of other tensors in these dictionaries.
    """

    prefix: str
    state: State
    beside: tuple[str, ...]


def _best(path: Path, content: Any, own: State) -> Found:
    """The weights behind the prefix that most of the network's tensors stand behind; LoadError if two do."""
    places = dict(_tensors(content))
    if not places:
        raise LoadError.at(
            path, f"no named tensors ({_shape_of(content)})", "a state dict", "save model.state_dict()"
        )
    scores = _scores(places, own)
    whole = [p for p in scores if _complete(_behind(p, places, own), own)]
    for prefix in whole[1:]:
        if not _same(*(_behind(p, places, own) for p in (whole[0], prefix))):
            two = " and ".join(p.rstrip(".") or "the outermost dictionary" for p in (whole[0], prefix))
            raise LoadError.at(
                path,
                f"weights of this network in two places with different numbers, {two}",
                "them once",
                "save the ones that you mean as a file of their own",
            )
    prefix = max(scores, key=lambda p: (scores[p], -p.count("."), -len(p)))
    return _found(prefix, places, own)


def _tensors(content: Any) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """Dotted path -> (tensor, path of the dictionary that it is in), for dictionaries in dictionaries."""
    todo: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()  # what stands in several places is one dictionary, also if it holds itself
    for at, inside in todo:
        if not isinstance(inside, Mapping) or id(inside) in seen:
            continue
        seen.add(id(inside))
        for key, value in inside.items():
            if isinstance(value, Tensor):
                yield f"{at}{key}", (value, at)
            else:
                todo.append((f"{at}{key}.", value))


def _scores(places: Places, own: State) -> dict[str, tuple[int, int, int]]:
    """How well every prefix fits, shortest paths first: how many of the network's tensors stand behind it
    with their shapes, how many by name alone, and how many tensors there are in all.
    """
    sizes = Counter(at for _, at in places.values())
    scores = {at: (0, 0, size) for at, size in sizes.items()}
    for name, (tensor, at) in places.items():
        parts = name.split(".")
        for cut in range(len(parts)):
            key = ".".join(parts[cut:])
            if key in own:
                prefix = name[: len(name) - len(key)]
                fits, named, size = scores.get(prefix, (0, 0, sizes[at]))
                scores[prefix] = (fits + _fits(tensor, own[key]), named + 1, size)
    return scores


def _behind(prefix: str, places: Places, own: State) -> State:
    """The network's tensors, but for counters, as far as they stand behind a prefix."""
    keys = (k for k in own if not k.endswith(COUNTER))
    return {k: places[prefix + k][0] for k in keys if prefix + k in places}


def _complete(found: State, own: State) -> bool:
    return all(k in found and _fits(found[k], own[k]) for k in own if not k.endswith(COUNTER))


def _same(a: State, b: State) -> bool:
    return all(a[k] is b[k] or (a[k].dtype == b[k].dtype and torch.equal(a[k], b[k])) for k in a)


def _found(prefix: str, places: Places, own: State) -> Found:
    holders = {places[prefix + key][1] for key in own if prefix + key in places} or {prefix}
    near = {name: tensor for name, (tensor, holder) in places.items() if holder in holders}
    state = {name.removeprefix(prefix): t for name, t in near.items() if name.startswith(prefix)}
    return Found(prefix, state, tuple(name for name in near if not name.startswith(prefix)))


def _said(found: Found) -> str | None:
    if not found.prefix:
        return None
    left = f"; left out: {some_of(list(found.beside))}" if found.beside else ""
    return f"weights read from what the file calls {found.prefix}*{left}"


def _shape_of(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if not content:
        return "an empty dictionary"
    return ", ".join(f"{str(k)[:40]}: a {type(v).__name__}" for k, v in list(content.items())[:3])


# --- whether they are the network's -------------------------------------------------------------------------


def _without_auxiliary(module: nn.Module, state: State) -> State:
    if not type(module).__module__.startswith("torchvision."):
        return state
    absent = tuple(p for p in AUXILIARY if getattr(module, p[:-1], None) is None)
    return {k: v for k, v in state.items() if not k.startswith(absent)}


def _require_same_keys(path: Path, module: nn.Module, state: State, own: State) -> None:
    missing = [k for k in own if k not in state and not k.endswith(COUNTER)]
    unexpected = [k for k in state if k not in own]
    different = [_difference(k, state[k], own[k]) for k in own if k in state and not _fits(state[k], own[k])]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": different}
    lines = [f"\n  {len(keys)} {what}: {some_of(keys, LISTED)}" for what, keys in problems.items() if keys]
    if lines:
        raise LoadError.at(
            path,
            f"other weights than {type(module).__name__} has",
            f"its {len(own)} keys",
            f"use weights of this very architecture{''.join(lines)}",
        )


def _fits(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.is_floating_point() == expected.is_floating_point()


def _difference(key: str, found: Tensor, expected: Tensor) -> str:
    texts = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, expected)]
    return f"{key} (found {texts[0]}, expected {texts[1]})"


def _require_numbers(path: Path, module: nn.Module, state: State) -> None:
    if bad := list(damaged(module, state)):
        raise LoadError.at(
            path,
            f"NaN or infinite values in {some_of(bad, LISTED)}",
            "finite weights",
            "use a checkpoint that did not diverge",
        )
    if negative := negative_variances(module, state):
        raise LoadError.at(
            path,
            f"negative variances in {some_of(negative, LISTED)}",
            "variances of 0 or more",
            "use a checkpoint that was not damaged",
        )
