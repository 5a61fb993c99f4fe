"""Files of a user's folder: one process alone, lines as files end them."""

import errno
import fcntl
from pathlib import Path

import pytest

from fasttrain.errors import InputError
from fasttrain.files import alone, text_lines, write_atomically


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder leaves between this process's opening of the file and its locking."""
    lock, flock = tmp_path / "lock", fcntl.flock
    left = []

    def leave_first(file: object, how: int) -> None:
        if not left:
            left.append(lock.unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", leave_first)
    with alone(lock, "taken"):
        with pytest.raises(InputError, match="taken"), alone(lock, "taken"):
            pass
        assert lock.exists()
    assert not lock.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / "lock", "taken"), alone(tmp_path / "lock", "taken"):
        pass


def test_a_file_system_that_never_shows_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.samestat", lambda one, other: False)
    with alone(tmp_path / "lock", "taken"):
        pass


def test_lines_end_where_files_end_them(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n\n two\u2028three \nnext\x85line".encode())
    assert text_lines(path) == ["one", "two\u2028three", "next\x85line"]


def test_writers_of_one_file_have_partial_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two containers may have one number and one folder."""
    write_bytes, inner = Path.write_bytes, []

    def write(path: Path, content: bytes) -> int:
        written = write_bytes(path, content)
        if not inner:
            inner.append(path)
            write_atomically(tmp_path / "file", b"theirs")
        return written

    monkeypatch.setattr(Path, "write_bytes", write)
    write_atomically(tmp_path / "file", b"ours")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"ours"
