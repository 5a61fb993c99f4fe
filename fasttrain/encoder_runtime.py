"""The execution of the frozen encoder: precision, attention kernel, compilation and batching.

The options of the recipe's section `encoder` affect the speed and memory use of the encoder; its outputs
change only by rounding errors. `backbones` defines what is computed.

Shape suffixes: B samples, T frames, N tokens, D channels; R rows, K inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from timm.layers import LayerScale, Mlp
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._inductor import list_mode_options
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasttrain.backbones import Backbone
from fasttrain.configuration import ACTIVATIONS
from fasttrain.errors import InputError
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.recipe import EncoderRecipe

# Frames (T, B, 3, H, W) and asymmetric positions (N, C) -> tokens (B, T + 1, N, D).
TrainingViews = Callable[[Tensor, Tensor], Tensor]
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
# Inductor's own CUDA graphs are not used, because cuda_graph.py records more than the encoder. By default,
# max-autotune does not try Triton's persistent matrix products with TMA, which need Hopper or later GPUs.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {
        **list_mode_options("max-autotune-no-cudagraphs"),
        "triton.enable_persistent_tma_matmul": True,
    },
}
# Store the sum of the residual stream at each norm. By default, Inductor stores every fourth one only, and
# the kernels in between read its summands again (docs/benchmarks.md).
GPU_OPTIONS = {"realize_reads_threshold": 2}

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
        # FP8 has one scale for the weights of a layer, whose rows LayerScale could make too small.
        if device.type == "cuda" and dtype != torch.float32 and recipe.precision != "fp8":
            fold_layer_scale(encoder.blocks)
            # Autocast does not cast the operands of the fused operator on a GPU.
            if recipe.cast_weights:
                fuse_gelu(encoder.blocks)
        self.encoder = encoder.to(device, dtype if recipe.cast_weights else torch.float32)
        self._dtype = dtype
        self._converts = (encoder.mean, encoder.std) != (IMAGENET_MEAN, IMAGENET_STD)
        mean, std, imagenet_mean, imagenet_std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (encoder.mean, encoder.std, IMAGENET_MEAN, IMAGENET_STD)
        )
        self._scale, self._shift = imagenet_std / std, (imagenet_mean - mean) / std
        self._uses_float8 = recipe.precision == "fp8"
        self._autocasts = not recipe.cast_weights and dtype != torch.float32
        if self._uses_float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise InputError(
                f"encoder.precision: 'fp8' needs a GPU of compute capability 8.9 or newer, which "
                f"{torch.cuda.get_device_name(device)} is not. Use encoder.precision=auto"
            )
        mode = recipe.compile
        if mode == "auto":
            mode = "default" if device.type == "cuda" else "none"
        self.compiled = mode != "none"
        encode: TrainingViews = encoder.training_views if recipe.batch_views else self._encode_separately
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
        options = GPU_OPTIONS if device.type == "cuda" else {}
        self._encode = compile_fixed(encode, COMPILE_OPTIONS[mode] | options) if self.compiled else encode
        self.largest_inputs: dict[str, float] = {}

    @property
    def awaits_calibration(self) -> bool:
        """Whether the linear layers will use FP8 but are not quantised yet."""
        return self._uses_float8 and not self.largest_inputs

    @torch.no_grad()
    def calibrate(self, frames: Tensor, positions: Tensor) -> dict[str, float]:
        """Encode frames (T, B, 3, H, W); return the largest input of each linear layer, for `quantise`."""
        largest: dict[str, Tensor] = {}

        def record(name: str, inputs: tuple[Tensor]) -> None:
            seen = inputs[0].abs().amax().float()
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
            for name, layer in float8_layers(self.encoder.blocks)
        ]
        with self._autocast():
            self._encode_separately(self._normalise(frames), positions)
        for hook in hooks:
            hook.remove()
        return {name: value.item() for name, value in largest.items()}

    def quantise(self, largest_inputs: dict[str, float]) -> None:
        """Replace linear layers by FP8 layers, given what `calibrate` returned. Call it once.

        Raises ValueError if it names other layers, or values that are not finite.
        """
        layers = {name for name, _ in float8_layers(self.encoder.blocks)}
        if unknown := largest_inputs.keys() - layers:
            raise ValueError(f"the encoder has no FP8 layer {min(unknown)}")
        for name, value in largest_inputs.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"the largest input of the FP8 layer {name} is {value}")
        self.largest_inputs = largest_inputs
        use_float8(self.encoder.blocks, largest_inputs)

    @torch.no_grad()
    def training_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Compute `Backbone.training_views` with the recipe's options, without waiting for the GPU.

        The frames are normalised with the ImageNet mean and std, whatever those of the encoder.
        """
        inputs = self._normalise(frames)
        with self._autocast():
            if not self._chunk or self._chunk >= inputs.shape[1]:
                return self._encode(inputs, positions).to(self._dtype)
            parts = [self._encode(part, positions) for part in inputs.split(self._chunk, dim=1)]
            return torch.cat(parts).to(self._dtype)

    @torch.no_grad()
    def tokens(self, frames: Tensor) -> Tensor:
        """Return tokens (B, N, D) of frames (B, 3, H, W), normalised as for `training_views`, uncompiled."""
        with self._autocast():
            return self.encoder.tokens(self._normalise(frames)).to(self._dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.encoder.positions_NC.device
        return torch.autocast(device.type, self._dtype) if self._autocasts else nullcontext()

    def _normalise(self, frames: Tensor) -> Tensor:
        """Convert frames from the ImageNet mean and std to those of the encoder, and cast them."""
        if not self._converts:
            return frames.to(self.encoder.dtype)
        out = torch.empty_like(frames, dtype=self.encoder.dtype)
        return torch.addcmul(self._shift, frames, self._scale, out=out)

    def _encode_separately(self, frames: Tensor, positions: Tensor) -> Tensor:
        views = [self.encoder.tokens(frame) for frame in frames]
        return torch.stack((*views, self.encoder.tokens(frames[0], positions)), 1)


def _with_attention(encode: TrainingViews, kernel: SDPBackend) -> TrainingViews:
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


def compile_fixed(function: TrainingViews, options: dict[str, Any]) -> TrainingViews:
    """Compile a function for fixed shapes. PyTorch caches the code across runs (TORCHINDUCTOR_CACHE_DIR)."""
    # Each kind of encoder is compiled to its own program, and PyTorch stops compiling after 8 by default.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MAX_PROGRAMS)
    return torch.compile(function, dynamic=False, options=options)


# --- fewer passes over the tokens on a GPU ----------------------------------------------------------------


def fold_layer_scale(blocks: nn.Module) -> None:
    """Multiply each LayerScale into the linear layer before it, in place, and remove it.

    This is exact but for rounding, and saves up to two passes over the tokens per block.
    """
    linear: Any
    for block in blocks.modules():
        if isinstance(block, Block):
            for name, linear in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
                scale = getattr(block, name)
                if isinstance(scale, LayerScale):
                    _scale_outputs(linear, scale.gamma)
                    setattr(block, name, nn.Identity())
        elif isinstance(block, EvaBlock):
            for name, linear in (("gamma_1", block.attn.proj), ("gamma_2", block.mlp.fc2)):
                gamma = getattr(block, name)
                if gamma is not None:
                    _scale_outputs(linear, gamma)
                    setattr(block, name, None)


def _scale_outputs(linear: nn.Linear, scale_O: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight * scale_O[:, None], requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias * scale_O, requires_grad=False)


class GeluLinear(nn.Module):
    """A linear layer with bias and GELU in one kernel, so that its outputs are written once and not read.

    On a GPU, cuBLASLt computes the tanh approximation of GELU, whose error is far below the rounding error of
    bfloat16 (docs/benchmarks.md). On a CPU, PyTorch computes the exact GELU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, tokens: Tensor) -> Tensor:
        rows_RK, weight_KO = tokens.flatten(0, -2), self.linear.weight.t()
        out_RO = torch._addmm_activation(self.linear.bias, rows_RK, weight_KO, use_gelu=True)
        return out_RO.unflatten(0, tokens.shape[:-1])


def fuse_gelu(blocks: nn.Module) -> None:
    """Replace the first linear layer and the GELU, exact or approximate, of each plain MLP, in place."""
    gelu = ACTIVATIONS["gelu"] + ACTIVATIONS["gelu_tanh"]
    for mlp in list(blocks.modules()):
        if isinstance(mlp, Mlp) and isinstance(mlp.act, gelu):
            linear: Any = mlp.fc1
            if linear.bias is not None:
                mlp.act, mlp.fc1 = nn.Identity(), cast(Any, GeluLinear(linear))


# --- FP8 -----------------------------------------------------------------------------------------------
#
# The blocks' linear layers can use e4m3 matrix products, which GPUs support from Ada and Hopper on. A value x
# becomes round(x / s). Weights and activations each have one scale s per layer, which is fixed before
# training: as e4m3 is a floating-point format, its relative error hardly depends on the scale, and a fixed
# scale spares the two passes over the activations that would find the largest value of each row
# (docs/benchmarks.md). Products are accumulated in float32 and returned in bfloat16.

# The largest input of a layer may become this many times larger than in the calibration before it is clamped.
FLOAT8_MARGIN = 4.0


def float8_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return the linear layers inside `module` that support FP8: those whose sizes are multiples of 16."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not (layer.in_features % 16 or layer.out_features % 16):
            yield name, layer


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Quantise values to e4m3 such that values = quantised * scale; values beyond 448 scale are clamped."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)


def float8_scale(largest: float) -> Tensor:
    """Return the scale (0-d, float32) that maps the largest value to the largest e4m3 number."""
    return torch.tensor(max(largest / LARGEST, torch.finfo(torch.float32).tiny))


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` with an FP8 matrix product; outputs have the dtype of the inputs.

    Do not cast the module afterwards, because that would cast its e4m3 weights as well.

    Args:
        linear: The layer.
        largest_input: Largest absolute value of the inputs; larger ones are clamped.
    """

    weight_OK: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear, largest_input: float) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = float8_scale(weight.abs().amax().item()).to(weight.device)
        self.register_buffer("weight_OK", quantize(weight, scale))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", float8_scale(largest_input).to(weight.device))
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, tokens: Tensor) -> Tensor:
        quantised_RK = quantize(tokens.flatten(0, -2), self.input_scale)
        if tokens.is_cuda:
            out_RO = torch._scaled_mm(
                quantised_RK,
                self.weight_OK.t(),
                scale_a=self.input_scale,
                scale_b=self.weight_scale,
                bias=self.bias_O,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            # An emulation, which is as slow as float32.
            out_RO = (
                quantised_RK.float() @ self.weight_OK.float().t() * (self.input_scale * self.weight_scale)
            )
            out_RO = (out_RO if self.bias_O is None else out_RO + self.bias_O).bfloat16()
        return out_RO.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)


def use_float8(module: nn.Module, largest_inputs: dict[str, float]) -> None:
    """Replace the linear layers inside `module` that are named in `largest_inputs`."""
    for name, layer in list(float8_layers(module)):
        if name in largest_inputs:
            module.set_submodule(name, Float8Linear(layer, FLOAT8_MARGIN * largest_inputs[name]))
