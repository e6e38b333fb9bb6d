"""What all tests share: one thread (small networks run faster, above all where tests share the cores), random
numbers that do not depend on what ran before, and a cache of their own, empty for every test.
"""

import itertools
import random
import signal
from collections.abc import Iterator

import pytest
import torch

from graphcomp.base.cache import VARIABLE

MOST = 12
"""Parameter sets of a test that are quick; of more so many are drawn, once and for all: others are slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in tests.values():
        for item in random.Random(0).sample(several, max(0, len(several) - MOST)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Shells start background jobs, and some CI systems all jobs, with Ctrl-C ignored; tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also for fixtures of modules, which are made before those of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees what another one computed; the folder is only made if it is used."""
    monkeypatch.setenv(VARIABLE, str(tmp_path_factory.getbasetemp() / f"cache{next(_numbers)}"))
