"""Atomic writes, file locks and reading lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.errors import InputError
from fasttrain.files import file_lock, open_atomically, read_lines, write_atomically


@pytest.mark.parametrize("fsync", [False, True])
def test_a_file_is_replaced_completely_or_not_at_all(fsync: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old", fsync=fsync)
    with pytest.raises(TypeError), open_atomically(path, fsync=fsync) as file:
        file.write(b"half" + None)
    assert path.read_bytes() == b"old"
    # With two concurrent writers, the last one wins.
    with open_atomically(path, fsync=fsync) as file:
        file.write(b"last")
        write_atomically(path, memoryview(b"first"), fsync=fsync)
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"last"
    assert os.listdir(path.parent) == ["file"]


def test_a_lock_is_exclusive_and_released_when_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.lock"
    code = (
        "import sys, os, pathlib; from fasttrain.files import file_lock\n"
        "with file_lock(pathlib.Path(sys.argv[1]), 'taken'): print(flush=True); sys.stdin.read(); os._exit(1)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match="taken"), file_lock(path, "taken"):
            pass
        holder.communicate("")
    with file_lock(path, "taken"):
        pass


def test_lines_are_split_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n\n two\u2028three \nnext\x85line".encode())
    assert read_lines(path) == ["one", "two\u2028three", "next\x85line"]
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"cannot be read .*expected a list"):
        read_lines(path, "a list")
