"""The package as another project meets it: operators, torch.compile and torch.export, copies, bad input."""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fasttrain_kernels
from fasttrain_kernels import (
    affinity_softmax,
    cosettle_head_loss,
    cosettle_loss,
    cycle_consistency_loss,
    separability_loss,
)

FOLDER = Path(fasttrain_kernels.__file__).parent


def run_python(code: str, *folders: Path) -> str:
    """Run a program in a process without the interpreter, with these folders first on its path."""
    program = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n{code}"
    environment = {"PATH": "", "HOME": str(folders[0] if folders else Path.home())}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def fused(frozen: Tensor, projected: Tensor) -> Tensor:
    return cosettle_loss(frozen, projected, (2, 2), backend="triton", diagnostics=False).loss


def fused_head(frozen: Tensor, linear: Tensor) -> Tensor:
    parameters = (frozen.new_ones(16), frozen.new_ones(16), frozen.new_zeros(16))
    return cosettle_head_loss(frozen, linear, *parameters, (2, 2), backend="triton").loss


def walk_there_and_back(frozen: Tensor, walk: Tensor) -> Tensor:
    return cycle_consistency_loss(walk, 0.1, there_and_back=True, backend="triton")


def separability(frozen: Tensor, projected: Tensor) -> Tensor:
    return separability_loss(frozen, projected, backend="triton")


@pytest.mark.parametrize("loss", [fused, fused_head, walk_there_and_back, separability])
def test_compile_sees_through(device: str, loss: Callable[..., Tensor]) -> None:
    frozen, projected = (torch.randn(1, 3, 4, 16, device=device) for _ in range(2))
    projected.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    truth, value = loss(frozen, projected), compiled(frozen, projected)
    assert torch.equal(value, truth)
    truth_grad, value_grad = (torch.autograd.grad(result, projected)[0] for result in (truth, value))
    assert torch.equal(value_grad, truth_grad)


def test_a_temperature_that_changes_compiles(device: str) -> None:
    """From its second value on torch.compile keeps a float dynamic."""

    def loss(frozen: Tensor, projected: Tensor, temperature: float) -> Tensor:
        options = {"temperature": temperature, "lambda_reg": temperature, "backend": "triton"}
        return cosettle_loss(frozen, projected, (2, 2), diagnostics=False, **options).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    frozen, projected = (torch.randn(1, 3, 4, 16, device=device) for _ in range(2))
    for temperature in (0.1, 0.2, 0.3):
        value, truth = (function(frozen, projected, temperature) for function in (compiled, loss))
        assert torch.allclose(value, truth)


def test_an_exported_program_keeps_the_operator(device: str, tmp_path: Path) -> None:
    class Loss(torch.nn.Module):
        def forward(self, frozen: Tensor, projected: Tensor) -> Tensor:
            return fused(frozen, projected)

    frozen, projected = (torch.randn(1, 3, 4, 16, device=device) for _ in range(2))
    torch.export.save(torch.export.export(Loss(), (frozen, projected)), tmp_path / "loss.pt2")
    program = torch.export.load(tmp_path / "loss.pt2")
    assert "fasttrain_kernels.cosettle" in str(program.graph)
    assert torch.equal(program.module()(frozen, projected), fused(frozen, projected))


def test_the_eager_loss_exports_without_its_diagnostics(tmp_path: Path) -> None:
    class Loss(torch.nn.Module):
        def forward(self, frozen: Tensor, projected: Tensor) -> Tensor:
            return cosettle_loss(frozen, projected, (2, 2), backend="eager").loss

    inputs = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 4, 16)
    torch.export.save(torch.export.export(Loss(), inputs), tmp_path / "loss.pt2")
    assert torch.equal(torch.export.load(tmp_path / "loss.pt2").module()(*inputs), Loss()(*inputs))


def affinity(frozen: Tensor, tokens: Tensor) -> Tensor:
    return affinity_softmax(tokens[:, 0], tokens[:, 1], 0.1, backend="triton").square().sum()


@pytest.mark.parametrize("loss", [fused, fused_head, walk_there_and_back, separability])
def test_a_program_exported_without_gradients_refuses_them(device: str, loss: Callable[..., Tensor]) -> None:
    """Its backward would read statistics that the forward never wrote."""

    class Loss(torch.nn.Module):
        def forward(self, frozen: Tensor, projected: Tensor) -> Tensor:
            return loss(frozen, projected)

    views = 2 if loss is walk_there_and_back else 3
    frozen, projected = (torch.randn(1, views, 4, 16, device=device) for _ in range(2))
    program = torch.export.export(Loss(), (frozen, projected)).module()
    with pytest.raises(RuntimeError, match="kept nothing for its backward"):
        program(frozen, projected.requires_grad_()).backward()
    trained = torch.export.export(Loss(), (frozen, projected)).module()
    value, truth = (
        torch.autograd.grad(function(frozen, projected), projected)[0] for function in (trained, loss)
    )
    assert torch.equal(value, truth)


@pytest.mark.parametrize("loss", [fused, fused_head, walk_there_and_back, separability])
def test_second_derivatives_are_errors(device: str, loss: Callable[..., Tensor]) -> None:
    """Also where the gradient from above is a constant; a gradient penalty would be silently wrong."""
    views = 2 if loss is walk_there_and_back else 3
    frozen, projected = (torch.randn(1, views, 4, 16, device=device) for _ in range(2))
    projected.requires_grad_()
    total = loss(frozen, projected) + projected.square().sum()
    (gradient,) = torch.autograd.grad(total, projected, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("loss", [fused, fused_head, walk_there_and_back, separability, affinity])
def test_forward_mode_is_an_error(device: str, loss: Callable[..., Tensor]) -> None:
    """An operator would drop the tangent, and the derivative be zero."""
    frozen, projected = (torch.randn(1, 3, 4, 16, device=device) for _ in range(2))
    with pytest.raises(ValueError, match="must have no forward-mode tangent for backend 'triton'"):
        torch.func.jvp(lambda tokens: loss(frozen, tokens), (projected,), (torch.ones_like(projected),))


@pytest.mark.parametrize("loss", [fused, fused_head, walk_there_and_back, separability, affinity])
def test_no_gradient_from_above_is_none_below(device: str, loss: Callable[..., Tensor]) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    views = 2 if loss is walk_there_and_back else 3
    frozen, projected = (torch.randn(1, views, 4, 16, device=device) for _ in range(2))
    Stop.apply(loss(frozen, projected.requires_grad_())).backward()
    assert projected.grad is None or not projected.grad.any()


def test_operators_pass_opcheck(device: str) -> None:
    def tokens(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    operators = torch.ops.fasttrain_kernels
    parameters = [tokens(16) for _ in range(3)]
    frozen = tokens(1, 3, 4, 16).detach()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in [
        (
            operators.cosettle,
            (tokens(1, 3, 4, 16), frozen, *parameters, 1e-5, True, 2, 2, 2, 0.1, True, True, True),
        ),
        (operators.separability, (tokens(1, 3, 4, 16), frozen, True, True)),
        (operators.affinity_softmax, (tokens(1, 3, 16), tokens(1, 4, 16), 0.1)),
        (operators.cycle_three_views, (tokens(1, 3, 4, 16), 0.1, True)),
        # Without gradient and diagnostics the outputs for them are empty.
        (
            operators.cosettle,
            (frozen, frozen, None, None, None, 0.0, False, 2, 2, 2, 0.1, False, False, False),
        ),
        (operators.separability, (frozen, frozen, False, False)),
        (operators.cycle_three_views, (frozen.bfloat16(), 0.1, False)),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_a_second_registration_replaces_the_first(device: str) -> None:
    module = importlib.reload(importlib.import_module("fasttrain_kernels.separability"))
    frozen, projected = torch.randn(1, 1, 2, 8, device=device), torch.randn(1, 1, 2, 8, device=device)
    assert torch.equal(
        module.separability_loss(frozen, projected, backend="triton"),
        separability_loss(frozen, projected, backend="triton"),
    )


def test_a_second_import_replaces_the_first(tmp_path: Path) -> None:
    """As a notebook does that clears sys.modules, or a test that wants the package afresh."""
    code = """
import sys, torch, fasttrain_kernels
first = fasttrain_kernels.cosettle_loss
for name in [name for name in sys.modules if name.startswith("fasttrain_kernels")]:
    del sys.modules[name]
import fasttrain_kernels
frozen, projected = torch.randn(2, 1, 3, 4, 8)
assert fasttrain_kernels.cosettle_loss is not first
print(fasttrain_kernels.cosettle_loss(frozen, projected, (2, 2)).loss.item()
      == first(frozen, projected, (2, 2)).loss.item())
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    assert run_python(code, tmp_path).strip() == "True"


def test_a_copy_under_another_name_stands_beside_the_original(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "their_losses", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import torch, fasttrain_kernels, their_losses
assert torch.ops.their_losses.cosettle is not torch.ops.fasttrain_kernels.cosettle
frozen, projected = torch.randn(2, 1, 3, 4, 8)
print(their_losses.cosettle_loss(frozen, projected, (2, 2)).loss.item()
      == fasttrain_kernels.cosettle_loss(frozen, projected, (2, 2)).loss.item())
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    assert run_python(code, tmp_path).strip() == "True"


def test_works_without_triton(tmp_path: Path) -> None:
    code = """
import sys, torch
sys.modules["triton"] = None
from fasttrain_kernels import cosettle_loss
frozen, projected = torch.randn(2, 1, 3, 4, 8)
assert cosettle_loss(frozen, projected, (2, 2)).loss.isfinite()
try:
    cosettle_loss(frozen, projected, (2, 2), backend="triton")
except ValueError as error:
    print(error)
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    assert "needs the package triton" in run_python(code, tmp_path)


def test_triton_says_why_it_cannot_run_on_the_cpu(tmp_path: Path) -> None:
    code = """
import torch
from fasttrain_kernels import cosettle_loss
frozen, projected = torch.randn(2, 1, 3, 4, 8)
try:
    cosettle_loss(frozen, projected, (2, 2), backend="triton")
except ValueError as error:
    print(error)
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    expected = (
        "frozen must be on an NVIDIA GPU of compute capability 8.0 or newer for backend 'triton', got cpu"
    )
    assert expected in run_python(code, tmp_path)


def test_the_choice_of_the_backend_compiles(tmp_path: Path) -> None:
    code = """
import torch
from fasttrain_kernels import cosettle_loss
compiled = torch.compile(cosettle_loss, backend="aot_eager", fullgraph=True)
frozen, projected = torch.randn(2, 1, 3, 4, 8)
print(torch.allclose(compiled(frozen, projected, (2, 2)).loss, cosettle_loss(frozen, projected, (2, 2)).loss))
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    assert run_python(code, tmp_path).strip() == "True"


# 86 and 120: the cards of desktop machines, with less shared memory (CUDA programming guide).
@pytest.mark.parametrize(
    ("architecture", "cores", "shared_kib"),
    [(80, "mma", 163), (86, "mma", 99), (90, "wgmma", 227), (100, "tcgen05", 227), (120, "mma", 99)],
)
def test_compiles_without_spilling_at_the_papers_shape(
    architecture: int, cores: str, shared_kib: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    code = f"""
import torch
from benchmarks.kernel_resources import compile_launch, launches_at, resources
cases = launches_at(768, torch.bfloat16, {architecture})
for name in ("head forward", "head backward", "cycle"):
    for launch in cases[name]:
        found = resources(compile_launch(launch, {architecture}))
        fits = found["shared_bytes"] <= {shared_kib} * 1024
        print(name, found["spill_bytes"], found["tensor_cores"], fits)
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    lines = run_python(code, tmp_path, FOLDER.parent).splitlines()
    assert lines == ["head forward 0 None True", "head backward 0 None True", f"cycle 0 {cores} True"]


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_the_recorded_tables_have_no_spills_at_the_papers_shape(version: str) -> None:
    path = FOLDER.resolve().parent / "benchmarks" / "results" / "kernels_compile.json"
    if not path.is_file():
        pytest.skip(f"needs {path}, which an installed package does not have")
    tables = json.loads(path.read_text(encoding="utf-8"))["triton"]
    (table,) = (table for name, table in tables.items() if name.startswith(version))
    rows = table["kernels"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    spilled = [row for row in rows if row["spill_bytes"]]
    at_49_tokens = [row for row in spilled if row["case"] != "streaming"]
    assert [row for row in at_49_tokens if (row["channels"], row["dtype"]) == (768, "bfloat16")] == []
    # Elsewhere a few registers at most, which buy the compiler a second block on a multiprocessor.
    assert all(row["spill_bytes"] <= 32 for row in spilled)


GOOD = torch.randn(1, 3, 4, 8)
BAD_LOSS = {
    "frozen must have the non-empty shape": {"frozen": GOOD[0]},
    "frozen must be a tensor, got list": {"frozen": GOOD.tolist()},
    "frozen must be float16": {"frozen": GOOD.long()},
    "projected must be float16, bfloat16, float32 or float64, got torch.int8": {
        "projected": GOOD.to(torch.int8),
        "backend": "triton",
    },
    "frozen must hold 3 views": {"frozen": GOOD[:, :2], "projected": GOOD[:, :2]},
    "projected must have the shape of frozen": {"projected": GOOD[..., :7]},
    "projected must be on the device of frozen": {"projected": GOOD.to("meta")},
    "grid must be two positive integers": {"grid": (4,)},
    "grid must have h . w == N == 4 cells": {"grid": (3, 2)},
    "window must be an integer from 1 to 2, the grid's shorter side, got 3": {"window": 3},
    "window must be an integer from 1 to 2, the grid's shorter side, got 0": {"window": 0},
    "window must be an integer from 1 to 2, the grid's shorter side, got 2.0": {"window": 2.0},
    "temperature must be a finite number above 0, got 0": {"temperature": 0},
    "temperature must be a finite number above 0, got -0.03": {"temperature": -0.03},
    "temperature must be a finite number above 0, got nan": {"temperature": float("nan")},
    "temperature must be a finite number above 0, got '0.03'": {"temperature": "0.03"},
    "lambda_reg must be a finite number": {"lambda_reg": -1.0},
    "regularizer must be one of kl, mse, got 'l1'": {"regularizer": "l1"},
    "backend must be one of auto, triton, eager, got 'cuda'": {"backend": "cuda"},
    "frozen must be float16, bfloat16 or float32 for backend": {"frozen": GOOD.double(), "backend": "triton"},
    "projected must be float16, bfloat16 or float32 for backend": {
        "projected": GOOD.double(),
        "backend": "triton",
    },
}


@pytest.mark.parametrize("message", BAD_LOSS)
def test_bad_input_of_the_loss(message: str) -> None:
    arguments = {"frozen": GOOD, "projected": GOOD, "grid": (2, 2), **BAD_LOSS[message]}
    with pytest.raises(ValueError, match=message):
        cosettle_loss(**arguments)


def test_bad_input_of_the_parts() -> None:
    parameter = torch.ones(8)
    with pytest.raises(ValueError, match="norm_weight must have the 8 channels of linear"):
        cosettle_head_loss(GOOD, GOOD, parameter, parameter[:7], parameter, (2, 2))
    with pytest.raises(ValueError, match="bias must be on the device of linear, cpu, got meta"):
        cosettle_head_loss(GOOD, GOOD, parameter.to("meta"), parameter, parameter, (2, 2))
    with pytest.raises(ValueError, match="norm_eps must be a finite number, 0 or more, got -1"):
        cosettle_head_loss(GOOD, GOOD, parameter, parameter, parameter, (2, 2), norm_eps=-1.0)
    with pytest.raises(ValueError, match="linear must have the shape of frozen"):
        cosettle_head_loss(GOOD, GOOD[:, :2], parameter, parameter, parameter, (2, 2))
    with pytest.raises(
        ValueError, match=r"walk must have the non-empty shape \(B, T, M, D\), got \(3, 4, 8\)"
    ):
        cycle_consistency_loss(GOOD[0])
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got inf"):
        cycle_consistency_loss(GOOD, float("inf"))
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        affinity_softmax(GOOD[:, 0], GOOD[:, 1], 0)
    with pytest.raises(ValueError, match="key must be on the device of query, cpu, got meta"):
        affinity_softmax(GOOD[:, 0], GOOD[:, 1].to("meta"))
    with pytest.raises(ValueError, match="regularizer must be one of kl, mse, got None"):
        separability_loss(GOOD, GOOD, None)
    with pytest.raises(ValueError, match="walk must hold 2 views or more"):
        cycle_consistency_loss(GOOD[:, :1])
    with pytest.raises(ValueError, match="key must have the B == 1, D == 8 and dtype"):
        affinity_softmax(GOOD[:, 0], GOOD[:, 0].double())
    with pytest.raises(ValueError, match="projected must have the shape"):
        separability_loss(GOOD, GOOD[:, :2])
