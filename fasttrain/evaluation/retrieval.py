"""Video retrieval: the nearest training videos of every test video, and recall at k.

The protocol of self-supervised video retrieval on UCF101 and HMDB51 (Büchler et al., ECCV 2018; Xu et al.,
"Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction", CVPR 2019): test videos are the
queries, training videos the gallery, one mean feature a video, cosine similarity; a query counts as correct
at k if one of its k nearest videos has its class.

Shape suffixes: Q queries, G gallery videos, D channels, K neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError

RANKS = (1, 5, 10)
_BLOCK = 1024


def nearest(queries_QD: Tensor, gallery_GD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity (Q, K) and number in the gallery (Q, K) of each query's nearest, nearest first.

    K is `count`, or G where the gallery is smaller. Queries go in blocks, so Q x G is never in memory.
    Raises InputError for shapes that do not fit, for an empty gallery and for features that are not finite.
    """
    if queries_QD.ndim != 2 or gallery_GD.ndim != 2 or queries_QD.shape[1] != gallery_GD.shape[1]:
        raise InputError(
            f"queries {tuple(queries_QD.shape)} and gallery {tuple(gallery_GD.shape)}: "
            "expected (Q, D) and (G, D)"
        )
    if not len(gallery_GD) or count < 1:
        raise InputError(f"{count} neighbours from a gallery of {len(gallery_GD)}: at least 1 of 1 is needed")
    if not bool(queries_QD.isfinite().all() and gallery_GD.isfinite().all()):
        raise InputError("features that are not finite have no neighbours; is the encoder's output?")
    gallery_GD = functional.normalize(gallery_GD, dim=-1)
    found = [
        (functional.normalize(block_QD, dim=-1) @ gallery_GD.T).topk(min(count, len(gallery_GD)))
        for block_QD in queries_QD.split(_BLOCK)
    ]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def recall_at(
    neighbour_labels_QK: Tensor, labels_Q: Tensor, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Share in percent of queries with one of their class among the k nearest, for each k of `ranks`.

    neighbour_labels_QK: classes of the neighbours, nearest first; a k above K counts all of them. Raises
    InputError where there is no query.
    """
    if not len(labels_Q) or len(labels_Q) != len(neighbour_labels_QK):
        raise InputError(f"{len(labels_Q)} labels for the neighbours of {len(neighbour_labels_QK)} queries")
    hits_QK = neighbour_labels_QK == labels_Q[:, None]
    return {k: 100 * hits_QK[:, :k].any(dim=1).double().mean().item() for k in ranks}
