"""Photos on their way to the bucket: each once, checked, and from where they were cut off."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_scenes import SCENE, STACK
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from deployed import BUCKET
from interpreter import REGION, client_of

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws import uploads
from spaceport_gs.pipeline.aws.cloud import Cloud
from spaceport_gs.pipeline.aws.scenes import submit
from spaceport_gs.pipeline.aws.uploads import plan, send
from spaceport_gs.pipeline.capture import as_folder
from spaceport_gs.progress import Progress, ignore


def test_a_scene_is_what_its_photos_hold(photos: Path, tmp_path: Path) -> None:
    upload = plan(photos)
    assert [file.name for file in upload.files] == ["a.jpg", "b c é.jpg", "more/d.png"]
    assert upload.n_bytes == sum(path.stat().st_size for path in photos.rglob("*.*g"))
    moved = photos.rename(tmp_path / "elsewhere")
    assert plan(moved).scene == upload.scene
    (moved / "a.jpg").rename(moved / "z.jpg")
    renamed = plan(moved).scene
    (moved / "z.jpg").write_bytes(b"other")
    assert len({upload.scene, renamed, plan(moved).scene}) == 3


def test_photos_in_a_zip_are_the_same_scene(photos: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path, "photos"))
    with as_folder(archive) as folder:
        assert plan(folder).scene == plan(photos).scene
    assert not folder.exists()
    with as_folder(photos) as folder:
        assert folder == photos
    assert photos.exists()


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder of photos"):
        plan(tmp_path / "none")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="2 photos; at least 3"):
        plan(tmp_path)
    (tmp_path / "c\n.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="rename it"):
        plan(tmp_path)


def test_only_what_is_missing_is_sent(cloud: Cloud, photos: Path) -> None:
    upload, told = plan(photos), list[Progress]()
    folder = f"inputs/{upload.scene}/photos"
    assert send(cloud, BUCKET, folder, upload, told.append) == upload.n_bytes
    assert told[-1].step == told[-1].n_steps == upload.n_bytes
    found = client_of("s3").get_object(Bucket=BUCKET, Key=f"{folder}/b c é.jpg")
    assert found["Body"].read() == (photos / "b c é.jpg").read_bytes()
    assert send(cloud, BUCKET, folder, upload, told.append) == 0 and told[-1].step == upload.n_bytes
    client_of("s3").put_object(Bucket=BUCKET, Key=f"{folder}/a.jpg", Body=b"half")
    assert send(cloud, BUCKET, folder, upload, ignore) == (photos / "a.jpg").stat().st_size


def test_a_large_file_goes_on_where_it_was_cut_off(cloud: Cloud, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 5 << 20
    monkeypatch.setattr(uploads, "PART_BYTES", size)
    content = b"".join(bytes([number]) * size for number in range(3)) + b"end"
    (photos / "a.jpg").write_bytes(content)
    upload = plan(photos)
    folder, s3 = f"inputs/{upload.scene}/photos", client_of("s3")
    place = {"Bucket": BUCKET, "Key": f"{folder}/a.jpg"}
    begun = s3.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]
    s3.upload_part(**place, UploadId=begun, PartNumber=1, Body=content[:size])
    s3.upload_part(**place, UploadId=begun, PartNumber=2, Body=b"\7" * size)  # of another file
    small = upload.n_bytes - len(content)
    assert send(cloud, BUCKET, folder, upload, ignore) == len(content) - size + small
    assert s3.get_object(**place)["Body"].read() == content
    assert not s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_a_large_file_that_somebody_else_completes_meanwhile(
    cloud: Cloud, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 5 << 20)
    content = bytes(12 << 20)
    (photos / "a.jpg").write_bytes(content)
    upload = plan(photos)
    folder = f"inputs/{upload.scene}/photos"
    others, upload_part = list[int](), cloud.client("s3").upload_part

    def part_as_aws_takes_it(**part: Any) -> Any:
        try:
            return upload_part(**part)
        except KeyError:  # moto's answer to an upload that is over
            raise ClientError({"Error": {"Code": "NoSuchUpload", "Message": "…"}}, "UploadPart") from None

    monkeypatch.setattr(cloud.client("s3"), "upload_part", part_as_aws_takes_it)

    def listen(progress: Progress) -> None:
        if not others and progress.step >= 5 << 20:  # the first part is there
            others.append(0)
            others.append(send(cloud, BUCKET, folder, upload, ignore))

    assert send(cloud, BUCKET, folder, upload, listen) < upload.n_bytes and others[1] >= 7 << 20
    found = client_of("s3").get_object(Bucket=BUCKET, Key=f"{folder}/a.jpg")
    assert found["Body"].read() == content
    assert not client_of("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize("n_bytes", [10, 20 << 20])
def test_a_file_that_changes_under_way(n_bytes: int, cloud: Cloud, photos: Path) -> None:
    (photos / "a.jpg").write_bytes(bytes(n_bytes))
    upload = plan(photos)
    (photos / "a.jpg").write_bytes(b"\1" * n_bytes)
    folder = f"inputs/{upload.scene}/photos"
    with pytest.raises(InputError, match=r"a\.jpg: changed while it was uploaded"):
        send(cloud, BUCKET, folder, upload, ignore)
    keys = [entry["Key"] for entry in client_of("s3").list_objects_v2(Bucket=BUCKET, Prefix=folder).get("Contents", [])]
    assert f"{folder}/a.jpg" not in keys and not client_of("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize(
    ("code", "status", "words"), [("403", 403, "is not ours, or may not be read"), ("404", 404, "destroy it and deploy again")]
)  # fmt: skip
def test_nothing_is_sent_to_a_bucket_that_is_not_ours(
    code: str, status: int, words: str, cloud: Cloud, photos: Path
) -> None:
    """As it can be where a bucket was deleted, and somebody else made one of its name."""
    with Stubber(cloud.client("s3")) as stubber:  # and whatever else is asked of S3 is an error
        asked = {"Bucket": BUCKET, "ExpectedBucketOwner": "123456789012"}
        stubber.add_client_error("head_bucket", code, "", status, expected_params=asked)
        with pytest.raises(InputError, match=words):
            submit(cloud, STACK, SCENE, plan(photos), ignore)
        stubber.assert_no_pending_responses()


def test_a_clock_that_is_wrong_is_told_by_every_service(cloud: Cloud, photos: Path) -> None:
    with Stubber(cloud.client("s3")) as stubber:
        stubber.add_client_error("head_bucket", "RequestTimeTooSkewed", "", 403)
        with pytest.raises(InputError, match="this machine's clock is wrong"):
            submit(cloud, STACK, SCENE, plan(photos), ignore)


UPLOADER = """
import sys
from pathlib import Path
from spaceport_gs.pipeline.aws.cloud import connect
from spaceport_gs.pipeline.aws.uploads import plan, send
upload = plan(Path(sys.argv[1]))
sent = send(connect(), "killed", "inputs", upload, lambda progress: print(progress.step, progress.n_steps, flush=True))
print("sent", sent)
"""


def test_an_upload_of_300_mb_that_is_killed_goes_on(tmp_path: Path) -> None:
    """In another process, against a server; no part that had arrived is sent again."""
    pytest.importorskip("ministack", reason="ministack is not installed")
    from emulator import emulated_aws

    folder = tmp_path / "photos"
    folder.mkdir()
    with open(folder / "large.tif", "wb") as file:
        for number in range(300):
            file.write(hashlib.sha256(bytes([number % 256, number // 256])).digest() * (1_000_000 // 32))
    for name in ("b.jpg", "c.jpg"):
        (folder / name).write_bytes(name.encode())
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    with emulated_aws(tmp_path / "log") as environment:
        s3 = boto3.client(
            "s3", REGION, endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
        )  # fmt: skip
        s3.create_bucket(Bucket="killed", CreateBucketConfiguration={"LocationConstraint": REGION})
        command = [sys.executable, "-c", UPLOADER, str(folder)]
        first = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        assert first.stdout
        for line in first.stdout:
            if int(line.split()[0]) > n_bytes // 2:
                break
        first.send_signal(signal.SIGKILL)
        first.communicate()
        (begun,) = s3.list_multipart_uploads(Bucket="killed")["Uploads"]
        parts = s3.list_parts(Bucket="killed", Key="inputs/large.tif", UploadId=begun["UploadId"])["Parts"]
        there = sum(part["Size"] for part in parts) + len("b.jpg" + "c.jpg")
        second = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        assert n_bytes // 2 < there < n_bytes and int(second.stdout.split()[-1]) == n_bytes - there
        with open(folder / "large.tif", "rb") as file:
            wanted = hashlib.sha256(file.read()).digest()
        assert hashlib.sha256(s3.get_object(Bucket="killed", Key="inputs/large.tif")["Body"].read()).digest() == wanted
