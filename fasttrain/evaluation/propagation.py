"""Label propagation: carry the labels of a video's first frame along by the affinity of frozen features.

Every query token of frame t attends to the first frame (no radius) and to the last `context` frames (keys
within Euclidean grid distance < `radius`); frames before the first stand in as copies of the first. The k
largest affinities / temperature go through a softmax and weigh the labels of their keys. The protocol is that
of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020, ajabri/videowalk).

A frame is searched exactly, one strip of queries across the grid's short side against the wider strip of keys
that their discs reach, so that memory is bounded by one block of affinities and by the last `context` frames'
features. The k largest affinities of a query stand at the k cells whose best frame is largest: the maximum
over the frames leaves one number a cell to cut to the disc and to sort. Copies of the first frame are not
searched again but counted.

Shape suffixes: T frames, H W grid, N = H * W tokens (lines across the short side, one after another), D
channels, C classes, Q queries of a strip, K keys of a frame, F recent frames, G best cells, k neighbours.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError

# The protocol's, with DAVIS' number of keys: frames, grid cells, keys, and what divides the affinities.
CONTEXT, RADIUS, TOPK, TEMPERATURE = 20, 20.0, 7, 0.7
# Affinities held at once on a GPU: 2**26 float32 are 256 MiB.
GPU_AFFINITIES = 2**26
# Queries of a strip on a CPU: enough for the product to be efficient, few enough to leave distant keys out.
CPU_QUERIES = 256


@dataclass(frozen=True)
class _Strip:
    """Queries across the short side of the grid and the wider strip of keys that their discs reach."""

    queries: slice
    keys: slice
    outside_QK: Tensor


def propagate_labels(
    features_THWD: Tensor,
    first_labels_HWC: Tensor,
    context: int = CONTEXT,
    radius: float = RADIUS,
    topk: int = TOPK,
    temperature: float = TEMPERATURE,
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
        context: int,
        radius: float,
        topk: int,
        temperature: float,
    ) -> None:
        check_settings(context, topk, temperature)
        _check_shapes(first_features_HWD, first_labels_HWC)
        height, width, channels = first_features_HWD.shape
        tokens, device = height * width, first_features_HWD.device
        self.grid, self.short = (height, width), min(height, width)
        self.context, self.radius, self.temperature = context, radius, temperature
        self.topk = min(topk, tokens)
        self.frames_seen = 1
        # Place 0 holds the first frame, the others the last frames in turn.
        self.unit_FND = torch.empty((context + 1, tokens, channels), device=device)
        self.labels_FNC = torch.empty((context + 1, tokens, first_labels_HWC.shape[-1]), device=device)
        self.unit_FND[0] = functional.normalize(self._long_side_first(first_features_HWD).float(), dim=-1)
        self.labels_FNC[0] = self._long_side_first(first_labels_HWC)
        self.strips = list(_strips(max(height, width), self.short, radius, context, device))

    @torch.no_grad()
    def step(self, features_HWD: Tensor) -> Tensor:
        """Soft labels (H, W, C) float32 of the next frame from its features (H, W, D)."""
        expected = (*self.grid, self.unit_FND.shape[-1])
        if features_HWD.shape != expected:
            raise InputError(f"features of shape {tuple(features_HWD.shape)}; the first frame's: {expected}")
        unit_ND = functional.normalize(self._long_side_first(features_HWD).float(), dim=-1)
        labels_NC = torch.empty_like(self.labels_FNC[0])
        flat_MC = self.labels_FNC.flatten(0, 1)
        with _full_precision(unit_ND.device):
            for strip in self.strips:
                source_Qk, weight_Qk = self._attend(unit_ND[strip.queries], strip)
                labels_NC[strip.queries] = torch.einsum("qk,qkc->qc", weight_Qk, flat_MC[source_Qk])
        place = 1 + (self.frames_seen - 1) % self.context
        self.unit_FND[place], self.labels_FNC[place] = unit_ND, labels_NC
        self.frames_seen += 1
        height, width = self.grid
        if height < width:
            return labels_NC.view(width, height, -1).transpose(0, 1).contiguous()
        return labels_NC.view(height, width, -1)

    def _long_side_first(self, values_HWX: Tensor) -> Tensor:
        """(N, X): the order of tokens in which strips across the short side are whole slices."""
        height, width = self.grid
        return (values_HWX.transpose(0, 1) if height < width else values_HWX).flatten(0, 1)

    def _attend(self, query_QD: Tensor, strip: _Strip) -> tuple[Tensor, Tensor]:
        """The k sources of each query, flat indices (place of their frame * N + token), and their weights."""
        affinity_Qk, source_Qk = (query_QD @ self.unit_FND[0].T).topk(self.topk, dim=-1)
        recent = min(self.frames_seen - 1, self.context)
        if recent:
            recent_Qk, recent_source_Qk = self._largest_recent(query_QD, strip, recent)
            affinity_Qk, order_Qk = torch.cat([affinity_Qk, recent_Qk], dim=-1).topk(self.topk, dim=-1)
            source_Qk = torch.cat([source_Qk, recent_source_Qk], dim=-1).gather(1, order_Qk)
        multiplicity_Qk = torch.ones_like(source_Qk)
        copies = self.context - recent
        if copies:
            multiplicity_Qk += copies * self._near_first(strip, source_Qk)
        return source_Qk, _weights(affinity_Qk, multiplicity_Qk, self.topk, self.temperature)

    def _largest_recent(self, query_QD: Tensor, strip: _Strip, recent: int) -> tuple[Tensor, Tensor]:
        """The k largest affinities with the last frames, within the disc, and their flat indices."""
        keys_FKD = self.unit_FND[1 : 1 + recent, strip.keys]
        product_FKQ = torch.bmm(keys_FKD, query_QD.T.expand(recent, -1, -1))
        best_QK = product_FKQ.amax(0).T.contiguous().masked_fill_(strip.outside_QK, -torch.inf)
        best_QG, cell_QG = best_QK.topk(min(self.topk, best_QK.shape[1]), dim=-1)
        cells = cell_QG.shape[1]
        through_FGQ = product_FKQ.gather(1, cell_QG.T.expand(recent, -1, -1))
        through_FGQ.masked_fill_(best_QG.T.isneginf(), -torch.inf)
        through_QM = through_FGQ.permute(2, 0, 1).flatten(1)
        affinity_Qk, place_Qk = through_QM.topk(min(self.topk, recent * cells), dim=-1)
        token_Qk = strip.keys.start + cell_QG.gather(1, place_Qk % cells)
        return affinity_Qk, (1 + place_Qk // cells) * self.labels_FNC.shape[1] + token_Qk

    def _near_first(self, strip: _Strip, source_Qk: Tensor) -> Tensor:
        """Whether each source is a token of the first frame whose copies its query also attends to."""
        query_Q1 = torch.arange(strip.queries.start, strip.queries.stop, device=source_Qk.device)[:, None]
        near_Qk = _squared_distance(query_Q1, source_Qk, self.short) < self.radius**2
        return near_Qk & (source_Qk < self.labels_FNC.shape[1])


def _squared_distance(one: Tensor, other: Tensor, short: int) -> Tensor:
    return (one // short - other // short) ** 2 + (one % short - other % short) ** 2


def _weights(affinity_Qk: Tensor, multiplicity_Qk: Tensor, topk: int, temperature: float) -> Tensor:
    """Softmax over the first k of the affinities, largest first, each repeated `multiplicity` times."""
    before_Qk = multiplicity_Qk.cumsum(-1) - multiplicity_Qk
    taken_Qk = torch.minimum((topk - before_Qk).clamp(min=0), multiplicity_Qk)
    weight_Qk = taken_Qk * ((affinity_Qk - affinity_Qk[:, :1]) / temperature).exp()
    return weight_Qk / weight_Qk.sum(-1, keepdim=True)


def _strips(long: int, short: int, radius: float, context: int, device: torch.device) -> Iterator[_Strip]:
    """Strips that cover the grid, each with the keys within `radius` of any of its queries."""
    reach = max(1, math.ceil(min(radius, long + short)))
    queries = GPU_AFFINITIES // ((context + 1) * long * short) if device.type == "cuda" else CPU_QUERIES
    lines = max(1, queries // short)
    token_N = torch.arange(long * short, device=device)
    for start in range(0, long, lines):
        stop = min(start + lines, long)
        of_queries = slice(start * short, stop * short)
        of_keys = slice(max(0, start - reach + 1) * short, min(long, stop + reach - 1) * short)
        distance2_QK = _squared_distance(token_N[of_queries, None], token_N[of_keys], short)
        yield _Strip(of_queries, of_keys, distance2_QK >= radius**2)


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


def check_settings(context: int, topk: int, temperature: float) -> None:
    """Raises InputError for settings that nothing can be propagated with."""
    for name, value in (("context", context), ("topk", topk)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected an integer of at least 1")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected a number above 0")


def _check_shapes(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 3 or 0 in features.shape:
        raise InputError(f"features have shape {tuple(features.shape)}; expected a non-empty (H, W, D)")
    if labels.ndim != 3 or labels.shape[:2] != features.shape[:2]:
        grid = tuple(features.shape[:2])
        raise InputError(f"first labels have shape {tuple(labels.shape)}; expected {grid} + (classes,)")
