"""The figures that are told are those that were measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_times_of_the_kernels(tables: ModuleType) -> None:
    assert tables.table() in (BENCHMARKS.parent / "README.md").read_text()


def test_a_run_as_a_row(tables: ModuleType) -> None:
    times = {
        "renderer, a batch of 32 images": 16.0,
        "whole step": 1.2344,
        "blend', with depth": 0.5,
        "gsplat: forward": 2.0,
    }
    rows = [{"kernel": kernel, "milliseconds": time} for kernel, time in times.items()]
    row = tables.row_of({"n": 10, "rows": rows, "training_gib": {"full": 2.6415, "compact": 2.1386}})
    assert row == {
        "n": 10,
        "forward_ms": 0.5,
        "step_ms": 1.234,
        "blend_vjp_with_depth_ms": 0.5,
        "gsplat_forward_ms": 2.0,
        "peak_gib": 2.64,
        "peak_gib_compact": 2.14,
    }


def test_runs_of_different_commits_are_not_mixed(tables: ModuleType, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(f'{{"gpu": "one", "driver": "1", "commit": "{path.stem}"}}')
    before = tables.RESULTS.read_bytes()
    with pytest.raises(SystemExit, match="different machines or commits"):
        tables.collect(paths)
    assert tables.RESULTS.read_bytes() == before
