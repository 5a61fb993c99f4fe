"""Label propagation on the same features: ours beside the common research script, speed and peak memory.

    python -m benchmarks.propagation               measure, write results/propagation-DEVICE.json and its plot
    python -m benchmarks.propagation --video FOLDER... --weights CHECKPOINT   the features of real frames too
    python -m benchmarks.propagation --plot FILE   draw the plot again from the JSON

Made-up features are a noisy pan over random points, which share no structure; real ones do, and lie close.

The research script (ajabri/videowalk and its descendants) is written plainly below: the context of every
frame gathered at once, then for two frames and a hundred query pixels at a time the affinity with the whole
context, the radius mask, top-k, softmax and the label product. Timed are the last two frames of a sequence,
where the context is full; on a CPU the script gets only a share of the query pixels of a large grid, and its
time is divided by that share. Memory is the peak beyond the features, on a CPU each contender's in a process
of its own.

Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, S frames of a context, k sources.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import WARM_UPS, Timing, interleave, speedup, synchronize
from benchmarks.record import RESULTS, environment, write_results
from fasttrain.backbones import load_backbone
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.propagation import (
    CONTEXT,
    RADIUS,
    TEMPERATURE,
    TOPK,
    Propagator,
    propagate_labels,
)

CLASSES = 4
# Frames and query pixels that the script takes at a time.
FRAMES_AT_ONCE, PIXELS_AT_ONCE = 2, 100
MEGABYTE = 2**20
# The widest features of the short benchmark on a CPU.
SHORT_WIDTH = 384


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sequence: made-up features of 480 x 880 frames, unless named otherwise, or those of a video."""

    name: str
    grid: tuple[int, int]
    channels: int = 384
    frames: int = 40
    script_pixels: int | None = None
    """Query pixels of a frame that the script is timed on; None: all."""
    video: str | None = None
    """A folder of frames, encoded by an MAE with these weights."""
    weights: str = "random"

    @property
    def script_share(self) -> float:
        return 1.0 if self.script_pixels is None else self.script_pixels / (self.grid[0] * self.grid[1])


CASES = (
    Case(name="patch 16", grid=(30, 55)),
    Case(name="patch 16, 320 x 320", grid=(20, 20)),
    Case(name="patch 16, width 768", grid=(30, 55), channels=768),
    Case(name="patch 8", grid=(60, 110)),
)


class ResearchScript:
    """The common script; features and results stay in host memory, the affinities are the device's."""

    def __init__(self, features_THWD: Tensor, device: torch.device, *, start: int = 0) -> None:
        """Frames from `start` on are to be propagated; the script itself gathers the context of all."""
        frames, height, width, _ = features_THWD.shape
        unit_THWD = functional.normalize(features_THWD, dim=-1)
        padded_THWD = torch.cat([unit_THWD[:1].expand(CONTEXT, -1, -1, -1), unit_THWD])
        padded_DTHW = padded_THWD.permute(3, 0, 1, 2).contiguous()
        first_T1 = torch.zeros(frames, 1, dtype=torch.long)
        self.bank_TS = torch.cat([first_T1, torch.arange(CONTEXT) + torch.arange(frames)[:, None]], dim=1)
        self.keys_DTSN = padded_DTHW[:, self.bank_TS[start:]].flatten(-2)
        self.query_DTN = padded_DTHW[:, CONTEXT + start :].flatten(-2)
        y_N, x_N = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y_N, x_N = y_N.flatten(), x_N.flatten()
        distance_NN = ((y_N[:, None] - y_N) ** 2 + (x_N[:, None] - x_N) ** 2).float().sqrt()
        self.mask_NN = torch.where(distance_NN < RADIUS, 0.0, -1e10)
        self.grid, self.device, self.start = (height, width), device, start

    def affinities(self, start: int, pixels: int | None = None) -> tuple[Tensor, Tensor]:
        """Weights and sources (2, k, N) of two frames, as places in their context times N plus token."""
        frames = slice(start - self.start, start - self.start + FRAMES_AT_ONCE)
        keys_DtSN = self.keys_DTSN[:, frames].to(self.device)
        query_DtN = self.query_DTN[:, frames].to(self.device)
        weights, sources = [], []
        end = pixels or query_DtN.shape[-1]
        for pixel in range(0, end, PIXELS_AT_ONCE):
            chunk = slice(pixel, min(pixel + PIXELS_AT_ONCE, end))
            affinity_tSNn = torch.einsum("dtsm,dtn->tsmn", keys_DtSN, query_DtN[..., chunk])
            affinity_tSNn[:, 1:] += self.mask_NN[:, chunk].to(self.device)
            affinity_tLn = affinity_tSNn.flatten(1, 2)
            affinity_tLn /= TEMPERATURE
            value_tkn, source_tkn = affinity_tLn.topk(TOPK, dim=1)
            weights.append(value_tkn.softmax(1).cpu())
            sources.append(source_tkn.cpu())
        return torch.cat(weights, dim=-1), torch.cat(sources, dim=-1)

    def propagate(self, labels_THWC: Tensor, start: int, pixels: int | None = None) -> Tensor:
        """Labels of frames start and start + 1 from those before; `labels_THWC` is written there."""
        padded_TNC = torch.cat([labels_THWC[:1].expand(CONTEXT, -1, -1, -1), labels_THWC]).flatten(1, 2)
        weights_tkN, sources_tkN = self.affinities(start, pixels)
        for number, (weight_kN, source_kN) in enumerate(zip(weights_tkN, sources_tkN, strict=True)):
            context_LC = padded_TNC[self.bank_TS[start + number]].flatten(0, 1).to(self.device)
            predicted_NC = (context_LC[source_kN] * weight_kN[..., None].to(self.device)).sum(0).cpu()
            padded_TNC[CONTEXT + start + number, : len(predicted_NC)] = predicted_NC
        end = start + FRAMES_AT_ONCE
        labels_THWC[start:end] = padded_TNC[CONTEXT + start : CONTEXT + end].unflatten(1, self.grid)
        return labels_THWC


def run_script(features_THWD: Tensor, first_labels_HWC: Tensor, device: torch.device) -> Tensor:
    """The script on a whole sequence: labels (T, H, W, C)."""
    script = ResearchScript(features_THWD, device)
    labels_THWC = torch.zeros(len(features_THWD), *first_labels_HWC.shape)
    for start in range(0, len(features_THWD), FRAMES_AT_ONCE):
        labels_THWC[0] = first_labels_HWC
        script.propagate(labels_THWC, start)
    labels_THWC[0] = first_labels_HWC
    return labels_THWC


def make_sequence(case: Case, frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Features (T, H, W, D) of the case's first frames, and first labels (H, W, C)."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.grid
    count = frames or case.frames
    first_labels_HWC = torch.rand(height, width, CLASSES, generator=generator)
    if case.video is not None:
        return encode_video(case, count), first_labels_HWC
    world = torch.randn(height, width + count, case.channels, generator=generator)
    features_THWD = torch.empty(count, height, width, case.channels)
    for number, frame_HWD in enumerate(features_THWD):
        torch.randn(frame_HWD.shape, generator=generator, out=frame_HWD)
        frame_HWD.mul_(0.5).add_(world[:, number : number + width])
    return features_THWD, first_labels_HWC


def video_case(folder: Path, weights: str) -> Case:
    """The case of a folder of frames; its sizes are those of the encoder and of the first frame."""
    from fasttrain.evaluation.frames import fit_to_patches

    size, encoder = frame_size(folder), load_backbone("mae", weights=weights)
    grid = encoder.grid(*fit_to_patches(size, encoder.patch_size))
    return Case(
        name=f"{folder.name}, width {encoder.embed_dim}",
        grid=grid,
        channels=encoder.embed_dim,
        frames=min(len(frames_of(folder)), Case.frames),
        video=str(folder),
        weights=weights,
    )


def encode_video(case: Case, count: int) -> Tensor:
    """Tokens (T, H, W, D) of the video's first frames."""
    # These read files with packages that a machine which only lends its GPU may lack.
    from fasttrain.evaluation.frames import fit_to_patches, read_image, resize

    encoder = load_backbone("mae", weights=case.weights)
    size = fit_to_patches(frame_size(Path(case.video)), encoder.patch_size)
    model = EvaluatedModel(encoder=encoder, projection=None, variants=("before",))
    frames = (resize(read_image(path), size) for path in frames_of(Path(case.video))[:count])
    return model.tokens(frames, torch.device("cpu"))["before"].unflatten(1, case.grid)


def frames_of(folder: Path) -> list[Path]:
    """In order. Raises SystemExit where they are too few to fill the context and be timed."""
    frames, fewest = sorted(folder.glob("*.jpg")), CONTEXT + 1 + FRAMES_AT_ONCE
    if len(frames) < fewest:
        raise SystemExit(f"--video {folder} holds {len(frames)} JPEG frames; expected {fewest} or more")
    return frames


def frame_size(folder: Path) -> tuple[int, int]:
    from fasttrain.evaluation.frames import read_image

    height, width, _ = read_image(frames_of(folder)[0]).shape
    return height, width


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Both on the last two frames of the sequence, in turns, and how far their labels agree."""
    frames = CONTEXT + 1 + FRAMES_AT_ONCE
    features_THWD, first_labels_HWC = make_sequence(case, frames)
    on_device_THWD = features_THWD.to(device)
    stream = Propagator(on_device_THWD[0], first_labels_HWC.to(device), CONTEXT, RADIUS, TOPK, TEMPERATURE)
    start = frames - FRAMES_AT_ONCE
    labels = [first_labels_HWC]
    labels += [stream.step(frame_HWD).cpu() for frame_HWD in on_device_THWD[1:start]]
    earlier_THWC = torch.cat([torch.stack(labels), torch.zeros(FRAMES_AT_ONCE, *first_labels_HWC.shape)])
    script = ResearchScript(features_THWD, device, start=start)
    # The stream forgets its oldest frame at every step: each call starts from the same state.
    streams = [copy.deepcopy(stream) for _ in range(WARM_UPS + rounds + 1)]

    def ours() -> Tensor:
        fresh = streams.pop()
        return torch.stack([fresh.step(frame_HWD) for frame_HWD in on_device_THWD[start:]]).cpu()

    def theirs() -> Tensor:
        return script.propagate(earlier_THWC, start, case.script_pixels)[start:]

    synchronize(device)
    timings = interleave({"ours": ours, "script": theirs}, rounds=rounds, calls=1, device=device)
    script_timing = Timing(
        wall=[seconds / case.script_share for seconds in timings["script"].wall],
        cpu=[seconds / case.script_share for seconds in timings["script"].cpu],
    )
    # The second frame attends to the whole of the first, so a part of the script's first is compared alone.
    compared = slice(None) if case.script_pixels is None else slice(0, 1)
    difference = (ours() - theirs())[compared].flatten(1, 2)[:, : case.script_pixels].abs().amax(-1)
    return {
        "ours": per_frame(timings["ours"]),
        "script": per_frame(script_timing),
        "speedup": speedup(script_timing, timings["ours"]),
        "agreeing_tokens": float((difference < 1e-5).float().mean()),
    }


def per_frame(timing: Timing) -> dict[str, float]:
    """Milliseconds a frame: median, least, most, and of the CPU."""
    found = timing.result(FRAMES_AT_ONCE)
    return {key: found[key] / FRAMES_AT_ONCE for key in ("ms", "ms_least", "ms_most", "cpu_ms")}


def peak_memory(case: Case, contender: str, device: torch.device) -> int:
    """Bytes beyond the features at the peak: of the GPU, or of this process, which must then be fresh."""
    features_THWD, first_labels_HWC = make_sequence(case)
    if contender == "ours":
        # The stream holds as much after context + 1 frames as ever after.
        features_THWD = features_THWD.to(device)
        features_THWD, context = features_THWD[: CONTEXT + 3], (CONTEXT, RADIUS, TOPK, TEMPERATURE)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = process_bytes("VmRSS")
    if contender == "ours":
        propagate_labels(features_THWD, first_labels_HWC, *context)
    else:
        last = case.frames - FRAMES_AT_ONCE
        # Host memory is not what is looked at on a GPU.
        first = last if device.type == "cuda" else 0
        ResearchScript(features_THWD, device, start=first).affinities(last, PIXELS_AT_ONCE)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return process_bytes("VmHWM") - before


def process_bytes(field: str) -> int:
    """A size of this process from the kernel: VmRSS, resident now; VmHWM, resident at the peak."""
    # The peak that getrusage tells is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def memory_of_both(case: Case, device: torch.device) -> dict[str, float]:
    """Peak MB of each contender, and how many times less ours is; on a CPU each in a fresh process."""
    found = {}
    for contender in ("ours", "script"):
        if device.type == "cuda":
            # Its allocator tells the peak of any stretch; starting a process takes longer than all the rest.
            gc.collect()
            torch.cuda.empty_cache()
            found[contender] = peak_memory(case, contender, device) / MEGABYTE
            continue
        words = ["--memory", contender, "--case", json.dumps(asdict(case)), "--device", device.type]
        command = [sys.executable, "-m", "benchmarks.propagation", *words]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[contender] = int(told.split()[-1]) / MEGABYTE
    return {
        "ours_mb": found["ours"],
        "script_mb": found["script"],
        "script_over_ours": found["script"] / found["ours"],
    }


def plot(results: Path) -> Path:
    """Milliseconds a frame and peak memory of both, beside the JSON."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    content = json.loads(results.read_text(encoding="utf-8"))
    cases = content["cases"]
    figure = Figure(figsize=(9, 1.2 + 0.9 * len(cases)), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = [case["case"]["name"] for case in cases]
    for place, who in enumerate(("ours", "script")):
        rows = [index + 0.4 * place - 0.2 for index in range(len(cases))]
        times = [case["time"][who] for case in cases]
        spread = [
            [time["ms"] - time["ms_least"] for time in times],
            [time["ms_most"] - time["ms"] for time in times],
        ]
        values = ([time["ms"] for time in times], [case["memory"][f"{who}_mb"] for case in cases])
        panels[0].barh(rows, values[0], 0.36, xerr=spread, label=who)
        panels[1].barh(rows, values[1], 0.36, label=who)
        for axes, of_who in zip(panels, values, strict=True):
            for row, value in zip(rows, of_who, strict=True):
                axes.text(value, row - 0.24, f"{value:.0f}", ha="center", va="center", fontsize=7)
    for axes, meaning in zip(panels, ("ms a frame", "peak MB beyond the features"), strict=True):
        axes.set_yticks(range(len(cases)), labels)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(meaning)
        axes.invert_yaxis()
    panels[0].legend()
    where = content["environment"]["device"] or content["environment"]["cpu"]["model"]
    figure.suptitle(f"Label propagation, {where}; less is better", fontsize=10)
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds and frames")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--script-pixels", type=int, default=300, help="at patch 8 on a CPU")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--video", type=Path, nargs="+", default=[], help="folders of JPEG frames")
    parser.add_argument("--weights", default=Case.weights, help="of the MAE that encodes --video")
    parser.add_argument("--out", type=Path, help="JSON file (results/propagation-DEVICE.json)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw the plot of this JSON file")
    parser.add_argument("--memory", choices=("ours", "script"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.plot:
        print(plot(arguments.plot))
        return
    if arguments.memory:
        print(peak_memory(Case(**arguments.case), arguments.memory, device))
        return
    out = arguments.out or RESULTS / f"propagation-{device.type}.json"
    settings = {"context": CONTEXT, "radius": RADIUS, "topk": TOPK, "temperature": TEMPERATURE}
    narrow = arguments.short and device.type == "cpu"
    cases = [case for case in CASES if not (narrow and case.channels > SHORT_WIDTH)]
    cases += [video_case(folder, arguments.weights) for folder in arguments.video]
    measured = []
    for case in cases:
        large = case.grid[0] * case.grid[1] > 5000
        case = replace(
            case,
            frames=min(24, case.frames) if arguments.short else case.frames,
            script_pixels=arguments.script_pixels if device.type == "cpu" and large else None,
        )
        time = measure(case, device, rounds=2 if arguments.short else arguments.rounds)
        measured.append({"case": asdict(case), "time": time, "memory": memory_of_both(case, device)})
        print(
            f"{case.name}: {time['speedup']['wall']:.1f}x the script's speed, "
            f"{measured[-1]['memory']['script_over_ours']:.1f}x less memory, "
            f"{100 * time['agreeing_tokens']:.2f} % of the labels agree",
            flush=True,
        )
        write_results(
            out,
            {
                "environment": environment(),
                "threads": torch.get_num_threads(),
                "settings": settings,
                "cases": measured,
            },
        )
    print(plot(out))


if __name__ == "__main__":
    main()
