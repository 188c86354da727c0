"""Reports of scenes that were made on AWS: every try at every stage, and the bill."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from aws_scenes import STACK, SageMaker, make, wait_for
from deployed import VALUES
from interpreter import REGION, Interpreter, TaskError, redrive

from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.prices import load_prices
from spaceport_gs.pipeline.aws.results import fetch
from spaceport_gs.pipeline.aws.scenes import retry
from spaceport_gs.pipeline.aws.timeline import add_to_report
from spaceport_gs.pipeline.manifest import read_manifest
from spaceport_gs.progress import ignore

HOSTILE = '</section></body><script>alert("é")</script>'


def times(kind: str, minutes: int, **more: Any) -> dict[str, Any]:
    """Of a job that begins two minutes from now."""
    begin = datetime.now(timezone.utc) + timedelta(minutes=2)
    return {f"{kind}StartTime": begin, f"{kind}EndTime": begin + timedelta(minutes=minutes), **more}


def rows_of(text: str) -> list[list[str]]:
    """Of all tables of a report: the text of their cells."""
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_a_report_shows_every_try_and_what_it_cost(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """No spot instances, twice refused and once waited for; then no hardware on demand, a failure, and a second run."""
    usual, tried = aws.handlers, list[str]()

    def described_as(request: Mapping[str, Any], state: str, **said: Any) -> dict[str, Any]:
        answer = sagemaker.put(request, state, **{k: v for k, v in said.items() if isinstance(v, str)})
        sagemaker.jobs[request.get("TrainingJobName") or request["ProcessingJobName"]] |= said
        return answer

    def sfm(request: dict[str, Any], attempt: int) -> Any:
        return described_as(request, "Completed", **times("Processing", 30))

    def spot(request: dict[str, Any], attempt: int) -> Any:
        if attempt < 2:
            raise TaskError("SageMaker.ResourceLimitExceededException", HOSTILE)
        interrupted = {"BillableTimeInSeconds": 600, "TrainingTimeInSeconds": 1800}
        return described_as(request, "Stopped", SecondaryStatus="MaxWaitTimeExceeded", **times("Training", 30, **interrupted))  # fmt: skip

    def on_demand(request: dict[str, Any], attempt: int) -> Any:
        tried.append(request["TrainingJobName"])
        if len(tried) == 1:
            return sagemaker.fail(FailureReason="CapacityError: none")(request, attempt)
        if len(tried) == 2:
            reason = f"AlgorithmError: {HOSTILE}"
            answer = described_as(request, "Failed", FailureReason=reason, **times("Training", 60))
            raise TaskError("SageMaker.JobFailed", json.dumps(answer))
        cut = [{"Status": status} for status in ("Starting", "Training", "Interrupted", "Training", "Interrupted")]
        return described_as(request, "Completed", SecondaryStatusTransitions=cut, **times("Training", 60))

    aws.handlers = {**usual, "Sfm": sfm, "TrainSpot": spot, "Train": on_demand}
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene, "FAILED")
    aws.handlers = {**usual, "TrainSpot": on_demand}
    retry(cloud, STACK, upload.scene)
    wait_for(cloud, upload.scene)
    out = tmp_path / "out"
    fetch(cloud, STACK, upload.scene, out, ignore)
    before = (out / "report.html").read_text()
    add_to_report(cloud, STACK, upload.scene, out)

    text = (out / "report.html").read_text()
    rows = rows_of(text)
    tries = [(row[0], row[1], row[4]) for row in rows if "<svg" in row[-1]]
    refused = "SageMaker.ResourceLimitExceededException: " + html.escape(HOSTILE)
    assert tries == [
        ("sfm", "ml.c6i.2xlarge", "Completed"),
        ("train", "ml.g5.xlarge, spot", refused),
        ("train", "ml.g5.xlarge, spot", refused),
        ("train", "ml.g5.xlarge, spot", "MaxWaitTimeExceeded"),
        ("train", "ml.g5.xlarge", "Failed: CapacityError: none"),
        ("wait", "", "no hardware"),
        ("train", "ml.g5.xlarge", "Failed: AlgorithmError: " + html.escape(HOSTILE)),
        ("train", "ml.g5.xlarge, spot", "Completed, interrupted 2 times"),
        ("compress", "ml.c6i.2xlarge", "Completed"),
        ("publish", "", ""),
    ]
    (chart, bill) = (row[2:4] for row in rows if row[0] == "sfm")
    assert chart[0].startswith("2.") and chart[1] == "30.0\xa0min" and bill == ["1,800 s", "1,800 s"]
    assert [row[3] for row in rows if row[:2] == ["train", "ml.g5.xlarge, spot"]][:2] == ["–", "–"]
    assert "<script>" not in text and text.count("</body>") == 1 and text.startswith(before.partition("</body>")[0])

    prices = load_prices(REGION)
    cpu, gpu = prices.of("ml.c6i.2xlarge", "processing"), prices.of("ml.g5.xlarge", "training")
    (total,) = (row for row in rows if row[0] == "together")
    assert total[-2:] == [f"{cpu / 2 + gpu * (600 / 3600 + 2):.3f} $", f"{gpu * 1200 / 3600:.3f} $"]
    assert f"Prices of {prices.region}, {prices.as_of}" in text

    fetch(cloud, STACK, upload.scene, out, ignore)
    add_to_report(cloud, STACK, upload.scene, out)
    add_to_report(cloud, STACK, upload.scene, out)
    assert (out / "report.html").read_text() == text
    assert read_manifest(out, "compress").outputs["report.html"]["bytes"] == len(text.encode())


def test_a_report_of_a_run_that_was_redriven(
    cloud: Cloud, aws: Interpreter, sagemaker: SageMaker, photos: Path, tmp_path: Path
) -> None:
    """Twice: what came before counts, and publishing is two bars, without the time between them."""
    usual = aws.handlers

    def train(request: dict[str, Any], attempt: int) -> Any:
        answer = sagemaker.run(request, attempt)
        sagemaker.jobs[request["TrainingJobName"]] |= times("Training", 60)
        return answer

    def fail(request: dict[str, Any], attempt: int) -> Any:
        train(request, attempt)
        sagemaker.jobs[request["TrainingJobName"]] |= {"TrainingJobStatus": "Failed", "FailureReason": "gpu: gone"}
        raise TaskError("SageMaker.JobFailed", "{}")

    def deny(request: dict[str, Any], attempt: int) -> Any:
        raise TaskError("S3.S3Exception", "Access Denied")

    aws.handlers = {**usual, "TrainSpot": fail}
    upload, run = make(cloud, photos, tmp_path)
    for handlers in ({"TrainSpot": train, "Copy": deny}, {}):
        wait_for(cloud, upload.scene, "FAILED")
        aws.handlers = {**usual, **handlers}
        redrive(run.arn)
    wait_for(cloud, upload.scene)
    fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    add_to_report(cloud, STACK, upload.scene, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    rows = rows_of(text)
    assert [(row[0], row[4]) for row in rows if "<svg" in row[-1]] == [
        ("sfm", "Completed"),
        ("train", "Failed: gpu: gone"),
        ("train", "Completed"),
        ("compress", "Completed"),
        ("publish", ""),
        ("publish", ""),
    ]
    (total,) = (row for row in rows if row[0] == "together")
    assert total[-2] == f"{2 * load_prices(REGION).of('ml.g5.xlarge', 'training'):.3f} $"
    assert f"{run.name}: succeeded" in text


def test_a_run_whose_history_is_gone_leaves_a_report(cloud: Cloud, photos: Path, tmp_path: Path) -> None:
    """As after ninety days; and results of a version that made no report stay as they are."""
    upload, _ = make(cloud, photos, tmp_path)
    wait_for(cloud, upload.scene)
    fetch(cloud, STACK, upload.scene, tmp_path / "out", ignore)
    elsewhere = replace(STACK, outputs={**STACK.outputs, "SceneMachine": f"{VALUES['SceneMachine']}-other"})
    add_to_report(cloud, elsewhere, upload.scene, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    assert "<svg" not in text and "<th>0.000 $</th>" in text
    (tmp_path / "out/report.html").unlink()
    add_to_report(cloud, STACK, upload.scene, tmp_path / "out")
    assert not (tmp_path / "out/report.html").exists()
