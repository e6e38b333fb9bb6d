"""Which output of the network a folder of images belongs to.

| `?classes=` | the index of a folder |
| --- | --- |
| `sorted` | its place among the folders in alphabetical order, as torchvision's ImageFolder counts |
| `index` | the number that its name is, or begins with: `17`, `0017_goldfish` |
| a file | what the file says; folders may be empty or absent then |
| nothing | `sorted` if there is a folder for each output, `index` if all names have one; an error otherwise |

Folders that say their index themselves need not be the same in train and val.

A file is JSON (`{"n01443537": 1}`, `{"1": ["n01443537", "goldfish"]}`, or a list whose places are the
indices), torchvision's `meta.bin` of ImageNet (synsets in order), or text: a line `folder index` or
`index folder` for each class, separated by a comma, a tab or a space; or a folder a line, in order, with what
else is known of it behind. Lines that begin with # say nothing.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphcomp.base import is_file
from graphcomp.errors import DataError, first_line

__all__ = ["Folders", "folder_classes", "how_to_map"]

CARRIED = re.compile(r"(\d+)(?:[_\-. ].*)?")
SEPARATOR = re.compile(r"\s*[,;\t]\s*|\s+")
SHOWN = 3


def how_to_map(outputs: int) -> str:
    """What to do where folders do not say which output is theirs."""
    return (
        "say whose output each is: add ?classes=FILE with a line `folder index` for each, or begin their "
        f"names with the index (0 to {outputs - 1}), as 0017_goldfish"
    )


@dataclass(frozen=True)
class Folders:
    """Whose output every folder is.

    Attributes:
        index: of every folder.
        count: of the classes, those without a folder as well.
        reading: the value of `classes` that says so.
    """

    index: Mapping[str, int]
    count: int
    reading: str


def folder_classes(place: object, names: Sequence[str], outputs: int | None, wanted: str | None) -> Folders:
    """Whose output every folder is.

    Args:
        place: of the folders, for messages.
        names: of the class folders, in alphabetical order.
        outputs: of the network; None if there is none, or it is no classifier: then `sorted` is the default.
        wanted: the option `classes`.

    Raises:
        DataError: a number of folders that is not that of the outputs, names without an index, an index
            without an output, two ways to count, a file that cannot be read or lacks a folder.
    """
    reading = wanted or ("sorted" if outputs is None else _deduced(place, names, outputs))
    if reading == "sorted":
        if outputs not in (None, len(names)):
            raise _wrong_count(place, names, outputs)
        return Folders({name: i for i, name in enumerate(names)}, len(names), reading)
    index = _required_indices(place, names) if reading == "index" else _from_file(Path(reading), names, place)
    highest = max(index, key=lambda name: index[name])
    if outputs is not None and index[highest] >= outputs:
        raise DataError.at(
            place,
            f"index {index[highest]} for folder {highest!r}",
            f"0 to {outputs - 1}, as the network has {outputs} outputs",
            "correct the mapping, or choose the network that belongs to the data",
        )
    return Folders(index, outputs or index[highest] + 1, reading)


def _wrong_count(place: object, names: Sequence[str], outputs: int | None) -> DataError:
    return DataError.at(
        place,
        f"{len(names)} class folders ({_some(names)})",
        f"one for each of the network's {outputs} outputs",
        how_to_map(outputs or 0),
    )


def _deduced(place: object, names: Sequence[str], outputs: int) -> str:
    """The only way to count that is possible."""
    carried = _carried(names)
    if len(names) != outputs:
        if carried is None or max(carried.values()) >= outputs:
            raise _wrong_count(place, names, outputs)
        return "index"
    if carried is not None and sorted(names, key=lambda name: carried[name]) != list(names):
        raise DataError.at(
            place,
            f"numbers as folders ({_some(names)}), whose alphabetical order is not theirs",
            "one order",
            "add ?classes=sorted for the alphabetical one, as torchvision's ImageFolder counts, "
            "?classes=index if the numbers are the network's outputs, or ?classes=FILE",
        )
    return "sorted"


def carry_indices(names: Iterable[str]) -> bool:
    """Whether all names begin with numbers, different ones."""
    return _carried(names) is not None


def _carried(names: Iterable[str]) -> dict[str, int] | None:
    """The numbers that all names begin with, if they are different ones."""
    found: dict[str, int] = {}
    for name in names:
        match = CARRIED.fullmatch(name)
        if match is None or len(match[1]) > 18:
            return None
        found[name] = int(match[1])
    return found if len(set(found.values())) == len(found) else None


def _required_indices(place: object, names: Sequence[str]) -> dict[str, int]:
    found = _carried(names)
    if found is None:
        without = [name for name in names if not CARRIED.fullmatch(name)]
        what = (
            f"{len(without)} without ({_some(without)})" if without else "some that begin with the same one"
        )
        raise DataError.at(
            place, what, "folders that begin with different numbers", "rename them, or give a file"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


# --- files --------------------------------------------------------------------------------------------------


def _from_file(path: Path, names: Sequence[str], place: object) -> dict[str, int]:
    if not is_file(path):
        raise DataError.at(f"?classes={path}", "no such file", "sorted, index or a file", "correct the path")
    try:
        known = _read(path)
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise anything at all
        raise DataError.at(
            path, f"an unreadable file ({first_line(error)[:80]})", "a mapping", _FORMS
        ) from error
    absent = [name for name in names if name not in known]
    if absent:
        raise DataError.at(
            path,
            f"nothing about {len(absent)} of the {len(names)} folders in {place} ({_some(absent)})",
            f"an index for each (it has {_some(list(known))})",
            "add them, or remove the folders",
        )
    return {name: known[name] for name in names}


_FORMS = "write a line `folder index` for each class, or JSON as {folder: index}"


def _read(path: Path) -> dict[str, int]:
    if path.suffix == ".bin":  # torchvision's: ({synset: names}, synsets of the validation images)
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: i for i, name in enumerate(sorted(map(str, content[0])))}
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith(("{", "[")):
        pairs = list(_json_pairs(path, json.loads(text)))
    else:
        lines = [line.strip() for line in text.splitlines()]
        pairs = _text_pairs([line for line in lines if line and not line.startswith("#")])
    known: dict[str, int] = {}
    for name, index in pairs:
        if known.setdefault(name, index) != index or index < 0:
            raise DataError.at(
                path, f"{name!r} as {known[name]} and as {index}", "one index from 0", "correct it"
            )
    if not known:
        raise DataError.at(path, "no classes", "at least one", _FORMS)
    return known


def _json_pairs(path: Path, content: Any) -> Iterable[tuple[str, int]]:
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(key, str):
            yield key, value
            continue
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise DataError.at(
                path, f"{str(value)[:40]!r} for {key!r}", "an index, a name or a list of names", _FORMS
            )
        for name in names:
            yield name, int(key)


def _text_pairs(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Every line says an index, or none does and their order counts."""
    for pattern in (
        r"(?P<name>.+?)(?:\s*[,;\t]\s*|\s+)(?P<index>\d+)",
        r"(?P<index>\d+)(?:\s*[,;\t]\s*|\s+)(?P<name>.+)",
    ):
        matches = [re.fullmatch(pattern, line) for line in lines]
        if lines and all(matches):
            return [(m["name"], int(m["index"])) for m in matches if m is not None]
        headless = matches[1:] if lines and matches and matches[0] is None else []  # behind a headline
        if headless and all(headless) and "," in lines[0]:
            return [(m["name"], int(m["index"])) for m in headless if m is not None]
    whole = {line: i for i, line in enumerate(lines)}
    first = [SEPARATOR.split(line)[0] for line in lines]
    firsts = {name: i for i, name in enumerate(first)} if len(set(first)) == len(first) else {}
    return list({**firsts, **whole}.items())
