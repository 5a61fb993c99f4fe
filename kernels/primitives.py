"""Functions shared by several kernels: scalar functions, dot products, tiles of logits.

Parameters in capitals are compile-time constants.

Shape suffixes: Q queries and K keys of a tile, D channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .runtime import INTERPRETED, ROCM, compute_capability, inline, jit, next_power_of_2, tl

# log2(e). Kernels scale logits by this factor in advance, so that exp becomes a single exp2.
LOG2_E = 1.4426950408889634


def tile_options(tokens: Tensor) -> dict[str, Any]:
    """Choose the launch options of a kernel that computes tiles of the logits of `tokens`.

    Tiles are as large as the registers allow. They are smaller for float32, because three tf32 products need
    more registers for their operands, and on AMD GPUs and GPUs before Hopper, whose tensor cores read all
    operands from registers.
    """
    half = tokens.element_size() == 2
    wide = half and not ROCM and compute_capability(tokens.device) >= (9, 0)
    channels = max(next_power_of_2(tokens.shape[-1]), 16)
    return {
        "D": tokens.shape[-1],
        "BLOCK": 64 if half else 32,
        "BLOCK_K": min(channels, 64 if wide else 32),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


# On NVIDIA GPUs, `exp2`, `reciprocal` and `_tanh_half` are single instructions, whereas Triton's own
# functions need several more, for example to handle denormal numbers.
if INTERPRETED or ROCM:

    @inline
    def exp2(x):
        return tl.exp2(x)

    @inline
    def reciprocal(x):
        return 1.0 / x

    @inline
    def _tanh_half(x):
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))

else:

    @jit
    def _instruction(x, ASM: tl.constexpr):
        return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @jit
    def exp2(x):
        """2^x with a relative error of 2^-22. Results below 2^-126 are 0."""
        return _instruction(x, "ex2.approx.ftz.f32 $0, $1;")

    @jit
    def reciprocal(x):
        """1 / x to within one unit in the last place. Results below 2^-126 are 0."""
        return _instruction(x, "rcp.approx.ftz.f32 $0, $1;")

    @jit
    def _tanh_half(x):
        """tanh(x) with a relative error of 2^-11, like rounding to float16 (bfloat16: 2^-9)."""
        return _instruction(x, "tanh.approx.f32 $0, $1;")


if INTERPRETED:

    def sum_two(left, right):
        # The interpreter reduces tuples one element at a time, which is slow.
        return tl.sum(left, 0), tl.sum(right, 0)

    def dot(left, right, addend):
        # The interpreter would multiply the bit patterns of bfloat16 numbers instead of their values.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), addend)

else:

    @jit
    def _add_two(left, right, other_left, other_right):
        return left + other_left, right + other_right

    @jit
    def sum_two(left, right):
        """Sum two blocks in one reduction, so that warps exchange both partial sums at once."""
        return tl.reduce((left, right), 0, _add_two)

    if ROCM:

        @jit
        def dot(left, right, addend):
            """left @ right + addend on matrix cores, summed in fp32."""
            return tl.dot(left, right, addend, input_precision="ieee")

    else:

        @jit
        def dot(left, right, addend):
            """left @ right + addend on tensor cores, summed in fp32; three tf32 products for fp32."""
            return tl.dot(left, right, addend, input_precision="tf32x3")


@inline
def tanh(x, HALF):
    """tanh(x), accurate to half precision with HALF and to fp32 precision without.

    In fp32, use the Taylor series for |x| < 1/4 (relative remainder 1e-8) and exponentials otherwise.
    """
    if HALF:
        return _tanh_half(x)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = exp2(-2.885390081777927 * tl.abs(x))
    magnitude = (1.0 - decay) * reciprocal(1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -magnitude, magnitude))


@inline
def exp2m1(x):
    """2^x - 1: the Taylor series if |x| < 0.72 (relative remainder 1e-8), else the difference."""
    t = 0.6931471805599453 * x
    series = 1.0 + t * (1 / 6) * (1.0 + t * (1 / 7) * (1.0 + t * (1 / 8)))
    series = 1.0 + t * (1 / 3) * (1.0 + t * (1 / 4) * (1.0 + t * (1 / 5) * series))
    return tl.where(tl.abs(t) < 0.5, t * (1.0 + t * 0.5 * series), exp2(x) - 1.0)


@inline
def log1p(x):
    """log(1 + x): the series of 2 artanh(x / (2 + x)) if |x| < 1/4 (remainder 3e-9), else the logarithm."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 2.0 * ratio * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@inline
def load_tokens(tokens_ptr, rows, channels, tokens, D):
    """Load the given channels of the given tokens of one view; 0 beyond the last token or channel."""
    mask = (rows < tokens)[:, None] & (channels < D)[None, :]
    return tl.load(tokens_ptr + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)


@inline
def logits_tile(query_ptr, key_ptr, rows, columns, queries, keys, scale, D, BLOCK, BLOCK_K):
    """Compute a tile (BLOCK, BLOCK) of scale * query key^T in fp32, BLOCK_K channels at a time."""
    logits_QK = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        query_QD = load_tokens(query_ptr, rows, channels, queries, D)
        key_KD = load_tokens(key_ptr, columns, channels, keys, D)
        logits_QK = dot(query_QD, tl.trans(key_KD), logits_QK)
    return logits_QK * scale


@inline
def drop_logits(logits, exists):
    """Replace logits that do not exist by the lowest number, so that a softmax gives them 0.

    Minus infinity would turn a row without any that exists into NaN. Such a row becomes uniform instead.
    """
    return tl.where(exists, logits, -3.4028234663852886e38)


@inline
def own_block(blocks, BLOCK):
    """Return the sample that this program processes, and the tokens of its block.

    All (block, sample) pairs are on the first axis of the grid, since the other axes are limited to 65,535
    programs. Blocks of the same sample have consecutive program ids.
    """
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
