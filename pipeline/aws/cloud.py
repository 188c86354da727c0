"""One account and region, and what goes wrong there in words that help."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from spaceport_gs import __version__
from spaceport_gs.errors import InputError

try:
    import boto3
    from botocore import exceptions
    from botocore.config import Config
    from botocore.exceptions import ClientError as ClientError
except ModuleNotFoundError as error:
    raise InputError("the pipeline on AWS needs boto3: pip install 'spaceport-gs[aws]'") from error

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
WRONG = {"InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "InvalidAccessKeyId"}
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError"}
SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}


class Cloud:
    """Clients for one account and region."""

    def __init__(self, session: Any) -> None:
        self._session, self._clients = session, dict[str, Any]()
        self._making = threading.Lock()  # several threads may use boto3's clients, but not make them at once
        self.region: str = session.region_name

    def client(self, service: str, region: str = "") -> Any:
        """`region`: of a service that is not everywhere; empty: this one."""
        with self._making:
            if service not in self._clients:
                self._clients[service] = self._made(service, region or self.region)
            return self._clients[service]

    def _made(self, service: str, region: str) -> Any:
        config = Config(retries={"mode": "standard", "max_attempts": 5}, user_agent_extra=f"spaceport/{__version__}")
        if service == "s3":  # links of the older signature open nothing that KMS encrypts, and only in one region
            config = config.merge(Config(signature_version="s3v4", s3={"addressing_style": "virtual"}))
        return self._session.client(service, region_name=region, config=config)

    @cached_property
    def account_id(self) -> str:
        return str(self.client("sts").get_caller_identity()["Account"])


def connect(region: str = "", profile: str = "") -> Cloud:
    """With the credentials that boto3 finds; empty: the region and the profile that it finds. Asks nothing of AWS."""
    try:
        session = boto3.Session(profile_name=profile or None, region_name=region or os.environ.get("AWS_REGION"))
    except exceptions.ProfileNotFound as error:
        raise InputError(f"profile {profile}: not in ~/.aws/config") from error
    if not session.region_name:
        raise InputError("no region: give --region, or set AWS_REGION")
    known = {
        name
        for partition in session.get_available_partitions()
        for name in session.get_available_regions("sagemaker", partition)
    }
    if session.region_name not in known:
        raise InputError(f"region {session.region_name}: SageMaker is not there; choose one such as eu-central-1")
    return Cloud(session)


@contextmanager
def explained() -> Iterator[None]:
    """What botocore raises leaves as InputError that names cause and remedy. Also a decorator."""
    try:
        yield
    except (exceptions.BotoCoreError, ClientError) as error:
        raise InputError(_explanation(error)) from error


def code_of(error: Any) -> str:
    """Of a ClientError."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _explanation(error: Exception) -> str:
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "no AWS credentials: run `aws configure` or `aws sso login`, or set AWS_PROFILE"
    if isinstance(error, exceptions.TokenRetrievalError | exceptions.SSOTokenLoadError):
        return "the AWS session has expired: run `aws sso login`"
    if isinstance(error, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
        return f"AWS cannot be reached: {error}; check the network and the region"
    if not isinstance(error, ClientError):
        return f"AWS: {error}"
    code, message = code_of(error), str(error.response.get("Error", {}).get("Message", ""))
    if code in EXPIRED:
        return "the AWS credentials have expired: log in again"
    if code in WRONG:
        return "AWS does not know these credentials: check AWS_PROFILE and ~/.aws/credentials"
    if code in SKEWED:
        return "this machine's clock is wrong: AWS takes no request that is off by more than some minutes"
    if code in DENIED:
        named = re.search(r"perform:? (\S+)", message)
        action = named[1] if named else error.operation_name
        return f"no permission for {action}: let who manages the account add it to your role. AWS said: {message}"
    return f"{error.operation_name}: {message or code}"
