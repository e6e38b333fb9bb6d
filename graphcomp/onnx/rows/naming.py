"""What layers of a file are called: module paths from its tags, initialisers or nodes.

A path is written into source by torch.fx and into saved programs, so it consists of plain words whatever the
file says (`ir.saved` refuses others).
"""

import keyword
import re

from torch import Tensor, fx, nn

from graphcomp.onnx.rows.node import Node

_ODD = re.compile(r"[^A-Za-z0-9_]+")
_MOST = 80
"""Characters of one element of a path; longer names keep their end, which tells them apart."""

_MOST_TEXT = 4096
_DEEPEST = 32

_LAYER = re.compile(r"(?P<path>.+)\.(weight|bias|running_mean|running_var)")
_RESERVED = frozenset(dir(fx.GraphModule))
"""What the module that all of this ends up in has of its own."""

MODULE_TAG = "graphcomp.module"
"""What graphcomp writes: the path itself."""

PASS_TAG = "graphcomp.pass"
"""What graphcomp writes: the pass that made a node or changed it last."""

SCOPES_TAG = "pkg.torch.onnx.name_scopes"
"""What torch's exporter writes: the paths of the modules around a node, and the node."""

_PASS = re.compile(r"[\w\-. /:]{1,200}", re.ASCII)
_QUOTED = re.compile(r"'([^']*)'")


class Names:
    """Gives out paths, each once."""

    def place(self, root: nn.Module, node: Node, module: nn.Module) -> str:
        """Put a layer where its node says that it was; its path."""
        return _put(root, self.path_of(node), module)

    def place_tensor(self, root: nn.Module, name: str, tensor: Tensor) -> str:
        """Put a tensor that no layer holds where its name says; its path."""
        owner, leaf = _container(root, elements(name))
        leaf = _free(owner[1], leaf)
        if isinstance(tensor, nn.Parameter):
            owner[1].register_parameter(leaf, tensor)
        else:
            owner[1].register_buffer(leaf, tensor)
        return ".".join([*owner[0], leaf])

    def path_of(self, node: Node) -> list[str]:
        """The elements of a layer's path: by tags, by its weight, by scopes, by the node's own name.

        Vectors say less than scopes: exporters merge equal ones.
        """
        tag = node.tag(MODULE_TAG)
        if tag:
            return elements(tag)
        name, axes = node.weight
        found = _LAYER.fullmatch(name)
        if found and axes > 1:
            return elements(found["path"])
        scopes = _QUOTED.findall(node.tag(SCOPES_TAG)[:_MOST_TEXT])
        if len(scopes) > 1 and scopes[-2]:
            return elements(scopes[-2])
        if found:
            return elements(found["path"])
        return elements(_scope(_first(node.name)) or f"{node.operator}")


def pass_of(node: Node) -> str:
    """The pass that a node says it was made by; `trace` where it names none."""
    tag = node.tag(PASS_TAG)
    return tag if _PASS.fullmatch(tag) else "trace"


def _first(name: str) -> str:
    """`re_lu/Relu` of `re_lu/Relu;conv2d/BiasAdd;conv2d/Conv2D`: TFLite names what it fuses after all."""
    return name.partition(";")[0] or name


def _scope(name: str) -> str:
    """`layer1.0.conv` of `/layer1/layer1.0/conv/Conv`: the scope in which an exporter found a node."""
    parts = [p for p in name.split("/") if p and p != "StatefulPartitionedCall"]
    if len(parts) < 2:
        return name
    path: list[str] = []
    for part in parts[:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def elements(name: str) -> list[str]:
    """A name of a file as elements of a path."""
    parts = [
        _ODD.sub("_", part).strip("_")[-_MOST:] for part in re.split(r"[./]", _first(name)[-_MOST_TEXT:])
    ]
    words = [f"{p}_" if keyword.iskeyword(p) else p for p in parts if p]
    return words[-_DEEPEST:] or ["unnamed"]


def _put(root: nn.Module, path: list[str], module: nn.Module) -> str:
    (at, owner), leaf = _container(root, path)
    leaf = _free(owner, leaf)
    owner.add_module(leaf, module)
    return ".".join([*at, leaf])


def _container(root: nn.Module, path: list[str]) -> tuple[tuple[list[str], nn.Module], str]:
    """The container for the last element of a path, made where it is not there yet."""
    at: list[str] = []
    owner = root
    for index, part in enumerate(path[:-1]):
        child = owner._modules.get(part)
        if child is None and not hasattr(owner, part) and part not in _RESERVED:
            child = nn.Module()
            owner.add_module(part, child)
        if child is None or type(child) is not nn.Module:
            return (at, owner), "_".join(path[index:])
        at.append(part)
        owner = child
    return (at, owner), path[-1]


def _free(owner: nn.Module, leaf: str) -> str:
    """The name itself, or the first with a number behind it that is free."""
    name, count = leaf, 0
    while hasattr(owner, name) or name in _RESERVED:
        count += 1
        name = f"{leaf}_{count}"
    return name
