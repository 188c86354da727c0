"""Photos to the bucket: each once, checked by S3, and from where it ended when it was cut off.

Where they go is named after what is in them, so a key that is there with the right size is the right photo. What is known of
an upload that was cut off is what S3 knows: it goes on from any machine.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import ClientError, Cloud, code_of, explained
from spaceport_gs.pipeline.aws.objects import sizes
from spaceport_gs.pipeline.capture import MIN_PHOTOS, list_files, list_photos
from spaceport_gs.progress import Listener, Progress

PART_BYTES = 8 << 20
MOST_PARTS = 10_000
THREADS = 8
MOST_KEY_BYTES = 900  # S3 takes 1,024 with what stands before the name
ID_LENGTH = 12  # hexadecimal digits


@dataclass(frozen=True)
class File:
    """Of a capture."""

    path: Path
    name: str
    """Below the capture's folder, with forward slashes."""
    n_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class Upload:
    """What is to lie in the bucket."""

    scene: str
    """Id of the scene, by the names and the content of all files."""
    files: tuple[File, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    def moved(self, folder: Path) -> Upload:
        """The same files in another folder, as where a .zip is unpacked again."""
        return replace(self, files=tuple(replace(file, path=folder / file.name) for file in self.files))


def plan(folder: Path) -> Upload:
    """Reads all of a folder of photos, or a COLMAP project. InputError if there is too little in it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of photos, or a .zip of one")
    n_photos = len(list_photos(folder))
    if n_photos < MIN_PHOTOS:
        raise InputError(f"{folder}: {n_photos} photos; at least {MIN_PHOTOS} are needed")
    with ThreadPoolExecutor(THREADS) as pool:
        files = tuple(pool.map(lambda path: _file(path, folder), list_files(folder)))
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{file.sha256.hex()}\n".encode())
    return Upload(whole.hexdigest()[:ID_LENGTH], files)


def _file(path: Path, folder: Path) -> File:
    name = path.relative_to(folder).as_posix()
    if len(name.encode()) > MOST_KEY_BYTES or not name.isprintable():
        raise InputError(f"{name!r}: a name that S3 cannot keep; rename it")
    digest, n_bytes = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        while block := stream.read(PART_BYTES):
            digest.update(block)
            n_bytes += len(block)
    return File(path, name, n_bytes, digest.digest())


@explained()
def send(cloud: Cloud, bucket: str, folder: str, upload: Upload, listen: Listener) -> int:
    """Brings what is missing to the keys below `folder`; returns how many bytes that were. InputError if a file changes."""
    s3 = cloud.client("s3")
    there = sizes(s3, bucket, f"{folder}/")
    missing = [file for file in upload.files if there.get(f"{folder}/{file.name}") != file.n_bytes]
    sending = _Sending(s3, bucket, folder, listen, upload.n_bytes)
    sending.tell(upload.n_bytes - sum(file.n_bytes for file in missing))
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(sending.send, file) for file in missing]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sending.sent


class _Sending:
    """Files on their way, on several threads."""

    def __init__(self, s3: Any, bucket: str, folder: str, listen: Listener, n_bytes: int) -> None:
        self._s3, self._bucket, self._folder = s3, bucket, folder
        self._listen, self._n_bytes, self._done, self._lock = listen, n_bytes, 0, threading.Lock()
        self.sent = 0

    def tell(self, n_bytes: int, is_sent: int = 0) -> None:
        with self._lock:
            self._done += n_bytes
            self.sent += is_sent
            self._listen(Progress("upload", self._done, self._n_bytes, "sends photos"))

    def send(self, file: File) -> None:
        place = {"Bucket": self._bucket, "Key": f"{self._folder}/{file.name}"}
        if file.n_bytes > PART_BYTES:
            self._send_parts(file, place)
            return
        data = file.path.read_bytes()
        if hashlib.sha256(data).digest() != file.sha256:
            raise _changed(file)
        self._s3.put_object(**place, Body=data, ChecksumSHA256=_in_base64(file.sha256))
        self.tell(file.n_bytes, file.n_bytes)

    def _send_parts(self, file: File, place: Mapping[str, str]) -> None:
        try:
            self._send_by_parts(file, place)
        except ClientError as error:  # somebody else, who sends the same, may have completed it
            if (
                code_of(error) != "NoSuchUpload"
                or sizes(self._s3, place["Bucket"], place["Key"]).get(place["Key"]) != file.n_bytes
            ):
                raise

    def _send_by_parts(self, file: File, place: Mapping[str, str]) -> None:
        upload_id, there = self._begun(place)
        part_bytes = max(PART_BYTES, -(-file.n_bytes // MOST_PARTS))
        whole, parts = hashlib.sha256(), list[dict[str, Any]]()
        with open(file.path, "rb") as stream:
            while data := stream.read(part_bytes):
                number, checksum = len(parts) + 1, _in_base64(hashlib.sha256(data).digest())
                whole.update(data)
                part = there.get(number, {})
                if _is(part, data, checksum):
                    self.tell(len(data))
                else:
                    part = self._s3.upload_part(
                        **place, UploadId=upload_id, PartNumber=number, Body=data, ChecksumSHA256=checksum
                    )
                    self.tell(len(data), len(data))
                parts.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum})
        if whole.digest() != file.sha256:
            self._s3.abort_multipart_upload(**place, UploadId=upload_id)
            raise _changed(file)
        self._s3.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload={"Parts": parts})

    def _begun(self, place: Mapping[str, str]) -> tuple[str, Mapping[int, Mapping[str, Any]]]:
        """(id of the upload, parts that are there by number): of one that was cut off, or of a new one."""
        uploads = self._s3.list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"]).get("Uploads", [])
        ours = sorted((u["Initiated"], u["UploadId"]) for u in uploads if u["Key"] == place["Key"])
        if not ours:
            return self._s3.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"], {}
        _, upload_id = ours[-1]
        pages = self._s3.get_paginator("list_parts").paginate(**place, UploadId=upload_id)
        return upload_id, {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}


def _is(part: Mapping[str, Any], data: bytes, checksum: str) -> bool:
    """Whether a part that S3 has holds this."""
    if part.get("Size") != len(data):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    return bool(part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


def _in_base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _changed(file: File) -> InputError:
    return InputError(f"{file.path}: changed while it was uploaded; submit again when it is complete")
