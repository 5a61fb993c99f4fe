"""One of two ranks raises, hangs, dies, is slow or sees other files: the run ends soon and names the rank.

Each fault is tried under torchrun, which stops the other rank when one ends, and with two processes that
nobody supervises, as under `srun` without --kill-on-bad-exit.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from synthetic import write_folders

from fasttrain.recipe import recipe_from_dict, to_yaml
from reliability.trials import ENVIRONMENT, Ended, kill_group
from reliability.trials import run as run_command

STALL = 4
# An ending takes longer than this only if something hangs: two processes need about 8 s to start on an idle
# machine, and torchrun gives a process 30 s to end.
LIMIT = 90
# Fault, the rank that has it, and what exactly one line of the output must contain.
TRIALS = (
    ("raises", 1, "rank 1: failed; its traceback follows"),
    ("refuses", 1, "rank 1: planted refusal"),
    ("dies", 1, None),
    ("hangs", 1, f"rank 1 made no progress for {STALL} s"),
    ("hangs", 0, f"rank 0 made no progress for {STALL} s"),
    ("hangs in a save", 0, f"rank 0 made no progress for {STALL} s"),
    ("fails in a save", 0, "rank 0: failed; its traceback follows"),
    ("sees other files", 1, "ranks 0 and 1 differ"),
    ("dies", 0, "rank 1 lost contact with rank 0"),
)


def run(folder: Path) -> dict[str, Any]:
    recipe = write_recipe(folder)
    failures: list[str] = []
    seconds: dict[str, float] = {}

    def check_complete(what: str, output: Path, ended: Ended) -> None:
        if ended.code != 0 or weights(output) != weights(folder / "undisturbed"):
            failures.append(f"{what}: {ended.output[-1000:]}")

    output = folder / "undisturbed"
    check_complete("undisturbed", output, two_processes("none", recipe, output))
    for start, trials in ((two_processes, TRIALS), (under_torchrun, TRIALS[:4])):
        output = folder / f"{start.__name__}-slow"
        check_complete(f"{start.__name__}: rank 1 is slow", output, start("is slow", recipe, output))
        for fault, rank, line in trials:
            what = f"{start.__name__}: rank {rank} {fault}"
            output = folder / what
            before = time.monotonic()
            ended = start(fault, recipe, output, rank)
            seconds[what] = round(time.monotonic() - before, 1)
            print(f"{what}: ended after {seconds[what]} s", flush=True)
            named = sum(line in text for text in ended.output.splitlines()) if line else 1
            if ended.code in (None, 0) or named != 1:
                ending = f"exit code {ended.code}, named {named} times"
                failures.append(f"{what}: {ending}: {ended.output[-1000:]}")
        # The last one went on from a checkpoint that the fault left behind.
        check_complete(f"{what}, repeated", output, start("none", recipe, output))
    return {"trials": len(seconds), "seconds_to_end": seconds, "failures": failures}


def weights(output: Path) -> dict[str, bytes]:
    """Return the bits of a projection. Its file also has the recipe, with the path of the output."""
    path = output / "projection.safetensors"
    tensors = load_file(path) if path.exists() else {}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def write_recipe(folder: Path) -> Path:
    source = write_folders(folder / "frames", [8] * 6)
    write_folders(folder / "other", [8] * 5)
    recipe = recipe_from_dict(
        {
            "device": "cpu",
            "backbone": {"name": "dino", "embed_dim": 32, "depth": 1, "num_heads": 2},
            "data": {"source": str(source), "image_size": 64, "num_threads": 1},
            "train": {
                "steps": 12,
                "batch_size": 2,
                "precision": "fp32",
                "log_every": 10,
                "save_every": 2,
                "stall_timeout": STALL,
                "tensorboard": False,
            },
            "eval": {"every": 0},
        }
    )
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return path


def under_torchrun(fault: str, recipe: Path, output: Path, rank: int = 1) -> Ended:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "reliability.faulty_rank", fault, str(rank), str(recipe), f"output={output}"]
    environment = {"OTHER_SOURCE": str(recipe.with_name("other"))}
    return run_command(command, seconds=LIMIT, environment=environment)


def two_processes(fault: str, recipe: Path, output: Path, rank: int = 1) -> Ended:
    """Start both ranks without a launcher; the exit code is 0 if that of both is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    module = [sys.executable, "-m", "reliability.faulty_rank"]
    command = [*module, fault, str(rank), str(recipe), f"output={output}"]
    common = {
        **ENVIRONMENT,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OTHER_SOURCE": str(recipe.with_name("other")),
    }
    log = output.with_name(f"{output.name}.log")
    with log.open("w") as file:
        processes = [
            subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=common | {"RANK": str(each), "LOCAL_RANK": str(each)},
                start_new_session=True,
                text=True,
            )
            for each in range(2)
        ]
        end = time.monotonic() + LIMIT
        try:
            codes = [process.wait(max(0.0, end - time.monotonic())) for process in processes]
            code = max(map(abs, codes))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            for process in processes:
                kill_group(process)
                process.wait()
    return Ended(code, log.read_text(errors="replace"))
