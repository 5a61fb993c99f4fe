"""Run parts of the reliability harness, and summarise them in benchmarks/results/reliability.json.

    make test-reliability                        run the parts that this commit has not passed yet
    make test-reliability PARTS="kill fuzz"      run these parts, even if they have passed

Each part is a module with a function `run(folder)`, which works in an empty folder and returns figures. Among
them are `trials`, a number, and `failures`, a list with one line per broken promise. The results are kept in
build/reliability, so that an interrupted harness continues with the next part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, environment
from fasttrain.files import write_json

KEPT = Path(__file__).resolve().parents[2] / "build" / "reliability"
PARTS = ("kill", "terminate", "power", "faults", "fuzz", "security", "ranks", "planted")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    for name in chosen or PARTS:
        kept = read(name)
        if not chosen and kept and not kept["failures"] and kept["commit"] == environment()["commit"]:
            print(f"{name}: passed before")
            continue
        run_part(name)
    results = {name: read(name) for name in PARTS}
    if all(results.values()):
        write_json(RESULTS / "reliability.json", {"environment": environment(), "parts": results})
    failures = [
        f"{name}: {line}" for name, result in results.items() if result for line in result["failures"]
    ]
    print(*failures, f"failures: {len(failures)}", sep="\n")
    return 1 if failures else 0


def run_part(name: str) -> None:
    print(f"{name}: started", flush=True)
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"reliability-{name}-"))
    result: dict[str, Any] = importlib.import_module(f"reliability.{name}").run(folder)
    result |= {"seconds": round(time.monotonic() - start, 1), "commit": environment()["commit"]}
    write_json(KEPT / f"{name}.json", result)
    print(f"{name}: {json.dumps(result)}", flush=True)
    if not result["failures"]:
        shutil.rmtree(folder)


def read(name: str) -> dict[str, Any] | None:
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
