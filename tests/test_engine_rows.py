"""What adds, moves, orders and removes the rows of Gaussians, and the clustering of their colours."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import GROWTH, on, random_gaussians

from spaceport_gs import ops, reference
from spaceport_gs.gaussians import Rows
from spaceport_gs.types import DrawKey


def rows_of(n: int, degree: int = 3) -> Rows:
    """Some of the rows are broken."""
    values = random_gaussians(n, seed=n, sh_degree=degree)
    for i, array in enumerate(values.arrays()):
        array.view(n, -1)[7 * i + 3 :: 101, -1] = (math.nan, math.inf, -math.inf)[i % 3]
    return Rows(values, (random_gaussians(n, seed=1, sh_degree=degree), random_gaussians(n, seed=2, sh_degree=degree)))


def rows_on(device: str, rows: Rows) -> Rows:
    """A copy there."""
    values, *companions = (g.map(lambda a: a.clone().to(device)) for g in (rows.values, *rows.companions))
    return Rows(values, tuple(companions))


def assert_rows_close(rows: Rows, truth: Rows) -> None:
    for gaussians, correct in zip((rows.values, *rows.companions), (truth.values, *truth.companions), strict=True):
        for a, b in zip(gaussians.arrays(), correct.arrays(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_draws_are_those_of_philox() -> None:
    """Known answers of the generator's authors."""
    counter = np.array([[0] * 4, [0xFFFFFFFF] * 4], np.uint64)
    assert [hex(w) for w in reference.philox(counter, 0)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    last = reference.philox(counter, 2**64 - 1)[1]
    assert [hex(w) for w in last] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize(("n", "degree"), [(0, 3), (1, 0), (255, 0), (700, 1), (257, 2), (3000, 3)])
@pytest.mark.parametrize("share", [None, 0.0, 0.1, 0.9])
def test_growth(device: str, n: int, degree: int, share: float | None) -> None:
    """Also with a limit that leaves room for this share of the rows; scores come in few sizes, so that they tie."""
    rows = rows_of(n, degree) if n > 0 else Rows(random_gaussians(0), (random_gaussians(0), random_gaussians(0)))
    scores = torch.randint(0, 11, (n,), generator=torch.Generator().manual_seed(0)) / 10
    scores[::17] = math.nan
    settings = GROWTH if share is None else replace(GROWTH, max_rows=max(n + int(share * n), 1))
    grown = ops.grow(rows_on(device, rows), scores.to(device), settings)
    assert_rows_close(grown, reference.grow(rows, scores, settings))


def test_children_are_samples_of_their_parent(device: str) -> None:
    """Whitened, their offsets have mean 0 and covariance 1."""
    n = 20_000
    parents = random_gaussians(n, sh_degree=0)
    settings = replace(GROWTH, split_log_scale=-math.inf, min_opacity=-math.inf, max_log_scale=math.inf)
    grown = ops.grow(Rows(on(device, parents), ()), torch.ones(n, device=device), settings).values.means.cpu()
    offsets = (grown.view(2, n, 3) - parents.means).double()
    turn = reference.rotation(parents.quaternions.double())
    white = (turn.mT @ offsets[..., None])[..., 0] / parents.log_scales.double().exp()
    together = torch.cat([white[0], white[1]], dim=1)  # the two are independent of each other
    assert together.mean(dim=0).abs().max() < 0.03
    assert (together.T.cov() - torch.eye(6)).abs().max() < 0.05


def test_selection(device: str) -> None:
    rows = rows_of(300, 2)
    numbers = torch.randint(0, 300, (777,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    selected = ops.select_rows(rows_on(device, rows), numbers.to(device))
    assert_rows_close(selected, Rows(rows.values.select(numbers), tuple(c.select(numbers) for c in rows.companions)))
    assert len(ops.select_rows(rows_on(device, rows), numbers[:0].to(device)).values) == 0
    if device == "cpu":
        with pytest.raises(ValueError, match="rows: expected below 300, got 300"):
            ops.select_rows(rows, torch.tensor([300], dtype=torch.int32))


def test_morton_order(device: str) -> None:
    means = random_gaussians(3000).means
    means[5], means[6, 1], means[100:200] = math.nan, -math.inf, means[99]
    order = ops.morton_order(means.to(device)).cpu()
    assert sorted(order.tolist()) == list(range(3000)) and order[-2:].tolist() == [5, 6]
    finite = means[order[:-2]].double()
    low, high = finite.amin(dim=0), finite.amax(dim=0)
    cells = ((finite - low) / (high - low) * (2**21 - 1)).long() >> 9  # rounding moves a cell or two
    code = sum((cells >> bit & 1)[:, axis] << (3 * bit + axis) for bit in range(12) for axis in range(3))
    assert ((code[1:] < code[:-1]).double().mean()) < 0.005
    equal = order[(means[order] == means[99]).all(dim=1)]
    assert torch.equal(equal, torch.arange(99, 200, dtype=torch.int32))
    assert ops.morton_order(torch.ones(4, 3, device=device)).tolist() == [0, 1, 2, 3]
    assert len(ops.morton_order(torch.ones(0, 3, device=device))) == 0


@pytest.mark.parametrize(("n", "min_opacity"), [(1, -9.0), (40, 0.0), (500, 1.0), (3000, -1.0), (50, 99.0)])
def test_relocation(device: str, n: int, min_opacity: float) -> None:
    rows, key = rows_of(n, 1), DrawKey(5, 6)
    moved = rows_on(device, rows)
    ops.relocate(moved, min_opacity, key)
    nothing_stays = not bool((rows.values.opacities >= min_opacity).any())
    assert_rows_close(moved, rows if nothing_stays else reference.relocate(rows, min_opacity, key))


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("opacity", [0.02, 0.5, 0.99])
def test_copies_look_as_one_did(n: int, opacity: float) -> None:
    """Blended along a line through the middle, by numbers: the sum over it stays."""
    shared, size = reference.relocated(opacity, n)
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    one = opacity * torch.exp(-(x**2) / 2)
    several = 1 - (1 - shared * torch.exp(-(x**2) / (2 * size**2))) ** n
    assert float(several.sum() / one.sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(several.max()) == pytest.approx(opacity)


@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (0, 3, 2), (100, 7, 3), (300, 129, 24), (1003, 130, 45), (517, 260, 9), (129, 300, 17)]
)
def test_cluster(device: str, n: int, k: int, d: int) -> None:
    draw = torch.Generator().manual_seed(n)
    points, centroids = torch.randn(n, d, generator=draw), torch.randn(k, d, generator=draw)
    weights = torch.rand(n, generator=draw) * (torch.arange(n) % 5 > 0)
    labels, distances = ops.cluster_assign(points.to(device), centroids.to(device))
    apart = ((points[:, None].double() - centroids) ** 2).sum(dim=2)
    _, expected = reference.cluster_assign(points.double(), centroids.double())
    torch.testing.assert_close(distances.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart.gather(1, labels.cpu().long()[:, None])[:, 0], expected, rtol=1e-5, atol=1e-5)
    moved = centroids.to(device)
    totals = ops.cluster_update(points.to(device), labels, weights.to(device), moved)
    means, sums = reference.cluster_update(points.double(), labels.cpu().long(), weights.double(), centroids.double())
    torch.testing.assert_close(moved.cpu().double(), means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals.cpu().double(), sums, rtol=1e-5, atol=1e-6)
    assert torch.equal(moved.cpu()[sums == 0], centroids[sums == 0])


def test_equally_near_centroids_give_the_lowest_label(device: str) -> None:
    """Whole numbers, so that distances are exact: many centroids are equal, or as far on the other side."""
    draw = torch.Generator().manual_seed(0)
    centroids = torch.randint(-1, 2, (700, 3), generator=draw).float()
    points = torch.randint(-2, 3, (500, 3), generator=draw).float()
    labels, distances = ops.cluster_assign(points.to(device), centroids.to(device))
    expected, correct = reference.cluster_assign(points, centroids)
    assert torch.equal(labels.cpu().long(), expected) and torch.equal(distances.cpu(), correct)


def test_labels_that_name_no_centroid(device: str) -> None:
    points, centroids = torch.ones(4, 2, device=device), torch.zeros(3, 2, device=device)
    labels = torch.tensor([0, -1, 3, 0], dtype=torch.int32, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="labels: expected rows of centroids, got -1"):
            ops.cluster_update(points, labels, points[:, 0].contiguous(), centroids)
    else:
        totals = ops.cluster_update(points, labels, points[:, 0].contiguous(), centroids)
        assert totals.tolist() == [2, 0, 0] and centroids.tolist() == [[1, 1], [0, 0], [0, 0]]
