"""Distil the first blocks of DINOv2 into a ViT of less width. This made the encoder of the demo.

    python -m fasttrain.tools.distill dinov2_vits14.pth student.safetensors --sources VIDEOS --held-out VIDEOS

The student has the teacher's first blocks, each with fewer heads and hidden units. It works in a subspace of
the teacher's residual stream: that of the principal components of the teacher's tokens. It starts from the
teacher's weights, projected on this subspace. Then each of its blocks learns to give the tokens that the
teacher has after this block, and its final norm those after the last copied block, normalised.

The teacher, a DINOv2 without register tokens, encodes fixed views of the frames once. Training flips views
and tokens at random. The result is a checkpoint in float16 for `load_backbone("dinov2", weights=...)`.
"""

# Shape suffixes: M views, B images of a batch, H and W pixels, L blocks, N = h * w patch tokens, R tokens of
# several blocks, C channels of the teacher, D channels of the student.

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import ColorJitter

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.data.preprocessing import normalise
from fasttrain.data.sampling import draw_crop, evenly_spaced, pixel_box
from fasttrain.data.sources import open_source
from fasttrain.loggers import Progress, say

# The student: three blocks, because intermediate tokens need not be as abstract as the last ones.
WIDTH, DEPTH, HEAD_DIM = 192, 3, 64
IMAGE_SIZE, FRAME_STRIDE, CROPS_PER_FRAME = 224, 2, 5
CROP_AREA, CROP_RATIO = (0.15, 1.0), (3 / 4, 4 / 3)
# Every second frame is also seen whole, because label propagation encodes whole frames. Rows and columns.
WHOLE_EVERY, WHOLE_GRID = 2, (18, 32)
ENCODED_TOGETHER = 16
STEPS, WARMUP_STEPS, BATCH_SIZE = 2000, 100, 16
LOG_EVERY, SAVE_EVERY = 50, 500
LEARNING_RATE, WEIGHT_DECAY = 5e-4, 0.05


@dataclass
class Views:
    """Views of equal size (M, 3, H, W) uint8, and the teacher's tokens (M, L, N, C or D) float16."""

    images_MCHW: Tensor
    tokens_MLNC: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="weights of a DINOv2 without register tokens")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--sources", nargs="+", required=True, help="videos to learn from, as for data.source"
    )
    parser.add_argument("--held-out", required=True, help="videos to validate on")
    options = parser.parse_args()

    torch.manual_seed(0)
    teacher = load_backbone("dinov2", weights=options.teacher, image_size=IMAGE_SIZE)
    views = read_views(options.sources, teacher)
    held_out = read_views([options.held_out], teacher)
    basis_CD = find_basis(views, WIDTH)
    student = shrink(teacher, basis_CD, DEPTH)
    say(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.2f} million parameters")
    for each in views + held_out:
        each.tokens_MLNC = torch.stack([(tokens.float() @ basis_CD).half() for tokens in each.tokens_MLNC])
    train(student, teacher, views, held_out, options.output)


def read_views(sources: list[str], teacher: Backbone) -> list[Views]:
    """Draw crops of the frames and whole frames, change their colours, and let the teacher encode them."""
    rng = np.random.default_rng(0)
    side, patch = teacher.image_size, teacher.patch_size
    whole_size = WHOLE_GRID[0] * patch, WHOLE_GRID[1] * patch
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.3)
    squares, whole = [], []
    for index in map(open_source, sources):
        for video, length in enumerate(index.num_frames):
            for frame in range(0, int(length), FRAME_STRIDE):
                picture_CHW = torch.tensor(index.read_frame(video, frame)).movedim(-1, 0)
                for box in draw_crop(rng.random((CROPS_PER_FRAME, 4)), area=CROP_AREA, ratio=CROP_RATIO):
                    top, left, bottom, right = pixel_box(box, *picture_CHW.shape[1:])
                    squares.append(jitter(resize(picture_CHW[:, top:bottom, left:right], (side, side))))
                if frame // FRAME_STRIDE % WHOLE_EVERY == 0:
                    whole.append(jitter(resize(picture_CHW, whole_size)))
    say(f"{len(squares)} crops and {len(whole)} whole frames of {', '.join(sources)}")
    return [encode(torch.stack(images), teacher) for images in (squares, whole)]


def resize(picture_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a uint8 picture (bicubic, antialiased)."""
    return functional.interpolate(picture_CHW[None], size=size, mode="bicubic", antialias=True)[0]


@torch.inference_mode()
def encode(images_MCHW: Tensor, teacher: Backbone) -> Views:
    """Encode images. The tokens are those after each of the first blocks."""
    cut = copy.deepcopy(teacher)
    cut.blocks, cut.norm = cut.blocks[:DEPTH], nn.Identity()
    seen: list[Tensor] = []
    for block in cut.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output[:, 1:].half()))
    tokens = []
    with Progress("views", len(images_MCHW)) as progress:
        for images_BCHW in images_MCHW.split(ENCODED_TOGETHER):
            with torch.autocast("cpu", torch.bfloat16):
                cut.tokens(normalise(images_BCHW, teacher.mean, teacher.std))
            tokens.append(torch.stack(seen, 1))
            seen.clear()
            progress.advance(len(images_BCHW))
    return Views(images_MCHW, torch.cat(tokens))


def find_basis(views: list[Views], width: int) -> Tensor:
    """Return an orthonormal basis (C, D) of the subspace of the teacher's tokens in which the student works.

    Every token counts equally, whatever its norm. A LayerNorm removes the mean over the channels. The basis
    is orthogonal to it in the teacher, and tokens in the basis have the mean 0. Hence a LayerNorm of the
    student differs from the teacher's only by the components that the subspace lacks.
    """
    channels = views[0].tokens_MLNC.shape[-1]
    second_CC = torch.zeros(channels, channels, dtype=torch.float64)
    for tokens_LNC in (tokens for each in views for tokens in each.tokens_MLNC[::4]):
        tokens_RC = functional.layer_norm(tokens_LNC.float().flatten(0, 1), (channels,))
        second_CC += (tokens_RC.T @ tokens_RC).double()
    values_C, vectors_CC = torch.linalg.eigh(second_CC)
    kept = width - 1
    say(f"{kept} of {channels} components keep {values_C[-kept:].sum() / values_C.sum():.1%} of the variance")
    # The columns are orthogonal to the vector of ones. They also mix the components, so that no channel of
    # the student is much larger than the others.
    mixed_DD = torch.linalg.qr(torch.cat((torch.ones(width, 1), torch.randn(width, kept)), 1).double())[0]
    return (vectors_CC[:, -kept:] @ mixed_DD[:, 1:].T).float()


@torch.no_grad()
def shrink(teacher: Any, basis_CD: Tensor, depth: int) -> Any:
    """Make a student from the teacher's first blocks by projecting their weights on the subspace.

    In each block, every second head and every second hidden unit is kept.
    """
    (channels, width), heads = basis_CD.shape, basis_CD.shape[1] // HEAD_DIM
    student: Any = VisionTransformer(
        img_size=teacher.image_size,
        patch_size=teacher.patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="",
        init_values=1.0,
        dynamic_img_size=True,
    )

    def read(linear: nn.Linear, norm: nn.LayerNorm, kept: Tensor, target: nn.Linear) -> None:
        # The student's norm has unit scale. The teacher's scale and shift become part of the weights.
        weight, bias = linear.weight[kept], linear.bias[kept]
        target.weight.copy_(math.sqrt(channels / width) * (weight * norm.weight) @ basis_CD)
        target.bias.copy_(bias + weight @ norm.bias)

    def write(linear: nn.Linear, scale: Tensor, kept: Tensor, target: nn.Linear) -> None:
        target.weight.copy_(basis_CD.T @ (scale[:, None] * linear.weight[:, kept]))
        target.bias.copy_(basis_CD.T @ (scale * linear.bias))

    student.patch_embed.proj.weight.copy_(
        torch.einsum("cd,cxyz->dxyz", basis_CD, teacher.patch_embed.proj.weight)
    )
    student.patch_embed.proj.bias.copy_(basis_CD.T @ teacher.patch_embed.proj.bias)
    # The position of the class token is part of the teacher's prefix.
    student.cls_token.copy_(teacher.prefix_PD @ basis_CD)
    student.pos_embed.copy_(torch.cat((torch.zeros(1, width), teacher.positions_NC @ basis_CD)))
    for source, block in zip(teacher.blocks, student.blocks, strict=False):
        inner_H = torch.arange(channels).unflatten(0, (-1, HEAD_DIM))[:: teacher.num_heads // heads].flatten()
        hidden = source.mlp.fc1.out_features
        unit_U = torch.arange(0, hidden, hidden // block.mlp.fc1.out_features)
        qkv_H = torch.cat([inner_H + part * channels for part in range(3)])
        read(source.attn.qkv, source.norm1, qkv_H, block.attn.qkv)
        read(source.mlp.fc1, source.norm2, unit_U, block.mlp.fc1)
        write(source.attn.proj, source.ls1.gamma, inner_H, block.attn.proj)
        write(source.mlp.fc2, source.ls2.gamma, unit_U, block.mlp.fc2)
    return student


def train(student: Any, teacher: Backbone, views: list[Views], held_out: list[Views], path: Path) -> None:
    """Minimise the mean over blocks of the squared error of the tokens, relative to their variance."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    rng = np.random.default_rng(1)
    seen: list[Tensor] = []
    for block in student.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output[:, 1:]))
    # Batches of whole frames have as many tokens as those of crops.
    tokens = [each.tokens_MLNC.shape[0] * each.tokens_MLNC.shape[2] for each in views]
    sizes = [
        max(1, BATCH_SIZE * views[0].tokens_MLNC.shape[2] // each.tokens_MLNC.shape[2]) for each in views
    ]

    def errors(each: Views, chosen_B: Tensor, flip: bool) -> Tensor:
        """Return the unexplained variance (L + 1) after each block and after the final norm."""
        images_BCHW = normalise(each.images_MCHW[chosen_B], teacher.mean, teacher.std)
        targets_BLNC = each.tokens_MLNC[chosen_B].float()
        if flip:
            columns = images_BCHW.shape[-1] // teacher.patch_size
            images_BCHW = images_BCHW.flip(-1)
            targets_BLNC = targets_BLNC.unflatten(2, (-1, columns)).flip(3).flatten(2, 3)
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            normed_BNC = student.forward_features(images_BCHW)[:, 1:]
        last_BNC = functional.layer_norm(targets_BLNC[:, -1], targets_BLNC.shape[-1:])
        outputs_BLNC = torch.stack([*seen, normed_BNC], 1).float()
        targets_BLNC = torch.cat((targets_BLNC, last_BNC[:, None]), 1)
        variance_L = targets_BLNC.var((0, 2)).sum(-1)
        return (outputs_BLNC - targets_BLNC).square().sum(-1).mean((0, 2)) / variance_L

    recent: list[Tensor] = []
    with Progress("steps", STEPS) as progress:
        for step in range(STEPS):
            rate = min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
            k = int(rng.choice(len(views), p=np.array(tokens) / sum(tokens)))
            chosen_B = torch.from_numpy(rng.integers(len(views[k].images_MCHW), size=sizes[k]))
            errors_L = errors(views[k], chosen_B, flip=bool(rng.integers(2)))
            optimizer.zero_grad()
            errors_L.mean().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            recent = [*recent[1 - LOG_EVERY :], errors_L.detach()]
            progress.advance()
            if step == 0 or (step + 1) % LOG_EVERY == 0:
                progress.show(
                    f"step {step + 1}: unexplained variance {describe(torch.stack(recent).mean(0))}"
                )
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
                with torch.no_grad():
                    for each in held_out:
                        some_B = torch.tensor(evenly_spaced(len(each.images_MCHW), ENCODED_TOGETHER))
                        say(f"held-out videos: {describe(errors(each, some_B, flip=False))}")
                state = {
                    name: value.detach().half().contiguous() for name, value in student.state_dict().items()
                }
                save_file(state, path)


def describe(errors_L: Tensor) -> str:
    return " ".join(f"{error:.3f}" for error in errors_L.tolist())


if __name__ == "__main__":
    main()
