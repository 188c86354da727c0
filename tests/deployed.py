"""The state machines as a stack deploys them, on the interpreter, and services that do what they are asked for at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import ClientError
from interpreter import REGION, Handler, Interpreter, TaskError, client_of, create, execute, interpreter

from spaceport_gs.pipeline.aws.flow import MACHINES, definition

BUCKET, ARN = "data-of-ours", "arn:aws:{}:eu-central-1:123456789012:{}"
ROLES = {stage: f"arn:aws:iam::123456789012:role/{stage}" for stage in ("sfm", "train", "compress")}
VALUES = {
    "Prefix": "spaceport",
    "Bucket": BUCKET,
    "Topic": ARN.format("sns", "spaceport"),
    "Site": "https://scenes.example",
    "SceneMachine": ARN.format("states", "stateMachine:spaceport-scene"),
    **{f"{stage.capitalize()}Role": role for stage, role in ROLES.items()},
}
IMAGES = {
    stage: f"123456789012.dkr.ecr.eu-central-1.amazonaws.com/spaceport/{stage}@sha256:{64 * 'a'}" for stage in ROLES
}
JOBS = {"Sfm": "sfm", "TrainSpot": "train", "Train": "train", "Compress": "compress"}
"""Stage of each state that starts jobs."""


def described(request: Mapping[str, Any], status: str, said: Mapping[str, str]) -> dict[str, Any]:
    """What SageMaker says of a job: what was asked, and what became of it."""
    kind = "Training" if "TrainingJobName" in request else "Processing"
    name = request[f"{kind}JobName"]
    answer = {
        **{key: value for key, value in request.items() if key != "Tags"},
        f"{kind}JobArn": ARN.format("sagemaker", f"{kind.lower()}-job/{name}"),
        f"{kind}JobStatus": status,
        "CreationTime": 1795856400000,
        **said,
    }
    if kind == "Training":
        answer.setdefault("SecondaryStatus", status)
        answer["ModelArtifacts"] = {
            "S3ModelArtifacts": f"{request['OutputDataConfig']['S3OutputPath']}/{name}/output/model.tar.gz"
        }
    return answer


def ended(status: str = "Completed", **said: str) -> Handler:
    """A job whose end is no error."""
    return lambda request, attempt: described(request, status, said)


def s3(operation: str, client: Any = None) -> Handler:
    """The operation on moto's S3, or on another one, as Step Functions calls it: moto's own way of it knows no bodies."""

    def handler(request: dict[str, Any], attempt: int) -> Any:
        body = {"Body": json.dumps(request["Body"]).encode()} if "Body" in request else {}
        try:
            answer = getattr(client or client_of("s3"), operation)(**{**request, **body})
        except ClientError as error:
            raise TaskError(f"S3.{error.response['Error']['Code']}Exception", str(error)) from None
        return {"Body": answer["Body"].read().decode()} if operation == "get_object" else {}

    return handler


def scene_execution(request: dict[str, Any], attempt: int) -> Any:
    """What Step Functions makes of an execution that it waits for."""
    child = execute(request["StateMachineArn"], request["Input"], request["Name"])
    if child.status != "SUCCEEDED":
        raise TaskError("States.TaskFailed", json.dumps({"Name": request["Name"], "Cause": child.cause}))
    return {"Name": request["Name"], "Status": child.status, "Output": child.output}


def fail_itself(request: dict[str, Any], attempt: int) -> Any:
    """A task that sends a failure to its own token."""
    assert request["TaskToken"]
    raise TaskError(request["Error"], request["Cause"])


USUAL: Mapping[str, Handler] = {
    **dict.fromkeys(JOBS, ended()),
    "ReadManifest": s3("get_object"),
    "Copy": s3("copy_object"),
    "Point": s3("put_object"),
    "Notify": lambda request, attempt: {"MessageId": "1"},
    "NotifyFailure": lambda request, attempt: {"MessageId": "2"},
    "Failed": fail_itself,
    "Scene": scene_execution,
    "Count": lambda request, attempt: {"ItemCounts": {"Total": 3, "Succeeded": 2, "Failed": 1}},
}


@contextmanager
def deployed() -> Iterator[Interpreter]:
    """With the bucket, empty, and both state machines."""
    with interpreter(USUAL) as running:
        client_of("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        for machine in MACHINES:
            create(f"spaceport-{machine}", definition(machine, VALUES))
        yield running
