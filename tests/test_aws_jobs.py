"""Requests for SageMaker, checked against the model of its API that botocore brings along."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from service_model import wrong

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.contract import Places, settings_of
from spaceport_gs.pipeline.aws.drills import parsed
from spaceport_gs.pipeline.aws.jobs import DEFAULT_MACHINES, Account, Job, Machine, image_stage, is_on_gpu
from spaceport_gs.pipeline.aws.prices import instances
from spaceport_gs.pipeline.run import RunSettings

IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/spaceport/3dgs@sha256:" + 64 * "a"
ACCOUNT = Account("data-of-ours", "arn:aws:iam::123456789012:role/spaceport-train")
ENCRYPTED = Account(ACCOUNT.bucket, ACCOUNT.role, "arn:aws:kms:eu-central-1:123456789012:key/0a1b-2c")
SETTINGS = {"steps": 7000, "preset": "baseline", "title": 'Quarry "3"', "downscale": 2.0}
STAGES = ["sfm", "train", "compress"]


@pytest.mark.parametrize("account", [ACCOUNT, ENCRYPTED])
@pytest.mark.parametrize("stage", STAGES)
def test_requests_are_what_the_service_takes(stage: str, account: Account) -> None:
    job = Job(stage, 24 * "z", IMAGE, SETTINGS, attempt=12 * "f")
    assert not any(wrong(job.operation(), job.request(account)))
    spot = Machine("ml.g5.2xlarge", is_spot=True, max_seconds=3600, max_wait_seconds=60)
    if stage == "train":
        request = job.request(account, spot)
        assert not any(wrong(job.operation(), request))
        assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 3660}
    else:
        with pytest.raises(InputError, match="only the training"):
            job.request(account, spot)


@pytest.mark.parametrize(
    ("stage", "instance", "device", "image"),
    [
        ("compress", "ml.g4dn.xlarge", "auto", "train"),
        ("compress", "ml.g4dn.xlarge", "cuda", "train"),
        ("compress", "ml.g4dn.xlarge", "cpu", "compress"),
        ("compress", "ml.c6i.2xlarge", "auto", "compress"),
        ("compress", "ml.c6i.2xlarge", "cuda", "compress"),
        ("compress", "ml.abacus.xlarge", "auto", "compress"),
        ("train", "ml.g5.xlarge", "auto", "train"),
        ("train", "ml.c6i.2xlarge", "cpu", "train"),
        ("sfm", "ml.g5.xlarge", "auto", "sfm"),
    ],
)
def test_compression_runs_in_the_image_of_the_training_where_a_gpu_works_for_it(
    stage: str, instance: str, device: str, image: str
) -> None:
    assert image_stage(stage, is_on_gpu(stage, instances().get(instance), device)) == image


def test_the_check_sees_what_is_wrong() -> None:
    job = Job("train", "a1", IMAGE)
    assert any(wrong(job.operation(), {**job.request(ACCOUNT), "TrainingJobName": "-no"}))
    assert any(wrong(job.operation(), job.request(ACCOUNT, Machine("ml.abacus.xlarge"))))
    assert any(wrong(job.operation(), {**job.request(ACCOUNT), "Nmae": "x"}))


@pytest.mark.parametrize("stage", STAGES)
def test_every_job_ends_and_is_cut_off_from_the_network(stage: str) -> None:
    request = Job(stage, "a1", IMAGE).request(ACCOUNT)
    isolated = request.get("NetworkConfig", request)["EnableNetworkIsolation"]
    assert isolated and request["StoppingCondition"]["MaxRuntimeInSeconds"] == DEFAULT_MACHINES[stage].max_seconds
    assert {tag["Key"] for tag in request["Tags"]} == {"Project", "Stack", "Stage", "JobId", "Version"}


def test_attempts_have_names_of_their_own_and_settings_their_checkpoints() -> None:
    job = Job("train", "a1", IMAGE, SETTINGS)
    again = Job("train", "a1", IMAGE, SETTINGS, attempt="1")
    assert job.name != again.name and job.checkpoints == again.checkpoints
    assert Job("train", "a1", IMAGE, {**SETTINGS, "seed": 1}).checkpoints != job.checkpoints


def test_a_job_looks_where_the_one_before_left_its_results() -> None:
    """For a training job that is OUTPUT/NAME/output/model.tar.gz."""
    sfm, train = (Job(stage, "a1", IMAGE).request(ACCOUNT) for stage in ("sfm", "train"))
    again = Job("train", "a1", IMAGE, attempt="2")
    compress = Job("compress", "a1", IMAGE, trained=again.name).request(ACCOUNT)
    inputs = {i["InputName"]: i["S3Input"]["S3Uri"] for i in compress["ProcessingInputs"]}
    left = sfm["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]
    assert inputs["sfm"] == left == train["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    assert inputs["train"] == f"{train['OutputDataConfig']['S3OutputPath']}/{again.name}/output/model.tar.gz"


def test_metrics_are_found_in_what_a_job_prints() -> None:
    line = "metric step=3000 loss=0.0213 gaussians=248490 psnr=27.31 steps_per_second=812.5"
    definitions = Job("train", "a1", IMAGE).request(ACCOUNT)["AlgorithmSpecification"]["MetricDefinitions"]
    found = {d["Name"]: re.search(d["Regex"], line) for d in definitions}
    assert {name: match and float(match[1]) for name, match in found.items()} == {
        "psnr": 27.31, "loss": 0.0213, "gaussians": 248490, "step": 3000, "steps_per_second": 812.5,
    }  # fmt: skip


def test_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    """As hyperparameters of a training job, and as arguments of the others."""
    wanted = RunSettings(**SETTINGS)  # type: ignore[arg-type]
    request = Job("train", "a1", IMAGE, SETTINGS).request(ACCOUNT)
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text(json.dumps(request["HyperParameters"]))
    assert settings_of(Places(tmp_path, "train"), []) == wanted
    arguments = Job("sfm", "a1", IMAGE, SETTINGS).request(ACCOUNT)["AppSpecification"]["ContainerArguments"]
    assert arguments[0] == "sfm" and settings_of(Places(tmp_path / "none", "sfm"), arguments[1:]) == wanted


def test_the_same_job_as_a_process(tmp_path: Path) -> None:
    command, environment = Job("sfm", "a1", IMAGE, {"stepz": 1}).process(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == 2 and "stepz: no such setting" in (tmp_path / "output/message").read_text()
    container = Job("sfm", "a1", IMAGE, SETTINGS).container_command(tmp_path)
    assert container[-5:] == ["sfm", "downscale=2.0", 'preset="baseline"', "steps=7000", 'title="Quarry \\"3\\""']
    assert {"--network=none", "--read-only", f"--volume={tmp_path}:/opt/ml"} < set(container)


def test_a_drill_goes_where_the_job_goes(tmp_path: Path) -> None:
    """Of one stage, to its environment, without a change of anything else, such as where its checkpoints are."""
    plain, drilled = (Job("train", "a1", IMAGE, SETTINGS, drill=drill) for drill in (None, parsed("train:crash@5")))
    request = drilled.request(ACCOUNT)
    assert not any(wrong(drilled.operation(), request))
    assert request["Environment"].pop("SPACEPORT_DRILL") == "train:crash@5"
    assert request["Environment"].pop("SPACEPORT_DRILLS") == "1" and request == plain.request(ACCOUNT)
    assert drilled.process(tmp_path)[1]["SPACEPORT_DRILL"] == "train:crash@5"
    assert {"--env=SPACEPORT_DRILL=train:crash@5", "--env=SPACEPORT_DRILLS=1"} < set(
        drilled.container_command(tmp_path)
    )


@pytest.mark.parametrize("scene", ["", "A1", "a_1", "a-1", 25 * "a", "a1\n", "../a"])
def test_odd_ids_are_refused(scene: str) -> None:
    with pytest.raises(InputError, match="an id has"):
        Job("sfm", scene, IMAGE)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="title: too long"):
        Job("sfm", "a1", IMAGE, {"title": 250 * "x"})
    with pytest.raises(InputError, match="stage bake"):
        Job("bake", "a1", IMAGE)
