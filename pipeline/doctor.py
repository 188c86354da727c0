"""doctor: what this installation can do on this machine, and how to get what it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any

from spaceport_gs.errors import BackendError, InputError

NEEDS: Mapping[str, tuple[str, ...]] = {
    "sfm": ("spaceport_gs.colmap",),
    "train": ("spaceport_gs.colmap", "torch"),
    "compress": ("spaceport_gs.colmap",),
}
"""Of each stage: modules that are not in every installation, or whose system libraries may be missing."""


def cuda_missing() -> str:
    """Empty if training can run on a GPU here, else why not."""
    from spaceport_gs import _engine

    if "cuda" not in _engine.build_info()["backends"]:
        return "this build has no CUDA backend"
    status = _engine.cuda_status()
    if status:
        return status
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "the installed torch has no CUDA"


def check_stage(stage: str) -> None:
    """BackendError if it cannot run in this installation, on any device."""
    if stage not in NEEDS:
        raise InputError(f"--stage {stage}: choose {', '.join(NEEDS)}")
    for module in NEEDS[stage]:
        try:
            import_module(module)
        except ImportError as error:
            raise BackendError(f"the stage {stage} cannot run here: {error}; see `spaceport doctor`") from error


def examine() -> dict[str, Any]:
    """Everything that doctor prints, as JSON values."""
    from spaceport_gs import _engine

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report: dict[str, Any] = {
        "built": dict(_engine.build_info()),
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "pycolmap": _version("pycolmap"),
        "heic": _version("pillow-heif"),
        "npm": _output("npm", "--version"),
        "gpu": _output(
            "nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"
        ),
        "cuda_missing": cuda_missing(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(".").free,
    }
    report["advice"] = advice(report)
    return report


def advice(report: dict[str, Any]) -> list[str]:
    """What is missing, and how to get it; one line each."""
    lines = []
    if report["cuda_missing"]:
        remedy = "; install nvcc, and then this package again" if "cuda" not in report["built"]["backends"] else ""
        lines.append(f"{report['cuda_missing']}: training runs on the CPU{remedy}")
    if report["npm"] is None:
        lines.append("npm not found: published pages load the viewer from a CDN; install Node.js to embed it")
    if report["heic"] is None:
        lines.append("HEIC photos cannot be read: pip install 'spaceport-gs[heic]'")
    return lines


def as_text(report: dict[str, Any]) -> str:
    built = report["built"]
    lines = [
        f"spaceport-gs {built['version']}, built with {built['compiler']}",
        f"  backends       {', '.join(built['backends'])}",
        f"  CUDA           {', '.join(built['cuda_architectures']) or 'not built'}",
        f"  CPU            {', '.join(built['simd'])}; this machine takes {built['simd_in_use']}",
        f"Python {report['python']}, torch {report['torch'] or 'missing'}",
        f"  COLMAP         pycolmap {report['pycolmap'] or 'missing: pip install pycolmap'}",
        f"  npm            {report['npm'] or 'not found'}",
        f"  GPU            {report['gpu'] or 'not found'}",
        f"  machine        {report['cores']} cores, {report['memory_bytes'] / 1e9:.0f} GB memory,"
        f" {report['disk_free_bytes'] / 1e9:.0f} GB free here",
    ]
    return "\n".join(lines + [f"- {line}" for line in report["advice"]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
