"""Only the muted thread is silent, whatever the others do meanwhile."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from io import StringIO

import pytest

from graphcomp.base.muting import _hooks, muted

SAYS: dict[str, Callable[[str], object]] = {
    "print": print,
    "stderr": lambda text: print(text, file=sys.stderr),
    "writelines": lambda text: sys.stdout.writelines([text, "\n"]),
    "torch's log": lambda text: logging.getLogger("torch.onnx").warning(text),
    "a new logger": lambda text: logging.getLogger(f"onnxscript.{text}").error(text),
    "warning": warnings.warn,
}


class Seen:
    """What reached the terminal, the handlers of the root logger, and `showwarning`."""

    def __init__(self) -> None:
        self.stream, self.shown = StringIO(), list[str]()

    @property
    def text(self) -> str:
        return self.stream.getvalue() + "\n".join(self.shown)


@contextlib.contextmanager
def hearing() -> Iterator[Seen]:
    """Not a fixture: pytest sets the streams anew between the set-up and the test."""
    found = Seen()
    handler = logging.StreamHandler(found.stream)
    logging.root.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "stdout", found.stream)
        patch.setattr(sys, "stderr", found.stream)
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: found.shown.append(str(message))
        yield found
    logging.root.removeHandler(handler)


@pytest.mark.parametrize("way", SAYS)
def test_the_thread_itself_is_silent_and_others_are_heard(way: str) -> None:
    say = SAYS[way]
    with hearing() as seen:
        say("before")
        with muted() as sink:
            say("mine")
            other = threading.Thread(target=say, args=("other",))
            other.start()
            other.join()
            say("still mine")
        say("after")
    assert "mine" not in seen.text
    assert all(text in seen.text for text in ("before", "other", "after"))
    if way != "warning":
        assert "still mine" in sink.getvalue() and "other" not in sink.getvalue()


def test_warnings_are_dropped_where_they_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with muted():
            warnings.warn("nothing", stacklevel=1)
        with pytest.raises(UserWarning, match="something"):
            warnings.warn("something", stacklevel=1)


def test_loggers_of_the_user_are_heard() -> None:
    with hearing() as seen, muted():
        logging.getLogger("mine").warning("kept")
        logging.getLogger("torchless").warning("kept, too")
    assert seen.stream.getvalue() == "kept\nkept, too\n"


def test_everything_is_as_it_was_afterwards() -> None:
    before = sys.stdout, sys.stderr, list(warnings.filters), list(logging.root.handlers)
    with contextlib.suppress(KeyError), muted(), muted() as inner:
        print("inner")
        raise KeyError
    assert (sys.stdout, sys.stderr, list(warnings.filters), list(logging.root.handlers)) == before
    assert not any(handler.filters for handler in logging.root.handlers)
    assert inner.getvalue() == "inner\n" and _hooks.threads == 0


def test_no_line_is_lost_between_threads_that_come_and_go() -> None:
    """Eight threads, muted in turns, overlapping: each hears its own noise, everything else comes through."""
    wrong, rounds = [], range(200)

    def work(name: int) -> None:
        for i in rounds:
            with muted() as sink:
                print(f"noise {name}.{i}")
            if sink.getvalue() != f"noise {name}.{i}\n":
                wrong.append(sink.getvalue())
            sys.stdout.write(f"heard {name}.{i}\n")

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    with hearing() as seen:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.stdout is seen.stream
    assert wrong == []
    expected = {f"heard {name}.{i}" for name in range(8) for i in rounds}
    assert sorted(seen.stream.getvalue().splitlines()) == sorted(expected)
