"""Transition probabilities between two sets of tokens: A = softmax(query key^T / tau) over the keys.

Each program of the kernel computes the rows of one block of queries in two passes over the keys. The first
accumulates the maximum and the sum of each row, as FlashAttention does (Dao et al., arXiv 2205.14135). The
second recomputes the logits and writes A in fp32. The backward is plain PyTorch:

    dlogits = A * (dA - sum_k A * dA),   dquery = dlogits key / tau,   dkey = dlogits^T query / tau

Source: arXiv 2603.26597, section 3.

Shape suffixes: B samples, M queries, K keys, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_number, check_tensors
from .primitives import LOG2_E, exp2, logits_tile, own_block, tile_options
from .runtime import Backend, jit, on_device, operator, tl, triton, use_triton


@jit
def _affinity_kernel(
    query_ptr,  # [B, M, D]
    key_ptr,  # [B, K, D]
    affinity_ptr,  # [B, M, K]
    queries, keys, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write A; one program per (block of queries, sample)."""
    sample, rows = own_block(tl.cdiv(queries, BLOCK), BLOCK)
    query_ptr += sample * queries * D
    key_ptr += sample * keys * D
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = logits_tile(query_ptr, key_ptr, rows, columns, queries, keys, scale, D, BLOCK, BLOCK_K)
        logits = tl.where((columns < keys)[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * exp2(largest - larger) + tl.sum(exp2(logits - larger[:, None]), 1)
        largest = larger
    for start in range(0, keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = logits_tile(query_ptr, key_ptr, rows, columns, queries, keys, scale, D, BLOCK, BLOCK_K)
        affinity = exp2(logits - largest[:, None]) / total[:, None]
        offsets = (sample * queries + rows[:, None]) * keys + columns[None, :]
        tl.store(affinity_ptr + offsets, affinity, mask=(rows < queries)[:, None] & (columns < keys)[None, :])


def launch_affinity(query_BMD: Tensor, key_BKD: Tensor, temperature: float) -> Tensor:
    """Compute A, (B, M, K) in fp32, with the Triton kernel."""
    query_BMD, key_BKD = query_BMD.contiguous(), key_BKD.contiguous()
    samples, queries, _ = query_BMD.shape
    keys = key_BKD.shape[1]
    affinity_BMK = query_BMD.new_empty((samples, queries, keys), dtype=torch.float32)
    tile = tile_options(query_BMD)
    with on_device(query_BMD):
        _affinity_kernel[(triton.cdiv(queries, tile["BLOCK"]) * samples,)](
            query_BMD, key_BKD, affinity_BMK, queries, keys, LOG2_E / temperature, **tile
        )
    return affinity_BMK


_affinity = operator(
    "affinity_softmax",
    launch_affinity,
    fake=lambda query, key, temperature: query.new_empty(
        (query.shape[0], query.shape[1], key.shape[1]), dtype=torch.float32
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, ctx.temperature = inputs
    ctx.save_for_backward(query, key, output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    query, key, affinity = ctx.saved_tensors
    weighted = affinity * grad
    grad_logits = (weighted - affinity * weighted.sum(-1, keepdim=True)) / ctx.temperature
    grad_query = torch.bmm(grad_logits, key.float()).to(query.dtype)
    return grad_query, torch.bmm(grad_logits.transpose(1, 2), query.float()).to(key.dtype), None


_affinity.register_autograd(_differentiate, setup_context=_save)


def affinity_softmax(
    query: Tensor, key: Tensor, temperature: float = 0.03, backend: Backend = "auto"
) -> Tensor:
    """Compute the transition probabilities softmax(query key^T / temperature) over the keys.

    Tokens are compared by their dot products: L2-normalise them first if you want cosine similarities.
    Source: arXiv 2603.26597, section 3.

    Args:
        query: (B, M, D) tokens in float16, bfloat16, float32 or (eager only) float64.
        key: (B, K, D) tokens of the same dtype and on the same device.
        temperature: Divisor of the logits, greater than 0.
        backend: `"triton"`, `"eager"` (plain PyTorch), or `"auto"`, which selects Triton if it is installed
            and the tensors are on an NVIDIA GPU of compute capability 8.0 or higher and not in float64.

    Returns:
        The probabilities (B, M, K) in float32, or float64 for float64 tokens. Each row sums to one. The
        result is differentiable with respect to `query` and `key`.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value, or one that
            `backend="triton"` does not support.
    """
    check_tensors(query=(query, "BMD"), key=(key, "BKD"))
    if key.dtype != query.dtype:
        raise ValueError(f"key must have the same dtype as query ({query.dtype}), got {key.dtype}")
    check_number("temperature", temperature)
    softmax = _affinity if use_triton(backend, query=query, key=key) else reference.affinity_softmax
    affinity: Tensor = softmax(query, key, temperature)
    return affinity
