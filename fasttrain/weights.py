"""Load weights from local files, the Hugging Face Hub and timm, and seed random ones.

`backbones` and `projection` load all checkpoints through this module; `layouts` finds the encoder in them.
"""

import argparse
import hashlib
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from torch import Tensor

from fasttrain.configuration import Config, native_activation, read_config, timm_config
from fasttrain.errors import InputError
from fasttrain.files import parse_json
from fasttrain.layouts import StateDict, flatten, select_encoder

SOURCES = "a local file or folder, hf://owner/repo[/path], timm://name, or random"
# The files of weights in a folder, most preferred first, and of their configuration.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
CONFIG_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "open_clip_config.json",
)
SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar"}

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


@dataclass(frozen=True)
class Source:
    """A local folder or a folder of a repository on the Hugging Face Hub."""

    weights: str
    """The location as the user wrote it, for messages."""
    folder: Path | None = None
    repo: str = ""
    revision: str | None = None
    path: str = ""

    def names(self) -> list[str]:
        """List the files of the folder. Raises InputError if it cannot be read."""
        if self.folder is not None:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file())
        try:
            files = self._remote_files()
        # The type of network errors depends on the HTTP library that huggingface_hub uses.
        except Exception as error:
            files = self._cached_files()
            if not files:
                raise self._download_error(self.path, error) from error
        prefix = f"{self.path}/" if self.path else ""
        return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]

    def fetch(self, name: str) -> Path:
        """Return the local path of a file of the folder; download it if necessary."""
        if self.folder is not None:
            if not (self.folder / name).is_file():
                raise InputError(f"weights {self.weights!r}: {name!r} is missing from the folder; add it")
            return self.folder / name
        file = f"{self.path}/{name}" if self.path else name
        try:
            return Path(huggingface_hub.hf_hub_download(self.repo, file, revision=self.revision))
        except Exception as error:
            raise self._download_error(file, error) from error

    def configuration(self, names: Collection[str]) -> dict[str, Any]:
        """Read those configuration files that the folder has."""
        return {name: read_json(self.fetch(name)) for name in CONFIG_FILES if name in names}

    def _remote_files(self) -> list[str]:
        hub = huggingface_hub.HfApi()
        try:
            # Unlike list_repo_files, this fails at once without a network, so that the cache is used.
            found = hub.model_info(self.repo, revision=self.revision)
            return [file.rfilename for file in found.siblings or []]
        except HfHubHTTPError:
            # Waits and repeats if the Hub is busy.
            return list(hub.list_repo_files(self.repo, revision=self.revision))

    def _cached_files(self) -> list[str]:
        try:
            snapshot = huggingface_hub.snapshot_download(
                self.repo, revision=self.revision, local_files_only=True
            )
        except (OSError, ValueError):
            return []
        return [str(path.relative_to(snapshot)) for path in Path(snapshot).rglob("*") if path.is_file()]

    def _download_error(self, file: str, error: Exception) -> InputError:
        # Without a suffix, it is a folder.
        kind = "resolve" if PurePosixPath(file).suffix else "tree"
        address = f"https://huggingface.co/{self.repo}/{kind}/{self.revision or 'main'}/{file}"
        return _download_error(self.weights, address.removesuffix("/"), error)


def load_encoder_weights(weights: str, prefer: tuple[str, ...]) -> tuple[StateDict, Config, str]:
    """Load the tensors of an encoder in float32 on the CPU, with the parameter names of timm.

    Args:
        weights: One of `SOURCES`, except `random`. `#entry` at the end chooses one of several encoders.
        prefer: Names that decide between several encoders in a checkpoint (see `select_encoder`).

    Returns:
        The tensors, the configuration, and a description of where the tensors were found.

    Raises:
        InputError: The weights cannot be loaded, or contain no encoder.
    """
    location, mark, chosen = (weights, "", "") if Path(weights).exists() else weights.partition("#")
    entry = chosen if mark else None
    if location.startswith("timm://"):
        tensors, config = _load_timm(location)
    else:
        tensors, config = _load_files(location)
    state, found = select_encoder(tensors, weights, prefer=prefer, entry=entry)
    return state, config, found


def _load_files(weights: str) -> tuple[StateDict, Config]:
    source, name = _find(weights)
    # A configuration describes only the standard files of weights in its folder.
    names = source.names() if not name or name in WEIGHT_FILES else []
    name = name or _choose_file(weights, names)
    if re.search(r"-\d+-of-\d+\.", name):
        raise InputError(
            f"weights {weights!r} are one of several shards; pass the folder that contains them all"
        )
    path = source.fetch(name)
    if path.name.endswith(".index.json"):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"weights {weights!r}: {name} has no valid weight_map; download it again")
        tensors: StateDict = {}
        for shard in sorted({PurePosixPath(shard).name for shard in shards.values()}):
            tensors |= flatten_checkpoint(read_checkpoint(source.fetch(shard)), weights)
    else:
        tensors = flatten_checkpoint(read_checkpoint(path), weights)
    return tensors, read_config(source.configuration(names), weights)


def _find(weights: str) -> tuple[Source, str]:
    """Split a location into its folder and the name of a file, which is empty for a whole folder."""
    if not weights.startswith("hf://"):
        path = Path(os.path.expanduser(weights))
        if path.is_dir() and weights:
            return Source(weights, path), ""
        if not path.is_file():
            raise InputError(f"weights {weights!r}: no such file; expected {SOURCES}")
        return Source(weights, path.parent), path.name
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", weights)
    if match is None:
        raise InputError(
            f"weights {weights!r}: expected hf://owner/repo, hf://owner/repo/path or "
            f"hf://owner/repo@revision/path"
        )
    repo, revision, inside = match[1], match[2], PurePosixPath(match[3] or "")
    # A folder of the Hub, such as those of the paper's release, has no suffix.
    folder, name = (inside.parent, inside.name) if inside.suffix else (inside, "")
    return Source(weights, None, repo, revision, "" if folder == PurePosixPath(".") else str(folder)), name


def short_name(weights: str) -> str:
    """Name weights in a title: by their file or, if that has a standard name, by its folder or repository."""
    if weights == "random":
        return "random weights"
    path = PurePosixPath(os.path.abspath(weights.partition("#")[0]))
    if path.name in WEIGHT_FILES:
        path = path.parent
    while path.suffix in SUFFIXES:
        path = path.with_suffix("")
    # The revision of a repository.
    return path.name.partition("@")[0]


def _choose_file(weights: str, names: list[str]) -> str:
    """Choose the file of weights in a folder."""
    standard = [name for name in WEIGHT_FILES if name in names]
    with_suffix = [name for name in names if PurePosixPath(name).suffix in SUFFIXES]
    others = [name for name in with_suffix if "/" not in name] or with_suffix
    if not others and len(names) == 1 and not PurePosixPath(names[0]).suffix:
        others = names
    if not standard and len(others) != 1:
        problem = f"has several files of weights ({', '.join(others[:5])})" if others else "has no weights"
        raise InputError(
            f"weights {weights!r}: the folder {problem}; pass the path of one file, or a folder with "
            f"model.safetensors or pytorch_model.bin"
        )
    return (standard or others)[0]


def flatten_checkpoint(checkpoint: Any, weights: str) -> StateDict:
    """Return all tensors of a checkpoint by their dotted keys. Raises InputError if there are none."""
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"weights {weights!r}: expected a state dict, got a {type(checkpoint).__name__}")
    tensors = flatten(checkpoint)
    if not tensors:
        keys = ", ".join(map(str, list(checkpoint)[:5])) or "none"
        raise InputError(f"weights {weights!r} contain no tensors (keys: {keys})")
    return tensors


def find_file(weights: str, preferred: str = "") -> Path:
    """Return the local file of a path or `hf://owner/repo[@revision][/path]`; download it if necessary.

    In a folder, it is the file of the name `preferred` or, without one, the only file of weights.
    """
    source, name = _find(weights)
    if not name:
        names = source.names()
        name = preferred if preferred in names else _choose_file(weights, names)
    return source.fetch(name)


def is_local(weights: str) -> bool:
    """Say whether a location is a path of this machine."""
    return weights != "random" and "://" not in weights


def is_missing(weights: str) -> bool:
    """Say whether a location is a path of this machine at which there is nothing."""
    paths = (weights, weights.partition("#")[0])
    return is_local(weights) and not any(Path(path).expanduser().exists() for path in paths)


def absolute(weights: str) -> str:
    """Return a location that does not depend on the current folder."""
    return os.path.abspath(os.path.expanduser(weights)) if is_local(weights) else weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError if the file has other contents."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"'{path}': expected a JSON object, got a {type(value).__name__}")
    return value


def _load_timm(weights: str) -> tuple[StateDict, Config]:
    name = weights.removeprefix("timm://")
    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise InputError(f"weights {weights!r}: timm has no pretrained model of this name")
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except (HfHubHTTPError, OSError) as error:
        file = f"model.safetensors and config.json of https://huggingface.co/timm/{name} to one folder"
        raise _download_error(weights, file, error) from error
    config = timm_config(model)
    return model.state_dict(), replace(config, activation=native_activation(name) or config.activation)


def _download_error(weights: str, file: str, error: Exception) -> InputError:
    if isinstance(error, GatedRepoError):
        return InputError(
            f"weights {weights!r} are gated: accept their terms on the Hub, and log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"weights {weights!r}: the Hub has no such repository, or it is private. Correct the name, or "
            f"log in with `hf auth login`"
        )
    missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    if missing or isinstance(error, RevisionNotFoundError):
        return InputError(f"weights {weights!r}: {file} does not exist; correct the path or the revision")
    return InputError(
        f"weights {weights!r} cannot be downloaded ({type(error).__name__}). Without access to the Hub, "
        f"download {file} elsewhere, copy it to this machine and pass its local path"
    )


def read_checkpoint(path: Path) -> Any:
    """Read a .safetensors file, a TorchScript archive or a `torch.save` file onto the CPU.

    Pickles are read with `weights_only=True`, so that they cannot run code. The code of a TorchScript archive
    is not loaded, because torch.jit.load would run it.

    Raises:
        InputError: The file is damaged, has another format, or contains objects that are not safe to load.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            return _read_torchscript(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise exceptions of any type.
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        with path.open("rb") as file:
            start = file.read(20).lstrip()
        if start.startswith(b"<"):
            problem = "is a web page, not the weights; download it again"
        elif start == b"version https://git-":
            problem = "is a pointer of Git LFS, not the weights; run `git lfs pull` in its repository"
        elif unsafe and unsafe[1].endswith("ShardedTensor"):
            problem = "is one rank's shard of a model trained with FSDP; save the whole state dict"
        elif unsafe and unsafe[1].startswith("lightly_train"):
            problem = "is a training checkpoint of lightly-train; write the model with `lightly-train export`"
        elif unsafe:
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


class _ScriptedModule(dict[str, Any]):
    """The attributes of a module in a TorchScript archive: tensors, other modules and settings."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


def _read_torchscript(path: Path) -> _ScriptedModule:
    """Read the modules of a TorchScript archive as nested mappings. OpenAI publishes CLIP in this format."""
    weights = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(weights, "w") as copy:
        for name in archive.namelist():
            # torch.load recognises TorchScript by this file and refuses it.
            if PurePosixPath(name).name != "constants.pkl":
                copy.writestr(name, archive.read(name))
        (pickled,) = (name for name in archive.namelist() if PurePosixPath(name).match("*/data.pkl"))
        classes = {
            str(name).replace(" ", ".")
            for operation, name, _ in pickletools.genops(archive.read(pickled))
            if operation.name == "GLOBAL" and str(name).startswith("__torch__")
        }
    safe: list[Any] = [(_ScriptedModule, name) for name in classes]
    # These functions only restore the types of lists and dictionaries.
    restored = ("restore_type_tag", "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
    safe += [(_first_argument, f"torch.jit._pickle.{name}") for name in restored]
    weights.seek(0)
    with torch.serialization.safe_globals(safe):
        modules: _ScriptedModule = torch.load(weights, map_location="cpu", weights_only=True)
    return modules


def _first_argument(value: Any, *_: Any) -> Any:
    return value


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
