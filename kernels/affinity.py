"""Transition probabilities between two sets of tokens: A = softmax(query key^T / tau) over the keys.

Source: arXiv 2603.26597, section 3.

Shape suffixes: B samples, M queries, K keys, D channels.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from .checks import check_number, check_tensors


def affinity_softmax(query: Tensor, key: Tensor, temperature: float = 0.03) -> Tensor:
    """Compute the transition probabilities softmax(query key^T / temperature) over the keys.

    Tokens are compared by their dot products: L2-normalise them first if you want cosine similarities.
    PyTorch computes the matrix product and the softmax, in float32 for half-precision tokens.
    Source: arXiv 2603.26597, section 3.

    Args:
        query: (B, M, D) tokens in float16, bfloat16, float32 or float64.
        key: (B, K, D) tokens of the same dtype and on the same device.
        temperature: Divisor of the logits, greater than 0.

    Returns:
        The probabilities (B, M, K) in float32, or float64 for float64 tokens. Each row sums to one. The
        result is differentiable with respect to `query` and `key`.

    Raises:
        ValueError: If an argument has an invalid shape, dtype, device or value.
    """
    check_tensors(query=(query, "BMD"), key=(key, "BKD"))
    if key.dtype != query.dtype:
        raise ValueError(f"key must have the same dtype as query ({query.dtype}), got {key.dtype}")
    check_number("temperature", temperature)
    return reference.affinity_softmax(query, key, temperature)
