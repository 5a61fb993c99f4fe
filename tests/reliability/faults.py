"""Faults of the system: full and read-only disks, disk errors, slow disks, low limits, no home folder.

Every command runs undisturbed once. Then each trial injects one fault, either into the k-th call of some
operation (shim.c) or with a small file system, and checks the promises:

- The command either completes or ends with one line that names the file and the cause, with exit code 2.
- Nothing half-written has a final name, and no temporary file is left.
- Without the fault, the same command completes, and its files equal those of the undisturbed run.
"""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.io import loadmat
from synthetic import SMALL, encode_video, picture, ucf101, write_davis, write_folders, write_jhmdb, write_run

from fasttrain.recipe import recipe_from_dict, to_yaml
from reliability.forks import FOREVER, Fault, compile_shim, run_forked
from reliability.trials import Ended
from reliability.trials import run as run_command
from reliability.workloads import TIMES

SEED = 17
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SECONDS = 120.0
# For each operation, what it can fail with.
ERRORS = {
    "open_read": (errno.EIO, errno.ESTALE),
    "open_write": (errno.ENOSPC, errno.EROFS),
    "read": (errno.EIO,),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ESTALE, errno.ENOSPC),
    "close": (errno.EDQUOT,),
    "mkdir": (errno.ENOSPC, errno.EACCES),
    "stat": (errno.ESTALE,),
    "list": (errno.EIO,),
}
# Values of JSON files that differ between runs.
VOLATILE = {*TIMES, "versions", "settings"}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command that writes below the folder `work`."""

    name: str
    words: list[str]
    required: tuple[str, ...]
    """Patterns of the files that a completed command has written."""
    optional: tuple[str, ...] = ()
    """Patterns of the files that a completed command may lack after a fault."""
    prepare: Callable[[Path], object] = lambda work: None
    """Fills the folder before the command starts."""
    trials: int = 10
    """The number of trials with faults of single calls."""
    sizes: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Sizes of file systems that are too small, relative to the files that the command writes."""


@dataclass
class Tally:
    """What a part has found so far."""

    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, Any]:
        trials = sum(self.counts[ending] for ending in ("commands that completed", "commands that refused"))
        return {"failures": self.failures, "trials": trials, **dict(sorted(self.counts.items()))}


def run(folder: Path) -> dict[str, Any]:
    tally = Tally()
    base, work = folder / "base", folder / "work"
    scenarios = make_scenarios(base, work)
    references = {scenario.name: reference(scenario, folder, tally) for scenario in scenarios}
    if compile_shim() is None:
        tally.counts["skipped: no C compiler for the shim"] += 1
    else:
        for scenario in scenarios:
            fail_calls(scenario, folder, references[scenario.name], tally)
        read_damaged_disks(base, folder, tally)
    for scenario in scenarios:
        fill_disks(scenario, folder, references[scenario.name], tally)
        lower_limits(scenario, folder, references[scenario.name], tally)
    live_without_home(base, folder, tally)
    return tally.figures()


# --- the commands --------------------------------------------------------------------------------------


def make_scenarios(base: Path, work: Path) -> list[Scenario]:
    """Write data to `base`, and return the commands that use it."""
    videos, frames = base / "videos", base / "frames"
    videos.mkdir(parents=True)
    for video in range(4):
        encode_video(videos / f"{video}.mp4", [picture(video, frame) for frame in range(8)])
    write_folders(frames, [8] * 6)
    rng = np.random.default_rng(SEED)
    for video in range(3):
        # Noise, so that the packed frames fill several shards.
        for frame in range(8):
            path = base / "noise" / f"{video}" / f"{frame}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path, quality=95)
    ucf101(base / "ucf101")
    write_davis(base / "davis")
    write_jhmdb(base / "jhmdb")
    run_folder = write_run(base / "run")
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (base / "train.yaml").write_text(recipe(videos, work / "run", tensorboard=True))
    (base / "resume.yaml").write_text(recipe(frames, work / "run", tensorboard=False))
    training = ("run/projection.safetensors", "run/checkpoints/*.pt", "run/*.json*", "run/recipe.yaml")
    evaluation = ["eval"], ["--run", str(run_folder), "--device", "cpu", "--output", str(work / "eval")]

    def evaluate(task: str, root: str, *options: str) -> list[str]:
        return [*evaluation[0], task, "--root", str(base / root), *evaluation[1], *options]

    def interrupted_run(work: Path) -> None:
        ended, _ = run_forked([str(base / "resume.yaml")], seconds=SECONDS, log=base / "log")
        assert ended.code == 0, ended.output
        for name in ("checkpoints/step_00000004.pt", "train.json", "figures/learning.png"):
            (work / "run" / name).unlink()

    def keep_interrupted_run(work: Path) -> None:
        kept = base / "interrupted"
        if not kept.exists():
            interrupted_run(work)
            shutil.copytree(work, kept)
        else:
            shutil.copytree(kept, work, dirs_exist_ok=True)

    return [
        Scenario(
            name="train",
            words=[str(base / "train.yaml")],
            required=training,
            optional=("run/figures/*.png", "cache/fasttrain/videos/*"),
            trials=30,
        ),
        Scenario(
            name="resume",
            words=[str(base / "resume.yaml")],
            required=training,
            optional=("run/figures/*.png",),
            prepare=keep_interrupted_run,
            trials=24,
            sizes=(),
        ),
        Scenario(
            name="pack",
            words=["pack", str(base / "noise"), str(work / "packed"), "--shard-size", "1", "--workers", "1"],
            required=("packed/*.tar", "packed/*.npz", "packed/*.json"),
            trials=24,
        ),
        Scenario(
            name="probe",
            words=evaluate("probe", "ucf101", "--image-size", "64", "--num-frames", "2"),
            required=("eval/*.json",),
            optional=("eval/cache/*/*", "eval/*/figures/*"),
            trials=20,
        ),
        Scenario(
            name="davis",
            words=evaluate("davis", "davis", *SMALL["davis"], "--pictures", "1"),
            required=("eval/*.json", "eval/*/masks/*/*/*.png"),
            optional=("eval/*/figures/*",),
            trials=16,
        ),
        Scenario(
            name="jhmdb",
            words=evaluate("jhmdb", "jhmdb", *SMALL["jhmdb"], "--pictures", "1"),
            required=("eval/*.json", "eval/**/*.mat"),
            optional=("eval/*/figures/*",),
            trials=12,
            sizes=(0.5,),
        ),
        Scenario(
            name="report",
            words=["report", str(run_folder), "--output", str(work / "page.html")],
            required=("page.html",),
            optional=("page_figures/*.png",),
            trials=10,
        ),
        Scenario(
            name="export",
            words=["export", str(run_folder), str(work / "encoder.pt2")],
            required=("encoder.pt2",),
            trials=8,
            sizes=(0.5,),
        ),
    ]


def recipe(source: Path, output: Path, *, tensorboard: bool) -> str:
    """Return a recipe for four steps of a tiny model."""
    train = {"steps": 4, "batch_size": 4, "precision": "fp32", "log_every": 2, "save_every": 2}
    return to_yaml(
        recipe_from_dict(
            {
                "device": "cpu",
                "output": str(output),
                "backbone": {
                    "name": "dino",
                    "weights": "random",
                    "embed_dim": 32,
                    "depth": 1,
                    "num_heads": 2,
                },
                "data": {"source": str(source), "image_size": 64, "num_threads": 1},
                "optimizer": {"lr": 0.1},
                "train": train | {"tensorboard": tensorboard},
                "eval": {"every": 0},
            }
        )
    )


# --- running a trial -----------------------------------------------------------------------------------


@dataclass
class Reference:
    """What an undisturbed run of a scenario has written, and its calls below the folder by operation."""

    required: dict[str, str]
    optional: dict[str, str]
    calls: dict[str, int]
    num_bytes: int


def reference(scenario: Scenario, folder: Path, tally: Tally) -> Reference:
    work = renew(scenario, folder)
    fault = Fault(work, "stat")
    ended, calls = start(scenario, folder, fault=fault)
    if ended.code != 0:
        raise RuntimeError(f"{scenario.name} fails without any fault:\n{ended.output}")
    required = summaries(work, scenario.required)
    if not required:
        raise RuntimeError(f"{scenario.name} has written nothing")
    sizes = [path.stat().st_size for path in work.rglob("*") if path.is_file()]
    # A second run, because a comparison means nothing unless the files are reproducible.
    renew(scenario, folder)
    start(scenario, folder)
    if (again := summaries(work, scenario.required)) != required:
        differing = [name for name in required if again.get(name) != required[name]]
        tally.failures.append(f"{scenario.name}: two undisturbed runs differ in {', '.join(differing)}")
    return Reference(required, summaries(work, scenario.optional), calls, sum(sizes))


def renew(scenario: Scenario, folder: Path) -> Path:
    """Empty the working folder, and prepare it for a scenario."""
    work = folder / "work"
    for path in work.iterdir() if work.exists() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(exist_ok=True)
    scenario.prepare(work)
    return work


def start(scenario: Scenario, folder: Path, **options: Any) -> tuple[Ended, dict[str, int]]:
    environment = {"XDG_CACHE_HOME": str(folder / "work" / "cache")}
    log = folder / "log"
    return run_forked(scenario.words, seconds=SECONDS, log=log, environment=environment, **options)


def fail_calls(scenario: Scenario, folder: Path, expected: Reference, tally: Tally) -> None:
    """Let single calls fail, and all calls from some call on."""
    rng = random.Random(f"{SEED} {scenario.name}")
    candidates = [
        (operation, error, number)
        for operation, errors in ERRORS.items()
        for error in errors
        for number in range(1, expected.calls.get(operation, 0) + 1)
    ]
    # At least one trial of each operation and error, then others at random.
    rng.shuffle(candidates)
    firsts = {(operation, error): number for operation, error, number in candidates}
    chosen = [(*key, number) for key, number in sorted(firsts.items())]
    chosen += candidates[: max(0, scenario.trials - len(chosen))]
    for operation, error, number in chosen:
        work = renew(scenario, folder)
        count = rng.choice((1, FOREVER))
        fault = Fault(work, operation, error, number, count)
        ended, calls = start(scenario, folder, fault=fault)
        what = f"{scenario.name}: {errno.errorcode[error]} at {operation} {number}{'+' if count > 1 else ''}"
        if calls.get(operation, 0) < number:
            tally.counts["calls that were not reached"] += 1
            continue
        tally.counts["failing calls"] += 1
        judge(scenario, folder, expected, ended, what, tally, cause=error)
    slow = Fault(renew(scenario, folder), "write", seconds=0.01)
    ended, _ = start(scenario, folder, fault=slow)
    tally.counts["slow disks"] += 1
    judge(scenario, folder, expected, ended, f"{scenario.name}: slow disk", tally)


def judge(
    scenario: Scenario,
    folder: Path,
    expected: Reference,
    ended: Ended,
    what: str,
    tally: Tally,
    *,
    cause: int | None = None,
    mend: Callable[[], object] = lambda: None,
) -> None:
    """Check the promises after a fault, then call `mend`, repeat the command and compare its files."""
    work = folder / "work"
    problems = []
    last = (ended.output.strip().splitlines() or [""])[-1]
    if ended.code == 0:
        if cause is None and summaries(work, scenario.required) != expected.required:
            problems.append("completed with other files")
        tally.counts["commands that completed"] += 1
    elif ended.is_clean_refusal:
        tally.counts["commands that refused"] += 1
        if cause is not None and os.strerror(cause).lower() not in last.lower():
            problems.append(f"the cause is not named: {last}")
        if cause is not None and str(work) not in last:
            problems.append(f"the file is not named: {last}")
    else:
        problems.append(f"ended with {ended.code}: {last}")
    problems += [f"{name} is damaged" for name in damaged(work)]
    problems += [f"{path.name} is left over" for path in work.rglob("*.partial")]
    complete = ended.code == 0
    mend()
    again, _ = start(scenario, folder)
    if again.code != 0:
        end = again.output.strip().splitlines()[-1:]
        problems.append(f"without the fault, the command ends with {again.code}: {end}")
    else:
        found = summaries(work, scenario.required)
        patterns = expected.required
        if not complete:
            found |= summaries(work, scenario.optional)
            patterns = patterns | expected.optional
        if found != patterns:
            names = [name for name in {**patterns, **found} if found.get(name) != patterns.get(name)]
            problems.append(f"afterwards, other than undisturbed: {', '.join(names[:3])}")
    if problems:
        tally.counts["broken promises"] += len(problems)
        tally.failures += [f"{what}: {problem}" for problem in problems]


# --- comparing files -----------------------------------------------------------------------------------


def summaries(work: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Hash files without what differs between two runs, such as times."""
    paths = sorted({path for pattern in patterns for path in work.glob(pattern) if path.is_file()})
    return {
        str(path.relative_to(work)): hashlib.sha256(comparable(path)).hexdigest()
        for path in paths
        if not path.name.endswith(".lock")
    }


def comparable(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(without_times(json.loads(content))).encode()
    if path.suffix == ".jsonl":
        return json.dumps([without_times(json.loads(line)) for line in content.splitlines()]).encode()
    if path.suffix == ".safetensors":
        # The order of the metadata is random.
        size = int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode() + content[8 + size :]
    if path.suffix == ".pt":
        # Equal objects are stored once or several times, depending on where they came from.
        return without_identities(torch.load(path, weights_only=True)).encode()
    if path.suffix == ".mp4":
        # The encoder uses several threads.
        with av.open(str(path)) as container:
            return str(sum(1 for _ in container.decode(video=0))).encode()
    if path.suffix == ".html":
        return re.sub(rb"[\d-]+ [\d:]+ UTC", b"", content)
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if path.suffix == ".mat":
        return str({key: value for key, value in loadmat(path).items() if key[0] != "_"}).encode()
    if path.suffix == ".pt2":
        # Archives of torch.export contain random identifiers.
        tensors = torch.export.load(path).state_dict
        return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    return content


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in VOLATILE}
    return value


def without_identities(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.contiguous().view(-1).numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return str({key: without_identities(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return str([without_identities(item) for item in value])
    return repr(value)


def damaged(work: Path) -> Iterator[str]:
    """Yield the files that are incomplete or damaged although they have a final name."""
    for path in sorted(work.rglob("*")):
        if path.is_file() and path.suffix in READERS:
            try:
                READERS[path.suffix](path)
            # Damaged files raise exceptions of any type.
            except Exception as error:
                yield f"{path.relative_to(work)} ({type(error).__name__})"


def _read_lines(path: Path) -> None:
    """Read JSON lines; a killed process may leave the last one incomplete."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        json.loads(line)


def _read_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _read_video(path: Path) -> None:
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) > 1


def _read_npz(path: Path) -> None:
    with np.load(path) as content:
        for key in content:
            content[key]


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            opened = archive.extractfile(member)
            assert opened is not None
            assert len(opened.read()) == member.size
    assert path.read_bytes().endswith(bytes(1024))


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def _read_page(path: Path) -> None:
    assert path.read_text().endswith("\n")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".jsonl": _read_lines,
    ".yaml": lambda path: recipe_from_dict(yaml.safe_load(path.read_text())),
    ".safetensors": load_file,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".pt2": _read_zip,
    ".npz": _read_npz,
    ".tar": _read_tar,
    ".png": _read_image,
    ".mp4": _read_video,
    ".mat": loadmat,
    ".html": _read_page,
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}


# --- damaged disks under the data ----------------------------------------------------------------------


def read_damaged_disks(base: Path, folder: Path, tally: Tally) -> None:
    """Let reads of the data fail: in one file, in all files, and at single calls."""
    work, log = folder / "work", folder / "log"
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    packed = base / "packed"
    ended, _ = run_forked(["pack", str(base / "noise"), str(packed)], seconds=SECONDS, log=log)
    assert ended.code == 0, ended.output
    sources = {
        base / "frames": (base / "frames/class_0/video_0/", "class_0/video_0"),
        base / "videos": (base / "videos/1.mp4", "1.mp4"),
        packed: (packed / "frames-1of1-000000.tar", None),
    }
    for source, (one, name) in sources.items():
        path = base / "data.yaml"
        path.write_text(recipe(source, work / "run", tensorboard=False))
        # The first run fills the video cache, so that later ones read the videos only during training.
        for fault, expected in (
            (None, 0),
            (Fault(one, "read", errno.EIO), 0 if name else 2),
            (Fault(one, "open_read", errno.ESTALE), 0 if name else 2),
            (Fault(source, "read", errno.EIO), 2),
            (Fault(source, "read", seconds=0.01), 0),
        ):
            shutil.rmtree(work / "run", ignore_errors=True)
            words = [str(path), "data.pairs_per_video=4"]
            ended, _ = run_forked(words, seconds=SECONDS, log=log, environment=environment, fault=fault)
            tally.counts["damaged disks under the data"] += fault is not None
            what = f"training on {source.name}, {fault}"
            reason = os.strerror(fault.error).lower() if fault else ""
            if ended.code != expected or (expected == 2 and not ended.is_clean_refusal):
                tally.failures.append(f"{what}: ended with {ended.code}: {ended.output[-200:]!r}")
            elif fault and fault.error and reason not in ended.output:
                tally.failures.append(f"{what}: the cause is not named: {ended.output[-200:]!r}")
            elif fault and fault.error and not expected and f"unreadable sample: {name}" not in ended.output:
                tally.failures.append(f"{what}: the file is not named: {ended.output[-200:]!r}")
    fail_reads_of_packing(base, folder, tally)


def fail_reads_of_packing(base: Path, folder: Path, tally: Tally) -> None:
    """Let single reads of video files fail while they are packed. No frame may be lost without a word."""
    rng = random.Random(SEED)
    for suffix in (".mp4", ".mkv", ".ts", ".avi", ".webm"):
        source = base / f"reads{suffix}"
        source.mkdir()
        codec = "libvpx" if suffix == ".webm" else "libx264"
        frames = [rng.randbytes(64 * 96 * 3) for _ in range(40)]
        pictures = [np.frombuffer(frame, np.uint8).reshape(64, 96, 3) for frame in frames]
        encode_video(source / f"noise{suffix}", pictures, codec)
        scenario = Scenario(
            name=f"pack {suffix}",
            words=["pack", str(source), str(folder / "work" / "packed"), "--workers", "1"],
            required=("packed/*.tar", "packed/*.npz", "packed/*.json"),
        )
        expected = reference(scenario, folder, tally)
        renew(scenario, folder)
        _, calls = start(scenario, folder, fault=Fault(source, "stat"))
        for number in sorted(rng.sample(range(1, calls["read"] + 1), min(5, calls["read"]))):
            renew(scenario, folder)
            ended, _ = start(scenario, folder, fault=Fault(source, "read", errno.EIO, number, 1))
            tally.counts["failing reads while packing"] += 1
            what = f"{scenario.name}: EIO at read {number} of {calls['read']}"
            judge(scenario, folder, expected, ended, what, tally)


# --- small and read-only disks -------------------------------------------------------------------------


@contextmanager
def small_disk(work: Path, num_bytes: int) -> Iterator[bool]:
    """Mount a file system of a limited size on `work`; return whether the machine allows it."""
    size = max(1, -(-num_bytes // 4096)) * 4096
    options = f"size={size}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", work], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", work], check=True)


def remount(work: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", work], check=True)


def fill_disks(scenario: Scenario, folder: Path, expected: Reference, tally: Tally) -> None:
    """Run on file systems that are too small, then enlarge them; and on a read-only one."""
    for share in scenario.sizes:
        work = renew(scenario, folder)
        with small_disk(work, int(share * expected.num_bytes)) as mounted:
            if not mounted:
                tally.counts["skipped: no file system can be mounted"] += 1
                return
            ended, _ = start(scenario, folder)
            tally.counts["small file systems"] += 1
            what = f"{scenario.name}: a file system for {share:.0%} of its files"
            cause = errno.ENOSPC if ended.code else None
            judge(
                scenario,
                folder,
                expected,
                ended,
                what,
                tally,
                cause=cause,
                mend=functools.partial(remount, work, "size=1g"),
            )
    work = renew(scenario, folder)
    with small_disk(work, 2**30) as mounted:
        if not mounted:
            return
        scenario.prepare(work)
        remount(work, "ro")
        ended, _ = start(scenario, folder)
        tally.counts["read-only file systems"] += 1
        what = f"{scenario.name}: a read-only file system"
        mend = functools.partial(remount, work, "rw")
        judge(scenario, folder, expected, ended, what, tally, cause=errno.EROFS, mend=mend)


def lower_limits(scenario: Scenario, folder: Path, expected: Reference, tally: Tally) -> None:
    """Run with too few open files, and with a limit on the size of files."""
    # The log of what the command prints is a file, too. It has up to 2,000 bytes.
    for limit, values in ((resource.RLIMIT_NOFILE, (12, 20, 32)), (resource.RLIMIT_FSIZE, (3000, 20000))):
        for value in values:
            renew(scenario, folder)
            ended, _ = start(scenario, folder, limits={limit: value})
            tally.counts["low limits"] += 1
            name = "open files" if limit == resource.RLIMIT_NOFILE else "bytes per file"
            judge(scenario, folder, expected, ended, f"{scenario.name}: {value} {name}", tally)


# --- no home folder ------------------------------------------------------------------------------------

# Runs several commands, so that fasttrain is imported once, and prints their exit codes.
_COMMANDS = """
import json, sys
from fasttrain.__main__ import main
print("codes", [main(words) for words in json.loads(sys.argv[1])])
"""


def live_without_home(base: Path, folder: Path, tally: Tally) -> None:
    """Run every command as a user without an entry in the list of users, and without a usable home folder."""
    work = folder / "work"
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    # So that the user can read the interpreter even if it belongs to another one.
    user += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    path = ":".join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    clean = ["env", "-i", "PATH=/usr/bin:/bin", "OMP_NUM_THREADS=1", f"PYTHONPATH={path}"]
    probe = run_command([*user, *clean, sys.executable, "-c", "import fasttrain"], seconds=60)
    if probe.code != 0:
        tally.counts["skipped: no process of another user can be started"] += 1
        return
    data = [f"output={work / 'demo'}", "train.steps=2", "device=cpu"]
    options = ["--device", "cpu", "--image-size", "64", "--num-frames", "2", "--output", str(work / "eval")]
    training = [str(base / "train.yaml")]
    report = ["report", str(work / "run"), "--output", str(work / "page.html")]
    evaluation = ["eval", "retrieval", "--root", str(base / "ucf101"), "--run", str(work / "run"), *options]
    others = [
        ["pack", str(base / "videos"), str(work / "packed")],
        ["export", str(work / "run"), str(work / "encoder.pt2")],
        ["doctor"],
        ["demo", "--recipe", str(RECIPES / "quickstart.yaml"), *data],
    ]
    for home, commands in (
        ([], [training, report, evaluation, *others]),
        (["HOME=/nonexistent"], [training, report, evaluation]),
        ([f"HOME={closed}"], [training, report]),
    ):
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        work.chmod(0o777)
        program = [sys.executable, "-c", _COMMANDS, json.dumps(commands)]
        # The demo unpacks its clips in the current folder.
        place = ["env", "-C", str(work)]
        ended = run_command([*place, *user, *clean, *home, *program], seconds=3 * SECONDS)
        tally.counts["commands without a home folder"] += len(commands)
        if f"codes {[0] * len(commands)}" not in ended.output or "Traceback" in ended.output:
            tally.failures.append(f"{home or 'no HOME'}: ended with {ended.code}: {ended.output[-300:]!r}")
