"""What a scene costs, before and after; the table of prices, and the Pricing API that renews it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.session import Session
from botocore.stub import Stubber

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import cost
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.cost import Capture, Range, bill_of, cheapest, estimate, idle_line, within
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Account, Job, Machine
from spaceport_gs.pipeline.aws.orders import Order
from spaceport_gs.pipeline.aws.prices import PRICING_REGION, Prices, gpus, instances, load_prices, refresh
from spaceport_gs.pipeline.run import RunSettings

DRONE = Capture(n_photos=150, megapixels=12.0)
SETTINGS = RunSettings(downscale=4)
REPOSITORY = Path(__file__).parent.parent
NOW = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def no_refreshed_prices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def benchmark_results(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((REPOSITORY / "benchmarks/results" / f"{name}.json").read_text())
    return results


@pytest.fixture
def prices() -> Prices:
    return load_prices("us-east-1")


def test_the_table_knows_what_it_prices(prices: Prices) -> None:
    model = Session().get_service_model("sagemaker")
    for use, shape in (("training", "TrainingInstanceType"), ("processing", "ProcessingInstanceType")):
        assert set(prices.usd_per_hour[use]) == set(instances()) <= set(model.shape_for(shape).enum)
        assert all(0.1 < usd < 100 for usd in prices.usd_per_hour[use].values())
    for name, instance in instances().items():
        assert bool(instance.gpu) == bool(instance.disk_gb) == name.startswith("ml.g"), name
        assert not instance.gpu or instance.gpu in gpus()
    assert {machine.instance for machine in DEFAULT_MACHINES.values()} <= set(instances())
    assert prices.age_days(date.fromisoformat(prices.as_of) + timedelta(days=5)) == 5


def test_an_unknown_instance_is_named(prices: Prices) -> None:
    with pytest.raises(InputError, match="ml.abacus.xlarge: its price for training in us-east-1 is not known"):
        prices.of("ml.abacus.xlarge", "training")
    with pytest.raises(InputError, match="nothing is known of it"):
        estimate(DRONE, SETTINGS, {"train": Machine("ml.abacus.xlarge")}, prices)


def test_an_estimate_is_time_by_price_with_its_error(prices: Prices) -> None:
    estimated = estimate(DRONE, SETTINGS, DEFAULT_MACHINES, prices)
    assert list(estimated.stages) == list(STAGES)
    for stage in estimated.stages.values():
        assert 0 < stage.seconds.low < stage.seconds.likely < stage.seconds.high
        hourly = prices.of(stage.machine.instance, "training")
        assert stage.usd.likely == pytest.approx(stage.seconds.likely * hourly / 3600)
    assert estimated.usd.high == pytest.approx(sum(stage.usd.high for stage in estimated.stages.values()))
    assert all(m.expected_seconds >= estimated.stages[s].seconds.high for s, m in estimated.machines.items())
    text = str(estimated)
    assert "ml.g5.xlarge: " in text and f"{estimated.usd.likely:.2f} $" in text and "of us-east-1, 2025-" in text


@pytest.mark.parametrize(
    ("capture", "settings", "stage"),
    [
        (replace(DRONE, n_photos=300), SETTINGS, "sfm"),
        (DRONE, replace(SETTINGS, sfm="deterministic"), "sfm"),
        (DRONE, replace(SETTINGS, downscale=2.0), "train"),
        (DRONE, replace(SETTINGS, steps=60_000), "train"),
        (DRONE, replace(SETTINGS, device="cpu"), "train"),
        (DRONE, replace(SETTINGS, preset="baseline"), "compress"),
    ],
)
def test_more_work_takes_longer(capture: Capture, settings: RunSettings, stage: str, prices: Prices) -> None:
    before = estimate(DRONE, SETTINGS, DEFAULT_MACHINES, prices).stages
    after = estimate(capture, settings, DEFAULT_MACHINES, prices).stages
    assert after[stage].seconds.high > before[stage].seconds.high
    assert after[stage].seconds.likely >= before[stage].seconds.likely


def test_the_model_of_the_training_meets_what_was_measured() -> None:
    """The fox capture, 43 views of 1061×1894 trained on, and the random clouds."""
    scenes, kernels = benchmark_results("scenes"), benchmark_results("kernels")
    measured = gpus()[cost.MEASURED_GPU]
    assert cost.slower(measured, measured) == Range(1, 1, 1)
    newest = [row for row in scenes["rows"] if row["commit"] == scenes["rows"][-1]["commit"]]
    assert {row["device"] for row in newest} == {kernels["device"]} == {f"NVIDIA {cost.MEASURED_GPU}"}
    megapixels = 1061 * 1894 / 1e6
    for row in newest:
        step = cost.STEP_SECONDS + cost.STEP_SECONDS_PER_MEGAPIXEL * megapixels
        assert cost.STEP_GROWTH.low * step * row["steps"] == pytest.approx(row["seconds"], rel=0.15)
    step = 1000 * (cost.STEP_SECONDS + cost.STEP_SECONDS_PER_MEGAPIXEL * 1600 * 1066 / 1e6)
    growth = cost.STEP_GROWTH
    for row, factor in zip(kernels["rows"], (growth.low, growth.likely, growth.high), strict=True):
        assert row["step_ms"] == pytest.approx(step * factor, rel=0.15)


def test_the_model_of_clustering_on_a_gpu_meets_what_was_measured() -> None:
    """The random clouds. That one assignment is nearer to the peak than a whole clustering, with all that is between."""
    flops = gpus()[cost.MEASURED_GPU].peak_flops
    for row in benchmark_results("kernels")["rows"]:
        at_peak = row["n"] * cost.MAX_PALETTE * cost.FLOPS_PER_DISTANCE / flops
        assert cost.TIMES_PEAK.low < row["cluster_assignment_ms"] / 1000 / at_peak < cost.TIMES_PEAK.likely


def test_slower_gpus_take_longer() -> None:
    likely = {name: cost.slower(gpu, gpus()[cost.MEASURED_GPU]) for name, gpu in gpus().items()}
    assert likely["T4"].likely > likely["L4"].likely > likely["A10G"].likely > likely["L40S"].likely > 1
    assert all(bounds.low <= bounds.likely <= bounds.high for bounds in likely.values())


def test_max_seconds_ends_a_training(prices: Prices) -> None:
    long = estimate(DRONE, replace(SETTINGS, max_seconds=60), {"train": DEFAULT_MACHINES["train"]}, prices)
    assert long.stages["train"].seconds.high == cost.JOB_SECONDS.high + 60


def test_spot_is_cheaper_likely_and_bounded_by_the_price_on_demand(prices: Prices) -> None:
    on_demand = {"train": DEFAULT_MACHINES["train"]}
    spot = {"train": replace(DEFAULT_MACHINES["train"], is_spot=True)}
    dear, cheap = (estimate(DRONE, SETTINGS, machines, prices).usd for machines in (on_demand, spot))
    assert cheap.likely < dear.likely and cheap.high == dear.high and cheap.low < dear.low


# ---- Held down ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_spot", [False, True])
def test_limits_keep_the_promise_whatever_happens(is_spot: bool, prices: Prices) -> None:
    machines = {**DEFAULT_MACHINES, "train": replace(DEFAULT_MACHINES["train"], is_spot=is_spot)}
    estimated = estimate(DRONE, SETTINGS, machines, prices)
    most = 2.2 * estimated.usd.high
    limited = within(most, estimated)
    bound = 0.0
    for stage, machine in limited.machines.items():
        attempts = 2 if machine.is_spot else 1
        bound += attempts * machine.max_seconds * prices.of(machine.instance, cost.USES[stage]) / 3600
        assert machine.max_seconds >= math.floor(estimated.stages[stage].seconds.high)
    assert bound <= most and limited.usd == estimated.usd


def test_what_may_cost_more_is_refused_before_anything_starts(prices: Prices) -> None:
    estimated = estimate(DRONE, SETTINGS, DEFAULT_MACHINES, prices)
    for most in (0.01, 0.99 * estimated.usd.high, math.nan):
        with pytest.raises(InputError, match=r"may cost [\d.]+: more than --max-cost"):
            within(most, estimated)


# ---- Chosen ------------------------------------------------------------------------------------------------------------------


def test_the_cheapest_that_fits_is_chosen(prices: Prices) -> None:
    chosen = cheapest(DRONE, SETTINGS, prices)
    estimated = estimate(DRONE, SETTINGS, chosen, prices)
    for stage, machine in chosen.items():
        for other in instances():
            if stage == "compress" or bool(instances()[other].gpu) == (stage == "train"):
                offer = estimate(DRONE, SETTINGS, {stage: replace(machine, instance=other)}, prices)
                fits = (
                    cost.host_bytes(stage, DRONE, SETTINGS, instances()[other]) < 0.9e9 * instances()[other].memory_gb
                )
                assert not fits or offer.usd.likely >= estimated.stages[stage].usd.likely
    assert not instances()[chosen["sfm"].instance].gpu and instances()[chosen["train"].instance].gpu


def is_fit(stage: str, settings: RunSettings, name: str) -> bool:
    """Of an instance, for the memory of DRONE's photos; disks are large enough for them."""
    instance = instances()[name]
    if cost.host_bytes(stage, DRONE, settings, instance) > 0.9e9 * instance.memory_gb:
        return False
    return not instance.gpu or cost.gpu_bytes(stage, DRONE, settings) < 0.9e9 * gpus()[instance.gpu].memory_gb


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("preset", ["standard", "baseline"])
@pytest.mark.parametrize("deadline", [600.0, math.inf])
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 3.0])
def test_compression_is_on_a_gpu_exactly_when_that_is_cheaper(
    factor: float, deadline: float, preset: str, device: str, prices: Prices
) -> None:
    """`factor`: of the price of instances with a GPU. `deadline`: in seconds; a smaller instance without one takes longer."""
    hourly = {name: usd * (factor if instances()[name].gpu else 1) for name, usd in prices.usd_per_hour["processing"].items()}  # fmt: skip
    prices = replace(prices, usd_per_hour={**prices.usd_per_hour, "processing": hourly})
    settings = replace(SETTINGS, device=device, preset=preset)
    offered = {name: estimate(DRONE, settings, {"compress": Machine(name)}, prices) for name in instances()}
    offers = {
        name: offer.usd.likely
        for name, offer in offered.items()
        if is_fit("compress", settings, name) and offer.seconds.high <= deadline
    }
    if not any(device != "cpu" or not instances()[name].gpu for name in offers):
        with pytest.raises(InputError, match="no instances are sure to be done"):
            cheapest(DRONE, settings, prices, deadline, {"compress": Machine("")})
        return
    chosen = cheapest(DRONE, settings, prices, deadline, {"compress": Machine("")})["compress"].instance
    on_cpu = min((usd for name, usd in offers.items() if not instances()[name].gpu), default=math.inf)
    on_gpu = min((usd for name, usd in offers.items() if instances()[name].gpu), default=math.inf)
    assert bool(instances()[chosen].gpu) == (device != "cpu" and on_gpu < on_cpu)
    assert offers[chosen] == (on_cpu if device == "cpu" else min(on_cpu, on_gpu))
    if preset == "standard" and device != "cpu":
        assert (on_gpu < on_cpu) == {0.1: True, 0.7: True, 1.0: deadline == 600, 3.0: False}[factor]


def test_compression_is_on_a_cpu_unless_something_else_is_asked_for(prices: Prices) -> None:
    assert not instances()[Order().estimated(DRONE, prices).machines["compress"].instance].gpu
    named = Order(instances={"compress": "ml.g4dn.xlarge"}).estimated(DRONE, prices)
    assert named.machines["compress"].instance == "ml.g4dn.xlarge" and not named.shortages


def test_clustering_is_what_a_gpu_makes_faster(prices: Prices) -> None:
    def seconds(name: str, device: str) -> float:
        settings = replace(SETTINGS, device=device)
        return estimate(DRONE, settings, {"compress": Machine(name)}, prices).stages["compress"].seconds.likely

    assert seconds("ml.g4dn.2xlarge", "auto") < seconds("ml.g4dn.2xlarge", "cpu") == seconds("ml.c6i.2xlarge", "auto")
    assert seconds("ml.g6e.xlarge", "auto") < seconds("ml.g4dn.xlarge", "auto")


@pytest.mark.parametrize(("n", "clustering", "rest"), [(40_000, 19.5, 6.3), (100_000, 160.1, 22.7)])
def test_the_model_of_the_compression_meets_what_was_measured(n: int, clustering: float, rest: float) -> None:
    """Seconds of a core of a Xeon, beside other work; with the error that the estimate has anyway."""
    error = cost.CPU_ERROR
    assert error.low < cost._distances(n) / cost.DISTANCES_PER_CORE_SECOND / clustering < error.high
    assert error.low < cost._encode_seconds(n) / rest < error.high


def test_a_deadline_takes_faster_ones(prices: Prices) -> None:
    relaxed = estimate(DRONE, SETTINGS, cheapest(DRONE, SETTINGS, prices), prices)
    hurried = estimate(DRONE, SETTINGS, cheapest(DRONE, SETTINGS, prices, 0.8 * relaxed.seconds.high), prices)
    assert hurried.seconds.high <= 0.8 * relaxed.seconds.high and hurried.usd.likely > relaxed.usd.likely
    with pytest.raises(InputError, match=r"no instances are sure to be done in 1 min: the fastest need up to \d+"):
        cheapest(DRONE, SETTINGS, prices, 60)


def test_memory_and_disks_decide_too(prices: Prices) -> None:
    large = Capture(n_photos=320, megapixels=20.0)
    needed = cost.gpu_bytes("train", large, RunSettings()) / 1e9
    machine = cheapest(large, RunSettings(), prices)["train"]
    gpu = gpus()[instances()[machine.instance].gpu]
    assert 0.9 * gpus()["A10G"].memory_gb < needed < 0.9 * gpu.memory_gb
    assert machine.volume_gb > 2 * 20
    with pytest.raises(
        InputError, match="no instance likely has the memory and the disk for the stage train with 4000 photos"
    ):
        cheapest(replace(large, n_photos=4000), RunSettings(), prices)


@pytest.mark.parametrize(
    ("capture", "device", "words"),
    [
        (Capture(290, 20.0), "auto", "290 photos of 20.0 megapixels: decoded they take 17 GB, and ml.g5.xlarge has 16 GB of memory for the stage train; --instance auto"),
        (Capture(290, 20.0), "cpu", "ml.c6i.2xlarge has 16 GB of memory for the stage train"),
    ],
)  # fmt: skip
def test_photos_that_no_memory_holds_are_refused(capture: Capture, device: str, words: str, prices: Prices) -> None:
    with pytest.raises(InputError, match=words):
        Order(RunSettings(device=device)).estimated(capture, prices)


def test_photos_that_no_gpu_holds_are_refused(prices: Prices) -> None:
    order = Order(RunSettings(), {"train": "ml.g5.4xlarge"})
    assert order.estimated(Capture(420, 20.0), prices).machines["train"].instance == "ml.g5.4xlarge"
    with pytest.raises(InputError, match="26 GB, and ml.g5.4xlarge has 24 GB of memory of its GPU for the stage train"):
        order.estimated(Capture(450, 20.0), prices)


def test_a_gpu_that_the_instance_has_not_is_missed_at_once(prices: Prices) -> None:
    with pytest.raises(InputError, match="--device cuda: ml.c6i.4xlarge has no GPU; take one such as ml.g5.xlarge"):
        Order(RunSettings(device="cuda"), {"train": "ml.c6i.4xlarge"}).estimated(DRONE, prices)


@pytest.mark.parametrize(
    ("capture", "settings", "words"),
    [
        (Capture(95, 20.0), {}, []),
        (Capture(200, 20.0), {}, ["train likely takes 25 GB of memory, and can have 14 on ml.g5.xlarge: it may fail; --instance auto"]),
        (Capture(40_000, 20.0), {"downscale": 40.0}, ["train likely takes 4,821 GB of disk, and can have 250 on ml.g5.xlarge"]),
    ],
)  # fmt: skip
def test_what_likely_does_not_fit_is_a_warning(
    capture: Capture, settings: dict[str, Any], words: list[str], prices: Prices
) -> None:
    """And no more than that: it is an estimate."""
    estimated = Order(RunSettings(**settings)).estimated(capture, prices)
    for line, said in zip(words, estimated.shortages, strict=True):
        assert line in said and f"warning   {said}" in str(estimated)


def test_volumes_are_large_enough(prices: Prices) -> None:
    fits = Order(RunSettings(device="cpu", downscale=40.0)).estimated(Capture(2000, 20.0), prices).machines
    assert {machine.volume_gb for machine in fits.values()} == {261}
    most = Order(RunSettings(downscale=40.0)).estimated(Capture(200_000, 20.0), prices).machines
    assert {machine.volume_gb for machine in most.values()} == {cost.MOST_VOLUME_GB}


def test_what_else_is_wanted_of_the_machines_stays(prices: Prices) -> None:
    wanted = {**DEFAULT_MACHINES, "train": Machine("", is_spot=True, max_seconds=123)}
    chosen = cheapest(DRONE, SETTINGS, prices, machines=wanted)
    assert chosen["train"].is_spot and chosen["train"].max_seconds == 123 and list(chosen) == list(STAGES)


def test_an_instance_with_disks_of_its_own_gets_no_key_for_a_volume() -> None:
    account = Account("bucket", "arn:aws:iam::123456789012:role/r", "arn:aws:kms:eu-central-1:123456789012:key/k")
    job = Job("train", "a1", "image")
    assert "VolumeKmsKeyId" not in job.request(account, Machine("ml.g5.xlarge"))["ResourceConfig"]
    assert job.request(account, Machine("ml.c6i.2xlarge"))["ResourceConfig"]["VolumeKmsKeyId"] == account.kms_key


# ---- Added up ----------------------------------------------------------------------------------------------------------------

TRAINED: Mapping[str, Any] = {
    "TrainingJobName": "spaceport-train-a1-0", "TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/x",
    "TrainingStartTime": NOW, "TrainingEndTime": NOW + timedelta(seconds=3600), "CreationTime": NOW,
    "TrainingTimeInSeconds": 3600, "BillableTimeInSeconds": 1200, "TrainingJobStatus": "Completed",
    "SecondaryStatus": "Completed", "ModelArtifacts": {"S3ModelArtifacts": "s3://b/k"},
    "AlgorithmSpecification": {"TrainingInputMode": "File"}, "StoppingCondition": {},
    "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
}  # fmt: skip
PROCESSED: Mapping[str, Any] = {
    "ProcessingJobName": "spaceport-sfm-a1-0", "ProcessingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:processing-job/x",
    "ProcessingStartTime": NOW, "ProcessingEndTime": NOW + timedelta(seconds=900), "CreationTime": NOW,
    "ProcessingJobStatus": "Failed", "AppSpecification": {"ImageUri": "image"},
    "ProcessingResources": {"ClusterConfig": {"InstanceType": "ml.c6i.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1}},
}  # fmt: skip


def test_a_bill_is_billed_seconds_by_price(prices: Prices) -> None:
    sfm, train = (bill_of(described, prices, NOW) for described in (PROCESSED, TRAINED))
    assert (sfm.seconds, sfm.billed_seconds, sfm.saved_usd) == (900, 900, 0)
    assert sfm.usd == pytest.approx(0.408 / 4)
    assert (train.seconds, train.billed_seconds) == (3600, 1200)
    assert train.usd == pytest.approx(1.408 / 3) and train.saved_usd == pytest.approx(1.408 * 2 / 3)


def test_a_job_under_way_costs_what_it_ran_and_one_in_the_queue_nothing(prices: Prices) -> None:
    over = ("TrainingTimeInSeconds", "BillableTimeInSeconds", "TrainingEndTime")
    running = {name: value for name, value in TRAINED.items() if name not in over}
    assert bill_of(running, prices, NOW + timedelta(seconds=60)).usd == pytest.approx(1.408 / 60)
    queued = {
        name: value for name, value in PROCESSED.items() if name not in ("ProcessingStartTime", "ProcessingEndTime")
    }
    assert bill_of(queued, prices, NOW).usd == 0


# ---- Renewed -----------------------------------------------------------------------------------------------------------------


def product(name: str, usd: str) -> str:
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": usd}}
    terms = {"OnDemand": {"t": {"priceDimensions": {"d": dimension}}}}
    return json.dumps({"product": {"attributes": {"instanceName": name}}, "terms": terms})


def asked(use: str) -> dict[str, Any]:
    fields = {"regionCode": "eu-central-1", "component": use, "productFamily": "ML Instance"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in fields.items()]
    return {"ServiceCode": "AmazonSageMaker", "Filters": filters}


def test_prices_are_renewed_and_kept() -> None:
    cloud = Cloud(boto3.Session("key", "secret", region_name="eu-central-1"))
    client = cloud.client("pricing", PRICING_REGION)
    assert client.meta.region_name == "us-east-1"
    with Stubber(client) as pricing:
        first = {
            "PriceList": [product("ml.g5.xlarge", "1.7600000000"), product("ml.abacus.xlarge", "9")],
            "NextToken": "2",
        }
        pricing.add_response("get_products", first, asked("Training"))
        second = {"PriceList": [product("ml.g4dn.xlarge", "0.9210000000")]}
        pricing.add_response("get_products", second, {**asked("Training"), "NextToken": "2"})
        pricing.add_response("get_products", {"PriceList": [product("ml.c6i.2xlarge", "0.465")]}, asked("Processing"))
        fresh = refresh(cloud, date(2026, 2, 3))
    assert fresh == load_prices("eu-central-1") and fresh != load_prices("us-east-1")
    assert (fresh.region, fresh.as_of, fresh.source) == ("eu-central-1", "2026-02-03", "AWS's Pricing API")
    assert fresh.usd_per_hour["training"] == {"ml.g5.xlarge": 1.76, "ml.g4dn.xlarge": 0.921}
    assert fresh.of("ml.c6i.2xlarge", "processing") == 0.465
    with pytest.raises(InputError, match="ml.g6.xlarge: its price for training in eu-central-1 is not known"):
        fresh.of("ml.g6.xlarge", "training")


def test_prices_that_cannot_be_had_leave_the_old_ones(tmp_path: Path) -> None:
    cloud = Cloud(boto3.Session("key", "secret", region_name="eu-central-1"))
    with Stubber(cloud.client("pricing", PRICING_REGION)) as pricing:
        pricing.add_response("get_products", {"PriceList": []}, asked("Training"))
        with pytest.raises(InputError, match="knows no instance for training in eu-central-1; the old prices stay"):
            refresh(cloud, date(2026, 2, 3))
    assert load_prices("eu-central-1").region == "us-east-1"
    (tmp_path / "cache/spaceport").mkdir(parents=True)
    (tmp_path / "cache/spaceport/prices-eu-central-1.json").write_text('{"colour": 1}')
    assert load_prices("eu-central-1").region == "us-east-1"


def test_what_the_stack_costs_when_nothing_runs() -> None:
    assert cost.idle_usd_per_month({}) == {"alarms": pytest.approx(0.7), "dashboard": 3.0, "key": 0.0}
    assert "about 4.70 $ a month (alarms 0.70, dashboard 3.00, key 1.00)" in idle_line({"Encryption": "aws:kms"})
