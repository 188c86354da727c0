"""What each CUDA kernel reads, writes and issues, against what the GPU can do, and what that comes to on smaller GPUs.

    roofline.py --json FILE                          counts with Nsight Compute, on this machine's GPU
    roofline.py --counted FILE [--engine EXTENSION]  prints the tables of what was counted, with the registers of a build

One image of the recorded renderer and one recorded training step of each random cloud of kernels.py, whose kernels ncu
runs one by one with cold caches. The ceilings are measured, too: a copy, and multiply-adds on registers.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import kernels
import machine
import numpy as np

METRICS: dict[str, tuple[float, list[str]]] = {  # a factor, and what is added up
    "microseconds": (1e-3, ["gpu__time_duration.sum"]),
    "megabytes": (1e-6, ["dram__bytes_read.sum", "dram__bytes_write.sum"]),
    "l2_megabytes": (1e-6, ["lts__t_bytes.sum"]),
    "million_instructions": (1e-6, ["smsp__inst_executed.sum"]),
    "threads": (1, ["launch__block_size"]),
    "dynamic_shared": (1, ["launch__shared_mem_per_block_dynamic"]),
}
WARM_UP = 48
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Counted:
    """A kernel of an image or a step: sums over its launches, and how it was launched. Instructions are warps'."""

    kernel: str
    launches: int
    microseconds: float
    megabytes: float
    """To and from the GPU's memory."""
    l2_megabytes: float
    """To and from the second-level cache."""
    million_instructions: float
    threads: int
    dynamic_shared: int


@dataclass(frozen=True)
class Ceilings:
    """What a GPU does at best: bytes a second, and instructions of warps a second."""

    bytes: float
    instructions: float


@dataclass(frozen=True)
class Gpu:
    """Of a data sheet, and of the programming guide's table of compute capabilities."""

    name: str
    architecture: str
    ceilings: Ceilings
    warps: int
    """Of a multiprocessor, as the two below."""
    shared: int
    blocks: int


SMALLER = (
    Gpu("A10G", "sm_86", Ceilings(600e9, 72 * 4 * 1.71e9), 48, 100 << 10, 16),
    Gpu("T4", "sm_75", Ceilings(320e9, 40 * 4 * 1.59e9), 32, 64 << 10, 16),
)
REGISTERS = 1 << 16  # of a multiprocessor
RESERVED_SHARED = {"sm_86": 1 << 10, "sm_75": 0}  # of every block


def work(what: str, cloud: kernels.Cloud) -> Callable[[int], object]:
    """What to count, for the number of a view: it has run often enough to have its sizes."""
    import torch

    from spaceport_gs import ops
    from spaceport_gs.render import Renderer
    from spaceport_gs.step import StepView, TrainingStep, UpdateRule
    from spaceport_gs.types import RasterSettings, Statistics

    gaussians = kernels.random_cloud(cloud, "cuda")
    views = [kernels.camera(cloud, i) for i in range(kernels.N_VIEWS)]
    if what == "image":
        renderer = Renderer(gaussians)
        return lambda i: renderer.render([views[i % kernels.N_VIEWS]])
    photo, moments = kernels.photo_for(cloud, "cuda"), ops.AdamMoments.zeros(gaussians, ops.MomentStorage.FULL)
    step = TrainingStep(gaussians, moments, Statistics.empty(cloud.n, "cuda"), UpdateRule.CONTRIBUTING)
    step.uses_depth_limits = False  # ncu does not look into graphs with conditions
    seen = [StepView(view, photo, RasterSettings(), ops.LossSettings()) for view in views]

    def run(i: int) -> None:
        step.run(seen[i % kernels.N_VIEWS], ops.AdamSettings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step=i + 1))
        torch.cuda.synchronize()

    return run


def run_for_ncu(what: str, cloud: kernels.Cloud) -> None:
    """Called by ncu: it looks at what comes after the warm-up."""
    import torch

    run = work(what, cloud)
    for i in range(WARM_UP):
        run(i)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run(WARM_UP)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def counted(what: str, cloud: str) -> list[Counted]:
    """Runs this program under ncu."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--metrics"]
    command.append(",".join(name for _, names in METRICS.values() for name in names))
    command += [sys.executable, *(["-P"] if sys.flags.safe_path else []), __file__, "--work", what, "--clouds", cloud]
    done = subprocess.run(command, capture_output=True, text=True)
    start = done.stdout.find('"ID"')
    if done.returncode != 0 or start < 0:
        sys.exit(f"ncu: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return summed(done.stdout[start:])


def summed(table: str) -> list[Counted]:
    """The kernels of a raw page of ncu, whose second line names the units, by time."""
    launches: dict[str, list[dict[str, float]]] = {}
    for row in list(csv.DictReader(io.StringIO(table)))[1:]:
        values = {
            key: factor * sum(float(row[name].replace(",", "")) for name in names)
            for key, (factor, names) in METRICS.items()
        }
        launches.setdefault(short(row["Kernel Name"]), []).append(values)

    def total(key: str, of: list[dict[str, float]]) -> float:
        return sum(values[key] for values in of)

    rows = [
        Counted(
            name,
            len(of),
            total("microseconds", of),
            total("megabytes", of),
            total("l2_megabytes", of),
            total("million_instructions", of),
            int(of[0]["threads"]),
            int(of[0]["dynamic_shared"]),
        )
        for name, of in launches.items()
    ]
    return sorted(rows, key=lambda row: -row.microseconds)


def short(name: str) -> str:
    """A kernel's name and template arguments, as ncu and c++filt print them, without namespaces and parameters."""
    for text in ("void ", "spaceport::", "cuda::", "<unnamed>::", "unnamed>::", "(anonymous namespace)::"):
        name = name.replace(text, "")
    name = re.sub(r"\((int|bool)\)", "", name).replace("true", "1").replace("false", "0")
    return re.sub(r"\(.*", "", name).replace("> >", ">>").strip()


def measured_ceilings() -> Ceilings:
    import torch

    from spaceport_gs import _engine, ops

    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    to, backend, pieces = torch.empty_like(source), ops.backend_of(source), 1 << 14

    def seconds(run: Callable[[], object]) -> float:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
        for mark in marks:
            mark.record()
            run()
        torch.cuda.synchronize()
        return float(np.median([a.elapsed_time(b) for a, b in pairwise(marks[2:])])) / 1e3

    copy = seconds(lambda: to.copy_(source))
    adds = seconds(lambda: _engine.multiply_adds(backend, pieces))
    return Ceilings(2 * COPY_BYTES / copy, pieces * _engine.MULTIPLY_ADD_FLOPS / (2 * 32) / adds)


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int
    """Bytes of a thread's stack."""
    shared: int
    """Bytes of a block that are known when compiling."""


def resources(engine: Path, architecture: str) -> dict[str, Resources]:
    """Of the kernels in a built extension, by their short names."""
    command = ["cuobjdump", "--dump-resource-usage", "-arch", architecture, str(engine)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = subprocess.run(
        ["c++filt"], input=listed.replace("Function ", ""), capture_output=True, text=True, check=True
    )
    found, name = {}, ""
    for line in plain.stdout.splitlines():
        usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line))
        if usage:
            found[short(name)] = Resources(int(usage["REG"]), int(usage["STACK"]), int(usage["SHARED"]))
        elif line.rstrip().endswith(":"):
            name = line.strip().rstrip(":")
    return found


def occupancy(gpu: Gpu, row: Counted, of: Resources) -> float:
    """The share of a multiprocessor's warps that can run at once."""
    warps = (row.threads + 31) // 32
    by_registers = REGISTERS // (warps * 32 * ((of.registers + 7) // 8 * 8))
    shared = of.shared + row.dynamic_shared + RESERVED_SHARED[gpu.architecture]
    by_shared = gpu.shared // shared if shared > 0 else gpu.blocks
    return min(by_registers, by_shared, gpu.warps // warps, gpu.blocks) * warps / gpu.warps


def floor(row: Counted, ceilings: Ceilings, megabytes: float) -> float:
    """Microseconds that a kernel takes at least."""
    return 1e6 * max(megabytes * 1e6 / ceilings.bytes, row.million_instructions * 1e6 / ceilings.instructions)


def predicted(row: Counted, here: Ceilings, there: Ceilings, megabytes: float) -> float:
    """Microseconds on another GPU: its floor, and what a kernel waits beside its floor here, longer as there are fewer
    schedulers to wait on. `megabytes`: what its memory moves; caches are smaller there, so at most what this one's
    second-level cache moved."""
    waiting = max(row.microseconds - floor(row, here, row.megabytes), 0.0)
    return floor(row, there, megabytes) + waiting * here.instructions / there.instructions


def bound(row: Counted, ceilings: Ceilings) -> str:
    memory = row.megabytes / row.microseconds * 1e12 / ceilings.bytes
    issue = row.million_instructions / row.microseconds * 1e12 / ceilings.instructions
    name = "memory" if memory > issue else "instructions"
    return name if max(memory, issue) > 0.6 else f"waiting, then {name}"


def tables(figures: dict[str, Any], engine: Path | None) -> Iterator[str]:
    """Lines of Markdown."""
    here = Ceilings(**figures["ceilings"])
    yield f"{figures['gpu']}, commit {figures['commit']}: a copy moves {here.bytes / 1e12:.2f} TB/s, multiply-adds are"
    yield f"issued at {here.instructions / 1e12:.2f} T warp instructions/s.\n"
    for of in figures["counted"]:
        rows = [Counted(**row) for row in of["kernels"]]
        yield f"### {of['what']}, {of['cloud']}\n"
        yield "| kernel | µs | MB | TB/s (of copy) | M instructions | T/s (of peak) | bound by | A10G µs | T4 µs |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in rows:
            moved, issued = row.megabytes / row.microseconds, row.million_instructions / row.microseconds
            there = [predicted(row, here, gpu.ceilings, row.megabytes) for gpu in SMALLER]
            yield (
                f"| {row.kernel}{f' ×{row.launches}' if row.launches > 1 else ''} "
                f"| {row.microseconds:.1f} | {row.megabytes:.1f} "
                f"| {moved:.2f} ({moved * 1e12 / here.bytes:.0%}) | {row.million_instructions:.1f} "
                f"| {issued:.2f} ({issued * 1e12 / here.instructions:.0%}) | {bound(row, here)} "
                f"| {there[0]:.0f} | {there[1]:.0f} |"
            )
        sums = [sum(predicted(row, here, gpu.ceilings, row.megabytes) for row in rows) / 1e3 for gpu in SMALLER]
        worst = [sum(predicted(row, here, gpu.ceilings, row.l2_megabytes) for row in rows) / 1e3 for gpu in SMALLER]
        yield (
            f"| **sum** | {sum(row.microseconds for row in rows):.0f} | | | | | "
            + "".join(f"| **{likely:.1f} ms** to {most:.1f} " for likely, most in zip(sums, worst, strict=True))
            + "|"
        )
        yield ""
    if engine is not None:
        yield from register_table(figures, engine)


def register_table(figures: dict[str, Any], engine: Path) -> Iterator[str]:
    yield "### Registers, spilled bytes and occupancy\n"
    yield "| kernel | " + " | ".join(f"{gpu.name} ({gpu.architecture})" for gpu in SMALLER) + " |"
    yield "|---|" + "---|" * len(SMALLER)
    used = {gpu: resources(engine, gpu.architecture) for gpu in SMALLER}
    all_rows = (Counted(**row) for of in figures["counted"] for row in of["kernels"])
    for name, row in {row.kernel: row for row in all_rows}.items():
        if not all(name in of for of in used.values()):
            continue  # a library's
        cells = [
            f"{of[name].registers}{f', {of[name].spilled} bytes spilled' if of[name].spilled else ''}, "
            f"{occupancy(gpu, row, of[name]):.0%}"
            for gpu, of in used.items()
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--clouds", nargs="+", default=["250k", "1M", "3M"], choices=list(kernels.CLOUDS))
    parser.add_argument("--counted", type=Path, help="a file that --json wrote: nothing is run")
    parser.add_argument("--engine", type=Path, help="the built extension, for its registers on the smaller GPUs")
    parser.add_argument("--work", choices=["image", "step"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        run_for_ncu(options.work, kernels.CLOUDS[options.clouds[0]])
        return
    if options.counted:
        figures = json.loads(options.counted.read_text())
    else:
        import torch

        pages = [
            {"what": what, "cloud": cloud, "kernels": [asdict(row) for row in counted(what, cloud)]}
            for cloud in options.clouds
            for what in ("image", "step")
        ]
        gpu, ceilings = torch.cuda.get_device_name(), asdict(measured_ceilings())
        figures = {"gpu": gpu, "ceilings": ceilings, "counted": pages, "commit": machine.commit()}
        machine.write_json(options.json, figures)
    print("\n".join(tables(figures, options.engine)))


if __name__ == "__main__":
    main()
