"""Fixtures and hooks of the whole test suite."""

import resource
from collections.abc import Generator, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from hypothesis import settings

# Hypothesis generates the same examples in every run and on every machine.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

FILE_SIZE_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real videos next to the checkout; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data in {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hugging Face Hub with an empty cache. The user is logged in."""
    constants = huggingface_hub.constants
    with Hub().running() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def no_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile trace functions, but run the graphs in eager mode: to generate code takes seconds."""
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, options=None, **others: compile(function, backend="eager", **others),
    )


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let every write to a file fail, by a limit on the size of files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, FILE_SIZE_LIMIT[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE_LIMIT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """End `full_disk` before pytest writes the outcome of the test, which may be to a file."""
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE_LIMIT)


# Packages that may be missing on a GPU machine on which fasttrain is not installed.
OPTIONAL = (
    *("av", "matplotlib", "nvidia", "nvidia.dali", "pydantic", "rich", "scipy"),
    *("imageio_ffmpeg", "moto", "onnxruntime", "s3fs", "transformers", "webdataset"),
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip test files whose optional dependencies are missing."""
    report = yield
    missing = [
        name for name in OPTIONAL if f"ModuleNotFoundError: No module named '{name}'" in str(report.longrepr)
    ]
    if report.failed and missing:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"needs the package {missing[-1]}, which is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # Keywords would also contain the names of folders, such as that of the checkout.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
