"""The comparison of variants of the method: folds, paired differences, and a run of some variants."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import method
from fasttrain.evaluation.frames import write_label_map
from tests.synthetic import make_scene, write_frames


def test_the_differences_are_paired_by_sequence() -> None:
    frozen = {"sequences": {"J": {"a": 0.2, "b": 0.9, "c": 0.5}}}
    result = {"sequences": {"J": {"a": 0.3, "b": 0.9, "c": 0.4}}}
    method.compare(result, frozen, [["a", "b"], ["c"]])
    difference = result["J_difference"]
    assert difference["mean"] == pytest.approx(0.0, abs=1e-9)
    assert difference["folds"] == pytest.approx([5.0, -10.0])
    assert difference["least"] == pytest.approx(-10.0)
    low, high = difference["interval"]
    assert -10 <= low < 0 < high <= 10


def test_only_variants_of_the_published_method_start_at_random() -> None:
    bench: Any = SimpleNamespace(backbone={"name": "mae"}, root=Path("davis"), steps=1)
    starts = {
        name: variant.start or method.Bench.recipe(bench, variant.recipe).projection.init
        for name, variant in method.TRAINED.items()
    }
    assert {name for name, start in starts.items() if start == "published"} == {
        "published",
        "published, keep the best",
    }


def test_a_projection_is_evaluated_on_other_sequences_than_it_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "davis"
    for seed, name in enumerate("abcd"):
        scene = make_scene(seed, 20)
        write_frames(scene, root / "JPEGImages" / name)
        for number, labels in enumerate(scene.labels_THW):
            write_label_map(labels, root / "Annotations" / name / f"{number:05d}.png")
    for constant, value in {"FOLDS": 2, "SAMPLES": 8, "EVALUATED": 8, "SHORT_SIDE": 64}.items():
        monkeypatch.setattr(method, constant, value)
    learned: list[list[str]] = []
    monkeypatch.setattr(
        method.Bench,
        "split",
        lambda self, names: learned.append(list(names)) or (list(names[1:]), list(names[:1])),
    )
    out = tmp_path / "result.json"
    only = [method.CHOSEN, "start frozen, keep the best", "3 frames, curriculum"]
    encoder = ["test_vit", "random"]
    method.main([*encoder, str(root), "--short", "--device", "cpu", "--out", str(out), "--only", *only])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert list(content["variants"]) == ["frozen", *only]
    assert content["variants"]["frozen"]["J_difference"]["mean"] == 0
    assert learned == [["b", "d"], ["a", "c"]] * 2
    for result in content["variants"].values():
        assert set(result["sequences"]["J"]) == set("abcd")
        assert all(0 <= value <= 1 for value in result["sequences"]["J"].values())
