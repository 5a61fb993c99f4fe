"""Label propagation on the same features: ours beside the common research script, speed and peak memory.

    python -m benchmarks.propagation               write results/propagation-{cpu,cuda}.json
    python -m benchmarks.propagation --video FOLDER... --weights CHECKPOINT   the features of real frames too
    python -m benchmarks.propagation --plot FILE   draw the plot

Synthetic features are a noisy pan over random points, which share no structure; real ones do, and lie close.

The research script (ajabri/videowalk and its descendants) is written plainly below: the context of every
frame gathered at once, then for two frames and a hundred query pixels at a time the affinity with the whole
context, the radius mask, top-k, softmax and the label product. Timed are the last two frames of a sequence,
where the context is full; on a CPU the script gets only a share of the query pixels of a large grid, and its
time is divided by that share. Memory is the peak beyond the features, on a CPU each contender's in a process
of its own.

Last, `fasttrain eval davis` as a whole, before and after a projection, of a ViT-B/16 with random weights: the
time of the 30 sequences of DAVIS 2017 follows from that of a few synthetic ones as long as those.

Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, S frames of a context, k sources.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import WARM_UPS, Results, Timing, interleave, parser, plot_bars, speedup
from fasttrain.backbones import load_backbone
from fasttrain.evaluation.propagation import (
    CONTEXT,
    RADIUS,
    TEMPERATURE,
    TOPK,
    Propagator,
    propagate_labels,
)
from fasttrain.projection import Projection

Settings = tuple[int, float, int, float]
SETTINGS: Settings = (CONTEXT, RADIUS, TOPK, TEMPERATURE)
CLASSES = 4
# Frames and query pixels that the script takes at a time.
FRAMES_AT_ONCE, PIXELS_AT_ONCE = 2, 100
# DAVIS 2017, validation: sequences, frames of each on average, their usual size.
SEQUENCES, FRAMES, HEIGHT, WIDTH = 30, 67, 480, 854


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sequence: synthetic features of 480 x 880 frames, unless named otherwise, or those of a video."""

    name: str
    grid: tuple[int, int] = (30, 55)
    channels: int = 384
    frames: int = 40
    script_pixels: int | None = None
    """Query pixels of a frame that the script is timed on where a CPU would take minutes for all."""
    video: str | None = None
    """A folder of JPEG frames, encoded by an MAE with these weights; its grid and channels count."""
    weights: str = "random"


# The most wanted first: time may run out.
CASES = (
    Case(name="patch 16"),
    Case(name="patch 16, 320 x 320", grid=(20, 20)),
    Case(name="patch 8", grid=(60, 110), script_pixels=300),
    Case(name="patch 16, width 768", channels=768),
)


class ResearchScript:
    """The common script; features and results stay in host memory, the affinities are the device's.

    Frames from `start` on are to be propagated; the script itself gathers the context of all.
    """

    def __init__(
        self, features_THWD: Tensor, device: torch.device, *, start: int = 0, settings: Settings = SETTINGS
    ) -> None:
        self.context, radius, self.topk, self.temperature = settings
        frames, height, width, _ = features_THWD.shape
        unit_THWD = functional.normalize(features_THWD, dim=-1)
        padded_THWD = torch.cat([unit_THWD[:1].expand(self.context, -1, -1, -1), unit_THWD])
        padded_DTHW = padded_THWD.permute(3, 0, 1, 2).contiguous()
        recent_TS = torch.arange(self.context) + torch.arange(frames)[:, None]
        self.bank_TS = torch.cat([torch.zeros(frames, 1, dtype=torch.long), recent_TS], dim=1)
        self.keys_DTSN = padded_DTHW[:, self.bank_TS[start:]].flatten(-2)
        self.query_DTN = padded_DTHW[:, self.context + start :].flatten(-2)
        place_N2 = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
        distance_NN = (place_N2[:, None] - place_N2).square().sum(-1).sqrt()
        self.mask_NN = torch.where(distance_NN < radius, 0.0, -1e10)
        self.grid, self.device, self.start = (height, width), device, start

    def propagate(self, labels_THWC: Tensor, start: int, pixels: int | None = None) -> Tensor:
        """Labels of frames start and start + 1 from those before; `labels_THWC` is written there.

        Of `pixels` query pixels alone, if given.
        """
        padded_TNC = torch.cat([labels_THWC[:1].expand(self.context, -1, -1, -1), labels_THWC]).flatten(1, 2)
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
            affinity_tLn /= self.temperature
            value_tkn, source_tkn = affinity_tLn.topk(self.topk, dim=1)
            weights.append(value_tkn.softmax(1).cpu())
            sources.append(source_tkn.cpu())
        weights_tkN, sources_tkN = torch.cat(weights, dim=-1), torch.cat(sources, dim=-1)
        for number, (weight_kN, source_kN) in enumerate(zip(weights_tkN, sources_tkN, strict=True), start):
            context_LC = padded_TNC[self.bank_TS[number]].flatten(0, 1).to(self.device)
            predicted_NC = (context_LC[source_kN] * weight_kN[..., None].to(self.device)).sum(0).cpu()
            padded_TNC[self.context + number, : len(predicted_NC)] = predicted_NC
            labels_THWC[number] = padded_TNC[self.context + number].unflatten(0, self.grid)
        return labels_THWC


def run_script(
    features_THWD: Tensor, first_labels_HWC: Tensor, device: torch.device, settings: Settings = SETTINGS
) -> Tensor:
    """The script on a whole sequence: labels (T, H, W, C)."""
    script = ResearchScript(features_THWD, device, settings=settings)
    labels_THWC = torch.zeros(len(features_THWD), *first_labels_HWC.shape)
    labels_THWC[0] = first_labels_HWC
    for start in range(0, len(features_THWD), FRAMES_AT_ONCE):
        script.propagate(labels_THWC, start)
        labels_THWC[0] = first_labels_HWC
    return labels_THWC


def make_sequence(case: Case, frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Features (T, H, W, D) of the case's first frames, and first labels (H, W, C)."""
    generator = torch.Generator().manual_seed(0)
    count = frames or case.frames
    if case.video is not None:
        features_THWD = encode_video(case, count)
    else:
        height, width = case.grid
        points = torch.randn(height, width + count, case.channels, generator=generator)
        features_THWD = torch.empty(count, height, width, case.channels)
        for number, frame_HWD in enumerate(features_THWD):
            torch.randn(frame_HWD.shape, generator=generator, out=frame_HWD)
            frame_HWD.mul_(0.5).add_(points[:, number : number + width])
    return features_THWD, torch.rand(*features_THWD.shape[1:3], CLASSES, generator=generator)


@torch.inference_mode()
def encode_video(case: Case, count: int) -> Tensor:
    """Tokens (T, H, W, D) of the video's first frames."""
    # It reads files with packages that a machine which only lends its GPU may lack.
    from fasttrain.evaluation.frames import fit_to_patches, read_image, resize

    encoder = load_backbone("mae", weights=case.weights)
    images = [read_image(path) for path in sorted(Path(str(case.video)).glob("*.jpg"))[:count]]
    size = fit_to_patches(images[0].shape[:2], encoder.patch_size)
    tokens = [encoder.tokens(resize(image, size)[None])[0].float() for image in images]
    return torch.stack(tokens).unflatten(1, encoder.grid(*size))


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Both on the last two frames of the sequence, in turns, and how far their labels agree."""
    frames = CONTEXT + 1 + FRAMES_AT_ONCE
    features_THWD, first_labels_HWC = make_sequence(case, frames)
    on_device_THWD = features_THWD.to(device)
    stream = Propagator(on_device_THWD[0], first_labels_HWC.to(device), *SETTINGS)
    start = frames - FRAMES_AT_ONCE
    labels = [first_labels_HWC, *(stream.step(frame_HWD).cpu() for frame_HWD in on_device_THWD[1:start])]
    earlier_THWC = torch.cat([torch.stack(labels), torch.zeros(FRAMES_AT_ONCE, *first_labels_HWC.shape)])
    script = ResearchScript(features_THWD, device, start=start)
    # The stream forgets its oldest frame at every step: each call starts from the same state.
    streams = [copy.deepcopy(stream) for _ in range(WARM_UPS + rounds + 1)]

    def ours() -> Tensor:
        fresh = streams.pop()
        return torch.stack([fresh.step(frame_HWD) for frame_HWD in on_device_THWD[start:]]).cpu()

    def theirs() -> Tensor:
        return script.propagate(earlier_THWC, start, pixels)[start:]

    tokens = features_THWD[0, ..., 0].numel()
    pixels = case.script_pixels if device.type == "cpu" and case.script_pixels else tokens
    timings = interleave({"ours": ours, "script": theirs}, rounds=rounds, calls=1, device=device)
    scale, (wall, cpu) = tokens / pixels, vars(timings["script"]).values()
    script_timing = Timing([scale * seconds for seconds in wall], [scale * seconds for seconds in cpu])
    # The second frame attends to the whole of the first, so a part of the script's first is compared alone.
    compared = slice(0, None if pixels == tokens else 1)
    difference = (ours() - theirs())[compared].flatten(1, 2)[:, :pixels].abs().amax(-1)
    return {
        # A call is two frames.
        "ours": timings["ours"].result(1, calls=FRAMES_AT_ONCE),
        "script": script_timing.result(1, calls=FRAMES_AT_ONCE),
        "speedup": speedup(script_timing, timings["ours"]),
        "agreeing_tokens": float((difference < 1e-5).float().mean()),
    }


def peak_memory(case: Case, contender: str, device: torch.device) -> int:
    """Bytes beyond the features at the peak: of the GPU, or of this process, which must then be fresh."""
    features_THWD, first_labels_HWC = make_sequence(case)
    if contender == "ours":
        # The stream holds as much after context + 1 frames as ever after.
        features_THWD = features_THWD[: CONTEXT + 3].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else process_bytes("VmRSS")
    if contender == "ours":
        propagate_labels(features_THWD, first_labels_HWC)
    else:
        last = case.frames - FRAMES_AT_ONCE
        # Host memory is not what is looked at on a GPU.
        first = last if device.type == "cuda" else 0
        labels_THWC = torch.zeros(case.frames, *first_labels_HWC.shape)
        ResearchScript(features_THWD, device, start=first).propagate(labels_THWC, last, PIXELS_AT_ONCE)
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else process_bytes("VmHWM")) - before


def process_bytes(field: str) -> int:
    """A size of this process from the kernel: VmRSS, resident now; VmHWM, resident at the peak."""
    # The peak that getrusage gives is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def memory_of_both(case: Case, device: torch.device) -> dict[str, float]:
    """Peak MB of each contender, and how many times less ours is."""
    found = {}
    for contender in ("ours", "script"):
        if device.type == "cuda":
            # Its allocator knows the peak of any stretch; starting a process takes longer than all the rest.
            found[contender] = peak_memory(case, contender, device) / 2**20
            continue
        words = ["-m", "benchmarks.propagation", "--memory", contender, json.dumps(asdict(case))]
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        found[contender] = int(done.stdout.split()[-1]) / 2**20
    ours, script = found["ours"], found["script"]
    return {"ours_mb": ours, "script_mb": script, "script_over_ours": script / ours}


def measure_davis(backbone: str, frames: int, device: str) -> dict[str, Any]:
    """Seconds of `fasttrain eval davis` for the whole data set, by four sequences, of which one is drawn."""
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "projection.safetensors"
        Projection(load_backbone(backbone, weights="random").embed_dim).save(head)
        encoder = ["--backbone", backbone, "--projection", str(head), "--device", device]
        seconds = {}
        # What both pay alike, such as loading and warming up, does not count.
        for sequences, pictures in ((1, 1), (5, 2)):
            root, output = Path(folder) / f"davis{sequences}", Path(folder) / f"out{sequences}"
            write_sequences(root, sequences, frames)
            places = ["--root", str(root), "--output", str(output), "--pictures", str(pictures)]
            command = [sys.executable, "-m", "fasttrain", "eval", "davis", *places, *encoder]
            subprocess.run(command, check=True, capture_output=True)
            seconds[sequences] = json.loads((output / "davis.json").read_text(encoding="utf-8"))["seconds"]
    data_set = SEQUENCES * FRAMES / frames * (seconds[5] - seconds[1]) / 4
    return {"backbone": backbone, "frames": frames, "seconds": seconds, "data_set_seconds": data_set}


def write_sequences(root: Path, count: int, frames: int) -> None:
    """Sequences in the data set's own layout, all the same: eight rendered frames, back and forth."""
    # Needs PyAV.
    from fasttrain.evaluation.plots import write_label_map
    from fasttrain.tools.synthetic import render_scene

    scene = render_scene(0, num_frames=8, height=HEIGHT, width=WIDTH)
    order = [*range(8), *range(6, 0, -1)]
    for sequence in range(count):
        images, labels = (root / kind / "480p" / f"pan{sequence}" for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        for number in range(frames):
            index = order[number % len(order)]
            Image.fromarray(scene.frames_THWC[index]).save(images / f"{number:05d}.jpg", quality=95)
            write_label_map(scene.labels_THW[index], labels / f"{number:05d}.png")
    names = root / "ImageSets" / "2017" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("\n".join(f"pan{sequence}" for sequence in range(count)), encoding="utf-8")


def plot(path: Path) -> Path:
    panels: dict[str, dict[str, dict[str, float]]] = {"times the script's speed": {}, "times less memory": {}}
    for found in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        time, memory = found["time"], found["memory"]
        name = f"{found['case']['name']}\n{time['ours']['ms']:.0f} ms, {memory['ours_mb']:.0f} MB"
        panels["times the script's speed"][name] = {"ratio": time["speedup"]["wall"]}
        panels["times less memory"][name] = {"ratio": memory["script_over_ours"]}
    return plot_bars(path, "Label propagation", panels, "ratio")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--video", nargs="+", default=[], help="folders of JPEG frames")
    options.add_argument("--weights", default=Case.weights, help="of the MAE that encodes --video")
    options.add_argument("--backbone", default="dino", help="of the DAVIS evaluation (default: %(default)s)")
    options.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    device = torch.device(given.device)
    if given.plot:
        print(plot(given.plot))
        return
    if given.memory:
        print(peak_memory(Case(**json.loads(given.memory[1])), given.memory[0], torch.device("cpu")))
        return
    results = Results("propagation", given, threads=torch.get_num_threads())
    cases = [case for case in CASES if not (given.short and device.type == "cpu" and case.grid[0] > 20)]
    cases += [Case(name=Path(video).name, video=video, weights=given.weights) for video in given.video]
    measured: list[dict[str, Any]] = []
    for case in cases:
        case = replace(case, frames=24 if given.short else case.frames)
        time = results.attempt(case.name, partial(measure, case, device, 2 if given.short else 5))
        memory = results.attempt(f"{case.name}, memory", partial(memory_of_both, case, device))
        if time and memory:
            measured.append({"case": asdict(case), "time": time, "memory": memory})
            results.write("cases", measured)
            print(f"{case.name}: {time['speedup']['wall']:.1f}x the script's speed", flush=True)
    frames = (4 if device.type == "cpu" else 20) if given.short else FRAMES
    results.record("davis", partial(measure_davis, given.backbone, frames, given.device))
    results.finish()


if __name__ == "__main__":
    main()
