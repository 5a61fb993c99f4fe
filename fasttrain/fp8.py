"""Matrix products of the frozen encoder in FP8 (e4m3) for chips that have it: Ada, Hopper and later.

Weights are quantised once, one scale per output channel; activations at every call, one scale per token. A
value x becomes round(x / s) with s = max|x| / 448, so each product is off by a few percent of its norm, at
random, which a sum over hundreds of channels and a LayerNorm largely average out (benchmarks/throughput.py
measures what is left in the tokens and in the loss). The products accumulate in float32 and come out in
bfloat16. Only the linear layers of the blocks change; attention, norms and the patch embedding stay.

Shape suffixes: R rows (tokens), K input channels, O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain.errors import InputError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
# The matrix units take K and O in such steps.
MULTIPLE = 16


def quantize_rows(values_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3 (R, K) and float32 scales (R, 1): values = quantised x scale. A zero row stays zero."""
    largest_R1 = values_RK.abs().amax(-1, keepdim=True).float()
    scale_R1 = largest_R1.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    # Rounding may lift the largest value just past the range, which would become NaN.
    quantised = (values_RK.float() / scale_R1).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return quantised, scale_R1


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` whose product runs in FP8; takes and gives the dtype of its input.

    Attributes: weight_OK (e4m3), scale_1O (float32), bias_O (bfloat16 or None). Cast the module after this
    and its weights are no longer FP8: quantise last.
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
            # The same with scales by row came to CPUs after PyTorch 2.11.
            out_RO = quantised_RK.float() @ self.weight_OK.float().t() * scale_R1 * self.scale_1O
            out_RO = (out_RO if self.bias_O is None else out_RO + self.bias_O).bfloat16()
        return out_RO.unflatten(0, tokens.shape[:-1]).to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.weight_OK.shape[1]}, out_features={self.weight_OK.shape[0]}"


def check_float8(device: torch.device) -> None:
    """InputError where a GPU lacks FP8 matrix units. A CPU computes it too, slowly: for tests."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            f"encoder.precision: 'fp8' needs compute capability 8.9 or more, "
            f"{torch.cuda.get_device_name(device)} has {torch.cuda.get_device_capability(device)}; use auto"
        )


def use_float8(module: nn.Module) -> int:
    """Replace every linear layer inside `module` whose sizes are multiples of 16; returns how many."""
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not (
                child.in_features % MULTIPLE or child.out_features % MULTIPLE
            ):
                setattr(parent, name, Float8Linear(child))
                replaced += 1
    return replaced
