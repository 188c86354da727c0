"""The CloudFormation template: what it says, rule by rule, and what becomes of it in an account that is emulated here."""

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

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import stack as stacks
from spaceport_gs.pipeline.aws.cloud import Cloud, connect, explained
from spaceport_gs.pipeline.aws.contract import STAGES
from spaceport_gs.pipeline.aws.jobs import Account, Job
from spaceport_gs.pipeline.aws.stack import Change, Data, Running, deploy, destroy, find_kept, read
from spaceport_gs.pipeline.aws.template import KEPT, check, names_of, render, skeleton, template

RESOURCES: Mapping[str, Any] = template()["Resources"]
NAMES = names_of("spaceport", "123456789012", "eu-central-1")
OF_NO_RESOURCE = {
    "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "logs:CreateLogDelivery", "logs:GetLogDelivery",
    "logs:UpdateLogDelivery", "logs:DeleteLogDelivery", "logs:ListLogDeliveries", "logs:PutResourcePolicy",
    "logs:DescribeResourcePolicies", "logs:DescribeLogGroups",
}  # fmt: skip
"""Actions that IAM knows no resource for."""
WITHOUT_TAGS = {
    "AWS::KMS::Alias", "AWS::S3::BucketPolicy", "AWS::SNS::TopicPolicy", "AWS::SNS::Subscription", "AWS::SQS::QueuePolicy",
    "AWS::Logs::MetricFilter", "AWS::CloudWatch::Dashboard", "AWS::CloudFront::OriginAccessControl",
    "AWS::CloudFront::PublicKey", "AWS::CloudFront::KeyGroup", "AWS::Events::Rule",
}  # fmt: skip


def of_type(kind: str) -> dict[str, dict[str, Any]]:
    return {name: r.get("Properties", {}) for name, r in RESOURCES.items() if r["Type"] == f"AWS::{kind}"}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(value: Any = RESOURCES, of: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(resource, statement) of every policy, whatever condition it hangs on."""
    if isinstance(value, dict):
        if "Effect" in value:
            yield of, value
        for name, part in value.items():
            yield from statements(part, of or name)
    elif isinstance(value, list):
        for part in value:
            yield from statements(part, of)


ALLOWED = [(name, statement) for name, statement in statements() if statement["Effect"] == "Allow"]
TRUSTED = [(name, statement) for name, statement in ALLOWED if "Principal" in statement]


# ---- What it says ------------------------------------------------------------------------------------------------------------


def test_cfn_lint_has_nothing_to_say_of_the_kept_resources_alone() -> None:
    lint = pytest.importorskip("cfnlint.api", reason="cfn-lint is not installed").lint
    assert not [str(match) for match in lint(skeleton({**NAMES, "Key": "0a1b"}))]


@pytest.mark.parametrize("parameters", [{}, {"MonthlyBudget": "20"}])
def test_cfn_lint_has_nothing_to_say(parameters: dict[str, str]) -> None:
    lint = pytest.importorskip("cfnlint.api", reason="cfn-lint is not installed").lint
    helpers = pytest.importorskip("cfnlint.helpers")
    everywhere = [
        region for region in helpers.REGIONS if re.fullmatch(r"(af|ap|ca|eu|il|me|mx|sa|us)-[a-z]+-\d", region)
    ]
    regions = ["us-east-1", "eu-central-1"] if parameters else [r for r in everywhere if "-gov-" not in r]
    found = lint(render(NAMES, parameters), regions=regions)
    assert not [str(match) for match in found] and len(regions) > 1


def test_it_fits() -> None:
    """CloudFormation takes a megabyte from a bucket, 500 resources, 200 outputs; Step Functions a megabyte."""
    assert len(render(NAMES, {}).encode()) < 1_000_000 and len(RESOURCES) < 500
    for machine in of_type("StepFunctions::StateMachine").values():
        assert len(machine["DefinitionString"]) < 1_000_000


@pytest.mark.parametrize("name", ["SceneMachine", "BatchMachine"])
def test_flows_are_in_it_and_every_placeholder_has_a_value(name: str) -> None:
    machine = of_type("StepFunctions::StateMachine")[name]
    definition = json.loads(machine["DefinitionString"])
    assert definition["StartAt"] in definition["States"]
    assert set(re.findall(r"\$\{(\w+)\}", machine["DefinitionString"])) == set(machine["DefinitionSubstitutions"])
    logging = machine["LoggingConfiguration"]
    assert logging["IncludeExecutionData"] is False and logging["Level"] == "ERROR"


def test_no_action_is_a_wildcard() -> None:
    """But for the account's own right to its key, without which nobody could manage it."""
    wild = [(name, s.get("Sid")) for name, s in ALLOWED if any("*" in action for action in listed(s["Action"]))]
    assert wild == [("Key", "Account")]


def test_no_resource_is_a_wildcard_where_a_name_can_stand() -> None:
    for name, statement in ALLOWED:
        if "*" in listed(statement.get("Resource", [])) and name != "Key":  # in a key's own policy it means the key
            assert set(listed(statement["Action"])) <= OF_NO_RESOURCE, name


def test_nothing_is_open_to_everybody() -> None:
    for name, statement in TRUSTED:
        principal = statement["Principal"]
        assert isinstance(principal, dict) and not {"*"} & {str(p) for v in principal.values() for p in listed(v)}, name
        if principal.get("Service") == "events.amazonaws.com" and name in ("TopicPolicy", "Key"):
            assert "Condition" not in statement  # which EventBridge cannot meet, with topics and keys
        elif "Service" in principal:
            keys = {key.lower() for test in statement["Condition"].values() for key in test}
            assert keys & {"aws:sourceaccount", "aws:sourcearn", "kms:encryptioncontext:aws:logs:arn"}, name


def test_roles_have_no_policies_of_others_and_are_passed_to_one_service() -> None:
    roles = of_type("IAM::Role")
    assert set(roles) == {"SfmRole", "TrainRole", "CompressRole", "SceneRole", "BatchRole"}
    assert not any("ManagedPolicyArns" in role for role in roles.values())
    passed = [(name, s) for name, s in ALLOWED if "iam:PassRole" in listed(s["Action"])]
    assert [name for name, _ in passed] == ["SceneRole"]
    assert passed[0][1]["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert len(passed[0][1]["Resource"]) == 3
    assert not [
        name for name, s in ALLOWED if any(a.startswith("iam:") and a != "iam:PassRole" for a in listed(s["Action"]))
    ]


def test_a_job_pulls_the_images_that_its_stage_runs_in_and_no_other() -> None:
    """Compression runs in that of the training, too, where there is a GPU."""
    pulled = {
        name: [repository["Fn::GetAtt"] for repository in listed(s["Resource"])]
        for name, s in ALLOWED
        if "ecr:BatchGetImage" in listed(s["Action"])
    }
    sfm, train, compress = ([f"{stage}Repository", "Arn"] for stage in ("Sfm", "Train", "Compress"))
    assert pulled == {"SfmRole": [sfm], "TrainRole": [train], "CompressRole": [compress, train]}


def test_step_functions_may_make_its_rules() -> None:
    """Else `.sync` fails, and only in a real account."""
    rules = {
        name: [arn["Fn::Sub"].rpartition("/")[2] for arn in listed(statement["Resource"])]
        for name, statement in ALLOWED
        if "events:PutRule" in listed(statement["Action"])
    }
    assert rules == {
        "SceneRole": [
            "StepFunctionsGetEventsForSageMakerTrainingJobsRule",
            "StepFunctionsGetEventsForSageMakerProcessingJobsRule",
        ],
        "BatchRole": ["StepFunctionsGetEventsForStepFunctionsExecutionRule"],
    }


CALLS = {
    "sagemaker:createTrainingJob.sync": (
        "sagemaker:CreateTrainingJob", "sagemaker:DescribeTrainingJob", "sagemaker:StopTrainingJob", "sagemaker:AddTags",
    ),
    "sagemaker:createProcessingJob.sync": (
        "sagemaker:CreateProcessingJob", "sagemaker:DescribeProcessingJob", "sagemaker:StopProcessingJob", "sagemaker:AddTags",
    ),
    "aws-sdk:s3:getObject": ("s3:GetObject", "s3:ListBucket"),
    "s3:getObject": ("s3:GetObject", "s3:ListBucket"),
    "aws-sdk:s3:copyObject": ("s3:GetObject", "s3:PutObject"),
    "aws-sdk:s3:putObject": ("s3:PutObject",),
    "s3:putObject": ("s3:PutObject", "s3:AbortMultipartUpload"),
    "sns:publish": ("sns:Publish",),
    "aws-sdk:sfn:describeMapRun": ("states:DescribeMapRun",),
    "aws-sdk:sfn:sendTaskFailure.waitForTaskToken": ("states:SendTaskFailure",),
    "states:startExecution.sync:2": (
        "states:StartExecution", "states:DescribeExecution", "states:StopExecution", "events:PutRule", "events:PutTargets",
        "events:DescribeRule",
    ),
}  # fmt: skip
"""What Step Functions has to be allowed for an integration."""


@pytest.mark.parametrize(("machine", "role"), [("SceneMachine", "SceneRole"), ("BatchMachine", "BatchRole")])
def test_a_flow_may_do_what_its_definition_calls(machine: str, role: str) -> None:
    definition = of_type("StepFunctions::StateMachine")[machine]["DefinitionString"]
    called = set(re.findall(r'"arn:aws:states:::([^"]+)"', definition))
    allowed = {action for name, s in ALLOWED if name == role for action in listed(s["Action"])}
    assert called and {action for call in called for action in CALLS[call]} <= allowed


def test_a_flow_fails_no_task_but_its_own() -> None:
    machines = {
        name: s["Resource"]["Fn::Sub"].rpartition(":")[2]
        for name, s in ALLOWED
        if "states:SendTaskFailure" in listed(s["Action"])
    }
    assert machines == {"SceneRole": "${Prefix}-scene"}
    assert RESOURCES["SceneMachine"]["Properties"]["StateMachineName"] == {"Fn::Sub": machines["SceneRole"]}


def test_data_is_encrypted_and_closed() -> None:
    bucket = RESOURCES["Bucket"]["Properties"]
    rule = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == {"Ref": "Encryption"}
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert bucket["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    denied = [(name, s["Condition"]) for name, s in statements() if s["Effect"] == "Deny"]
    assert ("BucketPolicy", {"Bool": {"aws:SecureTransport": "false"}}) in denied
    assert ("TopicPolicy", {"Bool": {"aws:SecureTransport": "false"}}) in denied
    for name, property in (("Topic", "KmsMasterKeyId"), ("SceneLogs", "KmsKeyId"), ("BatchLogs", "KmsKeyId")):
        assert RESOURCES[name]["Properties"][property]["Fn::If"][0] == "HasKey"
    for queue in of_type("SQS::Queue").values():
        assert queue["SqsManagedSseEnabled"]["Fn::If"][2] is True and queue["KmsMasterKeyId"]["Fn::If"][0] == "HasKey"
    assert RESOURCES["Key"]["Properties"]["EnableKeyRotation"] is True


def test_every_class_of_data_has_its_end() -> None:
    """Published scenes, jobs' records and photos stay."""
    rules = {rule["Id"]: rule for rule in RESOURCES["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]}
    ends = {rule["Prefix"] for rule in rules.values() if "ExpirationInDays" in rule}
    assert ends == {"work/", "batches/", "checkpoints/"}
    assert rules["photos"]["Prefix"] == "inputs/" and "ExpirationInDays" not in rules["photos"]
    assert rules["superseded"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    assert rules["uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}
    assert all(rule["Status"] == "Enabled" for rule in rules.values())


def test_what_users_put_in_outlives_the_stack() -> None:
    kept = {name for name, resource in RESOURCES.items() if resource.get("DeletionPolicy") == "RetainExceptOnCreate"}
    assert kept == set(KEPT) == {name for name, r in RESOURCES.items() if r.get("UpdateReplacePolicy") == "Retain"}
    for repository in of_type("ECR::Repository").values():
        assert (
            repository["ImageTagMutability"] == "IMMUTABLE" and repository["ImageScanningConfiguration"]["ScanOnPush"]
        )
        rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
        assert [rule["selection"]["tagStatus"] for rule in rules] == ["untagged", "any"]


def test_everything_is_tagged() -> None:
    wanted = [{"Key": "Project", "Value": "spaceport"}, {"Key": "Stack", "Value": {"Ref": "Prefix"}}]
    for name, resource in RESOURCES.items():
        if resource["Type"] not in WITHOUT_TAGS:
            properties = resource["Properties"]
            assert properties.get("Tags", properties.get("ResourceTags")) == wanted, name


def test_logs_end() -> None:
    for group in of_type("Logs::LogGroup").values():
        assert group["RetentionInDays"] == {"Ref": "LogDays"}
        assert group["LogGroupName"]["Fn::Sub"].startswith("/aws/vendedlogs/states/${Prefix}-")


def test_alarms_reach_somebody() -> None:
    alarms = of_type("CloudWatch::Alarm")
    assert {alarm["MetricName"] for alarm in alarms.values()} == {
        "ExecutionsFailed", "ExecutionsTimedOut", "ExecutionThrottled", "ApproximateNumberOfMessagesVisible", "Stalled", "Late",
    }  # fmt: skip
    for alarm in alarms.values():
        assert alarm["AlarmActions"] == [{"Ref": "Topic"}] and alarm["TreatMissingData"] == "notBreaching"
        assert alarm["AlarmName"]["Fn::Sub"].startswith("${Prefix}-")  # which the topic's policy goes by
    notes = RESOURCES["Budget"]["Properties"]["NotificationsWithSubscribers"]
    assert [note["Notification"]["Threshold"] for note in notes] == [80, 100]
    for rule in of_type("Events::Rule").values():
        assert all("DeadLetterConfig" in target for target in rule["Targets"])
        assert rule["Name"]["Fn::Sub"].startswith("${Prefix}-")


def test_scenes_are_private_until_somebody_says_otherwise() -> None:
    assert template()["Parameters"]["Publishing"]["Default"] == "none"
    config = RESOURCES["Distribution"]["Properties"]["DistributionConfig"]
    behaviour, origin = config["DefaultCacheBehavior"], config["Origins"][0]
    assert behaviour["ViewerProtocolPolicy"] == "https-only" and behaviour["AllowedMethods"] == ["GET", "HEAD"]
    assert behaviour["TrustedKeyGroups"] == {"Fn::If": ["IsSigned", [{"Ref": "Signers"}], {"Ref": "AWS::NoValue"}]}
    assert origin["OriginPath"] == "/published" and "OriginAccessControlId" in origin
    published = [s for name, s in TRUSTED if name == "BucketPolicy"]
    assert [s["Resource"] for s in published] == [{"Fn::Sub": "${Bucket.Arn}/published/*"}]


def test_the_dashboard_is_json() -> None:
    body = RESOURCES["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    assert {widget["type"] for widget in json.loads(body)["widgets"]} == {"text", "metric", "log"}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"Prefix": "S"}, "2 to 20 lower-case"),
        ({"Prefix": 21 * "a"}, "2 to 20 lower-case"),
        ({"Prefix": "ab\n"}, "2 to 20 lower-case"),
        ({"Encryption": "none"}, "choose AES256, aws:kms"),
        ({"Email": "nobody"}, "does not look like"),
        ({"WebHook": "http://example.org"}, "does not look like"),
        ({"LogDays": "31"}, "choose 1, 3"),
        ({"WorkDays": "0"}, "expected 1 to 3650"),
        ({"WorkDays": "a month"}, "whole number"),
        ({"MonthlyBudget": "-1"}, "whole number"),
        ({"Publishing": "signed"}, "give PublicKey"),
        ({"Colour": "red"}, "no such parameter"),
    ],
)
def test_wrong_parameters(parameters: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check(parameters)
    check({"Prefix": "spaceport", "Email": "", "LogDays": "30", "Publishing": "public"})


# ---- What becomes of it ------------------------------------------------------------------------------------------------------


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


# ---- What goes wrong ---------------------------------------------------------------------------------------------------------


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
