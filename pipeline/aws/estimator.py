"""The training as an estimator of the SageMaker SDK, which asks for the same job as the state machine does.

    cloud = connect()
    stack = read(cloud, "spaceport")
    job = Job("train", SCENE, images_of(cloud, stack)["train"], {"steps": 7000}, attempt="a1")
    training_estimator(job, stack.account("train")).fit(training_channels(job, stack.account("train")), job_name=job.name)

SCENE is a scene whose SfM is done. It needs version 2 of the SDK, the extra `sagemaker`; version 3 has no estimators.
"""

from __future__ import annotations

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.jobs import Account, Job, Machine

try:
    from sagemaker.estimator import Estimator
    from sagemaker.inputs import TrainingInput
    from sagemaker.session import Session
except ModuleNotFoundError as error:
    raise InputError(
        "an estimator needs version 2 of SageMaker's SDK: pip install 'spaceport-gs[sagemaker]'"
    ) from error


def training_estimator(
    job: Job, account: Account, machine: Machine | None = None, session: Session | None = None
) -> Estimator:
    """With all that the request of the job says, but its name and its inputs: those are given to `fit`.

    `machine`: None: the default one. `session`: None: one with the credentials that boto3 finds. InputError: the job is no training.
    """
    if job.stage != "train":
        raise InputError(f"stage {job.stage}: an estimator is for the stage train; the others are processing jobs")
    request = job.request(account, machine)
    algorithm, resources = request["AlgorithmSpecification"], request["ResourceConfig"]
    output, checkpoints, limits = (
        request[name] for name in ("OutputDataConfig", "CheckpointConfig", "StoppingCondition")
    )
    return Estimator(
        image_uri=algorithm["TrainingImage"],
        input_mode=algorithm["TrainingInputMode"],
        metric_definitions=algorithm["MetricDefinitions"],
        hyperparameters=request["HyperParameters"],
        environment=request["Environment"],
        role=request["RoleArn"],
        tags=request["Tags"],
        instance_count=resources["InstanceCount"],
        instance_type=resources["InstanceType"],
        volume_size=resources["VolumeSizeInGB"],
        volume_kms_key=resources.get("VolumeKmsKeyId"),
        output_path=output["S3OutputPath"],
        output_kms_key=output.get("KmsKeyId"),
        checkpoint_s3_uri=checkpoints["S3Uri"],
        checkpoint_local_path=checkpoints["LocalPath"],
        max_run=limits["MaxRuntimeInSeconds"],
        max_wait=limits.get("MaxWaitTimeInSeconds"),
        use_spot_instances=request["EnableManagedSpotTraining"],
        enable_network_isolation=request["EnableNetworkIsolation"],
        disable_profiler=True,
        debugger_hook_config=False,
        sagemaker_session=session,
    )


def training_channels(job: Job, account: Account) -> dict[str, TrainingInput]:
    """What the job reads, for `fit`."""
    sources = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]
        for channel in job.request(account)["InputDataConfig"]
    }
    return {
        name: TrainingInput(source["S3Uri"], source["S3DataDistributionType"], s3_data_type=source["S3DataType"])
        for name, source in sources.items()
    }
