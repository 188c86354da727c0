"""Step Functions and SageMaker in one process: the interpreter, and jobs that are the real entry points, run on this machine.

What SageMaker does around a job is done here too: inputs from S3 to folders, checkpoints and progress to S3 while it runs,
results when it ends, SIGTERM to stop it, what it printed to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import boto3
from deployed import JOBS, USUAL, described, s3
from interpreter import REGION, TaskError, interpreter

from spaceport_gs.pipeline.aws.prices import instances

SYNC_SECONDS = 0.2
MOUNT = "/opt/ml"
QUOTAS = [
    {"QuotaName": f"{instance} for {use} job usage", "QuotaCode": f"L-{number}", "Value": 2.0}
    for number, (instance, use) in enumerate(product(instances(), ("processing", "training", "spot training")))
]
LOGS = {"Training": "/aws/sagemaker/TrainingJobs", "Processing": "/aws/sagemaker/ProcessingJobs"}


@dataclass
class Job:
    request: Mapping[str, Any]
    base: Path
    """What stands for /opt/ml."""
    created: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    ended: datetime | None = None
    status: str = "InProgress"
    said: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    logged: int = 0
    """Bytes of its log that CloudWatch has."""

    @property
    def kind(self) -> str:
        return "Training" if "TrainingJobName" in self.request else "Processing"

    @property
    def name(self) -> str:
        return str(self.request[f"{self.kind}JobName"])

    def description(self) -> dict[str, Any]:
        """As SageMaker gives it to Step Functions, but for the times."""
        said = dict(self.said)
        if self.kind == "Training" and self.status == "InProgress":
            said["SecondaryStatus"] = "Training"
        times: dict[str, Any] = {
            "CreationTime": self.created.timestamp(),
            f"{self.kind}StartTime": self.created.timestamp(),
        }
        if self.ended:
            times[f"{self.kind}EndTime"] = self.ended.timestamp()
        return {**described(self.request, self.status, said), **times}


class SageMaker:
    """Jobs, one after the other or at once."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.jobs, self.lock = folder, dict[str, Job](), threading.Lock()
        self.s3 = boto3.client("s3", REGION, endpoint_url=endpoint)
        self.logs = boto3.client("logs", REGION, endpoint_url=endpoint)

    def run(self, request: dict[str, Any], attempt: int) -> dict[str, Any]:
        """A handler: returns when the job is over."""
        name = request.get("TrainingJobName") or request["ProcessingJobName"]
        job = Job(request, self.folder / name)
        with self.lock:
            assert name not in self.jobs, f"{name} was used before"
            self.jobs[name] = job
        for uri, folder in self._inputs(job):
            self._download(uri, folder)
        while (self.folder / f"hold-{job.kind}").exists() and job.status == "InProgress":
            time.sleep(SYNC_SECONDS)  # as one that waits for hardware
        with open(job.base / "log", "wb") as log:
            with self.lock:
                is_stopped = job.status != "InProgress"
                job.process = None if is_stopped else self._started(job, log)
            while job.process and job.process.poll() is None:
                self._upload_all(job, "Continuous")
                self._log(job)
                time.sleep(SYNC_SECONDS)
        self._upload_all(job, "Continuous")
        self._end(job)
        if job.status == "Failed":
            raise TaskError("SageMaker.JobFailed", json.dumps(job.description()))
        return job.description()

    def stop(self, name: str) -> None:
        job = self.known(name)
        with self.lock:
            if job.status != "InProgress":
                raise KeyError("has ended")
            job.status = "Stopping"
            if job.process:
                job.process.terminate()

    def known(self, name: str) -> Job:
        with self.lock:
            return self.jobs[name]

    def _started(self, job: Job, log: Any) -> subprocess.Popen[bytes]:
        arguments = ["train"]
        if job.kind == "Processing":
            arguments = job.request["AppSpecification"]["ContainerArguments"]
        environment = {**os.environ, **job.request["Environment"], "SAGEMAKER_BASE_DIR": str(job.base)}
        command = [sys.executable, "-m", "spaceport_gs.pipeline.aws.entrypoint", *arguments]
        return subprocess.Popen(command, cwd=job.base, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _inputs(self, job: Job) -> Iterator[tuple[str, Path]]:
        job.base.mkdir(parents=True)
        if job.kind == "Processing":
            for entry in job.request["ProcessingInputs"]:
                yield entry["S3Input"]["S3Uri"], _place(job, entry["S3Input"]["LocalPath"])
            return
        config = job.base / "input/config"
        config.mkdir(parents=True)
        (config / "hyperparameters.json").write_text(json.dumps(job.request["HyperParameters"]))
        for channel in job.request["InputDataConfig"]:
            yield channel["DataSource"]["S3DataSource"]["S3Uri"], job.base / "input/data" / channel["ChannelName"]
        yield job.request["CheckpointConfig"]["S3Uri"], _place(job, job.request["CheckpointConfig"]["LocalPath"])

    def _download(self, uri: str, folder: Path) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        above = prefix.rpartition("/")[0]
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for key in (entry["Key"] for page in pages for entry in page.get("Contents", [])):
            path = folder / key.removeprefix(f"{above}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.s3.download_file(bucket, key, str(path))

    def _outputs(self, job: Job) -> Iterator[tuple[str, Path, str]]:
        """(address, folder, when) of what goes to S3."""
        if job.kind == "Training":
            checkpoints = job.request["CheckpointConfig"]
            yield checkpoints["S3Uri"], _place(job, checkpoints["LocalPath"]), "Continuous"
            return
        for output in (entry["S3Output"] for entry in job.request["ProcessingOutputConfig"]["Outputs"]):
            yield output["S3Uri"], _place(job, output["LocalPath"]), output["S3UploadMode"]

    def _upload_all(self, job: Job, mode: str) -> None:
        for uri, folder, when in self._outputs(job):
            if when == mode and folder.is_dir():
                bucket, _, key = uri.removeprefix("s3://").partition("/")
                for path in [path for path in folder.rglob("*") if path.is_file()]:
                    try:
                        data = (
                            path.read_bytes()
                        )  # at once: a file that is replaced under way would not have the size that was told
                    except OSError:  # it was renamed
                        continue
                    self.s3.put_object(Bucket=bucket, Key=f"{key}{path.relative_to(folder).as_posix()}", Body=data)

    def _end(self, job: Job) -> None:
        """Results and the log, and at last what became of the job."""
        code = job.process.returncode if job.process else 0
        if code == 0:
            self._upload_all(job, "EndOfJob")
        if job.kind == "Training" and (job.base / "model").is_dir():
            archive = job.base / "model.tar.gz"
            with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
                tar.add(job.base / "model", ".")
            bucket, _, key = job.request["OutputDataConfig"]["S3OutputPath"].removeprefix("s3://").partition("/")
            self.s3.upload_file(str(archive), bucket, f"{key}/{job.name}/output/model.tar.gz")
        self._log(job)
        reason = job.base / "output" / ("failure" if job.kind == "Training" else "message")
        if reason.is_file():
            said = reason.read_text()
            job.said |= {"FailureReason": f"AlgorithmError: {said}"} | (
                {"ExitMessage": said} if job.kind == "Processing" else {}
            )
        job.ended = datetime.now(timezone.utc)
        with self.lock:
            job.status = "Stopped" if job.status == "Stopping" else "Failed" if code else "Completed"

    def _log(self, job: Job) -> None:
        named = {"logGroupName": LOGS[job.kind], "logStreamName": f"{job.name}/algo-1-1"}
        printed = (job.base / "log").read_bytes()[job.logged :]
        whole = printed if job.process and job.process.poll() is not None else printed[: printed.rfind(b"\n") + 1]
        now = int(time.time() * 1000)
        if whole and not job.logged:
            self.logs.create_log_stream(**named)
        job.logged += len(whole)
        events = [{"timestamp": now, "message": line} for line in whole.decode(errors="replace").splitlines() if line]
        if events:
            self.logs.put_log_events(**named, logEvents=events)


def _place(job: Job, path: str) -> Path:
    return job.base / Path(path).relative_to(MOUNT)


def _server(sagemaker: SageMaker, port: int) -> ThreadingHTTPServer:
    """The part of SageMaker's API that commands ask, and quotas for its jobs."""

    class Api(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            operation = self.headers["X-Amz-Target"].partition(".")[2]
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
            name = given.get("TrainingJobName") or given.get("ProcessingJobName", "")
            try:
                if operation.startswith("Describe"):
                    self._answer(200, sagemaker.known(name).description())
                elif operation.endswith("ServiceQuotas"):
                    self._answer(200, {"Quotas": QUOTAS})
                elif operation.startswith("Stop"):
                    sagemaker.stop(name)
                    self._answer(200, {})
                else:
                    self._answer(200, self._listed("Training" if "Training" in operation else "Processing", given))
            except KeyError as error:
                self._answer(400, {"__type": "ValidationException", "message": str(error)})

        def _listed(self, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
            found = [j for j in list(sagemaker.jobs.values()) if j.kind == kind and j.status == given["StatusEquals"]]
            return {
                f"{kind}JobSummaries": [
                    {
                        f"{kind}JobName": job.name,
                        f"{kind}JobArn": job.description()[f"{kind}JobArn"],
                        f"{kind}JobStatus": job.status,
                        "CreationTime": job.created.timestamp(),
                    }
                    for job in found
                ]
            }

        def _answer(self, code: int, body: Mapping[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Api)


def serve(flow_port: int, jobs_port: int, endpoint: str, folder: Path) -> None:
    """Until the process is ended. `endpoint`: of the S3 that jobs read and write."""
    from moto.server import main

    sagemaker = SageMaker(folder, endpoint)
    handlers = {
        **USUAL,
        **dict.fromkeys(JOBS, sagemaker.run),
        "ReadManifest": s3("get_object", sagemaker.s3),
        "Copy": s3("copy_object", sagemaker.s3),
        "Point": s3("put_object", sagemaker.s3),
    }
    with interpreter(handlers):
        threading.Thread(target=_server(sagemaker, jobs_port).serve_forever, daemon=True).start()
        main(["-H", "127.0.0.1", "-p", str(flow_port)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
