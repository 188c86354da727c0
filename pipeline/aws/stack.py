"""The stack in an account and a region: made, changed, read and removed. What users put into it outlives it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.jobs import Account
from spaceport_gs.pipeline.aws.template import KEPT, check, names_of, render, skeleton, template

VERSION = 1
"""Of what command line and stack expect of each other; the template's output Version."""
OURS = "Spaceport GS"  # begins the description of every stack of ours
POLL_SECONDS = 5.0
KEY_DAYS = 30  # until a key that is to be deleted is gone
JOB_LOGS = ("/aws/sagemaker/ProcessingJobs", "/aws/sagemaker/TrainingJobs")
NOTHING_CHANGED = ("didn't contain changes", "No updates are to be performed")


class Running(Enum):
    """What happens to scenes and batches under way when their stack is to change."""

    REFUSE = "refuse"
    DRAIN = "drain"
    """Wait until they are done."""


class Data(Enum):
    """What happens to photos, scenes and images when their stack goes."""

    KEEP = "keep"
    DELETE = "delete"


@dataclass(frozen=True)
class Change:
    """Of one resource."""

    action: str
    """Add, Modify, Remove, Import or Keep."""
    name: str
    """In the template."""
    type: str
    is_replaced: str = ""
    """True, False or Conditional, as CloudFormation says it."""

    def __str__(self) -> str:
        replaced = {"True": ", replaced", "Conditional": ", perhaps replaced"}.get(self.is_replaced, "")
        return f"{self.action.lower()} {self.name} ({self.type.removeprefix('AWS::')}{replaced})"


Confirm = Callable[[Sequence[Change]], bool]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Stack:
    """What a stack says of itself."""

    prefix: str
    region: str
    outputs: Mapping[str, str]
    parameters: Mapping[str, str]

    def account(self, stage: str) -> Account:
        """Where the jobs of a stage run."""
        role = self.outputs[f"{stage.capitalize()}Role"]
        return Account(self.bucket, role, self.outputs.get("KeyArn", ""), self.prefix)

    def repository(self, stage: str) -> str:
        """Of the images of a stage, without a tag."""
        return self.outputs[f"{stage.capitalize()}Repository"]

    @property
    def bucket(self) -> str:
        return self.outputs["Bucket"]

    @property
    def account_id(self) -> str:
        """Of whom it belongs to."""
        return self.outputs["SfmRole"].split(":")[4]

    @property
    def machines(self) -> tuple[str, str]:
        """ARNs of the flows of one scene and of many."""
        return self.outputs["SceneMachine"], self.outputs["BatchMachine"]

    @property
    def site(self) -> str:
        """Where scenes are read; `s3://…` unless they are on the web."""
        return self.outputs["Site"]


@explained()
def read(cloud: Cloud, prefix: str) -> Stack:
    """InputError unless there is a stack of this version, ready for jobs."""
    found = _existing(cloud, prefix)
    if found is None:
        raise InputError(f"no stack {prefix} in {cloud.region}: run `spaceport aws deploy`, or name its region")
    version = _version_of(found)
    if version == 0:
        raise InputError(
            f"the stack {prefix} is not finished ({found['StackStatus']}): run `spaceport aws deploy` again"
        )
    if version < VERSION:
        raise InputError(f"the stack {prefix} is of version {version}, not {VERSION}: run `spaceport aws deploy`")
    _refuse_newer(prefix, version)
    return Stack(prefix, cloud.region, _outputs_of(found), _parameters_of(found))


@explained()
def deploy(
    cloud: Cloud,
    prefix: str,
    parameters: Mapping[str, str],
    confirm: Confirm,
    tell: Tell,
    running: Running = Running.REFUSE,
) -> Stack | None:
    """Makes the stack or brings it up to date: `parameters` that are not given stay as they are. None if `confirm`, which is
    shown each change set, says no: then nothing has changed, but data that was kept may have come back to the stack.
    """
    check({**parameters, "Prefix": prefix})
    found = _cleared(cloud, prefix, _existing(cloud, prefix), tell)
    version = 0 if found is None else _version_of(found)
    _refuse_newer(prefix, version)
    if found is not None:
        _settle(cloud, found, running, tell)
    kept = find_kept(cloud, prefix)
    known = template()["Parameters"]  # a stack of an older version may have others
    before = _parameters_of(found) if found else {}
    wanted = {name: value for name, value in before.items() if name in known} | {**parameters, "Prefix": prefix}
    if "Key" in kept and wanted.setdefault("Encryption", "aws:kms") != "aws:kms":
        raise InputError("Encryption AES256: what is in the bucket can only be read with the stack's key; keep aws:kms")
    check(wanted)
    if found is None and kept:
        if not _apply(cloud, prefix, _Wanted({"TemplateBody": skeleton(kept)}, imports=kept), confirm, tell):
            return None
    names = names_of(prefix, cloud.account_id, cloud.region)
    bucket = names["Bucket"]
    if "Bucket" not in kept:  # it has to be there before the template, which is too long for a request
        if version:
            raise InputError(
                f"{bucket} is gone, and with it what the stack {prefix} needs: destroy it and deploy again"
            )
        with_bucket = skeleton({**kept, "Bucket": bucket})
        if not _apply(cloud, prefix, _Wanted({"TemplateBody": with_bucket}), confirm, tell):
            return None

    def agreed(changes: Sequence[Change]) -> bool:
        if is_wanted := confirm(changes):
            keep_job_logs(cloud, int(wanted.get("LogDays", known["LogDays"]["Default"])))
        return is_wanted

    address = _uploaded(cloud, bucket, render(names, wanted))
    is_done = _apply(cloud, prefix, _Wanted({"TemplateURL": address}, wanted), agreed, tell)
    return read(cloud, prefix) if is_done else None


@explained()
def destroy(
    cloud: Cloud, prefix: str, confirm: Confirm, tell: Tell, data: Data = Data.KEEP, running: Running = Running.REFUSE
) -> bool:
    """Removes the stack, and the data with it only if that is said. False if `confirm` says no."""
    found = _existing(cloud, prefix)
    kept = find_kept(cloud, prefix)
    if found is None and not (kept and data is Data.DELETE):
        raise InputError(f"no stack {prefix} in {cloud.region}" + (", only data that was kept" if kept else ""))
    if found is not None:
        _refuse_busy(prefix, found)
        _settle(cloud, found, running, tell)
    if not confirm(_removals(cloud, found, kept, data)):
        return False
    if found is not None:
        _settle(cloud, found, running, tell)  # while the user thought about it
        cloud.client("cloudformation").delete_stack(StackName=found["StackId"])
        if (status := _wait(cloud, found["StackId"], tell)) != "DELETE_COMPLETE":
            raise InputError(f"the stack {prefix} is still there ({status}): {_reasons(cloud, found['StackId'])}")
    if data is Data.DELETE:
        _delete(cloud, kept, tell)
    elif kept:
        tell(f"kept, and paid for: {', '.join(kept.values())}")
    return True


def find_kept(cloud: Cloud, prefix: str) -> dict[str, str]:
    """Data of this prefix that is there, in a stack or not: what tells it from other data, by its name in the template."""
    names = names_of(prefix, cloud.account_id, cloud.region)
    bucket, found = names["Bucket"], dict[str, str]()
    if _there(cloud.client("s3").head_bucket, Bucket=bucket, ExpectedBucketOwner=cloud.account_id):
        found["Bucket"] = bucket
        rules = cloud.client("s3").get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        if key := _key_of_ours(cloud, prefix, rules[0]["ApplyServerSideEncryptionByDefault"].get("KMSMasterKeyID", "")):
            found["Key"] = key
    for name, repository in names.items():
        if name != "Bucket" and _there(cloud.client("ecr").describe_repositories, repositoryNames=[repository]):
            found[name] = repository
    return found


def _key_of_ours(cloud: Cloud, prefix: str, arn: str) -> str:
    """The id of a bucket's key; empty if it has none that a stack of this prefix made."""
    if not arn:
        return ""
    tags = cloud.client("kms").list_resource_tags(KeyId=arn)["Tags"]
    if {"TagKey": "Stack", "TagValue": prefix} not in tags:
        return ""
    key = cloud.client("kms").describe_key(KeyId=arn)["KeyMetadata"]
    if key["KeyState"] == "PendingDeletion":
        raise InputError(f"the key {arn} of the bucket is to be deleted: call it back, in the console of KMS")
    return str(key["KeyId"])


def keep_job_logs(cloud: Cloud, days: int) -> None:
    """Makes the groups that SageMaker writes to, where they are missing, and lets logs expire where nobody has said when.

    They belong to the account, not to a stack; left alone, SageMaker makes them and keeps logs for ever.
    """
    logs = cloud.client("logs")
    for name in JOB_LOGS:
        try:
            logs.create_log_group(logGroupName=name)
        except logs.exceptions.ResourceAlreadyExistsException:
            pass
        groups = logs.describe_log_groups(logGroupNamePrefix=name)["logGroups"]
        if not any(group["logGroupName"] == name and "retentionInDays" in group for group in groups):
            logs.put_retention_policy(logGroupName=name, retentionInDays=days)


def _described(cloud: Cloud, name: str) -> dict[str, Any] | None:
    try:
        return dict(cloud.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0])
    except ClientError as error:
        if code_of(error) == "ValidationError" and "does not exist" in str(error):
            return None
        raise


def _existing(cloud: Cloud, prefix: str) -> dict[str, Any] | None:
    """The stack of this name, if it is more than a change set that nobody carried out; InputError if it is not ours."""
    found = _described(cloud, prefix)
    if found is None or found["StackStatus"] == "REVIEW_IN_PROGRESS":
        return None
    summary = cloud.client("cloudformation").get_template_summary(StackName=found["StackId"])
    if not summary.get("Description", "").startswith(OURS):
        raise InputError(f"the stack {prefix} is not one of Spaceport's; choose another --prefix")
    return found


def _outputs_of(found: Mapping[str, Any]) -> dict[str, str]:
    return {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])}


def _parameters_of(found: Mapping[str, Any]) -> dict[str, str]:
    return {entry["ParameterKey"]: entry["ParameterValue"] for entry in found.get("Parameters", [])}


def _version_of(found: Mapping[str, Any]) -> int:
    """0: it has none, because it was never finished."""
    return int(_outputs_of(found).get("Version", "0"))


def _refuse_newer(prefix: str, version: int) -> None:
    if version > VERSION:
        raise InputError(
            f"the stack {prefix} is of version {version}, this installation of {VERSION}: pip install -U spaceport-gs"
        )


def _refuse_busy(prefix: str, found: Mapping[str, Any]) -> None:
    status = found["StackStatus"]
    if status.endswith("_IN_PROGRESS"):
        raise InputError(f"the stack {prefix} is being changed by someone ({status}): wait until that is done")


def _cleared(cloud: Cloud, prefix: str, found: dict[str, Any] | None, tell: Tell) -> dict[str, Any] | None:
    """The stack to change; None if one is to be made. What is left of one that was never made is removed."""
    if found is None:
        return None
    _refuse_busy(prefix, found)
    status = found["StackStatus"]
    if status in ("UPDATE_ROLLBACK_FAILED", "DELETE_FAILED"):
        raise InputError(
            f"the stack {prefix} is stuck ({status}): {_reasons(cloud, found['StackId'])}; mend it in the console"
        )
    if status not in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED"):
        return found
    tell(f"removes what is left of a stack {prefix} that was never finished")
    cloud.client("cloudformation").delete_stack(StackName=found["StackId"])
    _wait(cloud, found["StackId"], tell)
    return None


def _settle(cloud: Cloud, found: Mapping[str, Any], running: Running, tell: Tell) -> None:
    """Returns when nothing of this stack runs any more."""
    while active := _active(cloud, found):
        names = ", ".join(active[:5]) + (f" and {len(active) - 5} more" if len(active) > 5 else "")
        if running is Running.REFUSE:
            raise InputError(f"{len(active)} under way: {names}; stop them, or give --drain to wait for them")
        tell(f"waits for {names}")
        time.sleep(POLL_SECONDS)


def _active(cloud: Cloud, found: Mapping[str, Any]) -> list[str]:
    """Executions that run, and jobs without one: these go on, and cost, after a flow was stopped."""
    outputs = _outputs_of(found)
    states, sagemaker = cloud.client("stepfunctions"), cloud.client("sagemaker")
    active = []
    for machine in ("SceneMachine", "BatchMachine"):
        if machine in outputs:
            pages = states.get_paginator("list_executions").paginate(
                stateMachineArn=outputs[machine], statusFilter="RUNNING"
            )
            active += [execution["name"] for page in pages for execution in page["executions"]]
    if active or not outputs:
        return active
    for kind, stages in (("training", ("train",)), ("processing", ("sfm", "compress"))):
        pages = sagemaker.get_paginator(f"list_{kind}_jobs").paginate(
            NameContains=found["StackName"], StatusEquals="InProgress"
        )
        name, begins = f"{kind.capitalize()}Job", tuple(f"{found['StackName']}-{stage}-" for stage in stages)
        jobs = [job[f"{name}Name"] for page in pages for job in page[f"{name}Summaries"]]
        active += [job for job in jobs if job.startswith(begins)]
    return active


def _uploaded(cloud: Cloud, bucket: str, body: str) -> str:
    """Address of a template in the bucket."""
    key = f"deploy/{hashlib.sha256(body.encode()).hexdigest()[:16]}.json"
    s3 = cloud.client("s3")
    s3.put_object(Bucket=bucket, Key=key, Body=body.encode(), ContentType="application/json")
    return f"{s3.meta.endpoint_url}/{bucket}/{key}"


@dataclass(frozen=True)
class _Wanted:
    """What a stack is to become."""

    source: Mapping[str, str]
    """TemplateBody or TemplateURL."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    imports: Mapping[str, str] = field(default_factory=dict)
    """Resources that are there already, and nothing else is to change."""


def _apply(cloud: Cloud, prefix: str, wanted: _Wanted, confirm: Confirm, tell: Tell) -> bool:
    """Makes the stack so. False if `confirm` does not want that."""
    client = cloud.client("cloudformation")
    changes = _change_set(cloud, prefix, wanted)
    if changes["Status"] != "FAILED" and confirm([_change_of(change) for change in changes["Changes"]]):
        client.execute_change_set(ChangeSetName=changes["ChangeSetId"])
        status = _wait(cloud, changes["StackId"], tell)
        if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "IMPORT_COMPLETE"):
            raise InputError(f"the stack {prefix} stayed as it was ({status}): {_reasons(cloud, changes['StackId'])}")
        return True
    client.delete_change_set(ChangeSetName=changes["ChangeSetId"])
    found = _described(cloud, changes["StackId"])
    if found and found["StackStatus"] == "REVIEW_IN_PROGRESS":
        client.delete_stack(StackName=changes["StackId"])
    if changes["Status"] != "FAILED":
        return False
    if any(text in changes["StatusReason"] for text in NOTHING_CHANGED):
        tell("the stack is up to date")
        return True
    raise InputError(f"the stack {prefix} cannot become so: {changes['StatusReason']}")


def _change_set(cloud: Cloud, prefix: str, wanted: _Wanted) -> dict[str, Any]:
    """Described, once CloudFormation has made up its mind."""
    client = cloud.client("cloudformation")
    identified = [
        {
            "ResourceType": template()["Resources"][name]["Type"],
            "LogicalResourceId": name,
            "ResourceIdentifier": {KEPT[name]: identifier},
        }
        for name, identifier in wanted.imports.items()
    ]
    tags = [{"Key": "Project", "Value": "spaceport"}, {"Key": "Stack", "Value": prefix}]
    made = client.create_change_set(
        StackName=prefix,
        ChangeSetName=f"spaceport-{time.time_ns()}",
        ChangeSetType="IMPORT" if identified else "UPDATE" if _existing(cloud, prefix) else "CREATE",
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in wanted.parameters.items()],
        **wanted.source,
        **({"ResourcesToImport": identified} if identified else {"Tags": tags}),  # an import may not add tags
    )
    named = {"ChangeSetName": made["Id"], "StackName": made["StackId"]}
    found = client.describe_change_set(**named)
    while found["Status"] in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
        time.sleep(POLL_SECONDS)
        found = client.describe_change_set(**named)
    while token := found.get("NextToken"):
        more = client.describe_change_set(**named, NextToken=token)
        found = {**more, "Changes": found["Changes"] + more["Changes"]}
    return dict(found)


def _change_of(entry: Mapping[str, Any]) -> Change:
    change = entry["ResourceChange"]
    return Change(change["Action"], change["LogicalResourceId"], change["ResourceType"], change.get("Replacement", ""))


def _wait(cloud: Cloud, stack_id: str, tell: Tell) -> str:
    """The status that a stack comes to."""
    told = ""
    while True:
        found = _described(cloud, stack_id)
        status = "DELETE_COMPLETE" if found is None else str(found["StackStatus"])
        if status == "REVIEW_IN_PROGRESS" or not status.endswith("_IN_PROGRESS"):
            return status
        if status != told:
            tell(f"CloudFormation: {status}")
            told = status
        time.sleep(POLL_SECONDS)


def _reasons(cloud: Cloud, stack_id: str) -> str:
    """What CloudFormation last said went wrong, and not in consequence of something else."""
    events = cloud.client("cloudformation").describe_stack_events(StackName=stack_id)["StackEvents"]
    reasons = [
        f"{event['LogicalResourceId']}: {event['ResourceStatusReason']}"
        for event in events
        if event["ResourceStatus"].endswith("_FAILED")
        and "cancelled" not in event.get("ResourceStatusReason", "cancelled")
    ]
    return "; ".join(reversed(reasons[:3])) or "CloudFormation names no reason"


def _removals(cloud: Cloud, found: Mapping[str, Any] | None, kept: Mapping[str, str], data: Data) -> list[Change]:
    types = {name: template()["Resources"][name]["Type"] for name in kept}
    if found is not None:
        pages = (
            cloud.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=found["StackId"])
        )
        for page in pages:
            types |= {entry["LogicalResourceId"]: entry["ResourceType"] for entry in page["StackResourceSummaries"]}
    return [
        Change("Keep" if name in KEPT and data is Data.KEEP else "Remove", name, kind) for name, kind in types.items()
    ]


def _there(ask: Callable[..., Any], **named: Any) -> bool:
    try:
        ask(**named)
    except ClientError as error:
        if code_of(error) in ("404", "NoSuchBucket", "RepositoryNotFoundException"):
            return False
        if code_of(error) == "403":
            raise InputError(f"{next(iter(named.values()))}: is not ours, or may not be read") from error
        raise
    return True


@explained()
def check_bucket(cloud: Cloud, stack: Stack) -> None:
    """InputError if the stack's bucket has gone, or has been made anew by another account, who would get what is sent there."""
    if not _there(cloud.client("s3").head_bucket, Bucket=stack.bucket, ExpectedBucketOwner=stack.account_id):
        raise InputError(f"{stack.bucket} is gone, and with it what the stack {stack.prefix} needs: destroy it and deploy again")  # fmt: skip


def _delete(cloud: Cloud, kept: Mapping[str, str], tell: Tell) -> None:
    s3, ecr = cloud.client("s3"), cloud.client("ecr")
    if bucket := kept.get("Bucket"):
        tell(f"empties {bucket}")
        _empty(s3, bucket)
        s3.delete_bucket(Bucket=bucket)
    for name in KEPT:
        if name.endswith("Repository") and name in kept:
            ecr.delete_repository(repositoryName=kept[name], force=True)
    if key := kept.get("Key"):
        cloud.client("kms").schedule_key_deletion(KeyId=key, PendingWindowInDays=KEY_DAYS)
        tell(f"the key {key} goes in {KEY_DAYS} days, and may be called back until then")


def _empty(s3: Any, bucket: str) -> None:
    """Every version of every object, and what was never uploaded to the end."""
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
        versions = page.get("Versions", []) + page.get("DeleteMarkers", [])
        objects = [{"Key": entry["Key"], "VersionId": entry["VersionId"]} for entry in versions]
        if objects:
            done = s3.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
            if failed := done.get("Errors"):
                raise InputError(f"{failed[0]['Key']} stays in {bucket}: {failed[0]['Message']}")
    for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket):
        for upload in page.get("Uploads", []):
            s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
