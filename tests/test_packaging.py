"""The repository's own rules: packaging, layers, safety, versions."""

import ast
import hashlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import graphcomp
from graphcomp import errors, passes
from graphcomp.errors import GraphcompError
from graphcomp.runtime import doctor, machine

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ON_TOP = ("passes", "models", "recipes")
"""Rooms that lie at the top of the repository."""
PACKAGE_FILES = sorted(
    p
    for folder in ("graphcomp", *ON_TOP)
    for p in (ROOT / folder).rglob("*.py")
    if not any(p.is_relative_to(ROOT / "graphcomp" / name) for name in ON_TOP)
)
FRONTS = {
    "graphcomp.api",
    "graphcomp.cli.recipes",
    "graphcomp.cli.study",
    "graphcomp.compiler.models",
}  # what offers the methods and networks


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "graphcomp" else ("graphcomp", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE_FILES}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def imported(tree: ast.AST, *, lazy: bool) -> set[str]:
    """Modules of this package that a file imports; `lazy` for those inside functions too."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            whole = {f"{node.module}.{a.name}" for a in node.names}
            found |= {m if m in FILES else str(node.module) for m in whole}
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return {m for m in found if m in FILES}


# ---------------------------------------------------------------------- packages


def test_every_package_is_declared() -> None:
    """A folder with an `__init__.py` that is missing here would not be installed."""
    folders = {module_name(path) for path in PACKAGE_FILES if path.name == "__init__.py"}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", ON_TOP)
def test_links_for_tools_that_read_the_disk(name: str) -> None:
    link = ROOT / "graphcomp" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


def test_package_data_is_there() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package, patterns in data.items():
        default = package.replace(".", "/")
        folder = ROOT / PROJECT["tool"]["setuptools"]["package-dir"].get(package, default)
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


OWNER = "Copyright 2026 The graphcomp authors"
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt."""


def test_the_licence_is_whole_and_travels_with_every_distribution() -> None:
    """`license-files` puts it into wheels and source archives alike."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.count(OWNER) == 1
    official = text.replace(OWNER, "Copyright [yyyy] [name of copyright owner]")
    assert hashlib.sha256(official.encode()).hexdigest() == APACHE
    project = PROJECT["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert not [c for c in project.get("classifiers", []) if c.startswith("License ::")]  # PEP 639: not both
    assert "(LICENSE)" in (ROOT / "README.md").read_text()
    # setuptools knows SPDX expressions since 77.
    (built_by,) = PROJECT["build-system"]["requires"]
    assert int(built_by.partition(">=")[2]) >= 77


def method_of(name: str) -> str | None:
    """The method that a module is a part of: the first file or folder below `graphcomp.passes`."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["graphcomp", "passes"] and len(parts) > 2 else None


def test_every_pass_is_in_the_table() -> None:
    """One method a file or folder, one line in PASSES, under the name that the class has."""
    assert {method_of(kind.__module__) for kind in passes.PASSES.values()} == set(map(method_of, FILES)) - {
        None
    }
    assert all(kind.name == name for name, kind in passes.PASSES.items())


# ---------------------------------------------------------------------- layers


def test_the_compiler_knows_no_method_and_no_network() -> None:
    """Only the fronts import `passes` and `models`, and only when they are asked for one."""
    for name, tree in TREES.items():
        if name.startswith(("graphcomp.passes", "graphcomp.models")):
            continue
        methods = {
            m for m in imported(tree, lazy=True) if m.startswith(("graphcomp.passes", "graphcomp.models"))
        }
        assert not methods or name in FRONTS, f"{name} imports {methods}"
        at_top = {
            m for m in imported(tree, lazy=False) if m.startswith(("graphcomp.passes", "graphcomp.models"))
        }
        assert not at_top, f"{name} imports {at_top} at its top"


def test_networkx_is_loaded_when_it_is_asked_for() -> None:
    """It takes a third of a second, and most commands need none of it."""
    users = {name for name, tree in TREES.items() if "networkx" in names_imported(tree)}
    assert users, "nobody uses it"
    for name in users:
        at_top = [n for n in TREES[name].body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert "networkx" not in names_imported(ast.Module(at_top, [])), name


def names_imported(tree: ast.AST) -> set[str]:
    """What is imported by name, in functions too."""
    return {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}


EMITTED = {"apoz": {"finetune"}}
"""Passes that a pass of several rounds emits: `apoz` trains between its removals as `finetune` does."""


def test_passes_and_models_do_not_know_each_other() -> None:
    for name, tree in TREES.items():
        found = imported(tree, lazy=True)
        if (method := method_of(name)) is not None:
            others = {method_of(m) for m in found} - {None, method} - EMITTED.get(method, set())
            assert not others and not any(m.startswith("graphcomp.models") for m in found), name
        if name.startswith("graphcomp.models."):
            assert not any(m.startswith("graphcomp.passes") for m in found), name


def room_of(name: str) -> str | None:
    """The folder of the package that a module lies in, if it is a room and not a method or a network."""
    parts = name.split(".")
    is_room = len(parts) > 1 and f"graphcomp.{parts[1]}" in ROOMS
    return parts[1] if is_room else None


ROOMS = {
    module_name(p) for p in PACKAGE_FILES if p.parent.parent == ROOT / "graphcomp" and p.stem == "__init__"
}


def offered(face: str) -> list[str]:
    """`__all__` of a room."""
    values = [n.value for n in TREES[face].body if isinstance(n, ast.Assign)]
    return [str(x) for value in values for x in ast.literal_eval(value)]


def past_the_face(name: str, found: set[str]) -> set[str]:
    """Modules inside other rooms that a file imports and the room does not offer; or its own face."""
    inner = {m for m in found if m not in ROOMS and room_of(m) not in (None, room_of(name))}
    own = {m for m in found if name not in ROOMS and m == f"graphcomp.{room_of(name)}"}
    whole = {m for m in inner if m.rpartition(".")[2] in offered(f"graphcomp.{room_of(m)}")}
    return inner - whole | own


@pytest.mark.parametrize("name", FILES)
def test_a_room_is_entered_through_its_face(name: str) -> None:
    """Between rooms only what `__init__` offers is imported, inside a room only its files: no circle."""
    assert past_the_face(name, imported(TREES[name], lazy=True)) == set()


def test_ways_past_a_face_are_found() -> None:
    """The helper sees what it is for."""
    name, other = "graphcomp.channels.rules", "graphcomp.channels"
    assert past_the_face(name, {"graphcomp.ir", "graphcomp.channels.labels", "graphcomp.errors"}) == set()
    assert past_the_face(name, {"graphcomp.ir.program", other}) == {"graphcomp.ir.program", other}


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_face_offers_what_it_imports(name: str) -> None:
    """And nothing else: `__all__` is the whole interface of a room."""
    imports = [n for n in TREES[name].body if isinstance(n, ast.ImportFrom)]
    assert sorted(offered(name)) == sorted(a.asname or a.name for n in imports for a in n.names)


def test_no_import_cycle() -> None:
    """Parent packages aside, which are loaded with a module and say only what it offers."""
    loads = nx.DiGraph((name, other) for name in FILES for other in imported(TREES[name], lazy=False))
    assert next(nx.simple_cycles(loads), None) is None


def test_import_cycles_are_found() -> None:
    """The helper sees what it is for."""
    tree = ast.parse("from graphcomp.pipeline import verify\ndef f():\n    import graphcomp.cli.main\n")
    assert imported(tree, lazy=False) == {"graphcomp.pipeline.verify"}
    assert imported(tree, lazy=True) == {"graphcomp.pipeline.verify", "graphcomp.cli.main"}


# ---------------------------------------------------------------------- safety


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that can run code from a file or a string."""
    bad = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    bad |= {"os.system", "marshal.loads", "shelve.open", "dill.load", "joblib.load", "__import__"}
    found = []
    for name, call in calls(tree):
        given = {k.arg: k.value for k in call.keywords}
        only_weights = isinstance(w := given.get("weights_only"), ast.Constant) and w.value is True
        pickles = isinstance(p := given.get("allow_pickle"), ast.Constant) and p.value is not False
        if name in bad or (name == "torch.load" and not only_weights) or pickles or "shell" in given:
            found.append(f"line {call.lineno}: {name}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_nothing_read_can_run_code(name: str) -> None:
    assert unsafe(TREES[name]) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(s)",
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, L)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_unsafe_calls_are_found(text: str) -> None:
    assert unsafe(ast.parse(text)) != []
    assert unsafe(ast.parse("model.eval(); torch.load(p, weights_only=True); yaml.safe_load(t)")) == []


def test_unpickling_is_restricted_where_it_happens() -> None:
    """The only pickles are CIFAR's batches, read by an Unpickler that allows no class but arrays'."""
    users = [name for name, tree in TREES.items() if unpicklers(tree)]
    assert users == ["graphcomp.data.cifar"]
    kinds = [n for n in ast.walk(TREES["graphcomp.data.cifar"]) if isinstance(n, ast.ClassDef)]
    (unpickler,) = [k for k in kinds if "pickle.Unpickler" in [ast.unparse(b) for b in k.bases]]
    assert "find_class" in [f.name for f in unpickler.body if isinstance(f, ast.FunctionDef)]


def unpicklers(tree: ast.AST) -> set[str]:
    """What is used of pickle modules, but for writing (whether something can be sent to other processes)."""
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name)}
    return {n for n in used if "pickle" in n.lower()} - {"pickle", "pickle.dumps"}


# ---------------------------------------------------------------------- versions and commands


def floors() -> dict[str, tuple[int, ...]]:
    found = {}
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement}: no lower bound"
        found[canonicalize_name(requirement.name)] = Version(bound.version).release
    return found


def pins() -> dict[str, tuple[int, ...]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line.strip() and line[0] != "#"]
    return {canonicalize_name(p.name): Version(next(iter(p.specifier)).version).release for p in pins}


def test_doctor_asks_for_what_the_project_asks_for() -> None:
    declared = floors()
    assert {name: declared[name][:2] for name in machine.MINIMUM} == machine.MINIMUM
    assert declared["onnxruntime"][:2] == declared["onnxruntime-gpu"][:2] == doctor.RUNTIME_MINIMUM


def test_one_runtime_on_every_platform() -> None:
    """onnxruntime-gpu and onnxruntime overwrite each other: their markers exclude each other."""
    markers = {
        r.split(">=")[0]: r.split(";")[1] for r in PROJECT["project"]["dependencies"] if "onnxruntime" in r
    }
    environments = [
        {"sys_platform": s, "platform_machine": m}
        for s in ("linux", "win32", "darwin")
        for m in ("x86_64", "AMD64", "aarch64", "arm64")
    ]
    for env in environments:
        chosen = [name for name, marker in markers.items() if _holds(marker, env)]
        gpu = env["sys_platform"] != "darwin" and env["platform_machine"] in ("x86_64", "AMD64")
        assert chosen == (["onnxruntime-gpu"] if gpu else ["onnxruntime"])


def _holds(marker: str, environment: dict[str, str]) -> bool:
    return Marker(marker).evaluate(environment)


def test_pins_satisfy_the_floors() -> None:
    pinned = pins()
    assert pinned["torch"] == (2, 14, 1) and pinned["torchvision"] == (0, 29, 1)
    for name, floor in floors().items():
        if name != "onnxruntime":  # for other platforms
            assert pinned[name] >= floor, name


def test_version_is_the_projects() -> None:
    assert graphcomp.__version__ == PROJECT["project"]["version"]
    assert all(hasattr(graphcomp, name) for name in graphcomp.__all__)


def test_readme_and_ci_run_the_same_tests() -> None:
    ci = (ROOT / ".ci/run").read_text()
    assert "\nmake test\n" in ci and "\nmake lint\n" in ci
    for target in ("demo", "test", "quick", "lint"):
        assert f"\n{target}: install\n" in (ROOT / "Makefile").read_text()
    readme = ROOT / "README.md"
    if readme.exists():
        assert "make test" in readme.read_text() and "make demo" in readme.read_text()


STARTS = {"subprocess.run", "subprocess.Popen", "in_processes"}
"""A process that imports torch: seconds."""


def starting_processes(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions of a file that start processes, by themselves or through others of the file, fixtures too."""
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    found = {name for name, n in functions.items() if STARTS & {called for called, _ in calls(n)}}
    while True:
        more = {name for name, n in functions.items() if names_in(n) & found} - found
        if not more:
            return {name: functions[name] for name in found}
        found |= more


def names_in(function: ast.FunctionDef) -> set[str]:
    return {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | {a.arg for a in function.args.args}


def is_slow(node: ast.AST) -> bool:
    return "pytest.mark.slow" in ast.unparse(node)


LONGEST = 400
"""Lines of a file: what one reads at a sitting, and can say in one sentence what it is."""


def test_no_file_is_longer_than_one_reads() -> None:
    files = [f for room in ("graphcomp", "passes", "models") for f in (ROOT / room).rglob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > LONGEST}
    assert not long


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.stem)
def test_what_starts_processes_is_slow(path: Path) -> None:
    """So that `make quick` is quick."""
    tree = ast.parse(path.read_text())
    if any(is_slow(n) for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n)):
        return
    tests = {name: n for name, n in starting_processes(tree).items() if name.startswith("test_")}
    assert [name for name, n in tests.items() if not any(map(is_slow, n.decorator_list))] == []


def test_what_starts_processes_is_found() -> None:
    """The helper sees what it is for."""
    tree = ast.parse(
        "def made(): subprocess.run([])\ndef used(made): ...\ndef test_a(used): ...\ndef test_b(): ...\n"
    )
    assert starting_processes(tree).keys() == {"made", "used", "test_a"}


def test_errors_are_drawn_as_a_tree_and_documented() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, GraphcompError)]
    assert errors.__doc__ is not None
    for kind in kinds:
        assert kind.__doc__
        assert kind.__name__ in errors.__doc__
