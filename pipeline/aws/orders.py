"""What a user orders: a scene of these photos, made so, on these machines, for so much money at most."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.cost import Capture, Estimate, StageEstimate, cheapest, estimate, fitted, within
from spaceport_gs.pipeline.aws.drills import Drill
from spaceport_gs.pipeline.aws.flow import Scene, spot_of
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
from spaceport_gs.pipeline.aws.prices import Prices
from spaceport_gs.pipeline.batch import captures_in
from spaceport_gs.pipeline.capture import MIN_PHOTOS, list_photos
from spaceport_gs.pipeline.run import RunSettings, check, megapixels_of

CHEAPEST = "auto"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
SPARE = 2.0  # times the longest that a stage is estimated to take, its job is given
MOST_SECONDS = 5 * 24 * 3600  # what accounts allow a job unless they asked for more


@dataclass(frozen=True)
class Order:
    settings: RunSettings = field(default_factory=RunSettings)
    instances: Mapping[str, str] = field(default_factory=dict)
    """By stage, where it is not the default one."""
    is_cheapest: bool = False
    """Chooses the instances by price."""
    is_spot: bool = False
    """Trains on spot instances at first."""
    most_usd: float = math.inf
    deadline_seconds: float = math.inf
    """For the cheapest instances: all is to be done in this time."""
    drills: Mapping[str, Drill] = field(default_factory=dict)
    """By stage: what is to go wrong."""

    def __post_init__(self) -> None:
        check(replace(self.settings, device="cpu"))  # what is here does not matter there
        if self.settings.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {self.settings.device}: choose auto, cpu or cuda")

    def estimated(self, capture: Capture, prices: Prices) -> Estimate:
        """Of what is ordered, with limits of time on its machines. InputError if it may cost too much."""
        usual = {stage: machine.instance for stage, machine in DEFAULT_MACHINES.items()}
        if self.settings.device == "cpu":
            usual["train"] = usual["sfm"]
        wanted = {
            stage: replace(machine, instance=self.instances.get(stage, usual[stage]))
            for stage, machine in DEFAULT_MACHINES.items()
        }
        if self.is_spot:
            wanted["train"] = spot_of(wanted["train"])
        if self.is_cheapest:
            wanted = cheapest(capture, self.settings, prices, self.deadline_seconds, wanted)
        else:
            wanted = fitted(capture, self.settings, wanted)
        estimated = estimate(capture, self.settings, wanted, prices)
        limits = {name: _longest(stage) for name, stage in estimated.stages.items()}
        if self.most_usd < math.inf:
            paid = within(self.most_usd, estimated).stages
            limits = {name: min(limit, paid[name].machine.max_seconds) for name, limit in limits.items()}
        stages = {
            name: replace(stage, machine=replace(stage.machine, max_seconds=limits[name]))
            for name, stage in estimated.stages.items()
        }
        return replace(estimated, stages=stages)

    def scene(self, estimated: Estimate, images: Mapping[str, str]) -> Scene:
        """What the flow is given; its id comes with the photos."""
        machines = estimated.machines
        spot = machines["train"] if self.is_spot else None
        machines["train"] = replace(machines["train"], is_spot=False)
        return Scene("", images, self.given, machines, spot, self.drills)

    @property
    def given(self) -> dict[str, Any]:
        """Settings that are not the default ones."""
        usual = asdict(RunSettings())
        return {name: value for name, value in asdict(self.settings).items() if value != usual[name]}


def _longest(stage: StageEstimate) -> int:
    """Seconds after which its job is ended."""
    return min(max(stage.machine.max_seconds, math.ceil(SPARE * stage.seconds.high)), MOST_SECONDS)


def changed(settings: RunSettings, given: Mapping[str, Any]) -> RunSettings:
    """With some of them as they are given, by name; InputError if there is no such setting, or its value is no such."""
    for name, value in given.items():
        usual = getattr(settings, name, None)
        wanted = (int, float) if isinstance(usual, float) else type(usual)
        if usual is None or isinstance(value, bool) or not isinstance(value, wanted):
            raise InputError(f"setting {name}: {value!r} is none; there are {', '.join(asdict(settings))}")
    return replace(settings, **given)


def instances_of(choices: Sequence[str]) -> tuple[dict[str, str], bool]:
    """(by stage, whether the rest is chosen by price) of words such as `train=ml.g5.2xlarge` and `auto`."""
    named: dict[str, str] = {}
    for choice in choices:
        stage, equals, instance = choice.partition("=")
        if choice != CHEAPEST and (not equals or stage not in STAGES or not instance):
            raise InputError(f"--instance {choice}: give {CHEAPEST}, or STAGE=TYPE such as train=ml.g5.2xlarge")
        if equals:
            named[stage] = instance
    if named and CHEAPEST in choices:
        raise InputError(f"--instance {CHEAPEST} chooses for every stage; leave the other ones out")
    return named, CHEAPEST in choices


def capture_in(folder: Path) -> Capture:
    """InputError if that is no folder with enough photos."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of photos, or a .zip of one")
    files = list_photos(folder)
    if len(files) < MIN_PHOTOS:
        raise InputError(f"{folder}: {len(files)} photos; at least {MIN_PHOTOS} are needed")
    return Capture(len(files), megapixels_of(files))


def captures_of(manifest: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """(folder of photos, settings that differ from the others') by name: of a JSON file, or of a folder of captures.

    The file holds a list of {"name": …, "photos": …, "settings": {…}}; paths are relative to it, settings may be left out.
    """
    if manifest.is_dir():
        return {name: (path, {}) for name, path in captures_in(manifest).items()}
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f'{manifest}: expected JSON, a list of {{"name": …, "photos": …}}') from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{manifest}: expected a list of {{"name": …, "photos": …}} with at least one')
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not {"name", "photos"} <= set(entry) <= {"name", "photos", "settings"}:
            raise InputError(f"{manifest}: entry {number}: expected name, photos and perhaps settings")
        name, photos, settings = entry["name"], entry["photos"], entry.get("settings", {})
        if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(photos, str):
            raise InputError(
                f"{manifest}: entry {number}: a name has letters, digits, '.', '-' and '_'; photos is a path"
            )
        if name in found:
            raise InputError(f"{manifest}: the name {name} stands in it twice; each capture needs its own")
        if not isinstance(settings, dict):
            raise InputError(f'{manifest}: {name}: expected settings as {{"steps": 7000}}')
        found[name] = (manifest.parent / photos, settings)
    return found
