"""How deep values of JSON may be nested: whoever reads them later may do so by recursion."""

from typing import Any


def nests_at_most(document: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other less than `levels` deep."""
    level = [document]
    for _ in range(levels):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return True
    return False
