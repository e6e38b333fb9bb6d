"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from graphcomp.errors import OutputError
from graphcomp.files import atomic_directory, atomic_file


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_failure_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    raised = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), atomic_file(old) as file:
        file.write_text("half")
        raise error
    with pytest.raises(raised), atomic_directory(tmp_path / "new", bool) as directory:
        (directory / "part").write_text("half")
        raise error
    assert [f.name for f in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "old"


def test_an_output_error_names_path_and_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"x\.json: found 'No space left on device', expected"),
        atomic_file(tmp_path / "x.json"),
    ):
        raise OSError(28, "No space left on device")


def test_atomic_file_makes_parents_keeps_the_suffix_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.onnx"
    for text in ("one", "two"):
        with atomic_file(path) as file:
            assert file.suffix == ".onnx" and file.parent == path.parent
            file.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_atomic_directory_asks_before_it_replaces(tmp_path: Path) -> None:
    final = tmp_path / "run"
    final.mkdir()
    for text in ("one", "two"):
        with atomic_directory(final, lambda d: (d / "mark").is_file()) as new:
            assert not any(new.iterdir())
            (new / "mark").write_text(text)
        assert (final / "mark").read_text() == text
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
