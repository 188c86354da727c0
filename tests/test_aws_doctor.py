"""doctor for an account: every check, good and bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from emulator import connected

from spaceport_gs.pipeline.aws.cloud import Cloud, connect
from spaceport_gs.pipeline.aws.doctor import Finding, examine
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES
from spaceport_gs.pipeline.aws.stack import deploy

DEFAULTS = {
    "ml.c6i.2xlarge for processing job usage": 0, "ml.g5.xlarge for training job usage": 0,
    "ml.g5.xlarge for spot training job usage": 0,
}  # fmt: skip


CALLER: dict[str, Any] = {
    "Arn": "arn:aws:iam::123456789012:user/a", "Account": "123456789012", "ResponseMetadata": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_refreshed_prices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With a stack called doctored."""
    with connected(tmp_path_factory.mktemp("aws") / "log") as cloud:
        assert deploy(cloud, "doctored", {"Email": "a@example.org"}, lambda changes: True, lambda line: None)
        yield


def quotas(values: dict[str, float]) -> dict[str, Any]:
    return {
        "Quotas": [{"QuotaName": name, "QuotaCode": f"L-{i}", "Value": v} for i, (name, v) in enumerate(values.items())]
    }


def answering(stubber: Stubber, applied: dict[str, float]) -> Stubber:
    stubber.add_response("list_aws_default_service_quotas", quotas(DEFAULTS), {"ServiceCode": "sagemaker"})
    stubber.add_response("list_service_quotas", quotas(applied), {"ServiceCode": "sagemaker"})
    return stubber


def of(findings: list[Finding], check: str) -> list[tuple[bool, str]]:
    return [(finding.is_good, finding.line) for finding in findings if finding.check == check]


def test_an_account_in_which_scenes_can_be_made(emulated: None) -> None:
    cloud = connect()
    for name in ("sfm", "3dgs", "compressor"):
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "name": name,
        }
        cloud.client("ecr").put_image(
            repositoryName=f"doctored/{name}", imageTag="0.1", imageManifest=json.dumps(manifest)
        )
    with answering(Stubber(cloud.client("service-quotas")), dict.fromkeys(DEFAULTS, 2)):
        found = examine(cloud, "doctored")
    assert [f.line for f in found if not f.is_good] == [
        "are those of us-east-1 from 2025-01-01: refresh them with `spaceport aws cost --refresh`",
    ]
    assert of(found, "credentials")[0][1].endswith("in account 000000000000")
    assert of(found, "subscribers") == [(True, "email to a@example.org")]
    assert of(found, "bucket") == [(True, "doctored-000000000000-eu-central-1 can be reached")]
    assert [line.partition(", sha256:")[0] for _, line in of(found, "images")] == [
        "doctored/sfm: 0.1", "doctored/3dgs: 0.1", "doctored/compressor: 0.1",
    ]  # fmt: skip


def test_images_that_are_missing(emulated: None) -> None:
    cloud = connect()
    assert deploy(cloud, "bare", {}, lambda changes: True, lambda line: None)
    with answering(Stubber(cloud.client("service-quotas")), {}):
        found = examine(cloud, "bare")
    assert of(found, "images")[1] == (False, "bare/3dgs holds none: run `spaceport aws push`")


def test_a_stack_that_is_missing(emulated: None) -> None:
    cloud = connect()
    with answering(Stubber(cloud.client("service-quotas")), {}):
        found = examine(cloud, "nowhere")
    assert found[-1].check == "stack" and not found[-1].is_good
    assert "no stack nowhere in eu-central-1: run `spaceport aws deploy`" in found[-1].line


def test_a_subscriber_who_has_not_confirmed(emulated: None) -> None:
    cloud = connect()
    waiting = {"SubscriptionArn": "PendingConfirmation", "Endpoint": "a@example.org", "Protocol": "email"}
    with answering(Stubber(cloud.client("service-quotas")), {}), Stubber(cloud.client("sns")) as sns:
        sns.add_response("list_subscriptions_by_topic", {"Subscriptions": [waiting]})
        found = examine(cloud, "doctored")
    assert of(found, "subscribers") == [
        (False, "a@example.org has not confirmed yet: see the message that AWS sent there")
    ]


def cloud_of_stubs() -> Cloud:
    return Cloud(boto3.Session("key", "secret", region_name="eu-central-1"))


def examined(cloud: Cloud, said: dict[str, Any], applied: dict[str, float], **more: Any) -> list[Finding]:
    with (
        Stubber(cloud.client("sts")) as sts,
        answering(Stubber(cloud.client("service-quotas")), applied),
        Stubber(cloud.client("cloudformation")) as stack,
    ):
        sts.add_response("get_caller_identity", {**CALLER, **said})
        stack.add_client_error("describe_stacks", "ValidationError", "Stack with id spaceport does not exist")
        return examine(cloud, "spaceport", **more)


def test_quotas_are_named_with_the_place_to_raise_them() -> None:
    applied = {"ml.c6i.2xlarge for processing job usage": 4.0}
    spot = {**DEFAULT_MACHINES, "train": replace(DEFAULT_MACHINES["train"], is_spot=True)}
    found = of(examined(cloud_of_stubs(), {}, applied, machines=spot), "quotas")
    address = "https://eu-central-1.console.aws.amazon.com/servicequotas/home/services/sagemaker/quotas"
    assert found == [
        (True, "ml.c6i.2xlarge for processing job usage: 4"),
        (False, f"ml.g5.xlarge for training job usage: 0, needed 1; ask for more at {address}/L-1"),
        (False, f"ml.g5.xlarge for spot training job usage: 0, needed 1; ask for more at {address}/L-2"),
    ]
    many = of(examined(cloud_of_stubs(), {}, applied, n_at_once=5), "quotas")
    assert many[0] == (False, f"ml.c6i.2xlarge for processing job usage: 4, needed 5; ask for more at {address}/L-0")
    on_gpu = {**DEFAULT_MACHINES, "compress": replace(DEFAULT_MACHINES["compress"], instance="ml.g4dn.xlarge")}
    gpu = {"ml.g4dn.xlarge for processing job usage": 0.0}
    found = of(examined(cloud_of_stubs(), {}, {**applied, **gpu}, machines=on_gpu), "quotas")
    assert (
        False,
        f"ml.g4dn.xlarge for processing job usage: 0, needed 1; ask for more at {address}/L-1",
    ) in found
    strange = {**DEFAULT_MACHINES, "train": replace(DEFAULT_MACHINES["train"], instance="ml.p9.xlarge")}
    found = of(examined(cloud_of_stubs(), {}, applied, machines=strange), "quotas")
    assert (
        False,
        "ml.p9.xlarge for training job usage: there is none in eu-central-1; the instance may not be either",
    ) in found


@pytest.mark.parametrize(("minutes", "words"), [(-30, "30 min ahead"), (30, "30 min behind")])
def test_clocks_that_disagree(minutes: int, words: str) -> None:
    there = datetime.now(timezone.utc) + timedelta(minutes=minutes)
    headers = {"HTTPHeaders": {"date": format_datetime(there, usegmt=True)}}
    found = of(examined(cloud_of_stubs(), {"ResponseMetadata": headers}, {}), "credentials")
    assert (False, f"this machine's clock is {words}: set it") in found


def test_what_may_not_be_asked_stops_nothing_else() -> None:
    cloud = cloud_of_stubs()
    with (
        Stubber(cloud.client("sts")) as sts,
        Stubber(cloud.client("service-quotas")) as service_quotas,
        Stubber(cloud.client("cloudformation")) as stack,
    ):
        sts.add_response("get_caller_identity", CALLER)
        service_quotas.add_client_error(
            "list_aws_default_service_quotas",
            "AccessDeniedException",
            "not authorized to perform: servicequotas:List on x",
        )
        stack.add_client_error(
            "describe_stacks", "AccessDenied", "not authorized to perform: cloudformation:DescribeStacks"
        )
        found = examine(cloud, "spaceport")
    assert [f.check for f in found] == ["credentials", "prices", "quotas", "stack"]
    assert found[2].line.startswith("no permission for servicequotas:List")
    assert found[3].line.startswith("no permission for cloudformation:DescribeStacks")


def test_without_credentials_nothing_else_is_asked() -> None:
    cloud = cloud_of_stubs()
    with Stubber(cloud.client("sts")) as sts:
        sts.add_client_error("get_caller_identity", "ExpiredToken")
        assert examine(cloud, "spaceport") == [
            Finding("credentials", False, "the AWS credentials have expired: log in again")
        ]
