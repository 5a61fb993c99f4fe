"""Load weights from local files, the Hugging Face Hub and timm, and seed random ones.

`backbones` and `projection` load all checkpoints through this module, which converts them to state dicts with
the key names of timm's VisionTransformer.
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

# The classes, other than tensors, that occur in published checkpoints. `torch.load(weights_only=True)`
# refuses all others.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

# Parts of a checkpoint that do not affect the patch tokens: MAE's decoder, mask tokens, classification and
# projection heads, and the projection in the checkpoints of the Co-Settle release.
_NOT_ENCODER = re.compile(
    r"(adapter|decoder_\w+|head|head_dist|attn_pool|mask_token|masked_embed|proj)(\.|$)"
)

# Translates the keys of OpenAI's CLIP and Meta's DINOv2 (registers, block chunks) to those of timm.
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
    """Load the tensors of an encoder in float32 on the CPU, with the key names of timm's VisionTransformer.

    Args:
        weights: One of `SOURCES`, except `random`.
        containers: Entries of the checkpoint that may hold the state dict. The entry `model`, which the
            paper's release uses for every family, and the checkpoint itself are tried last.
        prefix: Prefix of the encoder's keys. If no key has it, all keys belong to the encoder.

    Raises:
        InputError: The weights cannot be loaded, or contain no state dict.
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
        # CLIP stores them without a batch dimension.
        tensors[embedding] = tensors[embedding].reshape(1, -1, tensors[embedding].shape[-1])
    return tensors


def _timm_name(key: str) -> str:
    for pattern, name in _TIMM_NAMES:
        key = pattern.sub(name, key)
    return key


def find_state_dict(checkpoint: Any, weights: str, containers: tuple[str, ...]) -> StateDict:
    """Return the tensors of the first of `containers` that exists, or of the checkpoint itself.

    The prefix `module.`, which DistributedDataParallel adds, is removed from the keys.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"weights {weights!r}: expected a state dict, got a {type(checkpoint).__name__}")
    container = next(
        (checkpoint[name] for name in containers if isinstance(checkpoint.get(name), Mapping)), checkpoint
    )
    state = {
        str(key).removeprefix("module."): value for key, value in container.items() if torch.is_tensor(value)
    }
    if not state:
        keys = ", ".join(map(str, list(checkpoint)[:5])) or "none"
        raise InputError(
            f"weights {weights!r}: no tensors at the top level or in {', '.join(containers)} (keys: {keys})"
        )
    return state


def find_file(weights: str) -> Path:
    """Return the local file of a path or `hf://owner/repo[@revision]/path`; download it if necessary."""
    if weights.startswith("hf://"):
        return _download(weights)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise InputError(f"weights {weights!r}: no such file; expected {SOURCES}")
    return path


def _download(weights: str) -> Path:
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", weights)
    if match is None:
        raise InputError(
            f"weights {weights!r}: expected hf://owner/repo/path or hf://owner/repo@revision/path"
        )
    repo, revision, path = match.groups()
    files = [path]
    try:
        # In the paper's release, each checkpoint is the only file of a folder.
        if not PurePosixPath(path).suffix:
            all_files = huggingface_hub.list_repo_files(repo, revision=revision)
            files = [file for file in all_files if file == path or file.startswith(path + "/")]
        if len(files) == 1:
            return Path(huggingface_hub.hf_hub_download(repo, files[0], revision=revision))
    # The type of network errors depends on the HTTP library that huggingface_hub uses.
    except Exception as error:
        file = f"https://huggingface.co/{repo}/resolve/{revision or 'main'}/{path}"
        raise _download_error(weights, file, error) from error
    if not files:
        raise InputError(f"weights {weights!r}: the repository has no such file or folder")
    raise InputError(
        f"weights {weights!r}: the folder has several files; pass the path of one: {', '.join(files[:5])}"
    )


def _load_timm(weights: str) -> StateDict:
    name = weights.removeprefix("timm://")
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise InputError(f"weights {weights!r}: timm has no pretrained model of this name")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (HfHubHTTPError, OSError) as error:
        file = f"model.safetensors from https://huggingface.co/timm/{name}"
        raise _download_error(weights, file, error) from error


def _download_error(weights: str, file: str, error: Exception) -> InputError:
    return InputError(
        f"weights {weights!r} cannot be downloaded ({type(error).__name__}). Without access to the Hub, "
        f"download {file} elsewhere, copy it to this machine and pass its local path"
    )


def read_checkpoint(path: Path) -> Any:
    """Read a .safetensors file, a TorchScript archive or a `torch.save` file onto the CPU.

    Pickles are read with `weights_only=True`, so that they cannot run code.

    Raises:
        InputError: The file is damaged, has another format, or contains objects that are not safe to load.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                # torch.jit is deprecated, but OpenAI publishes CLIP as TorchScript archives.
                warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
                return torch.jit.load(path, map_location="cpu").state_dict()
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise exceptions of any type.
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            problem = f"contains {unsafe[1]}, which is not safe to load; save the state dict alone"
        else:
            reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
            problem = f"is damaged or not a checkpoint ({reason})"
        raise InputError(f"weights '{path}': the file {problem}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def hash_state_dict(state: Mapping[str, Tensor]) -> str:
    """Hash names, shapes, dtypes and values with SHA-256, independently of the order of the entries."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed random numbers on the CPU within the context, and restore the generator's state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the GPUs as well, and their state is not restored.
        torch.default_generator.manual_seed(seed)
        yield
