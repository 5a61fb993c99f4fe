"""For torch.hub: `torch.hub.load(REPOSITORY, "video_encoder", RUN)`, without installing fasttrain."""

from fasttrain.video_encoder import load_video_encoder as video_encoder  # noqa: F401

dependencies = ["torch", "timm", "numpy", "pydantic", "yaml", "safetensors", "huggingface_hub"]
