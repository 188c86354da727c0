"""The main job on whole captures: time of every stage, quality on held-out views, size of what is published.

Captures are a synthetic one, made here, and the real ones in the folder that SPACEPORT_DATA names (../shared/data). Quality
after compression is that of the SOG file; sizes compare it with the same rows as PLY.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from spaceport_gs.pipeline.run import RunSettings, reconstruct
from spaceport_gs.pipeline.synthesize import synthesize
from spaceport_gs.pipeline.workspace import Existing, open_workspace
from spaceport_gs.progress import ignore

DATA = Path(os.environ.get("SPACEPORT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@dataclass(frozen=True)
class Capture:
    name: str
    photos: Path
    downscale: float = 1


def captures(folder: Path) -> list[Capture]:
    """The synthetic capture, made in `folder`, and the real ones that are at hand."""
    synthesize(folder / "synthetic")
    real = [
        Capture("fox, 1/4 resolution", DATA / "fox", 4),
        Capture("brighton_beach", DATA / "brighton_beach"),
    ]
    return [Capture("synthetic", folder / "synthetic" / "photos"), *(c for c in real if c.photos.is_dir())]


def run(capture: Capture, out: Path) -> dict[str, Any]:
    """The report of the main job with default settings."""
    settings = RunSettings(downscale=capture.downscale)
    with open_workspace(out, capture.photos, Existing.REFUSE, {}) as workspace:
        return reconstruct(capture.photos, workspace, settings, ignore)


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--only", help="name of the one capture to run")
    options = parser.parse_args()
    print(f"{machine.name()}, {machine.n_cores()} cores, commit {machine.commit()}")
    print(
        f"{'capture':22}{'photos':>10}{'SfM':>8}{'train':>8}{'steps':>8}{'Gaussians':>11}{'PSNR':>8}{'SSIM':>7}"
        f"{'compress':>10}{'SOG':>9}{'ratio':>7}{'PSNR of SOG':>13}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, capture in enumerate(captures(Path(temporary))):
            if options.only not in (None, capture.name):
                continue
            report = run(capture, Path(temporary) / str(i))
            seconds = {name: stage["seconds"] for name, stage in report["stages"].items()}
            ratio = report["ply_bytes"] / report["sog_bytes"]
            placed = f"{report['registered']} of {report['photos']}"
            print(
                f"{capture.name:22}{placed:>10}{seconds['sfm']:7.0f}s{report['training_seconds']:7.0f}s{report['steps']:8,}"
                f"{report['gaussians']:11,}{report['psnr']:8.2f}{report['ssim']:7.3f}{seconds['compress']:9.1f}s"
                f"{report['sog_bytes'] / 1e6:6.2f} MB{ratio:6.1f}×{report['psnr_after_compression']:13.2f}",
                flush=True,
            )
            rows.append({"capture": capture.name, **report})
    machine.write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
