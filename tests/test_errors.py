"""Messages of others in ours, and lists of names."""

import pytest

from graphcomp.errors import LONGEST_LINE, TraceError, first_line, some_of

LONG = f"layer: found something, expected another; {'x' * LONGEST_LINE}; do this next"


def test_a_foreign_line_is_cut_and_ours_stays_whole() -> None:
    """Ours ends with what to do next."""
    assert first_line(TraceError(LONG)) == LONG
    assert len(first_line(RuntimeError(LONG))) == LONGEST_LINE
    assert first_line(RuntimeError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(("count", "said"), [(0, ""), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more")])
def test_some_of(count: int, said: str) -> None:
    assert some_of([str(i) for i in range(count)]) == said
