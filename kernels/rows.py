"""Arithmetic on rows: the D channels of one token, as a tuple of CHUNKS blocks of BLOCK fp32 numbers.

Entries beyond D are 0. The size of a block in Triton must be a power of two. Three blocks fit the 384, 768 or
1536 channels of a ViT exactly, whereas a single block would leave a quarter of its lanes idle.
"""

from __future__ import annotations

from .runtime import inline, next_power_of_2, tl


def row_blocks(channels: int) -> tuple[int, int]:
    """Choose BLOCK and CHUNKS with the least padding: one block, or three blocks of at least 128 channels."""
    whole = next_power_of_2(channels)
    third = whole // 4
    return (third, 3) if third >= 128 and 3 * third >= channels else (max(whole, 32), 1)


@inline
def append(row, block):
    """Append a block to a row."""
    last = (block,)
    return row + last


@inline
def load_row(row_ptr, exists, D, BLOCK, CHUNKS):
    """Load a row as fp32, or zeros if it does not exist."""
    limit = tl.where(exists, D, 0)
    row = ()
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        row = append(row, tl.load(row_ptr + columns, mask=columns < limit, other=0.0).to(tl.float32))
    return row


@inline
def store_row(row_ptr, row, exists, D, BLOCK):
    limit = tl.where(exists, D, 0)
    for c in tl.static_range(len(row)):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        tl.store(row_ptr + columns, row[c].to(row_ptr.dtype.element_ty), mask=columns < limit)


@inline
def zero_row(BLOCK, CHUNKS):
    row = ()
    for _ in tl.static_range(CHUNKS):
        row = append(row, tl.zeros([BLOCK], dtype=tl.float32))
    return row


@inline
def sum_chunks(row):
    """Add the blocks of a row elementwise, which gives a single block."""
    total = row[0]
    for c in tl.static_range(1, len(row)):
        total += row[c]
    return total


@inline
def scale_row(row, factor):
    """row * factor, where factor is a scalar."""
    scaled = ()
    for c in tl.static_range(len(row)):
        scaled = append(scaled, row[c] * factor)
    return scaled


@inline
def add_rows(left, right, factor):
    """left + right * factor, where factor is a scalar."""
    total = ()
    for c in tl.static_range(len(left)):
        total = append(total, left[c] + right[c] * factor)
    return total


@inline
def multiply_rows(left, right):
    """left * right, elementwise."""
    product = ()
    for c in tl.static_range(len(left)):
        product = append(product, left[c] * right[c])
    return product


@inline
def dot_rows(left, right):
    total = left[0] * right[0]
    for c in tl.static_range(1, len(left)):
        total += left[c] * right[c]
    return tl.sum(total, 0)


@inline
def multiply_add_rows(row, factor, addend):
    """row * factor + addend, elementwise."""
    total = ()
    for c in tl.static_range(len(row)):
        total = append(total, row[c] * factor[c] + addend[c])
    return total


@inline
def inverse_norm(row):
    """1 / max(||row||, 1e-12), as in torch.nn.functional.normalize."""
    norm = tl.sqrt(dot_rows(row, row))
    return 1.0 / tl.where(norm > 1e-12, norm, 1e-12)
