"""Credentials that are renewed in their file are used from the next attempt on, for the root and for the tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3.exceptions
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from infra import storage, tracking
from infra.errors import EnvironmentFailure
from infra.storage import Store
from workflows.training import patience
from workflows.training.patience import Warnings, persist


def write_keys(path: Path, name: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {name}-key\naws_secret_access_key = {name}-secret\n")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that this process takes its credentials from; it has the old ones."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    write_keys(tmp_path / "credentials", "old")
    storage.renew()
    tracking.renew()
    return tmp_path / "credentials"


def key_of(client: Any) -> str:
    return str(client._request_signer._credentials.access_key)


def of_root() -> str:
    return key_of(Store("s3://bucket/run")._fs.s3)


def of_tracker() -> str:
    from mlflow.store.artifact.s3_artifact_repo import _get_s3_client

    return key_of(_get_s3_client())


def test_clients_keep_their_credentials_until_they_are_renewed(file: Path) -> None:
    assert (of_root(), of_tracker()) == ("old-key", "old-key")
    write_keys(file, "new")
    assert (of_root(), of_tracker()) == ("old-key", "old-key"), "or there would be nothing to renew"
    storage.renew()
    assert (of_root(), of_tracker()) == ("new-key", "old-key")
    tracking.renew()
    assert of_tracker() == "new-key"


def test_a_call_that_is_refused_finds_the_new_credentials_when_it_is_tried_again(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(patience, "_warnings", Warnings())
    seen: list[str] = []

    def call() -> str:
        seen.append(of_root())
        if seen[-1] == "old-key":
            write_keys(file, "new")
            raise EnvironmentFailure("cannot write s3://bucket/run: permission denied\nhint: check the keys")
        return "done"

    assert persist(call, "upload", Store("s3://bucket/run"), 60) == "done"
    assert seen == ["old-key", "new-key"]


@pytest.mark.parametrize(
    "error",
    [
        ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "PutObject"),
        EndpointConnectionError(endpoint_url="http://me:hunter2SECRET@127.0.0.1:9"),
        boto3.exceptions.S3UploadFailedError("Failed to upload x: ExpiredToken"),
    ],
)
def test_an_artifact_store_that_fails_is_no_end_of_a_training(error: Exception) -> None:
    said = r"^the artifact store of http://me:\*\*\*@mlflow failed: .*\nhint: check AWS_ENDPOINT_URL"
    with pytest.raises(EnvironmentFailure, match=said) as raised, tracking.explained("http://me:hunter2SECRET@mlflow"):
        raise error
    assert "hunter2SECRET" not in str(raised.value)
