"""What only a real account can prove, looked at there and written down: see docs/aws-live-check.md. It costs money.

    python tests/aws_live_check.py --spend-money --photos FOLDER [--region R] [--signed] [--report live-check.json]

It makes a stack of its own, runs four small scenes, and removes everything. What a check saw is recorded, whether it is as
expected or not; a check that breaks off stops no other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.pipeline.aws.cloud import Cloud, connect
from spaceport_gs.pipeline.aws.flow import scene_input
from spaceport_gs.pipeline.aws.prices import instances
from spaceport_gs.pipeline.aws.push import images_of
from spaceport_gs.pipeline.aws.stack import Stack, read
from spaceport_gs.pipeline.batch import PROGRAM
from spaceport_gs.pipeline.images import commit

PREFIX = "spaceport-live"
ORDER = ("--steps", "300", "--max-cost", "5")
POLL_SECONDS = 10.0
SECONDS = 3 * 3600.0


class Check:
    """One account, and what was seen in it."""

    def __init__(self, region: str, profile: str, photos: Path, folder: Path) -> None:
        self.cloud: Cloud = connect(region, profile)
        self.options = [f"--{name}={value}" for name, value in (("region", region), ("profile", profile)) if value]
        self.photos, self.folder = photos, folder
        self.job, self.failed = "", ""
        self.seen: dict[str, Any] = {}

    def spaceport(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
        """What the command prints, parsed."""
        command = [sys.executable, "-c", PROGRAM, "aws", *arguments, "--prefix", PREFIX, "--json", *self.options]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        if done.returncode not in codes:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}")
        return json.loads(done.stdout or "null")

    def stack(self) -> Stack:
        return read(self.cloud, PREFIX)

    def events(self, arn: str) -> list[dict[str, Any]]:
        """History of an execution."""
        pages = self.cloud.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=arn)
        return [event for page in pages for event in page["events"]]

    def look(self, name: str, ask: Callable[[Check], Any]) -> None:
        print(f"{datetime.now():%H:%M:%S}  {name}", flush=True)
        try:
            self.seen[name] = ask(self)
        except Exception as error:
            traceback.print_exc()
            self.seen[name] = {"broke off": f"{type(error).__name__}: {error}"}


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(POLL_SECONDS)
    raise TimeoutError("it never came")


def tasks(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Requests for jobs: name, what it asked for, its limit of time."""
    for event in events:
        task = event.get("taskScheduledEventDetails", {})
        if task.get("resourceType") == "sagemaker":
            yield {"request": json.loads(task["parameters"]), "timeout_s": task.get("timeoutInSeconds")}


def failures(events: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {"type": event["type"], "error": details.get("error", ""), "cause": details.get("cause", "")[:1500]}
        for event in events
        for name, details in event.items()
        if name.endswith(("FailedEventDetails", "TimedOutEventDetails", "AbortedEventDetails"))
    ]


def refusals(events: list[dict[str, Any]]) -> list[str]:
    """Everything that says that a role may not do something."""
    return [text[:500] for text in map(json.dumps, json.loads(json.dumps(events, default=str))) if "not authorized" in text or "AccessDenied" in text]  # fmt: skip


# ---- Checks, in their order --------------------------------------------------------------------------------------------------


def deployed(check: Check) -> Any:
    """The stack as CloudFormation makes it, and the bucket's properties as S3 says them."""
    made = check.spaceport("deploy", "--yes", "--set", "Queue=yes", "--set", "Encryption=aws:kms")
    s3, named = check.cloud.client("s3"), {"Bucket": made["outputs"]["Bucket"]}
    return {
        "outputs": made["outputs"],
        "encryption": s3.get_bucket_encryption(**named)["ServerSideEncryptionConfiguration"],
        "public access": s3.get_public_access_block(**named)["PublicAccessBlockConfiguration"],
        "versioning": s3.get_bucket_versioning(**named).get("Status"),
        "lifecycle": s3.get_bucket_lifecycle_configuration(**named)["Rules"],
    }


def adopted(check: Check) -> Any:
    """Bucket, key and repositories taken up again by a new stack: CloudFormation's import."""
    kept = check.spaceport("destroy", "--yes")["kept"]
    check.spaceport("deploy", "--yes", "--set", "Queue=yes", "--set", "Encryption=aws:kms")
    pages = check.cloud.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=PREFIX)
    there = {r["LogicalResourceId"]: r["ResourceStatus"] for page in pages for r in page["StackResourceSummaries"]}
    return {"kept": kept, "adopted": {name: there.get(name) for name in kept}}


def pushed(check: Check) -> Any:
    """Images, and what kind of manifest ECR has of them."""
    found = check.spaceport("push")
    for stage, image in found.items():
        repository, _, digest = image["address"].partition("/")[2].partition("@")
        said = check.cloud.client("ecr").batch_get_image(repositoryName=repository, imageIds=[{"imageDigest": digest}])
        image["media type"] = said["images"][0].get("imageManifestMediaType")
        found[stage] = image
    return found


def doctor(check: Check) -> Any:
    return check.spaceport("doctor", "--spot", codes=(0, 1))


def made(check: Check) -> Any:
    """A scene from photos, on a spot instance with a GPU."""
    check.job = check.spaceport("submit", str(check.photos), *ORDER, "--spot")["job"]
    state = check.spaceport("watch", check.job, codes=(0, 1, 2, 70))
    events = check.events(_execution(check, state["run"]))
    sagemaker, described = check.cloud.client("sagemaker"), []
    for task in tasks(events):
        request = task["request"]
        is_training = "TrainingJobName" in request
        if is_training:
            said = sagemaker.describe_training_job(TrainingJobName=request["TrainingJobName"])
        else:
            said = sagemaker.describe_processing_job(ProcessingJobName=request["ProcessingJobName"])
        fields = ("EnableManagedSpotTraining", "CheckpointConfig", "EnableNetworkIsolation", "NetworkConfig")
        described.append({
            "asked for": {name: request.get(name) for name in fields},
            "got": {name: said.get(name) for name in fields},
            "limit of the task, s": task["timeout_s"],
            "limit of the job, s": request["StoppingCondition"],
            "transitions": said.get("SecondaryStatusTransitions"),
            "billed, s": said.get("BillableTimeInSeconds"),
        })  # fmt: skip
    return {"state": state, "jobs": described, "refusals": refusals(events), "failures": failures(events)}


def published(check: Check) -> Any:
    """The pointer that the flow writes: JSON, and not JSON in a string."""
    key = f"published/{check.job}/scene.json"
    body = check.cloud.client("s3").get_object(Bucket=check.stack().bucket, Key=key)["Body"].read().decode()
    return {"text": body, "is an object": isinstance(json.loads(body), dict)}


def printed(check: Check) -> Any:
    """Driver, GPU and memory as the containers say them, and the metrics that CloudWatch found in the log."""
    lines = check.spaceport("logs", check.job)["lines"]
    names = {line["job"] for line in lines}
    metrics = check.cloud.client("cloudwatch").list_metrics(Namespace="/aws/sagemaker/TrainingJobs")["Metrics"]
    ours = [m for m in metrics if any(d["Value"].startswith(tuple(names)) for d in m["Dimensions"])]
    first = {name: [line["line"] for line in lines if line["job"] == name][:25] for name in sorted(names)}
    return {"first lines": first, "metrics": [m["MetricName"] for m in ours]}


def cost(check: Check) -> Any:
    return check.spaceport("cost", check.job, "--refresh")


def fetched(check: Check) -> Any:
    check.spaceport("fetch", check.job, "-o", "fetched")
    return {path.name: path.stat().st_size for path in (check.folder / "fetched").iterdir() if path.is_file()}


def compressed(check: Check) -> Any:
    """A scene that is compressed on a GPU: where its colours were clustered, and what that took."""
    order = (*ORDER, "--seed", "2", "--instance", "compress=ml.g4dn.xlarge")
    job = check.spaceport("submit", str(check.photos), *order)["job"]
    state = check.spaceport("watch", job, codes=(0, 1, 2, 70))
    check.spaceport("fetch", job, "-o", "compressed")
    metrics = json.loads((check.folder / "compressed/manifest.json").read_text())["metrics"]
    return {"state": state, "metrics": metrics, "cost": check.spaceport("cost", job)}


def failed(check: Check) -> Any:
    """A job that fails: the error's name that a .sync task gives it, and what the state machine makes of it."""
    folder = check.folder / "broken"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(f"no photo {time.time_ns()}".encode())
    job = check.spaceport("submit", str(folder), *ORDER)["job"]
    state = check.spaceport("watch", job, codes=(2, 70))
    check.failed = _execution(check, state["run"])
    return {"state": state, "failures": failures(check.events(check.failed))}


def redriven(check: Check) -> Any:
    """The same run, redriven: whether its last task failed itself, and it goes on at the stage, with a job of another name."""
    states, before = check.cloud.client("stepfunctions"), check.events(check.failed)
    states.redrive_execution(executionArn=check.failed)
    until(lambda: len(check.events(check.failed)) > len(before))  # what Step Functions says of it may come late
    until(lambda: states.describe_execution(executionArn=check.failed)["status"] != "RUNNING")
    said, events = states.describe_execution(executionArn=check.failed), check.events(check.failed)
    after = events[len(before) :]
    names = [[task["request"]["ProcessingJobName"] for task in tasks(part)] for part in (before, after)]
    return {
        "went on": bool(names[1]) and not set(names[0]) & set(names[1]),
        "names": names,
        "states": [e["stateEnteredEventDetails"]["name"] for e in events if "stateEnteredEventDetails" in e],
        "events since": [event["type"] for event in after],
        "end": {name: said.get(name) for name in ("status", "error", "cause", "redriveCount")},
        "failures": failures(events),
    }


def stopped(check: Check) -> Any:
    """A job that somebody stops behind the flow's back: an error, or a result with the status Stopped."""
    run = check.spaceport("submit", str(check.photos), *ORDER, "--seed", "1")
    names = until(lambda: [t["request"].get("ProcessingJobName") for t in tasks(check.events(run["execution"]))])
    described = check.cloud.client("sagemaker").describe_processing_job
    until(lambda: describes(described, names[0]))
    check.cloud.client("sagemaker").stop_processing_job(ProcessingJobName=names[0])
    state = check.spaceport("watch", run["job"], codes=(1, 2, 70))
    events = check.events(run["execution"])
    kinds = [event["type"] for event in events if event["type"] in ("TaskSucceeded", "TaskFailed")]
    return {"state": state, "the task ended with": kinds[:1], "failures": failures(events)}


def describes(ask: Callable[..., Any], name: str) -> bool:
    try:
        return bool(ask(ProcessingJobName=name)["ProcessingJobStatus"] == "InProgress")
    except Exception:
        return False  # not known yet


def missing(check: Check) -> Any:
    """Publishing what is not there: the name of the error of a key that does not exist."""
    order = {"scene": "livemissing", "from": "publish"}
    stack, template = check.stack(), _given(check)
    name = f"livemissing-{int(time.time())}"
    states = check.cloud.client("stepfunctions")
    arn = states.start_execution(stateMachineArn=stack.machines[0], name=name, input=json.dumps({**template, **order}))["executionArn"]  # fmt: skip
    until(lambda: states.describe_execution(executionArn=arn)["status"] != "RUNNING")
    said = states.describe_execution(executionArn=arn)
    return {"error": said.get("error"), "cause": said.get("cause"), "failures": failures(check.events(arn))}


def tried_again(check: Check) -> Any:
    """Names of two attempts, on an instance that the account has no quota for: a new one each, or not."""
    quotas = check.cloud.client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    values = {quota["QuotaName"]: quota["Value"] for page in quotas for quota in page["Quotas"]}
    none = [name for name in instances() if values.get(f"{name} for processing job usage") == 0]
    if not none:
        return "this account has a quota for every instance: not seen"
    stack, given = check.stack(), _given(check)
    given["stages"]["sfm"]["ProcessingResources"]["ClusterConfig"]["InstanceType"] = none[0]
    states, name = check.cloud.client("stepfunctions"), f"livetwice-{int(time.time())}"
    arn = states.start_execution(
        stateMachineArn=stack.machines[0], name=name, input=json.dumps({**given, "scene": "livetwice"})
    )["executionArn"]
    try:
        until(lambda: len(list(tasks(check.events(arn)))) > 1)
    finally:
        states.stop_execution(executionArn=arn)
    events = check.events(arn)
    names = [task["request"]["ProcessingJobName"] for task in tasks(events)]
    return {"names": names, "all different": len(set(names)) == len(names), "failures": failures(events)}


def _given(check: Check) -> dict[str, Any]:
    """What the flow is given for a scene of the default kind."""
    from spaceport_gs.pipeline.aws.flow import Scene

    stack = check.stack()
    return scene_input(Scene("livecheck", images_of(check.cloud, stack)), stack.account("sfm"))


def _execution(check: Check, run: str) -> str:
    return f"{check.stack().machines[0].replace(':stateMachine:', ':execution:')}:{run}"


def heard(check: Check) -> Any:
    """All that came to the queue: messages of the flow, events of SageMaker, and of Step Functions with its detail."""
    sqs, address, found = check.cloud.client("sqs"), check.stack().outputs["Queue"], []
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answer = sqs.receive_message(QueueUrl=address, MaxNumberOfMessages=10, WaitTimeSeconds=5)
        for message in answer.get("Messages", []):
            found.append(json.loads(message["Body"]))
            sqs.delete_message(QueueUrl=address, ReceiptHandle=message["ReceiptHandle"])
    return found


def signed(check: Check) -> Any:
    """A published page without and with a signature, by CloudFront. Making a distribution takes some minutes."""
    private, public = check.folder / "key.pem", check.folder / "public.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(private), "2048"], check=True)
    subprocess.run(["openssl", "rsa", "-in", str(private), "-pubout", "-out", str(public)], check=True)
    check.spaceport("deploy", "--yes", "--set", "Publishing=signed", "--set", f"PublicKey=@{public}")
    (link,) = check.spaceport("link", check.job, "--key", str(private))["links"]
    (direct,) = check.spaceport("link", check.job)["links"]
    without = link["page"].partition("?")[0]
    return {"without": status_of(without), "with": status_of(link["page"]), "bucket": status_of(direct["page"])}


def status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def destroyed(check: Check) -> Any:
    """What is left of everything: nothing but a key that goes in thirty days."""
    gone = check.spaceport("destroy", "--yes", "--drain", "--delete-data")
    s3, ecr = check.cloud.client("s3"), check.cloud.client("ecr")
    buckets = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"] if bucket["Name"].startswith(PREFIX)]
    repositories = ecr.describe_repositories()["repositories"]
    return {
        "said": gone,
        "buckets": buckets,
        "repositories": [r["repositoryName"] for r in repositories if r["repositoryName"].startswith(f"{PREFIX}/")],
    }


CHECKS: tuple[Callable[[Check], Any], ...] = (
    deployed, adopted, pushed, doctor, made, published, printed, cost, fetched, compressed, failed, redriven, stopped, missing, tried_again,
    heard, signed, destroyed,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spend-money", action="store_true", help="without it nothing is done")
    parser.add_argument("--photos", type=Path, required=True, help="some 20 photos of one thing")
    parser.add_argument("--region", default="")
    parser.add_argument("--profile", default="")
    parser.add_argument("--signed", action="store_true", help="also publish with signed links: 20 minutes more")
    parser.add_argument("--only", nargs="*", default=[], help="names of checks")
    parser.add_argument("--report", type=Path, default=Path("live-check.json"))
    given = parser.parse_args()
    chosen = [c for c in CHECKS if (given.signed or c is not signed) and (not given.only or c.__name__ in given.only)]
    if not given.spend_money:
        sys.exit(f"would run {', '.join(check.__name__ for check in chosen)}; it costs money: give --spend-money")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(given.region, given.profile, given.photos.resolve(), Path(folder))
        about = {"version": __version__, "commit": commit(), "region": check.cloud.region, "when": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}"}  # fmt: skip
        try:
            for ask in chosen:
                check.look(ask.__name__, ask)
                given.report.write_text(json.dumps({**about, "seen": check.seen}, indent=2, default=str) + "\n")
        finally:  # Ctrl-C as well
            if "said" not in check.seen.get("destroyed", {}):
                command = f"spaceport aws destroy --prefix {PREFIX} --drain --delete-data"
                print(f"not removed, and paid for; this does it: {' '.join([command, *check.options])}")
    print(f"what was seen is in {given.report}; it names the account: read it before you pass it on")


if __name__ == "__main__":
    main()
