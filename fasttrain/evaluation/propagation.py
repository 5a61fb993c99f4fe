"""Label propagation: carry the labels of a video's first frame along by the affinity of frozen features.

Every query token of frame t attends to the first frame (no radius) and to the last `context` frames (keys
within Euclidean grid distance < `radius`); frames before the first stand in as copies of the first. The k
largest affinities / temperature go through a softmax and weigh the labels of their keys. The protocol is that
of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020, ajabri/videowalk).

A frame is searched exactly, one rectangle of queries against the larger rectangle of keys that their discs
reach, so that memory is bounded by one block of affinities and by the last `context` frames' features. The k
largest affinities of a query stand at the k cells whose best frame is largest: the maximum over the frames
leaves one number a cell to cut to the disc and to sort. Copies of the first frame are not searched again but
counted.

Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, Q queries of a block, K keys of a
frame, F recent frames, G best cells, k neighbours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError

# Affinities held at once on a GPU: 2**26 float32 are 256 MiB.
GPU_AFFINITIES = 2**26
# Side of a block of queries on a CPU: large enough for the product to be efficient, small enough to leave
# distant keys out.
CPU_BLOCK = 16


@dataclass(frozen=True)
class _Block:
    """A rectangle of queries and the larger rectangle of keys that their discs reach."""

    queries_Q: Tensor
    keys_K: Tensor
    key_rows: slice
    key_columns: slice
    outside_QK: Tensor


def propagate_labels(
    features_THWD: Tensor,
    first_labels_HWC: Tensor,
    context: int = 20,
    radius: float = 20,
    topk: int = 7,
    temperature: float = 0.7,
) -> Tensor:
    """Soft labels of every frame, (T, H, W, C) float32 on the features' device; frame 0 as given.

    `features_THWD` need not be normalised. `radius` is in cells, exclusive; `temperature` divides the cosine
    affinity. Raises InputError for shapes or settings that cannot be propagated.
    """
    if features_THWD.ndim != 4 or 0 in features_THWD.shape:
        raise InputError(
            f"features have shape {tuple(features_THWD.shape)}; expected a non-empty (T, H, W, D)"
        )
    propagator = Propagator(features_THWD[0], first_labels_HWC, context, radius, topk, temperature)
    labels_THWC = torch.empty(
        (len(features_THWD), *first_labels_HWC.shape), dtype=torch.float32, device=features_THWD.device
    )
    labels_THWC[0] = first_labels_HWC
    for frame in range(1, len(features_THWD)):
        labels_THWC[frame] = propagator.step(features_THWD[frame])
    return labels_THWC


class Propagator:
    """`propagate_labels` of a stream: one frame at a time, remembering the first and the last `context`."""

    def __init__(
        self,
        first_features_HWD: Tensor,
        first_labels_HWC: Tensor,
        context: int = 20,
        radius: float = 20,
        topk: int = 7,
        temperature: float = 0.7,
    ) -> None:
        _check(first_features_HWD, first_labels_HWC, context, topk, temperature)
        height, width, channels = first_features_HWD.shape
        tokens, device = height * width, first_features_HWD.device
        self.context, self.radius, self.temperature = context, radius, temperature
        self.topk = min(topk, tokens)
        self.frames_seen = 1
        # Place 0 holds the first frame, the others the last frames in turn.
        self.unit_FHWD = torch.empty((context + 1, height, width, channels), device=device)
        self.labels_FNC = torch.empty((context + 1, tokens, first_labels_HWC.shape[-1]), device=device)
        self.unit_FHWD[0] = functional.normalize(first_features_HWD.float(), dim=-1)
        self.labels_FNC[0] = first_labels_HWC.reshape(tokens, -1)
        self.blocks = list(_blocks(height, width, radius, context, device))

    @torch.no_grad()
    def step(self, features_HWD: Tensor) -> Tensor:
        """Soft labels (H, W, C) float32 of the next frame from its features (H, W, D)."""
        if features_HWD.shape != self.unit_FHWD.shape[1:]:
            expected = tuple(self.unit_FHWD.shape[1:])
            raise InputError(f"features of shape {tuple(features_HWD.shape)}; the first frame's: {expected}")
        unit_HWD = functional.normalize(features_HWD.float(), dim=-1)
        labels_NC = torch.empty_like(self.labels_FNC[0])
        flat_LC = self.labels_FNC.flatten(0, 1)
        with _full_precision(unit_HWD.device):
            for block in self.blocks:
                source_Qk, weight_Qk = self._attend(unit_HWD, block)
                labels_NC[block.queries_Q] = torch.einsum("qk,qkc->qc", weight_Qk, flat_LC[source_Qk])
        place = 1 + (self.frames_seen - 1) % self.context
        self.unit_FHWD[place], self.labels_FNC[place] = unit_HWD, labels_NC
        self.frames_seen += 1
        return labels_NC.unflatten(0, features_HWD.shape[:2])

    def _attend(self, unit_HWD: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
        """The k sources of each query, flat indices (place of their frame * N + token), and their weights."""
        query_QD = unit_HWD.flatten(0, 1)[block.queries_Q]
        affinity_Qk, source_Qk = (query_QD @ self.unit_FHWD[0].flatten(0, 1).T).topk(self.topk, dim=-1)
        recent = min(self.frames_seen - 1, self.context)
        if recent:
            recent_Qk, recent_source_Qk = self._largest_recent(query_QD, block, recent)
            affinity_Qk, order_Qk = torch.cat([affinity_Qk, recent_Qk], dim=-1).topk(self.topk, dim=-1)
            source_Qk = torch.cat([source_Qk, recent_source_Qk], dim=-1).gather(1, order_Qk)
        multiplicity_Qk = torch.ones_like(source_Qk)
        copies = self.context - recent
        if copies:
            multiplicity_Qk += copies * self._near_first(block, source_Qk)
        return source_Qk, _weights(affinity_Qk, multiplicity_Qk, self.topk, self.temperature)

    def _largest_recent(self, query_QD: Tensor, block: _Block, recent: int) -> tuple[Tensor, Tensor]:
        """The k largest affinities with the last frames, within the disc, and their flat indices."""
        keys_FKD = self.unit_FHWD[1 : 1 + recent, block.key_rows, block.key_columns].flatten(1, 2)
        keys = len(block.keys_K)
        product_QFK = (query_QD @ keys_FKD.flatten(0, 1).T).view(-1, recent, keys)
        best_QK = product_QFK.amax(1).masked_fill_(block.outside_QK, -torch.inf)
        best_QG, cell_QG = best_QK.topk(min(self.topk, keys), dim=-1)
        through_QFG = product_QFK.gather(2, cell_QG.unsqueeze(1).expand(-1, recent, -1))
        through_QFG.masked_fill_(best_QG.isneginf().unsqueeze(1), -torch.inf)
        cells = cell_QG.shape[1]
        affinity_Qk, place_Qk = through_QFG.flatten(1).topk(min(self.topk, recent * cells), dim=-1)
        token_Qk = block.keys_K[cell_QG.gather(1, place_Qk % cells)]
        return affinity_Qk, (1 + place_Qk // cells) * self.labels_FNC.shape[1] + token_Qk

    def _near_first(self, block: _Block, source_Qk: Tensor) -> Tensor:
        """Whether each source is a token of the first frame whose copies its query also attends to."""
        width = self.unit_FHWD.shape[2]
        query_Q1 = block.queries_Q.unsqueeze(-1)
        rows_Qk = source_Qk // width - query_Q1 // width
        columns_Qk = source_Qk % width - query_Q1 % width
        return (rows_Qk**2 + columns_Qk**2 < self.radius**2) & (source_Qk < self.labels_FNC.shape[1])


def _weights(affinity_Qk: Tensor, multiplicity_Qk: Tensor, topk: int, temperature: float) -> Tensor:
    """Softmax over the first k of the affinities, largest first, each repeated `multiplicity` times."""
    before_Qk = multiplicity_Qk.cumsum(-1) - multiplicity_Qk
    taken_Qk = torch.minimum((topk - before_Qk).clamp(min=0), multiplicity_Qk)
    weight_Qk = taken_Qk * ((affinity_Qk - affinity_Qk[:, :1]) / temperature).exp()
    return weight_Qk / weight_Qk.sum(-1, keepdim=True)


def _blocks(height: int, width: int, radius: float, context: int, device: torch.device) -> Iterator[_Block]:
    """Rectangles that cover the grid, each with the keys within `radius` of any of its queries."""
    reach = max(1, math.ceil(min(radius, height + width)))
    side = CPU_BLOCK
    if device.type == "cuda":
        side = max(1, int((GPU_AFFINITIES / ((context + 1) * height * width)) ** 0.5))
        side = max(height, width) if side * side >= height * width else side
    token_HW = torch.arange(height * width, device=device).view(height, width)
    for top in range(0, height, side):
        for left in range(0, width, side):
            queries_Q = token_HW[top : top + side, left : left + side].flatten()
            rows = slice(max(0, top - reach + 1), min(top + side, height) + reach - 1)
            columns = slice(max(0, left - reach + 1), min(left + side, width) + reach - 1)
            keys_K = token_HW[rows, columns].flatten()
            distance2_QK = (queries_Q[:, None] // width - keys_K // width) ** 2
            distance2_QK += (queries_Q[:, None] % width - keys_K % width) ** 2
            yield _Block(queries_Q, keys_K, rows, columns, distance2_QK >= radius**2)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in true float32, whatever TF32 and autocast say: near affinities must keep their order."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check(features: Tensor, labels: Tensor, context: int, topk: int, temperature: float) -> None:
    if features.ndim != 3 or 0 in features.shape:
        raise InputError(f"features have shape {tuple(features.shape)}; expected a non-empty (H, W, D)")
    if labels.ndim != 3 or labels.shape[:2] != features.shape[:2]:
        grid = tuple(features.shape[:2])
        raise InputError(f"first labels have shape {tuple(labels.shape)}; expected {grid} + (classes,)")
    for name, value in (("context", context), ("topk", topk)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected an integer of at least 1")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected a number above 0")
