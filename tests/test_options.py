"""The options, whose module repeats some names so that it need not import their definitions."""

from fasttrain import options
from fasttrain.configuration import ACTIVATIONS
from fasttrain.evaluation.datasets import _LAYOUTS
from fasttrain.evaluation.metrics import TEMPORAL_IOU


def test_choices_are_those_of_the_modules_that_define_them() -> None:
    assert set(options.ACTIVATIONS) == set(ACTIVATIONS)
    assert {*options.LAYOUTS, "frames"} == set(_LAYOUTS)
    assert set(options.TEMPORAL_IOU) == set(TEMPORAL_IOU)
