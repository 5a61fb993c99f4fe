"""One token's D channels in registers, as a tuple of equal chunks.

Triton's blocks are powers of two; three of them fit a ViT's 384, 768 or 1536 channels exactly, where one
would leave a quarter of the lanes idle. A row is a tuple of CHUNKS blocks of BLOCK fp32 numbers, 0 beyond
D.
"""

from __future__ import annotations

from .runtime import INTERPRETED, inline, tl, triton


def row_blocks(channels: int) -> tuple[int, int]:
    """BLOCK and CHUNKS of the shortest cover of `channels`: one power of two, or three of at least 128."""
    whole = triton.next_power_of_2(channels)
    third = whole // 4
    return (third, 3) if third >= 128 and 3 * third >= channels else (max(whole, 32), 1)


@inline
def append(row: tl.tensor, block: tl.tensor) -> tl.tensor:
    """The tuple with one block more."""
    last = (block,)
    return row + last


@inline
def load_row(
    row_ptr: tl.tensor, exists: tl.tensor, D: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tensor:
    """The row at a pointer, as fp32; zeros where it does not exist."""
    limit = tl.where(exists, D, 0)
    row = ()
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        row = append(row, tl.load(row_ptr + columns, mask=columns < limit, other=0.0).to(tl.float32))
    return row


@inline
def store_row(
    row_ptr: tl.tensor,
    row: tl.tensor,
    exists: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    limit = tl.where(exists, D, 0)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        tl.store(row_ptr + columns, row[c].to(row_ptr.dtype.element_ty), mask=columns < limit)


@inline
def zero_row(BLOCK: tl.constexpr, CHUNKS: tl.constexpr) -> tl.tensor:
    row = ()
    for _ in tl.static_range(CHUNKS):
        row = append(row, tl.zeros([BLOCK], dtype=tl.float32))
    return row


@inline
def sum_chunks(row: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """One block, the sum of the row's."""
    total = row[0]
    for c in tl.static_range(1, CHUNKS):
        total += row[c]
    return total


@inline
def sum_row(row: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    return tl.sum(sum_chunks(row, CHUNKS), 0)


@inline
def _add_two(
    left: tl.tensor, right: tl.tensor, other_left: tl.tensor, other_right: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    return left + other_left, right + other_right


if INTERPRETED:

    @inline
    def sum_two(left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        """The sums of two blocks; the interpreter takes a reduction of tuples number by number."""
        return tl.sum(left, 0), tl.sum(right, 0)

else:

    @inline
    def sum_two(left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        """The sums of two blocks, which warps exchange together."""
        return tl.reduce((left, right), 0, _add_two)


@inline
def dot_rows(left: tl.tensor, right: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    total = left[0] * right[0]
    for c in tl.static_range(1, CHUNKS):
        total += left[c] * right[c]
    return tl.sum(total, 0)


@inline
def scale_row(row: tl.tensor, factor: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """row * factor, a number."""
    scaled = ()
    for c in tl.static_range(CHUNKS):
        scaled = append(scaled, row[c] * factor)
    return scaled


@inline
def add_rows(left: tl.tensor, right: tl.tensor, factor: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """left + right * factor, a number."""
    total = ()
    for c in tl.static_range(CHUNKS):
        total = append(total, left[c] + right[c] * factor)
    return total


@inline
def multiply_rows(left: tl.tensor, right: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """left * right, channel by channel."""
    product = ()
    for c in tl.static_range(CHUNKS):
        product = append(product, left[c] * right[c])
    return product


@inline
def multiply_add_rows(
    row: tl.tensor, factor: tl.tensor, addend: tl.tensor, CHUNKS: tl.constexpr
) -> tl.tensor:
    """row * factor + addend, channel by channel."""
    total = ()
    for c in tl.static_range(CHUNKS):
        total = append(total, row[c] * factor[c] + addend[c])
    return total


@inline
def inverse_norm(row: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """1 / max(||row||, 1e-12), the factor of torch.nn.functional.normalize."""
    norm = tl.sqrt(dot_rows(row, row, CHUNKS))
    return 1.0 / tl.where(norm > 1e-12, norm, 1e-12)
