"""Tests of the public functions with torch.compile, torch.export, autograd, copies and invalid arguments."""

import inspect
import re
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
    CosettleLoss,
    affinity_softmax,
    cosettle_head_loss,
    cosettle_loss,
    cycle_consistency_loss,
    separability_loss,
)

FOLDER = Path(fasttrain_kernels.__file__).parent
Loss = Callable[[Tensor, Tensor], Tensor]


def run_python(code: str, *folders: Path) -> str:
    """Run a program in a new process, without Triton's interpreter and with `folders` first on sys.path."""
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


def mask_of(tokens: Tensor) -> Tensor:
    """A mask (1, N) of all tokens but the last."""
    return torch.arange(tokens.shape[2], device=tokens.device)[None] < tokens.shape[2] - 1


def masked(frozen: Tensor, projected: Tensor) -> Tensor:
    options = {"mask": mask_of(frozen), "backend": "triton", "diagnostics": False}
    return cosettle_loss(frozen, projected, (2, 2), window=1, **options).loss


def masked_walk(frozen: Tensor, walk: Tensor) -> Tensor:
    return cycle_consistency_loss(walk, 0.1, backend="triton", mask=mask_of(walk))


def masked_separability(frozen: Tensor, projected: Tensor) -> Tensor:
    return separability_loss(frozen, projected, "mse", backend="triton", mask=mask_of(frozen))


LOSSES = [
    *(fused, fused_head, walk_there_and_back, separability),
    *(masked, masked_walk, masked_separability),
]


def inputs_of(loss: Loss, device: str) -> tuple[Tensor, Tensor]:
    """Frozen and projected tokens of three views (of two for the walk there and back, which visits three)."""
    frozen, projected = torch.randn(2, 1, 2 if loss is walk_there_and_back else 3, 4, 16, device=device)
    return frozen, projected.clone()


@pytest.mark.parametrize("loss", LOSSES)
def test_torch_compile_gives_the_same_loss_and_gradient(device: str, loss: Loss) -> None:
    frozen, projected = inputs_of(loss, device)
    projected.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    truth, value = loss(frozen, projected), compiled(frozen, projected)
    assert torch.equal(value, truth)
    truth_grad, value_grad = (torch.autograd.grad(result, projected)[0] for result in (truth, value))
    assert torch.equal(value_grad, truth_grad)


def test_the_module_passes_its_options_to_the_function(device: str) -> None:
    frozen, projected = torch.randn(2, 2, 3, 9, 8, device=device)
    options = {"temperature": 0.1, "window": 3, "lambda_reg": 0.5, "regularizer": "mse", "reduction": "none"}
    module = CosettleLoss(**options, backend="triton", diagnostics=False)
    mask = torch.arange(9, device=device).expand(2, 9) > 3
    value = module(frozen, projected, (3, 3), mask)
    options |= {"backend": "triton", "diagnostics": False, "mask": mask}
    truth = cosettle_loss(frozen, projected, (3, 3), **options)
    assert all(torch.equal(*losses) for losses in zip(value[:3], truth[:3], strict=True))
    assert value.cycle_accuracy is None
    with pytest.raises(ValueError, match="backend must be one of"):
        CosettleLoss(backend="cuda")(frozen, projected, (3, 3))


def test_the_defaults_of_the_module_are_those_of_the_function() -> None:
    defaults = inspect.signature(cosettle_loss).parameters
    for name, parameter in inspect.signature(CosettleLoss).parameters.items():
        assert parameter.default == defaults[name].default, name


def test_the_module_prints_its_options() -> None:
    module = CosettleLoss(window=1, regularizer="mse", backend="eager", diagnostics=False)
    options = "temperature=0.03, window=1, lambda_reg=3.0, regularizer='mse', backend='eager'"
    assert repr(module) == f"CosettleLoss({options}, reduction='mean', diagnostics=False)"


def test_torch_compile_supports_a_changing_temperature(device: str) -> None:
    """torch.compile makes a float dynamic when it changes for the first time."""

    def loss(frozen: Tensor, projected: Tensor, temperature: float) -> Tensor:
        options = {"temperature": temperature, "lambda_reg": temperature, "backend": "triton"}
        return cosettle_loss(frozen, projected, (2, 2), diagnostics=False, **options).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    frozen, projected = (torch.randn(1, 3, 4, 16, device=device) for _ in range(2))
    for temperature in (0.1, 0.2, 0.3):
        value, truth = (function(frozen, projected, temperature) for function in (compiled, loss))
        assert torch.allclose(value, truth)


class AsModule(torch.nn.Module):
    """Wrap a loss in a module, as torch.export requires."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, frozen: Tensor, projected: Tensor) -> Tensor:
        return self.loss(frozen, projected)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_an_exported_program_gives_the_same_loss_for_any_batch_size(
    device: str, backend: str, tmp_path: Path
) -> None:
    loss = AsModule(lambda *tokens: cosettle_loss(*tokens, (2, 2), backend=backend).loss)
    small, large = (tuple(torch.randn(2, batch, 3, 4, 16, device=device)) for batch in (2, 5))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(loss, small, dynamic_shapes={"frozen": batch, "projected": batch})
    torch.export.save(program, tmp_path / "loss.pt2")
    program = torch.export.load(tmp_path / "loss.pt2")
    assert ("fasttrain_kernels.cosettle" in str(program.graph)) == (backend == "triton")
    for inputs in (small, large):
        assert torch.equal(program.module()(*inputs), loss(*inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_backward_of_a_program_exported_without_gradients_is_an_error(device: str, loss: Loss) -> None:
    """The backward would read statistics that the forward did not write."""
    frozen, projected = inputs_of(loss, device)
    program = torch.export.export(AsModule(loss), (frozen, projected)).module()
    with pytest.raises(RuntimeError, match="saved nothing for the backward pass"):
        program(frozen, projected.requires_grad_()).backward()
    trained = torch.export.export(AsModule(loss), (frozen, projected)).module()
    value, truth = (
        torch.autograd.grad(function(frozen, projected), projected)[0] for function in (trained, loss)
    )
    assert torch.equal(value, truth)


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_are_errors(device: str, loss: Loss) -> None:
    """Otherwise a gradient penalty would be silently wrong, because the incoming gradient is a constant."""
    frozen, projected = inputs_of(loss, device)
    projected.requires_grad_()
    total = loss(frozen, projected) + projected.square().sum()
    (gradient,) = torch.autograd.grad(total, projected, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_differentiation_is_an_error(device: str, loss: Loss) -> None:
    """Otherwise the operator would drop the tangent, and the derivative would be zero."""
    frozen, projected = inputs_of(loss, device)
    with pytest.raises(ValueError, match="backend='triton' does not support forward-mode"):
        torch.func.jvp(lambda tokens: loss(frozen, tokens), (projected,), (torch.ones_like(projected),))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_undefined_incoming_gradient_gives_no_gradient(device: str, loss: Loss) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    frozen, projected = inputs_of(loss, device)
    Stop.apply(loss(frozen, projected.requires_grad_())).backward()
    assert projected.grad is None or not projected.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_replayed_cuda_graph_gives_the_same_gradient(loss: Loss) -> None:
    frozen, projected = inputs_of(loss, "cuda")
    projected.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(frozen, projected), projected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(frozen, projected)
        (gradient,) = torch.autograd.grad(value, projected)
    with torch.no_grad():
        projected.copy_(torch.randn_like(projected))
    graph.replay()
    truth = loss(frozen, projected)
    assert torch.equal(value, truth)
    assert torch.equal(gradient, torch.autograd.grad(truth, projected)[0])


def test_operators_pass_opcheck(device: str) -> None:
    def tokens(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    operators = torch.ops.fasttrain_kernels
    parameters = [tokens(16) for _ in range(3)]
    frozen = tokens(1, 3, 4, 16).detach()
    weights = torch.tensor([[4.0, 4.0, 0.0, 4.0]], device=device) / 3
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in [
        (
            operators.cosettle,
            (
                tokens(1, 3, 4, 16),
                frozen,
                *parameters,
                weights,
                weights[:, :1],
                1e-5,
                True,
                2,
                2,
                2,
                2,
                True,
                True,
                0.1,
                3.0,
                True,
                True,
            ),
        ),
        (operators.separability, (tokens(1, 3, 4, 16), frozen, weights, True, True, True)),
        (operators.cycle_three_views, (tokens(1, 3, 4, 16), weights, 0.1, True, True)),
        # The outputs for the gradient and the diagnostics are empty if they are not requested.
        (
            operators.cosettle,
            (
                *(frozen, frozen, None, None, None, None, None, 0.0, False),
                *(2, 2, 2, 2, False, False, 0.1, 3.0, False, False),
            ),
        ),
        (operators.separability, (frozen, frozen, None, False, False, False)),
        (operators.cycle_three_views, (frozen.bfloat16(), None, 0.1, False, False)),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_use_in_another_project(tmp_path: Path) -> None:
    """All checks run in one process, because importing torch takes seconds. Each prints its result."""
    code = """
import sys, torch, fasttrain_kernels, their_losses
frozen, projected = torch.randn(2, 1, 3, 4, 8)

def loss(package):
    return package.cosettle_loss(frozen, projected, (2, 2)).loss.item()

truth = loss(fasttrain_kernels)
assert torch.ops.their_losses.cosettle is not torch.ops.fasttrain_kernels.cosettle
print("a copy and the original in one process:", loss(their_losses) == truth)
compiled = torch.compile(fasttrain_kernels.cosettle_loss, backend="aot_eager", fullgraph=True)
value = compiled(frozen, projected, (2, 2)).loss.item()
print("torch.compile with backend auto:", abs(value - truth) < 1e-5)

def error_of(package):
    try:
        package.cosettle_loss(frozen, projected, (2, 2), backend="triton")
    except ValueError as error:
        return error

print("on the CPU:", error_of(fasttrain_kernels))
# Some notebooks and tests clear sys.modules to reload a package.
first = fasttrain_kernels
for name in [name for name in sys.modules if name.startswith("fasttrain_kernels")]:
    del sys.modules[name]
import fasttrain_kernels
assert fasttrain_kernels.cosettle_loss is not first.cosettle_loss
print("a second import replaces the first:", loss(fasttrain_kernels) == loss(first) == truth)
sys.modules["triton"].__version__ = "3.2.0"
import old_triton
print("with an old Triton:", loss(old_triton) == truth, old_error := error_of(old_triton))
sys.modules["triton"] = None
import without_triton
print("without Triton:", loss(without_triton) == truth, str(error_of(without_triton)) == str(old_error))
"""
    (tmp_path / "fasttrain_kernels").symlink_to(FOLDER)
    for name in ("their_losses", "old_triton", "without_triton"):
        shutil.copytree(FOLDER, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert run_python(code, tmp_path).splitlines() == [
        "a copy and the original in one process: True",
        "torch.compile with backend auto: True",
        "on the CPU: frozen must be on an NVIDIA GPU of compute capability 8.0 or higher or an AMD GPU "
        "(gfx90a, gfx942) for backend='triton', got cpu. Move it, or pass backend='eager'.",
        "a second import replaces the first: True",
        "with an old Triton: True backend='triton' needs Triton 3.3 or newer, as installed by PyTorch 2.7 or "
        "newer for CUDA. Install it, or pass backend='eager'.",
        "without Triton: True True",
    ]


GOOD = torch.randn(1, 3, 4, 8)
HEAD = {"linear": GOOD, "bias": torch.ones(8), "norm_weight": torch.ones(8), "norm_bias": torch.ones(8)}


def loss(**changed: object) -> None:
    cosettle_loss(**{"frozen": GOOD, "projected": GOOD, "grid": (2, 2), **changed})


def head_loss(**changed: object) -> None:
    cosettle_head_loss(**{"frozen": GOOD, **HEAD, "grid": (2, 2), **changed})


@pytest.mark.parametrize(
    ("message", "call", "arguments"),
    [
        (
            "frozen must be a non-empty tensor of shape (B, 3, N, D), got (3, 4, 8)",
            loss,
            {"frozen": GOOD[0]},
        ),
        (
            "frozen must be a non-empty tensor of shape (B, 3, N, D), got (1, 2, 4, 8)",
            loss,
            {"frozen": GOOD[:, :2]},
        ),
        ("(B, 3, N, D) with B = 1, N = 4, D = 8, got (1, 3, 4, 7)", loss, {"projected": GOOD[..., :7]}),
        (
            "frozen must be float16, bfloat16, float32 or float64, got torch.int64",
            loss,
            {"frozen": GOOD.long()},
        ),
        (
            "projected must be on the same device as frozen (cpu), got meta",
            loss,
            {"projected": GOOD.to("meta")},
        ),
        ("grid must be (h, w) with h * w = N = 4 cells, got (3, 2) with 6 cells", loss, {"grid": (3, 2)}),
        ("window must be from 1 to 2 (the grid's shorter side), got 3", loss, {"window": 3}),
        ("grid must be (h, w), the rows and columns of tokens, got 4", loss, {"grid": 4}),
        ("grid must be (h, w), the rows and columns of tokens, got (1, 2, 2)", loss, {"grid": (1, 2, 2)}),
        ("got (-2, -2) with 4 cells", loss, {"grid": (-2, -2)}),
        ("got (1, 3) with 3 cells. Leave out class and register tokens.", loss, {"grid": (1, 3)}),
        (
            "temperature must be a Python number, got a tensor. Pass temperature.item().",
            loss,
            {"temperature": torch.nn.Parameter(torch.tensor(0.03))},
        ),
        ("reduction must be one of 'mean', 'none', got 'sum'", loss, {"reduction": "sum"}),
        ("temperature must be finite and greater than 0, got 0", loss, {"temperature": 0}),
        ("temperature must be finite and greater than 0, got nan", loss, {"temperature": float("nan")}),
        ("lambda_reg must be finite and at least 0, got -1.0", loss, {"lambda_reg": -1.0}),
        ("regularizer must be one of 'kl', 'mse', got 'l1'", loss, {"regularizer": "l1"}),
        ("backend must be one of 'auto', 'triton', 'eager', got 'cuda'", loss, {"backend": "cuda"}),
        (
            "projected must be float16, bfloat16 or float32 for backend='triton', got torch.float64",
            loss,
            {"projected": GOOD.double(), "backend": "triton"},
        ),
        (
            "norm_weight must be a non-empty tensor of shape (D) with D = 8",
            head_loss,
            {"norm_weight": torch.ones(7)},
        ),
        (
            "mask must be a bool tensor of shape (1, 4) on cpu, like the tokens of frozen, got torch.float32 "
            "(1, 4) on cpu",
            loss,
            {"mask": torch.ones(1, 4)},
        ),
        ("mask must be a bool tensor of shape (1, 4)", head_loss, {"mask": torch.ones(4, dtype=torch.bool)}),
        (
            "like the tokens of walk, got torch.bool (1, 3)",
            cycle_consistency_loss,
            {"walk": GOOD, "mask": torch.ones(1, 3, dtype=torch.bool)},
        ),
        (
            "mask must be",
            separability_loss,
            {"frozen": GOOD, "projected": GOOD, "mask": torch.ones(1, 4, device="meta").bool()},
        ),
        ("norm_eps must be finite and at least 0, got -1.0", head_loss, {"norm_eps": -1.0}),
        ("linear must be a non-empty tensor of shape (B, 3, N, D)", head_loss, {"linear": GOOD[:, :2]}),
        ("walk must be a non-empty tensor of shape (B, T, M, D)", cycle_consistency_loss, {"walk": GOOD[0]}),
        ("walk must have at least 2 views", cycle_consistency_loss, {"walk": GOOD[:, :1]}),
        ("temperature must be", cycle_consistency_loss, {"walk": GOOD, "temperature": float("inf")}),
        ("temperature must be", affinity_softmax, {"query": GOOD[0], "key": GOOD[0], "temperature": 0}),
        (
            "key must have the same dtype as query (torch.float32), got torch.float64",
            affinity_softmax,
            {"query": GOOD[0], "key": GOOD[0].double()},
        ),
        (
            "projected must be a non-empty tensor",
            separability_loss,
            {"frozen": GOOD, "projected": GOOD[:, :2]},
        ),
    ],
)
def test_invalid_arguments_are_errors(
    message: str, call: Callable[..., object], arguments: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)
