"""How the frozen encoder is run: number format, attention kernel, compilation. One switch per recipe key.

`backbones` says what the encoder computes; this says how fast. `student` owns one `EncoderRuntime`. Every
switch changes rounding at most, and each can be turned off (`encoder` section of the recipe).

Shape suffixes: B samples, C colours, H and W pixels, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.backbones import Backbone
from fasttrain.fp8 import check_float8, use_float8
from fasttrain.recipe import EncoderRecipe

ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What a core's caches hold: larger batches ran slower on a CPU (benchmarks/results/throughput-cpu.json).
CPU_CHUNK = 4
# Up to here PyTorch's fused attention loses to plain products on a CPU in half precision (3.8 against 6.2 ms
# for 12 x 3 heads of 197 tokens); beyond, the matrix of all pairs no longer stays in the caches.
CPU_PLAIN_TOKENS = 256
MOST_PROGRAMS = 64
# Graphs are recorded by cuda_graph.py, over more than the encoder.
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


class EncoderRuntime:
    """The three views of frame pairs through a frozen encoder, as the recipe wants them computed.

    `encoder` is moved to the device and cast, or quantised, in place. `compiled` tells whether the first call
    will be long.
    """

    def __init__(
        self, encoder: Backbone, recipe: EncoderRecipe, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.encoder = encoder.to(device, dtype if recipe.cast_weights else torch.float32)
        self._dtype, self._device, self._recipe = dtype, device, recipe
        if recipe.precision == "fp8":
            check_float8(device)
            use_float8(encoder.blocks)
        mode = recipe.compile
        if mode == "auto":
            mode = "default" if device.type == "cuda" else "none"
        self.compiled = mode != "none"
        views: Callable[[Tensor, Tensor], Tensor] = (
            encoder.three_views if recipe.batch_views else self._views_apart
        )
        self._chunk = recipe.chunk or (CPU_CHUNK if device.type == "cpu" else 0)
        if recipe.attention == "auto" and device.type == "cpu" and dtype != torch.float32:
            _attend_plainly(encoder)
        if recipe.attention != "auto":
            views = _attending(views, ATTENTION[recipe.attention])
        self._views = compile_fixed(views, COMPILE_MODES[mode]) if self.compiled else views

    @torch.no_grad()
    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, 3, N, D) of frame 1, frame 2 and frame 1 at other positions; never waits for the GPU.

        frames: (2, B, 3, H, W), ImageNet-normalised, of the training size; positions: (N, D), asymmetric.
        """
        with self._autocast():
            inputs = frames.to(self.encoder.positions_ND.dtype)
            if not self._chunk or self._chunk >= inputs.shape[1]:
                return self._views(inputs, positions).to(self._dtype)
            parts = [self._views(part, positions) for part in inputs.split(self._chunk, dim=1)]
            return torch.cat(parts).to(self._dtype)

    def _views_apart(self, frames: Tensor, positions: Tensor) -> Tensor:
        first_BND, second_BND = self.encoder.tokens(frames[0]), self.encoder.tokens(frames[1])
        return torch.stack((first_BND, second_BND, self.encoder.tokens(frames[0], positions)), 1)

    def _autocast(self) -> AbstractContextManager[None]:
        needed = not self._recipe.cast_weights and self._dtype != torch.float32
        return torch.autocast(self._device.type, self._dtype) if needed else nullcontext()


def _attending(
    views: Callable[[Tensor, Tensor], Tensor], kernel: SDPBackend
) -> Callable[[Tensor, Tensor], Tensor]:
    """`views` with one attention kernel, chosen inside of what is compiled.

    PyTorch does not look at a choice that is made outside when it looks for a compiled program: an encoder
    would get the program, and with it the attention kernel, of another encoder of the same shapes.
    """

    def attend(frames: Tensor, positions: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return views(frames, positions)

    return attend


def _attend_plainly(encoder: Backbone) -> None:
    """Attention as two products and a softmax, where the training images have few tokens."""
    rows, columns = encoder.grid(encoder.image_size, encoder.image_size)
    if rows * columns + len(encoder.prefix_PD) > CPU_PLAIN_TOKENS:
        return
    for module in encoder.blocks.modules():
        # timm's name for whether an attention layer calls PyTorch's fused one.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def compile_fixed(
    function: Callable[[Tensor, Tensor], Tensor], mode: str | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """torch.compile for fixed shapes; PyTorch keeps the code from run to run (TORCHINDUCTOR_CACHE_DIR)."""
    # Every kind of encoder in a process is a program of its own; past PyTorch's limit of eight they would
    # silently run uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_PROGRAMS)
    return torch.compile(function, dynamic=False, mode=mode)
