"""Tests of the layout of the Hugging Face kernel hub, without the package `kernels` that loads it."""

import subprocess
import sys
from pathlib import Path

import pytest

import fasttrain_kernels
from tests.kernels.test_operators import run_python

FOLDER = Path(fasttrain_kernels.__file__).parent


def lay_out(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / "hub/layout.py", output]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_copy_of_the_folder_has_the_license() -> None:
    assert (FOLDER / "LICENSE").read_bytes() == (FOLDER.parent / "LICENSE").read_bytes()


def test_two_variants_and_the_original_in_one_process(tmp_path: Path) -> None:
    output = tmp_path / "hub"
    lay_out(output).check_returncode()
    sources = {path.name: path.read_bytes() for path in FOLDER.glob("*.py")}
    copied = output / "torch-ext/fasttrain_kernels"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == sources
    # Import as `kernels` does: under the id in metadata.json.
    code = f"""
import base64, hashlib, importlib.util, json, sys, torch, fasttrain_kernels
from pathlib import Path

def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]

def loss_and_gradient(package):
    frozen, projected = torch.ones(1, 3, 4, 8), torch.arange(96.0).reshape(1, 3, 4, 8).requires_grad_()
    loss = package.cosettle_loss(frozen, projected, (2, 2)).loss
    loss.backward()
    return loss.item(), projected.grad.tolist()

truth = loss_and_gradient(fasttrain_kernels)
for backend in ("cpu", "cuda"):
    folder = Path({str(output)!r}) / "build" / f"torch-{{backend}}"
    metadata = json.loads((folder / "metadata.json").read_text())
    files = {{path.name: path.read_bytes() for path in folder.glob("*.py")}}
    digests = {{name: base64.b64encode(hashlib.sha256(files[name]).digest()).decode() for name in files}}
    package = load(metadata["id"], folder)
    print(
        metadata["id"].startswith(f"_fasttrain_kernels_{{backend}}_"),
        metadata["digest"] == {{"algorithm": "sha256", "files": digests}},
        loss_and_gradient(package) == truth,
        getattr(torch.ops, metadata["id"]).cosettle is not torch.ops.fasttrain_kernels.cosettle,
    )
print(loss_and_gradient(load("2-losses", folder)) == truth, hasattr(torch.ops._2_losses, "cosettle"))
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    assert run_python(code, tmp_path).splitlines() == [*["True True True True"] * 2, "True True"]


def test_the_id_changes_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER / "hub")
    import layout

    changed = tmp_path / "checks.py"
    general = {"name": "fasttrain-kernels", "version": 0, "license": "Apache-2.0"}
    identifiers = set()
    for text in ("a = 1", "a = 1", "a = 2"):
        changed.write_text(text)
        monkeypatch.setattr(layout, "SOURCES", [changed])
        identifiers.add(layout.metadata(general, "cuda")["id"])
    assert len(identifiers) == 2


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    result = lay_out(tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path} exists. Name a new folder, or delete this one." in result.stderr
