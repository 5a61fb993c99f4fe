"""Label propagation: carry the labels of a video's first frame along by the affinity of frozen features.

Every query token of frame t attends to the first frame (no radius) and to the last `context` frames (keys
within Euclidean grid distance < `radius`); frames before the first stand in as copies of the first. The k
largest affinities / temperature go through a softmax and weigh the labels of their keys. The protocol is that
of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020, ajabri/videowalk).

The search is exact but seldom looks at whole vectors. Rotate the unit features onto the principal axes of the
sequence and split each into a head of d channels and the rest; by Cauchy-Schwarz

    q . k  =  q_head . k_head + q_rest . k_rest  <=  q_head . k_head + |q_rest| |k_rest|

so that one product of (d + 1)-vectors, with the norm of the rest as last channel, bounds every affinity from
above. Only the few keys with the largest bounds are looked at in full; a query whose k-th affinity does not
exceed the largest bound left out searches its whole neighbourhood in full. Copies of the first frame are not
searched again but counted (`multiplicity`).

Shape suffixes: T frames, H W grid, N = H * W tokens, D channels, C classes, Q queries of a tile, K keys,
M candidates, k neighbours, P = d + 1 channels of the bound.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.errors import InputError

# Share of the energy about the mean that the principal channels may leave to the bound's last channel.
RESIDUAL_SHARE = 0.01
# Above this share of the channels the bound costs as much as the affinities themselves.
LARGEST_HEAD = 0.5
# Largest rounding error (float32) of a bound against the affinity of two unit vectors.
BOUND_ROUNDING = 1e-5
# Affinities held at once on a GPU: 2**26 float32 are 256 MiB.
GPU_AFFINITIES = 2**26
# Tokens that the principal axes are estimated from.
AXES_SAMPLE = 8192


@dataclass(frozen=True)
class Neighbours:
    """The sources of every token of frames 1..T-1: flat token index t * N + n and softmax weight.

    `indices_TNk` is int64, `weights_TNk` float32; row t - 1 belongs to frame t. Weights sum to one over k.
    """

    indices_TNk: Tensor
    weights_TNk: Tensor


@dataclass(frozen=True)
class _Tile:
    """A rectangle of queries and the larger rectangle of keys that its discs reach."""

    queries_Q: Tensor
    keys_K: Tensor
    outside_QK: Tensor

    def rows(self, rows_U: Tensor) -> "_Tile":
        return _Tile(self.queries_Q[rows_U], self.keys_K, self.outside_QK[rows_U])


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
    _check(features_THWD, first_labels_HWC, context, topk, temperature)
    neighbours = find_neighbours(features_THWD, context, radius, topk, temperature)
    return spread_labels(neighbours, first_labels_HWC.to(features_THWD.device, torch.float32))


def spread_labels(neighbours: Neighbours, first_labels_HWC: Tensor) -> Tensor:
    """The label pass: frame after frame, each token the weighted mean of its sources. (T, H, W, C)."""
    height, width, classes = first_labels_HWC.shape
    steps, tokens = neighbours.indices_TNk.shape[:2]
    labels_TNC = first_labels_HWC.new_empty((steps + 1, tokens, classes))
    labels_TNC[0] = first_labels_HWC.reshape(tokens, classes)
    flat_LC = labels_TNC.view(-1, classes)
    for step in range(steps):
        sources_NkC = flat_LC[neighbours.indices_TNk[step]]
        labels_TNC[step + 1] = torch.einsum("nk,nkc->nc", neighbours.weights_TNk[step], sources_NkC)
    return labels_TNC.view(steps + 1, height, width, classes)


@torch.no_grad()
def find_neighbours(
    features_THWD: Tensor, context: int, radius: float, topk: int, temperature: float
) -> Neighbours:
    """The k sources of every token and their weights, in memory bounded by one tile of affinities."""
    frames, height, width, channels = features_THWD.shape
    tokens_TND = features_THWD.reshape(frames, height * width, channels)
    with _full_precision(tokens_TND.device):
        search = _Search(tokens_TND, context=context, topk=topk, temperature=temperature)
        for tile in _tiles(height, width, radius, context, tokens_TND.device):
            search.run(tile)
    return Neighbours(search.indices_TNk, search.weights_TNk)


class _Search:
    """Top-k search over the context of every frame, one tile of queries after another."""

    def __init__(self, tokens_TND: Tensor, *, context: int, topk: int, temperature: float) -> None:
        frames, tokens, channels = tokens_TND.shape
        self.tokens_LD = tokens_TND.reshape(-1, channels)
        self.scale_L = self.tokens_LD.float().norm(dim=-1).clamp(min=1e-12).reciprocal()
        self.bounds_TNP = _bound_channels(tokens_TND, self.scale_L.view(frames, tokens))
        self.context, self.temperature = context, temperature
        self.topk = min(topk, tokens)
        # How many keys are looked at, first for all queries and then for those not settled; too flat a
        # spectrum for any bound leaves none, and the search is in full.
        self.candidates = () if self.bounds_TNP.shape[-1] == channels else (2 * topk, 32 * topk)
        shape = (frames - 1, tokens, self.topk)
        self.indices_TNk = torch.zeros(shape, dtype=torch.int64, device=tokens_TND.device)
        self.weights_TNk = torch.zeros(shape, dtype=torch.float32, device=tokens_TND.device)

    def run(self, tile: _Tile) -> None:
        frames, tokens = self.bounds_TNP.shape[:2]
        # One copy for all frames, so that each frame's context is a view of it.
        keys_TKP = self.bounds_TNP[:, tile.keys_K]
        inside_QN = torch.zeros(len(tile.queries_Q), tokens, dtype=torch.int64, device=tile.keys_K.device)
        inside_QN[:, tile.keys_K] = (~tile.outside_QK).long()
        for frame in range(1, frames):
            affinity_Qk, source_Qk = self._nearest(frame, tile, keys_TKP)
            multiplicity_Qk = torch.ones_like(source_Qk)
            copies = self.context - frame + 1
            if copies > 0:
                near_Qk = inside_QN.gather(1, source_Qk.clamp(max=tokens - 1))
                multiplicity_Qk += copies * near_Qk * (source_Qk < tokens)
            self.indices_TNk[frame - 1, tile.queries_Q] = source_Qk
            self.weights_TNk[frame - 1, tile.queries_Q] = self._weights(affinity_Qk, multiplicity_Qk)

    def _weights(self, affinity_Qk: Tensor, multiplicity_Qk: Tensor) -> Tensor:
        """Softmax over the first k of the affinities, each repeated `multiplicity` times."""
        before_Qk = multiplicity_Qk.cumsum(-1) - multiplicity_Qk
        taken_Qk = torch.minimum((self.topk - before_Qk).clamp(min=0), multiplicity_Qk)
        weight_Qk = taken_Qk * ((affinity_Qk - affinity_Qk[:, :1]) / self.temperature).exp()
        return weight_Qk / weight_Qk.sum(-1, keepdim=True)

    def _nearest(self, frame: int, tile: _Tile, keys_TKP: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest affinities of each query and the flat indices of their keys, largest first."""
        oldest = max(1, frame - self.context)
        device = tile.queries_Q.device
        affinity_Qk = torch.empty(len(tile.queries_Q), self.topk, device=device)
        source_Qk = torch.empty(affinity_Qk.shape, dtype=torch.int64, device=device)
        rows_U = torch.arange(len(tile.queries_Q), device=device)
        for count in self.candidates:
            part = tile.rows(rows_U)
            query_UP = self.bounds_TNP[frame, part.queries_Q]
            bound_UM, source_UM = _largest(
                count, query_UP, self.bounds_TNP[0], keys_TKP[oldest:frame], oldest, part
            )
            affinity_UM = self._affinities(frame, part, source_UM).masked_fill_(
                bound_UM.isneginf(), -torch.inf
            )
            affinity_Qk[rows_U], order_Uk = affinity_UM.topk(self.topk, dim=-1)
            source_Qk[rows_U] = source_UM.gather(1, order_Uk)
            # A key that was left out can be no nearer than the last bound that was not.
            rows_U = rows_U[affinity_Qk[rows_U, -1] < bound_UM[:, -1] + BOUND_ROUNDING]
            if not len(rows_U):
                return affinity_Qk, source_Qk
        affinity_Qk[rows_U], source_Qk[rows_U] = self._search_in_full(frame, oldest, tile.rows(rows_U))
        return affinity_Qk, source_Qk

    def _affinities(self, frame: int, tile: _Tile, source_QM: Tensor) -> Tensor:
        """Cosine affinity of each query with its own candidates, from the whole vectors."""
        query_QD1 = self._unit(frame, tile.queries_Q).unsqueeze(-1)
        affinity_QM = torch.bmm(self.tokens_LD[source_QM].float(), query_QD1).squeeze(-1)
        return affinity_QM * self.scale_L[source_QM]

    def _search_in_full(self, frame: int, oldest: int, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The same search on the whole vectors, for queries that the bounds could not settle."""
        past_F = torch.arange(oldest, frame, device=tile.keys_K.device).unsqueeze(-1)
        every_N = torch.arange(self.bounds_TNP.shape[1], device=tile.keys_K.device)
        query_QD = self._unit(frame, tile.queries_Q)
        return _largest(
            self.topk, query_QD, self._unit(0, every_N), self._unit(past_F, tile.keys_K), oldest, tile
        )

    def _unit(self, frame: int | Tensor, token: Tensor) -> Tensor:
        index = frame * self.bounds_TNP.shape[1] + token
        return self.tokens_LD[index].float() * self.scale_L[index].unsqueeze(-1)


def _largest(
    count: int, query_QX: Tensor, first_NX: Tensor, keys_FKX: Tensor, oldest: int, tile: _Tile
) -> tuple[Tensor, Tensor]:
    """The `count` largest products of each query, largest first, and the flat indices of their keys.

    X is D or P. Every token of the first frame is a key; of the F frames from `oldest` on, those in the disc.
    """
    first_QN = query_QX @ first_NX.T
    tokens = first_QN.shape[1]
    value_QM, source_QM = first_QN.topk(min(count, tokens), dim=-1)
    if len(keys_FKX):
        recent_QM, recent_source_QM = _largest_recent(
            count, query_QX, keys_FKX, oldest * tokens, tokens, tile
        )
        value_QM, order_QM = torch.cat([value_QM, recent_QM], dim=-1).topk(value_QM.shape[1], dim=-1)
        source_QM = torch.cat([source_QM, recent_source_QM], dim=-1).gather(1, order_QM)
    return value_QM, source_QM


def _largest_recent(
    count: int, query_QX: Tensor, keys_FKX: Tensor, base: int, tokens: int, tile: _Tile
) -> tuple[Tensor, Tensor]:
    """`_largest` over the recent frames alone, whose first token has flat index `base`.

    The `count` largest of all stand at the `count` cells whose best frame is largest, so that only those
    cells are searched through time; the disc, a matter of cells, needs cutting from the best frames only.
    """
    frames, keys, channels = keys_FKX.shape
    product_QFK = (query_QX @ keys_FKX.reshape(-1, channels).T).view(-1, frames, keys)
    best_QK = product_QFK.amax(1).masked_fill_(tile.outside_QK, -torch.inf)
    best_QG, cell_QG = best_QK.topk(min(count, keys), dim=-1)
    through_QFG = product_QFK.gather(2, cell_QG.unsqueeze(1).expand(-1, frames, -1))
    through_QFG.masked_fill_(best_QG.isneginf().unsqueeze(1), -torch.inf)
    cells = cell_QG.shape[1]
    value_QM, place_QM = through_QFG.flatten(1).topk(min(count, frames * cells), dim=-1)
    key_QM = tile.keys_K[cell_QG.gather(1, place_QM % cells)]
    return value_QM, base + (place_QM // cells) * tokens + key_QM


def _bound_channels(tokens_TND: Tensor, scale_TN: Tensor) -> Tensor:
    """Principal channels of the unit features and the norm of the rest: (T, N, P) float32.

    Where the spectrum is too flat for the bound to save anything, the unit features themselves (P = D).
    """
    frames, tokens, channels = tokens_TND.shape
    stride = max(1, frames * tokens // AXES_SAMPLE)
    sample_SD = tokens_TND.reshape(-1, channels)[::stride].float() * scale_TN.reshape(-1)[::stride, None]
    _, axes_DD = torch.linalg.eigh(sample_SD.T @ sample_SD)
    axes_DD = axes_DD.flip(1)
    energy_D = (sample_SD @ axes_DD).square().mean(0)
    about_mean = 1 - sample_SD.mean(0).square().sum()
    head = 1 + int((energy_D.sum() - energy_D.cumsum(0) > RESIDUAL_SHARE * about_mean).sum())
    if head > LARGEST_HEAD * channels:
        return tokens_TND.float() * scale_TN.unsqueeze(-1)
    bounds_TNP = tokens_TND.new_empty((frames, tokens, head + 1), dtype=torch.float32)
    for frame in range(frames):
        unit_ND = tokens_TND[frame].float() * scale_TN[frame, :, None]
        torch.mm(unit_ND, axes_DD[:, :head], out=bounds_TNP[frame, :, :head])
    rest_TN = 1 - bounds_TNP[..., :head].square().sum(-1)
    bounds_TNP[..., head] = rest_TN.clamp_(min=0).sqrt_()
    return bounds_TNP


def _tiles(height: int, width: int, radius: float, context: int, device: torch.device) -> Iterator[_Tile]:
    """Rectangles that cover the grid, each with the keys within `radius` of any of its queries."""
    reach = max(1, math.ceil(min(radius, height + width)))
    if device.type == "cuda":
        side = max(1, int((GPU_AFFINITIES / ((context + 1) * height * width)) ** 0.5))
        rows, columns = (height, width) if side * side >= height * width else (side, side)
    else:
        # Half the radius: large enough for the product to be efficient, small enough to skip distant keys.
        rows = columns = min(16, max(4, reach // 2))
    grid_N = torch.arange(height * width, device=device)
    y_N, x_N = grid_N // width, grid_N % width
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            in_tile_N = (y_N >= top) & (y_N < top + rows) & (x_N >= left) & (x_N < left + columns)
            in_reach_N = (y_N > top - reach) & (y_N < top + rows - 1 + reach)
            in_reach_N &= (x_N > left - reach) & (x_N < left + columns - 1 + reach)
            queries_Q, keys_K = grid_N[in_tile_N], grid_N[in_reach_N]
            distance2_QK = (y_N[queries_Q, None] - y_N[keys_K]) ** 2
            distance2_QK += (x_N[queries_Q, None] - x_N[keys_K]) ** 2
            yield _Tile(queries_Q, keys_K, distance2_QK >= radius**2)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in true float32: the bounds allow for its rounding, not for TF32's or autocast's."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check(features: Tensor, labels: Tensor, context: int, topk: int, temperature: float) -> None:
    if features.ndim != 4 or 0 in features.shape:
        raise InputError(f"features have shape {tuple(features.shape)}; expected a non-empty (T, H, W, D)")
    if labels.ndim != 3 or labels.shape[:2] != features.shape[1:3]:
        grid = tuple(features.shape[1:3])
        raise InputError(f"first labels have shape {tuple(labels.shape)}; expected {grid} + (classes,)")
    for name, value in (("context", context), ("topk", topk)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected an integer of at least 1")
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected a number above 0")
