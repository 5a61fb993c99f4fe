"""Turn a frozen image encoder into a video encoder (Co-Settle, arXiv 2603.26597)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrain.video_encoder import load_video_encoder

__version__ = "0.2.0"
__all__ = ["load_video_encoder"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line shall not wait for torch and timm to print its help.
    if name == "load_video_encoder":
        from fasttrain.video_encoder import load_video_encoder

        return load_video_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
