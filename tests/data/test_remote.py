"""Packed sets and frame lists at URLs: the same run as from a disk, the cache, and failing servers."""

import contextlib
import fcntl
import gc
import http.server
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file
from synthetic import make_loader, write_folders

from fasttrain.__main__ import main
from fasttrain.data import remote
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.sources import open_source
from fasttrain.errors import InputError, LocalInputError

URL = "memory://bucket/packed"
S3_LIST = "s3://bucket/frames/list.txt"
LIST_URL = "memory://bucket/frames/list.txt"
# The number after a folder limits its frames. The last line names a folder that does not exist.
LIST = "class_0/video_0 18 3\n./class_1/video_1\n# no line\nclass_0/video_2,7\nclass_0/missing 3\n"
FRAME = "/bucket/frames/class_1/video_1/00003.jpg"
RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "dino.yaml")
SMALL = [
    *("backbone.weights=random", "backbone.patch_size=16", "backbone.embed_dim=32", "backbone.depth=1"),
    *("backbone.num_heads=2", "data.image_size=32", "data.pairs_per_video=8", "train.accumulate=1"),
    *("train.batch_size=4", "train.steps=4", "train.precision=fp32", "train.tensorboard=false", "device=cpu"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    write_folders(root / "frames", [20, 9, 30])
    assert main(["pack", str(root / "frames"), str(root / "packed")]) == 0
    (root / "frames/list.txt").write_text(LIST)
    return root / "packed"


@pytest.fixture
def memory(packed: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory with the packed set."""
    fs = fsspec.filesystem("memory")
    fs.put(f"{packed}/", "/bucket/packed/", recursive=True)
    fs.put(f"{packed.parent / 'frames'}/", "/bucket/frames/", recursive=True)
    fs.pipe_file("/bucket/frames/list.txt", LIST.encode())
    yield fs
    fs.rm("/", recursive=True)


@pytest.fixture(scope="module")
def s3_url(packed: Path) -> Iterator[str]:
    """The packed set on a server that speaks the protocol of S3."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        fs.put(f"{packed}/", "bucket/packed/", recursive=True)
        fs.put(f"{packed.parent / 'frames'}/", "bucket/frames/", recursive=True)
        # Empty objects with the names of folders, as consoles create them.
        fs.pipe("bucket/frames/class_0/video_0/", b"")
        fs.pipe("bucket/frames/list.txt", LIST.encode())
        yield "s3://bucket/packed"
    server.stop()


def check_equal(index: FrameIndex, source: Path) -> None:
    """Compare all frames with those of the local source."""
    local = open_source(source)
    assert (index.skipped, index.left_out) == (local.skipped, local.left_out)
    assert index.fingerprint() == local.fingerprint()
    for video, length in enumerate(local.num_frames.tolist()):
        # The first and the last frame are far apart; a frame may be asked for twice.
        frames = [length - 1, *range(length), 0]
        for ours, theirs in zip(index.read(video, frames), local.read(video, frames), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def frames(packed: Path) -> Path:
    """The list whose copy in memory is at LIST_URL."""
    return packed.parent / "frames/list.txt"


@pytest.mark.parametrize("is_list", [False, True])
def test_some_of_the_videos(memory, packed: Path, frames: Path, is_list: bool) -> None:
    local, index = open_source(frames if is_list else packed), open_source(LIST_URL if is_list else URL)
    for whole in (local, index):
        chosen = whole.select([2, 1])
        assert chosen.names == [local.names[2], local.names[1]]
        assert chosen.num_frames.tolist() == local.num_frames[[2, 1]].tolist()
        for number, video in enumerate((2, 1)):
            (ours,), (theirs,) = chosen.read(number, [3]), local.read(video, [3])
            np.testing.assert_array_equal(ours, theirs)
        assert len(whole) == 3


def forbid(memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all requests for the contents of frames fail."""
    monkeypatch.setattr(type(memory), "cat_ranges", None)


def cached_tar() -> Path:
    (tar,) = Path(os.environ["XDG_CACHE_HOME"], "fasttrain/frames").glob("*/*.tar")
    return tar


def test_a_run_from_s3_is_the_same_as_from_a_disk(s3_url: str, packed: Path, tmp_path: Path) -> None:
    runs = {"disk": str(packed), "cold": s3_url, "warm": s3_url}
    for name, source in runs.items():
        assert main([RECIPE, *SMALL, f"data.source={source}", f"output={tmp_path / name}"]) == 0
    projections = [load_file(tmp_path / name / "projection.safetensors") for name in runs]
    for projection in projections[1:]:
        for key, tensor in projections[0].items():
            assert tensor.equal(projection[key])


def test_a_run_from_a_list_at_s3_is_the_same_as_from_a_disk(
    s3_url: str, frames: Path, tmp_path: Path
) -> None:
    for name, source in {"disk": frames, "s3": S3_LIST}.items():
        assert main([RECIPE, *SMALL, f"data.source={source}", f"output={tmp_path / name}"]) == 0
    first, second = (load_file(tmp_path / name / "projection.safetensors") for name in ("disk", "s3"))
    assert all(tensor.equal(second[key]) for key, tensor in first.items())
    check_equal(open_source(S3_LIST), frames)


def test_a_run_can_move_to_s3_and_continue(s3_url: str, packed: Path, tmp_path: Path) -> None:
    whole, moved = [f"output={tmp_path / name}" for name in ("whole", "moved")]
    assert main([RECIPE, *SMALL, f"data.source={packed}", "train.save_every=2", whole]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for path in (tmp_path / "moved" / "checkpoints").glob("*4*"):
        path.unlink()
    assert main([RECIPE, *SMALL, f"data.source={s3_url}", "train.save_every=2", moved]) == 0
    first, second = (load_file(tmp_path / name / "projection.safetensors") for name in ("whole", "moved"))
    assert all(tensor.equal(second[key]) for key, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize(("local", "url"), [("packed", "s3://bucket/packed"), ("frames/list.txt", S3_LIST)])
def test_two_processes_share_the_cache(s3_url, packed: Path, local: str, url: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "-m", "fasttrain", RECIPE, *SMALL, "train.batch_size=2"]
    for name, source in {"disk": packed.parent / local, "s3": url}.items():
        run = [f"data.source={source}", f"output={tmp_path / name}"]
        subprocess.run([*command, *run], check=True, capture_output=True)
    first, second = (load_file(tmp_path / name / "projection.safetensors") for name in ("disk", "s3"))
    assert all(tensor.equal(second[key]) for key, tensor in first.items())


def test_a_forked_process_reads_from_s3(s3_url: str, packed: Path) -> None:
    index = open_source(s3_url, cache_size=0)
    index.read(0, [0])
    # Threads of fsspec and of the server exist in this process, but not in the forked one.
    child = multiprocessing.get_context("fork").Process(target=check_equal, args=(index, packed))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_all_threads_have_a_connection(s3_url: str) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    open_source(s3_url)
    # The connected file system, which s3fs shares.
    assert s3fs.S3FileSystem().s3.meta.config.max_pool_connections == 2 * remote.READERS


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, unlike its base class, unless one of the switches is off."""

    lists, ranges = True, True

    def send_head(self):
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (asked and self.ranges and path.is_file()):
            return super().send_head()
        content = path.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content)

    def list_directory(self, path):
        return super().list_directory(path) if self.lists else self.send_error(403)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def web_server(folder: Path, **switches: bool) -> Iterator[str]:
    handler = type("Switched", (Handler,), switches)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server_need_not_list_its_files(packed: Path, lists: bool) -> None:
    with web_server(packed.parent, lists=lists) as url:
        check_equal(open_source(f"{url}/packed/"), packed)


def test_a_web_server_without_byte_ranges_is_refused(packed: Path) -> None:
    with web_server(packed, ranges=False) as url, pytest.raises(InputError, match="sends whole files"):
        open_source(url).read(0, [0])


@pytest.mark.parametrize("gap", [0, remote.MAX_GAP])
def test_frames_are_those_of_the_local_set(memory, packed: Path, gap: int, monkeypatch) -> None:
    monkeypatch.setattr(remote, "MAX_GAP", gap)
    index = open_source(URL)
    check_equal(index, packed)
    # The cache has all frames now.
    monkeypatch.setattr(type(memory), "cat_ranges", None)
    check_equal(index, packed)


def test_frames_of_a_list_are_those_of_the_local_folders(memory, frames: Path, monkeypatch) -> None:
    index = open_source(LIST_URL)
    assert index.is_remote
    assert index.skipped == [("class_0/missing", "does not exist")]
    check_equal(index, frames)
    check_equal(open_source(LIST_URL, cache_size=0), frames)
    # The cache has all frames now.
    forbid(memory, monkeypatch)
    check_equal(open_source(LIST_URL), frames)


def test_a_folder_is_listed_once(memory, frames: Path, monkeypatch) -> None:
    listed, original = [], type(memory).ls
    monkeypatch.setattr(
        type(memory), "ls", lambda fs, path, **_: (listed.append(path), original(fs, path))[1]
    )
    open_source(LIST_URL)
    root = "/bucket/frames"
    videos = [f"{root}/class_0/video_0", f"{root}/class_0/video_2", f"{root}/class_1/video_1"]
    # In addition, the folders that contain them, once each.
    assert sorted(listed) == sorted([*videos, f"{root}/class_0", f"{root}/class_1"])


def test_paths_in_lists_at_urls(memory, tmp_path: Path) -> None:
    """A path may have the form of another one and its number, and be outside of the folder of the list."""
    memory.mkdir("/bucket/lists")
    memory.copy("/bucket/frames/class_1/video_1/", "/bucket/clip/", recursive=True)
    memory.copy("/bucket/frames/class_1/video_1/", "/bucket/clip 2/", recursive=True)
    lines = ["../clip", "../clip 2", "../clip 2 5", "memory://bucket/frames/class_1/video_1 4", "../clip 10"]
    memory.pipe_file("/bucket/lists/list.csv", "\r\n".join(lines).encode())
    index = open_source("memory://bucket/lists/list.csv")
    lengths = dict(zip(index.names, index.num_frames.tolist(), strict=True))
    assert lengths == {"../clip": 9, "../clip 2": 9, "memory://bucket/frames/class_1/video_1": 4}
    assert index.skipped == [
        ("../clip 2", "duplicate entry in the list"),
        ("../clip", "duplicate entry in the list"),
    ]
    (tmp_path / "list.txt").write_text("# by URL\nmemory://bucket/clip\nmemory://bucket/clip 2 5\n")
    index = open_source(tmp_path / "list.txt")
    assert index.names == ["memory://bucket/clip", "memory://bucket/clip 2"]
    assert index.num_frames.tolist() == [9, 5]


def test_a_replaced_frame_is_read_again_in_the_next_run(memory, frames: Path, monkeypatch) -> None:
    check_equal(open_source(LIST_URL), frames)
    # Of the same size.
    other = memory.cat_file(FRAME)[:-3] + b"\0\xff\xd9"
    memory.pipe_file(FRAME, other)
    (read,) = open_source(LIST_URL).read(2, [3])
    assert read.tobytes() == other


def test_a_damaged_entry_of_the_cache_of_a_list_is_read_again(memory, frames: Path) -> None:
    check_equal(open_source(LIST_URL), frames)
    (cached,) = Path(os.environ["XDG_CACHE_HOME"], "fasttrain/frames").glob("*/frames")
    cached.write_bytes(cached.read_bytes()[:-9000] + b"\1" * 9000)
    check_equal(open_source(LIST_URL), frames)


def test_a_frame_that_is_gone_is_unreadable(memory) -> None:
    index = open_source(LIST_URL)
    memory.rm(FRAME)
    with pytest.raises(UnreadableFrameError, match=r"00003.jpg does not exist") as caught:
        index.read(2, [1, 3])
    assert caught.value.frame == 3


@pytest.mark.parametrize("lists", [True, False])
def test_a_list_at_a_web_server_needs_its_listings(frames: Path, lists: bool) -> None:
    # This server does not list the sizes of files, without which frames are not cached.
    with web_server(frames.parent, lists=lists, ranges=False) as url:
        if lists:
            index, local = open_source(f"{url}/list.txt"), open_source(frames)
            assert index.fingerprint() == local.fingerprint()
            np.testing.assert_array_equal(index.read_frame(2, 8), local.read_frame(2, 8))
        else:
            with pytest.raises(InputError, match=r"class_0' cannot be read: 403"):
                open_source(f"{url}/list.txt")


def test_the_order_of_samples_is_that_of_the_local_set(memory, packed: Path) -> None:
    samples = []
    for source in (str(packed), URL):
        loader = make_loader(open_source(source), pairs_per_video=8, batch_size=4)
        samples.append(np.concatenate([pairs.samples for pairs in loader]).tolist())
        loader.close()
    assert samples[0] == samples[1]


def test_a_damaged_entry_of_the_cache_is_read_again(memory, packed: Path) -> None:
    check_equal(open_source(URL), packed)
    size = cached_tar().stat().st_size
    cached_tar().write_bytes(b"\1" * size)
    index = open_source(URL)
    check_equal(index, packed)
    assert cached_tar().read_bytes().count(b"\1" * 99) < size / 99


def test_a_replaced_set_is_noticed(memory, packed: Path, tmp_path: Path) -> None:
    check_equal(open_source(URL), packed)
    write_folders(tmp_path / "frames", [5, 6])
    assert main(["pack", str(tmp_path / "frames"), str(tmp_path / "packed")]) == 0
    memory.put(f"{tmp_path / 'packed'}/", "/bucket/packed/", recursive=True)
    check_equal(open_source(URL), tmp_path / "packed")


def test_a_full_cache_stores_no_more(memory, packed: Path) -> None:
    limit = 64 * 2**10
    check_equal(open_source(URL, cache_size=limit / 2**30), packed)
    used = sum(path.stat().st_blocks * 512 for path in cached_tar().parent.iterdir())
    # Each range may touch a block of 4 KiB at both of its ends.
    assert limit / 4 < used < 2 * limit


def test_sources_without_users_are_removed_to_make_room(memory, packed: Path) -> None:
    memory.put(f"{packed}/", "/bucket/other/", recursive=True)
    size = 200 * 2**10 / 2**30  # enough for one of them
    first = open_source(URL, cache_size=size)
    check_equal(first, packed)
    folder = cached_tar().parent
    check_equal(open_source("memory://bucket/other", cache_size=size), packed)
    assert folder.exists()
    del first
    gc.collect()
    check_equal(open_source("memory://bucket/other", cache_size=size), packed)
    assert not folder.exists()


def test_a_folder_that_another_process_uses_again_is_not_removed(tmp_path: Path, monkeypatch) -> None:
    folder, flock, users = tmp_path / "source", fcntl.flock, []
    remote._lock_shared(folder).close()

    def late(file, operation: int) -> None:
        monkeypatch.undo()
        # Another process removes the folder before this one has the lock, and a third one creates it again.
        assert remote._remove_unused(folder)
        users.append(remote._lock_shared(folder))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    remote._remove_unused(folder)
    assert users
    assert (folder / "lock").exists()


def test_a_failing_disk_ends_the_cache_but_not_the_run(memory, packed: Path, request) -> None:
    index = open_source(URL)
    request.getfixturevalue("full_disk")
    with pytest.warns(UserWarning, match="Cannot write to the cache"):
        check_equal(index, packed)


def test_a_connection_that_fails_once_is_repeated(memory, packed: Path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0, 0))
    index, original, failures = open_source(URL), type(memory).cat_ranges, []

    def unstable(self, *args, **kwargs):
        if len(failures) % 3 < 2:
            failures.append(None)
            raise ConnectionResetError("connection reset by peer")
        failures.append(None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "cat_ranges", unstable)
    with pytest.warns(UserWarning, match="cannot be read now: connection reset by peer"):
        check_equal(index, packed)
    assert failures


def test_a_server_that_is_gone_stops_the_run_instead_of_replacing_samples(memory, monkeypatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0,))
    index = open_source(URL)

    def gone(self, *args, **kwargs):
        raise ConnectionRefusedError("connection refused")

    monkeypatch.setattr(type(memory), "cat_ranges", gone)
    loader = make_loader(index, pairs_per_video=8, batch_size=4)
    with pytest.raises(LocalInputError, match=r"frames-1of1-000000.tar' cannot be read: connection refused"):
        next(iter(loader))
    loader.close()


def test_a_damaged_object_is_an_unreadable_frame(memory) -> None:
    tar = bytearray(memory.cat_file("/bucket/packed/frames-1of1-000000.tar"))
    tar[700:705] = b"wrong"
    memory.pipe_file("/bucket/packed/frames-1of1-000000.tar", bytes(tar))
    with pytest.raises(UnreadableFrameError, match=r"checksum mismatch in frames-1of1-000000.tar"):
        open_source(URL).read(0, [1, 0])


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        (
            "memory://bucket/nothing",
            "auto",
            r"'memory://bucket/nothing' is not a packed set \(no such bucket or folder; check the URL\)",
        ),
        ("memory://bucket/frames", "auto", r"is not a packed set \(it has no pack-1of1\.json\)"),
        ("memory://bucket/video.mp4", "auto", "only packed sets and lists of frame folders are read"),
        ("memory://bucket/packed", "folders", "only packed sets and lists of frame folders are read"),
        ("memory://bucket/list.txt", "auto", "list.txt' cannot be read: it does not exist"),
        ("memory://bucket/packed/frames-1of1-000000.tar", "list", "is not a text in UTF-8"),
        ("nothing://bucket", "auto", "Protocol not known: nothing"),
    ],
)
def test_other_urls_are_refused_with_one_line(memory, url: str, kind, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(url, kind=kind)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("memory://bucket/frames\nvideo", r"lists both URLs \(first: 'memory://bucket/frames'\) and paths"),
        (
            "memory://bucket/videos/video.mp4",
            "lists 'memory://bucket/videos/video.mp4': only packed sets and",
        ),
        ("memory://bucket/videos", "lists 'memory://bucket/videos': only packed sets and lists of frame"),
        ("memory://bucket/nothing 3", r"no line is an existing path.*first: 'memory://bucket/nothing'"),
        (f"memory:/{FRAME}", "contains no readable video.*is an image; list the folder"),
        ("nothing://bucket/frames", "Protocol not known: nothing"),
        ("zip://frames::memory://bucket/frames.zip", "cannot be opened"),
        ("memory://bucket", "no line is an existing path"),
    ],
)
def test_other_lists_of_urls_are_refused_with_one_line(
    memory, lines: str, message: str, tmp_path: Path
) -> None:
    memory.pipe_file("/bucket/videos/video.mp4", b"")
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "list.txt")


def test_a_list_of_kinetics_at_a_url_is_refused(memory) -> None:
    memory.pipe_file("/bucket/train.csv", b"label,youtube_id,time_start,time_end,split\n")
    with pytest.raises(InputError, match=r"train.csv' is a list of Kinetics: only packed sets and lists"):
        open_source("memory://bucket/train.csv")


def test_a_list_of_urls_cannot_be_packed(tmp_path: Path, capsys) -> None:
    (tmp_path / "list.txt").write_text("s3://bucket/frames/video 20\n")
    assert main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "packed")]) == 2
    assert "list.txt' lists URLs, but only files of this machine are packed" in capsys.readouterr().err


def test_errors_name_the_url(memory) -> None:
    memory.pipe_file("/bucket/packed/pack-1of1.json", b"{")
    with pytest.raises(InputError, match=r"'memory://bucket/packed/pack-1of1.json' is damaged"):
        open_source(URL)


def test_a_missing_package_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gcsfs .*Run: pip install 'fsspec\[gs\]'"):
        open_source("gs://bucket/packed")


def test_a_missing_bucket_and_missing_credentials_are_one_line(s3_url: str, monkeypatch, tmp_path) -> None:
    with pytest.raises(InputError, match=r"is not a packed set \(no such bucket or folder"):
        open_source("s3://missing-bucket/packed")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})
    for url in (s3_url, S3_LIST):
        with pytest.raises(InputError, match="cannot be read: Unable to locate credentials"):
            open_source(url)
    (tmp_path / "list.txt").write_text("s3://bucket/frames/class_0/video_0\n")
    with pytest.raises(InputError, match=r"class_0' cannot be read: Unable to locate credentials"):
        open_source(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "command",
    [
        ["pack", "s3://bucket/videos", "packed"],
        ["pack", "--check", "s3://bucket/packed"],
        ["eval", "davis", "--root", "s3://bucket/davis", "--backbone", "dino"],
    ],
)
def test_commands_for_local_files_refuse_urls(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(command)
    assert "expected a path on this machine" in capsys.readouterr().err


def test_a_run_folder_cannot_be_a_url(packed: Path, capsys) -> None:
    assert main([RECIPE, *SMALL, f"data.source={packed}", "output=s3://bucket/run"]) == 2
    assert "output: 's3://bucket/run' is a URL" in capsys.readouterr().err


def test_consistency_reads_a_url(memory, tmp_path: Path) -> None:
    backbone = ["--backbone", "test_vit", "--weights", "random", "--image-size", "32"]
    output = ["--root", URL, "--output", str(tmp_path)]
    assert main(["eval", "consistency", *backbone, *output]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1
