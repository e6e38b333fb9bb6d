"""The cache: what was stored comes back or nothing does, and nothing that goes wrong with it stops a run."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graphcomp.base import cache
from graphcomp.base.cache import VARIABLE, folder, identity, key, load, place, store
from graphcomp.errors import GraphcompWarning

TENSORS = {
    "matrix": torch.randn(3, 3, dtype=torch.float64),
    "count": torch.tensor(7),
    "none": torch.empty(0, 2),
    "half": torch.randn(4).bfloat16(),
    "flags": torch.tensor([True, False]),
}
HERE = "graphcomp.base.cache"
KEY = key(HERE, what="test")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored entry."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    store("kind", KEY, TENSORS)
    return tmp_path / "cache" / "kind" / f"{KEY}.safetensors"


def equal(found: dict[str, Tensor] | None) -> bool:
    return (
        found is not None
        and found.keys() == TENSORS.keys()
        and all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in TENSORS.items())
    )


def test_comes_back_as_it_was(entry: Path) -> None:
    assert equal(load("kind", KEY))
    assert [p.name for p in entry.parent.iterdir()] == [entry.name]
    assert load("kind", key(HERE, what="other")) is None
    assert load("another", KEY) is None


def test_not_contiguous(entry: Path) -> None:
    store("kind", KEY, {"t": torch.arange(6).view(2, 3).T})
    found = load("kind", KEY)
    assert found is not None and found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_key_names_everything() -> None:
    parts = {"program": "a", "options": {"x": 1, "y": None}}
    assert key(HERE, **parts) == key(HERE, **{"options": {"y": None, "x": 1}, "program": "a"})
    others = [
        key(HERE, program="a", options={"x": 2, "y": None}),
        key(HERE, program="a"),
        key(HERE, program="b", options={}),
    ]
    assert len({key(HERE, **parts), *others}) == 4


def test_code_and_versions_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours the code that computes the entry, and no version: that stays while the code changes."""
    keys = [key(HERE, a=1), key("graphcomp.measure.calibrate", a=1)]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__version__", "0.0.0")
        assert key(HERE, a=1) == keys[0]
    monkeypatch.setattr(cache, "digest_of", lambda module: "other code")
    keys.append(key(HERE, a=1))
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    keys.append(key(HERE, a=1))
    assert len(set(keys)) == 4


def test_work_that_is_resumed_is_known_by_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(a=1)
    monkeypatch.setattr(cache, "digest_of", lambda module: "mended code")
    assert identity(a=1) == before != identity(a=2)
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    after = identity(a=1)
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    assert len({before, after, identity(a=1)}) == 3


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_entry_is_not_trusted(entry: Path) -> None:
    """Any bit: in the length, in the header, in the numbers."""
    size, intact = entry.stat().st_size, entry.read_bytes()
    for position in (0, 7, 8, 60, size // 2, size - 1):
        entry.write_bytes(intact)
        flip(entry, position)
        with pytest.warns(GraphcompWarning, match=f"{KEY}.safetensors: found a damaged entry") as caught:
            assert load("kind", KEY) is None
        assert len(caught) == 1
        assert not entry.exists()
    store("kind", KEY, TENSORS)
    assert equal(load("kind", KEY))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_entry_is_not_trusted(entry: Path, length: int) -> None:
    entry.write_bytes(entry.read_bytes()[:length])
    with pytest.warns(GraphcompWarning, match="damaged entry"):
        assert load("kind", KEY) is None


def test_an_entry_under_another_name_is_not_trusted(entry: Path) -> None:
    other = key(HERE, what="other")
    entry.rename(entry.with_name(f"{other}.safetensors"))
    with pytest.warns(GraphcompWarning, match="wrong checksum"):
        assert load("kind", other) is None


def test_a_file_of_somebody_else_is_not_trusted(entry: Path) -> None:
    save_file({"matrix": torch.ones(2)}, entry)
    with pytest.warns(GraphcompWarning, match="wrong checksum"):
        assert load("kind", KEY) is None


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.warns(GraphcompWarning, match=f"cache: {tmp_path}/file/.*not kept; set {VARIABLE}"):
        store("kind", KEY, TENSORS)
    assert load("kind", KEY) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_read(entry: Path) -> None:
    entry.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert equal(load("kind", KEY))
    with pytest.warns(GraphcompWarning, match="not kept"):
        store("kind", key(HERE, what="other"), TENSORS)
    entry.parent.chmod(stat.S_IRWXU)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert folder() is None
    store("kind", KEY, TENSORS)
    assert load("kind", KEY) is None


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/there")
    assert folder() == tmp_path / "there"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "graphcomp"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert folder() == tmp_path / ".cache" / "graphcomp"
    monkeypatch.setattr("sys.platform", "darwin")
    assert folder() == tmp_path / "Library" / "Caches" / "graphcomp"


def test_the_least_used_go_first(monkeypatch: pytest.MonkeyPatch, entry: Path) -> None:
    """Used is written or read; the newest stays even if it is too large alone."""
    names = [key(HERE, number=i) for i in range(4)]
    for i, name in enumerate(names[:3]):
        store("kind", name, TENSORS)
        os.utime(entry.with_name(f"{name}.safetensors"), (i, i))
    entry.unlink()
    assert load("kind", names[0]) is not None
    monkeypatch.setattr(cache, "LIMIT", 3 * entry.with_name(f"{names[0]}.safetensors").stat().st_size)
    store("another", names[3], TENSORS)
    left = {p.stem for p in entry.parent.parent.rglob("*.safetensors")}
    assert left == {names[0], names[2], names[3]}
    monkeypatch.setattr(cache, "LIMIT", 1)
    store("kind", KEY, TENSORS)
    assert [p.stem for p in entry.parent.parent.rglob("*.safetensors")] == [KEY]


def test_folders_of_others_go_like_all_entries(monkeypatch: pytest.MonkeyPatch, entry: Path) -> None:
    """With all that is in them, by when they were asked for last; the one that was just asked for stays."""
    names = [key(HERE, number=i) for i in range(3)]
    for i, name in enumerate(names):
        made = place("engines", name)
        assert made == entry.parent.parent / "engines" / name
        made.joinpath("deep").mkdir()
        made.joinpath("deep", "engine").write_bytes(bytes(100_000))
        os.utime(made, (i, i))
    os.utime(entry, (9, 9))
    monkeypatch.setattr(cache, "LIMIT", 250_000)
    assert place("engines", names[0]) is not None  # the oldest, and in use
    assert {p.name for p in entry.parent.parent.glob("*/*")} == {names[0], names[2], entry.name}
    monkeypatch.setattr(cache, "LIMIT", 1)
    store("kind", KEY, TENSORS)
    assert {p.name for p in entry.parent.parent.glob("*/*")} == {entry.name}
    monkeypatch.setattr(cache, "LIMIT", 1)
    assert place("engines", names[1]) is not None
    assert {p.name for p in entry.parent.parent.glob("*/*")} == {names[1]}


def test_no_folders_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert place("engines", KEY) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.warns(GraphcompWarning, match=f"not kept; set {VARIABLE}"):
        assert place("engines", KEY) is None
