"""The options, whose module repeats some names so that it need not import their definitions."""

import pytest

from fasttrain import options
from fasttrain.evaluation.datasets import _LAYOUTS
from fasttrain.evaluation.metrics import TEMPORAL_IOU


def test_choices_are_those_of_the_modules_that_define_them() -> None:
    assert {*options.LAYOUTS, "frames"} == set(_LAYOUTS)
    assert set(options.TEMPORAL_IOU) == set(TEMPORAL_IOU)


def test_help_names_the_defaults_of_options_that_have_one() -> None:
    text = options.new_parser("pack").format_help()
    assert "(default: 256)" in text
    assert "uses one per core (default: 0)" in " ".join(text.split())
    assert "default: None" not in text
    assert "default: False" not in text


def test_an_unknown_option_of_a_task_is_answered_with_the_usage_of_the_task(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.new_parser("eval").parse_args(["davis", "--root", "d", "--run", "r", "--unknown"])
    error = capsys.readouterr().err
    assert error.startswith("usage: fasttrain eval davis [-h] --root DATASET")
    assert error.endswith("fasttrain eval davis: error: unrecognized arguments: --unknown\n")
