"""Turn a frozen image encoder into a video encoder (Co-Settle, arXiv 2603.26597)."""

__version__ = "0.1.0"
