"""Fuzzes saved programs: every mutation is refused within bounds, or is a program that never leaves torch.

Run as `python -m tests.hostile EXAMPLES [SEED]` in a process of its own: an audit hook cannot be taken away.
Without a seed the examples are the same every time. Prints what became of them.
"""

import ast
import contextlib
import copy
import faulthandler
import inspect
import json
import os
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

from graphcomp.errors import LoadError
from graphcomp.ir import load, save
from graphcomp.ir.saved import bounds, grammar, storage
from graphcomp.ir.tracing import trace

SECONDS = 2.0
MEMORY = 1 << 30

Document = dict[str, Any]


@contextlib.contextmanager
def within(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fail if the body takes more CPU time; its allocations beyond `memory` bytes fail by themselves."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    before = resource.getrlimit(resource.RLIMIT_DATA)[0]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmData"].split()[0]) * 1024
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
    took = time.process_time() - start
    assert took < seconds, f"found {took:.1f} s, expected less than {seconds}"


# ---- what leaves torch -----------------------------------------------------------------------------------

_EVENTS = ("subprocess.", "socket.", "os.", "shutil.", "ctypes.", "pty.", "urllib.", "webbrowser.", "ftplib.")
_READING = ("os.listdir", "os.scandir", "os.walk", "os.getxattr", "os.listxattr")
_INSTALLED = (str(Path(torch.__file__).parents[1]), str(Path(os.__file__).parent), "<frozen")


class Watch:
    """Collects audit events that say that somebody left torch, while it is switched on."""

    def __init__(self) -> None:
        self.on = False
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Events of the body are an AssertionError."""
        self.found, self.on = [], True
        try:
            yield
        finally:
            self.on = False
        assert not self.found, self.found

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and self._leaves(event, args) and not _importing():
            self.on = False
            caller = "".join(traceback.format_stack(limit=8))
            self.found.append(f"{event} {args!r:.300}\n{caller}")
            self.on = True

    def _leaves(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            mode, flags = args[1], args[2]
            writing = isinstance(mode, str) and any(c in mode for c in "wax+")
            return writing or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event == "exec":
            return not _known(args[0].co_filename)
        if event == "compile":
            return not _known(str(args[1])) or _foreign(args[0], str(args[1]))
        return event.startswith(_EVENTS) and event not in _READING


def _importing() -> bool:
    """Whether an installed module is being imported: torch loads some late, which compile their parts."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_INSTALLED)


def _known(file: str) -> bool:
    """Source of fx or of installed packages, or only parsed: what is executed has a name."""
    return file == "<unknown>" or file.startswith(("<eval_with_key>", *_INSTALLED))


def _foreign(source: Any, file: str) -> bool:
    """Whether generated source does more than call what the grammar names."""
    if not file.startswith("<eval_with_key>"):
        return False
    allowed = (
        ast.Module,
        ast.FunctionDef,
        ast.arguments,
        ast.arg,
        ast.Assign,
        ast.AugAssign,
        ast.Return,
        ast.Pass,
    )
    allowed += (ast.Import, ast.ImportFrom, ast.alias, ast.expr, ast.expr_context, ast.operator, ast.unaryop)
    allowed += (ast.cmpop, ast.boolop, ast.keyword, ast.Expr)
    text = source if isinstance(source, str) else bytes(source or b"").decode()
    for part in ast.walk(ast.parse(text)):
        if not isinstance(part, allowed) or isinstance(part, ast.Lambda | ast.Await | ast.JoinedStr):
            return True
        if isinstance(part, ast.Import | ast.ImportFrom):
            module = part.module if isinstance(part, ast.ImportFrom) else part.names[0].name
            if str(module).partition(".")[0] not in ("torch", "math"):
                return True
        if isinstance(part, ast.Attribute) and part.attr.startswith("__") and not _is_method(part.attr):
            return True
        if isinstance(part, ast.Name) and part.id in ("eval", "exec", "compile", "open", "__import__"):
            return True
    return False


def _is_method(name: str) -> bool:
    return name in grammar.methods()


# ---- programs to begin with ------------------------------------------------------------------------------


class Small(nn.Module):
    """One of each kind of node and of value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Linear(16, 4)
        self.register_buffer("offset", torch.arange(8).view(8, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.act(self.norm(self.conv(x))) + self.offset
        a, b = y.chunk(2, 1)
        z = torch.cat([a, b, F.interpolate(self.pool(y), size=y.shape[2:], mode="bilinear")], 1)
        w = self.up(z)[:, ::2, 1:-1].mean(dim=(2, 3))
        n = abs(y.size(1)) * 2
        parts = z.view(z.shape[0], n, -1).sum(-1).split([4, n - 4], dim=1)
        return {"map": z.to(torch.float64), "out": self.head(torch.cat((w, parts[0], parts[1][:, :4]), 1))}


class Attending(nn.Module):
    """Attention, embeddings and computed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        x = x + self.attend(x, x, x, need_weights=False)[0]
        q, k = x.unsqueeze(1), x.transpose(1, 2)
        product = torch.matmul(q.squeeze(1), k)
        mask = torch.ones_like(product).tril() > 0
        weights = product.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("bij,bjc->bic", weights, x).flatten(1)


def originals(directory: Path) -> list[tuple[Document, bytes]]:
    """`program.json` and the weights of every program to begin with."""
    torch.manual_seed(0)
    networks: list[tuple[nn.Module, Tensor]] = [
        (Small(), torch.randn(1, 3, 8, 8)),
        (Attending(), torch.tensor([[1, 4, 2, 9, 3]])),
    ]
    found = []
    for i, (network, example) in enumerate(networks):
        place = directory / f"original-{i}"
        save(trace(network.eval(), example), place)
        found.append((json.loads((place / "program.json").read_text()), read_weights(place)))
    return found


def read_weights(place: Path) -> bytes:
    return (place / storage.WEIGHTS_FILE).read_bytes()


# ---- mutations -------------------------------------------------------------------------------------------

NAMES = """self torch device inf nan getattr slice eval max __import__ __class__ __builtins__ forward _modules
    graph class lambda x y a.b a-b 0""".split()
NAMES += [
    "",
    "x = 1; y",
    'a" or open("pwned", "w") or "',
    "\u00e9",
    "\uff53elf",
    "x\n",
]  # `self` in full width
PATHS = """norm.__builtins__.get norm.__globals__ norm.__class__ __class__ conv.forward conv._modules
    conv.weight conv.weight.data norm.running_mean.__class__ conv.__init__.__globals__ _graph
    graph.owning_module conv..norm .conv conv. embed.weight attend.out_proj attend.in_proj_weight act
    pool""".split()
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    255,
    10**4,
    10**6,
    2**31,
    10**9,
    2**63 - 1,
    2**63,
    -(2**63),
    10**18,
    10**30,
    10**400,
]
NUMBERS += [0.5, -0.0, 1e308, 5e-324]  # type: ignore[list-item]
VALUES: list[Any] = [
    None,
    True,
    "",
    "mean",
    "eval",
    "__class__",
    "__import__('os').system('touch pwned')",
    "%999999999d",
    "cuda",
    {"node": "self"},
    {"node": "eval"},
    {"float": "nan"},
    {"float": "1e999"},
    {"dtype": "float64"},
    {"dtype": "load"},
    {"dtype": "int8"},
    {"layout": "sparse_coo"},
    {"memory_format": "channels_last"},
    {"device": "cuda:0"},
    {"device": "meta"},
    {"device": "cpu"},
    {"slice": [None, None, 0]},
    {"slice": [0, 10**18, 10**9]},
    {"size": [10**9, 10**9]},
    {"tuple": [1, 2]},
    {"dict": [["a", 1]]},
    {"ellipsis": True},
    {"callable": "eval"},
    [10**9, 10**9],
    [[[[[[[]]]]]]],
]
KEYWORDS = "key out dim dtype device generator default inplace size mode input self func fn x other".split()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    _at(document, path[:-1])[path[-1]] = value


Draw = Callable[[st.SearchStrategy[Any]], Any]


def _where(draw: Draw, document: Document, test: Callable[[Any, tuple[Any, ...]], bool]) -> Any:
    places = [p for p in _places(document) if test(_at(document, p), p)]
    return draw(st.sampled_from(places)) if places else None


def _any_number(draw: Draw, d: Document) -> None:
    place = _where(draw, d, lambda v, _: isinstance(v, int | float) and not isinstance(v, bool))
    _put(d, place, draw(st.sampled_from(NUMBERS)))


def _any_text(draw: Draw, d: Document) -> None:
    known = [n["name"] for n in d["nodes"]] + list(d["modules"]) + list(d["tensors"])
    place = _where(draw, d, lambda v, p: isinstance(v, str) and p[-1] not in ("op", "kind", "dtype"))
    _put(d, place, draw(st.sampled_from(NAMES + PATHS + known)))


def _any_rename(draw: Draw, d: Document) -> None:
    """Everywhere, so that the program says the same under another name."""
    old = draw(st.sampled_from([n["name"] for n in d["nodes"]] + list(d["modules"]) + list(d["tensors"])))
    new = draw(st.sampled_from(NAMES + PATHS))

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {new if k == old else k: renamed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v) for v in value]
        return new if value == old else value

    d.update({key: renamed(d[key]) for key in ("nodes", "modules", "tensors")})


def _argument(draw: Draw, d: Document) -> None:
    place = _where(draw, d, lambda _, p: p[0] == "nodes" and len(p) > 3 and p[2] in ("args", "kwargs"))
    if place is not None:
        _put(d, place, _value(draw, d))


def _value(draw: Draw, d: Document) -> Any:
    nodes = [{"node": n["name"]} for n in d["nodes"]]
    return copy.deepcopy(draw(st.sampled_from([*VALUES, *NUMBERS, *nodes])))


def _more_arguments(draw: Draw, d: Document) -> None:
    node = draw(st.sampled_from(d["nodes"]))
    if draw(st.booleans()):
        node.setdefault("args", []).append(_value(draw, d))
    else:
        node.setdefault("kwargs", {})[draw(st.sampled_from(KEYWORDS))] = _value(draw, d)


def _other_call(draw: Draw, d: Document) -> None:
    """Call something else that may be called, with as many arguments as it takes, and yield the result."""
    if draw(st.integers(0, 3)):
        end = d["nodes"][-1]
        node: Document = {"name": f"new_{len(d['nodes'])}"}
        d["nodes"].insert(-1, node)
        end["args"] = [{"tuple": [*end["args"], {"node": node["name"]}]}]
    else:
        node = draw(st.sampled_from([n for n in d["nodes"] if n["op"].startswith("call")]))
    before = [n["name"] for n in d["nodes"][: d["nodes"].index(node)]]
    if draw(st.booleans()):
        target = draw(st.sampled_from(sorted(grammar.functions())))
        schema = grammar.functions()[target][1]
    else:
        target = draw(st.sampled_from(sorted(grammar.methods())))
        schema = grammar.methods()[target]
    count = draw(st.integers(max(1, schema.least), max(1, schema.least, min(3, len(schema.places)))))
    args: list[Any] = [{"node": draw(st.sampled_from(before))}]
    for _ in range(count - 1):
        benign = [{"node": name} for name in before] + [0, 1, -1, 2, 0.5, True, None, [1], [0, 1]]
        args.append(draw(st.sampled_from(benign)) if draw(st.integers(0, 3)) else _value(draw, d))
    op = "call_function" if "." in target else "call_method"
    node.update(op=op, target=target, args=args, kwargs={})


def _other_op(draw: Draw, d: Document) -> None:
    ops = ["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    draw(st.sampled_from(d["nodes"]))["op"] = draw(st.sampled_from(ops))


def _other_layer(draw: Draw, d: Document) -> None:
    record = draw(st.sampled_from(list(d["modules"].values())))
    record["kind"] = draw(st.sampled_from([*dir(nn), "Module"]))
    if draw(st.booleans()):
        names = "num_layers num_encoder_layers hidden_size input_size d_model nhead kernel_size f".split()
        record.setdefault("arguments", {})[draw(st.sampled_from(names))] = _value(draw, d)


def _other_attribute(draw: Draw, d: Document) -> None:
    path, record = draw(st.sampled_from(list(d["modules"].items())))
    names = "training forward padding_mode stride num_heads inplace scale_factor mode _forward_hooks new"
    inner = record.setdefault("attributes", {}).setdefault(draw(st.sampled_from(["", "out_proj", path])), {})
    inner[draw(st.sampled_from(names.split()))] = _value(draw, d)


def _order(draw: Draw, d: Document) -> None:
    """Cycles: a node after its reader, twice, or its own operand; a tensor that is tied in a circle."""
    nodes = d["nodes"]
    i, j = (draw(st.integers(0, len(nodes) - 1)) for _ in range(2))
    kind = draw(st.sampled_from(["swap", "twice", "drop", "itself", "tied"]))
    if kind == "swap":
        nodes[i], nodes[j] = nodes[j], nodes[i]
    elif kind == "twice":
        nodes.insert(j, copy.deepcopy(nodes[i]))
    elif kind == "drop":
        del nodes[i]
    elif kind == "itself":
        nodes[i].setdefault("args", []).append({"node": nodes[i]["name"]})
    else:
        one, two = (draw(st.sampled_from(sorted(d["tensors"]))) for _ in range(2))
        d["tensors"][one]["same_as"], d["tensors"][two]["same_as"] = two, one


def _whole(draw: Draw, d: Document) -> None:
    key = draw(st.sampled_from(sorted(d)))
    choices: list[Any] = [*VALUES, *NUMBERS, [], {}, [{}], [[]] * 100]
    d[key] = copy.deepcopy(draw(st.sampled_from(choices)))


MUTATIONS: list[Callable[[Draw, Document], None]] = [
    _any_number,
    _any_text,
    _any_rename,
    _argument,
    _argument,
    _more_arguments,
    _other_call,
    _other_call,
    _other_call,
    _other_call,
    _other_op,
    _other_layer,
    _other_attribute,
    _order,
    _whole,
]


def _header(draw: Draw, weights: bytes) -> bytes:
    """Another safetensors header, or other bytes."""
    size = struct.unpack("<Q", weights[:8])[0]
    if draw(st.booleans()):
        position = draw(st.integers(0, len(weights) - 1))
        changed = weights[:position] + bytes([draw(st.integers(0, 255))]) + weights[position + 1 :]
        return changed[:position] if draw(st.integers(0, 3)) == 0 else changed
    header = json.loads(weights[8 : 8 + size])
    place = _where(draw, header, lambda v, p: len(p) > 1)
    _put(
        header, place, draw(st.sampled_from([*NUMBERS, "F64", "I8", "BOOL", "F32", [], [0], [10**9, 10**9]]))
    )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


# ---- the run ---------------------------------------------------------------------------------------------

_TORCH_SAYS = (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError, AssertionError, KeyError)


def attempt(directory: Path, watch: Watch) -> str:
    """Load and run the program in `directory`; what became of it."""
    faulthandler.dump_traceback_later(120, exit=True)
    with watch.watching():
        try:
            with within():
                program = load(directory)
        except LoadError:
            return "refused"
        try:
            with torch.no_grad():
                program(*program.example_inputs)
        except _TORCH_SAYS as error:
            return f"loads, and stops with {type(error).__name__}"
        finally:
            faulthandler.cancel_dump_traceback_later()
    return "runs"


def fuzz(examples: int, chosen: int | None, directory: Path) -> Counter[str]:
    """Counts of what became of `examples` mutations."""
    seeds = originals(directory)
    watch, place, counts = Watch(), directory / "mutated", Counter[str]()
    place.mkdir()
    bounds.ELEMENTS = 1 << 24  # what runs here shall be small

    def write(document: Document, weights: bytes) -> None:
        (place / storage.PROGRAM_FILE).write_text(json.dumps(document))
        (place / storage.WEIGHTS_FILE).write_bytes(weights)

    for document, weights in seeds:
        write(document, weights)
        program = load(place)
        program(*program.example_inputs)  # torch has loaded now what it loads late
        assert attempt(place, watch) == "runs"

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=chosen is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        document, weights = data.draw(st.sampled_from(seeds), label="program")
        document = copy.deepcopy(document)
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
            mutation = data.draw(st.sampled_from(MUTATIONS))
            with contextlib.suppress(AttributeError, KeyError, TypeError, IndexError, ValueError):
                mutation(data.draw, document)  # one may find nothing left to change
        if data.draw(st.sampled_from([False] * 9 + [True])):
            weights = _header(data.draw, weights)
        write(document, weights)
        counts[attempt(place, watch)] += 1

    (each if chosen is None else seed(chosen)(each))()
    return counts


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(fuzz(int(sys.argv[1]), chosen, Path(directory))))


if __name__ == "__main__":
    main()
