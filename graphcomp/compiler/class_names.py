"""Names of classes, written into the metadata of the result's files.

Under the key `names`, as `{0: 'cat', 1: 'dog'}`: where those who run such files look for them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graphcomp.compiler.source import Source
from graphcomp.errors import LoadError
from graphcomp.measure import count_outputs

KEY = "names"
MOST_BYTES = 1 << 19
"""Of a file: a metadata entry holds twice as much."""


def with_class_names(source: Source, file: Path, classes: Sequence[int] | None) -> Source:
    """The source with names for its outputs.

    Args:
        source: restricted to `classes`, if there are any.
        file: text, a name a line, in the order of the outputs; those of all classes if some are left out.
        classes: of the data that the outputs are, None: all.

    Raises:
        LoadError: naming the file that cannot be read, or has another number of names than there are outputs.
    """
    names = _read(file)
    outputs = count_outputs(source.program)
    chosen = sorted(set(classes or ()))
    if chosen and len(names) != outputs and chosen[-1] < len(names):
        names = [names[index] for index in chosen]
    if outputs is not None and len(names) != outputs:
        raise LoadError(
            f"{file}: found {len(names)} names, expected {outputs}, one a line for every output of the "
            "network; give the file that belongs to it"
        )
    told = source.program.interface
    metadata = {**told.metadata, KEY: str(dict(enumerate(names)))}
    program = replace(source.program, interface=told.model_copy(update={"metadata": metadata}))
    return replace(source, program=program)


def without_class_names(source: Source) -> Source:
    """The source without names that its file gave to outputs of which some are left out now."""
    told = source.program.interface
    if KEY not in told.metadata:
        return source
    metadata = {key: value for key, value in told.metadata.items() if key != KEY}
    program = replace(source.program, interface=told.model_copy(update={"metadata": metadata}))
    said = f"metadata {KEY!r} named all classes of the original and is left out; --class-names writes others"
    return replace(source, program=program, remarks=(*source.remarks, said))


def _read(file: Path) -> list[str]:
    try:
        size = file.stat().st_size
        text = file.read_text(encoding="utf-8") if file.is_file() and size <= MOST_BYTES else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise LoadError(f"{file}: {reason}, expected a text file with a class name a line") from error
    if text is None:
        raise LoadError(
            f"{file}: found {size} bytes, or no file, expected a text file of at most {MOST_BYTES} bytes "
            "with a class name a line"
        )
    names = [line.strip() for line in text.splitlines()]
    empty = next((index for index, name in enumerate(names) if not name), None)
    if empty is not None or not names:
        raise LoadError(f"{file}:{(empty or 0) + 1}: found no name, expected one a line; leave no line empty")
    return names
