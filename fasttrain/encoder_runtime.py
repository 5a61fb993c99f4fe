"""How the frozen encoder is run: FP8, attention kernel, compilation, as the recipe's `encoder` section says.

`backbones` says what the encoder computes; a switch here changes its speed, and the numbers by rounding only.

Shape suffixes: B pairs, N tokens, D channels; of a linear layer R rows, K inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.backbones import Backbone
from fasttrain.errors import InputError
from fasttrain.recipe import EncoderRecipe

# Frames (2, B, 3, H, W) and asymmetric positions (N, D) -> tokens (B, 3, N, D).
ThreeViews = Callable[[Tensor, Tensor], Tensor]
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Pairs whose three views fit a core's caches: larger batches ran slower (benchmarks/results/step-cpu.json).
CPU_CHUNK = 4
# Up to this number of tokens plain products are faster than PyTorch's fused attention on a CPU
# in half precision (3.8 against 6.2 ms for 12 x 3 heads of 197 tokens).
CPU_PLAIN_TOKENS = 256
MAX_PROGRAMS = 64
# Without Inductor's graphs: cuda_graph.py records more than the encoder.
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


class EncoderRuntime:
    """The three views of frame pairs through a frozen encoder, computed as the recipe says.

    `encoder` is moved to the device and cast, or quantised, in place. If `compiled`, the first call is slow.
    """

    def __init__(
        self, encoder: Backbone, recipe: EncoderRecipe, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.encoder = encoder.to(device, dtype if recipe.cast_weights else torch.float32)
        self._dtype = dtype
        self._autocasts = not recipe.cast_weights and dtype != torch.float32
        if recipe.precision == "fp8":
            if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
                raise InputError(
                    f"encoder.precision: 'fp8' needs compute capability 8.9 or more, "
                    f"{torch.cuda.get_device_name(device)} has less; use auto"
                )
            use_float8(encoder.blocks)
        mode = recipe.compile
        if mode == "auto":
            mode = "default" if device.type == "cuda" else "none"
        self.compiled = mode != "none"
        encode: ThreeViews = encoder.three_views if recipe.batch_views else self._views_apart
        self._chunk = recipe.chunk or (CPU_CHUNK if device.type == "cpu" else 0)
        if recipe.attention == "auto" and device.type == "cpu" and dtype != torch.float32:
            _attend_plainly(encoder)
        if recipe.attention != "auto":
            encode = _attending(encode, ATTENTION[recipe.attention])
        self._encode = compile_fixed(encode, COMPILE_MODES[mode]) if self.compiled else encode

    @torch.no_grad()
    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """`Backbone.three_views` in the recipe's precision; never waits for the GPU."""
        inputs = frames.to(self.encoder.dtype)
        with torch.autocast(frames.device.type, self._dtype) if self._autocasts else nullcontext():
            if not self._chunk or self._chunk >= inputs.shape[1]:
                return self._encode(inputs, positions).to(self._dtype)
            parts = [self._encode(part, positions) for part in inputs.split(self._chunk, dim=1)]
            return torch.cat(parts).to(self._dtype)

    def _views_apart(self, frames: Tensor, positions: Tensor) -> Tensor:
        first_BND, second_BND = self.encoder.tokens(frames[0]), self.encoder.tokens(frames[1])
        return torch.stack((first_BND, second_BND, self.encoder.tokens(frames[0], positions)), 1)


def _attending(encode: ThreeViews, kernel: SDPBackend) -> ThreeViews:
    """`encode` with one attention kernel, chosen inside of the compiled function.

    PyTorch ignores a choice made outside when it looks for a compiled program: an encoder would get the
    program, and with it the attention kernel, of another encoder of the same shapes.
    """

    def attend(frames: Tensor, positions: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return encode(frames, positions)

    return attend


def _attend_plainly(encoder: Backbone) -> None:
    """Attention as two products and a softmax, where the training images have few tokens."""
    if len(encoder.positions_ND) + len(encoder.prefix_PD) <= CPU_PLAIN_TOKENS:
        for module in encoder.blocks.modules():
            # timm's name for whether an attention layer calls PyTorch's fused one.
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def compile_fixed(function: ThreeViews, mode: str | None) -> ThreeViews:
    """torch.compile for fixed shapes; PyTorch keeps the code from run to run (TORCHINDUCTOR_CACHE_DIR)."""
    # Each kind of encoder in a process is a program; beyond PyTorch's limit of eight they run uncompiled.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_PROGRAMS)
    return torch.compile(function, dynamic=False, mode=mode)


# --- FP8 -----------------------------------------------------------------------------------------------
#
# Matrix products of the blocks' linear layers in e4m3, for chips that have them: Ada, Hopper and later.
# Weights are quantised once, with one scale per output channel; activations at every call, one per token. A
# value x becomes round(x / s) with s = max|x| / 448. The random error of a few percent per product largely
# averages out (docs/benchmarks.md). The products accumulate in float32 and come out in bfloat16.


def quantize_rows(values_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 (R, K) and float32 scales (R, 1): values = quantised x scale. A zero row stays zero."""
    largest_R1 = values_RK.abs().amax(-1, keepdim=True).float()
    scale_R1 = largest_R1.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    # Rounding may lift the largest value just past the range, which would become NaN.
    quantised = (values_RK.float() / scale_R1).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return quantised, scale_R1


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` whose product runs in FP8; takes and gives the dtype of its input.

    Quantise last: a later cast of the module would cast its e4m3 weights too.
    """

    weight_OK: Tensor
    scale_1O: Tensor
    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OK, scale_O1 = quantize_rows(linear.weight.detach())
        self.register_buffer("weight_OK", weight_OK)
        self.register_buffer("scale_1O", scale_O1.t().contiguous())
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, tokens: Tensor) -> Tensor:
        quantised_RK, scale_R1 = quantize_rows(tokens.flatten(0, -2))
        if tokens.is_cuda:
            out_RO = torch._scaled_mm(
                quantised_RK,
                self.weight_OK.t(),
                scale_a=scale_R1,
                scale_b=self.scale_1O,
                bias=self.bias_O,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            # PyTorch 2.11 has no scales by row on CPUs.
            out_RO = quantised_RK.float() @ self.weight_OK.float().t() * scale_R1 * self.scale_1O
            out_RO = (out_RO if self.bias_O is None else out_RO + self.bias_O).bfloat16()
        return out_RO.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)


def use_float8(module: nn.Module) -> None:
    """Replace every linear layer inside `module` whose sizes are multiples of 16."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not (child.in_features % 16 or child.out_features % 16):
                setattr(parent, name, Float8Linear(child))
