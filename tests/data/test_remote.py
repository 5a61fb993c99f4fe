"""Packed sets at URLs: the same data and the same run as from a disk, the cache, and failing servers."""

import contextlib
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
    return root / "packed"


@pytest.fixture
def memory(packed: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory with the packed set."""
    fs = fsspec.filesystem("memory")
    fs.put(f"{packed}/", "/bucket/packed/", recursive=True)
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
        yield "s3://bucket/packed"
    server.stop()


def check_equal(index: FrameIndex, packed: Path) -> None:
    """Compare all frames with those of the local set."""
    local = open_source(packed)
    assert index.fingerprint() == local.fingerprint()
    for video, length in enumerate(local.num_frames.tolist()):
        # The first and the last frame are far apart; a frame may be asked for twice.
        frames = [length - 1, *range(length), 0]
        for ours, theirs in zip(index.read(video, frames), local.read(video, frames), strict=True):
            np.testing.assert_array_equal(ours, theirs)


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
def test_two_processes_share_the_cache(s3_url: str, packed: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "-m", "fasttrain", RECIPE, *SMALL, "train.batch_size=2"]
    for name, source in {"disk": str(packed), "s3": s3_url}.items():
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
            r"'memory://bucket/nothing' is not a packed set \(it has no pack",
        ),
        ("memory://bucket/video.mp4", "auto", "only packed sets are read from URLs"),
        ("memory://bucket/list.txt", "auto", "only packed sets are read from URLs"),
        ("memory://bucket/packed", "folders", "only packed sets are read from URLs"),
        ("nothing://bucket", "auto", "Protocol not known: nothing"),
    ],
)
def test_other_urls_are_refused_with_one_line(memory, url: str, kind, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(url, kind=kind)


def test_a_list_cannot_contain_urls(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("s3://bucket/frames/video 20\n")
    with pytest.raises(InputError, match=r"list.txt' lists the URL 's3://bucket/frames/video 20'"):
        open_source(tmp_path / "list.txt")


def test_errors_name_the_url(memory) -> None:
    memory.pipe_file("/bucket/packed/pack-1of1.json", b"{")
    with pytest.raises(InputError, match=r"'memory://bucket/packed/pack-1of1.json' is damaged"):
        open_source(URL)


def test_a_missing_package_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gcsfs .*Run: pip install 'fsspec\[gs\]'"):
        open_source("gs://bucket/packed")


def test_a_missing_bucket_and_missing_credentials_are_one_line(s3_url: str, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"is not a packed set \(it has no pack-1of1\.json"):
        open_source("s3://missing-bucket/packed")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})
    with pytest.raises(InputError, match="cannot be read: Unable to locate credentials"):
        open_source(s3_url)


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
