"""Fit projections in closed form: gather moments, choose the best on held-out videos, write run folders.

A `Trainer` has set up the backbones, the data and the run folders. All ranks gather moments; rank 0 does the
rest.
"""

# Shape suffixes: B pairs, N tokens, D channels.

from __future__ import annotations

import math
import shlex
import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.closed_form import ClosedForm, linear_projection
from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import PairLoader, calibration_frames, check_bad_fraction
from fasttrain.errors import InputError
from fasttrain.evaluation.trade_off import MIN_FRAMES
from fasttrain.evaluation.validation import Validation, hold_out
from fasttrain.files import file_lock, write_atomically, write_json
from fasttrain.loggers import Progress, count, say_block
from fasttrain.moments import TokenMoments
from fasttrain.projection import FIT_FILE, PROJECTION_FILE, Projection
from fasttrain.recipe import to_dict, to_yaml
from fasttrain.summary import random_weights
from fasttrain.trainer import Trainer
from fasttrain.video_encoder import projection_metadata

# The maps to choose from. The first of all is the frozen features with their mean removed.
STRENGTHS = (math.inf, 3.0, 1.0, 0.3, 0.1, 0.03)
WHITENINGS = (0.0, 0.1, 0.2)
# Unless the recipe says how many videos to hold out, eval.num_videos are, but at most one of so many.
HELD_OUT_EVERY = 5
# Quantiles of the reliability of directions in fit.json.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Number of pairs to encode at a time.
CHUNK = 16


def fit_all(trainer: Trainer, pairs: int) -> dict[str, dict[str, Any]]:
    """Fit a projection for each backbone, and return the content of fit.json by its name, on all ranks."""
    world, start = trainer.world, time.perf_counter()
    for warning in random_weights(trainer.recipe):
        trainer.say(f"warning: {warning}")
    for backbone in trainer.backbone_trainers:
        _check_earlier(backbone)
    index, validated = _split(trainer)
    results: dict[str, dict[str, Any]] = {}
    gathered = gather_moments(trainer, index, pairs)
    for backbone, moments in zip(trainer.backbone_trainers, gathered, strict=True):
        write = partial(_write, trainer, backbone, moments, validated)
        content = world.run_on_all(write if world.is_main else lambda: None)
        results[backbone.name] = world.gather(content)[0]
    if world.is_main:
        _say_results(trainer, results, time.perf_counter() - start)
    return results


def _check_earlier(backbone: BackboneTrainer) -> None:
    """Raise InputError if the run folder has a projection for other weights; it would be overwritten."""
    path, encoder = backbone.folder / PROJECTION_FILE, backbone.encoder
    if path.exists() and Projection.load(path).metadata.get("weights_hash") != encoder.weights_hash:
        raise InputError(
            f"output: {str(backbone.folder)!r} holds a projection for other weights than {encoder.weights!r} "
            f"(their hash differs); use another output=DIR"
        )


def _split(trainer: Trainer) -> tuple[FrameIndex, FrameIndex]:
    """Return the videos whose moments are gathered, and those on which the map is chosen."""
    index, recipe = trainer.index, trainer.recipe.eval
    if recipe.held_out:
        return index, trainer.validated
    number = min(recipe.num_videos, int((index.num_frames >= MIN_FRAMES).sum()) // HELD_OUT_EVERY)
    if not number:
        trainer.say("too few videos to hold any out; the map is chosen on those that are fitted")
    return hold_out(index, number)


def gather_moments(trainer: Trainer, index: FrameIndex, pairs: int) -> list[TokenMoments]:
    """Return the moments of the first pairs of the training stream, by backbone, the same on all ranks."""
    recipe, world, backbones = trainer.recipe, trainer.world, trainer.backbone_trainers
    epoch = len(index) * recipe.data.pairs_per_video
    if pairs > epoch:
        trainer.say(
            f"an epoch has {epoch:,} of the {count(pairs, 'pair')} to encode; raise data.pairs_per_video to "
            f"{math.ceil(pairs / len(index))} for all of them"
        )
    pairs = min(pairs, epoch)
    batch = max(1, min(recipe.train.batch_size, pairs // world.size))
    steps = math.ceil(pairs / (batch * world.size))
    loader = PairLoader(
        index=index,
        recipe=replace(
            recipe,
            # The moments are those of pairs, however many frames a walk of training visits.
            objective=replace(recipe.objective, frames=2),
            train=replace(recipe.train, batch_size=batch, accumulate=1),
        ),
        world=world,
        first_step_index=0,
        num_steps=steps,
    )
    for backbone in backbones:
        if backbone.runtime.awaits_calibration:
            backbone.calibrate(calibration_frames(index, recipe.data.image_size))
    moments = [TokenMoments(backbone.encoder.embed_dim, world.device) for backbone in backbones]
    bad_samples: list[str] = []
    try:
        with Progress("batch", steps, enabled=world.is_main, console=trainer.console) as progress:
            for step, loaded in enumerate(loader):
                bad_samples += loaded.bad_samples
                # The last batches may extend over the number of pairs.
                own = min(batch, max(0, pairs - (step * world.size + world.rank) * batch))
                for frames in loaded.frames[:, :own].split(CHUNK, dim=1) if own else ():
                    for backbone, gathered in zip(backbones, moments, strict=True):
                        tokens_BND = backbone.runtime.tokens(frames.flatten(0, 1))
                        gathered.add(tokens_BND.unflatten(0, frames.shape[:2]).transpose(0, 1))
                progress.advance()
    finally:
        loader.close()
    bad_samples = [line for share in world.gather(bad_samples) for line in share]
    for line in bad_samples:
        trainer.say(f"unreadable sample: {line}")
    if bad_samples:
        limit = recipe.data.max_bad_fraction
        check_bad_fraction(len(bad_samples), pairs + len(bad_samples), limit, bad_samples[-1])
    return [gathered.of_all_ranks(world) for gathered in moments]


def _write(
    trainer: Trainer, backbone: BackboneTrainer, moments: TokenMoments, validated: FrameIndex
) -> dict[str, Any]:
    """Choose the map, write the run folder, and return the content of fit.json."""
    recipe = backbone.recipe
    with trainer.working("choosing the map"):
        form = ClosedForm(moments)
        centred = linear_projection(moments, torch.eye(moments.dim, dtype=torch.float64))
        validation = Validation(backbone.encoder, {0.0: centred}, validated, recipe)
        if not validation.frozen:
            raise InputError(
                f"data.source: none of {count(len(validated), 'video')} can be validated; pass videos of at "
                f"least {MIN_FRAMES} readable frames"
            )
        maps = list(product(STRENGTHS, WHITENINGS))
        scores: list[float | None] = [validation.frozen["centred"]["score"]]
        for number, (strength, whitening) in enumerate(maps[1:], start=1):
            projection = linear_projection(moments, form.solve(strength, whitening=whitening))
            measured = validation.update(projection.to(trainer.world.device), number)
            scores.append(measured.get("after/score"))
    strength, whitening = maps[validation.best_step if validation.beats_frozen else 0]
    quantiles = form.reliability_D.quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    content = {
        "backbone": backbone.name,
        **_chosen(strength, whitening),
        "scores": [{**_chosen(*each), "score": score} for each, score in zip(maps, scores, strict=True)],
        "reliability": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        "pairs": moments.num_samples,
        "tokens": moments.num_tokens,
        "matches": moments.num_matches,
        "validated_videos": len(validated),
    }
    kept = validation.kept
    metadata = projection_metadata(backbone.backbone_settings, backbone.encoder, kept, to_dict(recipe))
    metadata |= {"strength": f"{strength:g}", "whitening": f"{whitening:g}"}
    refusal = f"output: another run is writing to {str(backbone.folder)!r}; use another output=DIR"
    with file_lock(backbone.folder / "run.lock", refusal):
        kept.save(backbone.folder / PROJECTION_FILE, metadata)
        write_json(backbone.folder / FIT_FILE, content)
        # Written last: a folder with a recipe but without fit.json is that of a training run.
        write_atomically(backbone.folder / "recipe.yaml", to_yaml(recipe).encode())
    return content


def _chosen(strength: float, whitening: float) -> dict[str, float | None]:
    """Return the parameters of a map for a JSON file, which has no infinity."""
    return {"strength": None if math.isinf(strength) else strength, "whitening": whitening}


def _say_results(trainer: Trainer, results: dict[str, dict[str, Any]], seconds: float) -> None:
    for backbone in trainer.backbone_trainers:
        found = results[backbone.name]
        frozen = "the frozen features with their mean removed"
        before, best = found["scores"][0]["score"], max(each["score"] or 0 for each in found["scores"])
        strength, whitening = found["strength"], found["whitening"]
        if strength is None and not whitening:
            chosen = f"none is better than {frozen} (score {before:.3f}), which are the result"
        else:
            named = "infinite" if strength is None else f"{strength:g}"
            chosen = f"strength {named}, whitening {whitening:g}; score {best:.3f} ({frozen}: {before:.3f})"
        lines = {
            "backbone": backbone.encoder.summary,
            "pairs": f"{found['pairs']:,}, with {found['matches']:,} matched tokens",
            "reliability": f"{found['reliability']['0.5']:.2f} (median over directions)",
            "map": f"{chosen}; chosen on {count(found['validated_videos'], 'video')}",
            "projection": str(backbone.folder / PROJECTION_FILE),
        }
        say_block("closed form", lines, trainer.console)
    trainer.say(f"fitted in {seconds:.1f} s; next, for example")
    run, data = str(trainer.backbone_trainers[0].folder), trainer.recipe.data.source
    trainer.say(f"  fasttrain eval consistency --run {shlex.quote(run)} --root {shlex.quote(data)}")
