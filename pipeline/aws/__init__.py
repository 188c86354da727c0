"""The pipeline on AWS: the stages of `pipeline.run` as SageMaker jobs."""

PREFIX = "spaceport"  # of all names, unless the stack is given another one
