"""Packed sets at URLs: the same data and the same run as from a disk, the cache, and failures of the server."""

import contextlib
import http.server
import json
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
    runs = {"disk": str(packed), "cold": s3_url, "warm": s3_url, "uncached": s3_url}
    for name, source in runs.items():
        size = ["data.cache_size=0"] if name == "uncached" else []
        run = [f"data.source={source}", f"output={tmp_path / name}", *size]
        assert main([RECIPE, *SMALL, *run]) == 0
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
    lists, ranges = True, True

    def send_head(self):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (match and self.ranges and path.is_file()):
            return super().send_head()
        start, end = int(match[1]), min(int(match[2]), path.stat().st_size - 1)
        file = path.open("rb")
        file.seek(start)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{path.stat().st_size}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        return file

    def copyfile(self, source, outputfile):
        length = re.search(rb"Content-Length: (\d+)", b"".join(getattr(self, "_headers_buffer", [])))
        return super().copyfile(source, outputfile) if length else super().copyfile(source, outputfile)

    def list_directory(self, path):
        return super().list_directory(path) if self.lists else self.send_error(403)

    def log_message(self, *args):
        pass
