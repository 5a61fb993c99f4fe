"""Tests of the results of evaluations: their files, the table, and how their metrics are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_backbone

from fasttrain.evaluation.results import (
    better,
    distinguish,
    meaning,
    print_others,
    print_table,
    read_result,
    result_path,
    write_results,
)
from fasttrain.projection import Projection
