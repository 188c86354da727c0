"""What the CloudFormation template says, rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from policies import listed, statements

from spaceport_gs.errors import InputError
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


ALLOWED = [(name, statement) for name, statement in statements(RESOURCES) if statement["Effect"] == "Allow"]
TRUSTED = [(name, statement) for name, statement in ALLOWED if "Principal" in statement]


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
    denied = [(name, s["Condition"]) for name, s in statements(RESOURCES) if s["Effect"] == "Deny"]
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
