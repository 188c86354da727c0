"""What lies in the bucket, and how it is read and written."""

from __future__ import annotations

from typing import Any

from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of


def text_of(cloud: Cloud, bucket: str, key: str) -> str | None:
    """Of an object; None if it is not there."""
    try:
        return str(cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode())
    except ClientError as error:
        if code_of(error) != "NoSuchKey":
            raise
        return None


def put_once(cloud: Cloud, bucket: str, key: str, text: str) -> bool:
    """False if something is there already."""
    try:
        cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=text.encode(), IfNoneMatch="*")
        return True
    except ClientError as error:
        if code_of(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise
        return False


def sizes(s3: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Bytes of all objects whose keys begin so, by key."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}
