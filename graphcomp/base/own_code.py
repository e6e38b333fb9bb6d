"""What code computed something: a digest of the sources of a module and of all of ours that it imports.

A version says only what was released. Entries of the cache also have to change while somebody works on the
code that computes them, and should not while they work on other code, so each names the module that computes
it: that module's source decides, and the sources of what it imports, wherever in it, and so on. What it calls
without importing it (a function or an object that it is given) is the caller's to name.

The sources are those on disk when a digest is first asked for in a process; that takes a few milliseconds.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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
    digest = hashlib.sha256()
    for name in sorted(closure(module)):
        digest.update(f"{name} {_source(name)[0]}\n".encode())
    return digest.hexdigest()


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
    return hashlib.sha256(text).hexdigest(), tuple(dict.fromkeys(_imported(text.decode())))


def _imported(text: str) -> Iterator[str]:
    for base, names, plain in IMPORT.findall(text):
        for name in re.split(r"[,\s]+", plain):
            if _file(name) is not None:
                yield name
        listed = re.findall(r"\w+", re.sub(r"#[^\n]*", "", names))
        inside = [f"{base}.{name}" for name in listed if base and _file(f"{base}.{name}") is not None]
        yield from inside
        if base and base != PACKAGE and _file(base) is not None:
            yield base


@cache
def _file(module: str) -> Path | None:
    """Where the source of a module of ours is; None if there is none."""
    package, *parts = module.split(".")
    if package != PACKAGE or not parts:  # the package itself only names what its modules do
        return None
    place = ROOT.joinpath(*parts)
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)
