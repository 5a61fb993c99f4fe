"""Predict from videos whether a projection is likely to help, and what will limit it.

One pass over frame pairs of SOURCE tests the assumptions of the paper's theory on the tokens of the frozen
encoder, computes the trade-off between consistency within videos and separability of videos that the closed
form of the projection can reach, and places the run's projection next to it. The page "Theory" of the
documentation says what each number means. SOURCE is anything that training accepts. Prints tables and a
sentence, and writes OUTPUT/analyse-SOURCE-HASH.json with a picture in the folder of the same name.
"""

# The formulas are in `theory.py`. Shape suffixes: K frame pairs, N tokens, S sampled tokens, D channels.

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fasttrain.closed_form import ClosedForm
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.preprocessing import centre_crop, stream_frames
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import describe_left_out, open_source
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, LocalInputError, check_options
from fasttrain.evaluation import plots, theory
from fasttrain.evaluation.command import evaluate
from fasttrain.evaluation.results import print_table
from fasttrain.evaluation.theory import Covariances, Point, Verdict
from fasttrain.evaluation.trade_off import MIN_FRAMES
from fasttrain.files import parse_json
from fasttrain.loggers import EnduringConsole, Progress, count, say
from fasttrain.moments import Covariance, TokenMoments
from fasttrain.options import path_or_url
from fasttrain.projection import Projection
from fasttrain.recipe import DataRecipe

# The tests of normality use about so many tokens.
SAMPLED_TOKENS = 10_000
# The closed form is computed from each half of the videos, and measured on the other one.
HALVES = 2
# Videos of a half differ only if there are two.
MIN_VIDEOS = 2 * HALVES


class _Videos:
    """The moments of the tokens of some videos."""

    def __init__(self, dim: int) -> None:
        self.tokens = TokenMoments(dim)
        self.means = Covariance(dim)
        """Of the mean tokens of videos."""

    def add(self, pairs_K2ND: Tensor, frozen_K2ND: Tensor) -> None:
        """Add the frame pairs of a video, whose frozen tokens decide which tokens match."""
        self.tokens.add(pairs_K2ND, match_by_B2ND=frozen_K2ND)
        self.means.add(pairs_K2ND.double().mean((0, 1, 2))[None])

    def merge(self, other: "_Videos") -> None:
        self.tokens.merge(other.tokens)
        self.means.merge(other.means)

    @property
    def covariances(self) -> Covariances:
        return Covariances(
            noise_DD=self.tokens.noise_DD,
            total_DD=self.tokens.total_DD,
            within_DD=self.tokens.within_frame_DD,
            # Unbiased, because there may be few videos.
            video_DD=self.means.scatter_DD / (self.means.count - 1),
        )


def _merged(parts: Iterable[_Videos], dim: int) -> _Videos:
    result = _Videos(dim)
    for part in parts:
        result.merge(part)
    return result


def run(arguments: argparse.Namespace) -> None:
    """Analyse the features of videos. Raises InputError if the videos or the encoder cannot be used."""
    check_options(arguments, num_videos=MIN_VIDEOS, pairs=1, image_size=1)
    if arguments.root is None:
        arguments.root = _source_of(arguments.run)
    evaluated = evaluate(arguments, _analyse)
    if evaluated is None:
        return
    path, result = evaluated
    say(f"{result.model.backbone}, {result.model.weights}")
    print_table(result.results)
    content = json.loads(path.read_bytes())
    _print_assumptions(content["normality"], content["commutation"])
    say(f"results written to {path}")
    say(content["verdict"]["sentence"])


def _source_of(run: str | None) -> Path | str:
    """Return the videos that a run was trained on."""
    if run is None:
        raise InputError("SOURCE is missing. Pass videos to analyse; only --run has those of its training.")
    source = parse_json(Projection.find(run).metadata.get("recipe", "{}")).get("data", {}).get("source")
    if not source:
        raise InputError(f"run '{run}' does not say what it was trained on. Pass videos as SOURCE.")
    return path_or_url(source)


def _analyse(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Analyse evenly spaced videos. Returns the results on the main process and None on the others."""
    index = open_source(arguments.root)
    chosen = evenly_spaced(len(index), arguments.num_videos)
    dim = model.encoder.embed_dim
    halves = {variant: [_Videos(dim) for _ in range(HALVES)] for variant in model.variants}
    samples: dict[int, Tensor] = {}
    skipped: dict[int, str] = {}
    per_video = -(-SAMPLED_TOKENS // len(chosen))
    share = world.shard(range(len(chosen)))
    with Progress("videos", len(share), enabled=world.is_main) as progress:
        for position in share:
            name = index.names[chosen[position]]
            progress.advance(0, name)
            try:
                pairs = _encode_pairs(index, chosen[position], arguments, model, world.device)
                for variant, pairs_K2ND in pairs.items():
                    halves[variant][position % HALVES].add(pairs_K2ND, pairs["before"])
                frozen_SD = pairs["before"].flatten(0, 2)
                samples[position] = frozen_SD[evenly_spaced(len(frozen_SD), per_video)]
            except UnreadableFrameError as error:
                skipped[position] = f"{name}: {error}"
            progress.advance()
    samples, skipped = world.merge(samples), world.merge(skipped)
    gathered = world.gather(halves)
    if not world.is_main:
        return None
    reasons = [*(f"{name}: {reason}" for name, reason in index.skipped), *skipped.values()]
    merged = {
        variant: [_merged((share[variant][half] for share in gathered), dim) for half in range(HALVES)]
        for variant in model.variants
    }
    if min(half.means.count for half in merged["before"]) < MIN_VIDEOS // HALVES:
        described = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise InputError(
            f"'{arguments.root}': {count(len(samples), 'video')} can be analysed{described}; expected at "
            f"least {MIN_VIDEOS} with {MIN_FRAMES} frames or more. Pass more videos."
        )
    if reasons:
        say(f"skipped videos: {len(reasons)} (for example {reasons[0]})")
    if index.left_out:
        say(describe_left_out(index.left_out))
    whole = {variant: _merged(pair, dim) for variant, pair in merged.items()}
    points = {variant: theory.measure(videos.covariances) for variant, videos in whole.items()}
    if min(points["before"][1:]) <= 0:
        raise InputError(
            f"'{arguments.root}': matching tokens or videos do not differ. Pass videos with motion."
        )
    frozen = whole["before"]
    measured = frozen.covariances
    same = _predict(frozen, frozen)
    one, other = merged["before"]
    held_out = theory.mean_curve([_predict(one, other), _predict(other, one)])
    verdict = theory.judge(measured, same, held_out, len(samples))
    _draw(same, held_out, points, verdict, model.title, output / "figures" / "predicted_trade_off.png")
    return {
        "data": {"videos": len(samples), "skipped": reasons},
        "results": {
            variant: {name: value for name, value in point._asdict().items() if name != "strength"}
            for variant, point in points.items()
        },
        "normality": theory.normality(torch.cat(list(samples.values()))),
        "commutation": theory.commutation(measured.noise_DD, measured.video_DD),
        "overlap": theory.overlap(measured),
        "curve": [point._asdict() for point in same],
        "curve_held_out": [point._asdict() for point in held_out],
        "verdict": {**verdict._asdict(), "point": verdict.point._asdict()},
    }


def _predict(fitted: _Videos, measured: _Videos) -> list[Point]:
    """Return the curve of the closed form of some videos on others, relative to the frozen features."""
    closed_form = ClosedForm(fitted.tokens)
    maps = ((strength, closed_form.solve(strength)) for strength in theory.STRENGTHS)
    return theory.relative(theory.trade_off_curve(maps, measured.covariances))


def _draw(
    same: Sequence[Point],
    held_out: Sequence[Point],
    points: Mapping[str, Point],
    verdict: Verdict,
    title: str,
    path: Path,
) -> None:
    """Draw the predicted curves and the measured points, relative to the frozen features."""
    curves = {"predicted for other videos": held_out, "predicted for the videos themselves": same}
    drawn = {"frozen encoder": held_out[0], "best prediction in bounds": verdict.point}
    if "after" in points:
        drawn["projection, measured"] = theory.relative([points["before"], points["after"]])[1]
    plots.predicted_trade_off(
        title,
        {name: [(x, y) for _, x, y, _ in curve] for name, curve in curves.items()},
        {name: (x, y) for name, (_, x, y, _) in drawn.items()},
        path,
    )


def _encode_pairs(
    index: FrameIndex, video: int, arguments: argparse.Namespace, model: EvaluatedModel, device: torch.device
) -> dict[str, Tensor]:
    """Encode evenly spaced frame pairs with the gap of training: tokens (K, 2, N, D) by variant.

    Raises UnreadableFrameError if the video is too short or a frame is unreadable.
    """
    length = int(index.num_frames[video])
    if length < MIN_FRAMES:
        raise UnreadableFrameError(f"fewer than {MIN_FRAMES} frames")
    gap = int(DataRecipe.gap * length)
    first_K = evenly_spaced(length - gap, arguments.pairs)
    numbers = sorted({*first_K, *(frame + gap for frame in first_K)})
    tokens: dict[int, dict[str, Tensor]] = {}
    for number, frame in zip(numbers, stream_frames(index, video, numbers), strict=True):
        crop_3HW = centre_crop(frame, arguments.image_size, model.encoder.mean, model.encoder.std)
        # Encode one frame at a time to bound the memory.
        encoded = model.tokens(crop_3HW[None].to(device))
        tokens[number] = {variant: tokens_1ND.cpu() for variant, tokens_1ND in encoded.items()}
    pairs = {}
    for variant in model.variants:
        pairs[variant] = torch.stack(
            [torch.cat([tokens[frame][variant], tokens[frame + gap][variant]]) for frame in first_K]
        )
        if not pairs[variant].isfinite().all():
            raise LocalInputError(
                f"video {index.names[video]!r}: its features {variant} the projection are not all finite. "
                "Check its frames and the weights."
            )
    return pairs


def _print_assumptions(normality: Mapping[str, float], commutation: Mapping[str, float]) -> None:
    """Print the tests of the assumptions, each with its value if the assumption held."""
    table = Table()
    table.add_column("assumption")
    table.add_column("measured", justify="right")
    table.add_column("if it held", justify="right")
    rows = {
        "normal: median |skewness|": ("{skewness_median:.2f}", "0 ± {skewness_error:.2f}"),
        f"normal: channels of |skewness| > {theory.SKEWED}": ("{skewed:.0%}", "0%"),
        "normal: median kurtosis - 3": ("{kurtosis_median:.2f}", "0 ± {kurtosis_error:.2f}"),
        f"normal: channels of |kurtosis - 3| > {theory.HEAVY_TAILED:g}": ("{heavy_tailed:.0%}", "0%"),
        "normal: Mardia's skewness": (
            "{mardia_skewness:.2f}",
            "{mardia_skewness_expected:.2f} ± {mardia_skewness_error:.2f}",
        ),
        "normal: Mardia's kurtosis": (
            "{mardia_kurtosis:.1f}",
            "{mardia_kurtosis_expected:.1f} ± {mardia_kurtosis_error:.1f}",
        ),
        "commuting: |NB - BN| / 2 |N| |B|": (
            "{commutator:.3f}",
            "0 (random {commutator_random:.3f} ± {commutator_random_std:.3f})",
        ),
        "commuting: |NB - BN| / 2 |NB|": (
            "{relative_commutator:.3f}",
            "0 (random {relative_commutator_random:.3f} ± {relative_commutator_random_std:.3f})",
        ),
    }
    numbers = {**normality, **commutation}
    for name, texts in rows.items():
        table.add_row(name, *(text.format(**numbers) for text in texts))
    EnduringConsole().print(table)
