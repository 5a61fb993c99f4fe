"""The projection, which is the only trained module: its architecture, its files, and published checkpoints.

A trained projection is stored as a safetensors file, whose metadata describe the backbone that it belongs to
(see `video_encoder`).
"""

import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.files import write_atomically
from fasttrain.weights import find_file, flatten_checkpoint, read_checkpoint, seeded

Head = Literal["linear", "mlp2", "mlp3"]
Init = Literal["trunc_normal", "xavier_uniform", "default"]

# The name of the file in a run folder.
PROJECTION_FILE = "projection.safetensors"
# The projections that the paper's authors published, by the names of their backbones.
COSETTLE = ("mae", "ijepa", "clip", "blip", "mocov3", "ibot", "dino", "dinov2")
# Standard deviation of the inputs of tanh at the start at the frozen features: there, tanh is nearly linear.
TANH_STD = 0.5
# Number of linear layers.
_DEPTH: dict[Head, int] = {"linear": 1, "mlp2": 2, "mlp3": 3}


class Projection(nn.Module):
    """The projection g of the paper (`ST_adapter.py` of github.com/yafeng19/Co-Settle).

    The module maps tokens (..., D) to tokens (..., D), which are not L2-normalised. All linear layers have D
    inputs and D outputs:

        linear:  Linear, tanh, LayerNorm
        mlp2:    Linear, tanh, Linear, LayerNorm
        mlp3:    Linear, tanh, Linear, tanh, Linear, LayerNorm

    Args:
        dim: Embedding dimension D.
        head: Architecture: `linear`, `mlp2` or `mlp3`.
        init: Random initialisation of the linear layers: `trunc_normal` (standard deviation 0.02, zero bias),
            `xavier_uniform` (zero bias), or `default` (that of `nn.Linear`). The choice of the
            published implementation depends on the backbone (`Backbone.projection_init`).
        seed: Seed of the initialisation. The global generator is not affected.

    Attributes:
        metadata: The metadata of the file that the projection was loaded from.

    Raises:
        InputError: `head` is not one of the architectures.
    """

    def __init__(
        self, dim: int, *, head: Head = "linear", init: Init = "trunc_normal", seed: int = 0
    ) -> None:
        super().__init__()
        if head not in _DEPTH:
            raise InputError(f"head {head!r} is not one of: {', '.join(_DEPTH)}")
        self.dim = dim
        self.head: Head = head
        self.metadata: dict[str, str] = {}
        with seeded(seed):
            self.linears = nn.ModuleList(_linear(dim, init) for _ in range(_DEPTH[head]))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens.

        Args:
            tokens: Tokens (..., D) of the frozen encoder.

        Returns:
            Projected tokens (..., D), which are not L2-normalised.
        """
        out = self._last_linear(self._hidden(tokens))
        return self.norm(out.tanh() if self.head == "linear" else out)

    def split(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Compute the forward pass up to the last matrix product, for `fasttrain_kernels.cosettle_head_loss`.

        Args:
            tokens: Tokens (..., D) of the frozen encoder.

        Returns:
            The output (..., D) of the last linear layer without its bias, and the remaining arguments `rest`
                of the loss. `forward(tokens)` equals norm(tanh(output + bias)), or norm(output + bias) if
                `rest["tanh"]` is False.
        """
        rest = {
            "bias": self._last_linear.bias,
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "norm_eps": self.norm.eps,
            "tanh": self.head == "linear",
        }
        return functional.linear(self._hidden(tokens), self._last_linear.weight), rest

    @property
    def _last_linear(self) -> nn.Linear:
        return cast(nn.Linear, self.linears[-1])

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Return the input (..., D) of the last linear layer."""
        for linear in self.linears[:-1]:
            tokens = linear(tokens).tanh()
        return tokens

    @torch.no_grad()
    def start_at_frozen_(self, mean_D: Tensor, std: float) -> None:
        """Set all parameters such that the outputs are nearly the frozen tokens without their mean.

        The input of the layer norm is c (tokens - mean) with c = 0.5 / std, up to the curvature of tanh.

        Args:
            mean_D: The mean (D,) of the frozen tokens.
            std: The standard deviation of all components of (tokens - mean).
        """
        scale = TANH_STD / std
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
        if metadata.get("head") not in _DEPTH or "norm.weight" not in state:
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
        head = next((head for head, layers in _DEPTH.items() if layers == depth), None)
        if head is None or "norm.weight" not in state:
            raise InputError(f"checkpoint '{path}' contains no Co-Settle projection (keys {prefix}*)")
        return _from_state_dict(head, state, f"checkpoint '{path}'")


def _own_name(published: str) -> str:
    """Translate a published key, such as `linear.weight` (head `linear`) or `linear2.weight` (MLP heads)."""
    name = re.sub(r"^linear(\d?)\.", lambda match: f"linears.{int(match[1] or 1) - 1}.", published)
    return name.replace("layer_norm1.", "norm.")


def _linear(dim: int, init: Init) -> nn.Linear:
    linear = nn.Linear(dim, dim)
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
