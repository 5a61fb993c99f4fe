"""Train the recipe `quickstart` on real video, and evaluate it on videos that were not trained on.

Nothing is downloaded: eight short clips of DAVIS and a small encoder, distilled from DINOv2, are part of the
package. They are unpacked in data/demo. The demo prints the command of each step, so that it can be repeated
with other settings. To continue an interrupted demo, repeat it.
"""

import argparse
import io
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from rich.table import Table

from fasttrain.data.video import probe_video, stream_video_frames
from fasttrain.evaluation import command, report
from fasttrain.evaluation.results import Result, better, format_value, meaning
from fasttrain.files import make_folder, write_atomically
from fasttrain.loggers import EnduringConsole, Progress, say
from fasttrain.options import new_parser
from fasttrain.recipe import load_recipe
from fasttrain.training import train

# Its README is the card of the encoder and names the sources of the clips.
PACKAGED = Path(__file__).with_name("demo_data")
UNPACKED = Path("data", "demo")
# The clips have 426 x 240 pixels. The evaluation rounds these sides to whole patches.
SIZE = ("--height", "252", "--width", "448")
STEPS = 5
# Rows of the table, after J of each clip.
PROPAGATION = ("J-Mean", "F-Mean")
ANALYSIS = ("cycle_accuracy", "intra_normalized_95", "inter_normalized_95", "effective_rank")


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _announce(1, "unpack eight clips and an encoder", f"see {UNPACKED / 'README.md'}")
    unpack(UNPACKED)
    _announce(2, "train a projection", _shell(arguments.recipe, *arguments.overrides))
    train(recipe)
    folder = Path(recipe.output)
    path, propagation = _evaluate(3, "propagate masks", folder, "davis", UNPACKED / "DAVIS", *SIZE)
    _, analysis = _evaluate(4, "analyse the features", folder, "consistency", UNPACKED / "held_out")
    page = folder / "report.html"
    _announce(5, "write a report", _shell("report", str(folder), "--output", str(page)))
    report.run(argparse.Namespace(runs=[folder], output=page))
    print_results(propagation, analysis)
    for line in (
        "",
        f"pictures    {path.with_suffix('') / 'figures'}",
        f"report      {page} (open it in a browser)",
        f"run folder  {folder}",
        f"time        {time.perf_counter() - start:.0f} s",
        "",
        "Next, train on your own videos, or see the demo with DINOv2 ViT-S/14:",
        "  fasttrain dinov2 data.source=VIDEOS output=runs/mine",
        "  fasttrain demo backbone.weights=timm://vit_small_patch14_dinov2.lvd142m output=runs/dinov2",
    ):
        say(line)


def unpack(folder: Path) -> None:
    """Copy the files of the demo to `folder`, and write the held-out frames in the layout of DAVIS."""
    files = [path for path in sorted(PACKAGED.rglob("*")) if path.is_file()]
    clips = sorted(PACKAGED.glob("held_out/*.mp4"))
    with Progress("files", len(files) + len(clips)) as progress:
        for path in files:
            _write(folder / path.relative_to(PACKAGED), path.read_bytes())
            progress.advance()
        for clip in clips:
            video = probe_video(clip)
            for number, frame_HWC in enumerate(stream_video_frames(video, range(video.num_frames))):
                jpeg = io.BytesIO()
                Image.fromarray(frame_HWC).save(jpeg, "jpeg", quality=95)
                _write(folder / f"DAVIS/JPEGImages/480p/{clip.stem}/{number:05d}.jpg", jpeg.getvalue())
            progress.advance()


def print_results(propagation: Result, analysis: Result) -> None:
    """Print the figures of both evaluations as a table, and what they mean."""
    table = Table(title="Held-out clips, before and after the projection")
    table.add_column("metric")
    for heading in ("better", "before", "after", "difference"):
        table.add_column(heading, justify="right")

    def add(name: str, metric: str, values: Mapping[str, float | None], *, last: bool = False) -> None:
        variants = ("before", "after", "difference")
        cells = [format_value(values[variant], metric, variant) for variant in variants]
        table.add_row(name, better(metric), *cells, end_section=last)

    by_clip = propagation.by_sequence
    for clip in by_clip["difference"]:
        add(f"J of {clip}", "J", {variant: values[clip] for variant, values in by_clip.items()})
    worse = []
    shown = [(propagation, metric) for metric in PROPAGATION] + [(analysis, metric) for metric in ANALYSIS]
    for result, metric in shown:
        values = {variant: by_metric[metric] for variant, by_metric in result.results.items()}
        add(metric, metric, values, last=metric == PROPAGATION[-1])
        gain = (values["difference"] or 0) * (1 if better(metric) == "higher" else -1)
        if result is analysis and gain < 0:
            worse.append(metric)
    EnduringConsole().print("", table)
    for metric in ("J", *(metric for _, metric in shown if metric != "J-Mean")):
        say(f"{metric:<20}{meaning(metric)}")
    say("")
    gains = by_clip["difference"].values()
    say(f"J is higher after the projection on {sum(gain > 0 for gain in gains)} of {len(gains)} clips.")
    if sum(gains) < 0:
        say("Five clips are little video for a strong encoder: the paper's gains are from")
        say("Kinetics-400.")
    if worse:
        say(f"Worse after the projection: {', '.join(worse)}.")
        say("Training weighs consistency against separability: see objective.lambda_reg.")
    # The raw distance within a video alone would mislead.
    raw, spread = (
        " to ".join(f"{analysis.results[variant][f'intra_{name}']:#.3g}" for variant in ("before", "after"))
        for name in ("original", "diameter_95")
    )
    say("Distances are relative to the spread of the features, as in the paper, because")
    say(f"the projection changes their scale: the spread goes from {spread},")
    say(f"and the distance within a video, not divided by the spread, from {raw}.")


def _write(path: Path, content: bytes) -> None:
    # Files of another version are replaced.
    if not path.exists() or path.read_bytes() != content:
        make_folder(path.parent)
        write_atomically(path, content)


def _evaluate(
    step: int, title: str, run_folder: Path, task: str, root: Path, *options: str
) -> tuple[Path, Result]:
    words = [task, "--run", str(run_folder), "--root", str(root), *options]
    _announce(step, title, _shell("eval", *words))
    evaluated = command.evaluate(new_parser("eval").parse_args(words))
    assert evaluated is not None  # The demo runs in one process.
    return evaluated


def _announce(step: int, title: str, how: str) -> None:
    say("")
    say(f"[{step}/{STEPS}] {title}: {how}")


def _shell(*words: str) -> str:
    return shlex.join(("fasttrain", *words))
