"""Files of the user's own: a function or class in one is called, and what fails names file and line."""

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from graphcomp.base.files import is_file
from graphcomp.errors import LoadError


def call_in_file(path: Path, name: str, ready: type | tuple[type, ...] = ()) -> Any:
    """What `name()` in a Python file returns; `name` itself if it is `ready` already.

    Raises:
        LoadError: no such file or function, or anything that fails inside.
    """
    if not is_file(path):
        raise LoadError.at(path, "no such file", "a Python file", "correct the path")
    with _user_code(path):
        made = _factory(_import(path), path, name, ready)
        return made if _is(made, ready) else made()


def _is(made: Any, ready: type | tuple[type, ...]) -> bool:
    """Whether something is an instance; a class may have all that a protocol asks for, and is none."""
    return isinstance(made, ready) and not isinstance(made, type)


def _import(path: Path) -> ModuleType:
    name = f"graphcomp_user_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.fx look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _factory(module: ModuleType, path: Path, name: str, ready: type | tuple[type, ...]) -> Any:
    made = getattr(module, name, None)
    if callable(made) or _is(made, ready):
        return made
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__
    ]
    found = f"{name!r} that cannot be called" if hasattr(module, name) else f"no {name!r}"
    close = difflib.get_close_matches(name, own, 3)
    near = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"it has {', '.join(own) or 'no functions or classes'}"
    )
    raise LoadError.at(path, found, "a function or class without required arguments", near)


@contextmanager
def _user_code(path: Path) -> Iterator[None]:
    """Run user code as `python FILE` would: with its folder importable. What fails becomes a LoadError.

    Modules beside the file are forgotten afterwards, so that another file finds its own neighbours.
    """
    folder, before = str(path.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    except LoadError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadError.at(
            _place(path, error), f"{type(error).__name__}: {error}", "a file that loads", "correct it there"
        ) from error
    finally:
        with suppress(ValueError):  # user code may have taken it out itself
            sys.path.remove(folder)
        for name in [n for n in set(sys.modules) - before if n.partition(".")[0] not in before]:
            if _is_beside(name, Path(folder)):
                del sys.modules[name]


def _is_beside(module: str, folder: Path) -> bool:
    """Whether an imported module is a file or a package in `folder`, not just below it (a .venv, say)."""
    origin = Path(getattr(sys.modules[module], "__file__", None) or "/")
    top = module.partition(".")[0]
    return origin.is_relative_to(folder) and Path(origin.relative_to(folder).parts[0]).stem == top


def _place(path: Path, error: BaseException) -> str:
    """File and line of the innermost frame of the user's own folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folder = str(path.resolve().parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if str(Path(f.filename).resolve().parent) == folder
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(path)
