"""The training loop: set-up, steps, logs, checkpoints and resuming.

A `Trainer` feeds one stream of frames to one or several `BackboneTrainer`s. All random numbers are
derived from the seed and the position in the run, so a resumed run gives the same result as an uninterrupted
one.

A sample passes through `PairLoader`, `Trainer.train_step`, `BackboneTrainer.forward_backward`,
`EncoderRuntime.training_views` (frozen tokens) and `CosettleObjective` (projection and losses).
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fasttrain.backbone_trainer import BackboneTrainer, backbone_recipes
from fasttrain.checkpoint import drop_checkpoints, load_checkpoint, saved_steps
from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import (
    INSTALL_DALI,
    FramePairs,
    PairLoader,
    calibration_frames,
    check_bad_fraction,
    whole_frames,
)
from fasttrain.data.nvdec import has_dali
from fasttrain.data.sources import describe_left_out, open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation.trade_off import MIN_FRAMES
from fasttrain.evaluation.validation import Validation, hold_out
from fasttrain.files import is_url, write_atomically, write_json
from fasttrain.loggers import (
    NON_FINITE,
    EnduringConsole,
    MetricsLog,
    Progress,
    TensorBoardEvents,
    Viewer,
    count,
    last_event,
    say,
    working,
)
from fasttrain.objective import curriculum_frames
from fasttrain.optimizer import learning_rate_factor
from fasttrain.profiling import STEP, StepProfiler, span
from fasttrain.recipe import Recipe, to_dict, to_yaml
from fasttrain.run_folder import check_facts, check_length, check_run_folder, lock_run_folder, newest_common
from fasttrain.stopping import Stopping
from fasttrain.summary import run_warnings, say_settings
from fasttrain.trackers import Tracker, check_installed

# The facts of runs of earlier versions whose checkpoints do not state them.
EARLIER_FACTS = {"loader": "DALI"}


class Trainer:
    """The training run of a recipe, in one process of `world`.

    Step indices count from 0. `completed_steps` is the number of steps taken so far, including those before a
    resume; logs and checkpoints are labelled with it.

    Args:
        recipe: What to train, on which data, and where to write.
        world: This process among those of the run.
        profile: Whether to profile some early steps, write the trace to `output/profile` and print a summary.

    Raises:
        InputError: The recipe, data, weights or run folder cannot be used.
    """

    # Set by `_open_run` for the duration of the loop. Only rank 0 has logs, validations and a profiler.
    loader: PairLoader
    batches: Iterator[FramePairs]
    logs: dict[str, MetricsLog]
    validations: dict[str, Validation]
    progress: Progress
    profiler: StepProfiler | None
    stopping: Stopping
    _start: float
    _last_report: tuple[int, float]  # completed steps and time

    def __init__(self, recipe: Recipe, world: World, *, profile: bool = False) -> None:
        self.recipe, self.world = recipe, world
        if recipe.train.tracker != "none":
            check_installed(recipe.train.tracker)
        self.console = EnduringConsole(quiet=not world.is_main)
        self.say = partial(say, console=self.console)
        self.working = partial(working, console=self.console)
        recipes = backbone_recipes(recipe)
        # The recipe with which the run has been trained so far, if it has begun.
        earlier = next(filter(None, [check_run_folder(each) for each in recipes]), recipe)
        self.index, self.validated = hold_out(self._open_source(), recipe.eval.held_out)
        train = recipe.train
        self.global_batch = train.batch_size * train.accumulate * world.size
        samples_per_epoch = len(self.index) * recipe.data.pairs_per_video
        self.steps_per_epoch = samples_per_epoch / self.global_batch
        self.total_steps = train.steps or max(1, int(train.epochs * samples_per_epoch) // self.global_batch)
        self.peak_lr = recipe.optimizer.lr * self.global_batch / 256
        # In addition to the recipe's keys, these values must not change when the run is resumed.
        self.facts = {
            "global_batch": self.global_batch,
            "data": self.index.fingerprint(),
            "loader": "DALI" if has_dali() else "PyTorch",
        }
        # If only some ranks could read a file, the ranks would silently draw from different sets of videos.
        world.check_same(self.facts["data"], f"data.source: {recipe.data.source}")
        self.backbone_trainers = []
        for each in recipes:
            with self.working(f"loading {each.backbone.name} from {each.backbone.weights}"):
                self.backbone_trainers.append(BackboneTrainer(each, world))
        # Bad samples of this rank that the other ranks do not know of yet.
        self._new_bad_samples: list[str] = []
        # Those of all ranks since the last report, and their number in the whole run, including before a
        # resume.
        self._faults: list[str] = []
        self.bad_samples = 0
        # The states of the validations in the checkpoint, by backbone.
        self._earlier_validations: dict[str, dict[str, Any]] = {}
        self.completed_steps = self._resume()
        check_length(recipe, earlier, self.completed_steps, self.total_steps, self.say)
        if not self.completed_steps:
            for trainer in self.backbone_trainers:
                trainer.load_projection()
        self._profile = profile and world.is_main

    def train(self, draw: Callable[[list[Path]], None] | None = None) -> dict[str, dict[str, Any]]:
        """Train up to `total_steps`.

        Args:
            draw: Draws the learning curves of the run folders, on rank 0, once they are complete.

        Returns:
            The last metrics of each backbone by name; empty if the run was already complete.

        Raises:
            InputError: The loss is not finite, or too many samples are unreadable.
            KeyboardInterrupt: A signal was received (see `stopping`). A checkpoint has been written.
        """
        if self.completed_steps >= self.total_steps:
            # Leftover files of a killed run are deleted, but not in a folder that cannot be written.
            if self.world.is_main and os.access(self.recipe.output, os.W_OK):
                with ExitStack() as stack:
                    self._lock_run_folders(stack)
            self.say(f"training in {self.recipe.output!r} is already complete ({self.total_steps} steps)")
            return {}
        self._introduce()
        results: dict[str, dict[str, Any]] = {}
        first = self.completed_steps
        with self._open_run():
            while self.completed_steps < self.total_steps and self.stopping.may_begin_step():
                reports = self._is_report_due(self.completed_steps + 1)
                with span(STEP):
                    self.train_step(self.completed_steps, diagnostics=reports)
                self.completed_steps += 1
                self.progress.advance()
                if self.profiler is not None:
                    self.profiler.step()
                if reports:
                    results = self._report()
                # A report precedes every save, so that a projection with a non-finite loss is never saved.
                if self._is_due(self.recipe.train.save_every, self.completed_steps):
                    self._save()
                if reports:
                    self._last_report = self.completed_steps, time.perf_counter()
            is_saved = self._is_due(self.recipe.train.save_every, self.completed_steps)
            if first < self.completed_steps < self.total_steps and not is_saved:
                # The steps since the last report are reported after the resume, as in an uninterrupted run.
                self._drop_non_finite()
                self._collect_bad_samples()
                self._save()
            seconds = time.perf_counter() - self._start
            if self.world.is_main and self.completed_steps == self.total_steps:
                if draw is not None:
                    draw([trainer.folder for trainer in self.backbone_trainers])
                for trainer in self.backbone_trainers:
                    self.logs[trainer.name].add_pictures(self.completed_steps)
        if self.completed_steps < self.total_steps:
            self.say(
                f"stopped after {self.completed_steps} of {self.total_steps} steps; "
                f"repeat the command to continue"
            )
            raise KeyboardInterrupt
        pairs = (self.total_steps - first) * self.global_batch
        duration = timedelta(seconds=round(seconds))
        self.say(f"trained {count(pairs, 'pair')} in {duration} (h:mm:ss), {pairs / seconds:.1f} pairs/s")
        return results

    def train_step(self, step_index: int, *, diagnostics: bool) -> None:
        """Take one optimiser step with every backbone, on the same frames."""
        passes, objective = self.recipe.train.accumulate, self.recipe.objective
        walk_frames = None
        if objective.curriculum:
            walk_frames = curriculum_frames(objective.frames, step_index, self.total_steps)
        for i in range(passes):
            with span("data"):
                pairs = next(self.batches)
            self.stopping.advance()
            self._new_bad_samples += pairs.bad_samples
            for trainer in self.backbone_trainers:
                trainer.forward_backward(
                    pairs.frames,
                    step_index,
                    last=i == passes - 1,
                    diagnostics=diagnostics,
                    walk_frames=walk_frames,
                )
        for trainer in self.backbone_trainers:
            trainer.update(self._lr(step_index))

    def _report(self) -> dict[str, dict[str, Any]]:
        """Read, log and return the metrics. Elsewhere, the host waits for the device only in `_save`."""
        self._drop_non_finite()
        measured = [(trainer, trainer.read_metrics()) for trainer in self.backbone_trainers]
        now = time.perf_counter()
        last_report_steps, last_report_time = self._last_report
        rate = (self.completed_steps - last_report_steps) * self.global_batch / (now - last_report_time)
        self._collect_bad_samples()
        faults, self._faults = self._faults, []
        common = {
            "epoch": self.completed_steps / self.steps_per_epoch,
            "lr": self._lr(self.completed_steps - 1),
            "pairs_per_second": rate,
            "seconds": now - self._start,
            "bad_samples": self.bad_samples,
            "bad_files": len(self.index.skipped),
        }
        records: dict[str, dict[str, Any]] = {}
        for trainer, metrics in measured:
            record: dict[str, Any] = {**metrics, **common}
            if self.world.is_main:
                validation = self.validations.get(trainer.name)
                if validation and self._is_due(self.recipe.eval.every, self.completed_steps):
                    record |= validation.update(trainer.projection, self.completed_steps)
                listed = {"faults": faults} if faults else {}
                self.logs[trainer.name].write(self.completed_steps, record | listed)
            # The most important first, because a narrow terminal cuts off the end.
            name = f"{trainer.name}  " if len(measured) > 1 else ""
            self.progress.show(
                f"{name}loss {record['loss']:.3f}  {rate:.0f} pairs/s  cycle {record['cycle']:.3f}  "
                f"sep {record['separability']:.3f}"
            )
            records[trainer.name] = record
        if faults:
            # Checked after logging. All ranks have the same list, so they stop together. Each bad sample was
            # replaced by another one, so more samples were read than trained on.
            seen = self.completed_steps * self.global_batch + self.bad_samples
            limit = self.recipe.data.max_bad_fraction
            check_bad_fraction(self.bad_samples, seen, limit, faults[-1])
        if self.world.is_main and self.completed_steps == self.total_steps:
            # Written before the last checkpoint, because a run that has that checkpoint counts as completed.
            for trainer in self.backbone_trainers:
                write_json(trainer.folder / "train.json", {"backbone": trainer.name, **records[trainer.name]})
        self.stopping.advance()
        return records

    def _save(self) -> None:
        """Write the projections and checkpoints, on rank 0."""
        # The losses since the last report, which all ranks average together.
        losses = [trainer.meter.losses(self.world) for trainer in self.backbone_trainers]
        if self.world.is_main:
            # A resumed run keeps the records up to its checkpoint, so they must be on disk first.
            for log in self.logs.values():
                log.sync()
            facts = self.facts | {"bad_samples": self.bad_samples, "faults": self._faults}
            for trainer, losses_T3 in zip(self.backbone_trainers, losses, strict=True):
                state, kept = facts | {"losses": losses_T3}, None
                if validation := self.validations.get(trainer.name):
                    state["validation"] = validation.state()
                    if not validation.keeps(self.completed_steps):
                        kept = validation.kept
                trainer.save(self.completed_steps, state, kept)
            # Old checkpoints are deleted last, so that the backbones always have a checkpoint in common.
            for trainer in self.backbone_trainers:
                folder = trainer.folder / "checkpoints"
                drop_checkpoints(folder, self.completed_steps, keep=self.recipe.train.keep)
        self.stopping.advance()
        self.world.barrier()

    def _lr(self, step_index: int) -> float:
        return self.peak_lr * learning_rate_factor(self.recipe.train, step_index, self.total_steps)

    def _is_due(self, every: int, completed_steps: int) -> bool:
        """Return whether an action is due that is repeated every `every` steps (0: never) and at the end."""
        return every > 0 and (completed_steps % every == 0 or completed_steps == self.total_steps)

    def _is_report_due(self, completed_steps: int) -> bool:
        """Return whether metrics are due after `completed_steps` steps."""
        train = self.recipe.train
        intervals = (train.log_every, train.save_every, self.recipe.eval.every)
        return any(self._is_due(every, completed_steps) for every in intervals)

    def _collect_bad_samples(self) -> None:
        """Gather and print the bad samples of all ranks."""
        new = [line for share in self.world.gather(self._new_bad_samples) for line in share]
        self._new_bad_samples = []
        self._faults += new
        self.bad_samples += len(new)
        for line in new:
            self.say(f"unreadable sample: {line}")

    def _drop_non_finite(self) -> None:
        """Drop the backbones whose loss is not finite; raise InputError if none is left."""
        for trainer in tuple(self.backbone_trainers):
            bad_step_index = trainer.meter.first_non_finite(self.world)
            if bad_step_index is None:
                continue
            number = bad_step_index + 1
            ids, names = self.loader.samples_of_step(bad_step_index)
            if self.world.is_main:
                event = {"event": NON_FINITE, "samples": [int(i) for i in ids], "names": names}
                self.logs[trainer.name].write(number, event)
            shown = ", ".join(f"{i} ({name})" for i, name in list(zip(ids, names, strict=True))[:8])
            message = (
                f"{trainer.name}: the loss of step {number} is not finite. Lower optimizer.lr, use "
                f"train.precision=fp32, or check the samples of the step: {shown} (all are in metrics.jsonl; "
                f"replacements are listed above)"
            )
            self.backbone_trainers.remove(trainer)
            if not self.backbone_trainers:
                raise InputError(message)
            self.say(f"dropped {message}")

    # --- set-up ----------------------------------------------------------------------------------------

    def _open_source(self) -> FrameIndex:
        data = self.recipe.data
        if not data.source:
            raise InputError(
                "data.source: not set. Pass a folder of videos or frame folders, a text file that lists "
                "them, or a packed set: data.source=PATH"
            )
        if not is_url(data.source):
            exists = os.path.exists(os.path.expanduser(data.source))
            self.world.check_same(exists, f"data.source: {data.source}")
        try:
            with self.working(f"reading the videos of {data.source}"):
                index = open_source(data.source, kind=data.kind, world=self.world, cache_size=data.cache_size)
        except InputError as error:
            raise type(error)(f"data.source: {error}") from None
        for name, reason in index.skipped:
            self.say(f"skipped {name}: {reason}")
        if index.left_out:
            self.say(describe_left_out(index.left_out))
        single = int((index.num_frames == 1).sum())
        if single:
            self.say(f"{single} of {len(index)} videos have a single frame; their pairs contain it twice")
        return index

    def _resume(self) -> int:
        """Load the newest checkpoint that all backbones have in common; return the number of completed steps.

        A backbone that was dropped earlier stays dropped, because the others have continued without it.
        """
        dropped = [trainer for trainer in self.backbone_trainers if last_event(trainer.folder) == NON_FINITE]
        if len(dropped) < len(self.backbone_trainers):
            for trainer in dropped:
                self.backbone_trainers.remove(trainer)
                self.say(f"dropped {trainer.name}: its loss was not finite before the run was resumed")
        self._saved = {each.name: saved_steps(each.folder / "checkpoints") for each in self.backbone_trainers}
        # Rank 0 writes the checkpoints. A rank that does not see its folder would start at another step.
        self.world.check_same(self._saved, f"output: the checkpoints in {self.recipe.output}")
        completed_steps = newest_common(self._saved, self.recipe.output)
        for trainer in self.backbone_trainers if completed_steps else ():
            state = load_checkpoint(trainer.folder / "checkpoints", completed_steps)
            facts, earlier = self.facts | trainer.facts, EARLIER_FACTS | trainer.earlier_facts
            check_facts(trainer.folder, state, facts, earlier)
            trainer.load_state(state)
            if "validation" in state:
                self._earlier_validations[trainer.name] = state["validation"]
            # Checkpoints of earlier versions lack these.
            self.bad_samples, self._faults = state.get("bad_samples", 0), state.get("faults", [])
        return completed_steps

    def _introduce(self) -> None:
        """Print the settings of the run, and warnings about them."""
        say_settings(
            self.recipe,
            self.world,
            self.index,
            self.backbone_trainers,
            self.console,
            global_batch=self.global_batch,
            peak_lr=self.peak_lr,
            completed_steps=self.completed_steps,
            total_steps=self.total_steps,
        )
        for warning in run_warnings(self.recipe, self.global_batch, self.peak_lr, self.total_steps):
            self.say(f"warning: {warning}")

    @contextmanager
    def _open_run(self) -> Iterator[None]:
        """Prepare the first step, and open all that the loop needs until the context ends."""
        if self.facts["loader"] != "DALI":
            self.say(
                "DALI is not installed, so Pillow and PyTorch load the frames, which takes more CPU time. To "
                f"get DALI on Linux, run: {INSTALL_DALI}"
            )
        with ExitStack() as stack:
            with self.working("preparing the first step"):
                self.loader = PairLoader(
                    index=self.index,
                    recipe=self.recipe,
                    world=self.world,
                    first_step_index=self.completed_steps,
                    num_steps=self.total_steps - self.completed_steps,
                )
                stack.callback(self.loader.close)
                self.logs = self._open_run_folders(stack) if self.world.is_main else {}
                for trainer in self.backbone_trainers:
                    self._prepare(trainer)
                self._begin_validation()
            # From here on, signals stop the run after a step. Before, they end it at once.
            timeout = self.recipe.train.stall_timeout
            self.stopping = Stopping(self.world, stall_timeout=timeout, say=self.say)
            stack.enter_context(self.stopping)
            self.profiler = None
            if self._profile:
                folder = Path(self.recipe.output) / "profile"
                self.profiler = stack.enter_context(StepProfiler(folder, self.world.device, self.say))
            self.progress = stack.enter_context(
                Progress("step", self.total_steps, done=self.completed_steps, console=self.console)
            )
            self.batches = iter(self.loader)
            self._start = time.perf_counter()
            self._last_report = self.completed_steps, self._start
            yield

    def _lock_run_folders(self, stack: ExitStack) -> None:
        """Lock the run folders until `stack` is closed, and delete what a killed run has left over."""
        for trainer in self.backbone_trainers:
            saved, keep = self._saved[trainer.name], self.recipe.train.keep
            stack.enter_context(lock_run_folder(trainer.folder, saved, self.completed_steps, keep=keep))

    def _open_run_folders(self, stack: ExitStack) -> dict[str, MetricsLog]:
        """Lock the run folders, write the recipes, and open the logs by backbone, until `stack` is closed."""
        train, logs = self.recipe.train, {}
        tensorboard = train.tensorboard
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            self.say("TensorBoard is not installed, so no events are written; metrics are in metrics.jsonl")
            tensorboard = False
        self._lock_run_folders(stack)
        group = Path(self.recipe.output).resolve().name if self.recipe.backbones else None
        for trainer in self.backbone_trainers:
            # Left by a run that this one extends.
            (trainer.folder / "train.json").unlink(missing_ok=True)
            recipe = to_yaml(trainer.recipe)
            write_atomically(trainer.folder / "recipe.yaml", recipe.encode())
            viewers: list[Viewer] = []
            if tensorboard:
                events = trainer.folder / "tensorboard"
                viewers.append(TensorBoardEvents(events, self.completed_steps, recipe))
            if train.tracker != "none":
                viewers.append(
                    Tracker(
                        train.tracker,
                        trainer.folder,
                        config=to_dict(trainer.recipe),
                        completed_steps=self.completed_steps,
                        group=group,
                        say=self.say,
                    )
                )
            log = MetricsLog(trainer.folder, completed_steps=self.completed_steps, viewers=viewers)
            logs[trainer.name] = stack.enter_context(log)
        return logs

    def _prepare(self, trainer: BackboneTrainer) -> None:
        """Calibrate, initialise and warm up a backbone."""
        if trainer.runtime.awaits_calibration:
            trainer.calibrate(calibration_frames(self.index, self.recipe.data.image_size))
        if not self.completed_steps and trainer.starts_at_frozen:
            trainer.start_at_frozen(whole_frames(self.index, self.recipe.data.image_size))
        seconds = trainer.warm_up()
        if trainer.graph_failure:
            self.say(
                f"{trainer.name}: training without encoder.cuda_graph, because the recording failed: "
                f"{trainer.graph_failure}"
            )
        if seconds:
            self.say(f"{trainer.name}: warmed up in {seconds:.1f} s")

    def _begin_validation(self) -> None:
        """Measure the frozen features and, before the first step, the initial projections, on rank 0."""
        self.validations = {}
        for trainer in self.backbone_trainers if self.recipe.eval.every and self.world.is_main else ():
            untrained = trainer.untrained(whole_frames(self.index, self.recipe.data.image_size))
            validation = Validation(trainer.encoder, untrained, self.validated, self.recipe)
            if not validation.frozen:
                self.say(
                    f"warning: no video can be validated, so the last projection will be kept; pass videos "
                    f"of at least {MIN_FRAMES} frames, or eval.every=0 to turn validation off"
                )
                return
            self.validations[trainer.name] = validation
            earlier = self._earlier_validations.get(trainer.name)
            if not self.completed_steps:
                self.logs[trainer.name].write(0, validation.update(trainer.projection, 0))
            elif not (earlier and validation.resume(earlier, trainer.projection)):
                self.say(
                    f"{trainer.name}: only projections after step {self.completed_steps} are compared, "
                    f"because the run has not been validated in this way before"
                )
