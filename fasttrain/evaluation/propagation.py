"""Label propagation: transfer the labels of a video's first frame to the others by feature similarity.

Each query token of frame t attends to all tokens of the first frame and to those tokens of the `context`
preceding frames whose Euclidean distance on the grid is below `radius`. At the start of a video, copies of
the first frame replace the frames that do not exist. The k largest cosine similarities, divided by the
temperature, pass through a softmax and weight the labels of their keys. The protocol is that of Jabri et al.,
"Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020, github.com/ajabri/videowalk).

Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, F frames in memory (the first one
at index 0), Q queries of a strip, K keys of a strip, k nearest keys, M candidates for them, X either D or C.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.options import CONTEXT, RADIUS, TEMPERATURE, TOPK

# The number of affinities computed at once: 256 MiB on a GPU, for few large matrix products, and 32 MiB on a
# CPU, for its caches.
GPU_AFFINITIES, CPU_AFFINITIES = 2**26, 2**23


def propagate_labels(
    features_THWD: Tensor,
    first_labels_HWC: Tensor,
    context: int = CONTEXT,
    radius: float = RADIUS,
    topk: int = TOPK,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Propagate the labels of the first frame through a video by feature similarity.

    Every token of a frame attends to the first frame and to nearby tokens of the preceding frames. The
    softmax over its `topk` most similar tokens weights their labels. The protocol is that of Jabri et al.,
    "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020). Call this function outside
    autocast, because rounding changes which tokens are most similar.

    Args:
        features_THWD: Features of T frames on a grid of H x W tokens; they need not be normalised.
        first_labels_HWC: Soft or one-hot labels of the first frame over C classes.
        context: Number of preceding frames to attend to, besides the first frame (default: 20).
        radius: Tokens of the preceding frames are candidates if their distance on the grid is below this
            number of cells (default: 20). It does not apply to the first frame.
        topk: Number of tokens whose labels are combined (default: 7).
        temperature: Divisor of the cosine similarities before the softmax (default: 0.7).

    Returns:
        Soft labels (T, H, W, C), float32, on the device of the features. Frame 0 has `first_labels_HWC`.

    Raises:
        InputError: If a shape or a setting is invalid or a feature is not finite.
    """
    shape, labels_shape = tuple(features_THWD.shape), tuple(first_labels_HWC.shape)
    if len(shape) != 4 or 0 in shape or len(labels_shape) != 3 or labels_shape[:2] != shape[1:3]:
        raise InputError(
            f"features have shape {shape} and first labels {labels_shape}; expected a non-empty (T, H, W, D) "
            "and (H, W, C)"
        )
    first_labels_HWC = first_labels_HWC.to(features_THWD.device, torch.float32)
    propagator = Propagator(features_THWD[0], first_labels_HWC, context, radius, topk, temperature)
    return torch.stack([first_labels_HWC, *map(propagator.step, features_THWD[1:])])


class _Strip(NamedTuple):
    """A strip of queries across the short side of the grid, and the wider strip of keys within `radius`."""

    queries: slice
    keys: slice
    is_far_QN: Tensor


class Propagator:
    """Propagate labels frame by frame; keeps the first and the last `context` frames in memory."""

    @torch.no_grad()
    def __init__(
        self,
        first_features_HWD: Tensor,
        first_labels_HWC: Tensor,
        context: int,
        radius: float,
        topk: int,
        temperature: float,
    ) -> None:
        check_settings(context, radius, topk, temperature)
        height, width, _ = first_features_HWD.shape
        self.context, self.topk, self.temperature = context, topk, temperature
        self.is_wide, self.steps = height < width, 0
        # Index 0 holds the first frame. The rest is a ring buffer that initially holds copies of it.
        self.unit_FND = self._unit(first_features_HWD).repeat(context + 1, 1, 1)
        self.labels_FNC = self._tokens(first_labels_HWC.float()).repeat(context + 1, 1, 1)
        device = first_features_HWD.device
        self.strips = list(_strips(max(height, width), min(height, width), radius, context, device))

    @torch.no_grad()
    def step(self, features_HWD: Tensor) -> Tensor:
        """Return the soft labels (H, W, C) float32 of the next frame, given its features (H, W, D)."""
        unit_ND = self._unit(features_HWD)
        labels_NC = torch.cat([self._attend(unit_ND[strip.queries], strip) for strip in self.strips])
        index = 1 + self.steps % self.context
        self.unit_FND[index], self.labels_FNC[index] = unit_ND, labels_NC
        self.steps += 1
        height, width, _ = features_HWD.shape
        if self.is_wide:
            return labels_NC.unflatten(0, (width, height)).transpose(0, 1).contiguous()
        return labels_NC.unflatten(0, (height, width))

    def _tokens(self, values_HWX: Tensor) -> Tensor:
        """Flatten the grid to (N, X) with the short side innermost, so that strips are contiguous slices."""
        return (values_HWX.transpose(0, 1) if self.is_wide else values_HWX).flatten(0, 1)

    def _unit(self, features_HWD: Tensor) -> Tensor:
        """Normalise features to unit vectors (N, D) float32. Raises InputError if they are not finite."""
        unit_ND = functional.normalize(self._tokens(features_HWD).float(), dim=-1)
        if not unit_ND.isfinite().all():
            raise InputError("features are not all finite. Check the frames and the encoder's weights.")
        return unit_ND

    def _attend(self, query_QD: Tensor, strip: _Strip) -> Tensor:
        """Return the labels (Q, C): those of each query's k nearest keys, weighted by their affinities.

        The k largest affinities of a query lie in the k cells with the largest maximum over frames. Selecting
        these cells first means that topk runs over one number per cell, not one per cell and frame.
        """
        (frames, tokens, _), keys, is_far_QN = self.unit_FND.shape, strip.keys, strip.is_far_QN
        first_QN = query_QD @ self.unit_FND[0].T
        recent_FQK = query_QD @ self.unit_FND[1:, keys].transpose(1, 2)
        recent_QK = recent_FQK.amax(0).masked_fill_(is_far_QN[:, keys], -torch.inf)
        best_QN = first_QN.clone()
        best_QN[:, keys] = torch.maximum(first_QN[:, keys], recent_QK)
        cell_Qk = best_QN.topk(min(self.topk, tokens)).indices
        key_Qk = (cell_Qk - keys.start).clamp(0, recent_QK.shape[1] - 1)
        recent_FQk = recent_FQK.gather(2, key_Qk.expand(frames - 1, -1, -1))
        recent_FQk.masked_fill_(is_far_QN.gather(1, cell_Qk), -torch.inf)
        affinity_FQk = torch.cat([first_QN.gather(1, cell_Qk)[None], recent_FQk])
        source_FQk = cell_Qk + tokens * torch.arange(frames, device=cell_Qk.device)[:, None, None]
        affinity_QM, source_QM = (values.transpose(0, 1).flatten(1) for values in (affinity_FQk, source_FQk))
        affinity_Qk, index_Qk = affinity_QM.topk(min(self.topk, affinity_QM.shape[1]))
        labels_QkC = self.labels_FNC.flatten(0, 1)[source_QM.gather(1, index_Qk)]
        return torch.einsum("qk,qkc->qc", (affinity_Qk / self.temperature).softmax(-1), labels_QkC)


def _strips(long: int, short: int, radius: float, context: int, device: torch.device) -> Iterator[_Strip]:
    """Yield strips that cover the grid, each with the keys within `radius` of any of its queries."""
    affinities = GPU_AFFINITIES if device.type == "cuda" else CPU_AFFINITIES
    lines = max(1, affinities // ((context + 1) * long * short**2))
    reach = math.ceil(min(radius, long + short))
    cell_N2 = torch.cartesian_prod(torch.arange(long), torch.arange(short)).float().to(device)
    for start in range(0, long, lines):
        stop = min(start + lines, long)
        queries = slice(start * short, stop * short)
        keys = slice(max(0, start - reach) * short, min(long, stop + reach) * short)
        yield _Strip(queries, keys, torch.cdist(cell_N2[queries], cell_N2) >= radius)


def check_settings(context: int, radius: float, topk: int, temperature: float) -> None:
    """Raise InputError for settings out of range."""
    if not (context >= 1 and topk >= 1 and radius >= 0 and temperature > 0):
        raise InputError(
            f"context {context}, topk {topk}, radius {radius}, temperature {temperature}: expected context "
            "and topk of at least 1, radius of at least 0 and temperature above 0"
        )
