"""Atomic writes, file locks and reading lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.errors import InputError
from fasttrain.files import file_lock, open_atomically, parse_json, printable, read_lines, write_atomically


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError), open_atomically(path) as file:
        file.write(b"half" + None)
    assert path.read_bytes() == b"old"
    # With two concurrent writers, the last one wins.
    with open_atomically(path) as file:
        file.write(b"last")
        write_atomically(path, memoryview(b"first"))
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"last"
    assert os.listdir(path.parent) == ["file"]


def test_the_temporary_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "[file]", tmp_path / "[file] 2"
    code = (
        "import sys, os, pathlib; from fasttrain.files import open_atomically\n"
        "with open_atomically(pathlib.Path(sys.argv[1])): os._exit(1)"
    )
    for written in (path, other):
        subprocess.run([sys.executable, "-c", code, str(written)], check=False)
    assert len(os.listdir(tmp_path)) == 2
    write_atomically(path, b"new")
    left = sorted(os.listdir(tmp_path))
    # Only the temporary file of the same path is removed.
    assert left[1] == "[file]"
    assert left[0].startswith(".[file] 2.")


def test_a_file_and_its_new_folders_are_on_disk_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"content"
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"content")
    partial = calls.pop(2)
    assert partial[1].startswith(f"{path.parent}/.file.")
    folders = [("fsync", str(tmp_path)), ("fsync", str(tmp_path / "a"))]
    assert calls == [*folders, ("replace", str(path)), ("fsync", str(path.parent))]


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


def test_json_that_is_nested_too_deeply_is_invalid() -> None:
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OSError, match="File too large") as raised:
        write_atomically(path, b"content")
    assert raised.value.filename == str(path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_exist_is_refused() -> None:
    with pytest.raises(InputError, match="'/proc/x' cannot be created there; use another path"):
        write_atomically(Path("/proc/x/file"), b"")


def test_control_characters_are_escaped() -> None:
    assert printable("Zürich, 東京 [1]") == "Zürich, 東京 [1]"
    assert printable("\x1b[2J\r\nb\x9b\u202e\udcff") == r"\x1b[2J\r\nb\x9b\u202e\udcff"
