"""Training end to end on small synthetic frame folders: the same steps however they are cut."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import OneOfTwo, write_folders

from fasttrain.checkpoint import load_checkpoint, save_checkpoint
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import file_lock
from fasttrain.optimizer import learning_rate_factor
from fasttrain.profiling import RECORDED, RECORDED_PASS, SPANS
from fasttrain.recipe import Recipe, TrainRecipe, load_recipe, recipe_from_dict, to_yaml
from fasttrain.trainer import Trainer, check_bad_fraction

VIDEOS = 6


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of eight JPEG frames."""
    return write_folders(tmp_path_factory.mktemp("frames"), [8] * VIDEOS)


# Four steps of four pairs over six videos: the batches straddle the epochs.
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
}


def tiny(source: Path, output: Path, **sections: dict[str, Any]) -> Recipe:
    tree = {name: {**TINY.get(name, {}), **keys} for name, keys in sections.items()}
    tree["data"] = {**TINY["data"], "source": str(source), **sections.get("data", {})}
    return recipe_from_dict({**TINY, "output": str(output), **tree})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun sets it for its processes: sums then run in one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_mae(single: Recipe) -> Recipe:
    """The recipe of two backbones: the given one and a second."""
    other = dataclasses.replace(single.backbone, name="mae")
    return dataclasses.replace(single, backbones=(single.backbone, other))


def run(recipe: Recipe) -> dict[str, Any]:
    return Trainer(recipe, World.single()).train()


class Interrupted(Trainer):
    """Something happens ahead of a step."""

    def __init__(self, recipe: Recipe, step: int, happens: Callable[[], None]) -> None:
        super().__init__(recipe, World.single())
        self.interrupted_step, self.happens = step, happens

    def train_step(self, *, diagnostics: bool) -> None:
        if self.step == self.interrupted_step:
            self.happens()
        super().train_step(diagnostics=diagnostics)


def pull_the_plug() -> None:
    raise RuntimeError("pulled the plug")


def crash_and_resume(recipe: Recipe, step: int) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        Interrupted(recipe, step, pull_the_plug).train()
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
    """The run folder of four uninterrupted steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny(frames, folder))
    return folder


def test_a_run_folder_has_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"recipe.yaml", "projection.safetensors", "checkpoints", "metrics.jsonl", "train.json"}
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [2, 4]
    wanted = {
        "loss", "cycle", "separability", "cycle_accuracy", "identity_similarity", "lr", "pairs_per_second",
        "epoch", "bad_samples", "bad_files",
    }  # fmt: skip
    assert wanted <= lines[0].keys()
    assert lines[-1]["epoch"] == pytest.approx(16 / VIDEOS)
    # The rate of the second step, for 4 pairs where the recipe's is for 256.
    factor = learning_rate_factor(TrainRecipe(), 1, 4)
    assert lines[0]["lr"] == pytest.approx(0.1 * 4 / 256 * factor)
    assert lines[0]["loss"] == pytest.approx(lines[0]["cycle"] + 3 * lines[0]["separability"])


def test_the_head_moves_and_the_resolved_recipe_reruns_to_the_same_bits(
    finished: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(finished / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    run(recipe)
    assert_same_bits(finished, tmp_path / "again")
    run(dataclasses.replace(recipe, output=str(tmp_path / "seeded"), seed=1))
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("again", "seeded")))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(
    step: int, frames: Path, finished: Path, tmp_path: Path
) -> None:
    """A run that dies in the middle of an epoch, before or after its checkpoint at step 2."""
    crash_and_resume(tiny(frames, tmp_path), step)
    assert_same_bits(finished, tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4]


def test_bad_samples_are_counted_over_a_resume(tmp_path: Path) -> None:
    """A video that lost its frames is met once an epoch, twice in the run: by step 2 and after."""
    frames = write_folders(tmp_path / "frames", [8] * VIDEOS)
    for path in (frames / "class_1" / "video_1").iterdir():
        path.write_bytes(b"")
    run(tiny(frames, tmp_path / "whole", data={"max_bad_fraction": 1.0}))
    crash_and_resume(tiny(frames, tmp_path / "cut", data={"max_bad_fraction": 1.0}), 3)
    counts = [[line["bad_samples"] for line in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


@pytest.mark.parametrize("write", range(4))
def test_a_run_whose_last_save_fails_is_finished_by_the_next(
    write: int, frames: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at each file that two backbones, which keep one checkpoint, write after step 4."""
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


def test_a_signal_ends_with_a_checkpoint_and_resumes_to_the_same_bits(
    frames: Path, finished: Path, tmp_path: Path
) -> None:
    recipe = tiny(frames, tmp_path, train={"log_every": 10, "save_every": 10})
    with pytest.raises(KeyboardInterrupt):
        Interrupted(recipe, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)).train()
    assert (tmp_path / "checkpoints" / "step_00000002.pt").exists()
    run(recipe)
    assert_same_bits(finished, tmp_path)


def test_processes_and_accumulated_passes_take_the_same_steps(
    frames: Path, finished: Path, tmp_path: Path
) -> None:
    """Two processes of 2 pairs and one of 2 x 2 accumulated: to the last bit, since halving is exact. One
    batch of 4 sums in another order: the paths may part by rounding, small against the way they went."""
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
        way = (one[name] - start[name]).norm()
        assert way > 0
        assert (one[name] - two[name]).norm() < 1e-3 * way, name


def test_all_backbones_from_one_stream_equal_single_runs(
    frames: Path, finished: Path, tmp_path: Path
) -> None:
    together = with_mae(tiny(frames, tmp_path / "all"))
    run(together)
    assert_same_bits(finished, tmp_path / "all" / "dino")
    run(tiny(frames, tmp_path / "single", backbone={"name": "mae"}))
    assert_same_bits(tmp_path / "single", tmp_path / "all" / "mae")


def test_a_backbone_of_non_finite_loss_is_dropped_and_stays_dropped(
    frames: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other reaches the weights of its own run, also when the run is stopped and resumed."""
    together = with_mae(tiny(frames, tmp_path))
    trainer = Trainer(together, World.single())
    trainer.backbone_trainers[1].projection.norm.bias.data.fill_(torch.nan)
    trainer.request_stop(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [one.name for one in trainer.backbone_trainers] == ["dino"]
    assert "dropped mae: the loss is not finite in step 1" in capsys.readouterr().out
    assert list(run(together)) == ["dino"]
    assert "dropped mae: its loss was not finite" in capsys.readouterr().out
    assert_same_bits(finished, tmp_path / "dino")
    assert metrics(tmp_path / "mae")[-1]["event"] == "non-finite loss"


def test_a_backbone_added_to_a_trained_run_is_refused(frames: Path, tmp_path: Path) -> None:
    """It would start from nothing, and with it those that are trained."""
    single = tiny(frames, tmp_path)
    run(dataclasses.replace(single, backbones=(single.backbone,)))
    with pytest.raises(InputError, match=r"share no checkpoint \(last steps: dino: 4, mae: none\)"):
        run(with_mae(single))


def test_the_number_of_steps_follows_from_the_epochs(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, train={"steps": None, "epochs": 2.5, "batch_size": 2})
    # 15 pairs; the last global batch that would not be full is left out.
    assert Trainer(recipe, World.single()).total_steps == 7


def test_what_another_process_does_not_see_is_refused(frames: Path, finished: Path, tmp_path: Path) -> None:
    """The source, a video of it, the checkpoints: each would part the processes without a word."""
    recipe = load_recipe(finished / "recipe.yaml")
    for other, what in [
        (False, "data.source"),
        ("another fingerprint", "data.source"),
        ({"dino": []}, "output: the checkpoints"),
    ]:
        with pytest.raises(InputError, match=f"{what}.*processes 0 and 1 differ"):
            Trainer(recipe, OneOfTwo(other, instead_of=type(other)))


def test_a_profiled_run_reads_no_number_between_log_steps(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, train={"steps": 9, "log_every": 9, "save_every": 9})
    Trainer(recipe, World.single(), profile=True).train()
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert summary["steps"] == RECORDED
    assert all(summary["parts"][name]["ms"] > 0 for name in SPANS if name != RECORDED_PASS)
    # On a CPU torch's fused AdamW reads its step counter once for each of the head's four parameters; on a
    # GPU the counter stays on the device. A meter that read anything would add to these.
    assert summary["scalar_reads"] <= 4


@pytest.mark.parametrize(
    ("precision", "head", "regularizer"),
    [("bf16", "linear", "kl"), ("fp16", "mlp2", "kl"), ("fp32", "mlp3", "mse")],
)
def test_every_precision_head_and_regulariser_learns(
    precision: str, head: str, regularizer: str, frames: Path, tmp_path: Path
) -> None:
    train = {"steps": 24, "precision": precision}
    changes = {"projection": {"head": head}, "objective": {"regularizer": regularizer}, "train": train}
    run(tiny(frames, tmp_path, **changes))
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_non_finite_loss_names_step_and_samples(frames: Path, tmp_path: Path) -> None:
    recipe = tiny(frames, tmp_path, optimizer={"lr": 1e38}, train={"warmup_epochs": 0.0, "save_every": 1})
    with pytest.raises(InputError, match=r"not finite in step 3; .*samples \d+ \(class_\d/video_\d"):
        run(recipe)
    event = metrics(tmp_path)[-1]
    assert event["event"] == "non-finite loss"
    assert len(event["samples"]) == 4
    assert (tmp_path / "checkpoints" / "step_00000002.pt").exists()
    assert not (tmp_path / "checkpoints" / "step_00000003.pt").exists()


def test_the_encoder_stays_frozen_and_a_finished_run_as_it_is(frames: Path, tmp_path: Path) -> None:
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
        ({"data": {"source": ""}}, "data.source"),
        ({"data": {"source": "nowhere"}}, "nowhere"),
        ({"train": {"batch_size": 7}}, "7"),
        ({"objective": {"window": 5}}, "objective.window"),
        ({"data": {"image_size": 60}}, "60"),
        ({"backbone": {"weights": "nowhere.pth"}}, "nowhere.pth"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: dict[str, Any], part: str, frames: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=part):
        run(tiny(frames, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_folder_is_refused(frames: Path, finished: Path, tmp_path: Path) -> None:
    with (
        file_lock(tmp_path / "run.lock", "taken"),
        pytest.raises(InputError, match=f"another run writes {tmp_path}"),
    ):
        run(tiny(frames, tmp_path))
    run(tiny(frames, tmp_path))
    assert_same_bits(finished, tmp_path)


def test_another_recipe_batch_data_or_weights_are_refused_on_resume(frames: Path, tmp_path: Path) -> None:
    run(tiny(frames, tmp_path))
    with pytest.raises(InputError, match="resume=auto"):
        run(dataclasses.replace(tiny(frames, tmp_path), resume="never"))
    with pytest.raises(InputError, match=r"another recipe's run .*optimizer\.lr"):
        run(tiny(frames, tmp_path, optimizer={"lr": 0.2}))
    with pytest.raises(InputError, match=r"global_batch 4, this one has 3; .* that it began with"):
        run(tiny(frames, tmp_path, train={"batch_size": 3}))
    state = load_checkpoint(tmp_path / "checkpoints", 4)
    for key in ("data", "weights_hash"):
        save_checkpoint(tmp_path / "checkpoints", 4, {**state, key: "other"})
        with pytest.raises(InputError, match=f"{key} 'other', this one has"):
            run(tiny(frames, tmp_path))


def test_the_limit_of_bad_samples_is_a_share_of_what_was_seen() -> None:
    check_bad_fraction(10, 1000, 0.01, "x")
    check_bad_fraction(10, 30, 0.01, "x")
    with pytest.raises(InputError, match=r"11 of 1000 samples .* the last: x"):
        check_bad_fraction(11, 1000, 0.01, "x")
    with pytest.raises(InputError):
        check_bad_fraction(1, 30, 0.0, "x")
