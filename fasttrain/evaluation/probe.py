"""Classification of videos by frozen features: weighted k-NN, top-k accuracy, what to hold out.

The k-NN is that of DINO (Caron et al., ICCV 2021, eval_knn.py; after Wu et al., CVPR 2018): cosine
similarity s, each of the k nearest votes exp(s / 0.07) for its class. The linear probe is in `linear.py`.

Shape suffixes: S test videos, N training videos, D channels, C classes, K neighbours.
"""

import torch
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.evaluation.retrieval import nearest

TEMPERATURE = 0.07
# exp(1 / temperature), the vote of a video like the query, is no number in float64 below 0.0014.
LEAST_TEMPERATURE = 0.0015
NEIGHBOURS = (10, 20, 100, 200)


def knn_scores(
    similarity_SK: Tensor, neighbour_labels_SK: Tensor, *, num_classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """Votes (S, C) of K neighbours: the sum of exp(similarity / temperature); no vote is -inf.

    DINO ranks classes without a vote behind the others in no particular order; here they are never predicted.
    """
    if not temperature >= LEAST_TEMPERATURE:
        raise InputError(f"temperature {temperature} of the votes: expected at least {LEAST_TEMPERATURE}")
    weight_SK = (similarity_SK.double() / temperature).exp()
    votes_SC = weight_SK.new_zeros(len(similarity_SK), num_classes)
    votes_SC.scatter_add_(1, neighbour_labels_SK, weight_SK)
    return votes_SC.masked_fill(votes_SC == 0, -torch.inf)


def knn_classify(
    test_SD: Tensor,
    train_ND: Tensor,
    train_labels_N: Tensor,
    *,
    num_classes: int,
    neighbours: tuple[int, ...] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Votes (S, C) for every k of `neighbours` that N allows; for N itself where it allows none."""
    fitting = [k for k in neighbours if k <= len(train_ND)] or [len(train_ND)]
    similarity_SK, index_SK = nearest(test_SD, train_ND, max(fitting))
    labels_SK = train_labels_N[index_SK]
    return {
        k: knn_scores(
            similarity_SK[:, :k], labels_SK[:, :k], num_classes=num_classes, temperature=temperature
        )
        for k in fitting
    }


def top_accuracy(scores_SC: Tensor, labels_S: Tensor, k: int) -> float:
    """Share in percent of samples whose class is among the k highest scores.

    Of equal scores the lower class comes first; a score of -inf is never among them.
    """
    own_S1 = scores_SC.gather(1, labels_S[:, None])
    lower_SC = torch.arange(scores_SC.shape[1], device=labels_S.device) < labels_S[:, None]
    ahead_SC = (scores_SC > own_S1) | ((scores_SC == own_S1) & lower_SC)
    right_S = (ahead_SC.sum(dim=1) < k) & (own_S1[:, 0] > -torch.inf)
    return 100 * right_S.double().mean().item()


def confusion(predicted_S: Tensor, labels_S: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64: how many videos of the row's class were taken for the column's."""
    flat = labels_S * num_classes + predicted_S
    return torch.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def hold_out(labels_N: Tensor, share: float = 0.2) -> Tensor:
    """(N,) bool: the last `share` of each class, at least one where it has two or more.

    The last in the list's order, not a draw: neighbours in a list are often cut from one recording, as the
    groups of UCF101 are, and stay together so.
    """
    held_out_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        places = (labels_N == label).nonzero()[:, 0]
        count = max(1, int(len(places) * share)) if len(places) > 1 else 0
        held_out_N[places[len(places) - count :]] = True
    return held_out_N
