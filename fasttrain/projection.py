"""The projection head g, the only part that is trained: parameters, files, import of published checkpoints.

A trained projection is one safetensors file. Its metadata names the encoder that it belongs to
(`video_encoder` reads it).
"""

import re
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.files import write_atomically
from fasttrain.weights import find_file, find_state_dict, read_checkpoint, seeded

Head = Literal["linear", "mlp2", "mlp3"]
Init = Literal["trunc_normal", "xavier_uniform", "default"]

# Number of linear layers.
_DEPTH: dict[Head, int] = {"linear": 1, "mlp2": 2, "mlp3": 3}


class Projection(nn.Module):
    """The head g of the paper (`ST_adapter.py` of github.com/yafeng19/Co-Settle).

        linear:  Linear, tanh, LayerNorm
        mlp2:    Linear, tanh, Linear, LayerNorm
        mlp3:    Linear, tanh, Linear, tanh, Linear, LayerNorm

    All layers are D to D. Tokens (..., D) come out as (..., D), before L2 normalisation.

    init: how the weights start, in which the published models differ (`Backbone.projection_init`):
    trunc_normal (std 0.02, zero bias) | xavier_uniform (zero bias) | default (of `nn.Linear`).
    The parameters are a function of `seed`; the global generator is not touched.
    """

    def __init__(
        self, dim: int, *, head: Head = "linear", init: Init = "trunc_normal", seed: int = 0
    ) -> None:
        super().__init__()
        if head not in _DEPTH:
            raise InputError(f"head {head!r}: expected one of {', '.join(_DEPTH)}")
        self.dim = dim
        self.head: Head = head
        self.metadata: dict[str, str] = {}
        with seeded(seed):
            self.linears = nn.ModuleList(_linear(dim, init) for _ in range(_DEPTH[head]))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self._last_linear(self._hidden(tokens))
        return self.norm(out.tanh() if self.head == "linear" else out)

    def split(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The product of the last linear layer without its bias, and the further arguments of the kernel.

        `forward(tokens)` is norm(tanh(product + bias)), without the tanh where `rest["tanh"]` is false.
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
        """The input of the last linear layer, (..., D): the tokens themselves for the linear head."""
        for linear in self.linears[:-1]:
            tokens = linear(tokens).tanh()
        return tokens

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write the parameters as safetensors, atomically: `path` is the old file or the whole new one.

        metadata: what `load` gives back as `.metadata`; the head is always added.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), save(tensors, {**(metadata or {}), "head": self.head}))

    @classmethod
    def load(cls, path: str | Path) -> "Projection":
        """The projection that `save` wrote, on the CPU, with its `.metadata`.

        Raises InputError for any other file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # An open file is not a mapping: it cannot be iterated itself.
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"projection {path} cannot be read ({error}); give one that training wrote"
            ) from error
        if metadata.get("head") not in _DEPTH or "norm.weight" not in state:
            raise InputError(f"projection {path} is a safetensors file, but no projection of fasttrain")
        projection = _from_state_dict(cast(Head, metadata["head"]), state, f"projection {path}")
        projection.metadata = metadata
        return projection

    @classmethod
    def from_cosettle(cls, path: str | Path) -> "Projection":
        """The projection of a checkpoint that the paper's authors published (`ckpts/ours/<family>+ours`).

        path: a local file or hf://owner/repo/path. The head follows from the keys. Raises InputError for a
        file without `adapter.adapter.*`.
        """
        prefix = "adapter.adapter.adapter_"
        published = find_state_dict(read_checkpoint(find_file(str(path))), str(path), ("model",))
        state = {
            _own_name(key.removeprefix(prefix)): tensor.float()
            for key, tensor in published.items()
            if key.startswith(prefix)
        }
        depth = sum(key.startswith("linears.") and key.endswith(".weight") for key in state)
        head = next((head for head, layers in _DEPTH.items() if layers == depth), None)
        if head is None or "norm.weight" not in state:
            raise InputError(f"checkpoint {path} holds no Co-Settle projection (keys {prefix}*)")
        return _from_state_dict(head, state, f"checkpoint {path}")


def _own_name(published: str) -> str:
    """A single layer is called `linear`, those of an MLP `linear1`, `linear2`, `linear3`."""
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
        raise InputError(f"{source} does not fit a {head} head: {' '.join(str(error).split())}") from error
    return projection
