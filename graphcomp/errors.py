"""Every error that graphcomp raises on purpose.

GraphcompError
├── TraceError      a model that cannot become a Program
├── InputError      a program was given inputs of sizes that it is not for
├── LoadError       weights or a saved program that cannot be read
├── DataError       a data source that cannot be read or is empty
├── RecipeError     a recipe, pass or option that is not valid (raised before any work)
├── AnalysisError   an analysis was asked for something it cannot do
├── SurgeryError    a removal that cannot be carried out exactly
├── VerifyError     a program that breaks an invariant, or a rewrite that changed the function
├── PassError       a pass that failed, with the passes that ran before it
├── ExportError     an ONNX file that could not be written or is not equal to the program
├── DistributedError  another process of the same run failed or cannot be reached
├── BenchError      a measurement that could not be made
│   └── ProviderError   an execution provider that does not really work here
└── OutputError     a result that could not be written

Messages read `place: found, expected`, followed by what to do next. What goes on all the same but deserves a
word is a GraphcompWarning; the command line shows it and hides everybody else's.
"""

from collections.abc import Sequence
from typing import Self


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


LONGEST_LINE = 400
"""Characters of a foreign error's message that ours repeats."""


def first_line(error: BaseException) -> str:
    """Of its message, to which torch and fx append graphs and call stacks; its type if it says nothing.

    Cut where it is longer than anyone reads: torch writes whole formulas of sizes into one line. Our own
    errors end with what to do next, and stay whole.
    """
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    short = len(line) <= LONGEST_LINE or isinstance(error, GraphcompError)
    return line if short else f"{line[: LONGEST_LINE - 2]} …"


class GraphcompError(Exception):
    """Base of all errors that graphcomp raises on purpose."""

    @classmethod
    def at(cls, place: object, found: object, expected: str, advice: str) -> Self:
        """The error with a message of the usual form."""
        return cls(f"{place}: found {found}, expected {expected}; {advice}")


class TraceError(GraphcompError):
    """A model that cannot become a Program."""


class InputError(GraphcompError):
    """A program was given inputs of sizes that it is not for."""


class LoadError(GraphcompError):
    """Weights or a saved program that cannot be read."""


class DataError(GraphcompError):
    """A data source that cannot be read or is empty."""


class RecipeError(GraphcompError):
    """A recipe, pass or option that is not valid."""


class AnalysisError(GraphcompError):
    """An analysis was asked for something it cannot do."""


class SurgeryError(GraphcompError):
    """A removal that cannot be carried out exactly.

    Attributes:
        node: the fx node that cannot be rewritten, "" if none is to blame.
        channels: ids of the channels that are in its way.
    """

    def __init__(self, message: str, node: str = "", channels: frozenset[int] = frozenset()) -> None:
        super().__init__(message)
        self.node, self.channels = node, channels


class VerifyError(GraphcompError):
    """A program that breaks an invariant, or a rewrite that changed the function."""


class PassError(GraphcompError):
    """A pass that failed; names the passes that ran before it."""


class ExportError(GraphcompError):
    """An ONNX file that could not be written or is not equal to the program."""


class DistributedError(GraphcompError):
    """Another process of the same run failed or cannot be reached."""


class BenchError(GraphcompError):
    """A measurement that could not be made."""


class ProviderError(BenchError):
    """An execution provider that does not really work on this machine."""


class OutputError(GraphcompError):
    """A result that could not be written."""


class GraphcompWarning(UserWarning):
    """Something that the user should know although the run goes on."""
