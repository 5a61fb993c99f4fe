"""Where weights come from: a local file, the Hugging Face Hub, timm, or a seed.

`backbones` and `projection` read every checkpoint through this file, as one state dict in timm's names, and
draw their random weights with `seeded`.
"""

import argparse
import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor

from fasttrain.errors import InputError

StateDict = dict[str, Tensor]

SOURCES = "a local path, hf://owner/repo/path, timm://name, or random"

# What published checkpoints hold besides tensors. Allowed by name, because `torch.load` runs with
# `weights_only=True`; any other class makes the file an error that names it.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

# Parts of a checkpoint that patch tokens never pass through: MAE's decoder, mask tokens, classification and
# projection heads, and the projection that a Co-Settle release keeps beside the encoder.
_NOT_ENCODER = re.compile(
    r"(adapter|decoder_\w+|head|head_dist|attn_pool|mask_token|masked_embed|proj)(\.|$)"
)

# OpenAI's CLIP and Meta's DINOv2 (registers, block chunks) in the names of timm's VisionTransformer.
_TIMM_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in [
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"^register_tokens$", "reg_token"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    ]
]


def load_encoder_weights(weights: str, containers: tuple[str, ...], prefix: str) -> StateDict:
    """The encoder's tensors at `weights`, float32 on the CPU, in the names of timm's VisionTransformer.

    `weights` is one of `SOURCES` but `random`. The state dict is the first entry of the checkpoint that is
    named in `containers` or, as in the paper's release of every family, `model`; else the checkpoint itself.
    If any of its keys starts with `prefix`, only those keys are the encoder's. Raises InputError where the
    weights cannot be had or hold no state dict.
    """
    if weights.startswith("timm://"):
        checkpoint: Any = _load_timm(weights)
    else:
        checkpoint = read_checkpoint(find_file(weights))
    state = find_state_dict(checkpoint, weights, (*containers, "model"))
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    tensors = {_timm_name(key): t.float() for key, t in state.items() if not _NOT_ENCODER.match(key)}
    for embedding in {"cls_token", "pos_embed"} & tensors.keys():
        # CLIP's have no batch axis.
        tensors[embedding] = tensors[embedding].reshape(1, -1, tensors[embedding].shape[-1])
    return tensors


def _timm_name(key: str) -> str:
    for pattern, name in _TIMM_NAMES:
        key = pattern.sub(name, key)
    return key


def find_state_dict(checkpoint: Any, weights: str, containers: tuple[str, ...]) -> StateDict:
    """The tensors of the first container present, else of the checkpoint itself, without DDP's `module.`."""
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"weights {weights} hold a {type(checkpoint).__name__}, not a state dict")
    found = next(
        (checkpoint[name] for name in containers if isinstance(checkpoint.get(name), Mapping)), checkpoint
    )
    state = {
        str(key).removeprefix("module."): value for key, value in found.items() if torch.is_tensor(value)
    }
    if not state:
        raise InputError(
            f"weights {weights} hold no state dict: looked under {', '.join(containers)} and at the top, "
            f"found only {', '.join(map(str, list(checkpoint)[:5])) or 'nothing'}"
        )
    return state


def find_file(weights: str) -> Path:
    """The local file that a path or `hf://owner/repo[@revision]/path` names, downloaded if need be."""
    if weights.startswith("hf://"):
        return _download(weights)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise InputError(f"weights {weights}: no such file; expected {SOURCES}")
    return path


def _download(weights: str) -> Path:
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", weights)
    if match is None:
        raise InputError(f"weights {weights}: expected hf://owner/repo/path or hf://owner/repo@revision/path")
    repo, revision, path = match.groups()
    files = [path]
    try:
        # The paper's release is named by folder, one checkpoint in each.
        if not PurePosixPath(path).suffix:
            every = huggingface_hub.list_repo_files(repo, revision=revision)
            files = [file for file in every if file == path or file.startswith(path + "/")]
        if len(files) == 1:
            return Path(huggingface_hub.hf_hub_download(repo, files[0], revision=revision))
    # Without a network some of the client's functions raise errors of its HTTP library, whichever that is.
    except Exception as error:
        file = f"https://huggingface.co/{repo}/resolve/{revision or 'main'}/{path}"
        raise _without_the_hub(weights, file, error) from error
    names = ", ".join(files[:5]) or "no files there"
    raise InputError(f"weights {weights}: expected the path of one file in the repository ({names})")


def _load_timm(weights: str) -> StateDict:
    name = weights.removeprefix("timm://")
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise InputError(f"weights {weights}: timm has no such pretrained model")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (HfHubHTTPError, OSError) as error:
        file = f"model.safetensors of https://huggingface.co/timm/{name}"
        raise _without_the_hub(weights, file, error) from error


def _without_the_hub(weights: str, file: str, error: Exception) -> InputError:
    return InputError(
        f"weights {weights} could not be downloaded ({type(error).__name__}); without the Hub, download "
        f"{file} elsewhere, copy it here and give its local path as the weights"
    )


def read_checkpoint(path: Path) -> Any:
    """What a .safetensors file, a TorchScript archive or a `torch.save` file holds, on the CPU.

    Pickles are read with `weights_only=True`. Raises InputError for a damaged file or one that is none of
    these.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                # torch advises against making such archives; OpenAI's CLIP is published as one.
                warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
                return torch.jit.load(path, map_location="cpu").state_dict()
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes, or text, lead the readers to errors of any kind.
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            problem = f"hold {unsafe[1]}, which is not loaded for safety; save their state dict alone"
        else:
            reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
            problem = f"are damaged or no checkpoint ({reason})"
        raise InputError(f"weights {path} {problem}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def hash_state_dict(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values in the order of the names; the same for every file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU inside are a function of `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the GPUs as well, and for good.
        torch.default_generator.manual_seed(seed)
        yield
