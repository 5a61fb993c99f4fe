"""Training end to end on small frame folders: run folders, resuming, several processes, and errors."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from synthetic import OneOfTwo, write_folders, write_weights
from torch import Tensor

from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.checkpoint import load_checkpoint, save_checkpoint
from fasttrain.data.loader import whole_frames
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import file_lock
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.optimizer import learning_rate_factor
from fasttrain.profiling import RECORDED, RECORDED_PASS, SPANS
from fasttrain.recipe import Recipe, TrainRecipe, load_recipe, recipe_from_dict, to_yaml
from fasttrain.trainer import Trainer
from fasttrain.training import train
from fasttrain.video_encoder import load_video_encoder

VIDEOS = 6


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of eight JPEG frames each."""
    return write_folders(tmp_path_factory.mktemp("frames"), [8] * VIDEOS)


# Four steps of four pairs on six videos, so that batches cross the ends of epochs.
TINY: dict[str, Any] = {
    "device": "cpu",
    "backbone": {"name": "dino", "weights": "random", "embed_dim": 32, "depth": 1, "num_heads": 2},
    "data": {"image_size": 64, "num_threads": 1},
    "optimizer": {"lr": 0.1},
    "train": {
        "steps": 4,
        "batch_size": 4,
        "precision": "fp32",
        "log_every": 2,
        "save_every": 2,
        "tensorboard": False,
    },
    "eval": {"every": 0},
}


def tiny(source: Path, output: Path, **sections: dict[str, Any]) -> Recipe:
    tree = {name: {**TINY.get(name, {}), **keys} for name, keys in sections.items()}
    tree["data"] = {**TINY["data"], "source": str(source), **sections.get("data", {})}
    return recipe_from_dict({**TINY, "output": str(output), **tree})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as torchrun sets for its processes, so that sums are computed in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_mae(single: Recipe) -> Recipe:
    """Add a second backbone to a recipe with one."""
    other = dataclasses.replace(single.backbone, name="mae")
    return dataclasses.replace(single, backbones=(single.backbone, other))


def run(recipe: Recipe) -> dict[str, Any]:
    return Trainer(recipe, World.single()).train()


class Interrupted(Trainer):
    """A trainer that calls `interrupt` at the beginning of one step."""

    def __init__(
        self,
        recipe: Recipe,
        step_index: int,
        interrupt: Callable[[Trainer], None],
        world: World | None = None,
    ) -> None:
        super().__init__(recipe, world or World.single())
        self.interrupted_step_index, self.interrupt = step_index, interrupt

    def train_step(self, step_index: int, *, diagnostics: bool) -> None:
        if step_index == self.interrupted_step_index:
            self.interrupt(self)
        super().train_step(step_index, diagnostics=diagnostics)


def crash(trainer: Trainer) -> None:
    raise RuntimeError("crashed")


def crash_and_resume(recipe: Recipe, step_index: int) -> None:
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(recipe, step_index, crash).train()
    run(recipe)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "projection.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny(frames, folder))
    return folder


def test_files_and_metrics_of_a_run_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"recipe.yaml", "projection.safetensors", "checkpoints", "metrics.jsonl", "train.json"}
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [2, 4]
    expected = {
        "loss", "cycle", "separability", "cycle_accuracy", "identity_similarity", "lr", "pairs_per_second",
        "epoch", "bad_samples", "bad_files",
    }  # fmt: skip
    assert expected <= lines[0].keys()
    assert lines[-1]["epoch"] == pytest.approx(16 / VIDEOS)
    # The learning rate of the second step. That of the recipe is for 256 pairs; the batch has 4.
    factor = learning_rate_factor(TrainRecipe(), 1, 4)
    assert lines[0]["lr"] == pytest.approx(0.1 * 4 / 256 * factor)
    assert lines[0]["loss"] == pytest.approx(lines[0]["cycle"] + 3 * lines[0]["separability"])


def test_the_resolved_recipe_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    run(recipe)
    assert_same_bits(finished, tmp_path / "again")
    run(dataclasses.replace(recipe, output=str(tmp_path / "seeded"), seed=1))
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("again", "seeded")))


@pytest.mark.parametrize("step_index", [1, 2, 3])
def test_a_resumed_run_is_reproducible_to_the_bit(
    step_index: int, frames: Path, finished: Path, tmp_path: Path
) -> None:
    """The run crashes in the middle of an epoch, before or after the checkpoint of two completed steps."""
    crash_and_resume(tiny(frames, tmp_path), step_index)
    assert_same_bits(finished, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4]


def test_a_run_with_a_curriculum_of_walks_resumes(frames: Path, finished: Path, tmp_path: Path) -> None:
    objective = {"frames": 3, "curriculum": True}
    whole, resumed, fixed = (tiny(frames, tmp_path / name, objective=objective) for name in "abc")
    run(whole)
    crash_and_resume(resumed, 3)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    run(dataclasses.replace(fixed, objective=dataclasses.replace(fixed.objective, curriculum=False)))
    one, other, two_frames = (metrics(folder) for folder in (tmp_path / "a", tmp_path / "c", finished))
    # The walks are shorter in the first half of the run, on the same frames.
    assert one[0]["cycle"] < other[0]["cycle"]
    assert one[0]["cycle"] != two_frames[0]["cycle"]


def test_a_resumed_run_in_fp8_keeps_its_scales(
    frames: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = (tiny(frames, tmp_path / name, encoder={"precision": "fp8"}) for name in ("a", "b"))
    run(whole)
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(resumed, 2, crash).train()
    # No frames are read for another calibration.
    monkeypatch.setattr("fasttrain.trainer.calibration_frames", None)
    run(resumed)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert any(
        not torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path / "a").items()
    )


def test_a_run_starts_at_the_frozen_features(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate near 0, the projection stays the frozen encoder without its mean."""
    run(tiny(frames, tmp_path / "start", projection={"init": "frozen"}, optimizer={"lr": 1e-12}))
    assert "linear, start at the frozen features" in capsys.readouterr().out
    encoder = load_video_encoder(tmp_path / "start")
    images = torch.stack([*whole_frames(open_source(frames), 64)])
    tokens = encoder.encoder.tokens(images)
    centred = tokens - tokens.mean(dim=(0, 1))
    centred = centred - centred.mean(dim=-1, keepdim=True)
    assert torch.cosine_similarity(encoder.projection(tokens), centred, dim=-1).min() > 0.97
    # This head always starts there.
    whole, resumed = (tiny(frames, tmp_path / name, projection={"head": "residual"}) for name in ("a", "b"))
    run(whole)
    assert "residual, start at the frozen features" in capsys.readouterr().out
    assert not torch.equal(weights(tmp_path / "a")["mean"], torch.zeros(32))
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(resumed, 2, crash).train()
    # A resumed run reads no frames for it.
    monkeypatch.setattr("fasttrain.trainer.whole_frames", None)
    run(resumed)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    # Neither does one that starts from a projection.
    other = {"head": "residual", "weights": str(tmp_path / "a")}
    run(tiny(frames, tmp_path / "c", projection=other, train={"steps": 1}))
    assert "residual, weights" in capsys.readouterr().out


def test_bad_samples_are_counted_across_a_resume(tmp_path: Path) -> None:
    """A video with empty frames is drawn once per epoch, before and after the checkpoint."""
    frames = write_folders(tmp_path / "frames", [8] * VIDEOS)
    for path in (frames / "class_1" / "video_1").iterdir():
        path.write_bytes(b"")
    run(tiny(frames, tmp_path / "whole", data={"max_bad_fraction": 1.0}))
    crash_and_resume(tiny(frames, tmp_path / "resumed", data={"max_bad_fraction": 1.0}), step_index=2)
    counts = [[line["bad_samples"] for line in metrics(tmp_path / name)] for name in ("whole", "resumed")]
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


@pytest.mark.parametrize("write", range(4))
def test_a_run_whose_last_save_fails_can_be_resumed(
    write: int, frames: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, two backbones save two files each. The disk is full when one of these is written."""
    both = with_mae(tiny(frames, tmp_path, train={"keep": 1}))
    replace = os.replace
    written: list[Path] = []

    def fail(source: Path, target: Path) -> None:
        if target.suffix in (".pt", ".safetensors"):
            written.append(target)
            if len(written) == 5 + write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(both)
    assert caught.value.filename == str(written[-1])
    run(both)
    assert_same_bits(finished, tmp_path / "dino")
    for name in ("dino", "mae"):
        assert json.loads((tmp_path / name / "train.json").read_text())["epoch"] == 16 / VIDEOS
        assert os.listdir(tmp_path / name / "checkpoints") == ["step_00000004.pt"]


def test_what_a_killed_run_has_left_over_is_deleted(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, train={"keep": 1})
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for interrupted in ("step_00000002.pt", ".step_00000003.pt.0123456789abcdef.partial"):
        # For example, killed while it wrote a checkpoint, or before it deleted the previous one.
        run(recipe)
        (folder / interrupted).touch()
        assert run(recipe) == {}
        assert os.listdir(folder) == ["step_00000004.pt"]


def test_metrics_are_on_disk_before_the_checkpoint_that_relies_on_them(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, replace = os.fsync, os.replace
    on_disk: list[bytes] = []

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path / "metrics.jsonl"):
            on_disk.append((tmp_path / "metrics.jsonl").read_bytes())

    def check_replace(source: Path, target: Path) -> None:
        if target.suffix == ".pt":
            assert on_disk[-1].count(b"\n") == int(target.stem[-8:]) // 2
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    run(tiny(frames, tmp_path))
    assert len(on_disk) == 2


def test_a_run_without_its_recipe_resumes(frames: Path, finished: Path, tmp_path: Path) -> None:
    """As the message about an empty recipe advises."""
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(tiny(frames, tmp_path), 2, crash).train()
    (tmp_path / "recipe.yaml").unlink()
    run(tiny(frames, tmp_path))
    assert_same_bits(finished, tmp_path)


def stop(trainer: Trainer) -> None:
    """Send a signal to this process, and wait until the trainer's thread has handled it."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert trainer.stopping._agreed.wait(timeout=60)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_stops_the_run_after_the_step_and_it_resumes(
    accumulate: int, frames: Path, finished: Path, tmp_path: Path
) -> None:
    """Between two reports, too, the metrics are those of an uninterrupted run."""
    train = {"batch_size": 4 // accumulate, "accumulate": accumulate}
    run(tiny(frames, tmp_path / "whole", train=train))
    recipe = tiny(frames, tmp_path / "stopped", train=train)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(recipe, 2, stop).train()
    assert sorted(os.listdir(tmp_path / "stopped" / "checkpoints")) == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]
    run(recipe)
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")
    numbers = [
        [
            {key: value for key, value in line.items() if "second" not in key}
            for line in metrics(tmp_path / name)
        ]
        for name in ("whole", "stopped")
    ]
    assert numbers[0] == numbers[1]
    if accumulate == 1:
        assert_same_bits(finished, tmp_path / "whole")


class StoppedAtOnce(Trainer):
    """A trainer that receives a signal before its first step."""

    @contextmanager
    def _open_run(self) -> Iterator[None]:
        with super()._open_run():
            stop(self)
            yield


def test_a_signal_before_the_first_step_writes_no_checkpoint(frames: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        StoppedAtOnce(tiny(frames, tmp_path), World.single()).train()
    assert not (tmp_path / "checkpoints").exists()


def test_processes_and_accumulated_passes_take_the_same_steps(
    frames: Path, finished: Path, tmp_path: Path
) -> None:
    """Two processes with 2 pairs each and one process with 2 x 2 accumulated pairs agree to the bit.

    Halving is exact. One batch of 4 pairs is summed in another order and agrees up to rounding errors.
    """
    accumulated = tiny(frames, tmp_path / "accumulated", train={"batch_size": 2, "accumulate": 2})
    run(accumulated)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny(frames, tmp_path / "two", train={"batch_size": 2})))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, "-m", "fasttrain", str(path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert_same_bits(tmp_path / "accumulated", tmp_path / "two")
    start = (
        Trainer(tiny(frames, tmp_path / "start"), World.single()).backbone_trainers[0].projection.state_dict()
    )
    one, two = weights(finished), weights(tmp_path / "two")
    for name in one:
        distance = (one[name] - start[name]).norm()
        assert distance > 0
        assert (one[name] - two[name]).norm() < 1e-3 * distance, name


def test_several_backbones_train_as_in_single_runs(frames: Path, finished: Path, tmp_path: Path) -> None:
    together = with_mae(tiny(frames, tmp_path / "all"))
    run(together)
    assert_same_bits(finished, tmp_path / "all" / "dino")
    run(tiny(frames, tmp_path / "single", backbone={"name": "mae"}))
    assert_same_bits(tmp_path / "single", tmp_path / "all" / "mae")


def test_a_backbone_with_a_non_finite_loss_is_dropped(
    frames: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays dropped when the run is resumed, and the other backbone trains as in a run of its own."""
    together = with_mae(tiny(frames, tmp_path))
    trainer = Interrupted(together, 0, stop)
    mae = trainer.backbone_trainers[1]
    mae.projection.norm.bias.data.fill_(torch.nan)
    monkeypatch.setattr(mae, "start_at_frozen", lambda frames: None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [each.name for each in trainer.backbone_trainers] == ["dino"]
    assert "dropped mae: the loss of step 1 is not finite" in capsys.readouterr().out
    assert list(run(together)) == ["dino"]
    assert "dropped mae: its loss was not finite" in capsys.readouterr().out
    assert_same_bits(finished, tmp_path / "dino")
    assert metrics(tmp_path / "mae")[-1]["event"] == "non-finite loss"


def test_the_number_of_steps_follows_from_the_epochs(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, train={"steps": None, "epochs": 2.5, "batch_size": 2})
    # 15 pairs in 7 batches of 2; the last incomplete batch is dropped.
    assert Trainer(recipe, World.single()).total_steps == 7


def test_ranks_that_see_different_files_are_refused(frames: Path, finished: Path, tmp_path: Path) -> None:
    """If the source, a video or the checkpoints differ, the ranks would silently diverge."""
    recipe = load_recipe(finished / "recipe.yaml")
    for other, what in [
        (False, "data.source"),
        ("another fingerprint", "data.source"),
        ({"dino": []}, "output: the checkpoints"),
    ]:
        with pytest.raises(InputError, match=f"{what}.*ranks 0 and 1 differ"):
            Trainer(recipe, OneOfTwo(other, instead_of=type(other)))


@pytest.mark.parametrize("weighting", ["fixed", "gradnorm"])
def test_no_scalars_are_read_between_log_steps(weighting: str, frames: Path, tmp_path: Path) -> None:
    train = {"steps": 9, "log_every": 9, "save_every": 9}
    recipe = tiny(frames, tmp_path, train=train, objective={"weighting": weighting})
    Trainer(recipe, World.single(), profile=True).train()
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert summary["steps"] == RECORDED
    assert all(summary["parts"][name]["ms"] > 0 for name in SPANS if name != RECORDED_PASS)
    # On a CPU, torch's fused AdamW reads a step counter for each of the projection's four parameters.
    assert summary["scalar_reads"] <= 4


def test_a_run_says_that_it_does_without_a_cuda_graph(
    frames: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def warm_up(self: BackboneTrainer) -> float:
        self.graph_failure = "a wait for the device"
        return 0.0

    monkeypatch.setattr(BackboneTrainer, "warm_up", warm_up)
    run(tiny(frames, tmp_path))
    line = "dino: training without encoder.cuda_graph, because the recording failed: a wait for the device"
    assert line in " ".join(capsys.readouterr().out.split())
    assert_same_bits(finished, tmp_path)


def on_gpu(source: Path, output: Path, **sections: dict[str, Any]) -> Recipe:
    sections["train"] = {"precision": "bf16", **sections.get("train", {})}
    sections["encoder"] = {"compile": "none", **sections.get("encoder", {})}
    return dataclasses.replace(tiny(source, output, **sections), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_training_on_a_gpu_logs_and_resumes(cuda_graph: bool, frames: Path, tmp_path: Path) -> None:
    """A run that crashes after its first checkpoint ends with the same bits as one that does not."""
    world = World.single("cuda:0")
    encoder = {"cuda_graph": cuda_graph}
    Trainer(on_gpu(frames, tmp_path / "whole", encoder=encoder), world).train()
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [2, 4]
    for name in ("loss", "cycle", "separability", "cycle_accuracy", "identity_similarity"):
        assert all(math.isfinite(line[name]) for line in lines)
    resumed = on_gpu(frames, tmp_path / "resumed", encoder=encoder)
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(resumed, 3, crash, world).train()
    Trainer(resumed, world).train()
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed")
    # On the same frames, the CPU comes to about the same losses.
    run(tiny(frames, tmp_path / "cpu"))
    for line, expected in zip(lines, metrics(tmp_path / "cpu"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.1)


@pytest.mark.gpu
def test_a_non_finite_loss_on_a_gpu_ends_the_run(frames: Path, tmp_path: Path) -> None:
    # A start at the frozen features would replace the NaN.
    recipe = on_gpu(frames, tmp_path, projection={"init": "published"})
    trainer = Trainer(recipe, World.single("cuda:0"))
    trainer.backbone_trainers[0].projection.norm.bias.data.fill_(torch.nan)
    with pytest.raises(InputError, match="the loss of step 1 is not finite"):
        trainer.train()
    assert metrics(tmp_path)[-1]["event"] == "non-finite loss"


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"train": {"precision": "fp16"}}, {"encoder": {"compile": "default"}}])
def test_several_backbones_train_on_a_gpu(
    changes: dict[str, dict[str, Any]], frames: Path, tmp_path: Path
) -> None:
    """Each has its own CUDA graph, and its results are those of a run of its own."""
    changes = {**changes, "encoder": {"cuda_graph": True, **changes.get("encoder", {})}}
    Trainer(with_mae(on_gpu(frames, tmp_path / "all", **changes)), World.single("cuda:0")).train()
    Trainer(on_gpu(frames, tmp_path / "dino", **changes), World.single("cuda:0")).train()
    alone, together = (weights(folder) for folder in (tmp_path / "dino", tmp_path / "all" / "dino"))
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-3, atol=1e-4)
    assert metrics(tmp_path / "all" / "mae")[-1]["step"] == 4


@pytest.mark.parametrize(
    ("precision", "head", "regularizer"),
    [
        ("bf16", "linear", "kl"),
        ("fp16", "mlp2", "kl"),
        ("fp32", "mlp3", "mse"),
        ("bf16", "lowrank", "kl"),
        ("fp16", "residual", "kl"),
    ],
)
def test_training_reduces_the_loss(
    precision: str, head: str, regularizer: str, frames: Path, tmp_path: Path
) -> None:
    train = {"steps": 24, "precision": precision}
    changes = {"projection": {"head": head}, "objective": {"regularizer": regularizer}, "train": train}
    run(tiny(frames, tmp_path, **changes))
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_message_about_a_non_finite_loss_names_step_and_samples(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, optimizer={"lr": 1e38}, train={"warmup_epochs": 0.0, "save_every": 1})
    with pytest.raises(InputError, match=r"the loss of step 3 is not finite.*: \d+ \(class_\d/video_\d"):
        run(recipe)
    event = metrics(tmp_path)[-1]
    assert event["event"] == "non-finite loss"
    assert len(event["samples"]) == 4
    assert (tmp_path / "checkpoints" / "step_00000002.pt").exists()
    assert not (tmp_path / "checkpoints" / "step_00000003.pt").exists()


def test_the_encoder_and_a_finished_run_are_not_modified(frames: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(frames, tmp_path), World.single())
    encoder = trainer.backbone_trainers[0].encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trainer.train()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    written = (tmp_path / "projection.safetensors").stat()
    assert run(load_recipe(tmp_path / "recipe.yaml")) == {}
    assert (tmp_path / "projection.safetensors").stat() == written


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": {"source": ""}}, "^data.source: not set"),
        ({"data": {"source": "nowhere"}}, "^data.source: 'nowhere' does not exist"),
        ({"train": {"batch_size": 7}}, "7"),
        ({"objective": {"window": 5}}, "objective.window"),
        ({"objective": {"backend": "triton"}}, "objective.backend: 'triton' needs"),
        ({"encoder": {"attention": "cudnn"}}, "encoder.attention: 'cudnn' needs a GPU"),
        ({"data": {"image_size": 60}}, "60"),
        ({"backbone": {"weights": "nowhere.pth"}}, "nowhere.pth"),
    ],
)
def test_bad_input_is_refused_before_files_are_written(
    changes: dict[str, Any], part: str, frames: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=part):
        run(tiny(frames, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_folder_is_refused(frames: Path, finished: Path, tmp_path: Path) -> None:
    with (
        file_lock(tmp_path / "run.lock", "taken"),
        pytest.raises(InputError, match=f"another run is writing to '{tmp_path}'"),
    ):
        run(tiny(frames, tmp_path))
    run(tiny(frames, tmp_path))
    assert_same_bits(finished, tmp_path)


def test_resuming_with_another_recipe_batch_data_or_weights_is_refused(frames: Path, tmp_path: Path) -> None:
    run(tiny(frames, tmp_path))
    with pytest.raises(InputError, match=r"a run of another recipe .*optimizer\.lr"):
        run(tiny(frames, tmp_path, optimizer={"lr": 0.2}))
    with pytest.raises(InputError, match="trained with global_batch 4, but this command has 3"):
        run(tiny(frames, tmp_path, train={"batch_size": 3}))
    state = load_checkpoint(tmp_path / "checkpoints", 4)
    for key in ("data", "weights_hash"):
        save_checkpoint(tmp_path / "checkpoints", 4, {**state, key: "other"})
        with pytest.raises(InputError, match=f"{key} 'other', but this command has"):
            run(tiny(frames, tmp_path))
    save_checkpoint(tmp_path / "checkpoints", 4, {**state, "backbone.mean": (0.5, 0.25, 0.5)})
    with pytest.raises(InputError, match=r"Set backbone\.mean=\[0\.5,0\.25,0\.5\], or use another output"):
        run(tiny(frames, tmp_path))


def test_a_run_resumes_with_weights_that_have_been_moved_but_not_with_others(
    frames: Path, tmp_path: Path
) -> None:
    def recipe(weights: str, steps: int) -> Recipe:
        backbone = {"weights": weights, "embed_dim": None, "depth": None}
        return tiny(frames, tmp_path / "run", backbone=backbone, train={"steps": steps})

    weights = Path(write_weights(tmp_path / "weights.pth"))
    run(recipe(str(weights), 2))
    moved = weights.rename(tmp_path / "moved.pth")
    run(recipe(str(moved), 4))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [2, 4]
    assert load_recipe(tmp_path / "run" / "recipe.yaml").backbone.weights == str(moved)
    other = write_weights(tmp_path / "other.pth", shift=1.0)
    with pytest.raises(InputError, match=r"trained with weights_hash .* Use the same .* weights"):
        run(recipe(other, 6))


@pytest.mark.parametrize("interrupted_at", [4, 3])
def test_a_run_can_be_extended(
    interrupted_at: int, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A complete run continues after step 4, and one that was interrupted in step 4 after step 2."""
    done = interrupted_at // 2 * 2
    for folder in ("one", "other"):
        recipe = tiny(frames, tmp_path / folder)
        if interrupted_at < 4:
            with pytest.raises(RuntimeError, match="crashed"):
                Interrupted(recipe, interrupted_at, crash).train()
        else:
            run(recipe)
        longer = tiny(frames, tmp_path / folder, train={"steps": 8})
        assert capsys.readouterr().out.count("the length of the run has changed") == 0
        # Interrupted again, and only once in the other folder.
        if folder == "one":
            with pytest.raises(RuntimeError, match="crashed"):
                Interrupted(longer, 7, crash).train()
            assert not (tmp_path / folder / "train.json").exists()
        run(longer)
        line = f"from step {done} on, the learning rate follows the schedule of 8 steps"
        assert capsys.readouterr().out.count(line) == 1
    assert_same_bits(tmp_path / "one", tmp_path / "other")
    records = metrics(tmp_path / "one")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    for record in records:
        train = tiny(frames, tmp_path, train={"steps": 4 if record["step"] <= done else 8}).train
        factor = learning_rate_factor(train, record["step"] - 1, train.steps)
        assert record["lr"] == pytest.approx(0.1 * 4 / 256 * factor)
    with pytest.raises(InputError, match=r"train\.steps: .* has completed 8 steps, but this command has 7"):
        run(tiny(frames, tmp_path / "one", train={"steps": 7}))
    with pytest.raises(InputError, match=r"train\.warmup_epochs"):
        run(tiny(frames, tmp_path / "one", train={"steps": 9, "warmup_epochs": 0.5}))


def test_training_can_start_from_a_projection(frames: Path, finished: Path, tmp_path: Path) -> None:
    projection = tmp_path / "projection.safetensors"
    shutil.copy(finished / projection.name, projection)
    start = {"weights": str(tmp_path)}
    trainer = Trainer(tiny(frames, tmp_path / "one", projection=start), World.single())
    for name, tensor in trainer.backbone_trainers[0].projection.state_dict().items():
        assert torch.equal(tensor, weights(finished)[name])
    # Another node has another file.
    trainer.backbone_trainers[0].world = OneOfTwo("another hash", str)
    with pytest.raises(InputError, match=r"projection\.weights: .* ranks 0 and 1 differ"):
        trainer.backbone_trainers[0].load_projection()
    run(tiny(frames, tmp_path / "one", projection=start))
    assert weights(tmp_path / "one")["norm.weight"].ne(weights(finished)["norm.weight"]).any()
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(tiny(frames, tmp_path / "other", projection=start), 3, crash).train()
    with pytest.raises(InputError, match=r"projection\.weights: .* head linear and width 32, .* head mlp2"):
        run(tiny(frames, tmp_path / "mlp2", projection={**start, "head": "mlp2"}))
    with pytest.raises(InputError, match=r"projection\.weights: .* are not those used in training"):
        run(tiny(frames, tmp_path / "deep", projection=start, backbone={"depth": 2}))
    # A resumed run does not read it again.
    projection.unlink()
    run(tiny(frames, tmp_path / "other", projection=start))
    assert_same_bits(tmp_path / "one", tmp_path / "other")


def test_a_run_is_not_resumed_with_another_loader(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frames of the loaders differ a little, and so do the images that they can decode."""
    pytest.importorskip("nvidia.dali")
    recipe = tiny(frames, tmp_path)
    for here, there in (("DALI", "PyTorch"), ("PyTorch", "DALI")):
        for module in ("trainer", "data.loader"):
            monkeypatch.setattr(f"fasttrain.{module}.has_dali", lambda has_dali=here == "DALI": has_dali)
        run(recipe)
        assert capsys.readouterr().out.count("DALI is not installed") == (here != "DALI")
        # A completed run loads no frames.
        assert run(recipe) == {}
        assert "DALI is not installed" not in capsys.readouterr().out
        monkeypatch.setattr("fasttrain.trainer.has_dali", lambda has_dali=there == "DALI": has_dali)
        with pytest.raises(InputError, match=f"trained with loader '{here}', but this command has '{there}'"):
            run(recipe)
        # Checkpoints of version 0.1.0 do not name the loader, which was DALI.
        state = load_checkpoint(tmp_path / "checkpoints", 4)
        save_checkpoint(tmp_path / "checkpoints", 4, {k: v for k, v in state.items() if k != "loader"})
        monkeypatch.setattr("fasttrain.trainer.has_dali", lambda: False)
        with pytest.raises(InputError, match="trained with loader 'DALI'"):
            run(recipe)
        shutil.rmtree(tmp_path)


def test_a_run_is_not_resumed_with_another_mean_or_std(frames: Path, tmp_path: Path) -> None:
    run(tiny(frames, tmp_path))
    half = [0.5, 0.5, 0.5]
    for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        with pytest.raises(InputError, match=rf"trained with backbone\.{key} \(0\.\d+, .*has \(0\.5, "):
            run(tiny(frames, tmp_path, backbone={key: half}))
        # The default may be spelt out.
        run(tiny(frames, tmp_path, backbone={key: list(default)}))
    # Version 0.1.0 used the ImageNet mean and std and did not store them, neither in the recipe nor here.
    state = load_checkpoint(tmp_path / "checkpoints", 4)
    save_checkpoint(tmp_path / "checkpoints", 4, {k: v for k, v in state.items() if "backbone." not in k})
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del recipe["backbone"]["mean"], recipe["backbone"]["std"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=r"trained with backbone\.std"):
        run(tiny(frames, tmp_path, backbone={"std": half}))
    assert run(tiny(frames, tmp_path)) == {}


def test_each_backbone_receives_the_same_frames_with_its_own_mean_and_std(
    frames: Path, tmp_path: Path
) -> None:
    first, second = with_mae(tiny(frames, tmp_path)).backbones
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.4, 0.5)
    second = dataclasses.replace(second, mean=mean, std=std)
    trainer = Trainer(dataclasses.replace(tiny(frames, tmp_path), backbones=(first, second)), World.single())
    received: dict[str, list[Tensor]] = {"dino": [], "mae": []}
    for each in trainer.backbone_trainers:
        each.encoder.patch_embed.register_forward_pre_hook(
            lambda _, inputs, name=each.name: received[name].append(inputs[0])
        )
    trainer.train()
    for dino, mae in zip(*received.values(), strict=True):
        pixels = dino * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(mae, expected, rtol=0, atol=1e-5)
    assert load_video_encoder(tmp_path / "mae").mean == mean


def test_learning_curves_are_drawn_even_if_the_run_ended_before(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path)
    run(recipe)
    train(recipe)
    picture = tmp_path / "figures" / "learning.png"
    drawn = picture.stat()
    train(recipe)
    assert picture.stat() == drawn
