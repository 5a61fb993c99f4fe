"""Measure the operations of which the encoder of a ViT-B/16 consists, one by one.

    python -m benchmarks.probe      # needs a GPU, except for tests

The inputs are those of a training step of 128 pairs at 224 pixels: 384 images of 197 tokens. The sections
are:

    matrices     the four linear layers of a block: bf16, and FP8 with scales per row or per tensor
    activation   the first layer of the MLP with its GELU: separately, and in one call of cuBLASLt
    attention    scaled dot-product attention with each of PyTorch's kernels, and its first call at a new size
    passes       operations that are limited by memory, compared with a copy
    streams      four blocks: all images at once, and each half on a stream of its own
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from benchmarks.measure import (
    Call,
    Results,
    command_line,
    copy_ceiling,
    matrix_ceiling,
    run_command,
    synchronize,
)
from fasttrain.encoder_runtime import ATTENTION
from fasttrain.errors import InputError

IMAGES, TOKENS, WIDTH, HEADS = 384, 197, 768, 12
# Input and output channels.
MATRICES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "fc1": (WIDTH, 4 * WIDTH),
    "fc2": (4 * WIDTH, WIDTH),
}
FLOAT8 = torch.float8_e4m3fn


class Probe:
    """The device, the number of images, and the results."""

    def __init__(self, results: Results, device: torch.device, images: int) -> None:
        self.results, self.device, self.images = results, device, images
        self.rounds, self.calls = (7, 20) if device.type == "cuda" else (1, 1)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    def time(self, makers: dict[str, Callable[[], Call]]) -> dict[str, dict[str, float]]:
        timings = self.results.time(makers, rounds=self.rounds, calls=self.calls)
        rows = {name: timing.result(1) for name, timing in timings.items()}
        return {name: {key: row[key] for key in ("ms", "ms_least", "ms_most")} for name, row in rows.items()}


def matrices(probe: Probe) -> dict[str, Any]:
    rows = probe.images * TOKENS
    result: dict[str, Any] = {"ceiling_tflops": matrix_ceiling(torch.bfloat16, probe.device) / 1e12}
    for name, (inputs, outputs) in MATRICES.items():
        x, weight, bias = probe.random(rows, inputs), probe.random(outputs, inputs), probe.random(outputs)
        per_row = torch.ones(rows, 1, device=probe.device), torch.ones(1, outputs, device=probe.device)
        per_tensor = torch.ones((), device=probe.device), torch.ones((), device=probe.device)
        makers: dict[str, Callable[[], Call]] = {
            f"{name}, bf16": lambda x=x, weight=weight, bias=bias: partial(F.linear, x, weight, bias)
        }
        for scaling, scales in (("tensor", per_tensor), ("row", per_row)):
            if scaling == "row" and probe.device.type == "cpu":
                continue  # PyTorch 2.11 does not support it.
            makers[f"{name}, FP8 per {scaling}"] = partial(scaled_product, x, weight, bias, scales)
        for row, timing in probe.time(makers).items():
            result[row] = {**timing, "tflops": 2 * rows * inputs * outputs / timing["ms"] / 1e9}
    return result


def scaled_product(x: Tensor, weight: Tensor, bias: Tensor, scales: tuple[Tensor, Tensor]) -> Call:
    """Return a product of the quantised inputs; quantising is not part of it."""
    x, weight = x.to(FLOAT8), weight.to(FLOAT8)
    return partial(
        torch._scaled_mm,
        x,
        weight.t(),
        scale_a=scales[0],
        scale_b=scales[1],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def activation(probe: Probe) -> dict[str, Any]:
    inputs, outputs = MATRICES["fc1"]
    x = probe.random(probe.images * TOKENS, inputs)
    weight, bias = probe.random(outputs, inputs) / inputs**0.5, probe.random(outputs)

    def separate(approximate: str) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)

    def together() -> Tensor:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    result: dict[str, Any] = probe.time(
        {
            "linear": lambda: lambda: F.linear(x, weight, bias),
            "linear, then GELU": lambda: lambda: separate("none"),
            "linear, then GELU (tanh form)": lambda: lambda: separate("tanh"),
            "one call": lambda: together,
        }
    )
    exact = separate("none").double()
    result["difference_from_exact"] = {
        name: ((out.double() - exact).norm() / exact.norm()).item()
        for name, out in (("tanh form", separate("tanh")), ("one call", together()))
    }
    return result


def attention(probe: Probe) -> dict[str, Any]:
    query, key, value = (probe.random(probe.images, HEADS, TOKENS, WIDTH // HEADS) for _ in range(3))

    def attend(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        with sdpa_kernel(ATTENTION[name]) if name in ATTENTION else nullcontext():
            return F.scaled_dot_product_attention(*inputs)

    def first_call_ms(name: str) -> float:
        """Return the median time of the first call at some new numbers of tokens, as in an evaluation."""
        times = []
        # Different sizes for each kernel, because two names may mean the same one.
        first = TOKENS + 1 + 5 * names.index(name)
        for tokens in range(first, first + 5):
            image = probe.random(1, HEADS, tokens, WIDTH // HEADS)
            synchronize()
            start = time.perf_counter()
            attend(name, (image, image, image))
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    names = ["PyTorch's choice", *(ATTENTION if probe.device.type == "cuda" else ("flash", "math"))]
    result = probe.time({name: partial(partial, attend, name, (query, key, value)) for name in names})
    flops = 4 * probe.images * TOKENS**2 * WIDTH
    return {
        name: {**row, "tflops": flops / row["ms"] / 1e9, "first_call_ms": first_call_ms(name)}
        for name, row in result.items()
    }


def passes(probe: Probe) -> dict[str, Any]:
    """Measure eager operations that read and write each element once."""
    tokens, hidden = (probe.random(probe.images * TOKENS, width) for width in (WIDTH, 4 * WIDTH))
    residual, weight, bias = torch.randn_like(tokens), probe.random(WIDTH), probe.random(WIDTH)
    fused = torch.compile(residual_norm)
    functions: dict[str, tuple[Tensor, Call]] = {
        "GELU": (hidden, lambda: F.gelu(hidden)),
        "GELU (tanh form)": (hidden, lambda: F.gelu(hidden, approximate="tanh")),
        "LayerNorm": (tokens, lambda: F.layer_norm(tokens, (WIDTH,), weight, bias)),
        "residual, then LayerNorm": (tokens, partial(residual_norm, tokens, residual, weight, bias)),
        "residual and LayerNorm, compiled": (tokens, partial(fused, tokens, residual, weight, bias)),
        "copy": (hidden, lambda: hidden.clone()),
        "cast to FP8": (hidden, lambda: hidden.to(FLOAT8)),
    }
    rows = probe.time({name: partial(lambda f: f, function) for name, (_, function) in functions.items()})
    result: dict[str, Any] = {"copy_gb_per_second": copy_ceiling(probe.device) / 1e9}
    for name, row in rows.items():
        read = functions[name][0].numel()
        # Bytes per element: one read and one write in bf16, or two of each with the residual stream.
        moved = read * (3 if name == "cast to FP8" else 8 if name.startswith("residual") else 4)
        result[name] = {**row, "gb_per_second": moved / row["ms"] / 1e6}
    return result


def residual_norm(tokens: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new residual stream and its layer norm."""
    total = tokens + residual
    return total, F.layer_norm(total, (WIDTH,), weight, bias)


def streams(probe: Probe) -> dict[str, Any]:
    """Measure whether passes over memory of one half overlap with matrix products of the other."""
    if probe.device.type != "cuda":
        raise InputError("streams: needs a GPU")
    blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(4)))
    blocks.eval().to(probe.device, torch.bfloat16)
    tokens = probe.random(probe.images, TOKENS, WIDTH)
    halves, others = tokens.chunk(2), [torch.cuda.Stream() for _ in range(2)]

    def on_two_streams() -> None:
        current = torch.cuda.current_stream()
        for half, stream in zip(halves, others, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                blocks(half)
        # Not earlier: the second half would wait for the first.
        for stream in others:
            current.wait_stream(stream)

    return probe.time(
        {
            "all at once": lambda: lambda: blocks(tokens),
            "halves, one after the other": lambda: lambda: [blocks(half) for half in halves],
            "halves on two streams": lambda: on_two_streams,
        }
    )


def main(arguments: list[str] | None = None) -> None:
    args = command_line("probe", __doc__).parse_args(arguments)
    device = torch.device(args.device)
    images = IMAGES if device.type == "cuda" else 1
    results = Results("probe", args, images=images, tokens=TOKENS, width=WIDTH)
    probe = Probe(results, device, images)
    with torch.no_grad():
        for section in (matrices, activation, attention, passes, streams):
            results.record(section.__name__, partial(section, probe))
    results.finish()


if __name__ == "__main__":
    run_command(main)
