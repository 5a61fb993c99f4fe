"""Two real processes in step over data with every fault at once: neither waits for ever, nothing is lost."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from synthetic import make_loader, make_sampling, write_folders

from fasttrain.data import open_source

STEPS = 10
PAIRS = 8


def train(rank: int, root: Path) -> None:
    """A training step needs both ranks: here an all-reduce of what the batch holds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    index = open_source(root / "frames")
    loader = make_loader(
        index,
        make_sampling(pairs_per_video=PAIRS),
        batch_size=2,
        accumulate=2,
        num_steps=STEPS,
        rank=rank,
        world_size=2,
        prefetch=1,
        max_bad_fraction=1.0,
    )
    samples = []
    for number, pairs in enumerate(loader):
        total = pairs.frames.abs().sum()
        dist.all_reduce(total)
        assert torch.isfinite(total)
        samples.append(pairs.samples.tolist())
        if number == 3 and rank == 0:
            for path in (root / "frames" / "class_1" / "video_5").iterdir():
                path.unlink()
        dist.barrier()
    faults = [[fault.name, fault.reason] for fault in loader.faults]
    loader.close()
    (root / f"rank{rank}.json").write_text(json.dumps({"samples": samples, "faults": faults}))
    dist.destroy_process_group()


def test_two_processes_stay_in_step_over_every_fault(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [8] * 10)
    names = open_source(root).names
    broken = {"video_0": lambda data: data[:-99], "video_2": lambda _: b"", "video_4": lambda _: b"no image"}
    for name, breaks in broken.items():
        for path in (root / "class_0" / name).iterdir():
            path.write_bytes(breaks(path.read_bytes()))
    torch.multiprocessing.spawn(train, (tmp_path,), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [np.shape(rank["samples"]) for rank in ranks] == [(2 * STEPS, 2)] * 2
    faults = [tuple(fault) for rank in ranks for fault in rank["faults"]]
    assert {name for name, _ in faults} >= {f"class_0/{name}" for name in broken}
    assert ("class_1/video_5", "no such file or directory") in faults
    # What was good is what the stream says, on both ranks, beside the replacements.
    stream = make_sampling(pairs_per_video=PAIRS).order(np.arange(8 * STEPS), 10 * PAIRS)[1]
    delivered = np.array([rank["samples"] for rank in ranks]).reshape(2, STEPS, 2, 2)
    delivered = delivered.transpose(1, 2, 0, 3).reshape(-1)
    kept = delivered == stream
    assert kept.sum() >= len(stream) - len(faults)
    assert {names[sample // PAIRS] for sample in stream[~kept]} <= {name for name, _ in faults}
