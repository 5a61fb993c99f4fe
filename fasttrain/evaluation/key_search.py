"""The k keys that each query is most like, exactly: all of the first frame's, near ones of the last frames'.

A frame is searched one strip of queries across the grid's short side against the wider strip of keys that
their discs reach, so that memory is bounded by one block of affinities and by the remembered features. The k
largest affinities of a query stand at the k cells whose best frame is largest: the maximum over the frames
leaves one number a cell to cut to the disc and to sort.

Shape suffixes: F remembered frames (slot 0 holds the first), H W grid, N = H * W tokens (lines across the
short side, one after another), D channels, Q queries of a strip, K keys of a frame, G best cells, k nearest.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Affinities held at once on a GPU: 2**26 float32 are 256 MiB.
GPU_AFFINITIES = 2**26
# Queries of a strip on a CPU: enough for the product to be efficient, few enough to leave distant keys out.
CPU_QUERIES = 256


@dataclass(frozen=True)
class Strip:
    """Queries across the short side of the grid and the wider strip of keys that their discs reach."""

    queries: slice
    keys: slice
    outside_QK: Tensor

    def rows(self, chosen_Q: Tensor) -> "Strip":
        """The strip with the discs of the chosen queries alone."""
        return replace(self, outside_QK=self.outside_QK[chosen_Q])


class KeySearch:
    """Features of the first and of the last frames, and the search among them."""

    def __init__(self, first_ND: Tensor, *, slots: int, topk: int) -> None:
        self.unit_FND = torch.empty((slots, *first_ND.shape), device=first_ND.device)
        self.topk = topk
        self.unit_FND[0] = first_ND

    def remember(self, slot: int, unit_ND: Tensor) -> None:
        """Put a frame's features, unit vectors, in a slot of its own or in that of a frame now forgotten."""
        self.unit_FND[slot] = unit_ND

    def largest(self, query_QD: Tensor, strip: Strip, recent: int) -> tuple[Tensor, Tensor]:
        """The k largest affinities of each query, in order, and their keys: slot of the frame * N + token.

        Searched are the first frame, all of it, and within the strip's discs the frames at slots 1 to
        `recent`. Where fewer than k keys are in reach the rest, if there is one, has an affinity of -inf.
        """
        affinity_Qk, source_Qk = _largest(query_QD @ self.unit_FND[0].T, self.topk)
        if not recent:
            return affinity_Qk, source_Qk
        product_FKQ = torch.bmm(self.unit_FND[1 : 1 + recent, strip.keys], query_QD.T.expand(recent, -1, -1))
        best_QK = product_FKQ.amax(0).T.contiguous().masked_fill_(strip.outside_QK, -torch.inf)
        recent_Qk, recent_source_Qk = self._largest_in_cells(product_FKQ, best_QK, strip)
        affinity_Qk, order_Qk = _largest(torch.cat([affinity_Qk, recent_Qk], dim=-1), self.topk)
        return affinity_Qk, torch.cat([source_Qk, recent_source_Qk], dim=-1).gather(1, order_Qk)

    def _largest_in_cells(self, value_FKQ: Tensor, best_QK: Tensor, strip: Strip) -> tuple[Tensor, Tensor]:
        """The k largest values of each query over frames and cells, in order, and their keys."""
        best_QG, cell_QG = _largest(best_QK, self.topk)
        frames, cells = len(value_FKQ), cell_QG.shape[1]
        through_FGQ = value_FKQ.gather(1, cell_QG.T.expand(frames, -1, -1))
        through_FGQ.masked_fill_(best_QG.T.isneginf(), -torch.inf)
        through_QM = through_FGQ.permute(2, 0, 1).flatten(1)
        value_Qk, index_Qk = _largest(through_QM, self.topk)
        token_Qk = strip.keys.start + cell_QG.gather(1, index_Qk % cells)
        return value_Qk, (1 + index_Qk // cells) * self.unit_FND.shape[1] + token_Qk


def _largest(values_QM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, or all, in order, and their indices."""
    values, indices = values_QM.topk(min(count, values_QM.shape[1]), dim=-1)
    return values, indices


def strips(long: int, short: int, radius: float, context: int, device: torch.device) -> Iterator[Strip]:
    """Strips that cover the grid, each with the keys within `radius` of any of its queries."""
    reach = max(1, math.ceil(min(radius, long + short)))
    queries = GPU_AFFINITIES // ((context + 1) * long * short) if device.type == "cuda" else CPU_QUERIES
    lines = max(1, queries // short)
    token_N = torch.arange(long * short, device=device)
    for start in range(0, long, lines):
        stop = min(start + lines, long)
        of_queries = slice(start * short, stop * short)
        of_keys = slice(max(0, start - reach + 1) * short, min(long, stop + reach - 1) * short)
        distance2_QK = squared_distance(token_N[of_queries, None], token_N[of_keys], short)
        yield Strip(of_queries, of_keys, distance2_QK >= radius**2)


def squared_distance(one: Tensor, other: Tensor, short: int) -> Tensor:
    """Squared distance of tokens on the grid, in cells."""
    return (one // short - other // short) ** 2 + (one % short - other % short) ** 2


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in true float32, whatever TF32 and autocast say: near affinities must keep their order."""
    matmul: Any = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
