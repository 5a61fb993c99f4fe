"""Scalar functions that several kernels share.

Compiled, they are single instructions of the GPU where Triton's own functions spend four more on denormal
numbers; under the interpreter they are the same functions in NumPy. Accuracy is a few units in the last
place of fp32, except for `tanh` where half precision is asked for.
"""

from __future__ import annotations

from .runtime import INTERPRETED, inline, tl

# log2(e). Kernels hold what they will exponentiate times this, so that exp is one exp2 and nothing else.
LOG2_E = 1.4426950408889634

if INTERPRETED:

    @inline
    def exp2(x: tl.tensor) -> tl.tensor:
        """2^x."""
        return tl.exp2(x)

    @inline
    def reciprocal(x: tl.tensor) -> tl.tensor:
        """1 / x."""
        return 1.0 / x

    @inline
    def _tanh_half(x: tl.tensor) -> tl.tensor:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))

else:

    @inline
    def exp2(x: tl.tensor) -> tl.tensor:
        """2^x, relative error 2^-22; results below 2^-126 are 0."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @inline
    def reciprocal(x: tl.tensor) -> tl.tensor:
        """1 / x, within one unit in the last place; results below 2^-126 are 0."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @inline
    def _tanh_half(x: tl.tensor) -> tl.tensor:
        # Relative error 2^-11: a quarter of bfloat16's rounding, and float16's.
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@inline
def tanh(x: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """Hyperbolic tangent; with HALF to half precision.

    In full precision: the Taylor series below 1/4 (relative remainder 1e-8), exponentials above.
    """
    if HALF:
        return _tanh_half(x)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    decay = exp2(-2.885390081777927 * tl.abs(x))
    magnitude = (1.0 - decay) * reciprocal(1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -magnitude, magnitude))


@inline
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) = 2 artanh(x / (2 + x)), as a series for |x| < 1/4 (remainder 3e-9); else the logarithm."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 2.0 * ratio * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))
