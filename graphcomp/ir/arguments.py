"""What a network is called with beside tensors: flags, sizes and modes that a trace is for.

Such a value is Python's: branches on it are taken while the network is traced, and nothing of it is an input
of the program. It is kept with the program (`Interface.arguments`), whose network has to be called so again.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from graphcomp.errors import TraceError
from graphcomp.ir.interface import Arguments, Value

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def arguments_of(model: Any, given: Mapping[str, Any]) -> Arguments:
    """The values that a network is to be called with, lists among them as tuples.

    Raises:
        TraceError: a name that forward does not take, a value that is none of `interface.Value`, or a network
            that is no module of Python's any more.
    """
    if not given:
        return {}
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"arguments: found {', '.join(given):.100} for {type(model).__name__}, which has taken all "
            "decisions, expected a torch.nn.Module for that"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in named and not takes_any:
            raise TraceError(
                f"arguments: found {name!r:.100}, expected arguments of {type(model).__name__}.forward, "
                f"which are {', '.join(named) or 'none'}"
            )
    return {name: _named(name, value) for name, value in given.items()}


def _named(name: str, value: Any) -> Value:
    try:
        return plain_argument(value)
    except ValueError as error:
        raise TraceError(f"arguments.{name}: {error}") from None


def plain_argument(value: Any) -> Value:
    """The value, a list as a tuple; ValueError if it is of another kind."""
    if isinstance(value, Tensor):
        raise ValueError(
            "found a tensor, expected a number, a text or None; give it among the example inputs, in the "
            "order of forward's arguments"
        )
    try:
        return _VALUES.validate_python(value)
    except ValidationError:
        raise ValueError(
            f"found {value!r:.100}, expected None, true or false, a finite number, a text, or a list of these"
        ) from None


_VALUES: TypeAdapter[Value] = TypeAdapter(Value)


def call_with(forward: Callable[..., Any], inputs: tuple[Any, ...], arguments: Arguments) -> Call:
    """A call of forward with the values where they belong, and its inputs, in order, for what is left.

    Raises:
        TraceError: inputs for which no argument is left.
    """
    waiting, given = list(inputs), dict(arguments)
    args: list[Any] = []
    named: dict[str, Any] = {}
    skipped = False
    for parameter in inspect.signature(forward).parameters.values() if arguments else ():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args, waiting = [*args, *waiting], []
        elif parameter.kind is parameter.VAR_KEYWORD or not (parameter.name in given or waiting):
            skipped = True  # it has its default, and what follows is given by name
        else:
            value = given.pop(parameter.name) if parameter.name in given else waiting.pop(0)
            if skipped or parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                args.append(value)
    if waiting and arguments:
        raise TraceError(
            f"arguments: found values for {', '.join(arguments):.100}, which leave none to {len(waiting)} of "
            f"{len(inputs)} example inputs, expected values of arguments that no tensor is for"
        )
    return (*args, *waiting), {**named, **given}
