"""Which code an entry of the cache is known by: all that computes it, and nothing else."""

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphcomp
from graphcomp.base import own_code
from graphcomp.base.own_code import closure, digest_of

ROOT = Path(graphcomp.__file__).parent
FILES = sorted(f for place in (ROOT, ROOT / "passes", ROOT / "models") for f in place.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("graphcomp", *(p for p in parts if p != "__init__")))


MODULES = {module_of(file): file for file in FILES}
FACES = {module for module, file in MODULES.items() if file.name == "__init__.py"}


def imported(file: Path) -> Iterator[str]:
    """What Python's own parser finds, wherever it stands, and where Python says that it was made."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: found a relative import"
            if node.module not in FACES:
                yield node.module
            elif node.module in MODULES:
                yield from (made_by(node.module, alias.name) for alias in node.names)


def made_by(face: str, name: str) -> str:
    """The module that it is, or that a class or function is of; "graphcomp" for values, which do not say."""
    if f"{face}.{name}" in MODULES:
        return f"{face}.{name}"
    offered = getattr(importlib.import_module(face), name)
    return offered.__module__ if isinstance(offered, type | types.FunctionType) else "graphcomp"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "graphcomp"])
def test_imports_are_those_that_python_sees(module: str) -> None:
    found = {name for name in imported(MODULES[module]) if name in MODULES and name != "graphcomp"}
    assert found <= set(own_code._source(module)[1])
    assert closure(module) >= found | {module}


def test_all_that_keep_something_name_a_module_of_ours() -> None:
    """The first argument of every `cache.key`: the module itself, or one that there is."""
    calls = [
        (file, first)
        for file in FILES
        for first in re.findall(r"\b(?:cache|disk)\.key\(\s*([\w.]+)", file.read_text())
    ]
    assert len(calls) >= 7
    for file, first in calls:
        assert first == "__name__" or re.search(rf'^{first} = "graphcomp[.\w]+"', file.read_text(), re.M), (
            file
        )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Five modules: a imports b, b imports c inside of a function, and d of a subpackage; e nothing."""
    monkeypatch.setattr(own_code, "ROOT", tmp_path)
    (tmp_path / "sub").mkdir()
    for name, text in {
        "a": "from graphcomp import (\n    b,  # why\n)\n",
        "b": "def f():\n    from graphcomp.c import x\n    import graphcomp.sub.d as d\n",
        "c": "x = 1\n",
        "sub/d": "from graphcomp.b import f  # a circle\n",
        "e": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    caches = (own_code._file, own_code._source, own_code.digest_of)
    for one in caches:
        one.cache_clear()
    yield tmp_path
    for one in caches:
        one.cache_clear()


def forget() -> None:
    """As a new process."""
    for one in (own_code._source, own_code.digest_of):
        one.cache_clear()


@pytest.mark.parametrize("changed", ["a", "b", "c", "sub/d", "e"])
def test_a_change_of_what_computes_it_is_another_key(package: Path, changed: str) -> None:
    assert closure("graphcomp.a") == {f"graphcomp.{m}" for m in ("a", "b", "c", "sub.d")}
    before = digest_of("graphcomp.a")
    with (package / f"{changed}.py").open("a") as file:
        file.write("# mended\n")
    assert digest_of("graphcomp.a") == before, "once a process"
    forget()
    assert (digest_of("graphcomp.a") == before) == (changed == "e")


@pytest.mark.parametrize(
    ("changed", "matters"),
    [
        ("user", True),
        ("room/used", True),
        ("other/renamed", True),
        ("other/__init__", True),  # it says which name stands for what, so it counts as a whole
        ("room/__init__", False),
        ("room/next_door", False),
        ("other/next_door", True),
    ],
)
def test_of_a_room_only_the_files_that_make_what_is_used_matter(
    package: Path, changed: str, matters: bool
) -> None:
    for place, text in {
        "user": "from graphcomp.room import far, one\n",
        "room/__init__": (
            "from graphcomp.other import far\n"
            "from graphcomp.room.next_door import two\n"
            "from graphcomp.room.used import one\n"
        ),
        "room/used": "def one(): ...\n",
        "room/next_door": "def two(): ...\n",
        "other/__init__": (
            "from graphcomp.other import next_door\nfrom graphcomp.other.renamed import near as far\n"
        ),
        "other/renamed": "def near(): ...\n",
        "other/next_door": "",
    }.items():
        (package / place).parent.mkdir(exist_ok=True)
        (package / f"{place}.py").write_text(text)
    own_code._file.cache_clear()
    before = digest_of("graphcomp.user")
    with (package / f"{changed}.py").open("a") as file:
        file.write("# mended\n")
    forget()
    assert (digest_of("graphcomp.user") != before) == matters


def test_no_such_module(package: Path) -> None:
    with pytest.raises(
        ValueError, match=r"graphcomp\.z: found no source file, expected a module of graphcomp"
    ):
        digest_of("graphcomp.z")


def test_measured_times_do_not_hang_on_how_networks_are_read() -> None:
    """A kernel takes as long whatever is done to the rest of the compiler."""
    assert not closure("graphcomp.runtime.kernel") & {
        "graphcomp.budget.model",
        "graphcomp.ir.program",
        "graphcomp.channels.surgery",
    }
