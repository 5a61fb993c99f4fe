"""Position encodings of the frozen encoders: absolute embeddings, rotary embeddings (RoPE), or both.

Absolute embeddings are added to the patch tokens; rotary embeddings rotate queries and keys in every block.
Both are tables with a row per cell of the token grid. `PositionEncoding` concatenates them along the
channels, so that a training step passes a single tensor (N, C) of positions to the encoder.

Shape suffixes: N patch tokens on an h x w grid, S cells per side of a square grid, L cells per side of the
enlarged grid, D channels of a token, R channels of the rotary table, C = D + R (D is 0 without absolute
embeddings, and R is 0 without rotary ones).
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Axis = Literal["row", "column"]
Resize = Literal["plain", "offset", "antialias", "bilinear"]


def sincos_positions(grid: tuple[int, int], dim: int, first: Axis) -> Tensor:
    """Compute the fixed position embeddings (N, D) of MAE, I-JEPA and MoCo v3.

    The channels are sin(x f), cos(x f), sin(y f), cos(y f), a quarter each, with D / 4 frequencies
    f = 10000^(-4 i / D). x is the index of a cell along the axis `first`, y along the other axis.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    cells_N2 = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    x, y = (cells_N2[:, axis, None] * frequencies for axis in ((0, 1) if first == "row" else (1, 0)))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1).float()


def resize_positions(positions_SSD: Tensor, grid: tuple[int, int], how: Resize) -> Tensor:
    """Resize positions on an S x S grid to (h, w, D).

    `how` selects one of the published variants. `plain` is bicubic interpolation to the given size. `offset`
    scales by (cells + 0.1) / S, which shifts the sampling points slightly (DINO and code derived from it).
    `antialias` adds antialiasing to the bicubic, and `bilinear` to a bilinear interpolation (NaFlex).
    """
    side = positions_SSD.shape[0]
    if grid == (side, side):
        return positions_SSD
    size: dict[str, Any] = {"size": grid}
    if how == "offset":
        size = {"scale_factor": tuple((cells + 0.1) / side for cells in grid)}
    positions_1DSS = positions_SSD.permute(2, 0, 1)[None]
    resized_1Dhw = F.interpolate(
        positions_1DSS,
        **size,
        mode="bilinear" if how == "bilinear" else "bicubic",
        align_corners=False,
        antialias=how in ("antialias", "bilinear"),
    )
    return resized_1Dhw[0].permute(1, 2, 0).contiguous()


class PositionEncoding:
    """The positions of an encoder on any grid, in float32 on the CPU, so that they are the same everywhere.

    Args:
        absolute_SSD: The embeddings of the checkpoint, on its own grid. None: only rotary ones.
        rotary: A module of timm with `get_embed`. None: only absolute embeddings.
        side: Cells per side of the square grid of the training images.
        resize: How absolute embeddings are resized to other grids.
        resize_once: How they are resized to the training grid (None: as `resize`).

    Attributes:
        channels: Numbers of channels D and R.
    """

    def __init__(
        self,
        absolute_SSD: Tensor | None,
        rotary: Any,
        *,
        side: int,
        resize: Resize,
        resize_once: Resize | None = None,
    ) -> None:
        self.side = side
        self._rotary, self._resize = rotary, resize
        self._own_SSD = self._training_SSD = absolute_SSD
        if absolute_SSD is not None:
            self._training_SSD = resize_positions(absolute_SSD, (side, side), resize_once or resize)
        self.channels = (
            0 if absolute_SSD is None else absolute_SSD.shape[-1],
            0 if rotary is None else rotary.get_embed(shape=[1, 1]).shape[-1],
        )

    def on_grid(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions (N, C) that the model gives to an image with this token grid."""
        own_SSD = self._training_SSD if grid == (self.side, self.side) else self._own_SSD
        return self._table(own_SSD, self._rotary, grid, self._resize).flatten(0, 1)

    def enlarged(self, side: int) -> Tensor:
        """Return the positions (L, L, C) of a grid of `side` = L cells over the extent of the training grid.

        Absolute embeddings are interpolated as in the published implementation (bicubic, no antialiasing).
        The rotary table is that of L x L patches whose coordinates span the range of the S x S patches.
        """
        rotary = None if self._rotary is None else _rescaled(self._rotary, self.side / side)
        return self._table(self._training_SSD, rotary, (side, side), "plain")

    def _table(self, absolute_SSD: Tensor | None, rotary: Any, grid: tuple[int, int], how: Resize) -> Tensor:
        parts = []
        if absolute_SSD is not None:
            parts.append(resize_positions(absolute_SSD, grid, how))
        if rotary is not None:
            parts.append(rotary.get_embed(shape=list(grid)).detach().float().unflatten(0, grid))
        return torch.cat(parts, -1)


def _rescaled(rotary: nn.Module, scale: float) -> nn.Module:
    """Return a rotary module whose coordinates on an enlarged grid span the range of the original grid.

    DINOv3 divides coordinates by the size of the grid, and timm rescales those of EVA-02 and the Perception
    Encoder to a reference grid, so that they span the same range on any grid. The other modules number the
    cells, so their frequencies are scaled instead.
    """
    rotary = copy.deepcopy(rotary)
    if getattr(rotary, "ref_feat_shape", None) is None:
        for name in ("bands", "inv_freq"):
            if (frequencies := getattr(rotary, name, None)) is not None:
                frequencies.mul_(scale)
    return rotary
