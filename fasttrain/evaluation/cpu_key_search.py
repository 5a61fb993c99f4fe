"""The exact search of `key_search.py` for CPUs: short products bound every affinity, few are then computed.

On one core with bf16 instructions it takes 1.8 to 3.2 times less time than the product with all keys at
480 x 880 (`benchmarks/propagation.py`).

With m the mean of the first frame's unit features, P the projection on the directions in which they vary most
(with the columns below a third as many as channels), x = P (u - m) and r = |(u - m) - x|, the affinity of a
query q and a key k is

    q . k  =  q . m  +  m . (k - m)  +  (q - m) . (k - m)
          <=  q . m  +  m . (k - m)  +  x_q . x_k  +  r_q r_k                    (Cauchy and Schwarz)

and, with x rounded to x' for the product,

    x_q . x_k  <=  x'_q . x'_k  +  |x'_q| |x_k - x'_k|  +  |x_q - x'_q| |x_k|.

Every term but the first, which all keys share, is a column of one short product. The keys of largest bound,
k of the first frame and k of the last, are computed in full; the k-th largest of those affinities is a floor
that the k-th largest of all cannot be below, and all keys whose bound reaches it are computed too. What is
found is therefore exact. Queries whose floor leaves too many keys, such as those at things that have just
come into view, are searched as on a GPU.

Shape suffixes: as in `key_search.py`; E columns of the short product, M keys to compute, P most of a query.
"""

import warnings

import torch
from torch import Tensor

from fasttrain.evaluation.key_search import KeySearch, Strip

# Columns of the short product over channels, and those among them that bound what is left out.
CHANNEL_SHARE, BOUND_COLUMNS = 1 / 3, 5
# The share of a query's keys that may reach the floor before the whole search is cheaper: a pair by itself
# costs some ten times what it does in a product.
MAX_SHARE = 0.05
# More than rounding in float32 adds up to in a sum of some hundred products.
SLACK = 2.0**-16

# Compressed rows are in beta, and their indices are not checked: said once a process.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")


class CpuKeySearch(KeySearch):
    """`KeySearch` on a CPU: the same keys, faster where features have some structure or matches are clear."""

    def __init__(self, first_ND: Tensor, *, slots: int, topk: int) -> None:
        super().__init__(first_ND, slots=slots, topk=topk)
        # bfloat16 where it is multiplied faster: the bounds are as true, only wider.
        fast_bf16 = torch.backends.mkldnn.enabled and torch.cpu.get_capabilities().get("avx512_bf16")
        self.dtype = torch.bfloat16 if fast_bf16 else torch.float32
        mean_D = first_ND.double().mean(0)
        centred_ND = first_ND.double() - mean_D
        kept = max(1, round(CHANNEL_SHARE * len(mean_D)) - BOUND_COLUMNS)
        # Two steps of subspace iteration: any orthonormal directions bound, and `eigh` may not converge.
        covariance_DD = centred_ND.T @ centred_ND
        start_DE = torch.randn(len(mean_D), kept, generator=torch.Generator().manual_seed(0)).double()
        basis_DE = torch.linalg.qr(covariance_DD @ (covariance_DD @ start_DE)).Q
        self.mean_D, self.basis_DE = mean_D.float(), basis_DE.float()
        self.short_FNE = torch.empty((slots, len(first_ND), kept + BOUND_COLUMNS), dtype=self.dtype)
        self.short_FNE[0] = self._columns(first_ND, of_keys=True)

    def remember(self, slot: int, unit_ND: Tensor) -> None:
        super().remember(slot, unit_ND)
        self.short_FNE[slot] = self._columns(unit_ND, of_keys=True)

    def largest(self, query_QD: Tensor, strip: Strip, recent: int) -> tuple[Tensor, Tensor]:
        # A floor takes k keys of the first frame.
        if not recent or self.topk > self.unit_FND.shape[1]:
            return super().largest(query_QD, strip, recent)
        first_QN, bound_FKQ = self._bounds(query_QD, strip, recent)
        best_QK = bound_FKQ.amax(0).T.contiguous().float().masked_fill_(strip.outside_QK, -torch.inf)
        floor_Q1 = self._floor(query_QD, first_QN, bound_FKQ, best_QK, strip)
        reach_QK, reach_QN = best_QK >= floor_Q1, first_QN >= floor_Q1
        most = MAX_SHARE * (recent * best_QK.shape[1] + first_QN.shape[1])
        # Cells can be counted at once, and each holds at least one key.
        many_Q = reach_QK.sum(-1) + reach_QN.sum(-1) > most
        reach_QK[many_Q] = False
        query_M, cell_M = reach_QK.nonzero(as_tuple=True)
        reach_MF = floor_Q1[query_M] <= bound_FKQ[:, cell_M, query_M].T
        many_Q |= reach_QN.sum(-1).index_add_(0, query_M, reach_MF.sum(-1)) > most
        reach_MF &= ~many_Q[query_M, None]
        reach_QN[many_Q] = False

        at_cell_M, frame_M = reach_MF.nonzero(as_tuple=True)
        source_M = (1 + frame_M) * self.unit_FND.shape[1] + strip.keys.start + cell_M[at_cell_M]
        recent_QP, recent_source_QP = self._compute(query_QD, query_M[at_cell_M], source_M)
        value_QP, source_QP = self._compute(query_QD, *reach_QN.nonzero(as_tuple=True))
        affinity_Qk, column_Qk = torch.cat([recent_QP, value_QP], dim=-1).topk(self.topk, dim=-1)
        source_Qk = torch.cat([recent_source_QP, source_QP], dim=-1).gather(1, column_Qk)
        if many_Q.any():
            found = super().largest(query_QD[many_Q], strip.rows(many_Q), recent)
            affinity_Qk[many_Q], source_Qk[many_Q] = found
        return affinity_Qk, source_Qk

    def _bounds(self, query_QD: Tensor, strip: Strip, recent: int) -> tuple[Tensor, Tensor]:
        """Bounds of the affinities less q . m, with the first frame (Q, N) and the last (F, K, Q).

        Written in `dtype`: what they bound is not above them once it is rounded as well.
        """
        short_QE = self._columns(query_QD, of_keys=False)
        keys_FKE = self.short_FNE[1 : 1 + recent, strip.keys]
        return (short_QE @ self.short_FNE[0].T).float(), keys_FKE @ short_QE.T

    def _floor(
        self, query_QD: Tensor, first_QN: Tensor, bound_FKQ: Tensor, best_QK: Tensor, strip: Strip
    ) -> Tensor:
        """What the bound of each query's k-th largest affinity is not below."""
        guess_Qk, source_Qk = self._largest_in_cells(bound_FKQ, best_QK, strip)
        source_QP = torch.cat([source_Qk, first_QN.topk(self.topk, dim=-1).indices], dim=-1)
        query_QP = torch.arange(len(query_QD))[:, None].expand_as(source_QP)
        value_QP, _ = self._compute(query_QD, query_QP.flatten(), source_QP.flatten())
        value_QP[:, : guess_Qk.shape[1]].masked_fill_(guess_Qk.isneginf(), -torch.inf)
        least_Q1 = value_QP.topk(self.topk, dim=-1).values[:, -1:] - (query_QD @ self.mean_D)[:, None]
        # Rounding both alike keeps a bound that is not below the floor from falling below it.
        return (least_Q1 - SLACK).to(self.dtype).float()

    def _compute(self, query_QD: Tensor, query_M: Tensor, source_M: Tensor) -> tuple[Tensor, Tensor]:
        """Affinities of pairs, given query by query, and their keys; -inf fills what a query lacks."""
        queries = len(query_QD)
        of_query_Q = torch.bincount(query_M, minlength=queries)
        end_Q = of_query_Q.cumsum(0)
        keys_SD = self.unit_FND.flatten(0, 1)
        pairs_QS = torch.sparse_csr_tensor(
            torch.cat([end_Q.new_zeros(1), end_Q]),
            source_M,
            torch.zeros(len(source_M)),
            size=(queries, len(keys_SD)),
            check_invariants=False,
        )
        value_M = torch.sparse.sampled_addmm(pairs_QS, query_QD, keys_SD.T, beta=0.0).values()
        column_M = torch.arange(len(source_M)) - (end_Q - of_query_Q)[query_M]
        most = max(self.topk, int(of_query_Q.max()))
        value_QP = torch.full((queries, most), -torch.inf)
        source_QP = torch.zeros((queries, most), dtype=torch.long)
        value_QP[query_M, column_M], source_QP[query_M, column_M] = value_M, source_M
        return value_QP, source_QP

    def _columns(self, unit_ND: Tensor, *, of_keys: bool) -> Tensor:
        """The rows (N, E) of the short product for queries, or for keys."""
        centred_ND = unit_ND - self.mean_D
        exact_NE = centred_ND @ self.basis_DE
        short_NE = exact_NE.to(self.dtype)
        error_N = (exact_NE - short_NE.float()).norm(dim=-1)
        length2_N = centred_ND.square().sum(-1)
        rest_N = (length2_N - exact_NE.square().sum(-1)).clamp_(min=0).add_(SLACK * length2_N).sqrt_()
        if of_keys:
            # One number in two columns: what rounding up adds to the first is taken off in the second.
            along_N = centred_ND @ self.mean_D
            coarse_N = self._above(along_N)
            factors = [rest_N, error_N, exact_NE.norm(dim=-1), along_N - coarse_N.float()]
        else:
            coarse_N = torch.ones_like(rest_N, dtype=self.dtype)
            factors = [rest_N, short_NE.float().norm(dim=-1), error_N, torch.ones_like(rest_N)]
        return torch.cat([short_NE, self._above(torch.stack(factors, dim=-1)), coarse_N[:, None]], dim=-1)

    def _above(self, value: Tensor) -> Tensor:
        """Rounded, but not to less."""
        return (value + torch.finfo(self.dtype).eps * value.abs()).to(self.dtype)
