"""What code computed something: a digest of the sources of a module and of all of ours that it imports.

A version says only what was released. Entries of the cache also have to change while somebody works on the
code that computes them, and should not while they work on other code, so each names the module that computes
it: that module's source decides, and the sources of what it imports, wherever in it, and so on. A name that a
room offers is followed through its face to the file that defines it: the room's other files do not matter.
What is called without being imported (a function or an object that is given) is the caller's to name.

The sources are those on disk when a digest is first asked for in a process; that takes a few milliseconds.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from graphcomp.base.digests import sha256

PACKAGE = "graphcomp"
ROOT = Path(__file__).parents[1]

IMPORT = re.compile(
    rf"^[ \t]*(?:from +({PACKAGE}[.\w]*) +import +(\([^)]*\)|[^\n]*)|import +({PACKAGE}[^\n]*))", re.MULTILINE
)
"""One statement; in a text it may be none, which adds a module that does not matter."""


@cache
def digest_of(module: str) -> str:
    """sha256 of a module's source and of all of ours that it imports.

    Args:
        module: its name, such as `graphcomp.measure.calibrate`; the caller's own is `__name__`.

    Raises:
        ValueError: if there is no such module of ours, or no source of it.
    """
    return sha256(f"{name} {_source(name)[0]}\n".encode() for name in sorted(closure(module)))


def closure(module: str) -> set[str]:
    """The names of a module and of all of ours that it imports, and so on."""
    found, left = set[str](), [module]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _source(name)[1]
    return found


@cache
def _source(module: str) -> tuple[str, tuple[str, ...]]:
    """sha256 of a module's source, and which of our modules it imports."""
    path = _file(module)
    if path is None:
        raise ValueError(f"{module}: found no source file, expected a module of {PACKAGE}")
    text = path.read_bytes()
    return sha256([text]), tuple(dict.fromkeys(_imported(text.decode())))


def _imported(text: str) -> Iterator[str]:
    for base, name, _ in _statements(text):
        yield from _defining(base, name)


def _statements(text: str) -> Iterator[tuple[str, str, str]]:
    """Module, name in it and name here of all that a text imports from us; no names for `import module`."""
    for base, names, plain in IMPORT.findall(text):
        yield from ((name, "", "") for name in re.split(r"[,\s]+", plain) if name)
        for name, local in re.findall(r"(\w+)(?: +as +(\w+))?", re.sub(r"#[^\n]*", "", names)):
            yield base, name, local or name


def _defining(base: str, name: str) -> Iterator[str]:
    """The modules that make what is imported as `name` from `base`; several if it is renamed on the way."""
    place = _file(base)
    if name and _file(f"{base}.{name}") is not None:
        yield f"{base}.{name}"
    elif place is not None:
        offers = _statements(place.read_text()) if name and place.name == "__init__.py" else ()
        for further, offered, local in offers:
            if local == name:
                yield from _defining(further, offered)
                if offered == local:
                    return
        yield base


@cache
def _file(module: str) -> Path | None:
    """Where the source of a module of ours is; None if there is none."""
    package, *parts = module.split(".")
    if package != PACKAGE or not parts:  # the package itself only names what its modules do
        return None
    place = ROOT.joinpath(*parts)
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)
