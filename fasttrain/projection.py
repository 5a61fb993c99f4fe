"""The projection, which is the only trained module: its architecture, its files, and published checkpoints.

A trained projection is stored as a safetensors file, whose metadata describe the backbone that it belongs to
(see `video_encoder`).
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.files import write_atomically
from fasttrain.weights import find_file, flatten_checkpoint, read_checkpoint, seeded

Head = Literal["linear", "mlp2", "mlp3", "lowrank", "residual"]
Init = Literal["trunc_normal", "xavier_uniform", "default"]

# The name of the file in a run folder.
PROJECTION_FILE = "projection.safetensors"
# The heads of the paper.
PUBLISHED: tuple[Head, ...] = ("linear", "mlp2", "mlp3")
# The projection after the last step, if the run keeps a better one.
LAST_PROJECTION_FILE = "projection-last.safetensors"
# What `fasttrain fit` writes in place of train.json.
FIT_FILE = "fit.json"
# The projections that the paper's authors published, by the names of their backbones.
COSETTLE = ("mae", "ijepa", "clip", "blip", "mocov3", "ibot", "dino", "dinov2")
# Standard deviation of the inputs of tanh at the start at the frozen features: there, tanh is nearly linear.
TANH_STD = 0.5
# The rank of the head `lowrank` is D divided by this.
RANK_DIVISOR = 8


class _Form(NamedTuple):
    """What an architecture consists of, in addition to linear layers and the layer norm."""

    layers: int
    inner_tanh: bool = True  # after each linear layer but the last
    last_tanh: bool = False  # after the last linear layer
    low_rank: bool = False  # fewer outputs of the first layer
    skip: bool = False  # adds the centred tokens to the output of the last layer
    gate: bool = False  # multiplies the weight of the last layer by a scalar


_FORMS: dict[Head, _Form] = {
    "linear": _Form(layers=1, last_tanh=True),
    "mlp2": _Form(layers=2),
    "mlp3": _Form(layers=3),
    "lowrank": _Form(layers=2, inner_tanh=False, last_tanh=True, low_rank=True, skip=True),
    "residual": _Form(layers=2, skip=True, gate=True),
}


class Projection(nn.Module):
    """The projection g of the paper (`ST_adapter.py` of github.com/yafeng19/Co-Settle), and two more.

    The module maps tokens (..., D) to tokens (..., D), which are not L2-normalised. The linear layers of the
    paper's heads have D inputs and D outputs:

        linear:  Linear, tanh, LayerNorm
        mlp2:    Linear, tanh, Linear, LayerNorm
        mlp3:    Linear, tanh, Linear, tanh, Linear, LayerNorm

    The others add to x = c (tokens - mean), with constants c and mean that `start_at_frozen_` sets (before,
    they are 1 and 0). They start at the frozen features, because U and the gate start at zero:

        lowrank:   LayerNorm(tanh(x + U V x + bias)), where U and V have rank max(1, D // 8)
        residual:  LayerNorm(x + gate W2 tanh(W1 x + bias1) + bias2), where the gate is a scalar, as in ReZero
                   (Bachlechner et al., UAI 2021) and SkipInit (De and Smith, NeurIPS 2020)

    Args:
        dim: Embedding dimension D.
        head: Architecture: `linear`, `mlp2`, `mlp3`, `lowrank` or `residual`.
        init: Random initialisation of the linear layers: `trunc_normal` (standard deviation 0.02, zero bias),
            `xavier_uniform` (zero bias), or `default` (that of `nn.Linear`). The choice of the
            published implementation depends on the backbone (`Backbone.projection_init`).
        seed: Seed of the initialisation. The global generator is not affected.

    Attributes:
        metadata: The metadata of the file that the projection was loaded from.

    Raises:
        InputError: `head` is not one of the architectures.
    """

    scale: Tensor
    mean: Tensor

    def __init__(
        self, dim: int, *, head: Head = "linear", init: Init = "trunc_normal", seed: int = 0
    ) -> None:
        super().__init__()
        if head not in _FORMS:
            raise InputError(f"head {head!r} is not one of: {', '.join(_FORMS)}")
        self.dim = dim
        self.head: Head = head
        self.metadata: dict[str, str] = {}
        self._form = form = _FORMS[head]
        inner = max(1, dim // RANK_DIVISOR) if form.low_rank else dim
        widths = [dim] + [inner] * (form.layers - 1) + [dim]
        with seeded(seed):
            self.linears = nn.ModuleList(_linear(*ends, init) for ends in pairwise(widths))
        self.norm = nn.LayerNorm(dim)
        if form.low_rank:
            # Its product with U would be a second bias.
            cast(nn.Linear, self.linears[0]).register_parameter("bias", None)
            nn.init.zeros_(self._last_linear.weight)
        if form.gate:
            self.gate = nn.Parameter(torch.zeros(()))
        if form.skip:
            nn.init.zeros_(self._last_linear.bias)
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("mean", torch.zeros(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens.

        Args:
            tokens: Tokens (..., D) of the frozen encoder.

        Returns:
            Projected tokens (..., D), which are not L2-normalised.
        """
        out = self._last_output(tokens, self._last_linear.bias)
        return self.norm(out.tanh() if self._form.last_tanh else out)

    def split(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Compute the forward pass up to the last matrix product, for `fasttrain_kernels.cosettle_head_loss`.

        Args:
            tokens: Tokens (..., D) of the frozen encoder.

        Returns:
            The input (..., D) of tanh or the layer norm without the bias, and the remaining arguments `rest`
                of the loss. `forward(tokens)` equals norm(tanh(output + bias)), or norm(output + bias) if
                `rest["tanh"]` is False.
        """
        rest = {
            "bias": self._last_linear.bias,
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "norm_eps": self.norm.eps,
            "tanh": self._form.last_tanh,
        }
        return self._last_output(tokens, bias=None), rest

    @property
    def _last_linear(self) -> nn.Linear:
        return cast(nn.Linear, self.linears[-1])

    def _last_output(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output (..., D) of the last linear layer, with this bias, and of the skip connection."""
        form, weight = self._form, self._last_linear.weight
        # Centred in float32, as mixed precision would round away small differences from a large mean.
        inputs = (self.scale * (tokens - self.mean)).to(tokens.dtype) if form.skip else tokens
        hidden = inputs
        for linear in self.linears[:-1]:
            hidden = linear(hidden)
            if form.inner_tanh:
                hidden = hidden.tanh()
        out = functional.linear(hidden, weight * self.gate if form.gate else weight, bias)
        return inputs + out if form.skip else out

    @property
    def always_starts_at_frozen(self) -> bool:
        """Whether the head starts at the frozen features, however it is initialised."""
        return self._form.skip

    @torch.no_grad()
    def start_at_frozen_(self, mean_D: Tensor, std: float) -> None:
        """Set the parameters such that the outputs are nearly the frozen tokens without their mean.

        The input of the layer norm is c (tokens - mean) with c = 0.5 / std, up to the curvature of tanh.

        Args:
            mean_D: The mean (D,) of the frozen tokens.
            std: The standard deviation of all components of (tokens - mean).
        """
        scale = TANH_STD / std
        if self._form.skip:
            self.scale.fill_(scale)
            self.mean.copy_(mean_D)
            return
        linears = [cast(nn.Linear, linear) for linear in self.linears]
        for linear in linears:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        first = linears[0]
        first.weight.mul_(scale)
        first.bias.copy_(-scale * mean_D)
        self.norm.reset_parameters()

    @classmethod
    def from_affine(cls, weight_DD: Tensor, bias_D: Tensor, std: float) -> "Projection":
        """Return a `linear` head that nearly computes an affine map, followed by a layer norm.

        Args:
            weight_DD: The matrix W (D, D) of the map z -> W z + b.
            bias_D: The vector b (D,), such that the outputs have zero mean, where tanh is nearly linear.
            std: The standard deviation of all components of the map's outputs. The map is scaled by
                c = 0.5 / std, so that they lie where tanh is nearly linear.

        Returns:
            The projection on the CPU, in float32.
        """
        projection, scale = cls(len(bias_D)), TANH_STD / std
        linear = projection._last_linear
        with torch.no_grad():
            linear.weight.copy_(scale * weight_DD)
            linear.bias.copy_(scale * bias_D)
        return projection

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Save the projection as a safetensors file, atomically.

        Args:
            path: The file to write. Missing parent folders are created.
            metadata: Strings to store in the file, in addition to the head. `load` returns them as
                `.metadata`.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), save(tensors, {**(metadata or {}), "head": self.head}))

    @classmethod
    def find(cls, location: str) -> "Projection":
        """Load the projection of a run, or one that the paper's authors published.

        Args:
            location: A run folder, a projection.safetensors or a checkpoint of the paper's authors. It may be
                on the Hugging Face Hub: `hf://owner/repo[@revision][/path]`. `cosettle://NAME` is the
                authors' projection of this name (see `from_cosettle`).

        Returns:
            The projection on the CPU.

        Raises:
            InputError: The file cannot be read, or does not contain a projection.
        """
        if location.startswith("cosettle://"):
            return cls.from_cosettle(location)
        if location.startswith("hf://"):
            path = find_file(location, PROJECTION_FILE)
        else:
            path = Path(location).expanduser()
            if path.is_dir():
                path /= PROJECTION_FILE
            if not path.is_file():
                raise InputError(
                    f"projection '{location}': no {PROJECTION_FILE} there. Pass the output folder of a "
                    f"training run (with several backbones, output/NAME), a file, hf://owner/repo or "
                    f"cosettle://NAME"
                )
        return cls.load(path) if path.suffix == ".safetensors" else cls.from_cosettle(path)

    @classmethod
    def load(cls, path: str | Path) -> "Projection":
        """Load a projection that `save` or a training run has written.

        Args:
            path: A safetensors file.

        Returns:
            The projection on the CPU, with its `.metadata`.

        Raises:
            InputError: The file cannot be read, or does not contain a projection.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # The file is not a mapping and cannot be iterated.
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"projection '{path}' cannot be read ({error}); pass projection.safetensors of a run folder"
            ) from error
        if metadata.get("head") not in _FORMS or "norm.weight" not in state:
            raise InputError(
                f"projection '{path}' is not from fasttrain; pass projection.safetensors of a run folder"
            )
        projection = _from_state_dict(cast(Head, metadata["head"]), state, f"projection '{path}'")
        projection.metadata = metadata
        return projection

    @classmethod
    def from_cosettle(cls, path: str | Path) -> "Projection":
        """Load a projection that the paper's authors published (`ckpts/ours` of `yafeng19/Co-Settle`).

        Args:
            path: The name of its backbone, `mae`, `ijepa`, `clip`, `blip`, `mocov3`, `ibot`, `dino` or
                `dinov2`, or a copy of such a checkpoint: a local file or `hf://owner/repo/path`.

        Returns:
            The projection on the CPU. Its head is inferred from the keys of the checkpoint.

        Raises:
            InputError: The file cannot be read, or does not contain a projection (keys `adapter.adapter.*`).
        """
        prefix = "adapter.adapter.adapter_"
        location = str(path)
        name = location.removeprefix("cosettle://")
        if name in COSETTLE:
            location = f"hf://yafeng19/Co-Settle/ckpts/ours/{name}+ours"
        elif name != location or not (location.startswith("hf://") or Path(location).exists()):
            raise InputError(
                f"projection {location!r}: no such file, nor one of the names of the projections that the "
                f"paper's authors published: {', '.join(COSETTLE)}"
            )
        published = flatten_checkpoint(read_checkpoint(find_file(location)), location)
        state = {
            _own_name(key.partition(prefix)[2]): tensor.float()
            for key, tensor in published.items()
            if prefix in key
        }
        depth = sum(key.startswith("linears.") and key.endswith(".weight") for key in state)
        head = next((head for head in PUBLISHED if _FORMS[head].layers == depth), None)
        if head is None or "norm.weight" not in state:
            raise InputError(f"checkpoint '{path}' contains no Co-Settle projection (keys {prefix}*)")
        return _from_state_dict(head, state, f"checkpoint '{path}'")


def _own_name(published: str) -> str:
    """Translate a published key, such as `linear.weight` (head `linear`) or `linear2.weight` (MLP heads)."""
    name = re.sub(r"^linear(\d?)\.", lambda match: f"linears.{int(match[1] or 1) - 1}.", published)
    return name.replace("layer_norm1.", "norm.")


def _linear(inputs: int, outputs: int, init: Init) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    if init == "trunc_normal":
        nn.init.trunc_normal_(linear.weight, std=0.02)
    elif init == "xavier_uniform":
        nn.init.xavier_uniform_(linear.weight)
    if init != "default":
        nn.init.zeros_(linear.bias)
    return linear


def _from_state_dict(head: Head, state: dict[str, Tensor], source: str) -> Projection:
    projection = Projection(state["norm.weight"].shape[0], head=head)
    try:
        projection.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{source} does not fit the head {head!r}: {' '.join(str(error).split())}"
        ) from error
    return projection
