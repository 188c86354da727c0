"""The field's PLY of Gaussians: one vertex a row, every property a float, f_rest channel by channel."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement, PlyHeaderParseError, PlyParseError

from spaceport_gs.errors import InputError
from spaceport_gs.files import replacing
from spaceport_gs.gaussians import Gaussians

MAX_HEADER_BYTES = 1 << 20
BASE = ("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2")
TAIL = ("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
REQUIRED = tuple(name for name in BASE + TAIL if not name.startswith("n"))


def n_bytes(n: int, sh_degree: int) -> int:
    """Size of the rows in a PLY of `n` Gaussians, with normals, without the header."""
    return 4 * n * (len(BASE) + len(TAIL) + 3 * ((sh_degree + 1) ** 2 - 1))


def write_ply(gaussians: Gaussians, path: Path) -> None:
    """Writes binary little-endian PLY; the same Gaussians give the same bytes."""
    rows = gaussians.numpy()
    n, n_rest = len(rows), rows.sh.shape[1] - 1
    names = (*BASE, *(f"f_rest_{i}" for i in range(3 * n_rest)), *TAIL)
    table = np.empty((n, len(names)), np.float32)
    table[:, 0:3] = rows.means
    table[:, 3:6] = 0
    table[:, 6:9] = rows.sh[:, 0]
    table[:, 9 : 9 + 3 * n_rest] = rows.sh[:, 1:].transpose(0, 2, 1).reshape(n, -1)
    table[:, -8] = rows.opacities
    table[:, -7:-4] = rows.log_scales
    table[:, -4:] = rows.quaternions
    vertices = table.view([(name, "<f4") for name in names]).reshape(n)
    element = PlyElement.describe(vertices, "vertex")
    with replacing(path) as temporary:
        PlyData([element], byte_order="<").write(str(temporary))


def read_ply(path: Path) -> Gaussians:
    """Reads a PLY of Gaussians as NumPy arrays; normals may be missing, other properties are ignored.

    InputError: it is not one, it is truncated, or its rows hold what is not a number.
    """
    path = Path(path)
    _check_size(path)
    try:
        data = PlyData.read(str(path), mmap="r")
        vertex = data["vertex"]
        table = vertex.data
        names = table.dtype.names or ()
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise InputError(f"{path}: a PLY without {missing[0]}; expected one of 3D Gaussians")
        n_rest = sum(name.startswith("f_rest_") for name in names)
        if n_rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(n_rest)):
            raise InputError(f"{path}: {n_rest} f_rest properties; expected 0, 9, 24 or 45")

        def columns(*wanted: str) -> np.ndarray:
            return np.stack([np.asarray(table[name], np.float32) for name in wanted], axis=1)

        n = len(table)
        dc = columns("f_dc_0", "f_dc_1", "f_dc_2")
        sh = np.empty((n, n_rest // 3 + 1, 3), np.float32)
        sh[:, 0] = dc
        if n_rest:
            rest = columns(*(f"f_rest_{i}" for i in range(n_rest)))
            sh[:, 1:] = rest.reshape(n, 3, n_rest // 3).transpose(0, 2, 1)
        gaussians = Gaussians(
            means=columns("x", "y", "z"),
            log_scales=columns("scale_0", "scale_1", "scale_2"),
            quaternions=columns("rot_0", "rot_1", "rot_2", "rot_3"),
            opacities=np.array(table["opacity"], np.float32),
            sh=sh,
        )
    except InputError:
        raise
    except (PlyHeaderParseError, PlyParseError, KeyError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path}: not a PLY of Gaussians that can be read ({error})") from error
    for array in gaussians.arrays():
        broken = ~np.isfinite(array.reshape(n, -1)).all(axis=1) if n else np.zeros(0, bool)
        # An infinite opacity or scale has a meaning; a position or a colour that is none has not.
        if broken.any() and np.isnan(array.reshape(n, -1)).any():
            raise InputError(f"{path}: {int(broken.sum())} rows hold NaN; export the scene again")
    return gaussians


def _check_size(path: Path) -> None:
    """Refuses what is no PLY, and a header that promises more rows than the file holds, before any memory is taken."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER_BYTES)
    end = head.find(b"end_header")
    if not head.startswith(b"ply") or end < 0:
        raise InputError(f"{path}: not a PLY file")
    lines = head[:end].decode("ascii", "replace").split("\n")
    promised, in_element, row_bytes, n_rows = 0, False, 0, 0
    widths = {"char": 1, "uchar": 1, "int8": 1, "uint8": 1, "short": 2, "ushort": 2, "int16": 2, "uint16": 2,
              "double": 8, "float64": 8}  # fmt: skip
    is_ascii = any(line.startswith("format ascii") for line in lines)
    for line in (*lines, "element end 0"):
        words = line.split()
        if words[:1] == ["element"]:
            promised += n_rows * (2 * row_bytes // 4 if is_ascii else row_bytes) if in_element else 0
            try:
                in_element, row_bytes, n_rows = True, 0, int(words[2])
            except (IndexError, ValueError):
                raise InputError(f"{path}: not a PLY file (element {line!r})") from None
        elif words[:1] == ["property"]:
            if words[1:2] == ["list"]:
                raise InputError(f"{path}: a PLY with lists (a mesh?); expected one of 3D Gaussians")
            row_bytes += widths.get(words[1] if len(words) > 1 else "", 4)
    if promised > size:
        raise InputError(f"{path}: truncated: its header promises {promised:,} bytes, the file has {size:,}")
