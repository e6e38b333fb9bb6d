"""A section of a document that a program writes, between two comments that say so."""

from pathlib import Path

PART = "### "
"""Heading of a part of a section."""


def replace_section(document: Path, begin: str, end: str, new: str) -> None:
    """Put `new`, which has both comments, in the place of the section before, or at the end."""
    text = document.read_text() if document.exists() else "# Results\n"
    if begin in text:
        head, rest = text.split(begin, 1)
        text = head + new + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{new}\n"
    document.write_text(text)


def read_section(document: Path, begin: str, end: str) -> str:
    """What the section says now, without the comments; nothing where there is none."""
    text = document.read_text() if document.exists() else ""
    return text.split(begin, 1)[1].split(end, 1)[0].strip() if begin in text else ""


def read_parts(section: str) -> dict[str, str]:
    """What a section says under each of its headings, in its order; not what it says above them."""
    parts = f"\n{section}".split(f"\n{PART}")[1:]
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in parts)}
