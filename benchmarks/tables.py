"""What kernels.py measured on a GPU, as results/kernels.json and as the README's table.

python benchmarks/tables.py 250k.json 1M.json 3M.json   collects the runs of one machine, and prints the table
python benchmarks/tables.py                             prints the table
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kernels.json"
IMAGES = re.compile(r"renderer, a batch of (\d+) images")

LABELS = {
    "project_ms": "project",
    "tile_ms": "tile",
    "blend_ms": "blend",
    "forward_project_tile_blend_ms": "forward: project, tile, blend",
    "forward_ms": "**forward, recorded (`render.Renderer`)**",
    "loss_and_gradient_ms": "L1 + D-SSIM with gradient",
    "loss_with_a_mask_and_an_exposure_ms": "… with a mask and an exposure",
    "blend_vjp_ms": "blend′",
    "project_vjp_and_update_in_one_ms": "project′ and Adam in one, all rows",
    "growth_refinement_ms": "growth: clone, split and prune",
    "step_all_rows_ms": "whole step, recorded, all rows",
    "step_with_masks_and_exposures_ms": "… with masks and exposures",
    "step_no_depth_limits_ms": "whole step, contributing rows, no depth limits",
    "step_ms": "**whole step, contributing rows**",
    "step_in_order_ms": "… of rows in Morton order",
    "step_deterministic_ms": "… with deterministic gradients",
    "step_compact_moments_ms": "… with compact moments",
    "cluster_assignment_ms": "cluster, assignment to 65,536",
    "cluster_means_ms": "cluster, means",
    "gsplat_forward_ms": "gsplat: forward",
    "gsplat_step_ms": "gsplat: whole step",
    "faster_gs_forward_ms": "Faster-GS: forward",
    "faster_gs_step_ms": "Faster-GS: whole step",
    "peak_gib": "peak memory of training, without photos",
    "peak_gib_compact": "… with compact moments",
}
"""Of the table's rows, in their order."""


def key_of(kernel: str) -> str:
    words = kernel.replace("'", " vjp").replace("whole step", "step")
    return re.sub(r"\W+", "_", words).strip("_") + "_ms"


def row_of(run: dict[str, Any]) -> dict[str, float]:
    """The medians of a cloud in milliseconds, and its memory in GiB."""
    row: dict[str, float] = {"n": run["n"]}
    for measured in run["rows"]:
        kernel, time = measured["kernel"], measured["milliseconds"]
        if images := IMAGES.fullmatch(kernel):
            row["forward_ms"] = round(time / int(images[1]), 4)
        else:
            row[key_of(kernel)] = round(time, 3)
    memory = run["training_gib"]
    return row | {"peak_gib": round(memory["full"], 2), "peak_gib_compact": round(memory["compact"], 2)}


def collect(paths: list[Path]) -> None:
    runs = [json.loads(path.read_text()) for path in paths]
    head = {(run["gpu"], run["driver"], run["commit"]) for run in runs}
    if len(head) != 1:
        sys.exit(f"runs of different machines or commits: {sorted(head)}")
    device, driver, commit = head.pop()
    rows = sorted(map(row_of, runs), key=lambda row: row["n"])
    figures = {"device": device, "driver": driver, "commit": commit, "rows": rows}
    figures["faster_gs"] = json.loads(RESULTS.read_text())["faster_gs"]  # its runs need builds of their own
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


def table() -> str:
    figures = json.loads(RESULTS.read_text())
    rows = [peer | own for own, peer in zip(figures["rows"], figures["faster_gs"]["rows"], strict=True)]
    lines = ["| Gaussians | " + " | ".join(f"{row['n']:,}" for row in rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for key, label in LABELS.items():
        digits = 0 if rows[0][key] > 10 else 2
        mark = "**" if label.startswith("**") else ""
        unit = "GiB" if "gib" in key else "ms"
        cells = [f"{mark}{row[key]:.{digits}f} {unit}{mark}" for row in rows]
        lines.append(" | ".join(["| " + label, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect([Path(argument) for argument in sys.argv[1:]])
    print(table())
