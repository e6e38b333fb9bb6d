"""What no door takes, said before any is tried."""

from itertools import chain
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from graphcomp.errors import TraceError


def require_names(model: nn.Module) -> None:
    """TraceError for names that torch.fx could not write between quotes into the source that it compiles."""
    for path, _ in chain(model.named_modules(), model.named_parameters(), model.named_buffers()):
        if not path.isprintable() or set(path) & set('"\\'):
            raise TraceError(
                f"{type(model).__name__}: found a module or tensor called {path!r}, expected names "
                "without double quotes, backslashes and control characters; rename it"
            )


def refuse_exported(model: Any) -> None:
    """TraceError for what holds operators of ATen instead of layers: nothing in it could be compressed."""
    found = None if isinstance(model, nn.Module) else type(model).__name__
    if isinstance(model, nn.Module) and any(map(_is_exported, model.modules())):
        found = "a program of torch.export"
    if found is not None:
        raise TraceError(
            f"{type(model).__name__}: found {found}, which has no layers any more, expected a "
            "torch.nn.Module; give the module that it was made from"
        )


def _is_exported(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None)
    nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
    return any(isinstance(n.target, OpOverload) and n.target.namespace == "aten" for n in nodes)
