"""Label propagation: carry the labels of a video's first frame along by the affinity of frozen features.

Every query token of frame t attends to the first frame (no radius) and to the last `context` frames (keys
within Euclidean grid distance < `radius`); frames before the first stand in as copies of the first. The k
largest affinities / temperature go through a softmax and weigh the labels of their keys. The protocol is that
of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020, ajabri/videowalk).

The search is exact: `key_search.py`, and on a CPU `cpu_key_search.py`. Copies of the first frame are not
searched again but counted.

Shape suffixes: T frames, H W grid, N = H * W tokens (lines across the short side, one after another), D
channels, C classes, F remembered frames, Q queries of a strip, k neighbours, X any of D and C.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.evaluation.cpu_key_search import CpuKeySearch
from fasttrain.evaluation.key_search import KeySearch, Strip, full_precision, squared_distance, strips

# The protocol's, with DAVIS' number of keys: frames, grid cells, keys, and what divides the affinities.
CONTEXT, RADIUS, TOPK, TEMPERATURE = 20, 20.0, 7, 0.7


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
    affinity. Raises InputError for shapes or settings that cannot be propagated, and for features that are
    not finite.
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
        _check_shapes(first_features_HWD, first_labels_HWC)
        height, width, _ = first_features_HWD.shape
        tokens, device = height * width, first_features_HWD.device
        self.grid, self.short = (height, width), min(height, width)
        self.context, self.radius, self.temperature = context, radius, temperature
        self.frames_seen = 1
        self.strips = list(strips(max(height, width), self.short, radius, context, device))
        # Slot 0 holds the first frame, the others the last frames in turn.
        self.labels_FNC = torch.empty((context + 1, tokens, first_labels_HWC.shape[-1]), device=device)
        self.labels_FNC[0] = self._long_side_first(first_labels_HWC)
        first_ND = self._unit(first_features_HWD)
        with full_precision(device):
            kind = CpuKeySearch if device.type == "cpu" else KeySearch
            self.search = kind(first_ND, slots=context + 1, topk=topk)

    @torch.no_grad()
    def step(self, features_HWD: Tensor) -> Tensor:
        """Soft labels (H, W, C) float32 of the next frame from its features (H, W, D)."""
        expected = (*self.grid, self.search.unit_FND.shape[-1])
        if features_HWD.shape != expected:
            raise InputError(f"features of shape {tuple(features_HWD.shape)}; the first frame's: {expected}")
        unit_ND = self._unit(features_HWD)
        labels_NC = torch.empty_like(self.labels_FNC[0])
        flat_MC = self.labels_FNC.flatten(0, 1)
        slot = 1 + (self.frames_seen - 1) % self.context
        with full_precision(unit_ND.device):
            for strip in self.strips:
                source_Qk, weight_Qk = self._attend(unit_ND[strip.queries], strip)
                labels_NC[strip.queries] = torch.einsum("qk,qkc->qc", weight_Qk, flat_MC[source_Qk])
            self.search.remember(slot, unit_ND)
        self.labels_FNC[slot] = labels_NC
        self.frames_seen += 1
        height, width = self.grid
        if height < width:
            return labels_NC.view(width, height, -1).transpose(0, 1).contiguous()
        return labels_NC.view(height, width, -1)

    def _long_side_first(self, values_HWX: Tensor) -> Tensor:
        """(N, X): the order of tokens in which strips across the short side are whole slices."""
        height, width = self.grid
        return (values_HWX.transpose(0, 1) if height < width else values_HWX).flatten(0, 1)

    def _unit(self, features_HWD: Tensor) -> Tensor:
        unit_ND = functional.normalize(self._long_side_first(features_HWD).float(), dim=-1)
        if not unit_ND.isfinite().all():
            raise InputError("features are not all finite; look at the frame and at the encoder's weights")
        return unit_ND

    def _attend(self, query_QD: Tensor, strip: Strip) -> tuple[Tensor, Tensor]:
        """The k sources of each query, flat indices (slot of their frame * N + token), and their weights."""
        recent = min(self.frames_seen - 1, self.context)
        affinity_Qk, source_Qk = self.search.largest(query_QD, strip, recent)
        multiplicity_Qk = torch.ones_like(source_Qk)
        copies = self.context - recent
        if copies:
            multiplicity_Qk += copies * self._near_first(strip, source_Qk)
        return source_Qk, _weights(affinity_Qk, multiplicity_Qk, self.search.topk, self.temperature)

    def _near_first(self, strip: Strip, source_Qk: Tensor) -> Tensor:
        """Whether each source is a token of the first frame whose copies its query also attends to."""
        query_Q1 = torch.arange(strip.queries.start, strip.queries.stop, device=source_Qk.device)[:, None]
        near_Qk = squared_distance(query_Q1, source_Qk, self.short) < self.radius**2
        return near_Qk & (source_Qk < self.labels_FNC.shape[1])


def _weights(affinity_Qk: Tensor, multiplicity_Qk: Tensor, topk: int, temperature: float) -> Tensor:
    """Softmax over the first `topk` of the affinities, largest first, each repeated `multiplicity` times."""
    before_Qk = multiplicity_Qk.cumsum(-1) - multiplicity_Qk
    taken_Qk = torch.minimum((topk - before_Qk).clamp(min=0), multiplicity_Qk)
    weight_Qk = taken_Qk * ((affinity_Qk - affinity_Qk[:, :1]) / temperature).exp()
    return weight_Qk / weight_Qk.sum(-1, keepdim=True)


def check_settings(context: int, radius: float, topk: int, temperature: float) -> None:
    """Raises InputError for settings that nothing can be propagated with."""
    for name, value in (("context", context), ("topk", topk)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected an integer of at least 1")
    if not radius >= 0:
        raise InputError(f"radius is {radius}; expected a number of at least 0")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected a number above 0")


def _check_shapes(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 3 or 0 in features.shape:
        raise InputError(f"features have shape {tuple(features.shape)}; expected a non-empty (H, W, D)")
    if labels.ndim != 3 or labels.shape[:2] != features.shape[:2]:
        grid = tuple(features.shape[:2])
        raise InputError(f"first labels have shape {tuple(labels.shape)}; expected {grid} + (classes,)")
