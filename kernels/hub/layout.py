"""Lay the kernels out as a repository of the Hugging Face kernel hub: `python kernels/hub/layout.py OUTPUT`.

OUTPUT becomes a source repository for kernel-builder. OUTPUT/build holds what kernel-builder would build from
it, one folder per backend, all with the same Python files. `kernels.get_local_kernel(Path(OUTPUT))` loads one
of them. The formats are defined in https://huggingface.co/docs/kernels/kernel-requirements.
"""

import argparse
import hashlib
import json
import shutil
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HUB = Path(__file__).resolve().parent
FILES = [HUB / "build.toml", HUB / "flake.nix", HUB / "CARD.md", HUB.parent / "LICENSE"]
SOURCES = sorted(HUB.parent.glob("*.py"))


def copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder)


def metadata(general: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return the content of metadata.json. `general` is the table of that name in build.toml."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in SOURCES}
    # The loader imports the kernels under this id, which then is also the namespace of their operators. The
    # id contains a hash of the sources, so that two versions can be used in one process.
    revision = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    return {
        "name": general["name"],
        "id": f"_{general['name'].replace('-', '_')}_{backend}_{revision}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that does not exist yet")
    output = parser.parse_args().output
    if output.exists():
        parser.error(f"{output} exists. Name a new folder, or delete this one.")
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    copy(FILES, output)
    (output / ".gitignore").write_text("/build/\n")
    copy(SOURCES, output / "torch-ext" / general["name"].replace("-", "_"))
    for backend in general["backends"]:
        variant = output / "build" / f"torch-{backend}"
        copy(SOURCES, variant)
        (variant / "metadata.json").write_text(json.dumps(metadata(general, backend), indent=2) + "\n")
    print(f"Wrote {output}.")


if __name__ == "__main__":
    main()
