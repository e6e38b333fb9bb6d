"""What may stand in the files that are written for other tools."""

import re


def legal(text: str) -> str:
    """Characters that XML has no way to write, made visible."""
    return re.sub(
        r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\N{REPLACEMENT CHARACTER}", text
    )
