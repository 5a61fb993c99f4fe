"""The execution of the frozen encoder: precision, attention kernel, compilation and batching.

The options of the recipe's section `encoder` affect the speed and memory use of the encoder; its outputs
change only by rounding errors. `backbones` defines what is computed.

Shape suffixes: B pairs, N tokens, D channels; R rows, K inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.backbones import Backbone
from fasttrain.errors import InputError
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.recipe import EncoderRecipe

# Frames (2, B, 3, H, W) and asymmetric positions (N, C) -> tokens (B, 3, N, D).
ThreeViews = Callable[[Tensor, Tensor], Tensor]
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Larger chunks exceed the caches of a CPU and are slower (docs/benchmarks.md).
CPU_CHUNK = 4
# Up to this number of tokens, unfused attention is faster than PyTorch's fused kernel on a CPU in half
# precision (docs/benchmarks.md).
CPU_UNFUSED_TOKENS = 256
MAX_PROGRAMS = 64
# Inductor's own CUDA graphs are not used, because cuda_graph.py records more than the encoder.
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


class EncoderRuntime:
    """A frozen encoder with the execution options of a recipe.

    Args:
        encoder: The backbone, which is moved to the device and cast or quantised in place.
        recipe: The section `encoder` of a recipe.
        dtype: The training precision, which is also the dtype of the tokens.
        device: The training device.

    Attributes:
        compiled: Whether the encoder is compiled, in which case the first call is slow.

    Raises:
        InputError: The device does not support the selected precision or attention kernel.
    """

    def __init__(
        self, encoder: Backbone, recipe: EncoderRecipe, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.encoder = encoder.to(device, dtype if recipe.cast_weights else torch.float32)
        self._dtype = dtype
        self._converts = (encoder.mean, encoder.std) != (IMAGENET_MEAN, IMAGENET_STD)
        mean, std, imagenet_mean, imagenet_std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (encoder.mean, encoder.std, IMAGENET_MEAN, IMAGENET_STD)
        )
        self._scale, self._shift = imagenet_std / std, (imagenet_mean - mean) / std
        self._autocasts = not recipe.cast_weights and dtype != torch.float32
        if recipe.precision == "fp8":
            if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
                raise InputError(
                    f"encoder.precision: 'fp8' needs a GPU of compute capability 8.9 or newer, which "
                    f"{torch.cuda.get_device_name(device)} is not. Use encoder.precision=auto"
                )
            use_float8(encoder.blocks)
        mode = recipe.compile
        if mode == "auto":
            mode = "default" if device.type == "cuda" else "none"
        self.compiled = mode != "none"
        encode: ThreeViews = encoder.three_views if recipe.batch_views else self._encode_separately
        self._chunk = recipe.chunk or (CPU_CHUNK if device.type == "cpu" else 0)
        if recipe.attention == "auto" and device.type == "cpu" and dtype != torch.float32:
            _unfuse_attention(encoder)
        if recipe.attention in ("cudnn", "efficient") and device.type == "cpu":
            raise InputError(
                f"encoder.attention: {recipe.attention!r} needs a GPU, but this run is on the CPU. Use "
                f"encoder.attention=auto"
            )
        if recipe.attention != "auto":
            encode = _with_attention(encode, ATTENTION[recipe.attention])
        self._encode = compile_fixed(encode, COMPILE_MODES[mode]) if self.compiled else encode

    @torch.no_grad()
    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Compute `Backbone.three_views` with the recipe's options, without waiting for the GPU.

        The frames are normalised with the ImageNet mean and std, whatever those of the encoder.
        """
        inputs = self._normalise(frames)
        with torch.autocast(frames.device.type, self._dtype) if self._autocasts else nullcontext():
            if not self._chunk or self._chunk >= inputs.shape[1]:
                return self._encode(inputs, positions).to(self._dtype)
            parts = [self._encode(part, positions) for part in inputs.split(self._chunk, dim=1)]
            return torch.cat(parts).to(self._dtype)

    def _normalise(self, frames: Tensor) -> Tensor:
        """Convert frames from the ImageNet mean and std to those of the encoder, and cast them."""
        if not self._converts:
            return frames.to(self.encoder.dtype)
        out = torch.empty_like(frames, dtype=self.encoder.dtype)
        return torch.addcmul(self._shift, frames, self._scale, out=out)

    def _encode_separately(self, frames: Tensor, positions: Tensor) -> Tensor:
        first_BND, second_BND = self.encoder.tokens(frames[0]), self.encoder.tokens(frames[1])
        return torch.stack((first_BND, second_BND, self.encoder.tokens(frames[0], positions)), 1)


def _with_attention(encode: ThreeViews, kernel: SDPBackend) -> ThreeViews:
    """Wrap `encode` so that it selects the attention kernel inside of the compiled function.

    torch.compile does not guard on a selection outside of the function: an encoder might reuse the program of
    another encoder with the same shapes, and with it the other attention kernel.
    """

    def attend(frames: Tensor, positions: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return encode(frames, positions)

    return attend


def _unfuse_attention(encoder: Backbone) -> None:
    """Use unfused attention (two matrix products and a softmax) if the training images have few tokens."""
    if len(encoder.positions_NC) + len(encoder.prefix_PD) <= CPU_UNFUSED_TOKENS:
        for module in encoder.blocks.modules():
            # The attribute by which timm's attention layers select PyTorch's fused attention.
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def compile_fixed(function: ThreeViews, mode: str | None) -> ThreeViews:
    """Compile a function for fixed shapes. PyTorch caches the code across runs (TORCHINDUCTOR_CACHE_DIR)."""
    # Each kind of encoder is compiled to its own program, and PyTorch stops compiling after 8 by default.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_PROGRAMS)
    return torch.compile(function, dynamic=False, mode=mode)


# --- FP8 -----------------------------------------------------------------------------------------------
#
# The blocks' linear layers can use e4m3 matrix products, which GPUs support from Ada and Hopper on. Weights
# are quantised once, with a scale per output channel, and activations at every call, with a scale per token:
# a value x becomes round(x / s) with s = max|x| / 448. The random error of a few percent per product largely
# averages out (docs/benchmarks.md). Products are accumulated in float32 and returned in bfloat16.


def quantize_rows(values_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3 (R, K) with float32 scales (R, 1), such that values = quantised * scale."""
    largest_R1 = values_RK.abs().amax(-1, keepdim=True).float()
    scale_R1 = largest_R1.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    # Rounding may push the largest value slightly out of range, which would give NaN.
    quantised = (values_RK.float() / scale_R1).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return quantised, scale_R1


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` with an FP8 matrix product; outputs have the dtype of the inputs.

    Do not cast the module afterwards, because that would cast its e4m3 weights as well.
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
            # PyTorch 2.11 does not support scales per row on CPUs.
            out_RO = quantised_RK.float() @ self.weight_OK.float().t() * scale_R1 * self.scale_1O
            out_RO = (out_RO if self.bias_O is None else out_RO + self.bias_O).bfloat16()
        return out_RO.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)


def use_float8(module: nn.Module) -> None:
    """Replace every linear layer inside `module` whose sizes are multiples of 16."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not (child.in_features % 16 or child.out_features % 16):
                setattr(parent, name, Float8Linear(child))
