"""What a scene costs: estimated before, held down while it is made, added up after; and what the stack costs when nothing runs.

What the estimates are made from, and where that was measured:

- SfM: `run.Cost`, on two cores of an AMD EPYC; from a third of that (small photos) to three times as much (many cores that wait).
- training: steps on one H200, the fox capture and the random clouds of benchmarks/results. Of other GPUs their
  multiprocessors and bandwidth, by the data sheets, say how many times slower they are at least and at most.
- compression: `compress` of 40,000 to 1,000,000 Gaussians on two busy cores of an Intel Xeon, clustering and the rest apart:
  26 seconds of a core for 40,000, of which the rest were 6, and 183 and 23 for 100,000. Those of 160,000 and more went over
  all Gaussians once, not nine times. On one H200 clustering took 1.9 to 2.0 times what its multiplications would at the peak
  of the data sheet: 0.64, 1.5 and 4.5 seconds for 400,000, 1,000,000 and 3,000,000 random Gaussians. Smaller GPUs, which
  nobody has timed, do not hold the clock of their data sheets. The rest was there, on 16 cores, between four tenths of the
  estimate and a tenth more than it.
- memory: `run.Cost`, whose bytes a pixel are those that views hold, and the peak memory of the clouds; that of SfM is worked
  out from the pyramids of SIFT, not measured.
- what a job takes besides, for its image and its data: from experience with SageMaker, not measured.

Counted are the instances. Volumes, storage and requests come to some per cent of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.jobs import Machine, is_on_gpu
from spaceport_gs.pipeline.aws.prices import Gpu, Instance, Prices, gpus, instances, usd_per_month
from spaceport_gs.pipeline.aws.template import template
from spaceport_gs.pipeline.compress import COEFFICIENTS, MAX_PALETTE, CompressSettings
from spaceport_gs.pipeline.run import Cost, RunSettings
from spaceport_gs.pipeline.sfm import SfmSettings
from spaceport_gs.schedule import Recipe, preset

USES: Mapping[str, str] = {"sfm": "processing", "train": "training", "compress": "processing"}
MEASURED_CORES = 2  # that `Cost` and the compression were measured on


@dataclass(frozen=True)
class Range:
    """At least, likely, at most."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, factor: Range | float) -> Range:
        by = factor if isinstance(factor, Range) else Range(factor, factor, factor)
        return Range(self.low * by.low, self.likely * by.likely, self.high * by.high)


SFM_ERROR = Range(1 / 3, 1.0, 3.0)
CPU_ERROR = Range(0.5, 1.0, 2.0)
JOB_SECONDS = Range(60, 150, 300)
SPOT_SHARE = Range(0.1, 0.4, 1.0)  # of the price on demand; SageMaker's documentation promises savings up to 90 %
MEASURED_GPU = "H200"
STEP_SECONDS = 0.00015  # of a step on it, beside its pixels
STEP_SECONDS_PER_MEGAPIXEL = 0.0005
STEP_GROWTH = Range(1.0, 1.5, 2.3)  # with 250,000, 1,000,000 and 3,000,000 Gaussians
FREE_GROWTH = Range(200_000, 1_000_000, 4_000_000)  # Gaussians where nothing caps them
ENTRIES_PER_GAUSSIAN = 0.8  # of the palettes that compression tries, all together, up to MAX_PALETTE
DISTANCES_PER_CORE_SECOND = 4.5e8  # to palettes that no core's cache holds
FLOPS_PER_DISTANCE = 2 * 3 * COEFFICIENTS[3]
TIMES_PEAK = Range(1.6, 2.0, 4.0)  # that clustering takes on a GPU
ENCODE_SECONDS = 3.0  # of compression beside clustering, on one core
ENCODE_SECONDS_PER_ENTRY = 1.5e-4
ENCODE_SECONDS_PER_GAUSSIAN = 5e-6
TORCH_SECONDS = Range(30, 60, 120)  # more for the image with torch than for the compressor: not measured
PHOTO_BYTES_PER_PIXEL = 3.0  # of every photo that is trained on: once in memory, once on the GPU
GPU_BYTES_PER_GAUSSIAN = 950  # as trained, from peak memory of the clouds
GPU_BYTES_FIXED = 2e9
SFM_BYTES_PER_PIXEL = 150.0  # of the photos looked at together, one a core
SFM_BYTES_FIXED = 2e9
COMPRESS_BYTES_PER_GAUSSIAN = 2_000
COMPRESS_BYTES_FIXED = 1e9
CLUSTER_BYTES_PER_GAUSSIAN = 300  # on a GPU: colours, and what they are sorted with
MEMORY_SHARE = 0.9  # of an instance's that a job can have
VOLUME_GB = 20  # beside photos and results
MOST_VOLUME_GB = 16_384  # that SageMaker gives to a job
REMEDY = "--instance auto finds one that has it, a larger --downscale or fewer photos take less"


@dataclass(frozen=True)
class Capture:
    """What is to become a scene."""

    n_photos: int
    megapixels: float
    """Of one photo."""

    def __str__(self) -> str:
        return f"{self.n_photos} photos of {self.megapixels:.1f} megapixels"


@dataclass(frozen=True)
class StageEstimate:
    machine: Machine
    seconds: Range
    """That are billed."""
    usd: Range


@dataclass(frozen=True)
class Estimate:
    stages: Mapping[str, StageEstimate]
    prices: Prices
    shortages: tuple[str, ...] = ()
    """Lines on what likely does not suffice."""

    @property
    def machines(self) -> dict[str, Machine]:
        """Of each stage; a job knows from it when it is late."""
        return {
            name: replace(stage.machine, expected_seconds=math.ceil(stage.seconds.high))
            for name, stage in self.stages.items()
        }

    @property
    def usd(self) -> Range:
        return sum((stage.usd for stage in self.stages.values()), Range(0, 0, 0))

    @property
    def seconds(self) -> Range:
        return sum((stage.seconds for stage in self.stages.values()), Range(0, 0, 0))

    def __str__(self) -> str:
        lines = [f"{name:9} {_line(stage.machine, stage)}" for name, stage in self.stages.items()]
        total = f"together  {_minutes(self.seconds)}, {_dollars(self.usd)}; waiting for hardware not counted"
        warnings = [f"warning   {line}" for line in self.shortages]
        return "\n".join([*lines, total, f"prices    of {self.prices.region}, {self.prices.as_of}", *warnings])


def _line(machine: Machine, stage: StageEstimate) -> str:
    spot = ", spot" if machine.is_spot else ""
    return f"{machine.instance}{spot}: {_minutes(stage.seconds)}, {_dollars(stage.usd)}"


def _minutes(seconds: Range) -> str:
    low, likely, high = (math.ceil(value / 60) for value in (seconds.low, seconds.likely, seconds.high))
    return f"{likely} min ({low} to {high})"


def _dollars(usd: Range) -> str:
    return f"{usd.likely:.2f} $ ({usd.low:.2f} to {usd.high:.2f})"


def estimate(capture: Capture, settings: RunSettings, machines: Mapping[str, Machine], prices: Prices) -> Estimate:
    """Of the stages that `machines` names."""
    stages = {stage: _estimate(stage, capture, settings, machine, prices) for stage, machine in machines.items()}
    return Estimate(stages, prices, shortages(capture, settings, machines))


def _instance_of(machine: Machine) -> Instance:
    instance = instances().get(machine.instance)
    if instance is None:
        raise InputError(f"{machine.instance}: nothing is known of it; take {', '.join(instances())}")
    return instance


def _estimate(stage: str, capture: Capture, settings: RunSettings, machine: Machine, prices: Prices) -> StageEstimate:
    instance = _instance_of(machine)
    seconds = JOB_SECONDS + _WORK[stage](capture, settings, instance)
    hourly = prices.of(machine.instance, USES[stage])
    usd = seconds * (hourly / 3600) * (SPOT_SHARE if machine.is_spot else 1.0)
    return StageEstimate(machine, seconds, usd)


def _sfm_seconds(capture: Capture, settings: RunSettings, instance: Instance) -> Range:
    cost, n = Cost(), capture.n_photos
    work = cost.sfm_per_photo * n + cost.sfm_per_pair * min(n * (n - 1) / 2, 40 * n)
    cores = 1 if settings.sfm == "deterministic" else instance.vcpus
    return SFM_ERROR * (work * MEASURED_CORES / cores)


def _train_seconds(capture: Capture, settings: RunSettings, instance: Instance) -> Range:
    recipe, megapixels = _recipe(capture, settings), _trained_megapixels(capture, settings)
    steps = settings.steps or recipe.steps
    if is_on_gpu("train", instance, settings.device):
        step = STEP_SECONDS + STEP_SECONDS_PER_MEGAPIXEL * megapixels
        seconds = STEP_GROWTH * slower(gpus()[instance.gpu], gpus()[MEASURED_GPU]) * (steps * step)
    else:
        cost = Cost()
        step = cost.step_fixed + cost.step_per_megapixel * megapixels
        seconds = CPU_ERROR * (steps * step * MEASURED_CORES / instance.vcpus)
    most = settings.max_seconds or math.inf
    return Range(min(seconds.low, most), min(seconds.likely, most), min(seconds.high, most))


def slower(gpu: Gpu, measured: Gpu) -> Range:
    """How many times, by what bounds the kernels: instructions at least, memory at most."""
    instructions = measured.multiprocessors * measured.ghz / (gpu.multiprocessors * gpu.ghz)
    memory = measured.gb_per_second / gpu.gb_per_second
    low, high = sorted((instructions, memory))
    return Range(low, math.sqrt(low * high), high)


def _compress_seconds(capture: Capture, settings: RunSettings, instance: Instance) -> Range:
    n = _gaussians(capture, settings)
    distances, rest = (_each(work, n) for work in (_distances, _encode_seconds))
    if is_on_gpu("compress", instance, settings.device):
        clustering = TIMES_PEAK * distances * (FLOPS_PER_DISTANCE / gpus()[instance.gpu].peak_flops)
        return TORCH_SECONDS + clustering + CPU_ERROR * rest
    clustering = distances * (1 / (DISTANCES_PER_CORE_SECOND * instance.vcpus))
    return CPU_ERROR * (clustering + rest)


def _each(work: Callable[[float], float], n_gaussians: Range) -> Range:
    return Range(work(n_gaussians.low), work(n_gaussians.likely), work(n_gaussians.high))


def _entries(n_gaussians: float) -> float:
    return min(ENTRIES_PER_GAUSSIAN * n_gaussians, MAX_PALETTE)


def _distances(n_gaussians: float) -> float:
    """From every Gaussian's colours to every entry, once for each iteration and once for the labels."""
    return (CompressSettings.iterations + 1) * n_gaussians * _entries(n_gaussians)


def _encode_seconds(n_gaussians: float) -> float:
    per_entry = ENCODE_SECONDS_PER_ENTRY * _entries(n_gaussians)
    return ENCODE_SECONDS + per_entry + ENCODE_SECONDS_PER_GAUSSIAN * n_gaussians


_WORK = {"sfm": _sfm_seconds, "train": _train_seconds, "compress": _compress_seconds}


def _recipe(capture: Capture, settings: RunSettings) -> Recipe:
    held_out = math.ceil(capture.n_photos / settings.eval_every) if settings.eval_every else 0
    n_pixels = round(_trained_megapixels(capture, settings) * 1e6)
    return preset(settings.preset, max(capture.n_photos - held_out, 1), n_pixels)


def _trained_megapixels(capture: Capture, settings: RunSettings) -> float:
    return capture.megapixels / settings.downscale**2


def _gaussians(capture: Capture, settings: RunSettings) -> Range:
    cap = _recipe(capture, settings).max_gaussians
    return Range(cap / 4, cap, cap) if cap else FREE_GROWTH


# ---- Held down ---------------------------------------------------------------------------------------------------------------


def within(most_usd: float, estimated: Estimate) -> Estimate:
    """The same on machines with time limits that let the scene cost no more; InputError if it may have to.

    A training on spot instances counts twice: what ran there may have to run again on demand. What is not in it: a job that
    SageMaker itself broke off, and that the flow starts once more.
    """
    bounds = {
        name: stage.seconds.high * _hourly(name, stage, estimated.prices) / 3600 * (2 if stage.machine.is_spot else 1)
        for name, stage in estimated.stages.items()
    }
    at_most = sum(bounds.values())
    if not at_most <= most_usd:
        raise InputError(
            f"the scene likely costs {estimated.usd.likely:.2f} $, but may cost {at_most:.2f}: more than --max-cost"
            f" {most_usd:g}; fewer --steps, a larger --downscale or cheaper instances bring it down"
        )
    spare = most_usd / at_most
    stages = {
        name: replace(stage, machine=replace(stage.machine, max_seconds=math.floor(stage.seconds.high * spare)))
        for name, stage in estimated.stages.items()
    }
    return replace(estimated, stages=stages)


def _hourly(stage: str, estimated: StageEstimate, prices: Prices) -> float:
    return prices.of(estimated.machine.instance, USES[stage])


def cheapest(
    capture: Capture,
    settings: RunSettings,
    prices: Prices,
    deadline_seconds: float = math.inf,
    machines: Mapping[str, Machine] | None = None,
) -> dict[str, Machine]:
    """For every stage the instance that makes the scene cheapest, has the memory for it, and is done in time even if all takes
    as long as it may. `machines`: what else is wanted of them.
    """
    wanted = machines or {stage: Machine("") for stage in STAGES}
    offers = {
        stage: [_estimate(stage, capture, settings, offered, prices) for offered in _fitting(stage, capture, settings, machine, prices)]
        for stage, machine in wanted.items()
    }  # fmt: skip
    in_time = (
        choice
        for choice in itertools.product(*offers.values())
        if sum(stage.seconds.high for stage in choice) <= deadline_seconds
    )
    best = min(in_time, key=lambda choice: sum(stage.usd.likely for stage in choice), default=None)
    if best is None:
        fastest = sum(min(stage.seconds.high for stage in choice) for choice in offers.values())
        raise InputError(
            f"no instances are sure to be done in {deadline_seconds / 60:.0f} min: the fastest need up to"
            f" {math.ceil(fastest / 60)}; give more time, fewer --steps or a larger --downscale"
        )
    return {name: stage.machine for name, stage in zip(offers, best, strict=True)}


def _fitting(stage: str, capture: Capture, settings: RunSettings, machine: Machine, prices: Prices) -> list[Machine]:
    found = [
        _with_volume(replace(machine, instance=name), capture)
        for name, instance in instances().items()
        if _suits(stage, settings, instance)
        and name in prices.usd_per_hour[USES[stage]]
        and not _short_of(stage, capture, settings, instance)
    ]
    if not found:
        raise InputError(
            f"no instance likely has the memory and the disk for the stage {stage} with {capture}; take a larger --downscale,"
            f" or try one with --instance {stage}=TYPE"
        )
    return found


def _suits(stage: str, settings: RunSettings, instance: Instance) -> bool:
    """A GPU is paid for only where it works, and a training that may have one gets one."""
    if is_on_gpu(stage, instance, settings.device):
        return True
    return not instance.gpu and (stage != "train" or settings.device == "cpu")


def _short_of(
    stage: str, capture: Capture, settings: RunSettings, instance: Instance
) -> list[tuple[str, float, float]]:
    """(what, GB that the stage likely takes, GB that it can have) of what likely does not suffice."""
    needs = [
        ("disk", _disk_gb(capture), instance.disk_gb or MOST_VOLUME_GB),
        ("memory", host_bytes(stage, capture, settings, instance) / 1e9, MEMORY_SHARE * instance.memory_gb),
    ]
    if is_on_gpu(stage, instance, settings.device):
        there = MEMORY_SHARE * gpus()[instance.gpu].memory_gb
        needs.append(("memory of its GPU", gpu_bytes(stage, capture, settings) / 1e9, there))
    return [(what, needed, there) for what, needed, there in needs if needed > there]


def shortages(capture: Capture, settings: RunSettings, machines: Mapping[str, Machine]) -> tuple[str, ...]:
    """A line for each thing that likely does not suffice, but may all the same: it was estimated."""
    return tuple(
        f"{stage} likely takes {needed:,.0f} GB of {what}, and can have {there:,.0f} on {machine.instance}: it may fail;"
        f" {REMEDY}"
        for stage, machine in machines.items()
        for what, needed, there in _short_of(stage, capture, settings, _instance_of(machine))
    )


def fitted(capture: Capture, settings: RunSettings, machines: Mapping[str, Machine]) -> dict[str, Machine]:
    """The same machines with volumes that are large enough; InputError if that of the training cannot even hold the photos, or
    has not the GPU that is wanted.
    """
    if machine := machines.get("train"):
        _require_room(capture, settings, machine)
    return {stage: _with_volume(machine, capture) for stage, machine in machines.items()}


def _require_room(capture: Capture, settings: RunSettings, machine: Machine) -> None:
    """For the decoded photos alone: a training never takes less."""
    instance = _instance_of(machine)
    if settings.device == "cuda" and not instance.gpu:
        raise InputError(
            f"--device cuda: {machine.instance} has no GPU; take one such as ml.g5.xlarge, or --device cpu"
        )
    photos_gib = PHOTO_BYTES_PER_PIXEL * _pixels(capture) / settings.downscale**2 / 2**30
    rooms: dict[str, float] = {"memory": instance.memory_gb}
    if is_on_gpu("train", instance, settings.device):
        rooms["memory of its GPU"] = gpus()[instance.gpu].memory_gb
    for what, there in rooms.items():
        if photos_gib > there:
            raise InputError(
                f"{capture}: decoded they take {math.ceil(photos_gib):,} GB, and {machine.instance} has {there:g} GB of {what}"
                f" for the stage train; {REMEDY}"
            )


def _with_volume(machine: Machine, capture: Capture) -> Machine:
    return replace(machine, volume_gb=max(machine.volume_gb, min(_disk_gb(capture), MOST_VOLUME_GB)))


def _disk_gb(capture: Capture) -> int:
    return VOLUME_GB + math.ceil((Cost().disk_fixed + Cost().disk_per_megapixel * _pixels(capture) / 1e6) / 1e9)


def host_bytes(stage: str, capture: Capture, settings: RunSettings, instance: Instance) -> float:
    """Memory that a stage takes, likely."""
    if stage == "sfm":
        looked_at = min(capture.megapixels * 1e6, SfmSettings.max_image_size**2 * 3 / 4)
        return SFM_BYTES_FIXED + SFM_BYTES_PER_PIXEL * looked_at * instance.vcpus
    if stage == "compress":
        return COMPRESS_BYTES_FIXED + COMPRESS_BYTES_PER_GAUSSIAN * _gaussians(capture, settings).likely
    return Cost().memory(capture.n_photos, capture.megapixels, settings.downscale)


def gpu_bytes(stage: str, capture: Capture, settings: RunSettings) -> float:
    """Memory that a stage takes on a GPU, likely."""
    if stage == "compress":
        return GPU_BYTES_FIXED + CLUSTER_BYTES_PER_GAUSSIAN * _gaussians(capture, settings).likely
    photos = PHOTO_BYTES_PER_PIXEL * _pixels(capture) / settings.downscale**2
    return GPU_BYTES_FIXED + photos + GPU_BYTES_PER_GAUSSIAN * _gaussians(capture, settings).likely


def _pixels(capture: Capture) -> float:
    return capture.n_photos * capture.megapixels * 1e6


# ---- Added up ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """Of one job."""

    job: str
    instance: str
    seconds: float
    """That it ran."""
    billed_seconds: float
    usd_per_hour: float
    usd: float
    saved_usd: float
    """By running on spot instances."""


def bill_of(description: Mapping[str, Any], prices: Prices, now: datetime) -> Bill:
    """From SageMaker's description of a training or a processing job, over or not; one that has not begun costs nothing."""
    use = "training" if "TrainingJobName" in description else "processing"
    kind = use.capitalize()
    begun, ended = (description.get(f"{kind}{when}Time") for when in ("Start", "End"))
    seconds = ((ended or now) - begun).total_seconds() if begun else 0.0
    if use == "training":
        resources = description["ResourceConfig"]
        seconds = float(description.get("TrainingTimeInSeconds", seconds))
    else:
        resources = description["ProcessingResources"]["ClusterConfig"]
    billed = float(description.get("BillableTimeInSeconds", seconds))
    hourly = prices.of(resources["InstanceType"], use) * resources.get("InstanceCount", 1)
    usd, saved = billed * hourly / 3600, max(0.0, seconds - billed) * hourly / 3600
    return Bill(description[f"{kind}JobName"], resources["InstanceType"], seconds, billed, hourly, usd, saved)


# ---- When nothing runs -------------------------------------------------------------------------------------------------------


def idle_usd_per_month(parameters: Mapping[str, str]) -> dict[str, float]:
    """What a stack with these parameters costs while no scene is made, beside what lies in it, by kind."""
    monthly = usd_per_month()
    types = [resource["Type"] for resource in template()["Resources"].values()]
    return {
        "alarms": types.count("AWS::CloudWatch::Alarm") * monthly["alarm"],
        "dashboard": types.count("AWS::CloudWatch::Dashboard") * monthly["dashboard"],
        "key": monthly["key"] if parameters.get("Encryption") == "aws:kms" else 0.0,
    }


def idle_line(parameters: Mapping[str, str]) -> str:
    costs, monthly = idle_usd_per_month(parameters), usd_per_month()
    parts = ", ".join(f"{name} {usd:.2f}" for name, usd in costs.items() if usd)
    return (
        f"idle, it costs about {sum(costs.values()):.2f} $ a month ({parts}), and {monthly['gb_of_data']:g} $ for a gigabyte of"
        f" data, {monthly['gb_of_images']:g} $ for one of images"
    )
