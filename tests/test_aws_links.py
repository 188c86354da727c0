"""Links to published scenes: what opens them, until when, and with whose signature."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="no cryptography")
from cryptography.exceptions import InvalidSignature  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa  # noqa: E402
from cryptography.hazmat.primitives.hashes import SHA1  # noqa: E402
from emulator import connected  # noqa: E402

from spaceport_gs.errors import InputError  # noqa: E402
from spaceport_gs.pipeline.aws.cloud import Cloud  # noqa: E402
from spaceport_gs.pipeline.aws.links import links_to  # noqa: E402
from spaceport_gs.pipeline.aws.stack import Stack  # noqa: E402
from spaceport_gs.pipeline.aws.template import check  # noqa: E402

BUCKET, SITE = "scenes-of-ours", "https://d1.cloudfront.net"
SECOND = 1 / 3600


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """With a scene a1 that is published, in a bucket that looks at signatures."""
    with connected(tmp_path_factory.mktemp("aws") / "log", ["ministack"], AUTH="true") as found:
        s3 = found.client("s3")
        s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": found.region})
        pointer = {"page": "a1/0b/index.html", "scene": "a1/0b/scene.sog"}
        s3.put_object(Bucket=BUCKET, Key="published/a1/scene.json", Body=json.dumps(pointer).encode())
        s3.put_object(Bucket=BUCKET, Key="published/a2/scene.json", Body=b"[]")
        for path in pointer.values():
            s3.put_object(Bucket=BUCKET, Key=f"published/{path}", Body=path.encode())
        yield found


@pytest.fixture(scope="module")
def pair() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: rsa.RSAPrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())


def stack(publishing: str, public: str = "") -> Stack:
    outputs = {"Bucket": BUCKET, "Site": SITE, "SigningKey": "K1"}
    return Stack("spaceport", "eu-central-1", outputs, {"Publishing": publishing, "PublicKey": public})


def read(address: str) -> str:
    """What an address answers; its code if it refuses."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return str(error.code)


def test_links_to_the_bucket_end(cloud: Cloud) -> None:
    links = links_to(cloud, stack("none"), "a1", 1)
    assert links.signed_by == "S3" and links.expires and links.expires > datetime.now(timezone.utc)
    assert read(links.page) == "a1/0b/index.html" and read(links.scene) == "a1/0b/scene.sog"
    assert read(links.page.partition("?")[0]) == "403"
    assert read(links.page.replace("index.html", "scene.sog")) == "403"
    short = links_to(cloud, stack("none"), "a1", SECOND).page
    end = time.monotonic() + 60
    while read(short) != "403":
        assert time.monotonic() < end, "it still opens"
        time.sleep(0.2)


def test_links_through_cloudfront_are_signed_with_the_users_key(
    cloud: Cloud, pair: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    """As CloudFront checks them: the signature is that of the address and its end, and of nothing else."""
    (tmp_path / "key.pem").write_bytes(private_pem(pair))
    links = links_to(cloud, stack("signed", public_pem(pair)), "a1", 48, tmp_path / "key.pem")
    assert links.signed_by == "CloudFront" and links.expires
    for link, path in ((links.page, "a1/0b/index.html"), (links.scene, "a1/0b/scene.sog")):
        address, _, query = link.partition("?")
        given = {name: values[0] for name, values in parse_qs(query).items()}
        assert address == f"{SITE}/{path}" and set(given) == {"Expires", "Signature", "Key-Pair-Id"}
        assert given["Key-Pair-Id"] == "K1" and int(given["Expires"]) == links.expires.timestamp()
        hours = (links.expires - datetime.now(timezone.utc)) / timedelta(hours=1)
        assert 47.9 < hours <= 48
        signature = base64.b64decode(given["Signature"].translate(str.maketrans("-_~", "+=/")))
        assert verifies(pair, signature, address, given["Expires"])
        assert not verifies(pair, signature, address, str(int(given["Expires"]) + 1))
        assert not verifies(pair, signature, f"{SITE}/a2/0b/index.html", given["Expires"])


def verifies(pair: rsa.RSAPrivateKey, signature: bytes, address: str, expires: str) -> bool:
    policy = (
        f'{{"Statement":[{{"Resource":"{address}","Condition":{{"DateLessThan":{{"AWS:EpochTime":{expires}}}}}}}]}}'
    )
    try:
        pair.public_key().verify(signature, policy.encode(), padding.PKCS1v15(), SHA1())
    except InvalidSignature:
        return False
    return True


def test_without_a_key_links_lead_to_the_bucket_and_public_ones_never_end(cloud: Cloud, pair: rsa.RSAPrivateKey) -> None:  # fmt: skip
    assert urlsplit(links_to(cloud, stack("signed", public_pem(pair)), "a1", 1).page).hostname == "127.0.0.1"
    links = links_to(cloud, stack("public"), "a1", 1)
    assert (links.page, links.expires, links.signed_by) == (f"{SITE}/a1/0b/index.html", None, "nobody")


def test_what_cannot_be_linked_to(cloud: Cloud, pair: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    key, signed = tmp_path / "key.pem", stack("signed", public_pem(pair))
    for content, words in (
        (b"no key", "expected a private RSA key in PEM, without a password"),
        (public_pem(pair).encode(), "expected a private RSA key in PEM, without a password"),
        (private_pem(ec.generate_private_key(ec.SECP256R1())), "this is another kind"),
        (private_pem(rsa.generate_private_key(65537, 2048)), "does not belong to the PublicKey of the stack"),
    ):
        key.write_bytes(content)
        with pytest.raises(InputError, match=words):
            links_to(cloud, signed, "a1", 1, key)
    key.write_bytes(private_pem(pair))
    for other in ("none", "public"):
        with pytest.raises(InputError, match=rf"takes no signed links \(Publishing {other}\)"):
            links_to(cloud, stack(other), "a1", 1, key)
    for hours in (0.0, 169.0, float("nan")):
        with pytest.raises(InputError, match="a link holds for up to 168"):
            links_to(cloud, signed, "a1", hours)
    for scene, words in (("b1", "is not published"), ("a2", "is damaged"), ("../a1", "an id has")):
        with pytest.raises(InputError, match=words):
            links_to(cloud, signed, scene, 1)


def test_a_private_key_is_no_parameter(pair: rsa.RSAPrivateKey) -> None:
    check({"Publishing": "signed", "PublicKey": public_pem(pair)})
    with pytest.raises(InputError, match="keep the private one to yourself"):
        check({"Publishing": "signed", "PublicKey": private_pem(pair).decode()})
