"""Training: set-up, one step, the loop.

A `Trainer` feeds one stream of frame pairs to one `BackboneTrainer` (a backbone with its head) or to many.
What a run computes is a function of recipe, data and seed: every random number follows from (seed, step).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from fasttrain.backbone_trainer import DTYPES, BackboneTrainer, backbone_recipes
from fasttrain.backbones import Backbone
from fasttrain.checkpoint import drop_checkpoints, load_checkpoint, saved_steps
from fasttrain.data import (
    FrameIndex,
    FramePairs,
    PairLoader,
    PairSampling,
    Processes,
    check_bad_fraction,
    open_source,
)
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.files import file_lock, io_errors_as_input_errors, write_atomically
from fasttrain.loggers import NON_FINITE, Clock, MetricsLog, ProgressReport, last_event
from fasttrain.optimizer import learning_rate_factor
from fasttrain.profiling import SKIPPED, STEP, StepProfiler, part, summary_table
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, differences, load_recipe, recipe_hash, to_yaml

# (encoder, projection, index, device) -> figures, before and after the projection.
Validate = Callable[[Backbone, Projection, FrameIndex, torch.device], dict[str, float]]


class Trainer:
    """One run: its data, its students, its place in the schedule."""

    def __init__(
        self, recipe: Recipe, world: World, console: Console, validate: Validate | None = None
    ) -> None:
        self.recipe, self.world, self.console, self.validate = recipe, world, console, validate
        recipes = backbone_recipes(recipe)
        for student_recipe in recipes:
            check_run_folder(student_recipe)
        self.index = self._open_source()
        train = recipe.train
        self.global_batch = train.batch_size * train.accumulate * world.size
        samples = len(self.index) * recipe.data.pairs_per_video
        self.steps_per_epoch = samples / self.global_batch
        self.total_steps = train.steps or max(1, int(train.epochs * samples) // self.global_batch)
        self.peak_lr = recipe.optimizer.lr * self.global_batch / 256
        # What a resumed run must find unchanged, beside the recipe's identity.
        self.facts = {"global_batch": self.global_batch, "data": self.index.fingerprint()}
        self._check_same_data()
        self.students = self._build_students(recipes)
        # Of all processes, up to the last report and before this start.
        self.bad_samples = self.samples = 0
        self.first_step = self._resume()
        self._counted_before = self.bad_samples, self.samples
        self._stop_asked = False

    def fit(self, profiler: StepProfiler | None = None) -> dict[str, dict[str, Any]]:
        """Train to the end, with some steps recorded by `profiler`. Returns the last readings by backbone."""
        loader = self._open_loader()
        if loader.note:
            self.say(loader.note)
        with self._alone():
            return self._fit(loader, profiler)

    def _fit(self, loader: PairLoader, profiler: StepProfiler | None) -> dict[str, dict[str, Any]]:
        self._write_recipes()
        progress = ProgressReport(
            self.console, total_steps=self.total_steps, first_step=self.first_step, enabled=self.world.is_main
        )
        logs: dict[str, MetricsLog | None] = {}
        results: dict[str, dict[str, Any]] = {}
        try:
            logs |= {student.name: self._open_log(student) for student in self.students}
            self._warm_up()
            clock = Clock()
            batches = iter(loader)
            for step in range(self.first_step, self.total_steps):
                reports = (
                    self._is_due(step, self.recipe.train.log_every)
                    or self._saves_after(step)
                    or (self.validate is not None and self._is_due(step, self.recipe.eval.every))
                    or self._stops_alone()
                )
                with part(STEP):
                    self._step(batches, step, diagnostics=reports)
                if profiler is not None:
                    profiler.step()
                clock.count(self.global_batch)
                progress.advance(step + 1)
                if reports:
                    results = self._report(step + 1, clock, loader, logs, progress)
                is_last = step + 1 == self.total_steps
                if is_last:
                    # Ahead of the last checkpoint, with which a run counts as trained.
                    self._write_results(results)
                if self._saves_after(step):
                    self._save(step + 1)
                # After a report only: a head that a non-finite loss spoilt is never written.
                if reports and not is_last and self._asked_to_stop():
                    self._save(step + 1)
                    progress.message(f"stopped after step {step + 1}; the same command goes on from there")
                    raise KeyboardInterrupt
        except LocalInputError:
            # The others will not hear of these.
            for fault in loader.drain_faults():
                self.say(f"replaced a sample that cannot be read: {fault}", always=True)
            raise
        finally:
            progress.close()
            loader.close()
            for log in logs.values():
                if log is not None:
                    with self._writing():
                        log.close()
        return results

    def _warm_up(self) -> None:
        """Compile and record ahead of the first step, and tell how long it took."""
        for student in self.students:
            seconds = student.warm_up()
            if seconds:
                self.say(f"{student.name}: warmed up in {seconds:.1f} s")

    def _step(self, batches: Iterator[FramePairs], step: int, *, diagnostics: bool) -> None:
        passes = self.recipe.train.accumulate
        for i in range(passes):
            try:
                with part("data"):
                    pairs = next(batches)
            except InputError as error:
                raise LocalInputError(str(error)) from error
            for student in self.students:
                student.accumulate(pairs.frames, step, last=i == passes - 1, diagnostics=diagnostics)
        lr = self.lr(step)
        for student in self.students:
            student.update(lr)

    def lr(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        train = self.recipe.train
        return self.peak_lr * learning_rate_factor(
            step, total_steps=self.total_steps, epochs=train.epochs, warmup_epochs=train.warmup_epochs
        )

    def _report(
        self,
        step: int,
        clock: Clock,
        loader: PairLoader,
        logs: dict[str, MetricsLog | None],
        progress: ProgressReport,
    ) -> dict[str, dict[str, Any]]:
        """Read all meters (here alone the host waits), write them down, stop on a non-finite loss."""
        readings = {student.name: student.read_meters() for student in self.students}
        rate, seconds = clock.read()
        faults = self._gather_faults(loader)
        common = {
            "epoch": step / self.steps_per_epoch,
            "lr": self.lr(step - 1),
            "pairs_per_second": rate,
            "seconds": seconds,
            "bad_samples": self.bad_samples,
            "bad_files": len(self.index.skipped),
        }
        records: dict[str, dict[str, Any]] = {}
        for student in list(self.students):
            values, bad_step = readings[student.name]
            if bad_step is not None:
                self._drop_non_finite(student, bad_step, loader, logs)
                continue
            record: dict[str, Any] = {**values, **common}
            if self.validate and self._is_due(step - 1, self.recipe.eval.every) and self.world.is_main:
                record |= self.validate(student.encoder, student.projection, self.index, self.world.device)
            log = logs[student.name]
            if log is not None:
                faulty = {"faults": faults} if faults else {}
                with self._writing():
                    log.write(step, {**record, **faulty})
            progress.show(step, student.name, record, (self.total_steps - step) * self.global_batch / rate)
            records[student.name] = record
        if faults:
            # After they were written down; all processes come to the same answer.
            limit = self.recipe.data.max_bad_fraction
            check_bad_fraction(self.bad_samples, self.samples, limit, faults[-1])
        return records

    def _gather_faults(self, loader: PairLoader) -> list[str]:
        """New faults of all processes, which are said; counts them and all samples."""
        mine = [str(fault) for fault in loader.drain_faults()]
        told = self.world.gather((mine, len(loader.faults), loader.num_seen))
        faults = [fault for new, _, _ in told for fault in new]
        for fault in faults:
            self.say(f"replaced a sample that cannot be read: {fault}")
        bad_before, seen_before = self._counted_before
        self.bad_samples = bad_before + sum(bad for _, bad, _ in told)
        self.samples = seen_before + sum(seen for _, _, seen in told)
        return faults

    def _drop_non_finite(
        self, student: BackboneTrainer, step: int, loader: PairLoader, logs: dict[str, MetricsLog | None]
    ) -> None:
        """Name step and samples; a run of many backbones goes on without this one."""
        ids, names = loader.samples_of_step(step)
        log = logs[student.name]
        if log is not None:
            log.write(step + 1, {"event": NON_FINITE, "samples": [int(i) for i in ids], "names": names})
        shown = ", ".join(f"{i} ({name})" for i, name in list(zip(ids, names, strict=True))[:8])
        more = f" and {len(ids) - 8} more, all listed in metrics.jsonl" if len(ids) > 8 else ""
        line = (
            f"{student.name}: the loss is not finite in step {step} (0-based), samples {shown}{more}; look "
            f"at these frames, lower optimizer.lr or use train.precision=fp32"
        )
        self.students.remove(student)
        if not self.students:
            raise InputError(line)
        self.say(f"dropped {line}")

    def _save(self, step: int) -> None:
        if self.world.is_main:
            counts = {"bad_samples": self.bad_samples, "samples": self.samples}
            with self._writing():
                for student in self.students:
                    student.save(step, self.facts | counts)
                # Only now: the backbones must have a checkpoint in common at any moment.
                for student in self.students:
                    drop_checkpoints(student.folder / "checkpoints", step, keep=self.recipe.train.keep)
        self.world.barrier()

    def _write_results(self, results: dict[str, dict[str, Any]]) -> None:
        if self.world.is_main:
            for student in self.students:
                text = json.dumps({"backbone": student.name, **results[student.name]}, indent=2)
                with self._writing():
                    write_atomically(student.folder / "train.json", f"{text}\n".encode())

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) happens after `step`."""
        return every > 0 and ((step + 1) % every == 0 or step + 1 == self.total_steps)

    def _saves_after(self, step: int) -> bool:
        return self._is_due(step, self.recipe.train.save_every)

    def ask_to_stop(self, signal_number: int, frame: FrameType | None) -> None:
        """Signal handler: finish the step, write a checkpoint, leave."""
        self._stop_asked = True

    def _stops_alone(self) -> bool:
        """Whether this step is the last one because a signal came, where no other process has a say."""
        return self._stop_asked and self.world.size == 1

    def _asked_to_stop(self) -> bool:
        # Processes get their signal at different times; on report steps they meet anyway and agree.
        flag = torch.tensor(float(self._stop_asked), device=self.world.device)
        return bool(self.world.maximum(flag).item())

    def say(self, line: str, *, always: bool = False) -> None:
        """One line on the terminal; `always` for what only this process knows."""
        if always or self.world.is_main:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    # --- set-up ----------------------------------------------------------------------------------------

    def _open_source(self) -> FrameIndex:
        data = self.recipe.data
        if not data.source:
            raise InputError("data.source is not set; expected frame folders or videos: data.source=PATH")
        there = self.world.gather(Path(data.source).expanduser().exists())
        if any(there) and not all(there):
            raise InputError(
                f"data.source: {data.source!r} does not exist for process {there.index(False)} "
                f"({there.count(False)} of {len(there)}); every node must see it"
            )
        processes = Processes(self.world.rank, self.world.size, self.world.gather)
        index = open_source(data.source, kind=data.kind, processes=processes)
        for name, reason in index.skipped:
            self.say(f"skipped {name}: {reason}")
        single = int((index.num_frames == 1).sum())
        if single:
            self.say(f"{single} of {len(index)} videos have one frame; both frames of their pairs are it")
        return index

    def _check_same_data(self) -> None:
        """A file that only some processes can read would part their orders of the samples, silently."""
        told = self.world.gather((self.facts["data"], len(self.index)))
        for rank, (fingerprint, videos) in enumerate(told):
            if fingerprint != told[0][0]:
                raise InputError(
                    f"data.source={self.recipe.data.source}: process {rank} sees other videos ({videos}) "
                    f"than process 0 ({told[0][1]}); start again when all nodes see the same files"
                )

    def _build_students(self, recipes: list[Recipe]) -> list[BackboneTrainer]:
        """All students; of several, one that cannot be built is reported and left out."""
        students = []
        for recipe in recipes:
            try:
                students.append(BackboneTrainer(recipe, self.world))
            except InputError as error:
                if len(recipes) == 1:
                    raise
                self.say(f"dropped {recipe.backbone.name}: {error}")
        if not students:
            raise InputError("none of the recipe's backbones could be built; see the lines above")
        return students

    def _resume(self) -> int:
        """Load the newest checkpoint that all students have; returns the step to go on from.

        Of several backbones, one that was dropped stays dropped: the others have gone on without it.
        """
        dropped = [student for student in self.students if last_event(student.folder) == NON_FINITE]
        if len(dropped) < len(self.students):
            for student in dropped:
                self.students.remove(student)
                self.say(f"dropped {student.name}: its loss was not finite when this run was here before")
        steps = [set(saved_steps(student.folder / "checkpoints")) for student in self.students]
        self._check_same_checkpoints(steps)
        common = set.intersection(*steps)
        if not common and any(steps):
            told = ", ".join(
                f"{student.name}: {max(have) if have else 'none'}"
                for student, have in zip(self.students, steps, strict=True)
            )
            raise InputError(
                f"output: the backbones in {self.recipe.output!r} share no checkpoint (last steps: {told}); "
                f"name those that go on together, backbones=[...], or use output=DIR for the others"
            )
        if not common:
            return 0
        step = max(common)
        for student in self.students:
            state = load_checkpoint(student.folder / "checkpoints", step)
            for key, value in (self.facts | student.facts).items():
                # Checkpoints of earlier versions lack the hash of the weights.
                if state.get(key, value) != value:
                    raise InputError(
                        f"{student.folder}: its run had {key} {state[key]!r}, this one has {value!r}; "
                        f"to go on, {RESUME_ADVICE[key]}, or choose another folder with output=DIR"
                    )
            student.load_state(state)
            # Checkpoints of earlier versions lack them.
            self.bad_samples, self.samples = state.get("bad_samples", 0), state.get("samples", 0)
        self.say(f"going on from step {step} of {self.total_steps}")
        return step

    def _check_same_checkpoints(self, steps: list[set[int]]) -> None:
        """The main process alone writes: a folder that the others do not see parts them, silently."""
        mine = [(student.name, sorted(have)) for student, have in zip(self.students, steps, strict=True)]
        told = self.world.gather(mine)
        for rank, theirs in enumerate(told):
            if theirs != told[0]:
                raise InputError(
                    f"output: process {rank} sees other checkpoints in {self.recipe.output!r} than 0; "
                    f"give a folder that all nodes share: output=DIR"
                )

    def _write_recipes(self) -> None:
        if self.world.is_main:
            for student in self.students:
                with self._writing():
                    write_atomically(student.folder / "recipe.yaml", to_yaml(student.recipe).encode())

    def _open_log(self, student: BackboneTrainer) -> MetricsLog | None:
        if not self.world.is_main:
            return None
        with self._writing():
            return MetricsLog(
                student.folder, first_step=self.first_step, tensorboard=self.recipe.train.tensorboard
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse folders that another run writes: each would take the other's half-written files."""
        with ExitStack() as locks:
            if self.world.is_main:
                for student in self.students:
                    refusal = f"output: another run writes {student.folder}; wait for it, or use output=DIR"
                    locks.enter_context(file_lock(student.folder / "run.lock", refusal))
            yield

    def _writing(self) -> AbstractContextManager[None]:
        return io_errors_as_input_errors(Path(self.recipe.output))

    def _open_loader(self) -> PairLoader:
        data, train = self.recipe.data, self.recipe.train
        cores = len(os.sched_getaffinity(0))
        return PairLoader(
            index=self.index,
            sampling=PairSampling(
                seed=self.recipe.seed,
                gap=data.gap,
                crop_area=data.crop_area,
                crop_ratio=data.crop_ratio,
                flip=data.flip,
                pairs_per_video=data.pairs_per_video,
            ),
            image_size=data.image_size,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            first_step=self.first_step,
            num_steps=self.total_steps - self.first_step,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
            num_threads=data.num_threads or max(1, cores // self.world.local_size),
            prefetch=data.prefetch,
            decoder=data.decoder,
            jpeg_engine_load=data.jpeg_engine_load,
            dtype=DTYPES[train.precision],
            max_bad_fraction=data.max_bad_fraction,
        )


RESUME_ADVICE = {
    "global_batch": "set train.batch_size and train.accumulate to give the same over all processes",
    "data": "use the same data.source",
    "weights_hash": "give the backbone the weights that it began with",
}


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a folder that holds another recipe's run, or any run where the recipe says `resume: never`."""
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output: {str(folder)!r} is a file; expected a folder: output=DIR")
    path = folder / "recipe.yaml"
    if not path.exists():
        return
    if recipe.resume == "never":
        raise InputError(f"output: {str(folder)!r} holds a run; use resume=auto to go on, or output=DIR")
    there = load_recipe(path)
    if recipe_hash(there) != recipe_hash(recipe):
        changed = "; ".join(differences(there, recipe)[:4])
        raise InputError(f"output: {str(folder)!r} holds another recipe's run ({changed}); use output=DIR")


def train(
    recipe: Recipe, world: World, *, validate: Validate | None = None, profile: bool = False
) -> dict[str, dict[str, Any]]:
    """Run `recipe` in this process of `world`; returns the last readings by backbone.

    profile: record some steps into `output/profile` and print where their time went (the main process).

    Raises:
        InputError: the recipe, its data, its weights or its folder are not fit to train.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written.
    """
    console = Console()
    trainer = Trainer(recipe, world, console, validate)
    if trainer.first_step >= trainer.total_steps:
        trainer.say(f"{recipe.output} is trained: all {trainer.total_steps} steps are done")
        return {}
    previous = {
        number: signal.signal(number, trainer.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    profiler = (
        StepProfiler(Path(recipe.output) / "profile", world.device) if profile and world.is_main else None
    )
    try:
        results = trainer.fit(profiler)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if profiler is not None:
        summary = profiler.close()
        trainer.say(
            summary_table(summary) if summary else f"nothing recorded: a profile takes {SKIPPED + 1} steps"
        )
    return results
