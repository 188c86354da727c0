"""The pipeline on AWS: the stages of `pipeline.run` as SageMaker jobs."""
