"""The state of a training run, and the file that it survives in."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from spaceport_gs.errors import InputError
from spaceport_gs.exposure import Exposure
from spaceport_gs.files import replacing
from spaceport_gs.gaussians import Gaussians, Rows
from spaceport_gs.types import Statistics

FORMAT = "spaceport-gs checkpoint 1"
N_KEPT = 2
EXPOSURES = ("exposures", "best_exposures")


@dataclass(frozen=True)
class Check:
    """One line of the history of a run."""

    step: int
    moment: float
    """On the recipe's scale."""
    seconds: float
    loss: float
    """Mean over the steps since the last check."""
    psnr_probes: float | None
    """Mean over the probe views; None without probes, or once they are trained on."""
    psnr_held_out: float | None
    """For the record: no decision reads it."""
    gaussians: int


@dataclass(frozen=True)
class Phase:
    """Where a run stands: `main`, then with a plateau rule `cool` (down) and `finish`, and at last `done`."""

    name: str = "main"
    moment: float = 0.0
    """When the phase began."""
    step: int = 0
    """Step after which the phase began."""
    reason: str = ""
    """Why the phase before it ended."""


@dataclass
class State:
    """Everything that the rest of a run depends on."""

    rows: Rows  # companions: Adam's first and second moments
    statistics: Statistics
    best: Rows | None = None  # snapshot with the best probes of the main phase
    step: int = 0
    moment: float = 0.0
    seconds: float = 0.0
    loss_sum: float = 0.0
    """Of the steps since the last check."""
    phase: Phase = Phase()
    history: list[Check] = field(default_factory=list)
    exposures: Exposure | None = None
    """Of the training views, in the order of their names; None where they are not trained."""
    best_exposures: Exposure | None = None
    """Those of `best`."""


def save(folder: Path, state: State, fingerprint: str) -> Path:
    """Writes `state` to `folder`/step_<step>.npz; removes all older checkpoints but one, and what a killed run left of one."""
    arrays = {f"{n}/{field.name}": a for n, g in _gaussians(state) for field, a in _named(g)}
    arrays["gradient_sums"] = state.statistics.gradient_sums.cpu().numpy()
    arrays["n_visible"] = state.statistics.n_visible.cpu().numpy()
    for name in EXPOSURES:
        exposures: Exposure | None = getattr(state, name)
        if exposures is not None:
            arrays.update({f"{name}/{field}": tensor.cpu().numpy() for field, tensor in vars(exposures).items()})
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "phase": asdict(state.phase),
        "history": [asdict(check) for check in state.history],
        **{name: getattr(state, name) for name in ("step", "moment", "seconds", "loss_sum")},
    }
    text = json.dumps(metadata, allow_nan=False).encode()
    arrays["metadata"] = np.frombuffer(text, dtype=np.uint8)
    path = folder / f"step_{state.step:08d}.npz"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    for old in (*files(folder)[:-N_KEPT], *folder.glob(".step_*.partial")):
        old.unlink(missing_ok=True)
    return path


def files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step_*.npz"))


def load(path: Path, fingerprint: str, device: str) -> State:
    """The state in `path`; InputError where it is damaged or belongs to a run with another fingerprint."""
    try:
        arrays = _read_arrays(path)
        metadata = json.loads(arrays.pop("metadata").tobytes())
        if metadata["format"] != FORMAT:
            raise ValueError(f"format is {metadata['format']!r}, not {FORMAT!r}")
        differs = metadata["fingerprint"] != fingerprint
        state = None if differs else _state(arrays, metadata, device)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a usable checkpoint ({error}); delete it, or start again with --overwrite"
        ) from error
    if state is None:
        raise InputError(
            f"{path}: checkpoint of a run with other settings or photos; give those of that run,"
            " or start again with --overwrite"
        )
    return state


def _gaussians(state: State) -> list[tuple[str, Gaussians]]:
    named = [("rows", state.rows)] + ([("best", state.best)] if state.best is not None else [])
    return [
        (f"{name}/{i}", gaussians)
        for name, rows in named
        for i, gaussians in enumerate((rows.values, *rows.companions))
    ]


def _named(gaussians: Gaussians) -> list[tuple[Any, np.ndarray]]:
    return list(zip(fields(Gaussians), gaussians.numpy().arrays(), strict=True))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file; none is allocated before the file is known to be long enough for it."""
    n_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > n_bytes:
                raise ValueError(f"member {member.filename} is longer than the file")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"member {member.filename} has array format {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"member {member.filename} promises more than it holds")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _state(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], device: str) -> State:
    import torch

    rows = _rows(arrays, "rows", device)
    n_gaussians = len(rows.values)
    counts = [_floats(arrays, name, (n_gaussians,)) for name in ("gradient_sums", "n_visible")]
    return State(
        rows=rows,
        statistics=Statistics(*(torch.as_tensor(c.copy(), device=device) for c in counts)),
        best=_rows(arrays, "best", device) if "best/0/means" in arrays else None,
        step=int(metadata["step"]),
        moment=float(metadata["moment"]),
        seconds=float(metadata["seconds"]),
        loss_sum=float(metadata["loss_sum"]),
        phase=Phase(**metadata["phase"]),
        history=[Check(**check) for check in metadata["history"]],
        **{name: _exposures(arrays, name, device) for name in EXPOSURES},
    )


def _exposures(arrays: Mapping[str, np.ndarray], name: str, device: str) -> Exposure | None:
    import torch

    if f"{name}/values" not in arrays:
        return None
    n_views = len(arrays[f"{name}/values"])
    shapes = {"values": (n_views, 3, 4), "first": (n_views, 3, 4), "second": (n_views, 3, 4), "n_steps": (n_views,)}
    tables = {f: _floats(arrays, f"{name}/{f}", shape) for f, shape in shapes.items()}
    return Exposure(**{f: torch.as_tensor(table.copy(), device=device) for f, table in tables.items()})


def _rows(arrays: Mapping[str, np.ndarray], name: str, device: str) -> Rows:
    n_gaussians, n_coefficients = arrays[f"{name}/0/sh"].shape[:2]
    if n_coefficients not in (1, 4, 9, 16):
        raise ValueError(f"{name}/0/sh holds {n_coefficients} coefficients")
    shapes = Gaussians(
        means=(n_gaussians, 3),
        log_scales=(n_gaussians, 3),
        quaternions=(n_gaussians, 4),
        opacities=(n_gaussians,),
        sh=(n_gaussians, n_coefficients, 3),
    )
    tables = [
        Gaussians(*(_floats(arrays, f"{name}/{i}/{f.name}", getattr(s, f.name)) for f in fields(Gaussians)))
        for i, s in enumerate((shapes, *_shapes_of_moments(shapes, arrays[f"{name}/1/sh"])))
    ]
    values, *companions = (table.torch(device) for table in tables)
    return Rows(values, tuple(companions))


def _shapes_of_moments(values: Gaussians, first_sh: np.ndarray) -> tuple[Gaussians, Gaussians]:
    """In the storage that this table of the first moment has; see ops.AdamMoments."""
    if first_sh.dtype != np.int32:
        return values, values
    return values, replace(values, sh=(values.sh[0], 1, 3))


def _floats(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = arrays[name]
    is_words = name.endswith("/1/sh") and array.dtype == np.int32  # of compact moments
    if (array.dtype != np.float32 and not is_words) or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not float32{list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def copied(rows: Rows) -> Rows:
    """The rows in memory of their own: training updates its rows in place."""
    return replace(
        rows,
        values=rows.values.map(lambda array: array.clone()),
        companions=tuple(c.map(lambda array: array.clone()) for c in rows.companions),
    )
