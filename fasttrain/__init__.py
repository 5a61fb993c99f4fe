"""Turn a frozen image encoder into a video encoder (Co-Settle, arXiv 2603.26597)."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.backbones import Backbone, load_backbone
    from fasttrain.errors import InputError
    from fasttrain.fitting import fit
    from fasttrain.projection import Projection
    from fasttrain.recipe import Recipe, load_recipe
    from fasttrain.training import TrainingResult, train
    from fasttrain.video_encoder import VideoEncoder, load_video_encoder

if sys.platform == "win32":
    # Files are locked, and runs are stopped, by means that Windows does not have.
    raise ImportError("fasttrain needs Linux or macOS. On Windows, install it in WSL 2")

__version__ = "0.2.0"
__all__ = [
    "Backbone",
    "InputError",
    "Projection",
    "Recipe",
    "TrainingResult",
    "VideoEncoder",
    "fit",
    "load_backbone",
    "load_recipe",
    "load_video_encoder",
    "train",
]

# Imported on first use, so that `fasttrain --help` need not load torch and timm.
_MODULES = {
    "Backbone": "fasttrain.backbones",
    "InputError": "fasttrain.errors",
    "Projection": "fasttrain.projection",
    "Recipe": "fasttrain.recipe",
    "TrainingResult": "fasttrain.training",
    "VideoEncoder": "fasttrain.video_encoder",
    "fit": "fasttrain.fitting",
    "load_backbone": "fasttrain.backbones",
    "load_recipe": "fasttrain.recipe",
    "load_video_encoder": "fasttrain.video_encoder",
    "train": "fasttrain.training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
