"""A plain version of the published implementation, which step.py compares with fasttrain in the same run.

It has the structure of the code at github.com/yafeng19/Co-Settle:

- eager autocast over float32 weights;
- a separate pass through the encoder for each of the three views;
- asymmetric positions that are enlarged again at every step;
- the complete cycle matrix and both diagnostics at every step;
- losses from torch.nn.functional, and AdamW with PyTorch's default implementation;
- three values read from the device at every step, followed by a synchronisation.

When training with data, frames come from the PIL loader of `benchmarks.loaders`, which decodes four frames
and uses two. Attention stores the L x L matrix of all L tokens, as in the published ViTs, unless
`fused_attention` selects PyTorch's fused kernel.

Shape suffixes: B pairs, N tokens, M tokens after pooling, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.backbone_trainer import backbone_settings
from fasttrain.backbones import load_backbone
from fasttrain.positions import resize_positions
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe


class BaselineStep:
    """A training step of the published implementation.

    Call it with frames (2, B, 3, S, S) on the device.
    """

    def __init__(self, recipe: Recipe, device: torch.device, fused_attention: bool = False) -> None:
        self.objective, self.dtype, self.size = recipe.objective, recipe.train.dtype, recipe.data.image_size
        self.device = device
        self.encoder = load_backbone(**backbone_settings(recipe)).to(device)
        for block in self.encoder.blocks:
            block.attn.fused_attn = fused_attention
        head = Projection(self.encoder.embed_dim, head=recipe.projection.head, seed=recipe.seed)
        self.head = head.to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-4, betas=recipe.optimizer.betas)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def __call__(self, frames: Tensor, positions: Tensor | None = None) -> tuple[float, float, float]:
        """Run one step and return (loss, cycle accuracy, identity similarity), waiting for the device.

        `positions` (N, D) replaces the random asymmetric positions.
        """
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            with torch.no_grad():
                first_BND = self.encoder.tokens(frames[0])
                second_BND = self.encoder.tokens(frames[1])
                positions = self.asymmetric_positions() if positions is None else positions
                third_BND = self.encoder.tokens(frames[0], positions)
            views = [first_BND, second_BND, third_BND]
            loss, accuracy, similarity = self._losses(views, [self.head(view) for view in views])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        readings = loss.item(), accuracy.item(), similarity.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return readings

    def asymmetric_positions(self) -> Tensor:
        side = self.encoder.grid(self.size, self.size)[0]
        positions_SSD = self.encoder.positions_NC.unflatten(0, (side, side))
        large = int((1 + self.objective.asymmetric_ratio) * side)
        enlarged = resize_positions(positions_SSD, (large, large), "plain")
        row, column = torch.randint(0, large - side + 1, (2,)).tolist()
        return enlarged[row : row + side, column : column + side].flatten(0, 1)

    def _losses(self, frozen: list[Tensor], projected: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        frozen = [F.normalize(view.float(), dim=-1) for view in frozen]
        projected = [F.normalize(view.float(), dim=-1) for view in projected]
        one_BMD, two_BMD, back_BMD = (self._pool(view) for view in projected)
        temperature = self.objective.temperature
        there = torch.softmax(one_BMD @ two_BMD.transpose(1, 2) / temperature, dim=-1)
        back = torch.softmax(two_BMD @ back_BMD.transpose(1, 2) / temperature, dim=-1)
        cycle_BMM = there.float() @ back.float()
        target = torch.arange(cycle_BMM.shape[1], device=self.device).repeat(cycle_BMM.shape[0])
        cycle = F.cross_entropy(torch.log(cycle_BMM + 1e-6).flatten(0, 1), target)
        separability = sum(
            (
                F.kl_div(p.log_softmax(-1), z.softmax(-1), reduction="sum") / z.shape[0]
                if self.objective.regularizer == "kl"
                else F.mse_loss(p, z) / len(projected)
                for p, z in zip(projected, frozen, strict=True)
            ),
            start=torch.zeros((), device=self.device),
        )
        accuracy = (cycle_BMM.detach().flatten(0, 1).argmax(-1) == target).float().mean()
        identity = torch.eye(cycle_BMM.shape[1], device=self.device).expand_as(cycle_BMM)
        similarity = F.cosine_similarity(cycle_BMM.detach().flatten(), identity.flatten(), dim=0)
        return cycle + self.objective.lambda_reg * separability, accuracy, similarity

    def _pool(self, view_BND: Tensor) -> Tensor:
        grid = self.encoder.grid(self.size, self.size)
        cells_BDhw = view_BND.unflatten(1, grid).permute(0, 3, 1, 2)
        return F.avg_pool2d(cells_BDhw, self.objective.window).flatten(2).transpose(1, 2)
