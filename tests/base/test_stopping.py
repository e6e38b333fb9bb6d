"""States that are whole or refused, and signals that wait for the end of a step."""

import signal
import threading
from pathlib import Path

import pytest
import torch

from graphcomp.base import stopping
from graphcomp.base.stopping import load_state, save_state, stoppable
from graphcomp.errors import LoadError, OutputError


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "state.safetensors"
    tensors = {
        "a/x.weight": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "b": torch.tensor(7),
        "c": torch.randn(3, dtype=torch.float64, requires_grad=True),
    }
    save_state(file, "this", {"at": 3, "rows": [{"loss": 0.1}]}, tensors)
    found = load_state(file, "this")
    assert found is not None
    facts, loaded = found
    assert facts == {"at": 3, "rows": [{"loss": 0.1}]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    assert [p.name for p in file.parent.iterdir()] == ["state.safetensors"]


def test_nothing_saved(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none", "this") is None


def test_a_new_state_replaces_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "state"
    for at in (1, 2):
        save_state(file, "this", {"at": at}, {"x": torch.full((2,), at)})
    found = load_state(file, "this")
    assert found is not None and found[0] == {"at": 2} and found[1]["x"].tolist() == [2, 2]


def test_foreign_state(tmp_path: Path) -> None:
    save_state(tmp_path / "state", "that", {}, {"x": torch.zeros(1)})
    with pytest.raises(LoadError, match="state of another training, expected one of this program"):
        load_state(tmp_path / "state", "this")


@pytest.mark.parametrize("damage", ["empty", "short", "text", "other"])
def test_damaged_state(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "state"
    save_state(file, "this", {}, {"x": torch.zeros(100)})
    content = file.read_bytes()
    if damage == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, file)
    else:
        file.write_bytes({"empty": b"", "short": content[:-9], "text": b"hello world"}[damage])
    with pytest.raises(LoadError, match=r"found a damaged file .* delete it to start this pass anew"):
        load_state(file, "this")


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_state(tmp_path / "file" / "state", "this", {}, {"x": torch.zeros(1)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits(number: signal.Signals) -> None:
    before, after = signal.getsignal(number), list[str]()
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        assert not stop
        signal.raise_signal(number)
        after.append("the step goes on")
        assert stop
        raise KeyboardInterrupt
    assert after and signal.getsignal(number) is before


def test_a_signal_that_nobody_looked_at_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGINT)


def test_an_echo_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(times))
    seen = list[int]()
    with pytest.raises(KeyboardInterrupt), stoppable():
        for count in (1, 2, 3):
            signal.raise_signal(signal.SIGINT)
            seen.append(count)
    assert seen == [1, 2]  # the third came later: it ends the work at once


def test_an_ignored_signal_stays_ignored() -> None:
    """As in `nohup command &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_get_no_signals() -> None:
    handlers = list[object]()

    def work() -> None:
        with stoppable() as stop:
            handlers.append(signal.getsignal(signal.SIGINT))
            assert not stop

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
