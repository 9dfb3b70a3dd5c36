"""What is shown, logged or stored carries no password."""

from __future__ import annotations

import json

import pytest
import yaml

from infra.errors import InputError
from infra.secrets import mask
from infra.storage import open_store
from infra.tracking import Tracker, open_tracker
from workflows.loading import load_config, masked, to_yaml
from workflows.pipeline import flat_parameters

SECRET = "hunter2SECRETVALUE"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql+psycopg2://me:{SECRET}@db:5432/x", "postgresql+psycopg2://me:***@db:5432/x"),
        (f"redis://:{SECRET}@db", "redis://:***@db"),
        (f"http://me:pa@ss{SECRET}@host/path", "http://me:***@host/path"),
        (f"two http://a:{SECRET}@b and http://c:{SECRET}@d", "two http://a:***@b and http://c:***@d"),
        (f"password={SECRET}", "password=***"),
        (f"PASSWD: {SECRET}, next", "PASSWD: ***, next"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET}", "AWS_SECRET_ACCESS_KEY=***"),
        (f"aws_access_key_id = {SECRET}", "aws_access_key_id = ***"),
        (f"AWS_SESSION_TOKEN={SECRET} HOME=/root", "AWS_SESSION_TOKEN=*** HOME=/root"),
        (f"MLFLOW_TRACKING_PASSWORD={SECRET}", "MLFLOW_TRACKING_PASSWORD=***"),
        (f"api_key:{SECRET} api-key:{SECRET} apikey={SECRET}", "api_key:*** api-key:*** apikey=***"),
        (f"https://host/x?token={SECRET}&page=2", "https://host/x?token=***&page=2"),
        (f"https://host/x?X-Amz-Signature={SECRET}", "https://host/x?X-Amz-Signature=***"),
        (f"{{'password': '{SECRET} with space', 'user': 'me'}}", "{'password': '***', 'user': 'me'}"),
        (f'client(secret_key="{SECRET}", port=1)', 'client(secret_key="***", port=1)'),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"Authorization: Basic {SECRET}==", "Authorization: Basic ***"),
        (f"{{'Authorization': 'Basic {SECRET}=='}}", "{'Authorization': 'Basic ***'}"),
        ("the key AKIAIOSFODNN7EXAMPLE is unknown", "the key *** is unknown"),
    ],
)
def test_a_secret_is_replaced_and_nothing_else(text: str, shown: str) -> None:
    assert mask(text) == shown
    assert mask(shown) == shown, "masking twice changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://127.0.0.1:5000/#/models/hvqd@champion",
        "models:/hvqd@champion",
        "s3://bucket/prefix",
        "tokens: 80, tokenizer=vq, secretary",
        "key=value",
        "Basic information: the bearer of this letter",
        "learning_rate: 0.003",
        "write to me@example.org: thanks",
        json.dumps({"psnr": 23.5, "tokens": 80, "access": "a:b"}),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text


def test_json_stays_json() -> None:
    text = json.dumps({"password": f'with "quotes" {SECRET}', "nested": {"api_key": SECRET, "rows": [1, 2]}})
    assert json.loads(mask(text)) == {"password": "***", "nested": {"api_key": "***", "rows": [1, 2]}}


def test_a_configuration_is_shown_and_tracked_without_its_secrets() -> None:
    overrides = [
        f"tracking.uri=http://me:{SECRET}@server:5000",
        f"data.source=s3://key:{SECRET}@bucket/pictures",
        f"compute.address=ray://:{SECRET}@head:10001",
    ]
    config = load_config("tiny", None, overrides, root=f"ftp://me:{SECRET}@host/x")
    assert SECRET in to_yaml(config)
    shown = to_yaml(masked(config))
    assert SECRET not in shown
    values = yaml.safe_load(shown)
    assert (values["tracking"]["uri"], values["root"]) == ("http://me:***@server:5000", "ftp://me:***@host/x")
    assert values["compute"]["address"] == "ray://:***@head:10001"
    changed = {name for name, value in flat_parameters(config).items() if SECRET in mask(str(value))}
    assert changed == set(), "parameters are masked one by one when they are logged"
    assert "tracking.uri" not in flat_parameters(config)


def test_the_rest_of_a_configuration_is_shown_as_it_is() -> None:
    config = load_config("tiny")
    assert masked(config) == config


def test_an_address_whose_password_was_masked_is_not_used() -> None:
    root = open_store("runs/x")
    with pytest.raises(InputError, match=r"the password of tracking\.uri is not known: http://me:\*\*\*@s\nhint: "):
        open_tracker("http://me:***@s", "hvqd", root)
    assert open_tracker("http://me@s", "hvqd", root) == Tracker("http://me@s", None, "hvqd")
