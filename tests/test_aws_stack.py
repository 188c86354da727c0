"""What becomes of a stack: in an account that is emulated here, and where something goes wrong."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    TokenRetrievalError,
)
from botocore.stub import Stubber
from emulator import connected
from policies import listed

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import stack as stacks
from spaceport_gs.pipeline.aws.cloud import Cloud, connect, explained
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.jobs import Account, Job
from spaceport_gs.pipeline.aws.stack import Change, Data, Running, deploy, destroy, find_kept, read
from spaceport_gs.pipeline.aws.template import KEPT, names_of, render


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with connected(tmp_path_factory.mktemp("aws") / "log") as cloud:
        yield cloud


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Another one for each test."""
    return "t" + re.sub("[^a-z]", "", request.node.name)[-16:]


def agree(changes: Sequence[Change]) -> bool:
    return True


def decline(changes: Sequence[Change]) -> bool:
    return False


def silent(line: str) -> None:
    pass


def test_a_stack_is_made_and_found_by_its_outputs(cloud: Cloud, prefix: str) -> None:
    asked: list[Sequence[Change]] = []
    made = deploy(
        cloud,
        prefix,
        {"Queue": "yes", "Email": "a@example.org", "WebHook": "https://example.org/hook", "Publishing": "public"},
        lambda changes: not asked.append(changes),  # type: ignore[func-returns-value]
        silent,
    )
    assert made == read(cloud, prefix) and made is not None
    assert made.account("train") == Account(made.bucket, made.outputs["TrainRole"], prefix=prefix)
    assert [str(change) for change in asked[0]] == ["add Bucket (S3::Bucket)"] and len(asked) == 2
    bucket = made.bucket
    s3, states = cloud.client("s3"), cloud.client("stepfunctions")
    assert set(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values()) == {True}
    assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    policy = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])
    assert [statement["Sid"] for statement in policy["Statement"]] == ["OnlyTls", "OnlyCurrentTls", "Published"]
    for stage, name in zip(STAGES, ("sfm", "3dgs", "compressor"), strict=True):
        assert made.repository(stage).endswith(f".amazonaws.com/{prefix}/{name}")
    for arn in made.machines:
        definition = states.describe_state_machine(stateMachineArn=arn)["definition"]
        assert "${" not in definition and made.outputs["Topic"] in definition
    subscriptions = cloud.client("sns").list_subscriptions_by_topic(TopicArn=made.outputs["Topic"])["Subscriptions"]
    assert {entry["Protocol"] for entry in subscriptions} == {"email", "https", "sqs"}
    assert made.site.startswith("https://") and made.site.endswith(".cloudfront.net")


def test_stage_roles_allow_what_the_jobs_ask_for_and_no_more(cloud: Cloud, prefix: str) -> None:
    made = deploy(cloud, prefix, {}, agree, silent)
    assert made is not None
    for stage in STAGES:
        account = made.account(stage)
        allows = policy_of(cloud, account.role)
        for action, key in asked_of_s3(stage, account):
            assert allows(action, f"{account.bucket}/{key}"), (stage, action, key)
            assert allows("s3:ListBucket", account.bucket, prefix=key), (stage, key)
        for action, key in (
            ("s3:PutObject", "inputs/a1/photos/a.jpg"),
            ("s3:PutObject", "published/a1/index.html"),
            ("s3:DeleteObject", "work/a1/sfm/manifest.json"),
            ("s3:GetObject", "jobs/a1/job.json"),
        ):
            assert not allows(action, f"{account.bucket}/{key}"), (stage, action, key)
        assert not allows("s3:GetObject", "another-bucket/work/a1/sfm/manifest.json")


def asked_of_s3(stage: str, account: Account) -> Iterator[tuple[str, str]]:
    """(action, key) that SageMaker needs for a job."""
    for part, address in addresses(Job(stage, "a1", "image").request(account)):
        assert address.startswith(f"s3://{account.bucket}/")
        key = address.removeprefix(f"s3://{account.bucket}/").rstrip("/") + "/file"
        if "Input" in part or "Checkpoint" in part:
            yield "s3:GetObject", key
        if "Output" in part or "Checkpoint" in part:
            yield "s3:PutObject", key
            yield "s3:AbortMultipartUpload", key


def addresses(value: Any, part: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("S3Uri", "S3OutputPath"):
                yield part, inner
            else:
                yield from addresses(inner, part or name)
    elif isinstance(value, list):
        for inner in value:
            yield from addresses(inner, part)


def policy_of(cloud: Cloud, role_arn: str) -> Callable[..., bool]:
    """Whether a role may do an action on something in S3; of conditions it knows that on prefixes."""
    iam, role = cloud.client("iam"), role_arn.rpartition("/")[2]
    documents = [
        iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]

    def allows(action: str, resource: str, prefix: str = "") -> bool:
        return any(
            action in listed(statement["Action"])
            and any(
                fnmatch.fnmatchcase(f"arn:aws:s3:::{resource}", pattern) for pattern in listed(statement["Resource"])
            )
            and (
                not prefix
                or any(fnmatch.fnmatchcase(prefix, p) for p in statement["Condition"]["StringLike"]["s3:prefix"])
            )
            for document in documents
            for statement in document["Statement"]
        )

    return allows


def test_two_stacks_live_side_by_side(cloud: Cloud) -> None:
    first, second = (deploy(cloud, name, {}, agree, silent) for name in ("left", "right"))
    assert first is not None and second is not None
    shared = {name for name in first.outputs if first.outputs[name] == second.outputs[name]}
    assert shared == {"Version"}
    assert destroy(cloud, "left", agree, silent, Data.DELETE)
    assert read(cloud, "right") == second and len(find_kept(cloud, "right")) == 4 and not find_kept(cloud, "left")


def push(cloud: Cloud, repository: str) -> None:
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": []}
    cloud.client("ecr").put_image(repositoryName=repository, imageTag="1", imageManifest=json.dumps(manifest))


def test_data_outlives_the_stack_and_comes_back_to_the_next(cloud: Cloud, prefix: str) -> None:
    first = deploy(cloud, prefix, {}, agree, silent)
    assert first is not None
    cloud.client("s3").put_object(Bucket=first.bucket, Key="published/a1/index.html", Body=b"page")
    push(cloud, f"{prefix}/sfm")
    told: list[Change] = []
    said: list[str] = []
    assert destroy(cloud, prefix, lambda changes: not told.extend(changes), said.append)  # type: ignore[func-returns-value]
    assert said[-1].startswith(f"kept, and paid for: {first.bucket}, {prefix}/sfm")
    assert {change.name for change in told if change.action == "Keep"} == set(KEPT) - {"Key"}
    with pytest.raises(InputError, match=f"no stack {prefix} in eu-central-1"):
        read(cloud, prefix)
    with pytest.raises(InputError, match="only data that was kept"):
        destroy(cloud, prefix, agree, silent)

    told.clear()
    second = deploy(cloud, prefix, {}, lambda changes: not told.extend(changes), silent)  # type: ignore[func-returns-value]
    assert {change.name for change in told if change.action == "Import"} == set(KEPT) - {"Key"}
    assert not [change for change in told if change.is_replaced == "True"]
    assert second is not None and second.bucket == first.bucket
    assert cloud.client("s3").get_object(Bucket=second.bucket, Key="published/a1/index.html")["Body"].read() == b"page"
    assert cloud.client("ecr").list_images(repositoryName=f"{prefix}/sfm")["imageIds"]
    resources = cloud.client("cloudformation").describe_stack_resources(StackName=prefix)["StackResources"]
    assert set(KEPT) - {"Key"} < {resource["LogicalResourceId"] for resource in resources}


def test_a_key_comes_back_with_the_data_that_needs_it(cloud: Cloud, prefix: str) -> None:
    first = deploy(cloud, prefix, {"Encryption": "aws:kms"}, agree, silent)
    assert first is not None and first.account("train").kms_key == first.outputs["KeyArn"]
    key = first.outputs["KeyArn"]
    default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
    cloud.client("s3").put_bucket_encryption(  # as the template says it; the emulator does not take it from there
        Bucket=first.bucket,
        ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": default}]},
    )
    for parameters in ({"Encryption": "AES256"}, {"Encryption": "AES256", "Queue": "yes"}):
        with pytest.raises(InputError, match="only be read with the stack's key"):
            deploy(cloud, prefix, parameters, agree, silent)
    assert destroy(cloud, prefix, agree, silent)
    assert find_kept(cloud, prefix)["Key"] == key.rpartition("/")[2]
    with pytest.raises(InputError, match="only be read with the stack's key"):
        deploy(cloud, prefix, {"Encryption": "AES256"}, agree, silent)
    second = deploy(cloud, prefix, {}, agree, silent)
    assert second is not None and second.outputs["KeyArn"] == key
    assert destroy(cloud, prefix, agree, silent, Data.DELETE)
    assert cloud.client("kms").describe_key(KeyId=key)["KeyMetadata"]["KeyState"] == "PendingDeletion"


def test_all_data_goes_when_that_is_said(cloud: Cloud, prefix: str) -> None:
    """Old versions, markers and unfinished uploads too; also when the stack has gone before."""
    made = deploy(cloud, prefix, {}, agree, silent)
    assert made is not None
    s3 = cloud.client("s3")
    for body in (b"1", b"2"):
        s3.put_object(Bucket=made.bucket, Key="inputs/a1/photos/a.jpg", Body=body)
    s3.delete_object(Bucket=made.bucket, Key="inputs/a1/photos/a.jpg")
    s3.create_multipart_upload(Bucket=made.bucket, Key="inputs/a1/photos/b.jpg")
    push(cloud, f"{prefix}/sfm")
    assert destroy(cloud, prefix, agree, silent)
    assert not destroy(cloud, prefix, decline, silent, Data.DELETE) and len(find_kept(cloud, prefix)) == 4
    assert destroy(cloud, prefix, agree, silent, Data.DELETE)
    assert not find_kept(cloud, prefix)


def test_nothing_changes_without_consent(cloud: Cloud, prefix: str) -> None:
    assert deploy(cloud, prefix, {}, decline, silent) is None
    assert not find_kept(cloud, prefix)
    with pytest.raises(InputError, match="no stack"):
        read(cloud, prefix)
    assert deploy(cloud, prefix, {}, agree, silent)
    assert deploy(cloud, prefix, {"LogDays": "7"}, decline, silent) is None
    assert not destroy(cloud, prefix, decline, silent)
    assert read(cloud, prefix).parameters["LogDays"] == "30"


def test_a_deployment_that_stopped_half_way_goes_on(cloud: Cloud, prefix: str) -> None:
    """With the data back in a stack, and nothing else yet."""
    first = deploy(cloud, prefix, {}, agree, silent)
    assert first is not None and destroy(cloud, prefix, agree, silent)

    def only_import(changes: Sequence[Change]) -> bool:
        return {change.action for change in changes} == {"Import"}

    assert deploy(cloud, prefix, {}, only_import, silent) is None
    with pytest.raises(InputError, match="is not finished .IMPORT_COMPLETE.: run `spaceport aws deploy` again"):
        read(cloud, prefix)
    again = deploy(cloud, prefix, {}, agree, silent)
    assert again is not None and again.bucket == first.bucket


def test_an_update_changes_what_is_given_and_nothing_else(cloud: Cloud, prefix: str) -> None:
    assert deploy(cloud, prefix, {"WorkDays": "5"}, agree, silent)
    told: list[str] = []
    assert deploy(cloud, prefix, {}, agree, told.append)
    assert told == ["the stack is up to date"]
    changed = deploy(cloud, prefix, {"LogDays": "7"}, agree, silent)
    assert changed is not None and (changed.parameters["WorkDays"], changed.parameters["LogDays"]) == ("5", "7")
    groups = cloud.client("logs").describe_log_groups(logGroupNamePrefix=f"/aws/vendedlogs/states/{prefix}-")[
        "logGroups"
    ]
    assert [group["retentionInDays"] for group in groups] == [7, 7]


def test_logs_of_jobs_end_unless_somebody_has_said_when(cloud: Cloud) -> None:
    logs = cloud.client("logs")
    for name in stacks.JOB_LOGS:
        if not logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"]:
            logs.create_log_group(logGroupName=name)
    logs.put_retention_policy(logGroupName=stacks.JOB_LOGS[0], retentionInDays=365)
    logs.delete_retention_policy(logGroupName=stacks.JOB_LOGS[1])
    stacks.keep_job_logs(cloud, 30)
    found = [logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"][0] for name in stacks.JOB_LOGS]
    assert [group["retentionInDays"] for group in found] == [365, 30]


def made_by_another_version(cloud: Cloud, prefix: str, version: str) -> None:
    """A stack as this one would be, but of that version and without a dashboard."""
    body = json.loads(render(names_of(prefix, cloud.account_id, cloud.region), {}))
    body["Outputs"]["Version"]["Value"] = version
    del body["Resources"]["Dashboard"]
    body["Parameters"]["Colour"] = {"Type": "String", "Default": "red"}
    client = cloud.client("cloudformation")
    s3, bucket = cloud.client("s3"), f"templates-{prefix}"
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": cloud.region})
    s3.put_object(Bucket=bucket, Key="old.json", Body=json.dumps(body))
    client.create_stack(
        StackName=prefix,
        TemplateURL=f"{s3.meta.endpoint_url}/{bucket}/old.json",
        Parameters=[
            {"ParameterKey": "Prefix", "ParameterValue": prefix},
            {"ParameterKey": "WorkDays", "ParameterValue": "9"},
        ],
        Capabilities=["CAPABILITY_IAM"],
    )
    client.get_waiter("stack_create_complete").wait(StackName=prefix, WaiterConfig={"Delay": 1})


def test_a_newer_version_goes_over_an_older_stack(cloud: Cloud, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by_another_version(cloud, prefix, "1")
    monkeypatch.setattr(stacks, "VERSION", 2)
    with pytest.raises(InputError, match=f"{prefix} is of version 1, not 2: run `spaceport aws deploy`"):
        read(cloud, prefix)
    monkeypatch.setattr(stacks, "render", lambda *given: render(*given).replace('"Value":"1"', '"Value":"2"'))
    told: list[str] = []
    newer = deploy(cloud, prefix, {}, lambda changes: not told.extend(map(str, changes)), silent)  # type: ignore[func-returns-value]
    assert newer is not None and newer.outputs["Version"] == "2" and newer.parameters["WorkDays"] == "9"
    assert "add Dashboard (CloudWatch::Dashboard)" in told and "Colour" not in newer.parameters


def test_an_older_version_leaves_a_newer_stack_alone(cloud: Cloud, prefix: str) -> None:
    made_by_another_version(cloud, prefix, "2")
    for change in (lambda: read(cloud, prefix), lambda: deploy(cloud, prefix, {}, agree, silent)):
        with pytest.raises(InputError, match="of version 2, this installation of 1: pip install -U"):
            change()


def test_a_stack_of_somebody_else_is_left_alone(cloud: Cloud) -> None:
    body = {"Description": "A blog", "Resources": {"A": {"Type": "AWS::SNS::Topic"}}}
    cloud.client("cloudformation").create_stack(StackName="foreign", TemplateBody=json.dumps(body))
    cloud.client("cloudformation").get_waiter("stack_create_complete").wait(
        StackName="foreign", WaiterConfig={"Delay": 1}
    )
    for touch in (
        lambda: deploy(cloud, "foreign", {}, agree, silent),
        lambda: destroy(cloud, "foreign", agree, silent, Data.DELETE),
        lambda: read(cloud, "foreign"),
    ):
        with pytest.raises(InputError, match="not one of Spaceport's"):
            touch()
    assert cloud.client("cloudformation").describe_stack_resources(StackName="foreign")["StackResources"]


def test_a_bucket_that_is_gone_is_not_made_anew_under_a_stack(cloud: Cloud, prefix: str) -> None:
    made = deploy(cloud, prefix, {}, agree, silent)
    assert made is not None
    stacks._empty(cloud.client("s3"), made.bucket)
    cloud.client("s3").delete_bucket(Bucket=made.bucket)
    with pytest.raises(InputError, match=f"{made.bucket} is gone"):
        deploy(cloud, prefix, {}, agree, silent)


@pytest.mark.parametrize("change", [deploy, destroy])
def test_scenes_under_way_are_not_disturbed(cloud: Cloud, prefix: str, change: Callable[..., Any]) -> None:
    made = deploy(cloud, prefix, {}, agree, silent)
    assert made is not None
    states, machine = cloud.client("stepfunctions"), made.machines[0]
    waiting = {"StartAt": "W", "States": {"W": {"Type": "Wait", "Seconds": 3600, "End": True}}}
    states.update_state_machine(stateMachineArn=machine, definition=json.dumps(waiting))
    execution = states.start_execution(stateMachineArn=machine, name="a1")["executionArn"]
    arguments = (cloud, prefix, {"LogDays": "7"}) if change is deploy else (cloud, prefix)
    with pytest.raises(InputError, match="1 under way: a1; stop them, or give --drain"):
        change(*arguments, agree, silent)
    told = []

    def tell(line: str) -> None:
        told.append(line)
        if line == "waits for a1":
            states.stop_execution(executionArn=execution)

    assert change(*arguments, agree, tell, running=Running.DRAIN) and told[0] == "waits for a1"


def test_jobs_without_a_flow_are_under_way_too() -> None:
    cloud = stubbed()
    with stub(cloud, "stepfunctions") as states, stub(cloud, "sagemaker") as sagemaker:
        for _ in range(2):
            states.add_response("list_executions", {"executions": []})
        summary = {"TrainingJobArn": "arn:aws:sagemaker:x", "CreationTime": 0, "TrainingJobStatus": "InProgress"}
        names = ("spaceport-train-a1-0", "spaceport-two-train-a1-0", "my-spaceport-train-x")
        sagemaker.add_response(
            "list_training_jobs",
            {"TrainingJobSummaries": [{**summary, "TrainingJobName": name} for name in names]},
            {"NameContains": "spaceport", "StatusEquals": "InProgress"},
        )
        sagemaker.add_response("list_processing_jobs", {"ProcessingJobSummaries": []})
        outputs = [{"OutputKey": f"{name}Machine", "OutputValue": "arn"} for name in ("Scene", "Batch")]
        assert stacks._active(cloud, {"StackName": "spaceport", "Outputs": outputs}) == ["spaceport-train-a1-0"]


# What goes wrong


def stubbed() -> Cloud:
    return Cloud(boto3.Session("key", "secret", region_name="eu-central-1"))


def stub(cloud: Cloud, service: str) -> Stubber:
    return Stubber(cloud.client(service))


def described(status: str) -> dict[str, Any]:
    return {"Stacks": [{"StackName": "spaceport", "StackId": "id", "StackStatus": status, "CreationTime": 0}]}


@pytest.mark.parametrize("status", ["UPDATE_IN_PROGRESS", "DELETE_IN_PROGRESS", "UPDATE_COMPLETE_CLEANUP_IN_PROGRESS"])
def test_a_stack_that_somebody_else_changes(status: str) -> None:
    cloud = stubbed()
    with stub(cloud, "cloudformation") as client:
        client.add_response("describe_stacks", described(status))
        client.add_response("get_template_summary", {"Description": stacks.OURS})
        with pytest.raises(InputError, match=f"being changed by someone .{status}"):
            deploy(cloud, "spaceport", {}, agree, silent)


def test_a_stack_that_is_stuck() -> None:
    cloud = stubbed()
    event = {"StackId": "id", "StackName": "spaceport", "EventId": "1", "Timestamp": 0, "LogicalResourceId": "Bucket"}
    with stub(cloud, "cloudformation") as client:
        client.add_response("describe_stacks", described("DELETE_FAILED"))
        client.add_response("get_template_summary", {"Description": stacks.OURS})
        client.add_response(
            "describe_stack_events",
            {"StackEvents": [{**event, "ResourceStatus": "DELETE_FAILED", "ResourceStatusReason": "it is not empty"}]},
        )
        with pytest.raises(InputError, match="stuck .DELETE_FAILED.: Bucket: it is not empty; mend it"):
            deploy(cloud, "spaceport", {}, agree, silent)


def test_a_stack_that_was_never_finished_is_cleared_away(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, told = stubbed(), []
    with stub(cloud, "cloudformation") as client:
        client.add_response("delete_stack", {}, {"StackName": "id"})
        client.add_response("describe_stacks", described("DELETE_COMPLETE"))
        assert stacks._cleared(cloud, "spaceport", described("ROLLBACK_COMPLETE")["Stacks"][0], told.append) is None
        client.assert_no_pending_responses()
    assert told == ["removes what is left of a stack spaceport that was never finished"]


def test_why_a_change_failed_is_said(cloud: Cloud, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stack stays as it was."""
    assert deploy(cloud, prefix, {}, agree, silent)

    def broken(*given: Mapping[str, str]) -> str:
        body = json.loads(render(*given))
        body["Resources"]["Extra"] = {"Type": "AWS::KMS::Alias", "Properties": {"AliasName": "no", "TargetKeyId": "x"}}
        return json.dumps(body)

    with monkeypatch.context() as patch:
        patch.setattr(stacks, "render", broken)
        with pytest.raises(InputError, match="stayed as it was .UPDATE_ROLLBACK_COMPLETE.: Extra: "):
            deploy(cloud, prefix, {}, agree, silent)
    assert read(cloud, prefix).outputs["Version"] == "1"


def test_a_bucket_that_is_not_ours() -> None:
    cloud = stubbed()
    with stub(cloud, "sts") as sts, stub(cloud, "s3") as s3:
        sts.add_response("get_caller_identity", {"Account": "123456789012"})
        s3.add_client_error("head_bucket", "403", "Forbidden", http_status_code=403)
        with pytest.raises(InputError, match="spaceport-123456789012-eu-central-1: is not ours"):
            find_kept(cloud, "spaceport")


def client_error(code: str, message: str = "no") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "CreateChangeSet")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NoCredentialsError(), "no AWS credentials"),
        (TokenRetrievalError(provider="sso", error_msg="x"), "session has expired"),
        (EndpointConnectionError(endpoint_url="https://x"), "check the network and the region"),
        (BotoCoreError(), "AWS: "),
        (client_error("ExpiredToken"), "credentials have expired"),
        (client_error("InvalidClientTokenId"), "does not know these credentials"),
        (client_error("RequestTimeTooSkewed"), "clock is wrong"),
        (
            client_error("AccessDenied", "x is not authorized to perform: s3:PutObject on y"),
            "no permission for s3:PutObject",
        ),
        (client_error("AccessDenied"), "no permission for CreateChangeSet"),
        (client_error("Other", "two\nlines"), "CreateChangeSet: two"),
    ],
)
def test_errors_of_aws_in_a_line(error: Exception, line: str) -> None:
    with pytest.raises(InputError, match=line), explained():
        raise error


def test_regions_and_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no region"):
        connect()
    with pytest.raises(InputError, match="region mars-north-1"):
        connect("mars-north-1")
    with pytest.raises(InputError, match="profile nobody"):
        connect("eu-central-1", "nobody")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert connect().region == "us-west-2" and connect("eu-central-1").region == "eu-central-1"
