"""doctor: what this installation can do on this machine, and how to get what it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

MIN_DRIVER_FOR_CUDA_13 = 580


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
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(".").free,
    }
    report["advice"] = advice(report)
    return report


def advice(report: dict[str, Any]) -> list[str]:
    """What is missing, and how to get it; one line each."""
    lines = []
    has_cuda = "cuda" in report["built"]["backends"]
    if report["gpu"] is None:
        lines.append("no NVIDIA GPU found: training runs on the CPU")
    elif not has_cuda:
        lines.append("a GPU is here, but this build has no CUDA backend: training runs on the CPU")
    elif _driver(report["gpu"]) < MIN_DRIVER_FOR_CUDA_13:
        lines.append(
            f"the NVIDIA driver is too old for this build: training runs on the CPU; install driver {MIN_DRIVER_FOR_CUDA_13} or newer"
        )
    if report["npm"] is None:
        lines.append("npm not found: published pages load the viewer from a CDN; install Node.js to embed it")
    if report["heic"] is None:
        lines.append("HEIC photos cannot be read: pip install 'spaceport-gs[heic]'")
    return lines


def _driver(gpu: str) -> int:
    try:
        return int(gpu.split(",")[1].strip().split(".")[0])
    except (IndexError, ValueError):
        return 0


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
