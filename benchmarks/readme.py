"""Writes the README's table of speed, between its two markers, from results/throughput-*.json alone.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- speed: python -m benchmarks.readme -->", "<!-- end of speed -->"


def speed_lines(content: dict[str, Any]) -> str:
    """One result file as a paragraph and a table, Markdown."""
    environment, backbone = content["environment"], content["backbone"]
    device = environment["device"] or f"{environment['cpu']['model']}, {content['threads']} thread(s)"
    model = (
        f"ViT of width {backbone['embed_dim'] or 768}, depth {backbone['depth'] or 12}, "
        f"{content['image_size']} pixels, {content['batch_size']} pairs, {content['precision']}"
    )
    rows = []
    for section in ("steps", "steps_fp32"):
        if section in content:
            steps = content[section]
            rows += [
                (
                    f"step on resident frames, {steps['precision']}, {name}",
                    timing,
                    steps["speedup"].get(f"{name} over peer"),
                )
                for name, timing in steps["timings"].items()
            ]
    for row in content.get("scaling", {}).get("depth", ()):
        name = f"step on resident frames, {content['precision']}, depth {row['depth']}, ours"
        rows.append((name, row, row["speedup"]["ours over peer"]))
    if "end_to_end" in content:
        ends = content["end_to_end"]
        rows += [
            (f"with data, {content['precision']}, {name}", timing, ratio)
            for name, ratio in (("ours", ends["speedup"]["ours over peer"]), ("peer", None))
            for timing in (ends["timings"][name],)
        ]
    lines = [
        "| measured | pairs/s | ms (least to most) | over the peer: wall, CPU time |",
        "|---|---|---|---|",
    ]
    for name, timing, ratio in rows:
        span = f"{timing['ms']:.0f} ({timing['ms_least']:.0f} to {timing['ms_most']:.0f})"
        over = f"{ratio['wall']:.2f}x, {ratio['cpu']:.2f}x" if ratio else ""
        lines.append(f"| {name} | {timing['pairs_per_second']:.0f} | {span} | {over} |")
    share = ""
    if "parts" in content:
        share = (
            f"The encoder alone runs at {content['parts']['encoder']['utilisation']:.0%} of a large matrix "
            f"product ({content['ceilings']['matrix_tflops']:.2f} TFLOP/s here)."
        )
    skipped = "".join(f" Not measured: {name} ({reason})." for name, reason in content["skipped"].items())
    return "\n".join([f"**{device}**: {model}.", "", *lines, "", share + skipped])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("throughput-*.json"))
    ]
    table = "\n\n".join(speed_lines(content) for content in found)
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
