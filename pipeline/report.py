"""report.html: how a run went, for people; one file without scripts."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spaceport_gs.files import write_text

MAP_SIDE = 720  # pixels of the top view
MAP_SHARE = 0.98  # of the points lie inside it; strays would shrink the rest to a dot
CHART = (640, 220)
STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --soft: #5c6370; --paper: #fff; --card: #f4f5f7; --line: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0aa; --paper: #131417; --card: #1e2024; --line: #7aa7ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p, td, th, figcaption { color: var(--soft); } a { color: var(--line); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin-top: 1.5rem; }
.figures div { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.figures b { display: block; font-size: 1.35rem; color: var(--ink); } .figures span { color: var(--soft); font-size: .85rem; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; margin-bottom: .9rem; }
img { width: 100%; height: auto; border-radius: .3rem; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--card); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
""".strip()


@dataclass(frozen=True)
class ReportPictures:
    rows: Sequence[Sequence[bytes]]
    """JPEG files of render, photo and error, view by view."""
    centers: np.ndarray  # [V, 3] camera positions
    directions: np.ndarray  # [V, 3] where they look
    points: np.ndarray  # [P, 3]
    colors: np.ndarray  # [P, 3] uint8
    up: np.ndarray  # [3]


def write_report(report: Mapping[str, Any], pictures: ReportPictures, out: Path) -> None:
    """Writes the page for the values of report.json."""
    title = html.escape(str(report["settings"]["title"]))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: report</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>',
        f"<h1>{title}</h1><p>spaceport-gs {html.escape(str(report['version']))} on {html.escape(str(report['device']))}"
        ' · <a href="index.html">open the scene</a></p>',
        _figures(report),
        _views(report, pictures),
        _curves(report["history"]),
        "<h2>Seen from above</h2>",
        _top_view(pictures),
        _stages(report),
        _missing(report),
        "</body></html>",
    ]
    write_text(out, "\n".join(parts) + "\n")


def put_section(page: Path, name: str, content: str) -> None:
    """Adds a section, HTML, to the end of a report, or replaces the one of this name."""
    before = re.sub(rf'<section id="{name}">.*?</section>\n', "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    body, end, rest = before.rpartition("</body>")
    write_text(page, f'{body}<section id="{name}">\n{content}\n</section>\n{end}{rest}')


def _figures(report: Mapping[str, Any]) -> str:
    shown = [
        ("photos placed", f"{report['registered']} of {report['photos']}"),
        ("PSNR, held-out views", _number(report["psnr"], "{:.2f} dB")),
        ("SSIM, held-out views", _number(report["ssim"], "{:.3f}")),
        ("PSNR after compression", _number(report["psnr_after_compression"], "{:.2f} dB")),
        ("Gaussians", _number(report["gaussians"], "{:,}")),
        ("scene.ply", _number(report["ply_bytes"], "{:,.1f} MB", 1e-6)),
        ("scene.sog", _number(report["sog_bytes"], "{:,.1f} MB", 1e-6)),
        ("reprojection error", _number(report["reprojection_error_px"], "{:.2f} px")),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown)
    return f'<section class="figures">{cells}</section>'


def _number(value: Any, form: str, factor: float = 1) -> str:
    return "–" if value is None else form.format(value * factor if factor != 1 else value)


def _views(report: Mapping[str, Any], pictures: ReportPictures) -> str:
    if not pictures.rows:
        return ""
    kind = "Held-out views" if report["psnr"] is not None else "Training views"
    rows = "".join(
        '<div class="triple">'
        + "".join(
            f'<img loading="lazy" alt="{name} of view {i + 1}" src="{_jpeg(data)}">'
            for name, data in zip(("render", "photo", "error"), row, strict=True)
        )
        + "</div>"
        for i, row in enumerate(pictures.rows)
    )
    return f"<h2>{kind}: render | photo | error</h2>{rows}"


def _jpeg(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    if len(history) < 2:
        return ""
    steps = [check["step"] for check in history]
    psnr = {
        "held-out views": [check["psnr_held_out"] for check in history],
        "probe views": [check["psnr_probes"] for check in history],
    }
    loss = {"loss": [check["loss"] for check in history]}
    return (
        '<h2>Training</h2><div class="pair">'
        f"<figure>{_chart(steps, psnr)}<figcaption>PSNR in dB by step</figcaption></figure>"
        f"<figure>{_chart(steps, loss)}<figcaption>Loss by step</figcaption></figure></div>"
    )


def _chart(steps: Sequence[float], curves: Mapping[str, Sequence[float | None]]) -> str:
    """An SVG of one or two curves over the steps; the second is dashed."""
    width, height = CHART
    left, bottom, top = 44, 24, 12
    values = [v for curve in curves.values() for v in curve if v is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def x(step: float) -> float:
        return left + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (width - left - 8)

    def y(value: float) -> float:
        return height - bottom - (value - low) / span * (height - bottom - top)

    drawn = []
    for i, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, curve, strict=True) if v is not None)
        if points:
            dash = ' stroke-dasharray="5 4"' if i else ""
            drawn.append(
                f'<polyline fill="none" stroke="var(--line)" stroke-width="2"{dash} points="{points}"><title>{name}</title></polyline>'
            )
            if len(curves) > 1:
                line = f'<line x1="{left + 12 + 150 * i}" x2="{left + 36 + 150 * i}" y1="14" y2="14" stroke="var(--line)" stroke-width="2"{dash}/>'
                drawn.append(f'{line}<text x="{left + 42 + 150 * i}" y="18">{name}</text>')
    marks = "".join(f'<text x="0" y="{y(value) + 4:.1f}">{value:.4g}</text>' for value in (low, (low + high) / 2, high))
    ends = f'<text x="{left}" y="{height - 4}">{steps[0]:,}</text><text x="{width - 8}" y="{height - 4}" text-anchor="end">{steps[-1]:,}</text>'
    names = html.escape(", ".join(curves))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{names} by training step">{"".join(drawn)}{marks}{ends}</svg>'


def _top_view(pictures: ReportPictures) -> str:
    """Points as an image, cameras as wedges over it."""
    up = pictures.up / max(float(np.linalg.norm(pictures.up)), 1e-9)
    helper = np.eye(3)[np.abs(up).argmin()]
    right = np.cross(up, helper)
    right /= np.linalg.norm(right)
    plane = np.stack([right, np.cross(up, right)])  # [2, 3]
    points, centers, looks = (a @ plane.T for a in (pictures.points, pictures.centers, pictures.directions))
    if len(centers) == 0:
        return ""
    tail = (1 - MAP_SHARE) / 2
    everything = np.concatenate([np.quantile(points, [tail, 1 - tail], axis=0) if len(points) else centers, centers])
    low, high = everything.min(axis=0), everything.max(axis=0)
    margin = 0.06 * max(float((high - low).max()), 1e-9)
    low, high = low - margin, high + margin
    scale = MAP_SIDE / float((high - low).max())
    size = np.maximum(np.ceil((high - low) * scale).astype(int), 8)
    image = _dots((points - low) * scale, pictures.colors, size, pictures.points @ up)
    wedges = []
    length = 0.03 * MAP_SIDE
    for center, look in zip((centers - low) * scale, looks, strict=True):
        norm = float(np.linalg.norm(look))
        ahead = look / norm if norm > 0.05 else np.zeros(2)
        side = np.array([-ahead[1], ahead[0]])
        corners = [
            center,
            center + length * (ahead + 0.5 * side),
            center + length * (ahead - 0.5 * side),
        ]
        shape = " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)
        wedges.append(f'<polygon points="{shape}" fill="#f97316" fill-opacity=".45" stroke="#f97316"/>')
        wedges.append(f'<circle cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="3" fill="#f97316"/>')
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" style="max-width: {MAP_SIDE}px; width: 100%" role="img"'
        f' aria-label="{len(centers)} cameras and {len(points)} points from above">'
        f'<image href="{image}" width="{size[0]}" height="{size[1]}"/>{"".join(wedges)}</svg>'
    )


def _dots(places: np.ndarray, colors: np.ndarray, size: np.ndarray, heights: np.ndarray) -> str:
    """A PNG with one pixel a point; the highest is seen."""
    from PIL import Image

    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    order = np.argsort(heights, kind="stable")
    columns, rows = np.floor(places[order]).astype(int).T
    inside = (columns >= 0) & (columns < size[0]) & (rows >= 0) & (rows < size[1])
    pixels[rows[inside], columns[inside], :3] = colors[order][inside]
    pixels[rows[inside], columns[inside], 3] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _stages(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{stage['seconds']:,.1f} s</td><td>{stage['peak_bytes'] / 1e6:,.0f} MB</td></tr>"
        for name, stage in report["stages"].items()
    )
    reason = html.escape(str(report["stop_reason"]))
    return (
        "<h2>Stages</h2><table><tr><th>stage</th><th>time</th><th>peak memory</th></tr>"
        f"{rows}</table><p>Training ended after {report['steps'] or 0:,} steps: {reason}.</p>"
    )


def _missing(report: Mapping[str, Any]) -> str:
    left_out = [f"{html.escape(name)}: not placed" for name in report["left_out"]]
    skipped = [f"{html.escape(n)}: {html.escape(why)}" for n, why in report["skipped"].items()]
    if not left_out and not skipped:
        return ""
    items = "".join(f"<li>{item}</li>" for item in (*left_out, *skipped))
    return f"<h2>Photos that were not used</h2><ul>{items}</ul>"
