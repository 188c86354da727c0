"""The estimator asks SageMaker for what our own request asks for. It needs SageMaker's SDK, which wants older packages than ours."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip(
    "sagemaker", reason="SageMaker's SDK is not installed: `make test-all` puts it into an environment of its own"
)

import boto3
from sagemaker.session import Session
from service_model import wrong

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.drills import parsed
from spaceport_gs.pipeline.aws.estimator import training_channels, training_estimator
from spaceport_gs.pipeline.aws.jobs import Account, Job, Machine

pytestmark = pytest.mark.slow  # to import the SDK takes seconds

IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/spaceport/3dgs@sha256:" + 64 * "a"
ACCOUNT = Account("data-of-ours", "arn:aws:iam::123456789012:role/spaceport-train")
ENCRYPTED = Account(ACCOUNT.bucket, ACCOUNT.role, "arn:aws:kms:eu-central-1:123456789012:key/0a1b-2c")
ONLY_OURS = {"EnableManagedSpotTraining": False}
"""The SDK leaves out what is off."""
ONLY_THEIRS = {"ProfilerConfig": {"DisableProfiler": True}}
"""What we leave out is on for the SDK, unless it is switched off."""


class Recorder:
    """Stands for the client of boto3: no network."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}

    def create_training_job(self, **request: Any) -> dict[str, str]:
        self.request = request
        return {"TrainingJobArn": "arn"}


def asked_for(job: Job, account: Account, machine: Machine | None) -> dict[str, Any]:
    recorder = Recorder()
    session = Session(
        boto3.Session("key", "secret", region_name="eu-central-1"), recorder, default_bucket="b", sagemaker_config={}
    )
    estimator = training_estimator(job, account, machine, session)
    estimator.fit(training_channels(job, account), wait=False, job_name=job.name)
    return recorder.request


@pytest.mark.parametrize(
    ("account", "machine"),
    [
        (ACCOUNT, None),
        (ENCRYPTED, Machine("ml.c6i.2xlarge", volume_gb=200)),
        (ENCRYPTED, Machine("ml.g5.2xlarge", is_spot=True, max_seconds=3600, expected_seconds=600)),
    ],
)
def test_the_estimator_asks_for_the_same_job(account: Account, machine: Machine | None) -> None:
    settings = {"steps": 7000, "preset": "baseline", "title": 'Quarry "3"', "downscale": 2.0}
    job = Job("train", "a1", IMAGE, settings, attempt="7", drill=parsed("train:crash@5"))
    ours, theirs = job.request(account, machine), asked_for(job, account, machine)
    assert not any(wrong("CreateTrainingJob", theirs))
    both = ours.keys() & theirs.keys()
    assert {name: theirs[name] for name in both} == {name: ours[name] for name in both}
    assert {name: ours[name] for name in ours.keys() - both} == (ONLY_OURS if not (machine and machine.is_spot) else {})
    assert {name: theirs[name] for name in theirs.keys() - both} == ONLY_THEIRS


def test_only_the_training_has_an_estimator() -> None:
    with pytest.raises(InputError, match="stage sfm: an estimator is for the stage train"):
        training_estimator(Job("sfm", "a1", IMAGE), ACCOUNT)
