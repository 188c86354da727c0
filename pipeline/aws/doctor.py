"""doctor for an account: whether scenes can be made there, and what to do about what is missing; one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import Cloud, explained
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.cost import USES
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Machine
from spaceport_gs.pipeline.aws.prices import load_prices
from spaceport_gs.pipeline.aws.stack import Stack, read

MOST_SKEW_SECONDS = 240  # AWS takes requests that are off by five minutes
MOST_PRICE_DAYS = 365


@dataclass(frozen=True)
class Finding:
    """Of one check."""

    check: str
    is_good: bool
    line: str
    """What was found, or what is missing and how to get it."""


def examine(
    cloud: Cloud, prefix: str, machines: Mapping[str, Machine] | None = None, n_at_once: int = 1
) -> list[Finding]:
    """Everything there is to find: no check stops another. `n_at_once`: scenes that are to be made at the same time."""
    chosen = machines or DEFAULT_MACHINES
    found = list(_tried("credentials", partial(_credentials, cloud)))
    if not found[0].is_good:
        return found
    found += _tried("prices", partial(_prices, cloud))
    found += _tried("quotas", partial(_quotas, cloud, chosen, n_at_once))
    try:
        stack = read(cloud, prefix)
    except InputError as error:
        return [*found, Finding("stack", False, str(error))]
    found.append(Finding("stack", True, f"{prefix} in {cloud.region}, bucket {stack.bucket}"))
    for name, check in (("bucket", _bucket), ("images", _images), ("subscribers", _subscribers)):
        found += _tried(name, partial(check, cloud, stack))
    return found


def _tried(name: str, check: Callable[[], Iterator[tuple[bool, str]]]) -> Iterator[Finding]:
    try:
        with explained():
            for is_good, line in check():
                yield Finding(name, is_good, line)
    except InputError as error:
        yield Finding(name, False, str(error))


def _credentials(cloud: Cloud) -> Iterator[tuple[bool, str]]:
    answer = cloud.client("sts").get_caller_identity()
    yield True, f"{answer['Arn']} in account {answer['Account']}"
    if said := answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date"):
        skew = (datetime.now(timezone.utc) - parsedate_to_datetime(said)).total_seconds()
        if abs(skew) > MOST_SKEW_SECONDS:
            yield False, f"this machine's clock is {abs(skew) / 60:.0f} min {'ahead' if skew > 0 else 'behind'}: set it"


def _prices(cloud: Cloud) -> Iterator[tuple[bool, str]]:
    prices = load_prices(cloud.region)
    days = prices.age_days(datetime.now(timezone.utc).date())
    if prices.region != cloud.region or days > MOST_PRICE_DAYS:
        yield (
            False,
            f"are those of {prices.region} from {prices.as_of}: refresh them with `spaceport aws cost --refresh`",
        )
    else:
        yield True, f"of {prices.region} from {prices.as_of}"


def _quotas(cloud: Cloud, machines: Mapping[str, Machine], n_at_once: int) -> Iterator[tuple[bool, str]]:
    """Those of the machines' kinds, by use; in a new account many are zero."""
    client = cloud.client("service-quotas")
    quotas = {
        quota["QuotaName"]: quota
        for listing in ("list_aws_default_service_quotas", "list_service_quotas")  # what applies goes over the defaults
        for page in client.get_paginator(listing).paginate(ServiceCode="sagemaker")
        for quota in page["Quotas"]
    }
    for name, needed in _needed(machines, n_at_once).items():
        quota = quotas.get(name)
        if quota is None:
            yield False, f"{name}: there is none in {cloud.region}; the instance may not be either"
        elif quota["Value"] < needed:
            address = f"https://{cloud.region}.console.aws.amazon.com/servicequotas/home/services/sagemaker/quotas"
            yield False, f"{name}: {quota['Value']:g}, needed {needed}; ask for more at {address}/{quota['QuotaCode']}"
        else:
            yield True, f"{name}: {quota['Value']:g}"


def _needed(machines: Mapping[str, Machine], n_at_once: int) -> dict[str, int]:
    """By the quota's name; each scene has one job at a time."""
    needed: dict[str, int] = {}
    for stage, machine in machines.items():
        kinds = [f"{USES[stage]} job"] + (["spot training job"] if machine.is_spot else [])
        for name in (f"{machine.instance} for {kind} usage" for kind in kinds):
            needed[name] = n_at_once
    return needed


def require_quotas(cloud: Cloud, machines: Mapping[str, Machine], n_at_once: int = 1) -> None:
    """InputError if the account has none for one of these; who may not ask for quotas hears it from SageMaker later."""
    try:
        with explained():
            missing = [line for is_good, line in _quotas(cloud, machines, n_at_once) if not is_good]
    except InputError:
        return
    if missing:
        raise InputError(f"quota {missing[0]}" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))


def _bucket(cloud: Cloud, stack: Stack) -> Iterator[tuple[bool, str]]:
    cloud.client("s3").head_bucket(Bucket=stack.bucket, ExpectedBucketOwner=cloud.account_id)
    yield True, f"{stack.bucket} can be reached"


def _images(cloud: Cloud, stack: Stack) -> Iterator[tuple[bool, str]]:
    for stage in STAGES:
        repository = stack.repository(stage).partition("/")[2]
        pages = cloud.client("ecr").get_paginator("describe_images").paginate(repositoryName=repository)
        images = [image for page in pages for image in page["imageDetails"]]
        if not images:
            yield False, f"{repository} holds none: run `spaceport aws push`"
        else:
            newest = max(images, key=lambda image: image["imagePushedAt"])
            yield True, f"{repository}: {', '.join(newest.get('imageTags', [])) or 'untagged'}, {newest['imageDigest']}"


def _subscribers(cloud: Cloud, stack: Stack) -> Iterator[tuple[bool, str]]:
    pages = cloud.client("sns").get_paginator("list_subscriptions_by_topic").paginate(TopicArn=stack.outputs["Topic"])
    for subscription in (entry for page in pages for entry in page["Subscriptions"]):
        if subscription["SubscriptionArn"] == "PendingConfirmation":
            yield False, f"{subscription['Endpoint']} has not confirmed yet: see the message that AWS sent there"
        else:
            yield True, f"{subscription['Protocol']} to {subscription['Endpoint']}"
