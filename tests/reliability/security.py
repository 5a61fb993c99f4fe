"""Hostile input: packed sets, checkpoints, weights, recipes, names, caches and links made by someone else.

Each trial runs commands on such input. None may run code from it, write outside the output folder, send
control characters to the terminal, put markup into the report, or fill the memory.
"""

from __future__ import annotations

import gzip
import html.parser
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from synthetic import MODEL, SMALL, encode_video, picture, write_davis, write_folders, write_jhmdb, write_run

from fasttrain.data.packed import ShardIndex
from fasttrain.data.sources import open_source
from fasttrain.data.video_cache import cache_path
from fasttrain.data.video_cache import read_cache as read_video_cache
from reliability.faults import recipe
from reliability.forks import run_forked
from reliability.trials import Ended

SECONDS = 60.0
# A title for the terminal, a cleared screen, a carriage return, a forged message, and reversed text.
HOSTILE = "\x1b]0;title\x07\x1b[2J\r\x9b31m\nfasttrain: all is well\u202egpj"
MARKUP = '<img src=x onerror="alert(1)">'
# Elements of the report, without those that can run code or load files.
ELEMENTS = {
    "html", "head", "body", "meta", "title", "style", "nav", "div", "h1", "h2", "h3", "p", "small", "b", "a",
    "ul", "li", "table", "tr", "th", "td", "figure", "figcaption", "img", "video", "details", "summary",
    "pre",
}  # fmt: skip
# More memory than any command may use in addition to what the libraries need.
BOMB = 3 * 2**29


class Run:
    """Runs commands, and counts them and their memory."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.counts: Counter[str] = Counter()

    def __call__(self, *words: object, environment: dict[str, str] | None = None) -> Ended:
        self.counts["commands"] += 1
        arguments = [os.fsdecode(word) if isinstance(word, Path) else str(word) for word in words]
        ended, figures = run_forked(arguments, seconds=SECONDS, log=self.log, environment=environment)
        self.counts["peak_mib"] = max(self.counts["peak_mib"], figures.get("peak_kib", 0) // 1024)
        return ended


Trial = Callable[[Path, Run], Iterator[str]]


def run(folder: Path) -> dict[str, Any]:
    failures = []
    command = Run(folder)
    base = folder / "base"
    write_folders(base / "frames", [8] * 6)
    videos = base / "videos"
    videos.mkdir()
    for video in range(2):
        encode_video(videos / f"{video}.mp4", [picture(video, frame) for frame in range(8)])
    for trial in TRIALS:
        own = folder / trial.__name__
        shutil.copytree(base, own)
        failures += [f"{trial.__name__}: {line}" for line in trial(own, command)]
        command.counts["trials"] += 1
    return {"failures": failures, **dict(sorted(command.counts.items()))}


def train(folder: Path, run: Run, *words: str, source: str = "frames", **environment: str) -> Ended:
    """Train a tiny model in `folder`/run on a source in `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(recipe(folder / source, folder / "run", tensorboard=False))
    return run(path, *words, environment={"XDG_CACHE_HOME": str(folder / "cache")} | environment)


def refused(what: str, ended: Ended) -> Iterator[str]:
    if not ended.is_clean_refusal:
        yield f"{what}: expected one line and exit code 2, got {ended.code}: {ended.output[-200:]!r}"


# --- packed sets ---------------------------------------------------------------------------------------


def tar_members(folder: Path, run: Run) -> Iterator[str]:
    """Members of a shard that lead out of the folder are neither written by `pack` nor extracted."""
    inside = folder / "lists"
    inside.mkdir()
    (inside / "list.txt").write_text("../frames/class_0/video_0\n../frames/class_1/video_1\n")
    packed = folder / "packed"
    ended = run("pack", inside / "list.txt", packed)
    if ended.code != 0:
        yield f"pack: {ended.output[-200:]!r}"
    shard = packed / "frames-1of1-000000.tar"
    with tarfile.open(shard) as archive:
        for member in archive:
            if ".." in member.name.split("/") or member.name.startswith("/") or not member.isfile():
                yield f"pack wrote the member {member.name!r}"
    for name, kind, target in (
        ("../../outside.jpg", tarfile.REGTYPE, ""),
        (str(folder / "outside.jpg"), tarfile.REGTYPE, ""),
        ("outside", tarfile.SYMTYPE, "/etc"),
        ("outside/passwd", tarfile.LNKTYPE, "/etc/passwd"),
        ("device", tarfile.CHRTYPE, ""),
    ):
        hostile = folder / "hostile"
        shutil.rmtree(hostile, ignore_errors=True)
        shutil.copytree(packed, hostile)
        replace_member(hostile / shard.name, name, kind, target)
        before = set(folder.rglob("*"))
        yield from refused(f"pack --check, member {name!r}", run("pack", "--check", hostile))
        train(folder, run, "output=" + str(folder / "other"), source="hostile")
        shutil.rmtree(folder / "other", ignore_errors=True)
        made = {path for path in set(folder.rglob("*")) - before if path.name != "recipe.yaml"}
        if made:
            yield f"member {name!r}: {sorted(made)[0]} was written"


def replace_member(shard: Path, name: str, kind: bytes, target: str) -> None:
    """Give the first member of a shard, and its video in the index, another name and kind."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    header = member.tobuf(tarfile.GNU_FORMAT)[-512:]
    content = bytearray(shard.read_bytes())
    content[:512] = header
    shard.write_bytes(content)
    index = ShardIndex.read(shard)
    index.names[0] = name.rpartition("/")[0] or name
    shard.with_suffix(".npz").write_bytes(index.to_bytes())


# --- code in pickles and YAML --------------------------------------------------------------------------


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def pickles(folder: Path, run: Run) -> Iterator[str]:
    """No command unpickles objects."""
    executed = folder / "executed"
    payload = Payload(executed)
    for name, zipped in (("zip.pth", True), ("legacy.pth", False), ("pytorch_model.bin", True)):
        torch.save({"state_dict": payload}, folder / name, _use_new_zipfile_serialization=zipped)
        ended = train(folder, run, f"backbone.weights={folder / name}")
        yield from refused(f"weights {name}", ended)
        ended = run("eval", "davis", "--root", folder, *MODEL, "--weights", folder / name)
        yield from refused(f"eval --weights {name}", ended)
    (folder / "plain.pt").write_bytes(pickle.dumps(payload))
    yield from refused("a plain pickle", train(folder, run, f"backbone.weights={folder / 'plain.pt'}"))
    if (ended := train(folder, run)).code != 0:
        yield f"training: {ended.output[-200:]!r}"
    torch.save({"step": 4, "payload": payload}, folder / "run" / "checkpoints" / "step_00000004.pt")
    yield from refused("a checkpoint", train(folder, run))
    shutil.copy(folder / "zip.pth", folder / "run" / "projection.safetensors")
    yield from refused("export", run("export", folder / "run", folder / "encoder.pt2"))
    if (ended := run("pack", folder / "frames", folder / "packed")).code != 0:
        yield f"pack: {ended.output[-200:]!r}"
    index = folder / "packed" / "frames-1of1-000000.npz"
    with np.load(index) as content:
        arrays = dict(content)
    for key in ("told", "lengths", "blocks"):
        np.savez(index, **arrays | {key: np.array([payload], dtype=object)})
        yield from refused(f"pack --check, {key}", run("pack", "--check", folder / "packed"))
        yield from refused(
            f"training, {key}", train(folder, run, "output=" + str(folder / "x"), source="packed")
        )
    if executed.exists():
        yield "code from a pickle was executed"


def yaml_tags(folder: Path, run: Run) -> Iterator[str]:
    """YAML tags do not create objects, and aliases do not fill the memory."""
    executed = folder / "executed"
    tag = f"!!python/object/apply:os.system ['touch {executed}']"
    (folder / "tag.yaml").write_text(f"output: {tag}\n")
    yield from refused("a tag in a recipe", run(folder / "tag.yaml"))
    yield from refused("a tag in an override", train(folder, run, f"train.steps={tag}"))
    (folder / "base.yaml").write_text(f"seed: {tag}\n")
    (folder / "derived.yaml").write_text("base: base.yaml\n")
    yield from refused("a tag in a base recipe", run(folder / "derived.yaml"))
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(f"seed: {tag}\n")
    yield from refused("a tag in the recipe of a run", train(folder, run))
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    (folder / "aliases.yaml").write_text("\n".join([*lines, "output: *a9"]) + "\n")
    yield from refused("nested aliases", run(folder / "aliases.yaml"))
    if executed.exists():
        yield "code from YAML was executed"


# --- names ---------------------------------------------------------------------------------------------


def names_on_the_terminal(folder: Path, run: Run) -> Iterator[str]:
    """Names of videos, runs, recipes and sequences cannot control the terminal or forge a line."""
    frames = folder / "frames" / HOSTILE
    frames.mkdir()
    (frames / "0.jpg").write_bytes(b"no image")
    (folder / "videos" / f"{HOSTILE}.mp4").write_bytes(b"no video")
    (folder / f"{HOSTILE}.yaml").write_text("seed: x\n")
    davis = write_davis(folder / "davis")
    (davis / "ImageSets/2017/val.txt").write_text(HOSTILE.split("\n")[0] + "\n")
    (folder / HOSTILE).mkdir()
    write_run(folder / HOSTILE / "run")
    evaluation = ("--run", folder / HOSTILE / "run", "--device", "cpu", "--output", folder / "eval")
    commands: list[Ended] = [
        train(folder, run, "data.max_bad_fraction=1", "data.pairs_per_video=4"),
        train(folder, run, f"output={folder / HOSTILE / 'run'}", source="videos"),
        run("pack", folder / "frames", folder / "packed"),
        run("pack", folder / "videos", folder / "packed videos"),
        run(folder / f"{HOSTILE}.yaml"),
        run(folder / f"{HOSTILE} missing.yaml"),
        run("report", folder / HOSTILE, "--output", folder / "page.html"),
        run("export", folder / HOSTILE / "run", folder / HOSTILE / "encoder.pt2"),
        run("eval", "davis", "--root", davis, *evaluation),
        run("eval", "consistency", "--root", folder / "frames", *evaluation, "--image-size", "64"),
    ]
    for number, ended in enumerate(commands):
        bad = {c for c in ended.output if not c.isprintable() and c != "\n"}
        if bad or "\nfasttrain: all is well" in ended.output:
            yield f"command {number} printed {sorted(bad)}: {ended.output[-300:]!r}"
        if ended.code not in (0, 2):
            yield f"command {number} ended with {ended.code}: {ended.output[-300:]!r}"


class Elements(html.parser.HTMLParser):
    """Collects what a page must not contain."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            self.problems.append(f"the element {tag}")
        for name, value in attrs:
            if name.startswith("on") or (
                name in ("src", "href") and not (value or "").startswith(("data:", "#"))
            ):
                self.problems.append(f"{tag} {name}={value}")


def names_in_the_report(folder: Path, run: Run) -> Iterator[str]:
    """Names in the report are text, and only pictures of the evaluation are embedded."""
    secret = folder / "secret.png"
    Image.fromarray(picture(0, 0)).save(secret)
    name = MARKUP.replace("/", "")
    source = write_run(folder / name)
    (source / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    evaluation = source / "eval" / name / "result.json"
    evaluation.parent.mkdir(parents=True)
    (evaluation.parent / "figures").mkdir()
    shutil.copy(secret, evaluation.parent / "figures" / f"{name}.png")
    content: dict[str, Any] = {
        "task": MARKUP,
        "model": {"backbone": MARKUP, "weights": f"</title><script>alert(1)</script>{MARKUP}"},
        "pictures": [f"{name}.png"],
        "results": {MARKUP: {f"</td>{MARKUP}": 1.0}},
    }
    page = folder / "page.html"
    evaluation.write_text(json.dumps(content))
    if (ended := run("report", source, "--output", page)).code != 0:
        yield f"report: {ended.output[-200:]!r}"
        return
    elements = Elements()
    elements.feed(page.read_text())
    yield from elements.problems
    if page.read_text().count("<img") != 2:
        yield "the pictures are missing from the page"
    # Without metrics, nothing else can be shown.
    (source / "metrics.jsonl").unlink()
    for hostile in (
        {"pictures": ["../../../secret.png"]},
        {"pictures": [str(secret)]},
        {"pictures": ["/etc/passwd"]},
        {"pictures": [7]},
        {"results": {"before": {"J": MARKUP}}},
        {"results": {"before": MARKUP}},
        {"model": MARKUP},
    ):
        evaluation.write_text(json.dumps(content | hostile))
        yield from refused(f"report on {hostile}", run("report", source, "--output", page))


def names_of_sequences(folder: Path, run: Run) -> Iterator[str]:
    """A list of sequences cannot name a place outside the output folder."""
    output = folder / "deep" / "output"
    davis, jhmdb = write_davis(folder / "davis"), write_jhmdb(folder / "jhmdb")
    for kind in ("JPEGImages", "Annotations"):
        for path in list((davis / kind / "480p" / "alpha").iterdir()):
            shutil.copy(path, davis / kind / path.name)
    clips = [(jhmdb / "joint_positions", "joint_positions.mat"), (jhmdb / "Rename_Images", "*.png")]
    for root, pattern in clips:
        for path in (root / "wave" / "alpha").glob(pattern):
            shutil.copy(path, root / path.name)
    before = set(folder.rglob("*"))
    (davis / "ImageSets/2017/val.txt").write_text("..\n")
    (jhmdb / "splits/wave_test_split1.txt").write_text("... 2\n../../joint_positions.avi 2\n.. 2\n../.. 2\n")
    (folder / "list.txt").write_text("../wave/..\n")
    common = (*MODEL, "--output", output)
    yield from refused("davis", run("eval", "davis", "--root", davis, *common, *SMALL["davis"]))
    yield from refused("jhmdb", run("eval", "jhmdb", "--root", jhmdb, *common, *SMALL["jhmdb"]))
    listed = ("--list", folder / "list.txt")
    yield from refused("jhmdb, list", run("eval", "jhmdb", "--root", jhmdb, *common, *listed))
    for path in set(folder.rglob("*")) - before:
        if not path.is_relative_to(output.parent) and path.name != "list.txt":
            yield f"{path.relative_to(folder)} was written"


# --- caches and links of other users -------------------------------------------------------------------


def planted_caches(folder: Path, run: Run) -> Iterator[str]:
    """A video cache that another user has written is not read."""
    if os.geteuid() != 0:
        run.counts["skipped: files cannot be given to another user"] += 1
        return
    cache = folder / "cache"
    if (ended := train(folder, run, "data.pairs_per_video=4", source="videos")).code != 0:
        yield f"training: {ended.output[-200:]!r}"
    (written,) = cache.rglob("*.json.gz")
    content = json.loads(gzip.decompress(written.read_bytes()))
    entry = content["videos"]["0.mp4"]["info"]
    entry["num_frames"], entry["times"]["stop"] = 4, entry["times"]["step"] * 4
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        for planted in (json.dumps(content).encode(), None):
            if planted is None:
                bomb(written)
            else:
                written.write_bytes(gzip.compress(planted))
            cache.chmod(0o777)
            os.chown(written, 12345, 12345)
            source = folder / "videos"
            if cache_path(source) != written:
                yield "the cache has another place than expected"
            if planted and (read_video_cache(source) or open_source(source).num_frames.tolist() != [8, 8]):
                yield "the cache of another user was read"
            shutil.rmtree(folder / "run", ignore_errors=True)
            os.chown(written, 12345, 12345)
            if (ended := train(folder, run, "data.pairs_per_video=4", source="videos")).code != 0:
                yield f"training with a planted cache: {ended.output[-200:]!r}"
    finally:
        del os.environ["XDG_CACHE_HOME"]


def bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(BOMB >> 24):
            file.write(bytes(2**24))


def planted_links(folder: Path, run: Run) -> Iterator[str]:
    """Files behind symbolic links with the names of results are not changed."""
    victim = folder / "victim"
    victim.write_text("precious\n")
    names = {
        "run": [
            *("recipe.yaml", "metrics.jsonl", "projection.safetensors", "train.json", "run.lock"),
            *("figures/learning.png", "checkpoints/step_00000002.pt", "checkpoints/step_00000004.pt"),
        ],
        "packed": ["pack-1of1.json", "frames-1of1-000000.tar", "frames-1of1-000000.npz", "pack-1of1.lock"],
    }
    davis = write_davis(folder / "davis")
    trained = write_run(folder / "trained")
    (trained / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    evaluation = ("--run", trained, "--device", "cpu", "--output", folder / "out", *SMALL["davis"])
    if (ended := run("eval", "davis", "--root", davis, *evaluation)).code != 0:
        yield f"evaluation: {ended.output[-200:]!r}"
    (result,) = (folder / "out").glob("davis-*.json")
    drawn = ("masks/before/alpha/00000.png", "figures/alpha.png", "figures/alpha.mp4")
    names["out"] = [
        *("page.html", "page_figures/learning.png", "encoder.pt2", result.name),
        *(f"{result.stem}/{name}" for name in drawn),
    ]
    commands = {
        "run": [lambda: train(folder, run)],
        "packed": [lambda: run("pack", folder / "frames", folder / "packed")],
        "out": [
            lambda: run("report", trained, "--output", folder / "out" / "page.html"),
            lambda: run("export", trained, folder / "out" / "encoder.pt2"),
            lambda: run("eval", "davis", "--root", davis, *evaluation),
        ],
    }
    for output, files in names.items():
        # One at a time, because some links end the command early.
        for planted in [[name] for name in files]:
            shutil.rmtree(folder / output, ignore_errors=True)
            for name in planted:
                link = folder / output / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(victim)
            relevant = commands[output] if output != "out" else [commands[output][writer_of(planted[0])]]
            for start in relevant:
                ended = start()
                if ended.code not in (0, 2) or "Traceback" in ended.output:
                    yield f"a link {planted[0]}: ended with {ended.code}: {ended.output[-300:]!r}"
            if victim.read_text() != "precious\n":
                yield f"the file behind the link {planted[0]} was overwritten"
                victim.write_text("precious\n")


def writer_of(name: str) -> int:
    """Return which command of `planted_links` writes a file of the folder `out`."""
    return 0 if name.startswith("page") else 1 if name == "encoder.pt2" else 2


# --- bombs ---------------------------------------------------------------------------------------------


def bombs(folder: Path, run: Run) -> Iterator[str]:
    """Compressed indices and checkpoints are refused before they fill the memory."""
    if (ended := run("pack", folder / "frames", folder / "packed")).code != 0:
        yield f"pack: {ended.output[-200:]!r}"
    run.counts["peak_mib"] = 0
    if (ended := train(folder, run)).code != 0:
        yield f"training: {ended.output[-200:]!r}"
    usual = run.counts["peak_mib"]
    index = folder / "packed" / "frames-1of1-000000.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (BOMB,)})
    inflate(index, "told.npy", header.getvalue())
    yield from refused("an index", run("pack", "--check", folder / "packed"))
    yield from refused("an index", train(folder, run, f"output={folder / 'x'}", source="packed"))
    inflate(folder / "run" / "checkpoints" / "step_00000004.pt", "archive/data.pkl", b"")
    yield from refused("a checkpoint", train(folder, run))
    grown = run.counts["peak_mib"] - usual
    if grown > 1024:
        yield f"the memory grew by {grown} MiB"


def inflate(archive: Path, name: str, start: bytes) -> None:
    """Replace a member of a zip archive with `start` and BOMB zeros, compressed."""
    with zipfile.ZipFile(archive) as old:
        members = {member: old.read(member) for member in old.namelist() if member != name}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        with new.open(name, "w", force_zip64=True) as file:
            file.write(start)
            for _ in range(BOMB >> 24):
                file.write(bytes(2**24))
        for member, content in members.items():
            new.writestr(member, content)


TRIALS: list[Trial] = [
    tar_members,
    pickles,
    yaml_tags,
    names_on_the_terminal,
    names_in_the_report,
    names_of_sequences,
    planted_caches,
    planted_links,
    bombs,
]
