"""Load frame pairs of a packed set from a disk and from an S3 server, with and without the cache of frames.

    python -m benchmarks.remote [--short] [--source SOURCE]

The server is moto's, in a process of its own on the same machine. With a latency, it waits before it answers
each request, as a server far away would. CPU time is that of the loader and not of the server.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.loaders import OURS, SIZE, our_batches, prepare
from benchmarks.measure import WARM_UPS, Results, command_line, in_own_process, interleave, run_command
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.recipe import recipe_from_dict

BUCKET = "bucket"
# The latency of requests in milliseconds: none, and that of a store in the same or in another region.
LATENCIES = (0, 10, 30)
# Any keys are accepted.
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def serve(latencies: list[int], ports: Connection) -> None:
    """Serve the same objects at one port per latency, and send the ports."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    application = DomainDispatcherApplication(create_backend_app)

    def delayed(latency: int, environ: Any, start_response: Any) -> Any:
        time.sleep(latency / 1e3)
        return application(environ, start_response)

    class Handler(WSGIRequestHandler):
        # Connections are kept, as those to S3.
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    for latency in latencies:
        answer = partial(delayed, latency)
        server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        ports.send(server.server_port)
    ports.recv()


def measure(setting: dict[str, Any], source: str, cache: bool, port: int | None) -> dict[str, float]:
    """Measure the wall time and CPU time per batch. With the cache, all frames are in it before."""
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "XDG_CACHE_HOME": setting["cache"]}
    if not cache:
        # The cache is read even if nothing more is stored in it.
        os.environ["XDG_CACHE_HOME"] += "-empty"
    batch, rounds = setting["batch"], setting["rounds"]
    calls = max(1, setting["pairs"] // batch)
    batches = WARM_UPS + rounds * calls + 16
    data = {
        "source": source,
        "image_size": SIZE,
        "pairs_per_video": batch,
        "cache_size": 8.0 if cache else 0.0,
    }
    recipe = recipe_from_dict({"data": data, "train": {"batch_size": batch, "precision": "fp32"}})
    if cache:
        index = open_source(source, cache_size=recipe.data.cache_size)
        for video, length in enumerate(index.num_frames.tolist()):
            index.read(video, range(length))
    loading = our_batches(recipe, World.single("cpu"), batches)
    timing = interleave({"": partial(next, loading)}, rounds=rounds, calls=calls)[""]
    loading.close()
    return timing.result(batch)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("remote", __doc__)
    help = "videos, frame folders or a packed set to load (default: synthetic scenes)"
    parser.add_argument("--source", type=Path, metavar="SOURCE", help=help)
    args = parser.parse_args(arguments)
    setting: dict[str, Any] = {"batch": 64, "pairs": 128 if args.short else 512, "rounds": 3}
    setting["threads"] = len(os.sched_getaffinity(0))
    results = Results("remote", args, setting=setting)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=([*LATENCIES], theirs), daemon=True)
    server.start()
    ports = [ours.recv() for _ in LATENCIES]
    with tempfile.TemporaryDirectory() as folder:
        paths, results.content["data"] = prepare(Path(folder), args.source, 4 if args.short else 16)
        in_own_process(upload, paths["packed"], ports[0])
        setting = {**setting, "cache": f"{folder}/cache"}
        run = partial(in_own_process, measure, setting)
        results.record(OURS, partial(run, paths["packed"], False, None), group="loaders")
        url = f"s3://{BUCKET}/packed"
        results.record("S3, all in the cache", partial(run, url, True, ports[0]), group="loaders")
        for latency, port in zip(LATENCIES, ports, strict=True):
            name = f"S3, no cache, {latency} ms latency"
            results.record(name, partial(run, url, False, port), group="loaders")
    ours.send(None)
    server.join()
    results.finish()


def upload(packed: str, port: int) -> None:
    """Copy a packed set to the server."""
    import s3fs

    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    fs = s3fs.S3FileSystem()
    fs.mkdir(BUCKET)
    fs.put(f"{packed}/", f"{BUCKET}/packed/", recursive=True)


if __name__ == "__main__":
    run_command(main)
