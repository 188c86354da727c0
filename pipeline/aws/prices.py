"""Instances and what they cost: the table that comes along, or a newer one from AWS's Pricing API."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spaceport_gs.errors import InputError
from spaceport_gs.files import write_json

if TYPE_CHECKING:
    from spaceport_gs.pipeline.aws.cloud import Cloud

PRICING_REGION = "us-east-1"  # one of the few that answer, for all of them
USES = ("training", "processing")


@dataclass(frozen=True)
class Gpu:
    """By its data sheet."""

    memory_gb: float
    multiprocessors: int
    lanes: int
    """Of a multiprocessor: multiplications with additions, in 32 bits, a clock."""
    ghz: float
    gb_per_second: float

    @property
    def peak_flops(self) -> float:
        """In a second."""
        return 2e9 * self.multiprocessors * self.lanes * self.ghz


@dataclass(frozen=True)
class Instance:
    """A kind of machine."""

    vcpus: int
    memory_gb: float
    gpu: str = ""
    disk_gb: int = 0
    """Of disks of its own; 0: it has none, and gets the volume that is asked for."""


@dataclass(frozen=True)
class Prices:
    """On demand, in US dollars an hour."""

    region: str
    """Whose prices these are."""
    as_of: str
    """Day of the prices, as 2025-01-01."""
    source: str
    usd_per_hour: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of an instance, by its use, training or processing, and its name."""

    def of(self, instance: str, use: str) -> float:
        try:
            return self.usd_per_hour[use][instance]
        except KeyError as error:
            known = ", ".join(sorted(self.usd_per_hour.get(use, {})))
            raise InputError(f"{instance}: its price for {use} in {self.region} is not known; take {known}") from error

    def age_days(self, today: date) -> int:
        return (today - date.fromisoformat(self.as_of)).days


@cache
def _table() -> Mapping[str, Any]:
    return dict(json.loads((Path(__file__).parent / "prices.json").read_text(encoding="utf-8")))


@cache
def instances() -> Mapping[str, Instance]:
    return {name: Instance(**entry) for name, entry in _table()["instances"].items()}


@cache
def gpus() -> Mapping[str, Gpu]:
    return {name: Gpu(**entry) for name, entry in _table()["gpus"].items() if name != "source"}


def usd_per_month() -> Mapping[str, float]:
    """Of what the stack consists of: a key, an alarm, a dashboard, a gigabyte of images and of data."""
    return {name: value for name, value in _table()["usd_per_month"].items() if name != "source"}


def load_prices(region: str) -> Prices:
    """Those that were refreshed last for this region, else those that come along, whatever their region."""
    try:
        return Prices(**json.loads(_refreshed(region).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        table = _table()
        return Prices(table["region"], table["as_of"], table["source"], {use: table["usd_per_hour"] for use in USES})


def refresh(cloud: Cloud, today: date) -> Prices:
    """Asks the Pricing API about the instances of the table in the cloud's region, and keeps what it says."""
    products = cloud.client("pricing", PRICING_REGION).get_paginator("get_products")
    found: dict[str, dict[str, float]] = {}
    for use in USES:
        wanted = {"regionCode": cloud.region, "component": use.capitalize(), "productFamily": "ML Instance"}
        pages = products.paginate(
            ServiceCode="AmazonSageMaker",
            Filters=[{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()],
        )
        prices = dict(_on_demand(entry) for page in pages for entry in map(json.loads, page["PriceList"]))
        found[use] = {name: prices[name] for name in instances() if name in prices}
        if not found[use]:
            raise InputError(f"the Pricing API knows no instance for {use} in {cloud.region}; the old prices stay")
    fresh = Prices(cloud.region, today.isoformat(), "AWS's Pricing API", found)
    write_json(_refreshed(cloud.region), asdict(fresh))
    return fresh


def _on_demand(product: Mapping[str, Any]) -> tuple[str, float]:
    """(instance, dollars an hour) of an entry of the price list."""
    dimensions = (d for term in product["terms"]["OnDemand"].values() for d in term["priceDimensions"].values())
    return product["product"]["attributes"]["instanceName"], max(float(d["pricePerUnit"]["USD"]) for d in dimensions)


def _refreshed(region: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "spaceport" / f"prices-{region}.json"
