"""Writes the tables of speed of README.md and kernels/README.md, between their markers, from results/ alone.

python -m benchmarks.readme

README.md: throughput-*.json and, of a GPU, what loaders-, propagation- and davis-cuda.json say of the goals.
kernels/README.md: kernels.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed: python -m benchmarks.readme -->", "<!-- end of speed -->"
NO_GPU = "**No GPU has run this yet: there are no measured figures of one.**"


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
    if environment["device"]:
        # On a GPU a table of its own would say little more; on a CPU they matter less than the noise.
        rows += [
            (f"step on resident frames, {content['precision']}, ours, {name}", timing, None)
            for name, timing in content.get("switches", {}).items()
            if name not in ("as it is", "not compiled")
        ]
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
        span = spread(timing)
        over = f"{ratio['wall']:.2f}x, {ratio['cpu']:.2f}x" if ratio else ""
        lines.append(f"| {name} | {timing['pairs_per_second']:.0f} | {span} | {over} |")
    notes = []
    if "parts" in content:
        notes.append(
            f"The encoder alone runs at {content['parts']['encoder']['utilisation']:.0%} of a large matrix "
            f"product ({content['ceilings']['matrix_tflops']:.2f} TFLOP/s here)."
        )
    if environment["device"] and "end_to_end" in content:
        notes.append(
            f"A step with data takes {1 + ends['data_overhead']:.3f} times as long as on resident frames "
            f"(goal: 1.03); five epochs of Kinetics-400 take {60 * ends['kinetics400_hours']:.1f} minutes."
        )
    if content["skipped"]:
        told = "; ".join(f"{name} ({reason})" for name, reason in content["skipped"].items())
        notes.append(f"Not measured: {told}.")
    return "\n".join([f"**{device}**: {model}.", "", *lines, "", " ".join(notes)])


def spread(timing: dict[str, float]) -> str:
    """Milliseconds: median (least to most); as many places as tell three per cent apart."""
    places = 0 if timing["ms"] >= 100 else 1 if timing["ms"] >= 5 else 3
    middle, least, most = (f"{timing[key]:.{places}f}" for key in ("ms", "ms_least", "ms_most"))
    return f"{middle} ({least} to {most})"


def loader_lines(content: dict[str, Any]) -> str:
    """What a GPU's loaders-cuda.json says of the goals: a paragraph."""
    goals, device = content["goals"], content["environment"]["device"]
    told = []
    if "frames_per_second_on_device" in goals:
        told.append(
            f"{goals['frames_per_second_on_device']:,.0f} frames/s on the device with "
            f"{content['setting']['threads']} threads ({goals['fastest_decoding']}; goal on an H200: 9,000)"
        )
    if "waiting_share" in goals:
        told.append(
            f"{goals['waiting_share']:.1%} of a training step (compile={content['setting']['compile']}) is "
            f"spent waiting for data ({goals['least_waiting']}; goal: 3%)"
        )
    if "packed_over_four_frames" in goals:
        told.append(
            f"{goals['packed_over_four_frames']:.1f} times the pairs per CPU second of the published loader"
        )
    return f"**{device}**, frame pairs: {'; '.join(told) or 'nothing was measured'}."


def propagation_lines(content: dict[str, Any]) -> str:
    """What a GPU's propagation-cuda.json says, case by case: a paragraph."""
    cases = "; ".join(
        f"{case['case']['name']} {case['time']['ours']['ms']:.2f} ms a frame, "
        f"{case['time']['speedup']['wall']:.1f} times the script's speed, "
        f"{case['memory']['script_over_ours']:.1f} times less memory, "
        f"{case['time']['agreeing_tokens']:.2%} of the labels the same"
        for case in content["cases"]
    )
    return f"**{content['environment']['device']}**, label propagation beside the research script: {cases}."


def davis_lines(content: dict[str, Any]) -> str:
    """What a GPU's davis-cuda.json says: a paragraph."""
    found = content["data_set"]
    return (
        f"**{content['environment']['device']}**, `eval davis`, ViT of width "
        f"{content['backbone']['embed_dim']}, before and after, by a made-up sequence of {content['frames']} "
        f"frames: {found['seconds']:.0f} s for the {found['sequences']} sequences of DAVIS 2017, "
        f"{found['seconds_without_pictures']:.0f} s without pictures."
    )


def kernel_lines(content: dict[str, Any]) -> str:
    """kernels.json as a paragraph, a table and the goals, Markdown."""
    # Here, for it imports Triton, and under tests must not before it is to be interpreted.
    from benchmarks.kernels import best_timings, goals

    environment = content["environment"]
    versions = environment["versions"]
    lines = [
        f"**{environment['device']}**, torch {versions['torch']}, triton {versions.get('triton', '-')}, copy "
        f"at {content['copy_bytes_per_second'] / 1e12:.2f} TB/s. Linear layer, epilogue and losses, bf16, "
        f"times of the fused form: forward called from Python, with gradients as a CUDA graph "
        f"(`*`: from Python).",
        "",
        "| B | N | D | window | forward: ms | with gradients: ms (least to most) | over eager | "
        "over torch.compile | share of the copy's bandwidth | peak GB: fused, torch.compile, eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in content["shapes"]:
        timings = best_timings(row)
        phase = "graph" if "fused" in row.get("graph", {}) else "step"
        over = row.get(f"{phase}_speedup", {})
        place = f"{row['batch']} | {row['grid'][0] * row['grid'][1]} | {row['channels']} | {row['window']}"
        cells = ["-"] * 6
        if "fused" in timings:
            peaks = (row["peak_bytes"].get(name) for name in ("fused", "compiled", "eager"))
            cells = [
                f"{row['forward']['fused']['ms']:.3f}",
                spread(timings["fused"]) + ("" if phase == "graph" else "*"),
                *(f"{over[name]:.1f}x" if name in over else "-" for name in ("eager", "compiled")),
                f"{row[f'{phase}_share_of_copy_bandwidth']:.0%}",
                ", ".join("-" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks),
            ]
        lines.append(f"| {place} | {' | '.join(cells)} |")
        reasons = {
            **dict.fromkeys(row["out_of_memory"], "out of memory"),
            **row.get("skipped", {}),
            **row["failed"],
        }
        # What a compiler says may have many lines.
        notes += [
            f"{place.replace(' |', ',')}: {name} ({why.splitlines()[0]})" for name, why in reasons.items()
        ]
    lines += ["", *(f"- {line}" for line in goals(content))]
    if notes:
        lines += ["", f"Not measured (B, N, D, window): {'; '.join(notes)}."]
    return "\n".join(lines)


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def replace(path: Path, text: str) -> None:
    """Put `text` between the markers of a file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    tables = [
        speed_lines(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(RESULTS.glob("throughput-*.json"))
    ]
    of_gpu = {"loaders": loader_lines, "propagation": propagation_lines, "davis": davis_lines}
    told = [
        lines(content) for name, lines in of_gpu.items() if (content := read(f"{name}-cuda.json")) is not None
    ]
    on_gpu = told or read("throughput-cuda.json")
    replace(ROOT / "README.md", "\n\n".join([*tables, *told, *([] if on_gpu else [NO_GPU])]))
    kernels = read("kernels.json")
    replace(ROOT / "kernels" / "README.md", NO_GPU if kernels is None else kernel_lines(kernels))


if __name__ == "__main__":
    main()
