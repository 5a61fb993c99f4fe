"""Compare the speed and peak memory of label propagation with those of a common research script.

    python -m benchmarks.propagation [--short]

`ResearchScript` is a plain version of the script of ajabri/videowalk and its descendants. It gathers the
context of all frames at once. Then it computes, for two frames and a hundred query pixels at a time, the
affinity with the whole context, the radius mask, top-k, softmax and the label product. Both contenders get
the same features, a noisy pan over random points. Times are per frame, measured on the last two frames of a
sequence, which have a full context. Memory is the peak beyond the features.

The section `davis` is the time of `fasttrain eval davis` on the 30 validation sequences of DAVIS 2017, with a
randomly initialised backbone and projection. On a GPU, it evaluates 30 synthetic sequences of this size. On a
CPU, it evaluates one and then five, and estimates the time of 30.
"""

# Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, S context frames, k sources.

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import (
    WARM_UPS,
    Results,
    command_line,
    in_own_process,
    interleave,
    peak_bytes,
    run_command,
    run_fasttrain,
    speedup,
)
from fasttrain.backbones import load_backbone
from fasttrain.evaluation.propagation import Propagator, propagate_labels
from fasttrain.evaluation.results import find_results, read_result
from fasttrain.options import CONTEXT, RADIUS, TEMPERATURE, TOPK
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import render_scene

SETTINGS = (CONTEXT, RADIUS, TOPK, TEMPERATURE)
CLASSES = 4
# Number of frames and of query pixels that the script processes at a time.
FRAMES_AT_ONCE, PIXELS_AT_ONCE = 2, 100
# DAVIS 2017 validation set: number of sequences, average number of frames, most common frame size.
SEQUENCES, FRAMES, HEIGHT, WIDTH = 30, 67, 480, 854


class Case(NamedTuple):
    """A sequence of features. Unless its name says otherwise, frames are 480 x 880."""

    name: str
    grid: tuple[int, int] = (30, 55)
    channels: int = 384
    frames: int = 40


# The fastest cases come first, because time may run out.
CASES = (
    Case("patch 16, 320 x 320", grid=(20, 20)),
    Case("patch 16"),
    Case("patch 16, width 768", channels=768),
    Case("patch 8", grid=(60, 110)),
)


class ResearchScript:
    """A plain version of the research script.

    Features and labels stay in host memory, and affinities are computed on the device.
    """

    def __init__(
        self, features_THWD: Tensor, device: torch.device, settings: tuple[int, float, int, float] = SETTINGS
    ) -> None:
        self.context, radius, self.topk, self.temperature = settings
        frames, height, width, _ = features_THWD.shape
        unit_THWD = functional.normalize(features_THWD, dim=-1)
        padded_THWD = torch.cat([unit_THWD[:1].expand(self.context, -1, -1, -1), unit_THWD])
        padded_DTHW = padded_THWD.permute(3, 0, 1, 2).contiguous()
        recent_TS = torch.arange(self.context) + torch.arange(frames)[:, None]
        self.bank_TS = torch.cat([torch.zeros(frames, 1, dtype=torch.long), recent_TS], dim=1)
        self.keys_DTSN = padded_DTHW[:, self.bank_TS].flatten(-2)
        self.query_DTN = padded_DTHW[:, self.context :].flatten(-2)
        cell_N2 = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
        # The default mode uses matrix products, whose rounding errors matter for distances near the radius.
        distance_NN = torch.cdist(cell_N2, cell_N2, compute_mode="donot_use_mm_for_euclid_dist")
        self.mask_NN = torch.where(distance_NN < radius, 0.0, -1e10)
        self.device = device

    def step(self, labels_THWC: Tensor, start: int) -> None:
        """Compute the labels of frames `start` and `start` + 1 from those of earlier frames, in place."""
        padded_TNC = torch.cat([labels_THWC[:1].expand(self.context, -1, -1, -1), labels_THWC]).flatten(1, 2)
        frames = slice(start, start + FRAMES_AT_ONCE)
        keys_DtSN = self.keys_DTSN[:, frames].to(self.device)
        query_DtN = self.query_DTN[:, frames].to(self.device)
        weights, sources = [], []
        for query_Dtn, mask_Nn in zip(
            query_DtN.split(PIXELS_AT_ONCE, dim=-1), self.mask_NN.split(PIXELS_AT_ONCE, dim=-1), strict=True
        ):
            affinity_tSNn = torch.einsum("dtsm,dtn->tsmn", keys_DtSN, query_Dtn)
            affinity_tSNn[:, 1:] += mask_Nn.to(self.device)
            affinity_tLn = affinity_tSNn.flatten(1, 2)
            affinity_tLn /= self.temperature
            value_tkn, source_tkn = affinity_tLn.topk(self.topk, dim=1)
            weights.append(value_tkn.softmax(1).cpu())
            sources.append(source_tkn.cpu())
        weights_tkN, sources_tkN = torch.cat(weights, dim=-1), torch.cat(sources, dim=-1)
        for number, (weight_kN, source_kN) in enumerate(zip(weights_tkN, sources_tkN, strict=True), start):
            context_LC = padded_TNC[self.bank_TS[number]].flatten(0, 1).to(self.device)
            predicted_NC = (context_LC[source_kN] * weight_kN[..., None].to(self.device)).sum(0).cpu()
            padded_TNC[self.context + number] = predicted_NC
            labels_THWC[number] = predicted_NC.view_as(labels_THWC[number])


def make_sequence(case: Case) -> tuple[Tensor, Tensor]:
    """Create the features (T, H, W, D) and the labels of the first frame (H, W, C)."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.grid
    points = torch.randn(height, width + case.frames, case.channels, generator=generator)
    features_THWD = torch.stack([points[:, number : number + width] for number in range(case.frames)])
    for frame_HWD in features_THWD:
        frame_HWD += 0.5 * torch.randn(frame_HWD.shape, generator=generator)
    return features_THWD, torch.rand(height, width, CLASSES, generator=generator)


def measure_time(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time both contenders on the last two frames of a sequence, and compare their labels."""
    start = CONTEXT + 1
    features_THWD, first_HWC = make_sequence(case._replace(frames=start + FRAMES_AT_ONCE))
    script = ResearchScript(features_THWD, device)
    features_THWD = features_THWD.to(device)
    propagator = Propagator(features_THWD[0], first_HWC.to(device), *SETTINGS)
    labels = [first_HWC, *(propagator.step(frame_HWD).cpu() for frame_HWD in features_THWD[1:start])]
    script_THWC = torch.stack([*labels, *(torch.zeros_like(first_HWC),) * FRAMES_AT_ONCE])
    # A step changes the state of the propagator, so each call starts from a copy.
    copies = [copy.deepcopy(propagator) for _ in range(WARM_UPS + rounds + 1)]

    def ours() -> Tensor:
        fresh = copies.pop()
        return torch.stack([fresh.step(frame_HWD) for frame_HWD in features_THWD[start:]]).cpu()

    contenders = {"ours": ours, "script": lambda: script.step(script_THWC, start)}
    timings = interleave(contenders, rounds=rounds, calls=1)
    difference = (ours() - script_THWC[start:]).abs().amax(-1)
    return {
        **{name: timing.result(1, steps=FRAMES_AT_ONCE) for name, timing in timings.items()},
        "speedup": speedup(timings["script"], timings["ours"]),
        "agreeing_tokens": float((difference < 1e-5).float().mean()),
    }


def measure_memory(case: Case, contender: str, device: torch.device) -> float:
    """Peak memory of a contender beyond the features, in MB (2^20 bytes)."""
    features_THWD, first_HWC = make_sequence(case)
    if contender == "ours":
        # The memory of the propagator stops growing after context + 1 frames.
        features_THWD = features_THWD[: CONTEXT + 3].to(device)
        return peak_bytes(lambda: propagate_labels(features_THWD, first_HWC), device) / 2**20
    labels_THWC = torch.zeros(case.frames, *first_HWC.shape)
    last = case.frames - FRAMES_AT_ONCE
    return peak_bytes(lambda: ResearchScript(features_THWD, device).step(labels_THWC, last), device) / 2**20


def measure_case(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure the time and peak memory of both contenders for one case."""
    memory = {}
    for name in ("ours", "script"):
        # The peak of a process's resident memory cannot be reset, so each contender runs in a new process.
        # The peak of GPU memory can be reset.
        run = in_own_process if device.type == "cpu" else lambda function, *arguments: function(*arguments)
        memory[f"{name}_mb"] = run(measure_memory, case, name, device)
    memory["script_over_ours"] = memory["script_mb"] / memory["ours_mb"]
    return {"case": case._asdict(), "time": measure_time(case, device, rounds), "memory": memory}


def measure_davis(backbone: str, frames: int, device: str, counts: tuple[int, ...]) -> dict[str, Any]:
    """Measure the seconds that `fasttrain eval davis` takes on some numbers of sequences.

    With two numbers, estimate those on the validation set of DAVIS 2017.
    """
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "projection.safetensors"
        Projection(load_backbone(backbone, weights="random").embed_dim).save(head)
        encoder = ["--backbone", backbone, "--projection", str(head), "--device", device]
        for pictures, count in enumerate(counts, 1):
            root = Path(folder) / f"davis{count}"
            write_davis(root, count, frames)
            output = ["--root", str(root), "--output", str(root / "eval"), "--pictures", str(pictures)]
            run_fasttrain("eval", "davis", *output, *encoder)
            (path,) = find_results(root / "eval")
            seconds[count] = read_result(path).seconds
    result = {"backbone": backbone, "frames": frames, "seconds": seconds}
    if len(counts) == 2:
        # The difference between two runs has one picture, but no loading and no warm-up.
        (few, first), (many, second) = seconds.items()
        result["data_set_seconds"] = SEQUENCES * FRAMES / frames * (second - first) / (many - few)
    return result


def write_davis(root: Path, count: int, frames: int) -> None:
    """Write `count` identical sequences in the layout of DAVIS, in which eight rendered frames repeat."""
    scene = render_scene(0, num_frames=8, height=HEIGHT, width=WIDTH)
    names = [f"pan{number}" for number in range(count)]
    for kind, maps_T, suffix in (
        ("JPEGImages", scene.frames_THWC, ".jpg"),
        ("Annotations", scene.labels_THW, ".png"),
    ):
        for path in (root / kind / "480p" / name for name in names):
            path.mkdir(parents=True)
            for number in range(frames):
                file = path / f"{number:05d}{suffix}"
                if number < 8:
                    Image.fromarray(maps_T[number]).save(file, quality=95)
                else:
                    file.hardlink_to(path / f"{number % 8:05d}{suffix}")
    subset = root / "ImageSets" / "2017" / "val.txt"
    subset.parent.mkdir(parents=True)
    subset.write_text("\n".join(names), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("propagation", __doc__)
    parser.add_argument(
        "--backbone",
        default="dino",
        metavar="NAME",
        help="backbone for the section davis (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    results = Results("propagation", args, threads=torch.get_num_threads())
    rounds = 2 if args.short else 5
    small = args.short and device.type == "cpu"
    counts = (1, 5) if device.type == "cpu" else (SEQUENCES,)
    davis = partial(measure_davis, args.backbone, 4 if small else FRAMES, args.device, counts)
    results.record("davis", davis)
    # On larger grids, the script takes minutes on a CPU.
    for case in CASES[:1] if small else CASES:
        case = case._replace(frames=24 if args.short else case.frames)
        results.record(case.name, partial(measure_case, case, device, rounds), group="cases")
    results.finish()


if __name__ == "__main__":
    run_command(main)
