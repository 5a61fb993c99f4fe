"""Fixtures for the whole suite: the shared reference data, where this checkout has it."""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A run of the suite is a function of the code: the same examples on every machine.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real videos beside the checkout; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data at {SHARED}, which this machine does not have")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another, or the user, has cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# A machine that only lends its GPU may lack these; elsewhere they are installed with the project.
SPARED = ("av", "matplotlib", "nvidia", "nvidia.dali", "pydantic", "rich", "scipy")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip the files that need what is absent, so that the others still run."""
    report = yield
    absent = [
        name for name in SPARED if f"ModuleNotFoundError: No module named '{name}'" in str(report.longrepr)
    ]
    if report.failed and absent:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"needs the package {absent[-1]}, which is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
