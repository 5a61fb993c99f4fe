"""How long the 30 validation sequences of DAVIS 2017 take: a whole evaluation, on sequences made up.

    python -m benchmarks.davis          write results/davis-DEVICE.json

`fasttrain eval davis`, before and after a projection, of a ViT-B/16 with random weights: frames read, encoded
at 480 x 880 and propagated, masks written and scored, for some sequences pictures drawn. Timed is a sequence
of as many frames as those of DAVIS have on average, with pictures and without; the data set has 30 of them,
of which as many are drawn as `--pictures` draws by default. The time of starting (imports, weights) is not in
it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import synchronize
from benchmarks.record import RESULTS, environment, write_results
from fasttrain.backbones import load_backbone
from fasttrain.distributed import World
from fasttrain.evaluation import davis
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.plots import write_label_map
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import render_scene

# DAVIS 2017, validation: sequences, frames of all, and their usual size.
SEQUENCES, FRAMES, HEIGHT, WIDTH = 30, 1999, 480, 854
OBJECTS = 2
# Rendering takes far longer than evaluating: these go back and forth.
RENDERED = 8


def write_sequence(root: Path, frames: int, *, height: int, width: int) -> None:
    """One sequence `pan` in the data set's own layout."""
    scene = render_scene(0, num_frames=RENDERED, height=height, width=width, num_objects=OBJECTS)
    there_and_back = [*range(RENDERED), *range(RENDERED - 2, 0, -1)]
    images, annotations = (root / name / "480p" / "pan" for name in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    for number in range(frames):
        place = there_and_back[number % len(there_and_back)]
        Image.fromarray(scene.frames_THWC[place]).save(images / f"{number:05d}.jpg", quality=95)
        write_label_map(scene.labels_THW[place], annotations / f"{number:05d}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("pan\n", encoding="utf-8")


def measure(model: EvaluatedModel, root: Path, device: torch.device, options: list[str]) -> dict[str, float]:
    """Seconds of the sequence, without and with its pictures."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=device)
    parser = argparse.ArgumentParser()
    davis.add_arguments(parser)
    seconds: dict[str, float] = {}
    # The first pass loads and warms what all share.
    for name, pictures in (("warm-up", 0), ("plain", 0), ("drawn", 1)):
        arguments = parser.parse_args(["--pictures", str(pictures), *options])
        arguments.root = root
        with tempfile.TemporaryDirectory() as output:
            begun = time.perf_counter()
            davis.run(arguments, model, Path(output), world)
            synchronize(device)
            seconds[name] = time.perf_counter() - begun
    return seconds


def estimate(seconds: dict[str, float], frames: int, *, drawn: int) -> float:
    """Seconds of the data set's sequences, of which some are drawn, from those of one of `frames` frames."""
    as_long = FRAMES / (SEQUENCES * frames)
    return as_long * (drawn * seconds["drawn"] + (SEQUENCES - drawn) * seconds["plain"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="dino", help="a ViT-B/16 (default: dino)")
    parser.add_argument(
        "--frames", type=int, default=round(FRAMES / SEQUENCES), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="JSON file (results/davis-DEVICE.json)")
    parser.add_argument("options", nargs="*", help="after --: options of `fasttrain eval davis`")
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    encoder = load_backbone(arguments.backbone, weights="random")
    model = EvaluatedModel(
        encoder=encoder, projection=Projection(encoder.embed_dim), variants=("before", "after")
    ).to(device)
    defaults = argparse.ArgumentParser()
    davis.add_arguments(defaults)
    drawn = min(SEQUENCES, defaults.get_default("pictures"))
    with tempfile.TemporaryDirectory() as root:
        write_sequence(Path(root), arguments.frames, height=HEIGHT, width=WIDTH)
        seconds = measure(model, Path(root), device, arguments.options)
    total, plain = (estimate(seconds, arguments.frames, drawn=count) for count in (drawn, 0))
    payload: dict[str, Any] = {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "backbone": {"name": encoder.name, "embed_dim": encoder.embed_dim, "patch_size": encoder.patch_size},
        "options": arguments.options,
        "frames": arguments.frames,
        "objects": OBJECTS,
        "seconds": seconds,
        "data_set": {
            "sequences": SEQUENCES,
            "frames": FRAMES,
            "drawn": drawn,
            "seconds": total,
            "seconds_without_pictures": plain,
        },
    }
    out = arguments.out or RESULTS / f"davis-{device.type}.json"
    write_results(out, payload)
    print(
        f"a sequence of {arguments.frames} frames: {seconds['plain']:.1f} s, with pictures "
        f"{seconds['drawn']:.1f} s; by this the {SEQUENCES} of DAVIS 2017, before and after: {total:.0f} s, "
        f"without pictures {plain:.0f} s (goal on an H200: below 120; {environment()['device']})",
        out,
        sep="\n",
    )


if __name__ == "__main__":
    main()
