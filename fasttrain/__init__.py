"""Turn a frozen image encoder into a video encoder (Co-Settle, arXiv 2603.26597)."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.__main__ import train
    from fasttrain.recipe import load_recipe
    from fasttrain.video_encoder import load_video_encoder

if sys.platform == "win32":
    # Files are locked, and runs are stopped, by means that Windows does not have.
    raise ImportError("fasttrain needs Linux or macOS. On Windows, install it in WSL 2")

__version__ = "0.2.0"
__all__ = ["load_recipe", "load_video_encoder", "train"]

# Imported on first use, so that `fasttrain --help` need not load torch and timm.
_MODULES = {
    "load_recipe": "fasttrain.recipe",
    "load_video_encoder": "fasttrain.video_encoder",
    "train": "fasttrain.__main__",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
