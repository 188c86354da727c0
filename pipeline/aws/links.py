"""Links to a published scene, for those who have no account: straight to the bucket, or through CloudFront."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from spaceport_gs.errors import InputError
from spaceport_gs.pipeline.aws.cloud import Cloud, explained
from spaceport_gs.pipeline.aws.objects import text_of
from spaceport_gs.pipeline.aws.runs import checked_id
from spaceport_gs.pipeline.aws.stack import Stack

MOST_HOURS = 7 * 24
"""That a link to a bucket can hold."""


@dataclass(frozen=True)
class Links:
    """To one scene."""

    page: str
    """Of the viewer, with the scene in it."""
    scene: str
    """Of scene.sog."""
    expires: datetime | None
    """None: never."""
    signed_by: str
    """S3, CloudFront, or nobody where everybody may read."""


@explained()
def links_to(cloud: Cloud, stack: Stack, scene: str, hours: float, key: Path | None = None) -> Links:
    """Good for `hours`, or for ever where scenes are public. `key`: the file with the private key, PEM, that belongs to the
    stack's PublicKey; None: links straight to the bucket, which hold no longer than the credentials that they are made with.
    """
    if not 0 < hours <= MOST_HOURS:
        raise InputError(f"--hours {hours:g}: a link holds for up to {MOST_HOURS}")
    publishing = stack.parameters.get("Publishing", "none")
    if key is not None and publishing != "signed":
        raise InputError(
            f"--key: the stack {stack.prefix} takes no signed links (Publishing {publishing}); leave it out, or"
            " `spaceport aws deploy --set Publishing=signed --set PublicKey=@FILE`"
        )
    sign = _signer(key, stack) if key else None
    pointer = pointer_of(cloud, stack, scene)
    expires = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(hours=hours)

    def link(path: str) -> str:
        if sign is not None:
            return sign(f"{stack.site}/{path}", expires)
        if publishing == "public":
            return f"{stack.site}/{path}"
        place = {"Bucket": stack.bucket, "Key": f"published/{path}"}
        return str(cloud.client("s3").generate_presigned_url("get_object", place, round(3600 * hours)))

    is_public = publishing == "public"
    return Links(
        link(pointer["page"]), link(pointer["scene"]), None if is_public else expires,
        "CloudFront" if sign else "nobody" if is_public else "S3",
    )  # fmt: skip


@explained()
def pointer_of(cloud: Cloud, stack: Stack, scene: str) -> dict[str, str]:
    """What is published of a scene: `page` and `scene`, keys below published/. InputError if nothing is."""
    text = text_of(cloud, stack.bucket, f"published/{checked_id(scene)}/scene.json")
    if text is None:
        raise InputError(f"scene {scene}: is not published; see its status")
    try:
        pointer = json.loads(text)
        return {name: str(pointer[name]) for name in ("page", "scene")}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"scene {scene}: published/{scene}/scene.json is damaged; retry the scene") from error


def _signer(path: Path, stack: Stack) -> Callable[[str, datetime], str]:
    """Makes of an address, and when it expires, the address as CloudFront lets it through."""
    from botocore.signers import CloudFrontSigner

    try:
        from cryptography.hazmat.primitives.asymmetric import padding, rsa
        from cryptography.hazmat.primitives.hashes import SHA1
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ModuleNotFoundError as error:
        raise InputError("--key needs the package cryptography: pip install 'spaceport-gs[aws]'") from error

    try:
        private: Any = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected a private RSA key in PEM, without a password") from error
    if not isinstance(private, rsa.RSAPrivateKey):
        raise InputError(f"{path}: expected a private RSA key in PEM; this is another kind")
    public: Any = load_pem_public_key(stack.parameters["PublicKey"].encode())
    if private.public_key().public_numbers() != public.public_numbers():
        raise InputError(f"{path}: does not belong to the PublicKey of the stack {stack.prefix}")

    def sign(message: bytes) -> bytes:
        return private.sign(message, padding.PKCS1v15(), SHA1())  # what CloudFront takes

    signer = CloudFrontSigner(stack.outputs["SigningKey"], sign)
    return lambda address, expires: str(signer.generate_presigned_url(address, date_less_than=expires))
