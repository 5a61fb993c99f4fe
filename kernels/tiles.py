"""Matrix products of tiles: the dot product all kernels use, and one tile of logits.

Shape suffixes: Q queries and K keys of the tile; D channels.
"""

from __future__ import annotations

from .runtime import INTERPRETED, inline, tl

if INTERPRETED:

    @inline
    def dot(left: tl.tensor, right: tl.tensor, addend: tl.tensor) -> tl.tensor:
        """left @ right + addend; the interpreter would multiply bfloat16's bit patterns."""
        return tl.dot(left.to(tl.float32), right.to(tl.float32), addend)

else:

    @inline
    def dot(left: tl.tensor, right: tl.tensor, addend: tl.tensor) -> tl.tensor:
        """left @ right + addend on tensor cores, in fp32; fp32 operands as three products of tf32."""
        return tl.dot(left, right, addend, input_precision="tf32x3")


@inline
def load_tokens(
    tokens_ptr: tl.tensor, rows: tl.tensor, channels: tl.tensor, tokens: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """Some channels of some tokens of one view, 0 where there are none."""
    mask = (rows < tokens)[:, None] & (channels < D)[None, :]
    return tl.load(tokens_ptr + rows[:, None] * D + channels[None, :], mask=mask, other=0.0)


@inline
def logits_tile(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """scale x query key^T, (BLOCK, BLOCK) in fp32, accumulated over BLOCK_K channels at a time."""
    logits_QK = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        query_QD = load_tokens(query_ptr, rows, channels, queries, D)
        key_KD = load_tokens(key_ptr, columns, channels, keys, D)
        logits_QK = dot(query_QD, tl.trans(key_KD), logits_QK)
    return logits_QK * scale


@inline
def own_block(blocks: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Sample of a program and the tokens of its block: the blocks of a sample run side by side.

    Along one axis of the launch, for the others end at 65,535.
    """
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
