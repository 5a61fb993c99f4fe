"""Compare variants of the method by label propagation on held-out video, from cached tokens.

    python -m benchmarks.method NAME WEIGHTS ROOT [--only VARIANT ...] [--short]

NAME and WEIGHTS are those of a backbone. ROOT has the folders JPEGImages and Annotations of DAVIS, each with
one folder per sequence. The sequences are divided into folds. A projection that is evaluated on a fold has
been trained or fitted on the others, so nothing is chosen on what it is judged by. The tokens of training
samples and sequences are computed once and kept in ROOT/../method.

J is that of DAVIS for one merged object, on every second frame at a short side of about 368 pixels. The other
metrics are those of `fasttrain eval consistency` on a square part of the same frames, for L2-normalised
tokens, and `score` is that of validation. Intervals are the 95 % of a bootstrap over sequences of the
difference from the frozen features.
"""

# Shape suffixes: S samples, V views, T frames, h w grid, N tokens, D channels, H W pixels, Q sequences.

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measure import Results, command_line, run_command
from fasttrain.backbone_trainer import WHITENING, BackboneTrainer
from fasttrain.closed_form import ClosedForm, linear_projection
from fasttrain.data.loader import PairLoader
from fasttrain.data.preprocessing import encoded_size, normalise, resize
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.evaluation import propagate_labels, region_similarity
from fasttrain.evaluation.frames import read_image, read_label_map
from fasttrain.evaluation.sequences import hard_labels, soft_labels
from fasttrain.evaluation.trade_off import measure_video, summarise
from fasttrain.evaluation.validation import score
from fasttrain.fitter import STRENGTHS, WHITENINGS
from fasttrain.moments import TokenMoments
from fasttrain.objective import curriculum_frames
from fasttrain.optimizer import learning_rate_factor
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, recipe_from_dict

FOLDS = 3
# Samples per sequence for training, and the frames of a sample.
SAMPLES, FRAMES = 24, 3
# Evaluated frames per sequence, their stride and short side, and the context of label propagation.
EVALUATED, STRIDE, SHORT_SIDE, CONTEXT = 24, 2, 368, 8
# Of the sequences that are not in the fold, each of so many is used for choosing and not for training.
CHOOSE_EVERY = 4
RESAMPLES = 10_000
COMPARED = ("J", "score", "cycle_accuracy", "intra_normalized_95", "effective_rank")
Encode = Callable[[Tensor], Tensor]
# From the names of sequences to a projection, and what was chosen without labels.
Learn = Callable[[list[str]], tuple[Encode, Any]]


@dataclass(frozen=True)
class Clip:
    """The cached tokens of a sequence, float16, and its masks."""

    samples_SVND: Tensor
    frames_ThwD: Tensor
    masks_THW: Tensor


@dataclass(frozen=True)
class Variant:
    """A projection to evaluate."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys in addition to those of `training_recipe`."""
    start: tuple[float, float] | None = None
    """Strength and whitening of a closed form to start from."""
    keep_best: bool = False
    """Keep the best projection by the score, as validation does."""


def frozen_start(**recipe: Any) -> Variant:
    return Variant({"projection": {"init": "frozen"}} | recipe)


SLOW = {"lr": 3.2e-3}  # for 256 pairs; 2e-4 for 16
# Names of trained variants. The defaults are those of the paper, at 16 pairs per step.
TRAINED: dict[str, Variant] = {
    "published": Variant(),
    "start frozen": frozen_start(),
    "start frozen, low learning rate": frozen_start(optimizer=SLOW),
    "start frozen, lambda 30": frozen_start(objective={"lambda_reg": 30.0}),
    "start frozen, keep the best": Variant({"projection": {"init": "frozen"}}, keep_best=True),
    "published, keep the best": Variant(keep_best=True),
    "start at the closed form": Variant(start=(0.1, 0.2)),
    "start at whitening, low learning rate": Variant({"optimizer": SLOW}, start=(math.inf, 0.2)),
    "constrained": frozen_start(objective={"weighting": "constrained"}),
    "uncertainty": frozen_start(objective={"weighting": "uncertainty"}),
    "gradnorm": frozen_start(objective={"weighting": "gradnorm"}),
    "3 frames": frozen_start(objective={"frames": 3}),
    "3 frames, sub-cycles": frozen_start(objective={"frames": 3, "sub_cycles": True}),
    "3 frames, curriculum": frozen_start(objective={"frames": 3, "curriculum": True}),
    "mlp2": Variant({"projection": {"head": "mlp2", "init": "frozen"}}),
    "mlp3": Variant({"projection": {"head": "mlp3", "init": "frozen"}}),
    "lowrank": Variant({"projection": {"head": "lowrank", "init": "frozen"}}),
    "residual": Variant({"projection": {"head": "residual", "init": "frozen"}}),
}
# Strength and whitening of closed forms.
CLOSED: dict[str, tuple[float, float]] = {
    "mean removed": (math.inf, 0.0),
    "whitening 0.1": (math.inf, 0.1),
    "whitening 0.2": (math.inf, 0.2),
    "closed form, strength 1": (1.0, 0.0),
    "closed form, strength 0.1": (0.1, 0.0),
    "closed form, strength 0.1, whitening 0.2": (0.1, 0.2),
}
CHOSEN = "closed form, chosen"


class TokenTrainer(BackboneTrainer):
    """Trains on cached tokens (B, V, N, D), which take the place of frames."""

    def __init__(self, recipe: Recipe, world: World, **options: Any) -> None:
        super().__init__(recipe, world, **options)
        self._encode = lambda tokens_BVND, _positions: tokens_BVND


class Bench:
    """The cached tokens of all sequences, and what is measured with them."""

    def __init__(self, name: str, weights: str, root: Path, steps: int) -> None:
        self.backbone, self.root, self.steps = {"name": name, "weights": weights}, root, steps
        self.world = World.single("cpu")
        self.trainer = BackboneTrainer(self.recipe({}), self.world)
        file = root.parent / "method" / f"{name}-{self.trainer.encoder.weights_hash[:8]}.pt"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            torch.save(self._encode_all(), file)
        self.sequences: dict[str, Clip] = {key: Clip(**tensors) for key, tensors in torch.load(file).items()}
        self.moments = functools.cache(self._gather)
        self._form = functools.cache(lambda names: ClosedForm(self.moments(names)))
        self.names = list(self.sequences)
        self.folds = [self.names[i::FOLDS] for i in range(FOLDS)]

    def recipe(self, keys: dict[str, Any]) -> Recipe:
        """Return the recipe of a trained variant: that of the paper, but with 16 pairs per step."""
        sections: dict[str, dict[str, Any]] = {
            "backbone": self.backbone,
            "projection": {"init": "published"},
            "data": {"source": str(self.root / "JPEGImages"), "pairs_per_video": SAMPLES},
            "optimizer": {"lr": 1.6e-2},  # for 256 pairs; 1e-3 for 16
            "train": {"batch_size": 16, "precision": "fp32", "steps": self.steps},
            "encoder": {"compile": "none"},
        }
        for section, changes in keys.items():
            sections[section] = sections.get(section, {}) | changes
        return recipe_from_dict({"device": "cpu", **sections})

    def _encode_all(self) -> dict[str, dict[str, Tensor]]:
        recipe = self.recipe({"objective": {"frames": FRAMES}})
        index = open_source(recipe.data.source)
        samples: dict[str, list[Tensor]] = {name: [] for name in index.names}
        loader = PairLoader(
            index=index,
            recipe=recipe,
            world=self.world,
            first_step_index=0,
            num_steps=len(index) * SAMPLES // recipe.train.batch_size,
        )
        with torch.no_grad():
            for step, loaded in enumerate(loader):
                positions = self.trainer.asymmetric_positions(step)
                tokens_BVND = self.trainer.runtime.training_views(loaded.frames, positions)
                for sample, tokens_VND in zip(loaded.samples, tokens_BVND, strict=True):
                    samples[index.names[sample // SAMPLES]].append(tokens_VND.half())
            loader.close()
            return {name: {"samples_SVND": torch.stack(samples[name])} | self._clip(name) for name in samples}

    def _clip(self, name: str) -> dict[str, Tensor]:
        """Encode the frames of a sequence on which projections are evaluated."""
        encoder = self.trainer.encoder
        files = sorted((self.root / "JPEGImages" / name).iterdir())[::STRIDE][:EVALUATED]
        tokens, masks = [], []
        for file in files:
            image = read_image(file)
            size = encoded_size(image.shape[:2], SHORT_SIDE, encoder.patch_size)
            frame_3HW = normalise(resize(image, size), encoder.mean, encoder.std)
            tokens.append(encoder.tokens(frame_3HW[None])[0].unflatten(0, encoder.grid(*size)).half())
            mask = read_label_map(self.root / "Annotations" / name / f"{file.stem}.png")
            masks.append(torch.from_numpy((mask > 0).astype(np.uint8)))
        return {"frames_ThwD": torch.stack(tokens), "masks_THW": torch.stack(masks)}

    # --- what a variant learns from the sequences outside of a fold -----------------------------------------

    def _gather(self, names: tuple[str, ...]) -> TokenMoments:
        moments = TokenMoments(self.trainer.encoder.embed_dim)
        for name in names:
            moments.add(self.sequences[name].samples_SVND[:, :2].float())
        return moments

    def closed(self, names: Sequence[str], strength: float, whitening: float) -> Projection:
        matrix_DD = self._form(tuple(names)).solve(strength, whitening=whitening)
        return linear_projection(self.moments(tuple(names)), matrix_DD)

    def fit(self, strength: float, whitening: float, names: list[str]) -> tuple[Projection, None]:
        return self.closed(names, strength, whitening), None

    def split(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Divide sequences into those to learn from and those to choose by."""
        chosen = list(names[::CHOOSE_EVERY])
        return [name for name in names if name not in chosen], chosen

    def mean_score(self, encode: Encode, names: Sequence[str]) -> float:
        """Return what decides without labels, averaged over these sequences."""
        return float(np.mean([score(self._square(encode, name)) for name in names]))

    def choose(self, names: Sequence[str]) -> tuple[Projection, tuple[float, float]]:
        """Fit the closed form with the strength and whitening of the highest score."""
        learned, judged = self.split(names)
        candidates = itertools.product(STRENGTHS, WHITENINGS)
        best = max(candidates, key=lambda pair: self.mean_score(self.closed(learned, *pair), judged))
        return self.closed(learned, *best), best

    def train(self, variant: Variant, names: Sequence[str]) -> tuple[Projection, int | None]:
        """Train; also return the number of steps after which the projection was the best, if that counts."""
        learned, judged = self.split(names) if variant.keep_best else (list(names), [])
        recipe, moments = self.recipe(variant.recipe), self.moments(tuple(learned))
        trainer = TokenTrainer(recipe, self.world, encoder=self.trainer.encoder)
        if variant.start:
            state = self.closed(learned, *variant.start).state_dict()
            trainer.projection.load_state_dict(state)
        elif trainer.starts_at_frozen:
            std = moments.total_DD.diagonal().mean().sqrt().item()
            trainer.projection.start_at_frozen_(moments.mean_D.float(), std)
        views = [*range(recipe.objective.frames), -1]
        samples = torch.cat([self.sequences[name].samples_SVND for name in learned])[:, views]
        generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
        best, kept, best_step = -math.inf, trainer.projection, None
        if variant.keep_best:
            untrained = [self.closed(learned, math.inf, power) for power in (0.0, WHITENING)]
            kept = max(untrained, key=lambda each: self.mean_score(each, judged))
            best, best_step = self.mean_score(kept, judged), 0
        for step in range(self.steps):
            size = recipe.train.batch_size
            if len(order) < size:
                order = torch.cat((order, torch.randperm(len(samples), generator=generator)))
            rows, order = order[:size], order[size:]
            walk = None
            if recipe.objective.curriculum:
                walk = curriculum_frames(recipe.objective.frames, step, self.steps)
            tokens_BVND = samples[rows].float()
            trainer.forward_backward(tokens_BVND, step, last=True, diagnostics=False, walk_frames=walk)
            trainer.update(recipe.optimizer.lr / 16 * learning_rate_factor(recipe.train, step, self.steps))
            if variant.keep_best and (step + 1) % (self.steps // 4) == 0:
                reached = self.mean_score(trainer.projection, judged)
                if reached > best:
                    best, kept, best_step = reached, Projection(kept.dim), step + 1
                    kept.load_state_dict(trainer.projection.state_dict())
        return kept.requires_grad_(False), best_step

    # --- what is measured -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _square(self, encode: Encode, name: str) -> Tensor:
        """Return the normalised tokens (T, N, D) of the central square of the frames."""
        tokens_ThwD = functional.normalize(encode(self.sequences[name].frames_ThwD.float()), dim=-1)
        height, width = tokens_ThwD.shape[1:3]
        left = (width - height) // 2
        return tokens_ThwD[:, :, left : left + height].flatten(1, 2)

    @torch.no_grad()
    def propagate(self, encode: Encode, name: str) -> float:
        """Return J, the mean over all frames but the first and the last."""
        sequence = self.sequences[name]
        features_ThwD = encode(sequence.frames_ThwD.float())
        truth_THW = sequence.masks_THW.numpy()
        first_hwC = soft_labels(truth_THW[0], tuple(features_ThwD.shape[1:3]), 2)
        labels_ThwC = propagate_labels(features_ThwD, first_hwC, context=CONTEXT)
        scores = [
            region_similarity(hard_labels(labels_hwC, mask_HW.shape) == 1, mask_HW == 1)
            for labels_hwC, mask_HW in zip(labels_ThwC[1:-1], truth_THW[1:-1], strict=True)
        ]
        return float(np.mean(scores))

    def evaluate(self, learn: Learn) -> dict[str, Any]:
        """Learn from the other sequences and evaluate each fold: values by metric and sequence."""
        start = time.perf_counter()
        values: dict[str, dict[str, float]] = {metric: {} for metric in COMPARED}
        inter, facts = [], []
        for fold in self.folds:
            encode, fact = learn([name for name in self.names if name not in fold])
            facts.append(fact)
            squares = {name: self._square(encode, name) for name in fold}
            measured = {name: measure_video(square_TND) for name, square_TND in squares.items()}
            for name, one in measured.items():
                own = {"J": self.propagate(encode, name), "score": score(squares[name])}
                summary = summarise([one]) | own
                for metric in COMPARED:
                    values[metric][name] = summary[metric]
            inter.append(summarise(list(measured.values()))["inter_normalized_95"])
        content: dict[str, Any] = {
            "means": {metric: float(np.mean(list(by_name.values()))) for metric, by_name in values.items()},
            "inter_normalized_95": float(np.mean(inter)),
            "sequences": values,
            "seconds": time.perf_counter() - start,
        }
        return content | ({} if set(facts) == {None} else {"chosen": facts})


def compare(result: dict[str, Any], frozen: dict[str, Any], folds: list[list[str]]) -> None:
    """Add the paired differences of J from the frozen features, in points, to a result."""
    ours, theirs = (each["sequences"]["J"] for each in (result, frozen))
    difference = {name: 100 * (ours[name] - theirs[name]) for name in ours}
    values_Q = np.array(list(difference.values()))
    drawn = np.random.default_rng(0).integers(len(values_Q), size=(RESAMPLES, len(values_Q)))
    low, high = np.percentile(values_Q[drawn].mean(1), (2.5, 97.5))
    result["J_difference"] = {
        "mean": float(values_Q.mean()),
        "interval": [float(low), float(high)],
        "folds": [float(np.mean([difference[name] for name in fold])) for fold in folds],
        "least": float(values_Q.min()),
    }


def table(variants: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of all variants."""
    head = (
        "| variant | J | difference (95 %) | folds | worst | score | cycle accuracy | intra | inter | rank |"
    )
    lines = [head, "|---" * 10 + "|"]
    for name, result in variants.items():
        means, difference = result["means"], result["J_difference"]
        low, high = difference["interval"]
        lines.append(
            f"| {name} | {100 * means['J']:.1f} | {difference['mean']:+.1f} ({low:+.1f} to {high:+.1f}) | "
            f"{', '.join(f'{value:+.1f}' for value in difference['folds'])} | {difference['least']:+.1f} | "
            f"{means.get('score', math.nan):.3f} | {means['cycle_accuracy']:.3f} | "
            f"{means['intra_normalized_95']:.3f} | {result['inter_normalized_95']:.3f} | "
            f"{means['effective_rank']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("method", __doc__)
    parser.add_argument("name", metavar="NAME", help="backbone: mae, dino, ... or a timm ViT")
    parser.add_argument("weights", metavar="WEIGHTS", help="weights of the backbone, as in a recipe")
    help = "folder with JPEGImages and Annotations, each with one folder per sequence"
    parser.add_argument("root", type=Path, metavar="ROOT", help=help)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="evaluate only these variants")
    parser.add_argument("--steps", type=int, default=160, help="training steps (default: %(default)s)")
    args = parser.parse_args(arguments)
    bench = Bench(args.name, args.weights, args.root, 4 if args.short else args.steps)
    setting = {"steps": bench.steps, "sequences": bench.names, "folds": bench.folds, "samples": SAMPLES}
    backbone = {"name": args.name, "weights": Path(args.weights).name}
    results = Results(f"method-{args.name}", args, setting=setting, backbone=backbone)

    learners: dict[str, Learn] = {"frozen": lambda _names: (nn.Identity(), None)}
    for name, (strength, whitening) in CLOSED.items():
        learners[name] = functools.partial(bench.fit, strength, whitening)
    learners[CHOSEN] = bench.choose
    for name, variant in TRAINED.items():
        learners[name] = functools.partial(bench.train, variant)

    def measured(name: str) -> dict[str, Any]:
        result = bench.evaluate(learners[name])
        compare(result, results.content.get("variants", {}).get("frozen", result), bench.folds)
        return result

    for name in learners:
        if not args.only or name in ("frozen", *args.only):
            results.record(name, functools.partial(measured, name), group="variants")
    print(table(results.content.get("variants", {})))
    results.finish()


if __name__ == "__main__":
    run_command(main)
