"""The program that torch.compile generates for an encoder on an H100, from tensors without data.

No GPU is needed, because the program is generated but not loaded. It is generated in a separate process,
because PyTorch caches the properties of the pretended GPU.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

DEPTH = 2
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


class Program(NamedTuple):
    """The names of operations and generated Triton kernels that a program calls; arrays of each kernel."""

    operations: list[str]
    kernels: list[str]
    arrays: list[int]


class _GeneratedError(Exception):
    """Ends the compilation when the program has been generated."""


def generate(name: str, **options: Any) -> Program:
    """Compile an encoder as a run on an H100 does; raise an error if it takes several programs."""
    # Imported here, so that the tests' own process does not load them.
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, graph
    from torch._inductor import config as inductor
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.nn import functional
    from torch.utils import _triton

    from fasttrain import encoder_runtime
    from fasttrain.backbones import load_backbone
    from fasttrain.recipe import EncoderRecipe

    sources: list[str] = []

    def keep(lowering: Any) -> None:
        code = lowering.codegen()[0]
        sources.append(getattr(code, "value", code))
        raise _GeneratedError

    # Without a GPU, PyTorch would choose unfused attention.
    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_cudnn_attention
        out: Tensor = attention(query, key, value, None, False)[0]
        return out

    # PyTorch cannot move parameters that have been replaced by tensors without data.
    def fold(blocks: torch.nn.Module, fold: Any = encoder_runtime.fold_layer_scale) -> None:
        with unset_fake_temporarily():
            fold(blocks)

    def constant(value: Any) -> Any:
        return staticmethod(lambda *_, **__: value)

    encoder = load_backbone(name, image_size=64, embed_dim=128, depth=DEPTH, num_heads=2)
    with ExitStack() as stack:
        for owner, attribute, value in (
            (CudaInterface, "is_available", constant(True)),
            (CudaInterface, "current_device", constant(0)),
            (CudaInterface, "get_compute_capability", constant(90)),
            (CudaInterface, "get_device_properties", constant(H100)),
            (CudaInterface.Worker, "current_device", constant(0)),
            (CudaInterface.Worker, "get_device_properties", constant(H100)),
            (torch.cuda, "current_device", constant(0)),
            (torch.cuda, "get_device_properties", constant(H100)),
            (torch.cuda, "get_device_capability", constant((9, 0))),
            (_triton, "triton_hash_with_backend", constant("")),
            (compile_fx, "_check_triton_bf16_support", constant(None)),
            (graph.GraphLowering, "compile_to_module", keep),
            (functional, "scaled_dot_product_attention", attend),
            (encoder_runtime, "fold_layer_scale", fold),
            (torch, "compile", partial(torch.compile, fullgraph=True)),
        ):
            stack.enter_context(patch.object(owner, attribute, value))
        # Folding would compute constants on the GPU.
        changes = {"force_disable_caches": True, "compile_threads": 1, "joint_graph_constant_folding": False}
        stack.enter_context(inductor.patch(changes))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        cuda = torch.device("cuda", 0)
        runtime = encoder_runtime.EncoderRuntime(
            encoder, EncoderRecipe(**options), dtype=torch.bfloat16, device=cuda
        )
        assert runtime.compiled
        if runtime.awaits_calibration:
            layers = encoder_runtime.float8_layers(encoder.blocks)
            # Tensors without data have no largest value.
            with patch.object(Tensor, "item", constant(1.0)):
                runtime.quantise({layer: 1.0 for layer, _ in layers})
        try:
            runtime.training_views(
                torch.empty(2, 8, 3, 64, 64, device=cuda), torch.empty_like(encoder.positions_NC)
            )
        # PyTorch wraps the exception.
        except Exception:
            if not sources:
                raise
    (source,) = sources
    body = source[source.index("def call(") :]
    operations = re.findall(r"(?:= torch\.ops\.aten|extern_kernels)\.(\w+)(?:\.default)?\(", body)
    launches = re.findall(r"(triton_\w+)\.run\((.*?), stream", body)
    arrays = [len(re.findall(r"\bbuf\d+", arguments)) for _, arguments in launches]
    return Program(operations, [kernel for kernel, _ in launches], arrays)


def hide_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=hide_gpu) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "fuses_gelu"),
    [
        ("dinov2", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dino", True), ("clip", False))),
    ],
)
def test_the_program_in_bfloat16(process: Executor, name: str, fuses_gelu: bool) -> None:
    """A block has four products, attention, and one kernel per residual sum with its norm."""
    operations, kernels, arrays = process.submit(generate, name).result()
    assert operations.count("_addmm_activation") == DEPTH * fuses_gelu
    assert operations.count("addmm") == DEPTH * (4 - fuses_gelu)
    assert operations.count("_scaled_dot_product_cudnn_attention") == DEPTH
    # Besides the blocks, there are kernels for the patches, positions, and first or last norms.
    per_block = 2 if fuses_gelu else 3
    assert len(kernels) <= DEPTH * per_block + 5, kernels
    assert not any("gelu" in kernel for kernel in kernels)
    # The residual sum before and after, what is added to it, and the output of the norm.
    assert max(arrays) <= 4, arrays
    # The multiplications of LayerScale.
    assert fuses_gelu != any("mul" in kernel for kernel in kernels), kernels


def test_the_program_in_fp8(process: Executor) -> None:
    """PyTorch accepts the scales, and only the outputs of attention take an extra kernel."""
    operations, kernels, _ = process.submit(generate, "dinov2", precision="fp8").result()
    assert operations.count("_scaled_mm") == 4 * DEPTH
    assert not {"addmm", "mm", "_addmm_activation"} & set(operations)
    assert len(kernels) <= 4 * DEPTH + 5, kernels


@pytest.mark.slow
def test_autocast_casts_every_product(process: Executor) -> None:
    """It does not know the product with GELU, which would stay in float32."""
    operations, _, _ = process.submit(generate, "dino", cast_weights=False).result()
    assert operations.count("addmm") + operations.count("mm") == 4 * DEPTH
    assert "_addmm_activation" not in operations
