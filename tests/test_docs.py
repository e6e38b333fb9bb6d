"""The documents are right: their code runs, and the files that they name are there."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import graphcomp
from graphcomp.compiler.recipe import parse_passes
from graphcomp.passes import PASSES
from tests.passes import test_golden as golden
from tests.running import run_pass
from tests.tiny import context

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGE = (ROOT / "docs/writing-a-pass.md").read_text()

# ---- docs/writing-a-pass.md


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


FILES = {code.partition("\n")[0].removeprefix("# "): code for code in blocks(PAGE, "python")}
"""Code by the file that its first line names."""


def module_name(path: str) -> str:
    name = path.removesuffix(".py").replace("/", ".")
    return f"graphcomp.{name}" if name.startswith("passes.") else name


@pytest.fixture(scope="module")
def written() -> Iterator[dict[str, ModuleType]]:
    """The page's modules by path, as if the files were there; what it adds to the goldens is in a copy."""
    with pytest.MonkeyPatch.context() as patch:
        made: dict[str, ModuleType] = {}
        for path, code in FILES.items():
            made[path] = module = ModuleType(module_name(path))
            if path == "tests/passes/test_golden.py":
                vars(module).update({**vars(golden), "EXAMPLES": dict(golden.EXAMPLES)})
            else:
                assert not (ROOT / path).exists(), f"{path}: the example is a file of the project"
                patch.setitem(sys.modules, module.__name__, module)
            exec(compile(code, path, "exec"), vars(module))
        yield made


TESTS = [
    (path, node.name)
    for path, code in FILES.items()
    for node in ast.parse(code).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_the_tests_of_the_page_pass(written: dict[str, ModuleType], path: str, name: str) -> None:
    test = vars(written[path])[name]
    assert isinstance(test, FunctionType)
    test()


def test_the_page_has_passes_with_tests() -> None:
    passes = {Path(path).stem for path in FILES if path.startswith("passes/")}
    assert passes == {"fpgm", "centre"}
    assert {path for path, _ in TESTS} == {f"tests/passes/test_{name}.py" for name in passes}


def test_the_golden_of_the_page(written: dict[str, ModuleType]) -> None:
    """The passes work by their names, and the golden is what the goldens' test would write."""
    table: dict[str, Any] = {
        **PASSES,
        "centre": vars(written["passes/centre.py"])["Centre"],
        "fpgm": vars(written["passes/fpgm.py"])["FPGM"],
    }
    example = vars(written["tests/passes/test_golden.py"])["EXAMPLES"]["centre"]
    before = golden.build(example.net)
    (pass_,) = parse_passes(example.line, table)
    _, plan, after = run_pass(pass_, before, context())
    assert blocks(PAGE, "text") == [golden.text(example.line, before, plan, after)]
    (criterion,) = parse_passes("fpgm{ratio=0.5, multiple=1}", table)
    run_pass(criterion, before, context())


def test_the_page_imports_from_the_public_rooms_only() -> None:
    for path, code in FILES.items():
        if path.startswith("passes/"):
            modules = [n.module for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)]
            ours = {str(m) for m in modules if str(m).startswith("graphcomp")}
            assert ours <= {"graphcomp", "graphcomp.bases"}, path


# ---- README.md


def test_what_the_readme_calls_is_public() -> None:
    called = set(re.findall(r"\bgraphcomp\.(\w+)", "".join(blocks(README, "python"))))
    assert len(called) >= 5 and called <= set(graphcomp.__all__)


# ---- CONTRIBUTING.md

MOST_LINES = 3500
"""Of the core: what fits into an afternoon."""


def named_paths(page: str) -> set[str]:
    """What stands in backticks and has a folder in front of it."""
    return {t for t in re.findall(r"`([^`\s]+)`", page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/[\w.-]*", t)}


PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if p.name != "CHANGELOG.md"  # which tells of what was
)
ELSEWHERE = {"program", "plans", "checkpoints", "cells", ".."}
"""What a run writes, or others do."""


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_is_there(page: str) -> None:
    ours = {p for p in named_paths((ROOT / page).read_text()) if p.partition("/")[0] not in ELSEWHERE}
    assert [p for p in sorted(ours) if not (ROOT / p).exists()] == []


def test_the_core_can_be_read_in_an_afternoon() -> None:
    order = re.findall(r"^\d+\. `([^`]+)`", CONTRIBUTING, re.MULTILINE)
    assert len(order) == len(set(order)) >= 9
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in order}
    total = sum(lines.values())
    assert total <= MOST_LINES, (
        f"found {total} lines, expected at most {MOST_LINES}: {lines}; move out of these files what need "
        "not be read to understand the core"
    )


def rooms() -> dict[str, set[str]]:
    """Room -> the packages that it may use, from the table."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\|([^|]*)\|$", CONTRIBUTING, re.MULTILINE)
    return {room: set(filter(None, map(str.strip, packages.split(",")))) for room, packages in rows}


def used_packages(tree: ast.AST) -> set[str]:
    """Packages of others that a file imports."""
    nodes = list(ast.walk(tree))
    modules = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    modules += [str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)]
    return {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"graphcomp"}


def test_the_table_has_the_rooms_in_the_order_that_is_held() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = project["tool"]["importlinter"]["contracts"]
    assert list(rooms()) == contract["layers"]


@pytest.mark.parametrize(("room", "allowed"), rooms().items())
def test_a_room_uses_the_packages_of_the_table(room: str, allowed: set[str]) -> None:
    place = ROOT / "graphcomp" / room
    files = sorted(place.resolve().rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    found = {str(f.relative_to(ROOT)): used_packages(ast.parse(f.read_text())) - allowed for f in files}
    assert {file: packages for file, packages in found.items() if packages} == {}


def test_packages_of_others_are_found() -> None:
    """The helper sees what it is for."""
    tree = ast.parse("import os, torch.nn\ndef f():\n    from ray.util import x\n    import graphcomp.ir\n")
    assert used_packages(tree) == {"torch", "ray"}
