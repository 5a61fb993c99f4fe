"""The estimate of a DAVIS evaluation: a whole evaluation runs, and the data set's time follows from it."""

from pathlib import Path

import pytest
import torch

from benchmarks import davis
from fasttrain.backbones import load_backbone
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.projection import Projection


def test_a_whole_evaluation_is_timed(tmp_path: Path) -> None:
    davis.write_sequence(tmp_path, 5, height=64, width=96)
    encoder = load_backbone("test_vit", weights="random")
    model = EvaluatedModel(
        encoder=encoder, projection=Projection(encoder.embed_dim), variants=("before", "after")
    )
    seconds = davis.measure(model, tmp_path, torch.device("cpu"), ["--height", "64", "--width", "96"])
    assert list(seconds) == ["warm-up", "plain", "drawn"]
    assert min(seconds.values()) > 0


def test_the_data_sets_time_follows_from_a_sequences() -> None:
    # 1,999 frames are 30 sequences of 66.6.
    seconds = {"plain": 1.0, "drawn": 3.0}
    assert davis.estimate(seconds, 1999, drawn=0) == pytest.approx(1.0)
    assert davis.estimate(seconds, 67, drawn=8) == pytest.approx(46 * 1999 / 2010)
