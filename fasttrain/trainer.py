"""Training: set-up, the loop, one step.

A `Trainer` feeds one stream of frame pairs to one `BackboneTrainer` (a backbone with its head) or to many.
What a run computes is a function of recipe, data and seed: every random number follows from (seed, step).

The path of a frame pair: `PairLoader` -> `Trainer.train_step` -> `BackboneTrainer.forward_backward` ->
`EncoderRuntime.three_views`, the frozen tokens -> `CosettleObjective`, the head and its losses.
"""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from fasttrain.backbone_trainer import BackboneTrainer, backbone_recipes
from fasttrain.checkpoint import drop_checkpoints, load_checkpoint, saved_steps
from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import FramePairs, PairLoader
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import file_lock, write_atomically, write_json
from fasttrain.loggers import NON_FINITE, MetricsLog, Progress, last_event, say
from fasttrain.optimizer import learning_rate_factor
from fasttrain.profiling import STEP, StepProfiler, span
from fasttrain.recipe import Recipe, differences, load_recipe, recipe_hash, to_yaml

# The share of bad samples is taken of at least so many, or the first bad one would stop a run.
MIN_SEEN = 1000


class Trainer:
    """One run of this process of `world`. `step` is the number of the current step, 0 before the first.

    Args:
        profile: record some steps into `output/profile` and print where their time went.

    Raises:
        InputError: the recipe, its data, its weights or its folder are not fit to train.
    """

    # Set by `_opened`, while the loop runs. Only the main process has logs and a profiler.
    loader: PairLoader
    batches: Iterator[FramePairs]
    logs: dict[str, MetricsLog]
    progress: Progress
    profiler: StepProfiler | None
    _start: float
    _last_report: tuple[int, float]

    def __init__(self, recipe: Recipe, world: World, *, profile: bool = False) -> None:
        self.recipe, self.world = recipe, world
        if recipe.eval.every:
            # Only where it is used: it brings Matplotlib, and may be missing.
            from fasttrain.evaluation.consistency import validate

            self.validate = validate
        self.console = Console(quiet=not world.is_main)
        self.say = partial(say, console=self.console)
        recipes = backbone_recipes(recipe)
        for backbone_recipe in recipes:
            check_run_folder(backbone_recipe)
        self.index = self._open_source()
        train = recipe.train
        self.global_batch = train.batch_size * train.accumulate * world.size
        samples_per_epoch = len(self.index) * recipe.data.pairs_per_video
        self.steps_per_epoch = samples_per_epoch / self.global_batch
        self.total_steps = train.steps or max(1, int(train.epochs * samples_per_epoch) // self.global_batch)
        self.peak_lr = recipe.optimizer.lr * self.global_batch / 256
        # What a resumed run must find unchanged, beside the recipe.
        self.facts = {"global_batch": self.global_batch, "data": self.index.fingerprint()}
        # A file that only some processes can read would silently give them different samples.
        world.check_same(self.facts["data"], f"data.source: {recipe.data.source}")
        self.backbone_trainers = [BackboneTrainer(one, world) for one in recipes]
        # Of all processes up to the last report; a resumed run adds to those of its checkpoint.
        self.bad_samples = 0
        self.step = self._resume()
        # Of this process, since the last report.
        self._new_bad_samples: list[str] = []
        self._profile = profile and world.is_main
        # Whether a signal came to this process; whether it had come to any at the last report.
        self._stop_requested = self._stopping = False

    def train(self) -> dict[str, dict[str, Any]]:
        """Train to the end; returns the last readings by backbone, nothing where all steps were done before.

        Raises:
            InputError: the data or the losses do not allow training to continue.
            KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written.
        """
        if self.step >= self.total_steps:
            self.say(f"{self.recipe.output} is trained: all {self.total_steps} steps are done")
            return {}
        results: dict[str, dict[str, Any]] = {}
        with self._opened():
            while self.step < self.total_steps and not self._stopping:
                self.step += 1
                reports = self._is_report_due()
                with span(STEP):
                    self.train_step(diagnostics=reports)
                self.progress.advance()
                if self.profiler is not None:
                    self.profiler.step()
                if reports:
                    results = self._report()
                # Every save follows a report, which removes a head that a non-finite loss has spoilt.
                if self._stopping or self._is_due(self.recipe.train.save_every):
                    self._save()
                if reports:
                    self._last_report = self.step, time.perf_counter()
        if self.step < self.total_steps:
            self.say(f"stopped after step {self.step}; the same command continues from there")
            raise KeyboardInterrupt
        return results

    def train_step(self, *, diagnostics: bool) -> None:
        """One optimiser step of every backbone, on the same frames."""
        passes = self.recipe.train.accumulate
        for i in range(passes):
            with span("data"):
                pairs = next(self.batches)
            self._new_bad_samples += pairs.bad_samples
            for trainer in self.backbone_trainers:
                trainer.forward_backward(
                    pairs.frames, self.step - 1, last=i == passes - 1, diagnostics=diagnostics
                )
        for trainer in self.backbone_trainers:
            trainer.update(self._lr())

    def _lr(self) -> float:
        return self.peak_lr * learning_rate_factor(self.recipe.train, self.step - 1, self.total_steps)

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) and at the end happens now."""
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    def _is_report_due(self) -> bool:
        """Whether this step's readings are taken."""
        train = self.recipe.train
        # Several processes get their signal at different times: they stop at a report that all take.
        stops = self._stop_requested and self.world.size == 1
        return stops or any(map(self._is_due, (train.log_every, train.save_every, self.recipe.eval.every)))

    def request_stop(self, signal_number: int, frame: FrameType | None) -> None:
        """Signal handler: finish the step, write a checkpoint, leave."""
        self._stop_requested = True

    # --- readings and files ----------------------------------------------------------------------------

    def _report(self) -> dict[str, dict[str, Any]]:
        """Read all meters and write them down. Only here does the host wait for the device."""
        readings = [(trainer, *trainer.meter.read(self.world)) for trainer in self.backbone_trainers]
        now = time.perf_counter()
        last_step, last_time = self._last_report
        rate = (self.step - last_step) * self.global_batch / (now - last_time)
        shares, stops = zip(*self.world.gather((self._new_bad_samples, self._stop_requested)), strict=True)
        self._new_bad_samples, self._stopping = [], any(stops)
        bad_samples = [line for share in shares for line in share]
        self.bad_samples += len(bad_samples)
        for line in bad_samples:
            self.say(f"replaced a sample that cannot be read: {line}")
        common = {
            "epoch": self.step / self.steps_per_epoch,
            "lr": self._lr(),
            "pairs_per_second": rate,
            "seconds": now - self._start,
            "bad_samples": self.bad_samples,
            "bad_files": len(self.index.skipped),
        }
        records: dict[str, dict[str, Any]] = {}
        for trainer, values, bad_step in readings:
            if bad_step is not None:
                self._drop_non_finite(trainer, bad_step)
                continue
            record: dict[str, Any] = {**values, **common}
            if self.world.is_main:
                if self._is_due(self.recipe.eval.every):
                    head, device = trainer.projection, self.world.device
                    record |= self.validate(trainer.encoder, head, self.index, device, self.recipe)
                faults = {"faults": bad_samples} if bad_samples else {}
                self.logs[trainer.name].write(self.step, record | faults)
            self.progress.show(
                f"{trainer.name}  {rate:.1f} pairs/s  "
                f"loss {record['loss']:.4f}  cycle {record['cycle']:.4f}  "
                f"separability {record['separability']:.4f}  accuracy {record['cycle_accuracy']:.3f}  "
                f"lr {record['lr']:.2e}"
            )
            records[trainer.name] = record
        if bad_samples:
            # After they were written down; all processes come to the same answer. Each was replaced.
            seen = self.step * self.global_batch + self.bad_samples
            limit = self.recipe.data.max_bad_fraction
            check_bad_fraction(self.bad_samples, seen, limit, bad_samples[-1])
        if self.world.is_main and self.step == self.total_steps:
            # Ahead of the last checkpoint, with which a run counts as trained.
            for trainer in self.backbone_trainers:
                record = {"backbone": trainer.name, **records[trainer.name]}
                write_json(trainer.folder / "train.json", record)
        return records

    def _drop_non_finite(self, trainer: BackboneTrainer, bad_step: int) -> None:
        """Name step and samples; a run of several backbones continues without this one."""
        ids, names = self.loader.samples_of_step(bad_step)
        if self.world.is_main:
            event = {"event": NON_FINITE, "samples": [int(i) for i in ids], "names": names}
            self.logs[trainer.name].write(bad_step + 1, event)
        shown = ", ".join(f"{i} ({name})" for i, name in list(zip(ids, names, strict=True))[:8])
        line = (
            f"{trainer.name}: the loss is not finite in step {bad_step + 1}; look at its samples {shown} "
            f"(metrics.jsonl has all, the lines above name replacements), lower optimizer.lr, or use "
            f"train.precision=fp32"
        )
        self.backbone_trainers.remove(trainer)
        if not self.backbone_trainers:
            raise InputError(line)
        self.say(f"dropped {line}")

    def _save(self) -> None:
        if self.world.is_main:
            facts = self.facts | {"bad_samples": self.bad_samples}
            for trainer in self.backbone_trainers:
                trainer.save(self.step, facts)
            # Only now: the backbones must always have a checkpoint in common.
            for trainer in self.backbone_trainers:
                drop_checkpoints(trainer.folder / "checkpoints", self.step, keep=self.recipe.train.keep)
        self.world.barrier()

    # --- set-up ----------------------------------------------------------------------------------------

    def _open_source(self) -> FrameIndex:
        data = self.recipe.data
        if not data.source:
            raise InputError("data.source is not set; expected frame folders or videos: data.source=PATH")
        self.world.check_same(Path(data.source).expanduser().exists(), f"data.source: {data.source}")
        index = open_source(data.source, kind=data.kind, world=self.world)
        for name, reason in index.skipped:
            self.say(f"skipped {name}: {reason}")
        single = int((index.num_frames == 1).sum())
        if single:
            self.say(f"{single} of {len(index)} videos have a single frame, which is then both views")
        return index

    def _resume(self) -> int:
        """Load the newest checkpoint that all backbones have; returns the steps that are done.

        Of several backbones, one that was dropped stays dropped: the others have continued without it.
        """
        dropped = [trainer for trainer in self.backbone_trainers if last_event(trainer.folder) == NON_FINITE]
        if len(dropped) < len(self.backbone_trainers):
            for trainer in dropped:
                self.backbone_trainers.remove(trainer)
                self.say(f"dropped {trainer.name}: its loss was not finite in an earlier part of this run")
        saved = {
            trainer.name: saved_steps(trainer.folder / "checkpoints") for trainer in self.backbone_trainers
        }
        # Only the main process writes. Processes that do not see its folder would start at another step.
        self.world.check_same(saved, f"output: the checkpoints in {self.recipe.output}")
        common = set.intersection(*(set(steps) for steps in saved.values()))
        if not common:
            if any(saved.values()):
                last = ", ".join(f"{name}: {max(steps, default='none')}" for name, steps in saved.items())
                raise InputError(
                    f"output: the backbones in {self.recipe.output!r} share no checkpoint (last steps: "
                    f"{last}); name those to continue together, backbones=[...], or give another output=DIR"
                )
            return 0
        step = max(common)
        for trainer in self.backbone_trainers:
            state = load_checkpoint(trainer.folder / "checkpoints", step)
            for key, value in (self.facts | trainer.facts).items():
                # Checkpoints of earlier versions lack the hash of the weights.
                if state.get(key, value) != value:
                    raise InputError(
                        f"{trainer.folder}: its run had {key} {state[key]!r}, this one has {value!r}; give "
                        f"the batch, data and weights that it began with, or another folder with output=DIR"
                    )
            trainer.load_state(state)
            # Checkpoints of earlier versions lack it.
            self.bad_samples = state.get("bad_samples", 0)
        self.say(f"resuming after step {step} of {self.total_steps}")
        return step

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Loader, run folders, logs and signal handlers while the loop runs; compiled and warmed up."""
        with ExitStack() as stack:
            self.loader = PairLoader(
                index=self.index,
                recipe=self.recipe,
                world=self.world,
                first_step=self.step,
                num_steps=self.total_steps - self.step,
            )
            stack.callback(self.loader.close)
            self.logs = {}
            tensorboard = self.recipe.train.tensorboard
            if tensorboard and importlib.util.find_spec("tensorboard") is None:
                self.say("no TensorBoard events: TensorBoard is not installed; see metrics.jsonl instead")
                tensorboard = False
            for trainer in self.backbone_trainers if self.world.is_main else ():
                # Two runs in one folder would take each other's half-written files.
                refusal = f"output: another run writes {trainer.folder}; wait for it, or use output=DIR"
                stack.enter_context(file_lock(trainer.folder / "run.lock", refusal))
                write_atomically(trainer.folder / "recipe.yaml", to_yaml(trainer.recipe).encode())
                log = MetricsLog(trainer.folder, first_step=self.step, tensorboard=tensorboard)
                self.logs[trainer.name] = stack.enter_context(closing(log))
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self.request_stop))
            for trainer in self.backbone_trainers:
                seconds = trainer.warm_up()
                if seconds:
                    self.say(f"{trainer.name}: warmed up in {seconds:.1f} s")
            self.profiler = None
            if self._profile:
                folder = Path(self.recipe.output) / "profile"
                self.profiler = stack.enter_context(StepProfiler(folder, self.world.device, self.say))
            self.progress = stack.enter_context(
                Progress("step", self.total_steps, done=self.step, console=self.console)
            )
            self.batches = iter(self.loader)
            self._start = time.perf_counter()
            self._last_report = self.step, self._start
            yield


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a folder that holds another recipe's run, or any run where the recipe says `resume: never`."""
    folder = Path(recipe.output)
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    if recipe.resume == "never":
        raise InputError(
            f"output: {str(folder)!r} holds a run; continue it with resume=auto, or use output=DIR"
        )
    try:
        there = load_recipe(path)
    except InputError as error:
        raise InputError(
            f"output: {path} is not a recipe of this version ({error}); use output=DIR"
        ) from None
    if recipe_hash(there) != recipe_hash(recipe):
        changed = "; ".join(differences(there, recipe)[:4])
        raise InputError(f"output: {str(folder)!r} holds another recipe's run ({changed}); use output=DIR")


def check_bad_fraction(bad: int, seen: int, limit: float, last: str) -> None:
    """Raise InputError where more than `limit` of the samples seen could not be read."""
    if bad > limit * max(seen, MIN_SEEN):
        raise InputError(
            f"{bad} of {seen} samples could not be read, more than data.max_bad_fraction={limit:g} allows; "
            f"the last: {last}"
        )
