"""The demo, with fewer steps and smaller frames than by default."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fasttrain.__main__ import main
from fasttrain.evaluation.results import Model, Result, with_difference
from fasttrain.tools import demo


def test_the_demo_trains_evaluates_and_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SIZE", ("--height", "56", "--width", "112", "--pictures", "1"))
    # Version 0.1.0 left its clips there, and an earlier version of the package may have had other files.
    Path("data/demo/videos").mkdir(parents=True)
    shutil.copy(demo.PACKAGED / "held_out" / "goat.mp4", "data/demo/videos/scene_000.mp4")
    Path("data/demo/vit_tiny_patch14.safetensors").write_bytes(b"outdated")
    assert main(["demo", "train.steps=2", "train.batch_size=2", "train.tensorboard=false"]) == 0
    out = capsys.readouterr().out
    assert "5 videos" in out
    results = {
        path.name.split("-")[0]: json.loads(path.read_text()) for path in Path("runs").rglob("eval/*.json")
    }
    assert set(results) == {"davis", "consistency"}
    for clip, by_variant in results["davis"]["per_sequence"].items():
        assert (
            f"{by_variant['after']['1']['J']['mean']:.4f}" in out.partition(f"J of {clip}")[2].splitlines()[0]
        )
    # The commands that the demo prints can be repeated.
    assert "fasttrain eval consistency --run runs/quickstart --root data/demo/held_out" in out
    assert Path("runs/quickstart/report.html").is_file()


def test_the_table_names_what_became_worse(capsys: pytest.CaptureFixture[str]) -> None:
    def result(task: str, **metrics: tuple[float, float]) -> Result:
        results = {
            variant: {name.replace("Mean", "-Mean"): values[number] for name, values in metrics.items()}
            for number, variant in enumerate(("before", "after"))
        }
        model = Model(backbone="dinov2", weights="w")
        by_clip = {"goat": {variant: {"J": value} for variant, value in (("before", 0.5), ("after", 0.4))}}
        return Result(
            task=task, model=model, pictures=[], results=with_difference(results), per_sequence=by_clip
        )

    analysis = {
        f"{kind}_{name}": (1.0, 2.0) for kind in ("intra", "inter") for name in ("original", "diameter_95")
    }
    demo.print_results(
        result("davis", JMean=(0.5, 0.6), FMean=(0.5, 0.5)),
        result(
            "consistency",
            **analysis,
            cycle_accuracy=(0.5, 0.4),
            intra_normalized_95=(0.2, 0.3),
            inter_normalized_95=(0.6, 0.7),
            effective_rank=(0.5, 0.6),
        ),
    )
    out = capsys.readouterr().out
    assert "J is higher after the projection on 0 of 1 clips.\nFive clips are little video" in out
    assert "Worse after the projection: cycle_accuracy, intra_normalized_95.\n" in out


def test_the_clips_are_unpacked_in_the_layout_of_davis(tmp_path: Path) -> None:
    demo.unpack(tmp_path)
    davis = tmp_path / "DAVIS"
    for name in (davis / "ImageSets/2017/val.txt").read_text().split():
        frames = sorted((davis / "JPEGImages/480p" / name).iterdir())
        masks = sorted((davis / "Annotations/480p" / name).iterdir())
        assert [path.stem for path in frames] == [path.stem for path in masks]
        assert Image.open(frames[-1]).size == Image.open(masks[-1]).size == (426, 240)
        # Held-out clips are not among the training clips.
        assert (tmp_path / "held_out" / f"{name}.mp4").exists()
        assert not (tmp_path / "training" / f"{name}.mp4").exists()
