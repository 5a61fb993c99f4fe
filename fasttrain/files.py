"""Files that appear whole or not at all: whoever reads one sees the old one or the new one.

What must be on the disk before anything later is written, checkpoints and packed shards, has its own way.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a name of this process, then rename; the folder of `path` is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
